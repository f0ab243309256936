package up

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/vishvananda/netlink"

	"github.com/wrenn-dev/wrenn/deploy"
	"github.com/wrenn-dev/wrenn/deploy/deploytest"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/bounded"
	"github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/handover"
	"github.com/wrenn-dev/wrenn/internal/linger"
	"github.com/wrenn-dev/wrenn/internal/linger/lingertest"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	controlplane "github.com/wrenn-dev/wrenn/internal/server"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// openDoor is a front door with server behind it, at an address of its own.
func openDoor(t *testing.T, server http.Handler) (s *service, address string, stopServer func()) {
	t.Helper()
	return openDoorOf(t, server, deploy.Caddyfile)
}

// openDoorOf is openDoor with a configuration of its own.
func openDoorOf(t *testing.T, server http.Handler, config []byte) (s *service, address string, stopServer func()) {
	t.Helper()
	return openDoorAt(t, "127.0.0.1", server, config)
}

// openDoorAt is openDoorOf at a port of the given address.
func openDoorAt(t *testing.T, host string, server http.Handler, config []byte) (s *service, address string, stopServer func()) {
	t.Helper()
	s = newService(t)
	deploytest.Caddy(t)
	front, err := newFrontDoor(t.Context(), s.dir, net.JoinHostPort(host, "0"), serverSettings(t))
	if err != nil {
		t.Fatal(err)
	}
	s.stack = append(s.stack, front.close)
	if err := os.WriteFile(front.config, config, 0o644); err != nil {
		t.Fatal(err)
	}
	// A port that the kernel chose; Caddy is told of the socket, not of the port.
	l, err := net.FileListener(front.files[0])
	if err != nil {
		t.Fatal(err)
	}
	front.listen = l.Addr().String()
	l.Close()
	behind, err := netaddr.Listen(t.Context(), "unix:"+s.dir.ServerSocket(), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	srv := netaddr.Server(server)
	go srv.Serve(behind)
	stopServer = func() { srv.Close() }
	t.Cleanup(stopServer)
	if err := openTo(front.user, s.dir.ServerSocket()); err != nil {
		t.Fatal(err)
	}
	if err := s.launch(t.Context(), front.program()); err != nil {
		t.Fatal(err)
	}
	return s, front.listen, stopServer
}

// exchange sends a request to the front door at listen, and returns the response with
// its body. If host is empty, the request's Host is listen.
func exchange(t *testing.T, listen, method, host, path, body string) (resp *http.Response, text string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+listen+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	if resp, err = http.DefaultClient.Do(req); err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

// takePassed returns a listener for the connections that Caddy passes to the control
// plane. It closes the listener when the test ends.
func takePassed(t *testing.T, s *service) net.Listener {
	t.Helper()
	path := handover.Path(s.dir.ServerSocket())
	l, err := handover.Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if err := openTo(account{caddyID, caddyID}, path); err != nil {
		t.Fatal(err)
	}
	return linger.Listener(l)
}

// TestDoorman: from the moment that the port is open, clients hear what the machine
// prepares, until Caddy answers. None is refused, and none waits.
func TestDoorman(t *testing.T) {
	s := newService(t)
	deploytest.Caddy(t)
	front, err := newFrontDoor(t.Context(), s.dir, "127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	s.stack = append(s.stack, front.close)
	l, err := net.FileListener(front.files[0])
	if err != nil {
		t.Fatal(err)
	}
	front.listen = l.Addr().String()
	l.Close()
	get := func(method string) (*http.Response, string) {
		t.Helper()
		return exchange(t, front.listen, method, "", "/v1/sandboxes", "{}")
	}
	front.doorman.prepares("the base image")
	for _, method := range []string{"GET", "POST", "HEAD"} {
		resp, body := get(method)
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d %v", method, resp.StatusCode, resp.Header)
		}
		if want := `{"error":{"code":"unavailable","message":"Wrenn is starting and prepares the base image: try again in a few seconds"}}` + "\n"; method != "HEAD" && body != want {
			t.Errorf("%s: %q", method, body)
		}
	}

	// Caddy takes over while clients come.
	behind, err := netaddr.Listen(t.Context(), "unix:"+s.dir.ServerSocket(), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	srv := netaddr.Server(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "the server") }))
	go srv.Serve(behind)
	t.Cleanup(func() { srv.Close() })
	if err := openTo(front.user, s.dir.ServerSocket()); err != nil {
		t.Fatal(err)
	}
	launched := make(chan error, 1)
	go func() { launched <- s.launch(t.Context(), front.program()) }()
	for {
		resp, body := get("GET")
		if resp.StatusCode == 200 && body == "the server" {
			break
		}
		if resp.StatusCode != 503 {
			t.Fatalf("meanwhile: %d %q", resp.StatusCode, body)
		}
	}
	if err := <-launched; err != nil {
		t.Fatal(err)
	}
}

