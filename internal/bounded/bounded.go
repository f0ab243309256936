// Package bounded limits the connections of each client address to a listener.
package bounded

import (
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// PerAddress is the most connections that one address may have to a listener.
const PerAddress = 4096

// sayEvery is how often the log reports that an address has reached its limit.
const sayEvery = time.Minute

// Listener returns l with a limit on the connections of each IPv4 address and each IPv6
// /64 network. It closes further connections at once, and logs that. Unix sockets,
// loopback addresses and the networks in exempt have no limit.
func Listener(l net.Listener, each int, exempt []netip.Prefix, log *slog.Logger) net.Listener {
	return &listener{Listener: l, each: each, exempt: exempt, log: log, now: time.Now, clients: make(map[netip.Addr]*client)}
}

type listener struct {
	net.Listener
	each   int
	exempt []netip.Prefix
	log    *slog.Logger
	now    func() time.Time

	mu      sync.Mutex // held for no call that can block
	clients map[netip.Addr]*client
}

// client is an address that has connections.
type client struct {
	open int
	said time.Time // when the log last reported that it has too many
}

func (b *listener) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from, ok := b.counted(c.RemoteAddr())
		if !ok {
			return c, nil
		}
		if c = b.admit(c, from); c != nil {
			return c, nil
		}
	}
}

// admit counts a connection until its descriptor is closed. If its address has reached
// the limit, admit closes the connection and returns nil.
func (b *listener) admit(c net.Conn, from netip.Addr) net.Conn {
	if !b.enter(from) {
		_ = c.Close()
		return nil
	}
	leave := sync.OnceFunc(func() { b.leave(from) })
	// This is a connection of package linger, which has another path in Caddy's module.
	if lingers, ok := c.(interface{ OnGone(func()) }); ok {
		lingers.OnGone(leave)
		return c
	}
	return &conn{Conn: c, leave: leave}
}

// enter counts a connection and returns true, if its address may have one more.
func (b *listener) enter(from netip.Addr) bool {
	b.mu.Lock()
	c := b.clients[from]
	if c == nil {
		c = &client{}
		b.clients[from] = c
	}
	full, now := c.open >= b.each, b.now()
	say := full && now.Sub(c.said) >= sayEvery
	if say {
		c.said = now
	}
	if !full {
		c.open++
	}
	b.mu.Unlock()
	if say {
		b.log.Warn("closed a connection, because its address has too many; if this is a proxy, add it to WRENN_TRUSTED_PROXIES", "address", from, "connections", b.each)
	}
	return !full
}

func (b *listener) leave(from netip.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.clients[from]
	if c.open--; c.open == 0 {
		delete(b.clients, from)
	}
}

// counted returns the address, or the IPv6 /64 network, for which a connection from
// remote counts. It returns false if those have no limit.
func (b *listener) counted(remote net.Addr) (netip.Addr, bool) {
	at, err := netip.ParseAddrPort(remote.String())
	if err != nil {
		return netip.Addr{}, false
	}
	ip := at.Addr().Unmap().WithZone("")
	if ip.IsLoopback() {
		return ip, false
	}
	for _, p := range b.exempt {
		if p.Contains(ip) {
			return ip, false
		}
	}
	if ip.Is6() {
		if p, err := ip.Prefix(64); err == nil {
			ip = p.Addr()
		}
	}
	return ip, true
}

// conn is a connection that counts until it is closed.
type conn struct {
	net.Conn
	leave func()
}

// Close implements [net.Conn].
func (c *conn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// NetConn returns the underlying connection.
func (c *conn) NetConn() net.Conn { return c.Conn }
