package netaddr

import (
	"net"
	"net/netip"
	"sync"
)

// PerAddress is how many connections one address may have to a listener.
const PerAddress = 4096

// Bounded returns l with a bound on the connections of each address: further
// ones are closed at once. Of an IPv6 address its network of 64 bits counts.
// Unix sockets, this machine's own addresses and networks in exempt, where front
// doors are, have no bound.
func Bounded(l net.Listener, each int, exempt []netip.Prefix) net.Listener {
	return &bounded{Listener: l, each: each, exempt: exempt, open: make(map[netip.Addr]int)}
}

type bounded struct {
	net.Listener
	each   int
	exempt []netip.Prefix

	mu   sync.Mutex // held for no call that can block
	open map[netip.Addr]int
}

func (b *bounded) Accept() (net.Conn, error) {
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from, ok := b.counted(c.RemoteAddr())
		if !ok {
			return c, nil
		}
		b.mu.Lock()
		full := b.open[from] >= b.each
		if !full {
			b.open[from]++
		}
		b.mu.Unlock()
		if full {
			_ = c.Close()
			continue
		}
		return &boundedConn{Conn: c, leave: sync.OnceFunc(func() { b.leave(from) })}, nil
	}
}

func (b *bounded) leave(from netip.Addr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open[from]--; b.open[from] == 0 {
		delete(b.open, from)
	}
}

// counted returns what connections from an address are counted of.
func (b *bounded) counted(remote net.Addr) (netip.Addr, bool) {
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

type boundedConn struct {
	net.Conn
	leave func()
}

// Close implements [net.Conn].
func (c *boundedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
