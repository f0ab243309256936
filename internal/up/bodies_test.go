package up

import (
	"bufio"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/linger/lingertest"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// TestConnectionIsKept sends many requests over one connection.
func TestConnectionIsKept(t *testing.T) {
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) }))
	conn, err := net.Dial("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	for n := range 30 {
		request, want := "GET /v1/x HTTP/1.1\r\nHost: 80-cl-x.localhost\r\n\r\n", ""
		if n%3 == 1 {
			request, want = "POST /api/v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", "hello"
		}
		fmt.Fprint(conn, request)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(n, err)
		}
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != want || resp.Close {
			t.Errorf("request %d: %q, %v; the connection closes: %t", n, b, err, resp.Close)
		}
	}
}

// TestResponseIsTheGuestsOwn checks that the front door changes nothing in a response.
func TestResponseIsTheGuestsOwn(t *testing.T) {
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Asked", r.Header.Get("Accept-Encoding"))
		h["Date"], h["Content-Type"] = nil, nil
		h.Set("Content-Length", "3")
		h.Set("Content-Encoding", "gzip")
		_, _ = io.WriteString(w, "abc")
	}))
	for _, h2 := range []bool{false, true} {
		transport := netaddr.Transport(listen, h2)
		transport.DisableCompression = true
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			req, err := http.NewRequestWithContext(t.Context(), method, "http://80-cl-x.localhost/", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := transport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			resp.Header.Del("Date") // a proxy adds it if it is missing
			want := http.Header{"X-Asked": {""}, "Content-Length": {"3"}, "Content-Encoding": {"gzip"}}
			if err != nil || method == http.MethodGet && string(b) != "abc" || !reflect.DeepEqual(resp.Header, want) {
				t.Errorf("%s over %s: %v %q, %v", method, resp.Proto, resp.Header, b, err)
			}
		}
		transport.CloseIdleConnections()
	}
}

// TestBodyThatNobodyReads posts to a control plane that is down, or that responds without
// reading.
func TestBodyThatNobodyReads(t *testing.T) {
	_, listen, stopServer := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "no", http.StatusTeapot)
	}))
	for _, want := range []int{http.StatusTeapot, http.StatusBadGateway} {
		if want == http.StatusBadGateway {
			stopServer()
		}
		for n := range 200 {
			req, err := http.NewRequest(http.MethodPost, "http://"+listen+"/v1/x", io.NopCloser(strings.NewReader("hello")))
			if err != nil {
				t.Fatal(err)
			}
			if req.ContentLength = 5; n%2 == 0 {
				req.ContentLength = -1
			}
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				t.Fatal(want, n, err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != want {
				t.Errorf("%s, %v; want %d", resp.Status, err, want)
			}
			resp.Body.Close()
		}
	}
}

// TestAnswerDoesNotWaitForBody aborts the control plane while a client sends an endless
// request: the client still gets a response.
func TestAnswerDoesNotWaitForBody(t *testing.T) {
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadFull(r.Body, make([]byte, 1))
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
			conn.Close()
		}
	}))
	conn, err := net.Dial("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(conn, "POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
	answered := make(chan struct{})
	var sending sync.WaitGroup
	sending.Go(func() {
		for tick := time.NewTicker(time.Millisecond); ; <-tick.C { // real time: a slow body, which never ends
			select {
			case <-answered:
				return
			default:
			}
			if _, err := conn.Write([]byte("1\r\nx\r\n")); err != nil {
				return
			}
		}
	})
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err == nil {
		b, readErr := io.ReadAll(resp.Body)
		if readErr != nil || resp.StatusCode != http.StatusBadGateway || !strings.Contains(string(b), "before it answered") {
			t.Errorf("%s %q, %v", resp.Status, b, readErr)
		}
		resp.Body.Close()
	}
	close(answered)
	sending.Wait()
	if err != nil {
		t.Error(err)
	}
}

