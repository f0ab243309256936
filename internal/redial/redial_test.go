package redial

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// closedPort is an address on which nothing listens. Only this package's tests use it.
func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.11.213.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// full returns a listener whose backlog is full: it drops what asks for a connection.
func full(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", closedPort(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.Listen(int(fd), 0) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	waiting, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { waiting.Close() })
	if c, err := net.DialTimeout("tcp", l.Addr().String(), 300*time.Millisecond); err == nil {
		c.Close()
		t.Skip("this kernel does not drop what finds a full backlog")
	}
	return l
}

// at returns a dialer with short attempts, which calls do with the number of each.
func at(do func(try int)) *Dialer {
	tries := 0
	return &Dialer{
		Net:   &net.Dialer{Control: func(string, string, syscall.RawConn) error { tries++; do(tries); return nil }},
		First: 20 * time.Millisecond, Longest: 100 * time.Millisecond,
	}
}

// TestWaitsForServer starts to listen once a connection was refused.
func TestWaitsForServer(t *testing.T) {
	for _, hurries := range []bool{false, true} {
		address := closedPort(t)
		tries, refusals := 0, 0
		d := at(func(try int) {
			if tries = try; try == 2 {
				l, err := net.Listen("tcp", address)
				if err != nil {
					t.Error(err)
				}
				t.Cleanup(func() { l.Close() })
			}
		})
		d.First, d.Longest = await.Hang, await.Hang
		d.Refused = func(context.Context) bool { refusals++; return hurries }
		conn, err := d.Dial(await.Context(t), address)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if tries != 2 || refusals != 1 {
			t.Errorf("connected at try %d, after %d refusals", tries, refusals)
		}
	}
}

// TestNobodyListens checks that a refused dial fails soon and does not retry too often,
// whatever its settings.
func TestNobodyListens(t *testing.T) {
	for name, hurries := range map[string]bool{"pauses": false, "hurries": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tries := 0
			d := at(func(try int) { tries = try })
			d.First, d.Longest = await.Hang, await.Hang
			d.Refused = func(context.Context) bool { return hurries }
			began := time.Now()
			_, err := d.Dial(await.Context(t), closedPort(t))
			if took := time.Since(began); !errors.Is(err, syscall.ECONNREFUSED) || took < ListenWait-2*longestPause {
				t.Errorf("%v after %v", err, took)
			}
			if tries < 2 || tries > 80 {
				t.Errorf("%d tries", tries)
			}
		})
	}
}

// TestCancelled ends while nothing listens.
func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(await.Context(t))
	tries := 0
	d := at(func(try int) { tries = try; cancel() })
	if _, err := d.Dial(ctx, closedPort(t)); err == nil || tries != 1 {
		t.Errorf("%d tries: %v", tries, err)
	}
}

// TestFullBacklog: a server whose backlog is full delays a connection. The dialer makes
// one attempt at a time.
func TestFullBacklog(t *testing.T) {
	l := full(t)
	tries := 0
	d := at(func(try int) {
		if tries = try; try == 4 {
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					defer c.Close()
				}
			}()
		}
	})
	entered, most, turns := 0, 0, 0
	d.Enter = func(context.Context, string) (func(), error) {
		entered++
		turns++
		most = max(most, entered)
		return func() { entered-- }, nil
	}
	conn, err := d.Dial(await.Context(t), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if tries < 4 || turns != tries || entered != 0 || most != 1 {
		t.Errorf("%d tries, %d turns, %d at a time, %d not left", tries, turns, most, entered)
	}
}

// TestLate checks that a dial gives up at its deadline, with an error that says so.
func TestLate(t *testing.T) {
	l := full(t)
	var calls atomic.Int32
	d := at(func(int) {})
	d.Late = func(since time.Duration) bool { return calls.Add(1) == 3 && since > 0 }
	_, err := d.Dial(await.Context(t), l.Addr().String())
	var late net.Error
	if !errors.As(err, &late) || !late.Timeout() || calls.Load() != 3 {
		t.Errorf("%v after %d calls", err, calls.Load())
	}
}
