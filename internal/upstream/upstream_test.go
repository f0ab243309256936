package upstream

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// server is an upstream whose connections each follow a script.
type server struct {
	net.Listener
	*Transport
	dials atomic.Int64
}

// listen lets serve handle each connection, with its number from 0, and then closes it.
func listen(t *testing.T, serve func(n int, c net.Conn, r *bufio.Reader)) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{Listener: l}
	s.Transport = transport(func(ctx context.Context, addr string) (net.Conn, error) {
		s.dials.Add(1)
		return dial(ctx, addr)
	})
	var all sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	all.Go(func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { c.Close() })()
				serve(n, c, bufio.NewReader(c))
			})
		}
	})
	t.Cleanup(func() {
		s.Transport.Close()
		cancel()
		l.Close()
		all.Wait()
	})
	return s
}

func dial(ctx context.Context, addr string) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", addr)
}

func transport(dial func(context.Context, string) (net.Conn, error)) *Transport {
	return &Transport{
		Dial: dial, Redial: func() func(context.Context) bool { return func(context.Context) bool { return true } }, IdleTimeout: time.Minute, OnceIdle: time.Minute,
		MaxIdle: 100, MaxIdlePerHost: 50, MaxHeaderBytes: 64 << 10,
	}
}

func (s *server) request(t *testing.T, method string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(await.Context(t), method, "http://"+s.Addr().String()+"/", body)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// do sends a request and returns the response's body.
func (s *server) do(req *http.Request) (string, error) {
	resp, err := s.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// take reads one request with its body.
func take(r *bufio.Reader) (*http.Request, string, error) {
	req, err := http.ReadRequest(r)
	if err != nil {
		return nil, "", err
	}
	b, err := io.ReadAll(req.Body)
	return req, string(b), err
}

func respond(c net.Conn, body string) {
	fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// hidden returns a body that cannot be read twice and whose type reveals nothing.
func hidden(s string) io.Reader { return io.MultiReader(strings.NewReader(s)) }

func TestConnectionIsKept(t *testing.T) {
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		for {
			req, body, err := take(r)
			if err != nil {
				return
			}
			if req.Method == http.MethodHead {
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
				continue
			}
			respond(c, req.Method+" "+body)
		}
	})
	for range 50 {
		for _, want := range []struct {
			method string
			body   io.Reader
			got    string
		}{
			{http.MethodGet, nil, "GET "},
			{http.MethodHead, nil, ""},
			{http.MethodPost, strings.NewReader("hello"), "POST hello"},
			{http.MethodPost, hidden("hello"), "POST hello"},
			{http.MethodPut, hidden(strings.Repeat("x", 100000)), "PUT " + strings.Repeat("x", 100000)},
		} {
			if got, err := s.do(s.request(t, want.method, want.body)); err != nil || got != want.got {
				t.Fatalf("%s: %.20q, %v", want.method, got, err)
			}
		}
	}
	if n := s.dials.Load(); n != 1 {
		t.Errorf("%d connections were opened", n)
	}
}

// TestConnectionIsNotKept has responses after which a connection cannot be used again.
func TestConnectionIsNotKept(t *testing.T) {
	for name, response := range map[string]string{
		"close":      "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx",
		"until EOF":  "HTTP/1.1 200 OK\r\n\r\nx",
		"HTTP/1.0":   "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx",
		"more to it": "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
	} {
		t.Run(name, func(t *testing.T) {
			s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
				for {
					if _, _, err := take(r); err != nil {
						return
					}
					fmt.Fprint(c, response)
					if name == "until EOF" {
						return
					}
				}
			})
			for range 3 {
				if got, err := s.do(s.request(t, http.MethodGet, nil)); err != nil || got != "x" {
					t.Errorf("%q, %v", got, err)
				}
			}
			if n := s.dials.Load(); n != 3 {
				t.Errorf("%d connections for 3 requests", n)
			}
		})
	}
}

