package proxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/netip"
	"net/textproto"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/linger"
	"github.com/wrenn-dev/wrenn/internal/linger/lingertest"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// testProxy is a proxy that knows one sandbox, at a loopback address.
type testProxy struct {
	*httptest.Server
	sandbox uuid.UUID
	end     context.CancelCauseFunc // ends the sandbox
	tracker *sandbox.Tracker
	// transport carries the proxy's requests to the sandbox.
	transport *upstream.Transport
	log       *strings.Builder // read it when the request is over
}

func start(t *testing.T) *testProxy {
	t.Helper()
	address := netip.MustParseAddr("127.66.0.1")
	transport := &upstream.Transport{
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
		IdleTimeout: time.Minute, MaxIdle: 100, MaxIdlePerHost: 100, MaxHeaderBytes: 1 << 20,
	}
	t.Cleanup(transport.Close)
	life, end := context.WithCancelCause(t.Context())
	o := &testProxy{sandbox: uuid.New(), end: end, tracker: sandbox.NewTracker(), transport: transport, log: new(strings.Builder)}
	p := New(func(ctx context.Context, u uuid.UUID) (*sandbox.Use, error) {
		if u != o.sandbox {
			return nil, fmt.Errorf("%w: no such sandbox", sandbox.ErrNotFound)
		}
		leave, ok := o.tracker.Enter()
		if !ok {
			return nil, sandbox.ErrState
		}
		ctx, cancel := context.WithCancelCause(ctx)
		stop := context.AfterFunc(life, func() { cancel(context.Cause(life)) })
		return &sandbox.Use{Context: ctx, Address: address, Transport: transport, Leave: func() { stop(); cancel(nil); leave() }}, nil
	}, slog.New(slog.NewTextHandler(o.log, nil))) // the handler writes one record at a time
	o.Server = lingertest.NewServer(p)
	t.Cleanup(o.Close)
	return o
}

func (o *testProxy) path(port any, rest string) string {
	return fmt.Sprintf("%s%s/%v%s", hostwire.ProxyPrefix, id.Format(id.Sandbox, o.sandbox), port, rest)
}

// listen serves h at the sandbox's address and returns the port.
func listen(t *testing.T, port int, h http.Handler) int {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort("127.66.0.1", strconv.Itoa(port)))
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	_ = s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	return l.Addr().(*net.TCPAddr).Port
}

func (o *testProxy) get(t *testing.T, path string) (int, string) {
	t.Helper()
	resp, err := http.Get(o.URL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var e struct {
		Error struct{ Code, Message string }
	}
	if err := json.NewDecoder(resp.Body).Decode(&e); err != nil || e.Error.Code != resp.Header.Get(hostwire.Error) {
		t.Errorf("%s: %v is not an error of the agent: %v", path, resp.Status, err)
	}
	return resp.StatusCode, e.Error.Message
}

// send sends a request to a guest's port, and returns the response. It closes the
// response's body when the test ends.
func (o *testProxy) send(ctx context.Context, t *testing.T, method string, port int, body io.Reader) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, o.URL+o.path(port, "/"), body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// TestRefusalsAreLogged checks that the log has the reason of each refusal, with the id of
// the client's request, before the client has the response.
func TestRefusalsAreLogged(t *testing.T) {
	o := start(t)
	p := New(func(context.Context, uuid.UUID) (*sandbox.Use, error) {
		return nil, fmt.Errorf("%w: no such sandbox", sandbox.ErrNotFound)
	}, slog.New(slog.NewTextHandler(o.log, nil)))
	p.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(requestid.With(t.Context(), "ext-1"), http.MethodGet, o.path(80, "/secret"), nil))
	want := "request_id=ext-1 sandbox=" + id.Format(id.Sandbox, o.sandbox) + " port=80 code=not_found error="
	if got := o.log.String(); !strings.Contains(got, want) || !strings.Contains(got, "no such sandbox") || strings.Contains(got, "/secret") {
		t.Errorf("the log says %q, want %q", got, want)
	}
}

