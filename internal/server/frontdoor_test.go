package server_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/server"
)

// TestPassedProto checks that on a passed connection, as in Caddy, only a proxy on this
// machine can claim that it terminates TLS.
func TestPassedProto(t *testing.T) {
	var got string
	door := server.FrontDoor(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		got = r.Header.Get("X-Forwarded-Proto")
	}), func(*http.Request) bool { return false })
	for peer, want := range map[string]string{"127.0.0.1:1": "https", "192.0.2.1:1": ""} {
		r := httptest.NewRequest(http.MethodGet, "http://wrenn.example.com/verify", nil)
		r.RemoteAddr = peer
		r.Header.Set("X-Forwarded-Proto", "https")
		door.ServeHTTP(httptest.NewRecorder(), r)
		if got != want {
			t.Errorf("from %s: %q, want %q", peer, got, want)
		}
	}
}
