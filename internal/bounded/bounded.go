// Package bounded keeps one address from having all of a listener's connections.
package bounded

import (
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// PerAddress is how many connections one address may have to a listener.
const PerAddress = 4096

// sayEvery is how often the log says that an address is at its bound.
const sayEvery = time.Minute

// Listener returns l with a bound on the connections of each address, or of each /64
// network of IPv6. It closes further connections at once, and logs that. Unix sockets,
// loopback addresses and the networks in exempt have no bound.
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
	said time.Time // when the log said last that it has too many
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

// admit counts a connection until its descriptor is closed. If its address may have
// no further one, admit closes the connection and returns nil.
func (b *listener) admit(c net.Conn, from netip.Addr) net.Conn {
	if !b.enter(from) {
		_ = c.Close()
		return nil
	}
	leave := sync.OnceFunc(func() { b.leave(from) })
	// A connection of package linger, whose path in Caddy's module is another one.
	if lingers, ok := c.(interface{ OnGone(func()) }); ok {
		lingers.OnGone(leave)
		return c
	}
	return &conn{Conn: c, leave: leave}
}

// enter counts a connection, if its address may have one more.
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
		b.log.Warn("closed a connection, because its address has as many as it may; if it is a proxy's, name it in WRENN_TRUSTED_PROXIES", "address", from, "connections", b.each)
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

// counted returns the address, or the /64 network of IPv6, that a connection from remote
// counts for. It returns false if nothing bounds those.
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

// conn counts until it is closed.
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
