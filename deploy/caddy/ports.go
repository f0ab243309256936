package main

import (
	"context"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/wrenn-dev/wrenn/deploy/caddy/handover"
	"github.com/wrenn-dev/wrenn/deploy/caddy/linger"
	"github.com/wrenn-dev/wrenn/deploy/caddy/upstream"
)

func init() { caddy.RegisterModule(new(ports)) }

// Limits for requests that do not reach Caddy's handlers. The Caddyfile sets the same ones
// for those that do; TestTimes in deploy compares them.
const (
	gracePeriod = 2 * time.Second
	readHeader  = 10 * time.Second
	idle        = 2 * time.Minute
	writeIdle   = time.Hour
)

// ports is the listener wrapper "ports DOMAIN OWN SERVER SITES"; OWN is the sandboxes'
// own domain. If Caddy serves only plain HTTP, ports forwards plain requests to
// sandboxes' ports without Caddy's handlers, or passes their connections to a control
// plane on this machine, and those that begin with a call of the API. It must come after
// "linger" and "tls".
type ports struct {
	Domain string `json:"domain"`
	Own    string `json:"own"`
	Server string `json:"server"`
	Sites  string `json:"sites"`

	proxy     *proxy
	sender    *handover.Sender // nil: the control plane is on another machine
	listeners []*upstream.Listener
}

// CaddyModule implements [caddy.Module].
func (*ports) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.listeners.ports", New: func() caddy.Module { return new(ports) }}
}

// UnmarshalCaddyfile implements [caddyfile.Unmarshaler].
func (p *ports) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&p.Domain, &p.Own, &p.Server) {
		return d.ArgErr()
	}
	p.Sites = strings.Join(d.RemainingArgs(), " ")
	return nil
}

// Provision implements [caddy.Provisioner].
func (p *ports) Provision(c caddy.Context) error {
	p.proxy = &proxy{Address: p.Server}
	if to, err := caddy.ParseNetworkAddress(p.Server); err == nil && to.IsUnixNetwork() {
		p.sender = &handover.Sender{Path: handover.Path(to.Host)}
	}
	return p.proxy.Provision(c)
}

// Cleanup implements [caddy.CleanerUpper]. Caddy has closed the listeners.
func (p *ports) Cleanup() error {
	ctx, cancel := context.WithTimeout(context.Background(), gracePeriod)
	defer cancel()
	for _, l := range p.listeners {
		_ = l.Wait(ctx)
	}
	if p.sender != nil {
		_ = p.sender.Close()
	}
	return p.proxy.Cleanup()
}

// WrapListener implements [caddy.ListenerWrapper].
func (p *ports) WrapListener(l net.Listener) net.Listener {
	for site := range list(p.Sites) {
		if !strings.HasPrefix(site, "http://") {
			return l // Caddy redirects requests without TLS.
		}
	}
	wrapped := (&upstream.Server{
		Handler: http.HandlerFunc(p.proxy.forward), Takes: p.takes, Pass: p.pass, PassToo: p.calls(), HeaderTimeout: readHeader, IdleTimeout: idle, WriteIdle: writeIdle,
	}).Listen(l)
	p.listeners = append(p.listeners, wrapped)
	return wrapped
}

// takes reports whether a request's host is the name of a sandbox's port, below either
// domain.
func (p *ports) takes(r *http.Request) bool {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	label, domain, _ := strings.Cut(strings.TrimSuffix(host, "."), ".")
	return strings.Contains(strings.ToLower(label), "-cl-") && (strings.EqualFold(domain, p.Domain) || strings.EqualFold(domain, p.Own))
}

// calls returns the first bytes of API requests that ports passes on to the server. It
// returns none if a site has a host name, because Caddy must then look at the Host header.
func (p *ports) calls() []string {
	for site := range list(p.Sites) {
		if !strings.HasPrefix(site, "http://:") {
			return nil
		}
	}
	return []string{"POST /v1/", "POST /api/v1/"}
}

// pass gives a connection to the control plane, and reports whether that accepted it.
func (p *ports) pass(nc net.Conn, read []byte) bool {
	c, ok := nc.(*linger.Conn)
	if !ok || p.sender == nil || p.sender.Send(c, read) != nil {
		return false
	}
	_ = c.Release()
	return true
}