// broken is a server whose responses break off in the middle, with and without a length.
func broken(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/length" {
		w.Header().Set("Content-Length", "1000")
	}
	fmt.Fprintln(w, "a part")
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// TestBrokenResponse checks that a client can distinguish a response that broke off from
// a complete one.
func TestBrokenResponse(t *testing.T) {
	_, listen, _ := openDoor(t, http.HandlerFunc(broken))
	for _, h2 := range []bool{false, true} {
		c := http.Client{Transport: netaddr.Transport(listen, h2)}
		breaks(t, &c, "http://80-cl-x.localhost", h2)
		breaks(t, &c, "http://localhost", h2)
		c.CloseIdleConnections()
	}
}

func breaks(t *testing.T, c *http.Client, base string, h2 bool) {
	t.Helper()
	for _, path := range []string{"/length", "/chunks"} {
		resp, err := c.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(b) != "a part\n" || err == nil || (resp.ProtoMajor == 2) != h2 {
			t.Errorf("%s%s over %s: %q, %v", base, path, resp.Proto, b, err)
		}
	}
}

// TestBrokenBody checks that a request with broken chunks is the client's fault, and that
// the response says so.
func TestBrokenBody(t *testing.T) {
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			t.Error("the control plane got a whole body")
		}
		panic(http.ErrAbortHandler) // The control plane has nobody to respond to.
	}))
	for _, host := range []string{"localhost", "80-cl-x.localhost"} {
		for _, body := range []string{"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\nzz\r\n\r\n"} {
			c, err := net.Dial("tcp", listen)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			fmt.Fprintf(c, "POST /v1/x HTTP/1.1\r\nHost: %s\r\n%s", host, body)
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Errorf("%s, %q: %v", host, body, err)
				continue
			}
			const want = `{"error":{"code":"invalid_argument","message":"body: broke off"}}`
			if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusBadRequest || string(b) != want {
				t.Errorf("%s, %q: %s %s, %v", host, body, resp.Status, b, err)
			}
		}
	}
}

// TestStreamsBothWays responds before the request's body has ended, which fails with a
// proxy that is half-duplex over HTTP/1.1.
func TestStreamsBothWays(t *testing.T) {
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		for s := bufio.NewScanner(r.Body); s.Scan(); {
			fmt.Fprintln(w, "echo", s.Text())
			_ = rc.Flush()
		}
	}))
	for _, h2 := range []bool{false, true} {
		r, w := io.Pipe()
		ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://80-cl-x.localhost/", r)
		if err != nil {
			t.Fatal(err)
		}
		go fmt.Fprintln(w, "first") // This returns when the request ends.
		context.AfterFunc(ctx, func() { r.CloseWithError(ctx.Err()) })
		transport := netaddr.Transport(listen, h2)
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(resp.Body)
		for _, line := range []string{"first", "second", "third"} {
			if line != "first" {
				fmt.Fprintln(w, line)
			}
			if !lines.Scan() || lines.Text() != "echo "+line {
				t.Fatalf("over %s: got %q, %v", resp.Proto, lines.Text(), lines.Err())
			}
		}
		w.Close()
		if lines.Scan() || lines.Err() != nil {
			t.Errorf("over %s: more lines arrived, or %v", resp.Proto, lines.Err())
		}
		resp.Body.Close()
		transport.CloseIdleConnections()
		cancel()
	}
}

// shortStreams is a guest daemon whose commands end at once. Its gates make the request's
// body end as the response starts, which is when a half-duplex proxy can lose either.
type shortStreams struct {
	processconnect.UnimplementedProcessHandler
	http.RoundTripper // the client's transport
	streams           sync.Map
}

// gates are the gates of one stream.
type gates struct {
	begun chan struct{} // closed when the server has the request's header, so its body may end
	seen  chan struct{} // closed when the client has the first event, so the server may send the second
}

const streamHeader = "X-Stream"

func (s *shortStreams) gates(h http.Header) gates {
	g, _ := s.streams.Load(h.Get(streamHeader))
	return g.(gates)
}