// TestKeptConnectionCloses closes a connection when its second request arrives.
func TestKeptConnectionCloses(t *testing.T) {
	for _, c := range []struct {
		method string
		body   func() io.Reader
		key    string
		ok     bool
	}{
		{method: http.MethodGet, ok: true},
		{method: http.MethodDelete, ok: true},
		{method: http.MethodPut, body: func() io.Reader { return strings.NewReader("x") }, ok: true},
		{method: http.MethodPut, body: func() io.Reader { return hidden("x") }},
		{method: http.MethodPost},
		{method: http.MethodPost, body: func() io.Reader { return strings.NewReader("x") }},
		{method: http.MethodPost, key: "1", ok: true},
	} {
		t.Run(c.method, func(t *testing.T) {
			var arrived atomic.Int64
			s := listen(t, func(n int, c net.Conn, r *bufio.Reader) {
				for i := 0; ; i++ {
					if _, _, err := take(r); err != nil {
						return
					}
					arrived.Add(1)
					if n == 0 && i == 1 {
						return
					}
					respond(c, "done")
				}
			})
			for i := range 2 {
				var body io.Reader
				if c.body != nil {
					body = c.body()
				}
				req := s.request(t, c.method, body)
				if c.key != "" {
					req.Header.Set("Idempotency-Key", c.key)
				}
				got, err := s.do(req)
				if ok := err == nil && got == "done"; ok != (i == 0 || c.ok) {
					t.Errorf("request %d: %q, %v", i, got, err)
				}
			}
			want := int64(2)
			if c.ok {
				want = 3
			}
			if n := arrived.Load(); n != want {
				t.Errorf("%d requests arrived, want %d", n, want)
			}
		})
	}
}

// TestNewConnectionCloses checks that no request is sent twice over new connections.
func TestNewConnectionCloses(t *testing.T) {
	s := listen(t, func(_ int, _ net.Conn, r *bufio.Reader) { _, _, _ = take(r) })
	if _, err := s.do(s.request(t, http.MethodGet, nil)); err == nil || !strings.Contains(err.Error(), "upstream closed the connection before responding") {
		t.Error(err)
	}
	if n := s.dials.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// TestIdleConnectionCloses lets the upstream close an idle connection: no request is sent
// over it, not even one that cannot be sent twice.
func TestIdleConnectionCloses(t *testing.T) {
	closed := make(chan struct{}, 1)
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		if _, _, err := take(r); err != nil {
			return
		}
		respond(c, "done")
		c.Close()
		closed <- struct{}{}
	})
	for range 20 {
		if got, err := s.do(s.request(t, http.MethodPost, hidden("x"))); err != nil || got != "done" {
			t.Fatalf("%q, %v", got, err)
		}
		await.Recv(t, "the upstream closes", closed)
		await.Until(t, "the close arrives", func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, list := range s.idle {
				for _, c := range list {
					if c.alive() {
						return false
					}
				}
			}
			return true
		})
	}
}

// TestOldConnection sends a request that cannot be sent twice after the connection was
// idle for a while.
func TestOldConnection(t *testing.T) {
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		for {
			if _, _, err := take(r); err != nil {
				return
			}
			respond(c, "")
		}
	})
	s.OnceIdle = time.Nanosecond
	for want, method := range []string{http.MethodGet, http.MethodGet, http.MethodPost} {
		if _, err := s.do(s.request(t, method, nil)); err != nil {
			t.Fatal(err)
		}
		if n := int(s.dials.Load()); n != max(1, want) {
			t.Errorf("request %d, %s: %d connections", want, method, n)
		}
	}
	if s.n != 1 {
		t.Errorf("%d connections are kept", s.n)
	}
}

// TestOneAtATime has a server that serves one connection until its end before the next:
// no request may wait for a connection that is only kept.
func TestOneAtATime(t *testing.T) {
	var one sync.Mutex
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		one.Lock()
		defer one.Unlock()
		for {
			if _, _, err := take(r); err != nil {
				return
			}
			respond(c, "")
		}
	})
	s.OnceIdle = time.Nanosecond
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodGet, http.MethodPost} {
		if _, err := s.do(s.request(t, method, hidden("x"))); err != nil {
			t.Fatal(method, err)
		}
	}
}

// failing is a connection that fails before anything is sent.
type failing struct{ net.Conn }

func (failing) Write([]byte) (int, error) {
	return 0, &net.OpError{Op: "write", Err: syscall.EPIPE}
}

func (failing) Read([]byte) (int, error) {
	return 0, &net.OpError{Op: "read", Err: syscall.ECONNRESET}
}

