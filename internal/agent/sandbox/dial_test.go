package sandbox

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// closedPort returns an address on which nothing listens.
func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.255.253:0", claimNet(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// guestAt returns a guest whose daemon reports no new servers.
func guestAt(host string) portsGuest {
	return portsGuest{host: host, knock: func(context.Context, uint16) bool { return false }, suspect: func() {}, silent: func() bool { return false }}
}

// TestSilentPort checks that requests to a port with a full backlog wait until the agent finds
// that the guest does not respond. It makes more requests than may connect at a time.
func TestSilentPort(t *testing.T) {
	l, err := net.Listen("tcp", closedPort(t))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
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
	defer waiting.Close()
	host, _, _ := net.SplitHostPort(l.Addr().String())
	g := guestAt(host)
	var suspected atomic.Int32
	silent := make(chan struct{})
	g.late = time.Nanosecond
	g.suspect = func() { suspected.Add(1) }
	g.silent = func() bool {
		select {
		case <-silent:
			return true
		default:
			return false
		}
	}
	p := newPorts(t.Context(), new(net.Dialer), g)
	defer p.close()
	const requests = maxDialsPerPort + 1
	failures := make(chan error, requests)
	for range requests {
		go func() {
			req, err := http.NewRequestWithContext(await.Context(t), http.MethodGet, "http://"+l.Addr().String()+"/", nil)
			if err != nil {
				failures <- err
				return
			}
			resp, err := p.RoundTrip(req)
			if err == nil {
				resp.Body.Close()
			}
			failures <- err
		}()
	}
	await.Until(t, "attempts fail", func() bool { return suspected.Load() > 0 })
	select {
	case err := <-failures:
		t.Errorf("a request did not wait: %v", err)
	default:
	}
	close(silent)
	for range requests {
		var late net.Error
		if err := await.Recv(t, "the end of a request", failures); !errors.As(err, &late) || !late.Timeout() || !errors.Is(err, upstream.ErrUnsent) {
			t.Errorf("a request to a guest that does not respond: %v", err)
		}
	}
}

// TestDialEndsWithSandbox ends a sandbox while a request waits for a server in it. The agent
// must not connect to its address afterwards.
func TestDialEndsWithSandbox(t *testing.T) {
	life, end := context.WithCancel(t.Context())
	defer end()
	tries := 0
	d := &net.Dialer{Control: func(string, string, syscall.RawConn) error {
		tries++
		end()
		return nil
	}}
	host, port, err := net.SplitHostPort(closedPort(t))
	if err != nil {
		t.Fatal(err)
	}
	transport := newPorts(life, d, guestAt(host))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if err == nil {
		resp.Body.Close()
	}
	if err == nil || tries != 1 {
		t.Errorf("%d tries, %v", tries, err)
	}
}

// TestServerStartsLater starts a server while a request waits for it. The agent must connect
// again once the guest daemon reports the server, and not before.
func TestServerStartsLater(t *testing.T) {
	address := closedPort(t)
	host, port, _ := net.SplitHostPort(address)
	g := guestAt(host)
	g.knock = func(_ context.Context, asked uint16) bool {
		if strconv.Itoa(int(asked)) != port {
			t.Errorf("the agent asks for port %d, not %s", asked, port)
		}
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Error(err)
			return false
		}
		go func() { _ = http.Serve(l, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})) }()
		t.Cleanup(func() { l.Close() })
		return true
	}
	tries := 0
	d := &net.Dialer{Control: func(string, string, syscall.RawConn) error { tries++; return nil }}
	p := newPorts(t.Context(), d, g)
	defer p.close()
	req, err := http.NewRequestWithContext(await.Context(t), http.MethodGet, "http://"+address+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := p.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if tries != 2 {
		t.Errorf("%d tries", tries)
	}
}

// TestManyPortsWithoutServer checks that requests to many ports ask the guest daemon for
// few of them at a time.
func TestManyPortsWithoutServer(t *testing.T) {
	host, _, _ := net.SplitHostPort(closedPort(t))
	g := guestAt(host)
	var at atomic.Int32
	full := make(chan struct{}, 1)
	g.knock = func(ctx context.Context, _ uint16) bool {
		n := at.Add(1)
		defer at.Add(-1)
		switch {
		case n > maxKnocks:
			t.Errorf("the agent asks for %d ports at a time", n)
		case n == maxKnocks:
			select {
			case full <- struct{}{}:
			default:
			}
		}
		<-ctx.Done()
		return false
	}
	p := newPorts(t.Context(), new(net.Dialer), g)
	defer p.close()
	ctx, cancel := context.WithCancel(await.Context(t))
	defer cancel()
	var all sync.WaitGroup
	for port := range maxKnocks + 20 {
		all.Go(func() {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s:%d/", host, 1+port), nil)
			if err != nil {
				t.Error(err)
				return
			}
			if resp, err := p.RoundTrip(req); err == nil {
				resp.Body.Close()
				t.Error("a port without a server responded")
			}
		})
	}
	await.Recv(t, "the agent asks for as many ports as it may", full)
	cancel()
	all.Wait()
}

