package main

import (
	"net/http"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/wrenn-dev/wrenn/deploy/caddy/duplex"
)

func init() {
	caddy.RegisterModule(new(fullDuplex))
	httpcaddyfile.RegisterHandlerDirective("full_duplex", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(fullDuplex), nil
	})
	httpcaddyfile.RegisterDirectiveOrder("full_duplex", httpcaddyfile.Before, "handle")
}

// fullDuplex is the directive full_duplex. Caddy's own option of that name
// breaks the connection if nobody reads a request's body.
type fullDuplex struct{}

// CaddyModule implements [caddy.Module].
func (*fullDuplex) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.full_duplex", New: func() caddy.Module { return new(fullDuplex) }}
}

// ServeHTTP implements [caddyhttp.MiddlewareHandler].
func (*fullDuplex) ServeHTTP(w http.ResponseWriter, r *http.Request, next caddyhttp.Handler) (err error) {
	duplex.Serve(w, r, func(w http.ResponseWriter, r *http.Request) { err = next.ServeHTTP(w, r) })
	return err
}
