package linger

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// pair returns a connection to a listener with the given bounds.
func pair(t *testing.T, network string, b bounds) (client net.Conn, server *Conn) {
	t.Helper()
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	plain, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	l := &listener{plain, b}
	t.Cleanup(func() { l.Close() })
	if client, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if err := client.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return client, accepted.(*Conn)
}

// long are bounds that no test reaches.
var long = bounds{1 << 40, time.Hour, time.Hour}

func bothNetworks(t *testing.T, f func(t *testing.T, network string)) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) { f(t, network) })
	}
}

// gone returns a channel that is closed when c no longer lingers.
func gone(c *Conn) chan struct{} {
	ch := make(chan struct{})
	c.OnGone(func() { close(ch) })
	return ch
}

// TestAnswerThenClose closes a connection with unread bytes while more arrive.
func TestAnswerThenClose(t *testing.T) {
	bothNetworks(t, func(t *testing.T, network string) {
		client, server := pair(t, network, long)
		over := gone(server)
		if _, err := client.Write(make([]byte, 100<<10)); err != nil {
			t.Fatal(err)
		}
		if _, err := server.Write([]byte("answer")); err != nil {
			t.Fatal(err)
		}
		if err := server.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Write(make([]byte, 32<<20)); err != nil {
			t.Errorf("a client that keeps sending: %v", err)
		}
		if b, err := io.ReadAll(client); err != nil || string(b) != "answer" {
			t.Errorf("%q, %v", b, err)
		}
		select {
		case <-over:
			t.Error("the server does not wait for the client")
		default:
		}
		client.Close()
		<-over
	})
}

// TestCloseEndsWaits closes a connection while other goroutines read and write.
func TestCloseEndsWaits(t *testing.T) {
	bothNetworks(t, func(t *testing.T, network string) {
		_, server := pair(t, network, long)
		ended := make(chan error, 2)
		go func() {
			_, err := server.Read(make([]byte, 1))
			ended <- err
		}()
		wrote := make(chan struct{})
		go func() {
			b := make([]byte, 64<<10)
			_, err := server.Write(b)
			close(wrote)
			for err == nil {
				_, err = server.Write(b)
			}
			ended <- err
		}()
		<-wrote
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		for range 2 {
			// A write between the two steps of a close fails, because nothing more may be
			// sent.
			if err := <-ended; !errors.Is(err, net.ErrClosed) && !errors.Is(err, syscall.EPIPE) {
				t.Error(err)
			}
		}
		if err := server.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed again: %v", err)
		}
		if _, err := server.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read afterwards: %v", err)
		}
	})
}

// TestBounds has clients that never close.
func TestBounds(t *testing.T) {
	bothNetworks(t, func(t *testing.T, network string) {
		for name, b := range map[string]bounds{
			"bytes": {1 << 20, time.Hour, time.Hour},
			"whole": {1 << 40, 50 * time.Millisecond, time.Hour},
			"idle":  {1 << 40, time.Hour, 50 * time.Millisecond},
		} {
			t.Run(name, func(t *testing.T) {
				client, server := pair(t, network, b)
				over := gone(server)
				server.Close()
				if name == "idle" {
					<-over
					return
				}
				var sent int64
				for buf := make([]byte, 32<<10); ; {
					n, err := client.Write(buf)
					sent += int64(n)
					if err == nil {
						continue
					}
					if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
						t.Error(err)
					}
					break
				}
				<-over
				// The kernel buffers some more.
				if name == "bytes" && sent > 32<<20 {
					t.Errorf("sent %d bytes", sent)
				}
			})
		}
	})
}

// TestClientThatIsDone checks that a close does not wait for a client that has closed.
func TestClientThatIsDone(t *testing.T) {
	bothNetworks(t, func(t *testing.T, network string) {
		client, server := pair(t, network, long)
		client.Close()
		if _, err := server.Read(make([]byte, 1)); err != io.EOF {
			t.Fatal(err)
		}
		over := gone(server)
		server.Close()
		select {
		case <-over: // it may end before Close returns
		default:
			t.Error("the connection lingers")
		}
	})
}

// TestAbort resets the connection.
func TestAbort(t *testing.T) {
	client, server := pair(t, "tcp", long)
	over := gone(server)
	if err := server.Abort(); err != nil {
		t.Fatal(err)
	}
	<-over
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v", err)
	}
}

// TestNoDescriptorIsLeft closes many connections in each way.
func TestNoDescriptorIsLeft(t *testing.T) {
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	round := func() {
		for _, how := range []func(client net.Conn, server *Conn){
			func(client net.Conn, server *Conn) { client.Close(); server.Close() },
			func(client net.Conn, server *Conn) { server.Close(); client.Close() },
			func(_ net.Conn, server *Conn) { _ = server.Abort(); server.Close() },
		} {
			client, server := pair(t, "tcp", long)
			over := gone(server)
			how(client, server)
			<-over
			client.Close()
		}
	}
	round()
	before := count()
	for range 20 {
		round()
	}
	// Each round's listeners stay open until the end of the test.
	if after := count(); after > before+20*3 {
		t.Errorf("%d descriptors, before %d", after, before)
	}
}