// TestNothingWasSent has new connections that break before their first byte.
func TestNothingWasSent(t *testing.T) {
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		if _, body, err := take(r); err == nil {
			respond(c, body)
		}
	})
	dial, tries := s.Dial, 0
	s.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
		c, err := dial(ctx, addr)
		if tries++; tries < 4 && err == nil {
			c.Close()
			return failing{c}, nil
		}
		return c, err
	}
	// Do this first, without kept connections: over one of those, a part could be sent.
	redial := s.Redial
	s.Redial = nil
	if _, err := s.do(s.request(t, http.MethodGet, nil)); !errors.Is(err, ErrUnsent) || tries != 1 {
		t.Errorf("%v after %d connections", err, tries)
	}
	tries, s.Redial = 0, redial
	if got, err := s.do(s.request(t, http.MethodPost, strings.NewReader("hello"))); err != nil || got != "hello" || tries != 4 {
		t.Errorf("%q, %v after %d connections", got, err, tries)
	}
}

// stalled is a body whose second part never arrives.
type stalled struct {
	first  io.Reader
	parked chan struct{} // closed once a reader waits for it
	once   sync.Once
	end    <-chan struct{}
}

func (s *stalled) Read(p []byte) (int, error) {
	if n, err := s.first.Read(p); err == nil {
		return n, nil
	}
	s.once.Do(func() { close(s.parked) })
	<-s.end
	return 0, io.ErrUnexpectedEOF
}

// TestFailureDoesNotWaitForBody closes the upstream while the client stalls in its body:
// the error comes at once, not when the client continues.
func TestFailureDoesNotWaitForBody(t *testing.T) {
	body := &stalled{first: strings.NewReader("a part"), parked: make(chan struct{}), end: t.Context().Done()}
	s := listen(t, func(_ int, _ net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		_, _ = io.ReadFull(req.Body, make([]byte, len("a part")))
		<-body.parked
	})
	req := s.request(t, http.MethodPost, body)
	req.ContentLength = 100
	if _, err := s.do(req); !errors.Is(err, ErrNoResponse) {
		t.Error(err)
	}
}

// TestResponseDoesNotWaitForBody responds completely to a part of a request.
func TestResponseDoesNotWaitForBody(t *testing.T) {
	body := &stalled{first: strings.NewReader("a part"), parked: make(chan struct{}), end: t.Context().Done()}
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		<-body.parked
		respond(c, "no")
		_, _ = io.Copy(io.Discard, r)
	})
	if got, err := s.do(s.request(t, http.MethodPost, body)); err != nil || got != "no" {
		t.Errorf("%q, %v", got, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n != 0 {
		t.Error("the connection was kept in the middle of a request")
	}
}

// TestResetAfterResponse responds to a large request without reading it, and resets the
// connection: writing fails, but the client still gets the response.
func TestResetAfterResponse(t *testing.T) {
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		if _, err := http.ReadRequest(r); err == nil {
			respond(c, "no")
		}
	})
	for n := range 300 {
		req := s.request(t, http.MethodPost, io.LimitReader(endless{}, 8<<20))
		if n%2 == 0 {
			req.ContentLength = 8 << 20
		}
		if got, err := s.do(req); err != nil || got != "no" {
			t.Fatalf("%d: %q, %v", n, got, err)
		}
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestClientBreaksOff makes a body fail in the middle: the upstream sees the connection
// end, and the client gets the body's error.
func TestClientBreaksOff(t *testing.T) {
	broke := make(chan error, 1)
	s := listen(t, func(_ int, _ net.Conn, r *bufio.Reader) {
		_, _, err := take(r)
		broke <- err
	})
	gone := errors.New("the client has gone")
	r, w := io.Pipe()
	go func() {
		fmt.Fprint(w, "a part")
		w.CloseWithError(gone)
	}()
	if _, err := s.do(s.request(t, http.MethodPost, r)); !errors.Is(err, gone) {
		t.Error(err)
	}
	if err := await.Recv(t, "the upstream's end", broke); err == nil {
		t.Error("the upstream accepted a part of the body as the whole")
	}
}

// TestCancel cancels requests at each stage.
func TestCancel(t *testing.T) {
	arrived := make(chan struct{})
	left := make(chan struct{})
	s := listen(t, func(n int, c net.Conn, r *bufio.Reader) {
		_, _ = http.ReadRequest(r)
		if n == 1 {
			fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx")
		}
		arrived <- struct{}{}
		_, _ = io.Copy(io.Discard, r)
		left <- struct{}{}
	})
	for n := range 2 {
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("why")
		req := s.request(t, http.MethodGet, nil).WithContext(ctx)
		done := make(chan error, 1)
		go func() {
			_, err := s.do(req)
			done <- err
		}()
		await.Recv(t, "the request arrives", arrived)
		cancel(why)
		if err := await.Recv(t, "the request ends", done); err == nil || n == 0 && !errors.Is(err, why) {
			t.Errorf("request %d: %v", n, err)
		}
		await.Recv(t, "the upstream hears", left)
	}
}

// TestBothWays exchanges lines while neither body has ended.
func TestBothWays(t *testing.T) {
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-End\r\n\r\n")
		for lines := bufio.NewScanner(req.Body); lines.Scan(); {
			line := lines.Text() + "\n"
			fmt.Fprintf(c, "%x\r\n%s\r\n", len(line), line)
		}
		fmt.Fprint(c, "0\r\nX-End: yes\r\n\r\n")
	})
	r, w := io.Pipe()
	go fmt.Fprintln(w, "one")
	resp, err := s.RoundTrip(s.request(t, http.MethodPost, r))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for _, line := range []string{"one", "two", "three"} {
		if line != "one" {
			fmt.Fprintln(w, line)
		}
		if !lines.Scan() || lines.Text() != line {
			t.Fatalf("%q, %v", lines.Text(), lines.Err())
		}
	}
	w.Close()
	if lines.Scan() || lines.Err() != nil || resp.Trailer.Get("X-End") != "yes" {
		t.Errorf("more: %q, %v, %v", lines.Text(), lines.Err(), resp.Trailer)
	}
}