// TestManyRefusals checks that a sandbox whose port refuses many requests does not fill the
// log, and that the log says how many requests it leaves out.
func TestManyRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		options := &slog.HandlerOptions{Level: new(slog.LevelVar)}
		p := New(func(context.Context, uuid.UUID) (*sandbox.Use, error) { return nil, sandbox.ErrNotFound }, slog.New(slog.NewTextHandler(&log, options)))
		refuse := func(name string, n int) {
			for range n {
				p.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, hostwire.ProxyPrefix+name+"/80/", nil))
			}
		}
		one, other := id.Format(id.Sandbox, uuid.New()), id.Format(id.Sandbox, uuid.New())
		refuse(one, maxRefusals+100)
		refuse(other, 1)
		time.Sleep(refusalPeriod)
		synctest.Wait()
		text := log.String()
		if n := strings.Count(text, "request refused\""); n != maxRefusals+1 || !strings.Contains(text, "sandbox="+other) {
			t.Errorf("the log has %d of %d requests: %s", n, maxRefusals+101, text)
		}
		if want := `msg="further requests refused" sandbox=` + one + " requests=100 "; strings.Count(text, "further") != 1 || !strings.Contains(text, want) {
			t.Errorf("the log says %q, want %q", text, want)
		}
		log.Reset()
		options.Level.(*slog.LevelVar).Set(slog.LevelDebug)
		refuse(one, maxRefusals+100)
		if n := strings.Count(log.String(), "request refused\""); n != maxRefusals+100 {
			t.Errorf("at the level debug, the log has %d requests", n)
		}
	})
}

func TestBadTargets(t *testing.T) {
	o := start(t)
	listen(t, hostwire.GuestPort, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("%s reached the guest daemon", r.URL)
	}))
	for path, want := range map[string]int{
		o.path(0, "/"): 400, o.path(65536, "/"): 400, o.path(-1, "/"): 400, o.path("080", "/"): 400, o.path("+80", "/"): 400, o.path("x", "/"): 400, o.path("", "/"): 400,
		hostwire.ProxyPrefix: 400, hostwire.ProxyPrefix + "cl-short/80/": 400, hostwire.ProxyPrefix + strings.ToUpper(id.Format(id.Sandbox, o.sandbox)) + "/80/": 400,
		strings.Replace(o.path(80, "/%2f"), "cl-", "%63l-", 1): 400, o.path(80, "%2fx"): 400,
		hostwire.ProxyPrefix + id.Format(id.Sandbox, uuid.New()) + "/80/": 404,
		o.path(hostwire.GuestPort, "/init"):                               404, o.path(hostwire.GuestPort, "//init"): 404, o.path(hostwire.GuestPort, "/%69nit"): 404, o.path(hostwire.GuestPort, "/x/../init/"): 404,
		o.path(hostwire.GuestPort, "/freeze"): 404, o.path(hostwire.GuestPort, "/./thaw"): 404, o.path(hostwire.GuestPort, "/INIT"): 404, o.path(hostwire.GuestPort, "/%2finit"): 404,
		o.path(1, "/"): 502,
	} {
		if got, message := o.get(t, path); got != want || message == "" {
			t.Errorf("%s: %d %q, want %d", path, got, message, want)
		}
	}
	if _, message := o.get(t, o.path(1, "/")); !strings.Contains(message, "nothing listens on port 1 ") {
		t.Error(message)
	}
	o.tracker.Shut()
	if got, _ := o.get(t, o.path(80, "/")); got != 503 {
		t.Errorf("a sandbox whose tracker is shut: %d", got)
	}
}

// TestUnreadBody posts to a port where nothing listens. Once, two goroutines read from the
// client's connection in that case, and the server panicked.
func TestUnreadBody(t *testing.T) {
	o := start(t)
	var log bytes.Buffer
	server := httptest.NewUnstartedServer(o.Config.Handler)
	server.Listener = linger.Listener(server.Listener)
	server.Config.ErrorLog = slog.NewLogLogger(slog.NewTextHandler(&log, nil), slog.LevelError)
	server.Start()
	for _, length := range []int64{5, -1} {
		for range 100 {
			req, err := http.NewRequest(http.MethodPost, server.URL+o.path(1, "/"), io.NopCloser(strings.NewReader("hello")))
			if err != nil {
				t.Fatal(err)
			}
			req.ContentLength = length
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != http.StatusBadGateway {
				t.Errorf("%s, %v", resp.Status, err)
			}
			resp.Body.Close()
		}
	}
	server.Close() // Now nothing writes to the log.
	if log.Len() > 0 {
		t.Errorf("the server logged: %.500s", log.String())
	}
}

