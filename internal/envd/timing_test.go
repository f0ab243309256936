package envd

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// TestTiming checks that a response reports how long it took if, and only if, the client
// asks.
func TestTiming(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"status": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) },
		"body":   func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("x")) },
		"flush":  func(w http.ResponseWriter, _ *http.Request) { _ = http.NewResponseController(w).Flush() },
		"early": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusOK)
		},
	} {
		for _, asked := range []bool{true, false} {
			r := httptest.NewRequest(http.MethodGet, "/health", nil)
			if asked {
				r.Header.Set(hostwire.Timing, "1")
			}
			w := httptest.NewRecorder()
			timed(answer).ServeHTTP(w, r)
			if told := w.Header().Get(hostwire.Timing); (len(told) > len("dur=")) != asked {
				t.Errorf("%s, requested %v: got %q", name, asked, told)
			}
		}
	}
}
