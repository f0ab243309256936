// Package proxy forwards HTTP requests, WebSockets and streams from the control plane to
// a sandbox's ports.
package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	"github.com/wrenn-dev/wrenn/internal/duplex"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/logging"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/tracing"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// forwarded are the headers in which earlier proxies describe the client.
var forwarded = []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "Forwarded"}

// Proxy is the handler of paths with [hostwire.ProxyPrefix]. Its caller must have
// authorized the request.
type Proxy struct {
	use      func(context.Context, uuid.UUID) (*sandbox.Use, error)
	log      *slog.Logger
	refusals *logging.Limit // by sandbox
	errors   *stdlog.Logger // for connections that switch protocols
	requests *prometheus.CounterVec
	// forwarded is the counter in requests of forwarded requests.
	forwarded prometheus.Counter
}

// maxRefusals is how many refused requests of a sandbox the log gets in each refusalPeriod.
const (
	maxRefusals   = 20
	refusalPeriod = time.Minute
)

// New makes a proxy. use acquires a sandbox for a request.
func New(use func(context.Context, uuid.UUID) (*sandbox.Use, error), log *slog.Logger) *Proxy {
	p := &Proxy{use: use, log: log, requests: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "wrenn_agent_proxy_requests_total", Help: "Requests to sandboxes' ports, by result: forwarded, or the error's code.",
	}, []string{"result"})}
	p.forwarded = p.requests.WithLabelValues("forwarded")
	p.errors = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	p.refusals = logging.NewLimit(maxRefusals, refusalPeriod, func(name string, omitted int) {
		log.Info("further requests refused", "sandbox", name, "requests", omitted, "within", refusalPeriod)
	})
	return p
}

// Collectors returns the proxy's metrics.
func (p *Proxy) Collectors() []prometheus.Collector { return []prometheus.Collector{p.requests} }

// problem is an error response of the agent.
type problem struct {
	status  int
	code    string
	message string
}

func (p *problem) Error() string { return p.message }

func badRequest(format string, args ...any) error {
	return &problem{http.StatusBadRequest, "invalid_argument", fmt.Sprintf(format, args...)}
}

// target is the destination of a request.
type target struct {
	sandbox uuid.UUID
	port    int
	path    string // begins with a slash
	rawPath string // as in [url.URL]; empty: the default escaping of path
}

func parse(r *http.Request) (target, error) {
	var t target
	rest, ok := strings.CutPrefix(r.URL.Path, hostwire.ProxyPrefix)
	if !ok {
		return t, badRequest("the path does not begin with %s", hostwire.ProxyPrefix)
	}
	name, rest, _ := strings.Cut(rest, "/")
	port, _, _ := strings.Cut(rest, "/")
	var err error
	if t.sandbox, err = id.Parse(id.Sandbox, name); err != nil {
		return t, badRequest("sandbox id: %v", err)
	}
	t.port, err = strconv.Atoi(port)
	if err != nil || t.port < 1 || t.port > 65535 || strconv.Itoa(t.port) != port {
		return t, badRequest("port: must be a number from 1 to 65535")
	}
	prefix := hostwire.ProxyPrefix + name + "/" + port
	if t.path = strings.TrimPrefix(r.URL.Path, prefix); t.path == "" {
		t.path = "/"
	}
	if raw := r.URL.RawPath; raw != "" {
		if t.rawPath, ok = strings.CutPrefix(raw, prefix); !ok || t.rawPath != "" && t.rawPath[0] != '/' {
			return t, badRequest("sandbox id, port and the slash after them must not be escaped")
		}
	}
	if t.port == hostwire.GuestPort && reserved(t.path) {
		return t, &problem{http.StatusNotFound, "not_found", "no such path"}
	}
	return t, nil
}

// reserved reports whether only the agent may use a path of the guest daemon, in any
// spelling.
func reserved(p string) bool {
	switch strings.ToLower(path.Clean(p)) {
	case "/init", "/freeze", "/thaw":
		return true
	}
	return false
}

// ServeHTTP implements [http.Handler].
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	t, err := parse(r)
	if err != nil {
		p.fail(w, r, err)
		return
	}
	u, err := p.use(r.Context(), t.sandbox)
	if err != nil {
		p.fail(w, r, err)
		return
	}
	duplex.Serve(w, r, func(w http.ResponseWriter, r *http.Request) { p.forward(w, r, t, u) })
}

// forward forwards a request to its sandbox and ends the use.
func (p *Proxy) forward(w http.ResponseWriter, r *http.Request, t target, u *sandbox.Use) {
	defer u.End()
	_, answered := tracing.Start(r.Context(), "guest port")
	rp := upstream.Proxy{
		Transport: u.Transport,
		ErrorLog:  p.errors,
		Rewrite:   func(pr *httputil.ProxyRequest) { rewrite(pr, t, u.Address.String()) },
		Filter:    withoutPrivate,
		ModifyResponse: func(resp *http.Response) {
			p.forwarded.Inc()
			if p.log.Enabled(r.Context(), slog.LevelDebug) {
				p.log.DebugContext(r.Context(), "request forwarded", "request_id", requestid.From(r.Context()), "sandbox", id.Format(id.Sandbox, t.sandbox), "port", t.port, "status", resp.StatusCode)
			}
			answered.SetInt("http.response.status_code", resp.StatusCode)
			answered.End() // the body takes as long as client and guest like
		},
		ErrorHandler: func(w http.ResponseWriter, out *http.Request, err error) {
			answered.EndWith(err)
			if r.Context().Err() != nil {
				panic(http.ErrAbortHandler) // the client is gone
			}
			p.fail(w, r, explain(out, err, t.port, u.Silence()))
		},
	}
	rp.ServeHTTP(w, r.WithContext(u.Context))
}