// TestFailureDoesNotWaitForBody checks that a client gets the error at once if the server in
// the sandbox closes the connection while the client has not sent its whole body.
func TestFailureDoesNotWaitForBody(t *testing.T) {
	o := start(t)
	port := listen(t, 0, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadFull(r.Body, make([]byte, 1))
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
			conn.Close()
		}
	}))
	conn, err := net.Dial("tcp", o.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(await.Hang)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nh", o.path(port, "/"))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if want := fmt.Sprintf("the connection to port %d of the sandbox closed before a response", port); err != nil || resp.StatusCode != http.StatusBadGateway || !strings.Contains(string(b), want) {
		t.Errorf("%s %q, %v", resp.Status, b, err)
	}
}

func TestRequestArrivesAsItWas(t *testing.T) {
	o := start(t)
	port := listen(t, 0, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set(hostwire.Error, "forged")
		w.Header().Set("X-Own", "kept")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprintf(w, "%s %s host=%s auth=%s agent=%q for=%s secret=%q enc=%q body=%s", r.Method, r.RequestURI, r.Host, r.Header.Get("Authorization"),
			r.Header.Get("User-Agent"), r.Header.Get("X-Forwarded-For"), r.Header.Get("X-Wrenn-Secret"), r.Header.Get("Accept-Encoding"), body)
	}))
	req, err := http.NewRequest(http.MethodPost, o.URL+o.path(port, "/a%2fb//c/../d?q=%zz;&x=1"), strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "8000-x.localhost:8000"
	req.Header.Set(hostwire.Authorization, "Basic dXNlcjo=")
	req.Header.Set("X-Wrenn-Secret", "s")
	req.Header.Set("X-Forwarded-For", "192.0.2.1")
	req.Header.Set("User-Agent", "")
	req.Header.Set("Accept-Encoding", "identity")
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, _ := io.ReadAll(resp.Body)
	want := `POST /a%2fb//c/../d?q=%zz;&x=1 host=8000-x.localhost:8000 auth=Basic dXNlcjo= agent="" for=192.0.2.1 secret="" enc="identity" body=hello`
	if string(got) != want || resp.StatusCode != http.StatusTeapot || resp.Header.Get("X-Own") != "kept" || resp.Header.Get(hostwire.Error) != "" {
		t.Errorf("got %s\n%s\nwant\n%s\n%v", resp.Status, got, want, resp.Header)
	}
}

// TestRequestID checks that the guest daemon gets the request id that the agent logs, while
// programs in the guest get the header that the client sent.
func TestRequestID(t *testing.T) {
	o := start(t)
	saw := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Header.Get(requestid.Header)) })
	for port, want := range map[int]string{listen(t, hostwire.GuestPort, saw): "ext-1", listen(t, 0, saw): "client's"} {
		r := httptest.NewRequestWithContext(requestid.With(t.Context(), "ext-1"), http.MethodGet, o.path(port, "/"), nil)
		r.Header.Set(requestid.Header, "client's")
		w := httptest.NewRecorder()
		o.Config.Handler.ServeHTTP(w, r)
		if w.Body.String() != want {
			t.Errorf("port %d saw %q, want %q", port, w.Body, want)
		}
	}
}

// TestGuestCannotForgeHeaders checks that a guest cannot send the agent's own headers in any
// part of a response.
func TestGuestCannotForgeHeaders(t *testing.T) {
	o := start(t)
	port := listen(t, 0, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set(hostwire.Error, "paused")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Trailer", hostwire.Error)
		_, _ = io.WriteString(w, "body")
	}))
	var private []string
	look := func(h http.Header) {
		for name := range h {
			if strings.HasPrefix(name, "X-Wrenn-") {
				private = append(private, name)
			}
		}
	}
	early := 0
	ctx := httptrace.WithClientTrace(await.Context(t), &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
		early++
		look(http.Header(h))
		return nil
	}})
	resp := o.send(ctx, t, http.MethodGet, port, nil)
	b, err := io.ReadAll(resp.Body)
	look(resp.Header)
	look(resp.Trailer)
	if len(private) > 0 || early != 1 || string(b) != "body" || err != nil {
		t.Errorf("%q, %v; %d early responses; the guest sent the headers %q", b, err, early, private)
	}
}

