package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// fake starts a guest daemon with the test's handler, at its own loopback address.
func fake(t *testing.T, h http.HandlerFunc) (*Client, *httptest.Server) {
	t.Helper()
	addr := netip.AddrFrom4([4]byte{127, byte(100 + os.Getpid()>>8&63), byte(os.Getpid()), byte(lastAddr.Add(1))})
	l, err := net.Listen("tcp", netip.AddrPortFrom(addr, hostwire.GuestPort).String())
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.Listener.Close()
	srv.Listener = l
	srv.Start()
	t.Cleanup(srv.Close)
	c := New(addr, "old")
	t.Cleanup(c.Close)
	return c, srv
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestInitChangesTheToken(t *testing.T) {
	c := start(t)
	if _, err := c.Init(await.Context(t), Settings{Token: "another", Envs: map[string]string{"FROM": "clone"}, Hostname: "clone", Thaw: true}); err != nil {
		t.Fatal(err)
	}
	res, err := c.Exec(t.Context(), sh("echo $FROM"), nil)
	if err != nil || string(res.Stdout) != "clone\n" {
		t.Errorf("after the change: %q, %v", res.Stdout, err)
	}
	// An agent may not know whether its guest has the new token yet.
	addr, _ := netip.ParseAddrPort(strings.TrimPrefix(c.base, "http://"))
	unsure := New(addr.Addr(), "the-token")
	defer unsure.Close()
	if _, err := unsure.Init(await.Context(t), Settings{Token: "another"}); err != nil {
		t.Error("init with the new token in place: ", err)
	}
	if res, err := unsure.Exec(t.Context(), sh("echo -$FROM-"), nil); err != nil || string(res.Stdout) != "--\n" {
		t.Errorf("with an empty environment: %q, %v", res.Stdout, err)
	}
	if _, err := unsure.Init(await.Context(t), Settings{Hostname: "a/b"}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a bad host name: %v", err)
	}
	late := New(addr.Addr(), "the-token")
	defer late.Close()
	if _, err := late.Init(await.Context(t), Settings{Token: "mine"}); !Said(err) {
		t.Errorf("init with a wrong token: %v", err)
	}
}

func TestInitEndsOldConnections(t *testing.T) {
	c := start(t)
	let := filepath.Join(t.TempDir(), "let")
	script := fmt.Sprintf("echo up; until [ -e %[1]s ]; do sleep 0.01; done; echo still; touch %[1]s.done; exec sleep 600", let)
	p, err := c.Start(t.Context(), sh(script), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := p.Next(); err != nil || string(out.Stdout) != "up\n" {
		t.Fatal(out, err)
	}
	if _, err := c.Init(await.Context(t), Settings{}); err != nil {
		t.Fatal(err)
	}
	for {
		out, err := p.Next()
		if err != nil {
			if connect.CodeOf(err) != connect.CodeUnavailable {
				t.Errorf("the stream ends with %v", err)
			}
			break
		}
		if out.Exit != nil {
			t.Fatalf("the process ended: %v", out.Exit)
		}
	}
	// The process continues, even if it writes.
	if res, err := c.Exec(t.Context(), sh(fmt.Sprintf("touch %[1]s; until [ -e %[1]s.done ]; do sleep 0.01; done; kill -0 %[2]d", let, p.PID)), nil); err != nil || res.Code != 0 {
		t.Error(res, err)
	}
	p.Close()
}

func TestInitRetriesLostResponse(t *testing.T) {
	var mu sync.Mutex
	var bodies []map[string]any
	var tokens []string
	token := "old"
	c, _ := fake(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		body, _ := io.ReadAll(r.Body)
		var m map[string]any
		if err := json.Unmarshal(body, &m); err != nil {
			t.Errorf("%v in %s", err, body)
		}
		tokens = append(tokens, r.Header.Get(hostwire.AccessToken))
		if r.Header.Get(hostwire.AccessToken) != token {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		bodies = append(bodies, m)
		token = m["accessToken"].(string)
		if len(bodies) == 1 {
			panic(http.ErrAbortHandler) // the response is lost
		}
		_, _ = w.Write([]byte(`{"disk":4096,"warnings":["no\u0000","` + strings.Repeat("x", 5000) + `"]}`))
	})
	r, err := c.Init(await.Context(t), Settings{Token: "new", Hostname: "h", GrowDisk: 4096, Debug: true, Thaw: true})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(tokens, []string{"old", "old", "new"}) {
		t.Errorf("the client sent the tokens %v", tokens)
	}
	if r.Disk != 4096 || len(r.Warnings) != 2 || len(r.Warnings[1]) > maxError {
		t.Errorf("the result has a disk of %d bytes and the warnings %.100q", r.Disk, r.Warnings)
	}
	m := bodies[1]
	at, err := time.Parse(time.RFC3339Nano, m["timestamp"].(string))
	if err != nil || time.Since(at).Abs() > 20*time.Second {
		t.Error(at, err)
	}
	if m["hostname"] != "h" || m["growDisk"] != 4096.0 || m["debug"] != true || m["thaw"] != true || len(m["entropy"].(string)) != 88 {
		t.Errorf("sent %v", m)
	}
}

func TestInitHostileResponses(t *testing.T) {
	answers := []http.HandlerFunc{
		func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(bytes.Repeat([]byte("["), 1<<20)) },
		func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) },
		func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusTemporaryRedirect)
		},
		func(w http.ResponseWriter, _ *http.Request) { http.Error(w, strings.Repeat("y", 1<<20), 500) },
	}
	for i, a := range answers {
		c, _ := fake(t, a)
		if r, err := c.Init(await.Context(t), Settings{Token: "new"}); err == nil || len(err.Error()) > 2*maxError {
			t.Errorf("%d: %v, %.200v", i, r, err)
		}
	}
	// Init drops surplus warnings, and stops waiting for a response when its context ends.
	c, _ := fake(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"warnings":["a"` + strings.Repeat(`,"a"`, 1000) + `]}`))
	})
	if r, err := c.Init(await.Context(t), Settings{}); err != nil || len(r.Warnings) != maxWarnings {
		t.Error(len(r.Warnings), err)
	}
	c, _ = fake(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // otherwise the server does not notice the closed connection
		<-r.Context().Done()
	})
	if _, err := c.Init(within(t, 300*time.Millisecond), Settings{}); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Error(err)
	}
	if err := c.Freeze(within(t, 300*time.Millisecond)); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Error(err)
	}
}

// TestInitRetriesRefusedConnection checks that Init reaches a guest that refuses connections
// at first.
func TestInitRetriesRefusedConnection(t *testing.T) {
	c, srv := fake(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	addr := srv.Listener.Addr().String()
	srv.Close()
	refused := make(chan struct{}, 1)
	connect := c.transport.Dial
	c.transport.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := connect(ctx, address)
		if errors.Is(err, syscall.ECONNREFUSED) {
			select {
			case refused <- struct{}{}:
			default: // an earlier attempt was refused
			}
		}
		return conn, err
	}
	done := make(chan error, 1)
	go func() {
		_, err := c.Init(await.Context(t), Settings{Token: "new"})
		done <- err
	}()
	await.Recv(t, "a connection is refused", refused)
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
	}()
	defer l.Close()
	if err := await.Recv(t, "the guest is reached", done); err != nil {
		t.Error(err)
	}
}

// TestDialDoesNotWaitForTheKernel checks that dial connects in less than the second after
// which the kernel retransmits. It repeats the attempt, because the machine may be busy.
func TestDialDoesNotWaitForTheKernel(t *testing.T) {
	await.Until(t, "a connection before the kernel retransmits", func() bool {
		d := dialLate(t)
		return d < 900*time.Millisecond
	})
}

// dialLate returns how long it takes to connect to a listener that accepts connections
// only after a while.
func dialLate(t *testing.T) time.Duration {
	t.Helper()
	// A listener with a full queue drops packets, like a guest that is not up yet.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	target := l.Addr().String()
	waiting, err := net.Dial("tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	if conn, err := net.DialTimeout("tcp", target, 100*time.Millisecond); err == nil {
		conn.Close()
		t.Skip("this kernel's queue is larger than asked for")
	}
	const late = 60 * time.Millisecond
	// real time: the kernel does not tell when it drops the first packet.
	stop := time.AfterFunc(late, func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
		}
	})
	defer stop.Stop()
	begin := time.Now()
	conn, err := dial(await.Context(t), target)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	d := time.Since(begin)
	if d < late {
		t.Errorf("connected after %v, before the listener accepted connections", d)
	}
	return d
}
