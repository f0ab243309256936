package main

import (
	"net"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/wrenn-dev/wrenn/deploy/caddy/linger"
)

func init() { caddy.RegisterModule(new(lingering)) }

// lingering is the listener wrapper "linger". It must come before "tls", so that
// it has the sockets themselves.
type lingering struct{}

// CaddyModule implements [caddy.Module].
func (*lingering) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.listeners.linger", New: func() caddy.Module { return new(lingering) }}
}

// UnmarshalCaddyfile implements [caddyfile.Unmarshaler].
func (*lingering) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	return nil
}

// WrapListener implements [caddy.ListenerWrapper].
func (*lingering) WrapListener(l net.Listener) net.Listener { return linger.Listener(l) }