func TestWebSocketAndItsEnd(t *testing.T) {
	o := start(t)
	port := listen(t, 0, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		for {
			kind, msg, err := c.Read(r.Context())
			if err != nil {
				return
			}
			if c.Write(r.Context(), kind, msg) != nil {
				return
			}
		}
	}))
	ctx := await.Context(t)
	c, _, err := websocket.Dial(ctx, o.URL+o.path(port, "/ws"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	for _, msg := range []string{"one", strings.Repeat("x", 30000)} {
		if err := c.Write(ctx, websocket.MessageText, []byte(msg)); err != nil {
			t.Fatal(err)
		}
		if _, got, err := c.Read(ctx); err != nil || string(got) != msg {
			t.Fatalf("echoed %d bytes, %v", len(got), err)
		}
	}
	if n := o.tracker.InFlight(); n != 1 {
		t.Errorf("%d in flight", n)
	}
	o.end(fmt.Errorf("the sandbox has ended: %w", sandbox.ErrState))
	if _, _, err := c.Read(ctx); err == nil || ctx.Err() != nil {
		t.Errorf("the connection outlived its sandbox: %v", err)
	}
	if err := o.tracker.ShutAndWait(await.Context(t)); err != nil {
		t.Error("the connection is still counted")
	}
}

// TestStreamsBothWays exchanges lines while neither body has ended.
func TestStreamsBothWays(t *testing.T) {
	o := start(t)
	port := listen(t, 0, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		for s := bufio.NewScanner(r.Body); s.Scan(); {
			fmt.Fprintln(w, "echo", s.Text())
			_ = rc.Flush()
		}
	}))
	r, w := io.Pipe()
	req, err := http.NewRequest(http.MethodPost, o.URL+o.path(port, "/"), r)
	if err != nil {
		t.Fatal(err)
	}
	var sending sync.WaitGroup
	sending.Go(func() { fmt.Fprintln(w, "first") })
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	sending.Wait()
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for _, line := range []string{"first", "second", "third"} {
		if line != "first" {
			fmt.Fprintln(w, line)
		}
		if !lines.Scan() || lines.Text() != "echo "+line {
			t.Fatalf("got %q, %v", lines.Text(), lines.Err())
		}
	}
	w.Close()
	if lines.Scan() {
		t.Error("the response has another line")
	}
}

// TestPartOfKnownLengthArrives reads the first part of a response of known length before
// the guest sends the rest.
func TestPartOfKnownLengthArrives(t *testing.T) {
	o := start(t)
	rest := make(chan struct{})
	port := listen(t, 0, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "10")
		fmt.Fprint(w, "first")
		_ = http.NewResponseController(w).Flush()
		<-rest
		fmt.Fprint(w, "later")
	}))
	release := sync.OnceFunc(func() { close(rest) })
	defer release()
	resp := o.send(await.Context(t), t, http.MethodGet, port, nil)
	first := make([]byte, 5)
	if _, err := io.ReadFull(resp.Body, first); err != nil || string(first) != "first" {
		t.Fatalf("got %q, %v", first, err)
	}
	release()
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "later" {
		t.Errorf("then %q, %v", b, err)
	}
}