// TestDoormanLeaves: another server takes over again and again while clients connect.
// One of the two answers each connection.
func TestDoormanLeaves(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	defer socket.Close()
	address := l.Addr().String()
	ctx, stop := context.WithCancel(await.Context(t))
	var clients sync.WaitGroup
	defer clients.Wait()
	defer stop()
	answers := make(chan int)
	ask := func(transport http.RoundTripper) (int, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+address, io.LimitReader(zeros{}, 1<<16))
		if err != nil {
			return 0, err
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, err
	}
	for range 8 {
		clients.Go(func() {
			transport := &http.Transport{}
			defer transport.CloseIdleConnections()
			for {
				status, err := ask(transport)
				if ctx.Err() != nil {
					return // The last server may not have answered.
				}
				if err != nil {
					t.Error(err)
				}
				select {
				case answers <- status:
				case <-ctx.Done():
				}
			}
		})
	}
	// until waits for an answer with the status.
	until := func(status int) {
		t.Helper()
		for await.Recv(t, "an answer", answers) != status {
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	for range 50 {
		d, err := newDoorman([]*os.File{socket})
		if err != nil {
			t.Fatal(err)
		}
		until(http.StatusServiceUnavailable)
		d.leave()
		l, err := net.FileListener(socket)
		if err != nil {
			t.Fatal(err)
		}
		next := netaddr.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
		next.SetKeepAlivesEnabled(false)
		served := make(chan struct{})
		go func() { defer close(served); _ = next.Serve(linger.Listener(l)) }()
		until(http.StatusOK)
		l.Close()
		<-served
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestFrontDoor(t *testing.T) {
	// Says what it is asked for.
	_, listen, stopServer := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/breaks" {
			panic(http.ErrAbortHandler)
		}
		fmt.Fprintf(w, "%s %s", r.Host, r.URL.Path)
	}))
	_, port, _ := net.SplitHostPort(listen)
	c := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	get := func(host, path string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+listen+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host + ":" + port
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		if resp.StatusCode >= 400 && resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: an error of type %q", path, resp.Header.Get("Content-Type"))
		}
		return resp.StatusCode, string(b)
	}
	for _, want := range []struct {
		host, path string
		status     int
		body       string
	}{
		{"localhost", "/v1/x", 200, "localhost:" + port + " /v1/x"},
		{"localhost", "/api/v1/x", 200, "localhost:" + port + " /v1/x"},
		{"127.0.0.1", "/health", 200, "127.0.0.1:" + port + " /health"},
		{"80-cl-x.localhost", "/api/x", 200, "80-cl-x.localhost:" + port + " /api/x"},
		{"80-cl-x.localhost", "/", 200, "80-cl-x.localhost:" + port + " /"},
		{"localhost", "/", 302, ""},
		{"localhost", "/breaks", 502, `{"error":{"code":"unavailable","message":"the control plane closed the connection before it answered"}}`},
	} {
		if status, body := get(want.host, want.path); status != want.status || body != want.body {
			t.Errorf("%s%s: %d %q, want %d %q", want.host, want.path, status, body, want.status, want.body)
		}
	}
	stopServer()
	for _, host := range []string{"localhost", "80-cl-x.localhost"} {
		want := `{"error":{"code":"unavailable","message":"the front door cannot connect to the control plane: it is starting or has stopped"}}`
		if status, body := get(host, "/v1/x"); status != 502 || body != want {
			t.Errorf("%s without a server: %d %q", host, status, body)
		}
	}
}

// TestNameWithDot: a sandbox's name that ends with a dot leads to the same sandbox,
// whether Caddy's handlers see the request or not.
func TestNameWithDot(t *testing.T) {
	t.Setenv(sandboxDomain, "sandboxes.localhost")
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
	for _, host := range []string{"80-cl-x.localhost.", "80-CL-x.sandboxes.localhost.:80", "x.sandboxes.localhost.", "sandboxes.localhost."} {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			if _, path := exchange(t, listen, method, host, "/api/x", ""); path != "/api/x" {
				t.Errorf("%s %s: the server is asked for %q", method, host, path)
			}
		}
	}
}

