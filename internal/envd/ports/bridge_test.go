package ports

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// bridged returns a listener on loopback with a backlog, in the test's own namespace, and
// the address at which a bridge leads to it.
func bridged(t *testing.T, backlog int) (service net.Listener, address string) {
	t.Helper()
	const port = 8001
	service = listen(t, port, backlog)
	b, err := newBridge(own, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	return service, netip.AddrPortFrom(own, port).String()
}

// listen is [net.Listen] with a backlog.
func listen(t *testing.T, port uint16, backlog int) net.Listener {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(port)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.Listen(int(fd), backlog) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	return l
}

// dial connects within [await.Hang], which bounds what is done with the connection too.
func dial(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, await.Hang)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(await.Hang))
	return c.(*net.TCPConn)
}

func accept(t *testing.T, l net.Listener) *net.TCPConn {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(await.Hang))
	return c.(*net.TCPConn)
}

// TestFullBacklog has many connections come at once to a service that accepts one after
// the other and lets few wait: the bridge lets the others wait.
func TestFullBacklog(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	const connections = 100
	service, address := bridged(t, 1)
	var all sync.WaitGroup
	for range connections {
		c := dial(t, address)
		all.Go(func() {
			got := make([]byte, 5)
			_, err := c.Write([]byte("hello"))
			if err == nil {
				_, err = io.ReadFull(c, got)
			}
			if err != nil || string(got) != "hello" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	served := make(chan int)
	go func() {
		n := 0
		defer func() { served <- n }()
		for {
			c, err := service.Accept()
			if err != nil {
				return
			}
			// The bridge may have abandoned an attempt that the kernel has completed since.
			if _, err := io.CopyN(c, c, 5); err == nil {
				n++
			}
			c.Close()
		}
	}()
	all.Wait()
	service.Close()
	if n := <-served; n != connections {
		t.Errorf("the service got %d of %d requests", n, connections)
	}
}

// TestServiceRestarts connects while the service does not listen for a moment.
func TestServiceRestarts(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	service, address := bridged(t, 128)
	service.Close()
	c := dial(t, address)
	again := listen(t, 8001, 128)
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(accept(t, again), got); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestEnds: what ends, ends as if there were no bridge.
func TestEnds(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	service, address := bridged(t, 128)
	connect := func() (client, server *net.TCPConn) { return dial(t, address), accept(t, service) }
	says := func(c *net.TCPConn, text string) {
		t.Helper()
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
	}
	hears := func(c *net.TCPConn, want string, wantErr error) {
		t.Helper()
		got, err := io.ReadAll(c)
		if string(got) != want || !errors.Is(err, wantErr) {
			t.Errorf("%q, %v, not %q, %v", got, err, want, wantErr)
		}
	}
	closes := func(c *net.TCPConn) {
		t.Helper()
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	resets := func(c *net.TCPConn) {
		t.Helper()
		if err := c.SetLinger(0); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	for _, turned := range []bool{false, true} {
		pair := func() (a, b *net.TCPConn) {
			if client, server := connect(); !turned {
				return client, server
			} else {
				return server, client
			}
		}
		// One half ends, and the other continues.
		a, b := pair()
		says(a, "request")
		closes(a)
		hears(b, "request", nil)
		says(b, "response")
		closes(b)
		hears(a, "response", nil)

		// Half a message is not taken for a whole one.
		a, b = pair()
		says(a, "half")
		got := make([]byte, 4)
		if _, err := io.ReadFull(b, got); err != nil {
			t.Fatal(err)
		}
		resets(a)
		hears(b, "", syscall.ECONNRESET)
	}

	// Nobody is left to answer.
	client := dial(t, address)
	server := accept(t, service)
	service.Close()
	server.Close()
	hears(client, "", nil)
	client = dial(t, address)
	hears(client, "", syscall.ECONNRESET)
}