// TestExpect has a body that waits until the upstream wants it.
func TestExpect(t *testing.T) {
	s := listen(t, func(n int, c net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		if n == 1 {
			respond(c, "unwanted")
			return
		}
		fmt.Fprint(c, "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
		b, _ := io.ReadAll(req.Body)
		respond(c, string(b))
	})
	var read atomic.Bool
	var interim []int
	for _, want := range []string{"hello", "unwanted"} {
		read.Store(false)
		req := s.request(t, http.MethodPost, io.MultiReader(readerFunc(func([]byte) (int, error) {
			read.Store(true)
			return 0, io.EOF
		}), strings.NewReader("hello")))
		req.ContentLength = 5
		req.Header.Set("Expect", "100-continue")
		req.Close = true
		req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
				interim = append(interim, code)
				return nil
			},
		}))
		got, err := s.do(req)
		if err != nil || got != want || read.Load() != (want == "hello") {
			t.Errorf("%q, %v; the body was read: %t", got, err, read.Load())
		}
	}
	if fmt.Sprint(interim) != "[103 100]" {
		t.Errorf("interim responses: %v", interim)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestUpgrade(t *testing.T) {
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		if _, _, err := take(r); err != nil {
			return
		}
		fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nfirst")
		_, _ = io.Copy(c, r)
	})
	req := s.request(t, http.MethodGet, nil)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "x")
	resp, err := s.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp, err)
	}
	c := resp.Body.(interface {
		io.ReadWriteCloser
		CloseWrite() error
	})
	defer c.Close()
	fmt.Fprint(c, " second")
	if err := c.CloseWrite(); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "first second" {
		t.Errorf("%q, %v", b, err)
	}
}

// TestHostileResponses has responses that a proxy must not accept.
func TestHostileResponses(t *testing.T) {
	for name, response := range map[string]string{
		"no HTTP":     "hello\r\n\r\n",
		"long header": "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 200000),
		"interim":     strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 1000),
		"length":      "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
		"lengths":     "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
		"nothing":     "",
		"half":        "HTTP/1.1 200 OK\r\nContent-",
	} {
		t.Run(name, func(t *testing.T) {
			s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
				if _, _, err := take(r); err == nil {
					_, _ = io.WriteString(c, response)
				}
			})
			if got, err := s.do(s.request(t, http.MethodGet, nil)); err == nil {
				t.Errorf("got %q", got)
			}
		})
	}
}

