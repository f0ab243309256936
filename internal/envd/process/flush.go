package process

import (
	"context"
	"net/http"

	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
)

// flusher is a ResponseWriter whose handler can delay flushes, so that several messages
// leave in one packet. Only one goroutine may use it.
type flusher struct {
	http.ResponseWriter
	held bool
}

type flusherKey struct{}

// withFlusher gives each request of next a flusher.
func withFlusher(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f := &flusher{ResponseWriter: w}
		next.ServeHTTP(f, r.WithContext(context.WithValue(r.Context(), flusherKey{}, f)))
	})
}

// Flush implements [http.Flusher], which streams need.
func (f *flusher) Flush() {
	if !f.held {
		_ = http.NewResponseController(f.ResponseWriter).Flush()
	}
}

// Unwrap lets an [http.ResponseController] reach the connection.
func (f *flusher) Unwrap() http.ResponseWriter { return f.ResponseWriter }

// paced wraps send: the end event leaves together with the end of the stream, when the
// handler returns. With holdStart, the start event leaves together with the next event.
func paced(ctx context.Context, holdStart bool, send func(*pb.ProcessEvent) error) func(*pb.ProcessEvent) error {
	f, ok := ctx.Value(flusherKey{}).(*flusher)
	if !ok {
		return send
	}
	return func(e *pb.ProcessEvent) error {
		switch e.GetEvent().(type) {
		case *pb.ProcessEvent_Start:
			f.held = holdStart
		case *pb.ProcessEvent_End:
			f.held = true
		default:
			f.held = false
		}
		return send(e)
	}
}