// TestEmptySettings: a setting that is there and empty means its default.
func TestEmptySettings(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
	defer server.Close()
	settings := regexp.MustCompile(`\{\$(WRENN_\w+)`).FindAllSubmatch(deploy.Caddyfile, -1)
	var empty []string
	for _, s := range settings {
		// The door itself has a port, an address and a control plane of its own.
		if name := string(s[1]); name != "WRENN_SITES" && name != "WRENN_BIND" && name != "WRENN_SERVER" {
			empty = append(empty, name+"=")
		}
	}
	if !slices.Contains(empty, sandboxDomain+"=") {
		t.Fatalf("the Caddyfile reads %v", empty)
	}
	door := deploytest.Listen(t)
	door.Serve(t, server.Listener.Addr().String(), empty...)
	for _, want := range []struct{ host, method, asked, path string }{
		{"localhost", http.MethodGet, "/api/x", "/x"},
		// By the listener wrapper, and by Caddy's handlers.
		{"80-cl-x.localhost", http.MethodGet, "/api/x", "/api/x"},
		{"80-cl-x.localhost", http.MethodPost, "/api/x", "/api/x"},
	} {
		if resp, path := exchange(t, door.Address, want.method, want.host, want.asked, ""); resp.StatusCode != http.StatusOK || path != want.path {
			t.Errorf("%s %s: %s, and the server is asked for %q", want.method, want.host, resp.Status, path)
		}
	}
}

// TestConnectionIsKept sends request after request over one connection.
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

// TestResponseIsTheGuestsOwn has the front door change nothing of a response.
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
			resp.Header.Del("Date") // which a proxy adds if there is none
			want := http.Header{"X-Asked": {""}, "Content-Length": {"3"}, "Content-Encoding": {"gzip"}}
			if err != nil || method == http.MethodGet && string(b) != "abc" || !reflect.DeepEqual(resp.Header, want) {
				t.Errorf("%s over %s: %v %q, %v", method, resp.Proto, resp.Header, b, err)
			}
		}
		transport.CloseIdleConnections()
	}
}

// TestBodyThatNobodyReads posts to a control plane that is not there, or that
// answers without reading.
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