// TestBrokenResponse breaks responses off. The client must get the bytes that the guest sent
// and then an error, and not an error response of the proxy.
func TestBrokenResponse(t *testing.T) {
	o := start(t)
	port := listen(t, 0, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/length" {
			w.Header().Set("Content-Length", "1000")
		}
		fmt.Fprint(w, "a part")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	for range 50 {
		for _, path := range []string{"/length", "/chunks"} {
			resp, err := http.Get(o.URL + o.path(port, path))
			if err != nil {
				t.Fatal(path, err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK || string(b) != "a part" || err == nil {
				t.Errorf("%s: %s %q, %v", path, resp.Status, b, err)
			}
		}
	}
}

func TestBigBodiesTakeNoMemory(t *testing.T) {
	const size = 256 << 20
	o := start(t)
	port := listen(t, 0, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		w.Header().Set("X-Got", strconv.FormatInt(n, 10))
		_, _ = io.CopyN(w, zeros{}, size)
	}))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	resp, err := http.Post(o.URL+o.path(port, "/"), "", io.LimitReader(zeros{}, size))
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	runtime.ReadMemStats(&after)
	if err != nil || n != size || resp.Header.Get("X-Got") != strconv.Itoa(size) {
		t.Errorf("%d bytes down, %s up, %v", n, resp.Header.Get("X-Got"), err)
	}
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 32<<20 {
		t.Errorf("the request allocated %d MiB", grown>>20)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestClientDisconnects(t *testing.T) {
	o := start(t)
	arrived, left := make(chan struct{}), make(chan struct{})
	port := listen(t, 0, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
		close(left)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, o.URL+o.path(port, "/"), nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := http.DefaultTransport.RoundTrip(req)
		done <- err
	}()
	<-arrived
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	await.Recv(t, "the guest notices that its client disconnected", left)
}

// TestPauseCutsOff pauses a sandbox during requests. The agent must refuse a request with the
// sandbox's state, on which the control plane retries it, only if a retry does no harm.
func TestPauseCutsOff(t *testing.T) {
	for _, want := range []struct {
		method, body string
		again        bool
	}{
		{"GET", "", true},
		{"HEAD", "", true},
		{"DELETE", "", true},
		{"PUT", "", true},
		{"OPTIONS", "", true},
		{"POST", "", false},
		{"POST", "a body", false},
		{"PUT", "a body", false},
		{"PATCH", "", false},
		{"DELETE", "a body", false},
	} {
		t.Run(want.method+" "+want.body, func(t *testing.T) {
			o := start(t)
			arrived := make(chan struct{})
			port := listen(t, 0, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				close(arrived)
				<-r.Context().Done()
			}))
			cutOff(t, o, port, want.method, want.body, arrived, want.again)
		})
	}
	t.Run("nothing was sent", func(t *testing.T) {
		o := start(t)
		dialling := make(chan struct{})
		o.transport.Dial = func(ctx context.Context, _ string) (net.Conn, error) {
			close(dialling)
			<-ctx.Done()
			return nil, ctx.Err()
		}
		cutOff(t, o, 8000, "POST", "a body", dialling, true)
	})
}

// cutOff sends a request, pauses the sandbox once moment is closed, and checks whether the
// response lets the control plane retry the request.
func cutOff(t *testing.T, o *testProxy, port int, method, body string, moment <-chan struct{}, again bool) {
	t.Helper()
	go func() {
		<-moment
		o.end(&sandbox.StateError{State: sandbox.Paused})
	}()
	resp := o.send(await.Context(t), t, method, port, strings.NewReader(body))
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	status, code := http.StatusBadGateway, "bad_gateway"
	if again {
		status, code = http.StatusServiceUnavailable, "paused"
	}
	if resp.StatusCode != status || resp.Header.Get(hostwire.Error) != code || !again && !strings.Contains(string(b), "may have taken effect") {
		t.Errorf("%s %s %q, want %d %s", resp.Status, resp.Header.Get(hostwire.Error), b, status, code)
	}
}

func FuzzParse(f *testing.F) {
	ok := id.Format(id.Sandbox, uuid.New())
	for _, s := range []string{hostwire.ProxyPrefix + ok + "/49983/init", hostwire.ProxyPrefix + ok + "/80", hostwire.ProxyPrefix + ok + "/65536/", hostwire.ProxyPrefix + "%63l/1/", hostwire.ProxyPrefix + ok + "/80%2fx"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := http.NewRequest(http.MethodGet, "http://agent"+s, nil)
		if err != nil {
			return
		}
		to, err := parse(r)
		if err != nil {
			return
		}
		if to.port < 1 || to.port > 65535 || !strings.HasPrefix(to.path, "/") || to.rawPath != "" && to.rawPath[0] != '/' {
			t.Errorf("%q goes to %+v", s, to)
		}
	})
}
