// Package cork delays the flushes of a response, so that several messages leave in one
// packet. A response whose handler has returned is always sent.
package cork

import (
	"context"
	"net/http"
)

// writer is a ResponseWriter whose handler can delay flushes. Only one goroutine may use
// it.
type writer struct {
	http.ResponseWriter
	corked bool
}

type writerKey struct{}

// Handler returns next with responses whose flushes [Set] can delay.
func Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := &writer{ResponseWriter: w}
		next.ServeHTTP(c, r.WithContext(context.WithValue(r.Context(), writerKey{}, c)))
	})
}

// Set determines whether later flushes of the response to the request with this context
// wait: until another one after Set(ctx, false), or until the handler returns. It has no
// effect without [Handler]. Call it only from the goroutine that writes the response.
func Set(ctx context.Context, corked bool) {
	if c, ok := ctx.Value(writerKey{}).(*writer); ok {
		c.corked = corked
	}
}

// Flush implements [http.Flusher], which streams need.
func (c *writer) Flush() {
	if !c.corked {
		_ = http.NewResponseController(c.ResponseWriter).Flush()
	}
}

// Unwrap lets an [http.ResponseController] reach the connection.
func (c *writer) Unwrap() http.ResponseWriter { return c.ResponseWriter }