// TestAnswerDoesNotWaitForBody has the control plane break off while a client
// sends a request without end: the answer comes all the same.
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
		for tick := time.NewTicker(time.Millisecond); ; <-tick.C { // Without end.
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

// TestFrontDoorComesBack kills Caddy: the port stays taken, and the next Caddy
// answers on the same socket.
func TestFrontDoorComesBack(t *testing.T) {
	s, listen, _ := openDoor(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	pids, err := exec.Command("pgrep", "-f", "caddy run --config "+filepath.Join(s.dir.Run(), "Caddyfile")).Output()
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(pids), &pid); err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if want := fmt.Sprintf("\nUid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", caddyID); err != nil || !strings.Contains(string(status), want) {
		t.Errorf("Caddy runs as another user: %v\n%s", err, status)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := bind(t.Context(), listen); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("the port of a Caddy that was killed: %v", err)
	}
	c := &http.Client{Timeout: 60 * time.Second}
	err = poll(t.Context(), func(context.Context) error { // The connection under way may have been the dead Caddy's.
		resp, err := c.Get("http://" + listen + "/v1/x")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
	if err != nil {
		t.Error(err)
	}
}

// TestPortInUse has another program at each address that a client of ours
// could reach instead.
func TestPortInUse(t *testing.T) {
	for _, c := range []struct{ other, ours string }{
		{"127.0.0.1", "127.0.0.1"},
		{"127.0.0.1", ""},
		{"127.0.0.1", "localhost"},
		{"", "127.0.0.1"},
		{"", "::1"},
		{"", ""},
		{"::1", "::1"},
		{"::1", ""},
		{"::1", "localhost"},
		// Not the same socket, but "localhost" names both.
		{"::1", "127.0.0.1"},
		{"127.0.0.1", "::1"},
	} {
		l, err := net.Listen("tcp", net.JoinHostPort(c.other, "0"))
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		ours := net.JoinHostPort(c.ours, port)
		if files, err := bind(t.Context(), ours); err == nil || !strings.Contains(err.Error(), "in use by another program") || files != nil {
			t.Errorf("%s beside %s: %v", ours, l.Addr(), err)
		}
		l.Close()
		files, err := bind(t.Context(), ours)
		if err != nil {
			t.Errorf("%s alone: %v", ours, err)
			continue
		}
		if _, err := net.Listen("tcp", ours); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%s is not taken: %v", ours, err)
		}
		for _, f := range files {
			f.Close()
		}
	}
}

// TestUpStopsAtTakenPort runs all of `wrenn up`, which must not get as far as
// starting anything.
func TestUpStopsAtTakenPort(t *testing.T) {
	s := newService(t)
	deploytest.Caddy(t)
	other := httptest.NewServer(http.NotFoundHandler()) // another instance
	defer other.Close()
	listen := other.Listener.Addr().String()
	var out strings.Builder
	err := run(t.Context(), options{dir: string(s.dir), listen: listen}, &out)
	if err == nil || !strings.Contains(err.Error(), listen+" is in use") {
		t.Errorf("got %v", err)
	}
	if strings.Contains(out.String(), "ready") {
		t.Errorf("it started something:\n%s", &out)
	}
	if _, err := os.Stat(s.dir.Credentials()); err == nil {
		t.Error("it wrote credentials")
	}
}

// broken is a server whose responses break off after a part, with and without
// a length.
func broken(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/length" {
		w.Header().Set("Content-Length", "1000")
	}
	fmt.Fprintln(w, "a part")
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// TestBrokenResponse shows that a client can tell a response that broke off
// from a complete one.
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

// TestBrokenBody: a request whose body is not in chunks, as its header says, is its
// client's fault, and the answer says so.
func TestBrokenBody(t *testing.T) {
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err == nil {
			t.Error("the control plane got a whole body")
		}
		panic(http.ErrAbortHandler) // It, too, has nobody to tell.
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

// TestPublicFrontDoor serves HTTPS as the README's "Add a machine" does.
func TestPublicFrontDoor(t *testing.T) {
	behind := httptest.NewServer(http.HandlerFunc(broken))
	defer behind.Close()
	door := deploytest.Listen(t)
	door.ServeTLS(t, behind.Listener.Addr().String(), []string{"wrenn.example.com", "*.wrenn.example.com", "*.sandboxes.example.net"},
		"WRENN_DOMAIN=wrenn.example.com", "WRENN_SANDBOX_DOMAIN=sandboxes.example.net")
	for _, h2 := range []bool{false, true} {
		c := http.Client{Transport: netaddr.TLSTransport(door.Address, h2, &tls.Config{RootCAs: door.Trust})}
		for _, name := range []string{"wrenn.example.com:", "80-cl-x.wrenn.example.com:", "80-cl-x.sandboxes.example.net:"} {
			breaks(t, &c, "https://"+name+door.Port, h2)
		}
		c.CloseIdleConnections()
	}
}

// TestStreamsBothWays answers before the request's body has ended, which a
// proxy that is half-duplex over HTTP/1.1 breaks.
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
		go fmt.Fprintln(w, "first") // Ends when the request does.
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
			t.Errorf("over %s: more came, or %v", resp.Proto, lines.Err())
		}
		resp.Body.Close()
		transport.CloseIdleConnections()
		cancel()
	}
}

// shortStreams is a guest daemon whose commands end at once. Its gates order
// each stream so that the end of the request's body comes as the response
// begins, which is when a half-duplex proxy can lose either.
type shortStreams struct {
	processconnect.UnimplementedProcessHandler
	http.RoundTripper // the client's way to it
	streams           sync.Map
}

