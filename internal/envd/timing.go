package envd

import (
	"net/http"
	"strconv"
	"time"

	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// timed returns a handler that reports to the agent, on request, how long next took until
// it began to respond.
func timed(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, asked := r.Header[hostwire.Timing]; asked {
			w = &timing{ResponseWriter: w, begun: time.Now()}
		}
		next.ServeHTTP(w, r)
	})
}

type timing struct {
	http.ResponseWriter
	begun time.Time
	told  bool
}

func (t *timing) tell() {
	if !t.told {
		t.told = true
		ms := float64(time.Since(t.begun)) / float64(time.Millisecond)
		t.Header().Set(hostwire.Timing, "dur="+strconv.FormatFloat(ms, 'f', 3, 64))
	}
}

func (t *timing) WriteHeader(status int) {
	if status >= 200 {
		t.tell()
	}
	t.ResponseWriter.WriteHeader(status)
}

func (t *timing) Write(b []byte) (int, error) {
	t.tell()
	return t.ResponseWriter.Write(b)
}

// Flush implements [http.Flusher], which some handlers require.
func (t *timing) Flush() {
	t.tell()
	_ = http.NewResponseController(t.ResponseWriter).Flush()
}

// Unwrap lets http.ResponseController reach the connection.
func (t *timing) Unwrap() http.ResponseWriter { return t.ResponseWriter }
