package metrics

import (
	"testing"
	"time"
)

// TestPoint checks what is computed from two samples.
func TestPoint(t *testing.T) {
	w := Windows[0]
	at := time.Now()
	for name, c := range map[string]struct {
		before, s Sample
		want      float64 // -1: none
	}{
		"half of two":      {Sample{at, time.Second, 2, 0, 0}, Sample{at.Add(5 * time.Second), 6 * time.Second, 2, 0, 0}, 50},
		"more than it has": {Sample{at, time.Second, 1, 0, 0}, Sample{at.Add(5 * time.Second), 60 * time.Second, 1, 0, 0}, 100},
		"the first":        {Sample{}, Sample{at, time.Second, 1, 0, 0}, -1},
		"after a resume":   {Sample{at, 9 * time.Second, 1, 0, 0}, Sample{at.Add(5 * time.Second), time.Second, 1, 0, 0}, -1},
		"after a pause":    {Sample{at, time.Second, 1, 0, 0}, Sample{at.Add(time.Minute), 2 * time.Second, 1, 0, 0}, -1},
	} {
		p := point(c.before, c.s, w)
		if (p.CPUPercent == nil) != (c.want < 0) || p.CPUPercent != nil && *p.CPUPercent != c.want {
			t.Errorf("%s: %v, want %v", name, p.CPUPercent, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(string(Sample{time.UnixMilli(1700000000000), time.Second, 2, 1 << 30, 1 << 20}.encode()))
	f.Add("")
	f.Fuzz(func(t *testing.T, b string) {
		s, ok := decode(b)
		if ok != (len(b) == size) {
			t.Fatal("a sample of another length")
		}
		point(s, s, Windows[0])
	})
}
