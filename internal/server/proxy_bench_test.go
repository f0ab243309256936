package server_test

import (
	"io"
	"net/http"
	"testing"
)

// BenchmarkPort sends requests to a sandbox's port through server and host, one at a
// time.
func BenchmarkPort(b *testing.B) {
	p := newPlane(b)
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") })
	sandbox := p.create(map[string]any{})
	b.ReportAllocs()
	for b.Loop() {
		r, err := p.try("GET", "/", nil, "Host", "80-"+sandbox+".localhost")
		if err != nil || r.Status != http.StatusOK {
			b.Fatalf("%d, %v", r.Status, err)
		}
	}
}