// gates are one stream's.
type gates struct {
	begun chan struct{} // closed when the server has the request's header: its body may end
	seen  chan struct{} // closed when the client has the first event: the second may be sent
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

// RoundTrip sends a body of no known length, which ends when the server has its header.
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
		return n, nil // Its error comes again.
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

// TestShortStreams starts 5,000 commands through Caddy over HTTP/1.1. The fault
// that it looks for is in the hops, so that no guest is needed.
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
						return // Enough; each may take its time.
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

// TestRefusalArrives: the control plane answers while a client sends a large body. The
// client gets all of the answer, however busy the machine is.
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

// TestPortsTakeAShorterWay: plain requests to sandboxes' ports, and no others, bypass
// Caddy's handlers.
func TestPortsTakeAShorterWay(t *testing.T) {
	t.Setenv(sandboxDomain, "sandboxes.localhost")
	config := bytes.Replace(deploy.Caddyfile, []byte("\tfull_duplex\n"), []byte("\tfull_duplex\n\theader >X-Caddy yes\n"), 1)
	_, listen, stopServer := openDoorOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(w, r.Body)
		fmt.Fprint(w, r.Header.Get("X-Forwarded-For"), r.Header.Get("X-Forwarded-Host"), r.Header.Get("X-Forwarded-Proto"))
	}), config)
	for _, c := range []struct {
		method, host, body string
		short              bool
	}{
		{"GET", "80-cl-x.localhost", "", true},
		{"DELETE", "80-CL-x.LOCALHOST:8000", "", true},
		{"GET", "80-cl-x.sandboxes.localhost", "", true},
		{"GET", "80-cl-x.localhost.", "", true},
		{"GET", "80-cl-x.sandboxes.localhost.:8000", "", true},
		{"GET", "localhost", "", false},
		{"GET", "a.80-cl-x.localhost", "", false},
		{"GET", "80-cl-x.example.com", "", false},
		{"POST", "80-cl-x.localhost", "hello", false},
		{"GET", "x.sandboxes.localhost", "", false},
	} {
		resp, text := exchange(t, listen, c.method, c.host, "/v1/x", c.body)
		if short := resp.Header.Get("X-Caddy") == ""; short != c.short || resp.StatusCode != 200 || text != c.body+"127.0.0.1"+c.host+"http" {
			t.Errorf("%s %s: %d %q, by a shorter way: %v", c.method, c.host, resp.StatusCode, text, short)
		}
	}
	stopServer()
	for _, host := range []string{"80-cl-x.localhost", "localhost"} {
		if resp, text := exchange(t, listen, "GET", host, "/v1/x", ""); resp.StatusCode != 502 || !strings.Contains(text, "cannot connect to the control plane") {
			t.Errorf("%s without a server: %d %q", host, resp.StatusCode, text)
		}
	}
}

// TestConnectionsArePassed: the control plane serves connections to sandboxes' ports and
// those that begin with a call of the API itself as long as it accepts them, and answers whatever comes over them as it would
// be answered through Caddy.
func TestConnectionsArePassed(t *testing.T) {
	tell := func(by string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			from := r.Header.Get("X-Forwarded-For") // which Caddy says
			if from == "" {
				from, _, _ = net.SplitHostPort(r.RemoteAddr)
			}
			w.Header().Set("By", by)
			fmt.Fprintf(w, "%s %s%s %s from %s: %s", r.Method, r.Host, r.URL.EscapedPath(), r.URL.RawQuery, from, b)
		})
	}
	s, listen, _ := openDoor(t, tell("Caddy"))
	srv := netaddr.Server(controlplane.FrontDoor(tell("itself"), func(r *http.Request) bool { return strings.HasSuffix(r.Host, "-cl-x.localhost") }))
	go srv.Serve(takePassed(t, s))
	t.Cleanup(func() { srv.Close() })
	dial := func() (net.Conn, func(request string) (by, answer string)) {
		t.Helper()
		conn, err := net.Dial("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(conn)
		return conn, func(request string) (by, answer string) {
			t.Helper()
			fmt.Fprint(conn, request)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%q: %v", request, err)
			}
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			return resp.Header.Get("By"), fmt.Sprintf("%s %s %s", resp.Status, resp.Header.Get("Location"), b)
		}
	}
	get := func(host, path string) string { return "GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n" }
	const sandbox, api = "80-cl-x.localhost", "localhost"
	post := "POST /a HTTP/1.1\r\nHost: " + sandbox + "\r\nContent-Length: 5\r\n\r\nhello"
	call := "POST /v1/x HTTP/1.1\r\nHost: " + api + "\r\nContent-Length: 5\r\n\r\nhello"
	client, mine := dial()
	mine(get(sandbox, "/"))
	_, caddys := dial()
	caddys(get(api, "/v1/x"))
	for _, request := range []string{
		get(sandbox, "/"), get(sandbox, "/api/x%2fy?z=%zz"), post, call, strings.Replace(call, "/v1", "/api/v1", 1),
		get(api, "/v1/x"), get(api, "/api/v1/x%2fy?z"), get(api, "/"), get(api, "/docs"), get(api, "/api"), get(api, "/apis"),
		strings.Replace(get(sandbox, "/"), "\r\n\r\n", "\r\nX-Forwarded-For: me\r\nX-Forwarded-Host: me\r\nForwarded: me\r\n\r\n", 1),
	} {
		by, got := mine(request)
		other, want := caddys(request)
		if got != want || by == "Caddy" || other == "itself" {
			t.Errorf("%q: by %q: %q\nby %q: %q", request, by, got, other, want)
		}
	}
	for _, first := range []string{get(api, "/v1/x"), post} {
		_, ask := dial()
		if by, _ := ask(first); by != "Caddy" {
			t.Errorf("%q: by %s", first, by)
		}
	}
	for _, first := range []string{call, strings.Replace(call, "/v1", "/api/v1", 1)} {
		_, ask := dial()
		if by, got := ask(first); by != "itself" || !strings.HasSuffix(got, " from 127.0.0.1: hello") {
			t.Errorf("%q: by %q: %s", first, by, got)
		}
	}
	srv.Close()
	for _, first := range []string{get(sandbox, "/"), call} {
		_, ask := dial()
		if by, got := ask(first); by != "Caddy" {
			t.Errorf("the control plane takes none: by %q: %s", by, got)
		}
	}
	if n, err := client.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("a connection that the control plane has closed: %d, %v", n, err)
	}
	// Nobody accepts: the control plane hangs, or is killed before it does.
	takePassed(t, s)
	_, ask := dial()
	if by, got := ask(get(sandbox, "/")); by != "Caddy" {
		t.Errorf("the control plane accepts none: by %q: %s", by, got)
	}
}