// TestGRPC checks that gRPC requests reach a server over HTTP/2, which they need, and
// others over HTTP/1.1, which every server speaks.
func TestGRPC(t *testing.T) {
	l, err := net.Listen("tcp", closedPort(t))
	if err != nil {
		t.Fatal(err)
	}
	server := netaddr.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", r.Proto, b)
		_ = http.NewResponseController(w).Flush()
		w.Header().Set(http.TrailerPrefix+"Grpc-Status", "0")
	}))
	go server.Serve(l)
	defer server.Close()
	host, _, _ := net.SplitHostPort(l.Addr().String())
	p := newPorts(t.Context(), new(net.Dialer), guestAt(host))
	defer p.close()
	for kind, want := range map[string]string{
		"application/grpc": "HTTP/2.0", "application/grpc+proto": "HTTP/2.0", "Application/GRPC; x=y": "HTTP/2.0",
		"application/grpc-web": "HTTP/1.1", "application/json": "HTTP/1.1", "": "HTTP/1.1",
	} {
		req, err := http.NewRequestWithContext(await.Context(t), http.MethodPost, "http://"+l.Addr().String()+"/", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", kind)
		resp, err := p.RoundTrip(req)
		if err != nil {
			t.Fatal(kind, err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(b) != want+" hello" || resp.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("%q: %q, %v, trailers %v", kind, b, err, resp.Trailer)
		}
	}
}

// onlyHTTP2 accepts only connections that start with HTTP/2's preface. It sends the
// others an HTTP/2 server's first frame, and closes them.
type onlyHTTP2 struct{ net.Listener }

func (l onlyHTTP2) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		r := bufio.NewReader(c)
		if first, err := r.Peek(3); err == nil && string(first) == "PRI" {
			return peeked{c, r}, nil
		}
		_, _ = c.Write([]byte{0, 0, 0, 4, 0, 0, 0, 0, 0})
		_ = c.Close()
	}
}

type peeked struct {
	net.Conn
	r *bufio.Reader
}

func (c peeked) Read(p []byte) (int, error) { return c.r.Read(p) }

// TestOnlyHTTP2 checks that the agent learns from a failed request that a server speaks only
// HTTP/2. A request that it can repeat succeeds at once, any other from the second one on.
func TestOnlyHTTP2(t *testing.T) {
	l, err := net.Listen("tcp", closedPort(t))
	if err != nil {
		t.Fatal(err)
	}
	server := netaddr.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", r.Proto, b)
	}))
	go server.Serve(onlyHTTP2{l})
	defer server.Close()
	host, _, _ := net.SplitHostPort(l.Addr().String())
	p := newPorts(t.Context(), new(net.Dialer), guestAt(host))
	defer p.close()
	for _, try := range []struct{ method, body, want string }{
		{http.MethodPost, "hello", ""},
		{http.MethodPost, "hello", "HTTP/2.0 hello"},
		{http.MethodGet, "", "HTTP/2.0 "},
	} {
		req, err := http.NewRequestWithContext(await.Context(t), try.method, "http://"+l.Addr().String()+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		if try.body != "" {
			req.Body, req.ContentLength = io.NopCloser(strings.NewReader(try.body)), int64(len(try.body))
		}
		resp, err := p.RoundTrip(req)
		if try.want == "" {
			if !errors.Is(err, upstream.ErrHTTP2) {
				t.Errorf("the first request: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(b) != try.want {
			t.Errorf("%s: %q, %v", try.method, b, err)
		}
	}
	p.only2.Clear()
	req, err := http.NewRequestWithContext(await.Context(t), http.MethodGet, "http://"+l.Addr().String()+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := p.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.ProtoMajor != 2 {
		t.Error(resp.Proto)
	}
}

// TestUnreadPort checks that the agent buffers little of what a guest sends over HTTP/2
// to a client that reads nothing.
func TestUnreadPort(t *testing.T) {
	l, err := net.Listen("tcp", closedPort(t))
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan int, 1)
	server := netaddr.Server(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		control, n := http.NewResponseController(w), 0
		for err := error(nil); err == nil; n += 1 << 10 {
			_ = control.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
			if _, err = w.Write(make([]byte, 1<<10)); err == nil {
				err = control.Flush()
			}
		}
		wrote <- n
	}))
	go server.Serve(l)
	defer server.Close()
	host, _, _ := net.SplitHostPort(l.Addr().String())
	p := newPorts(t.Context(), new(net.Dialer), guestAt(host))
	defer p.close()
	req, err := http.NewRequestWithContext(await.Context(t), http.MethodGet, "http://"+l.Addr().String()+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/grpc")
	resp, err := p.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n := await.Recv(t, "the writes end", wrote); n > 2*netaddr.Window {
		t.Errorf("the agent took %d bytes before anybody read any", n)
	}
}
