package envd

import (
	"context"
	"log/slog"
	"net/http"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/requestid"
)

// requests is a handler that logs, at debug level, each request with an id before next
// serves it. The agent's own requests have none.
type requests struct {
	log  *slog.Logger
	next http.Handler
}

// ServeHTTP implements [http.Handler].
func (q requests) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if id := r.Header.Get(requestid.Header); id != "" && q.log.Enabled(r.Context(), slog.LevelDebug) {
		q.log.DebugContext(r.Context(), "request", "request_id", id, "method", r.Method, "path", r.URL.Path)
	}
	q.next.ServeHTTP(w, r)
}

// calls is an interceptor that logs failed calls with the request's id.
type calls struct{ log *slog.Logger }

func (c calls) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		resp, err := next(ctx, req)
		c.ended(ctx, req.Spec(), req.Header().Get(requestid.Header), err)
		return resp, err
	}
}

func (c calls) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (c calls) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		err := next(ctx, conn)
		c.ended(ctx, conn.Spec(), conn.RequestHeader().Get(requestid.Header), err)
		return err
	}
}

// ended logs a call's error: as a warning if the daemon is at fault, otherwise only at
// the level debug, because programs can cause many.
func (c calls) ended(ctx context.Context, spec connect.Spec, id string, err error) {
	if err == nil {
		return
	}
	level := slog.LevelDebug
	switch connect.CodeOf(err) {
	case connect.CodeInternal, connect.CodeUnknown, connect.CodeDataLoss:
		level = slog.LevelWarn
	}
	c.log.Log(ctx, level, "call failed", "request_id", id, "procedure", spec.Procedure, "error", err)
}