// TestConnectionsPerAddress: one address opens connections without a request until
// Caddy closes further ones. Connections that Caddy passed on count at the server.
func TestConnectionsPerAddress(t *testing.T) {
	const here, stranger, other, proxy = "192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"
	if !inNamespace(t, here, stranger, other, proxy) {
		return
	}
	t.Setenv(trustedProxies, "198.51.100.0/24,"+proxy+"/32")
	tell := func(by string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, by) })
	}
	s, listen, _ := openDoorAt(t, here, tell("Caddy"), deploy.Caddyfile)
	srv := netaddr.Server(tell("itself"))
	go srv.Serve(takePassed(t, s))
	t.Cleanup(func() { srv.Close() })
	dial := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{Timeout: await.Hang, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.DialContext(t.Context(), "tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := c.SetDeadline(time.Now().Add(await.Hang)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	ask := func(c net.Conn, host string) string {
		fmt.Fprintf(c, "GET /v1/x HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return "nobody"
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	if by := ask(dial(stranger), "80-cl-x.localhost"); by != "itself" {
		t.Fatalf("a connection to a sandbox's port is served by %s", by)
	}
	for _, c := range []struct {
		from, beyond string
	}{{stranger, "nobody"}, {proxy, "Caddy"}} {
		open := make([]net.Conn, bounded.PerAddress)
		for i := range open {
			open[i] = dial(c.from)
		}
		if by := ask(dial(c.from), "localhost"); by != c.beyond {
			t.Errorf("one more connection of %s than its bound is served by %s, not %s", c.from, by, c.beyond)
		}
		if by := ask(dial(other), "localhost"); by != "Caddy" {
			t.Errorf("another address is served by %s", by)
		}
		if by := ask(open[len(open)-1], "localhost"); by != "Caddy" {
			t.Errorf("the last connection of %s within its bound is served by %s", c.from, by)
		}
		for _, o := range open {
			o.Close()
		}
		await.Until(t, "what "+c.from+" has closed no longer counts", func() bool { return ask(dial(c.from), "localhost") == "Caddy" })
	}
}

// inNamespace runs the calling test again in a new network namespace that has
// these addresses, and returns true there.
func inNamespace(t *testing.T, addresses ...string) bool {
	t.Helper()
	const inside = "WRENN_TEST_NAMESPACE"
	if os.Getenv(inside) == t.Name() {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addresses {
			if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(a), Mask: net.CIDRMask(32, 32)}}); err != nil {
				t.Fatal(err)
			}
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			t.Fatal(err)
		}
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	deploytest.Caddy(t) // whose build may need the network
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// TestUsedLately: Caddy sends a request that must not arrive twice over a connection that
// was used within [upstream.HopOnceIdle] or over a new one. A server that stops counts on
// that.
func TestUsedLately(t *testing.T) {
	from := make(chan string, 1)
	behind := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			from <- r.RemoteAddr
		}
	}))
	defer behind.Close()
	door := deploytest.Listen(t)
	door.Serve(t, behind.Listener.Addr().String())
	ask := func() string {
		t.Helper()
		exchange(t, door.Address, http.MethodPost, "localhost", "/v1/sandboxes", "{}")
		return await.Recv(t, "the request", from)
	}
	first, answered := ask(), time.Now()
	await.Until(t, "the connection is too old", func() bool { return time.Since(answered) > upstream.HopOnceIdle })
	if ask() == first {
		t.Error("two requests came over one connection")
	}
}
