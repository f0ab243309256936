package bounded

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/linger"
)

// from is a connection from an address.
type from struct {
	net.Conn
	addr   net.Addr
	closed bool
}

func (f *from) RemoteAddr() net.Addr { return f.addr }
func (f *from) Close() error         { f.closed = true; return nil }

// arrivals is a listener that accepts the given connections.
type arrivals struct {
	net.Listener
	conns []*from
}

var errNoMore = errors.New("no more")

func (a *arrivals) Accept() (net.Conn, error) {
	if len(a.conns) == 0 {
		return nil, errNoMore
	}
	c := a.conns[0]
	a.conns = a.conns[1:]
	return c, nil
}

func TestListener(t *testing.T) {
	in := &arrivals{}
	var log bytes.Buffer
	l := Listener(in, 2, []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}, slog.New(slog.NewTextHandler(&log, nil)))
	now := time.Now()
	l.(*listener).now = func() time.Time { return now }
	said := func(want int) {
		t.Helper()
		if n := strings.Count(log.String(), "WRENN_TRUSTED_PROXIES"); n != want {
			t.Errorf("the log reports closed connections %d times, want %d:\n%s", n, want, &log)
		}
	}
	accept := func(address string) (net.Conn, *from) {
		t.Helper()
		c := &from{addr: &net.UnixAddr{Name: "s"}}
		if address != "" {
			c.addr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))
		}
		in.conns = append(in.conns, c)
		got, err := l.Accept()
		if err != nil && !errors.Is(err, errNoMore) {
			t.Fatal(err)
		}
		if (got == nil) != c.closed {
			t.Errorf("%s: accepted %v, closed %v", address, got != nil, c.closed)
		}
		return got, c
	}
	for _, pair := range [][2]string{{"198.51.100.1:1", "[::ffff:198.51.100.1]:2"}, {"[2001:db8::1]:1", "[2001:db8::2]:1"}} {
		one, _ := accept(pair[0])
		if two, _ := accept(pair[1]); one == nil || two == nil {
			t.Fatalf("%v: refused below the bound", pair)
		}
		if three, _ := accept(pair[0]); three != nil {
			t.Errorf("%v: a third connection", pair)
		}
		_ = one.Close()
		_ = one.Close() // This frees one place.
		if again, _ := accept(pair[1]); again == nil {
			t.Errorf("%v: refused after another was closed", pair)
		}
		if more, _ := accept(pair[1]); more != nil {
			t.Errorf("%v: one too many after another was closed", pair)
		}
	}
	said(2) // once for each address
	now = now.Add(sayEvery)
	accept("198.51.100.1:1")
	accept("198.51.100.1:1")
	said(3)
	for _, free := range []string{"127.0.0.1:1", "[::1]:1", "192.0.2.9:1", ""} {
		for range 4 {
			if c, _ := accept(free); c == nil {
				t.Errorf("%q is bounded", free)
			}
		}
	}
}

// TestCountsWhatLingers checks that a closed connection counts until its client is gone.
func TestCountsWhatLingers(t *testing.T) {
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := linger.Listener(plain)
	b := Listener(l, 1, nil, slog.New(slog.DiscardHandler)).(*listener)
	defer b.Close()
	stranger := netip.MustParseAddr("192.0.2.1")
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if server = b.admit(server, stranger); server == nil {
		t.Fatal("the first is not accepted")
	}
	server.Close()
	if b.enter(stranger) {
		t.Error("another is accepted while the first lingers")
	}
	client.Close()
	await.Until(t, "the first no longer counts", func() bool { return b.enter(stranger) })
}