func (s *shortStreams) Start(ctx context.Context, req *connect.Request[process.StartRequest], out *connect.ServerStream[process.StartResponse]) error {
	g := s.gates(req.Header())
	err := out.Send(&process.StartResponse{Event: &process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: 7}}}})
	if err != nil {
		return err
	}
	select {
	case <-g.seen:
	case <-ctx.Done():
		return ctx.Err()
	}
	return out.Send(&process.StartResponse{Event: &process.ProcessEvent{Event: &process.ProcessEvent_End{End: &process.ProcessEvent_EndEvent{Exited: true}}}})
}

// RoundTrip sends a body of unknown length, which ends once the server has its header.
func (s *shortStreams) RoundTrip(r *http.Request) (*http.Response, error) {
	r.ContentLength = -1
	r.Body = &lateBody{r.Body, r.Context(), s.gates(r.Header).begun}
	return s.RoundTripper.RoundTrip(r)
}

type lateBody struct {
	io.ReadCloser
	ctx   context.Context
	begun chan struct{}
}

func (b *lateBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == nil || n > 0 {
		return n, nil // The next Read returns the error again.
	}
	select {
	case <-b.begun:
	case <-b.ctx.Done():
	}
	return 0, err
}

// run starts a command over HTTP/1.1 and reads its events.
func (s *shortStreams) run(ctx context.Context, guest processconnect.ProcessClient) error {
	g, name := gates{make(chan struct{}), make(chan struct{})}, rand.Text()
	s.streams.Store(name, g)
	defer s.streams.Delete(name)
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	req := connect.NewRequest(&process.StartRequest{Process: &process.ProcessConfig{Cmd: "true"}})
	req.Header().Set(streamHeader, name)
	stream, err := guest.Start(ctx, req)
	if err != nil {
		return err
	}
	defer stream.Close()
	events := 0
	for stream.Receive() {
		if events++; events == 1 {
			close(g.seen)
		}
	}
	if err := stream.Err(); err != nil || events != 2 {
		return fmt.Errorf("%d events, %w", events, err)
	}
	return nil
}

// TestShortStreams starts 5,000 commands through Caddy over HTTP/1.1. The fault that it
// looks for is in the hops, so it needs no guest.
func TestShortStreams(t *testing.T) {
	daemon := &shortStreams{}
	mux := http.NewServeMux()
	mux.Handle(processconnect.NewProcessHandler(daemon))
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		if h := r.Header.Get(streamHeader); h != "" {
			close(daemon.gates(r.Header).begun)
		}
		mux.ServeHTTP(w, r)
	}))
	transport := netaddr.Transport(listen, false)
	defer transport.CloseIdleConnections()
	daemon.RoundTripper = transport
	guest := processconnect.NewProcessClient(&http.Client{Transport: daemon}, "http://49983-cl-x.localhost")
	const all, clients = 5000, 8
	var failed atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range all / clients {
				if err := daemon.run(t.Context(), guest); err != nil {
					if failed.Add(1) > 2 {
						return // Enough failures; each may take long.
					}
					t.Log(err)
				}
			}
		})
	}
	wg.Wait()
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d commands failed", n, all)
	}
}

// TestRefusalArrives checks that a client gets the whole response to a large body that
// the control plane refuses early, however busy the machine is.
func TestRefusalArrives(t *testing.T) {
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
	}))
	dial := func() (net.Conn, error) { return net.Dial("tcp", listen) }
	for _, host := range []string{"localhost", "80-cl-x.localhost"} {
		lingertest.Refused(t, dial, lingertest.Refusal{Host: host, Path: "/v1/x", Status: http.StatusRequestEntityTooLarge, Contains: "too large"}, 100)
	}
	transport := netaddr.Transport(listen, true)
	defer transport.CloseIdleConnections()
	for n := range 100 {
		req, err := http.NewRequestWithContext(await.Context(t), http.MethodPost, "http://"+listen+"/v1/x", io.LimitReader(zeros{}, 4<<20))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatalf("HTTP/2, try %d: %v", n, err)
		}
		if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusRequestEntityTooLarge || string(b) != "too large\n" {
			t.Errorf("HTTP/2, try %d: %s %q, %v", n, resp.Status, b, err)
		}
		resp.Body.Close()
	}
}
