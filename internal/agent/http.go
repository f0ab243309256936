package agent

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/proxy"
	"github.com/wrenn-dev/wrenn/internal/cork"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/patience"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

// maxMessage bounds one message of a request, in bytes. The largest have a file or a
// command's input.
const maxMessage = 40 << 20

// routes returns the handler of all the agent's paths. All but /health need the token.
func (a *Agent) routes() http.Handler {
	rpc := http.NewServeMux()
	path, handler := hostagentv1connect.NewHostAgentHandler(&service{Agent: a}, a.options()...)
	rpc.Handle(path, cork.Handler(handler))
	rpc.Handle("GET /metrics", a.Metrics())
	rpc.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		proxy.Answer(w, http.StatusNotFound, "not_found", "no such path")
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/health" {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		if !a.admit(w, r) {
			return
		}
		patience.Trust(r)
		r.Header.Del("Authorization") // a guest must never see the token
		r = r.WithContext(requestid.Received(r.Context(), r.Header, hostwire.RequestID))
		toPort := a.ToPort(r)
		name := "proxy"
		if !toPort {
			name = r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
		}
		ctx, span := a.cfg.Trace.Continue(r.Context(), r.Header.Get(hostwire.Trace), name)
		if span.On() {
			defer span.End()
			r = r.WithContext(ctx)
		}
		// Not through the mux, which would clean up the guest's path.
		if toPort {
			a.proxy.ServeHTTP(w, r)
			return
		}
		ctx = context.WithValue(r.Context(), controllerKey{}, http.NewResponseController(w))
		rpc.ServeHTTP(w, r.WithContext(ctx))
	})
}

// options returns the options of the RPC handlers.
func (a *Agent) options() []connect.HandlerOption {
	return []connect.HandlerOption{
		connect.WithReadMaxBytes(maxMessage),
		connect.WithInterceptors(shown{a}),
		connect.WithRecover(a.recovered),
		// No compression: the server is near, so it costs more than it saves.
		connect.WithCompressMinBytes(1 << 30),
	}
}

// shown is an interceptor that replaces the text of errors unless it was written for
// clients (see [clienterr]), and logs what it replaces. At debug level it logs every call.
type shown struct{ *Agent }

func (s shown) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		begun := time.Now()
		resp, err := next(ctx, req)
		s.called(ctx, req.Spec().Procedure, begun, err)
		return resp, s.show(ctx, req.Spec().Procedure, err)
	}
}

func (s shown) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (s shown) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		begun := time.Now()
		err := next(ctx, conn)
		s.called(ctx, conn.Spec().Procedure, begun, err)
		return s.show(ctx, conn.Spec().Procedure, err)
	}
}

func (s shown) called(ctx context.Context, procedure string, begun time.Time, err error) {
	if err != nil {
		tracing.Of(ctx).Fail(connect.CodeOf(err).String())
	}
	s.log.DebugContext(ctx, "call", "request_id", requestid.From(ctx), "procedure", procedure, "took", time.Since(begun), "error", err)
}

func (s shown) show(ctx context.Context, procedure string, err error) error {
	if err == nil {
		return nil
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		code := connect.CodeUnknown
		switch {
		case errors.Is(err, context.Canceled):
			code = connect.CodeCanceled
		case errors.Is(err, context.DeadlineExceeded):
			code = connect.CodeDeadlineExceeded
		}
		ce = connect.NewError(code, err)
	}
	out, hid := clienterr.Shown(ce)
	if hid {
		s.log.WarnContext(ctx, "request failed", "request_id", requestid.From(ctx), "procedure", procedure, "code", ce.Code(), "client_sees", out.Message(), "error", err)
	}
	return out
}

// recovered logs a handler's panic, and returns the error for its client.
func (a *Agent) recovered(ctx context.Context, spec connect.Spec, _ http.Header, v any) error {
	a.log.ErrorContext(ctx, "panic", "request_id", requestid.From(ctx), "procedure", spec.Procedure, "value", fmt.Sprint(v), "stack", string(debug.Stack()))
	return connect.NewError(connect.CodeInternal, clienterr.New("the host failed"))
}

// admit reports whether a request has the agent's token. If not, it refuses the request.
func (a *Agent) admit(w http.ResponseWriter, r *http.Request) bool {
	if a.allowed(r) {
		return true
	}
	a.log.InfoContext(r.Context(), "request refused", "address", r.RemoteAddr, "path", r.URL.Path, "code", "unauthenticated", "error", "the agent's token is missing or wrong")
	proxy.Answer(w, http.StatusUnauthorized, "unauthenticated", "the agent's token is required")
	return false
}

func (a *Agent) allowed(r *http.Request) bool {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	// Hash both, so that the time taken does not depend on the length either.
	given, want := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(a.cfg.Token))
	return ok && subtle.ConstantTimeCompare(given[:], want[:]) == 1
}

type controllerKey struct{}

// endReceiving makes a pending or later Receive on a request's stream fail at once.
func endReceiving(ctx context.Context) {
	if c, ok := ctx.Value(controllerKey{}).(*http.ResponseController); ok {
		_ = c.SetReadDeadline(time.Unix(1, 0))
	}
}
