package main

import (
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/wrenn-dev/wrenn/deploy/caddy/bounded"
)

func init() { caddy.RegisterModule(new(perAddress)) }

// perAddress is the listener wrapper "bounded NETWORKS", which bounds the number of
// connections of each address outside of these networks. It must come right after
// "linger": then "ports" still gets the sockets themselves, and a connection that
// "ports" passes on no longer counts here.
type perAddress struct {
	Exempt []netip.Prefix `json:"exempt"`

	log *slog.Logger
}

// CaddyModule implements [caddy.Module].
func (*perAddress) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "caddy.listeners.bounded", New: func() caddy.Module { return new(perAddress) }}
}

// UnmarshalCaddyfile implements [caddyfile.Unmarshaler].
func (b *perAddress) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	for network := range list(strings.Join(d.RemainingArgs(), " ")) {
		p, err := netip.ParsePrefix(network)
		if err != nil {
			return d.WrapErr(fmt.Errorf("trusted proxies: %w", err))
		}
		b.Exempt = append(b.Exempt, p)
	}
	return nil
}

// list returns the entries of a setting that are separated by commas, spaces or both.
func list(setting string) iter.Seq[string] {
	return strings.FieldsSeq(strings.ReplaceAll(setting, ",", " "))
}

// Provision implements [caddy.Provisioner].
func (b *perAddress) Provision(c caddy.Context) error {
	b.log = c.Slogger()
	return nil
}

// WrapListener implements [caddy.ListenerWrapper].
func (b *perAddress) WrapListener(l net.Listener) net.Listener {
	return bounded.Listener(l, bounded.PerAddress, b.Exempt, b.log)
}