// TestBrokenBody breaks responses off: the client gets an error, and no connection is
// kept.
func TestBrokenBody(t *testing.T) {
	for _, head := range []string{"Content-Length: 1000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n7\r\n"} {
		s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
			if _, _, err := take(r); err == nil {
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\n"+head+"a part\n")
			}
		})
		if got, err := s.do(s.request(t, http.MethodGet, nil)); err == nil || got != "a part\n" || s.n != 0 {
			t.Errorf("%q, %v, %d kept", got, err, s.n)
		}
	}
}

// TestOnlyHTTP2 calls a server that starts like an HTTP/2 server.
func TestOnlyHTTP2(t *testing.T) {
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		_, _ = c.Write([]byte{0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100})
		_, _ = io.Copy(io.Discard, r)
	})
	if _, err := s.do(s.request(t, http.MethodGet, nil)); !errors.Is(err, ErrHTTP2) {
		t.Error(err)
	}
}

func TestBounds(t *testing.T) {
	s := listen(t, func(_ int, c net.Conn, r *bufio.Reader) {
		for {
			if _, _, err := take(r); err != nil {
				return
			}
			respond(c, "x")
		}
	})
	s.MaxIdlePerHost = 3
	var all []*http.Response
	for range 10 {
		resp, err := s.RoundTrip(s.request(t, http.MethodGet, nil))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, resp)
	}
	for _, resp := range all {
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	if s.n != 3 {
		t.Errorf("%d connections are kept", s.n)
	}
	s.mu.Lock()
	s.IdleTimeout = 0
	s.mu.Unlock()
	s.expire()
	if s.n != 0 || len(s.idle) != 0 {
		t.Errorf("%d connections survive the idle timeout", s.n)
	}
	resp, err := s.RoundTrip(s.request(t, http.MethodGet, nil))
	if err != nil {
		t.Fatal(err)
	}
	s.Transport.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if s.n != 0 {
		t.Error("a closed transport keeps a connection")
	}
	if _, err := s.do(s.request(t, http.MethodGet, nil)); err == nil {
		t.Error("a closed transport carries requests")
	}
}

// TestFreedConnection lets a request use a connection that becomes free while it opens
// its own, which is then kept for later.
func TestFreedConnection(t *testing.T) {
	release := make(chan struct{})
	s := listen(t, func(n int, c net.Conn, r *bufio.Reader) {
		for i := 0; ; i++ {
			if _, _, err := take(r); err != nil {
				return
			}
			if n == 0 && i == 0 {
				<-release
			}
			respond(c, fmt.Sprint(n, " ", i))
		}
	})
	connect, dialling, connected := s.Dial, make(chan struct{}), make(chan struct{})
	s.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
		if s.dials.Load() == 1 {
			close(dialling)
			<-connected
		}
		return connect(context.WithoutCancel(ctx), addr)
	}
	var all sync.WaitGroup
	get := func(want string) {
		if got, err := s.do(s.request(t, http.MethodGet, nil)); err != nil || got != want {
			t.Errorf("%q, %v; want %q", got, err, want)
		}
	}
	all.Go(func() { get("0 0") })
	await.Until(t, "the first request has a connection", func() bool { return s.dials.Load() == 1 })
	all.Go(func() { get("0 1") })
	await.Recv(t, "the second one connects", dialling)
	close(release)
	all.Wait()
	close(connected)
	await.Until(t, "the second connection is kept", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.n == 2 && len(s.waiting) == 0
	})
}

// TestMany has many concurrent clients send bodies and check that they get them back.
func TestMany(t *testing.T) {
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.Copy(w, r.Body)
	}))
	defer h.Close()
	tr := transport(dial)
	defer tr.Close()
	var all sync.WaitGroup
	for n := range 20 {
		all.Go(func() {
			for i := range 50 {
				want := bytes.Repeat([]byte{byte(n)}, i*1000)
				req, err := http.NewRequestWithContext(await.Context(t), http.MethodPost, h.URL, hidden(string(want)))
				if err != nil {
					t.Error(err)
					return
				}
				resp, err := tr.RoundTrip(req)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d of %d bytes, %v", len(got), len(want), err)
				}
			}
		})
	}
	all.Wait()
}