func rewrite(pr *httputil.ProxyRequest, t target, address string) {
	u := pr.Out.URL
	u.Scheme, u.Host = "http", net.JoinHostPort(address, strconv.Itoa(t.port))
	u.Path, u.RawPath = t.path, t.rawPath
	u.RawQuery = pr.In.URL.RawQuery // unchanged, even if Go cannot parse it
	pr.Out.Host = pr.In.Host
	h := pr.Out.Header
	for _, name := range forwarded {
		if v := pr.In.Header[name]; v != nil {
			h[name] = v
		}
	}
	own := h[hostwire.Authorization]
	withoutPrivate(h)
	if own != nil {
		h["Authorization"] = own
	}
	if t.port == hostwire.GuestPort {
		requestid.Pass(pr.In.Context(), h, requestid.Header)
	}
	if _, ok := h["User-Agent"]; !ok {
		h["User-Agent"] = nil // keeps net/http from adding its own
	}
}

// withoutPrivate removes private headers.
func withoutPrivate(h http.Header) {
	for name := range h {
		if strings.HasPrefix(name, hostwire.Private) {
			delete(h, name)
		}
	}
}

// again reports whether a failed request may be sent again, because the guest received
// nothing of it or it is idempotent.
func again(req *http.Request, err error) bool {
	if errors.Is(err, upstream.ErrUnsent) {
		return true
	}
	return upstream.IdempotentMethod(req.Method) && (req.Body == nil || req.Body == http.NoBody)
}

// explain turns the error of a failed request into one for the client. If a pause cut the
// request off, explain returns the sandbox's state only if the request may be sent again,
// because the control plane then does so. silence is not nil if the guest is silent.
func explain(req *http.Request, err error, port int, silence error) error {
	var timeout net.Error
	cause := context.Cause(req.Context())
	var state *sandbox.StateError
	switch {
	case errors.As(cause, &state) && (state.State == sandbox.Stopping || again(req, err)):
		return cause
	case errors.As(cause, &state):
		return &problem{http.StatusBadGateway, "bad_gateway", fmt.Sprintf("the sandbox became %s before port %d responded; the request may have taken effect", state.State, port)}
	case errors.Is(cause, sandbox.ErrState), errors.Is(cause, sandbox.ErrClosing):
		return &problem{http.StatusBadGateway, "bad_gateway", cause.Error()}
	case errors.Is(err, upstream.ErrBody):
		return badRequest("body: ended early")
	case silence != nil:
		return &problem{http.StatusGatewayTimeout, "timeout", silence.Error()}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &problem{http.StatusBadGateway, "bad_gateway", fmt.Sprintf("nothing listens on port %d of the sandbox", port)}
	case errors.As(err, &timeout) && timeout.Timeout():
		return &problem{http.StatusGatewayTimeout, "timeout", fmt.Sprintf("port %d of the sandbox did not respond", port)}
	case errors.Is(err, upstream.ErrNoResponse):
		return &problem{http.StatusBadGateway, "bad_gateway", fmt.Sprintf("the connection to port %d of the sandbox closed before a response", port)}
	case errors.Is(err, upstream.ErrHTTP2):
		return &problem{http.StatusBadGateway, "bad_gateway", fmt.Sprintf("port %d of the sandbox speaks only HTTP/2, which the proxy did not know yet; try again", port)}
	}
	return &problem{http.StatusBadGateway, "bad_gateway", fmt.Sprintf("port %d of the sandbox sent no valid response", port)}
}

// fail writes err as the response.
func (p *Proxy) fail(w http.ResponseWriter, r *http.Request, err error) {
	var own *problem
	var state *sandbox.StateError
	level := slog.LevelInfo
	switch {
	case errors.As(err, &own):
	case errors.As(err, &state):
		level = slog.LevelDebug // The server resumes the sandbox, or logs why not.
		own = &problem{http.StatusServiceUnavailable, string(state.State), err.Error()}
	case errors.Is(err, sandbox.ErrNotFound):
		own = &problem{http.StatusNotFound, "not_found", err.Error()}
	case errors.Is(err, sandbox.ErrState), errors.Is(err, sandbox.ErrClosing), errors.Is(err, sandbox.ErrUnread):
		own = &problem{http.StatusServiceUnavailable, "unavailable", err.Error()}
	default:
		level = slog.LevelError
		own = &problem{http.StatusInternalServerError, "internal", "the host agent failed"}
	}
	name, rest, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, hostwire.ProxyPrefix), "/")
	port, _, _ := strings.Cut(rest, "/")
	if level != slog.LevelInfo || p.log.Enabled(r.Context(), slog.LevelDebug) || p.refusals.Allow(name) {
		p.log.Log(r.Context(), level, "request refused", "request_id", requestid.From(r.Context()), "sandbox", name, "port", port, "code", own.code, "error", err)
	}
	p.requests.WithLabelValues(own.code).Inc()
	Answer(w, own.status, own.code, own.message)
}

// Answer writes an error as JSON: {"error":{"code":"…","message":"…"}}.
func Answer(w http.ResponseWriter, status int, code, message string) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	h.Set(hostwire.Error, code)
	w.WriteHeader(status)
	type body struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	_ = json.NewEncoder(w).Encode(map[string]body{"error": {code, message}})
}
