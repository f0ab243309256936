package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/wrenn-dev/wrenn/deploy/caddy/requestid"
	"github.com/wrenn-dev/wrenn/deploy/caddy/upstream"
)

func init() {
	caddy.RegisterModule(new(proxy))
	httpcaddyfile.RegisterHandlerDirective("control_plane", func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		p := new(proxy)
		return p, p.UnmarshalCaddyfile(h.Dispenser)
	})
	httpcaddyfile.RegisterDirectiveOrder("control_plane", httpcaddyfile.Before, "reverse_proxy")
}

// proxy is the directive "control_plane ADDRESS". It forwards requests unchanged.
// Caddy's reverse_proxy takes more than twice the processor time: for example, it formats
// each request for a log that is off.
type proxy struct {
	Address string `json:"address"`

	transport *upstream.Transport
	log       *slog.Logger
}

// CaddyModule implements [caddy.Module].
func (*proxy) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.control_plane", New: func() caddy.Module { return new(proxy) }}
}

// UnmarshalCaddyfile implements [caddyfile.Unmarshaler].
func (p *proxy) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.AllArgs(&p.Address) {
		return d.ArgErr()
	}
	return nil
}

// Provision implements [caddy.Provisioner].
func (p *proxy) Provision(c caddy.Context) error {
	p.log = c.Slogger()
	to, err := caddy.ParseNetworkAddress(p.Address)
	if err != nil {
		return err
	}
	if to.PortRangeSize() != 1 && !to.IsUnixNetwork() {
		return fmt.Errorf("control_plane: %s is not one address", p.Address)
	}
	dialer := net.Dialer{Timeout: 5 * time.Second}
	p.transport = &upstream.Transport{
		Dial: func(ctx context.Context, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, to.Network, to.JoinHostPort(0))
		},
		IdleTimeout: 90 * time.Second, // The server's own is two minutes.
		OnceIdle:    upstream.HopOnceIdle,
		MaxIdle:     1024, MaxIdlePerHost: 1024,
		MaxHeaderBytes: 2 << 20,
	}
	return nil
}

// Cleanup implements [caddy.CleanerUpper].
func (p *proxy) Cleanup() error {
	p.transport.Close()
	return nil
}

// ServeHTTP implements [caddyhttp.MiddlewareHandler].
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	w.Header().Del("Server") // Keep the control plane's.
	p.forward(w, r)
	return nil
}

// forward forwards a request to the control plane, and the response to the client.
func (p *proxy) forward(w http.ResponseWriter, r *http.Request) {
	(&upstream.Proxy{
		Transport: p.transport,
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL.Host = "control-plane"
			pr.SetXForwarded()
			if upstream.TLSBefore(r) {
				pr.Out.Header.Set(upstream.ProtoField, "https")
			}
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			if r.Context().Err() != nil {
				panic(http.ErrAbortHandler) // The client has left.
			}
			// r has the id that the client chose, if any, as the control plane logs it.
			requestid.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { p.fail(w, r, err) })).ServeHTTP(w, r)
		},
	}).ServeHTTP(w, r)
}

// fail answers a request that the control plane did not answer, and logs why.
func (p *proxy) fail(w http.ResponseWriter, r *http.Request, err error) {
	status, code, message := http.StatusBadGateway, "unavailable", "the control plane closed the connection before it answered"
	switch op := new(net.OpError); {
	case errors.Is(err, upstream.ErrBody):
		// The same form as the control plane's errors.
		status, code, message = http.StatusBadRequest, "invalid_argument", "body: broke off"
	case errors.As(err, &op) && op.Op == "dial":
		message = "the front door cannot connect to the control plane: it is starting or has stopped"
	}
	p.log.InfoContext(r.Context(), "request refused", "request_id", requestid.From(r.Context()), "method", r.Method, "host", r.Host, "status", status, "code", code, "error", err)
	h := w.Header()
	h.Set(requestid.Header, requestid.From(r.Context()))
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	b, _ := json.Marshal(map[string]any{"error": map[string]string{"code": code, "message": message}})
	_, _ = w.Write(b)
}
