package up

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/wrenn-dev/wrenn/deploy"
	"github.com/wrenn-dev/wrenn/deploy/deploytest"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/bounded"
	"github.com/wrenn-dev/wrenn/internal/handover"
	"github.com/wrenn-dev/wrenn/internal/linger"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	controlplane "github.com/wrenn-dev/wrenn/internal/server"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// takePassed returns a listener for the connections that Caddy passes to the control
// plane. It is closed when the test ends.
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

// TestPlaceholder checks that from the moment the port is open until Caddy responds, clients
// learn what the machine prepares. No client is refused, and none waits.
func TestPlaceholder(t *testing.T) {
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
	front.placeholder.prepares("the base image")
	for _, method := range []string{"GET", "POST", "HEAD"} {
		resp, body := get(method)
		if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d %v", method, resp.StatusCode, resp.Header)
		}
		if want := `{"error":{"code":"unavailable","message":"Wrenn is starting and is preparing the base image: try again in a few seconds"}}` + "\n"; method != "HEAD" && body != want {
			t.Errorf("%s: %q", method, body)
		}
		log, err := os.ReadFile(filepath.Join(s.dir.Logs(), "front-door.log"))
		if id := resp.Header.Get("X-Request-Id"); err != nil || id == "" || !strings.Contains(string(log), "request_id="+id+" method="+method) {
			t.Errorf("%s: the log lacks the request %q: %v\n%s", method, id, err, log)
		}
	}

	// Caddy takes over while clients connect.
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
			t.Fatalf("during the takeover: %d %q", resp.StatusCode, body)
		}
	}
	if err := <-launched; err != nil {
		t.Fatal(err)
	}
}

// TestPlaceholderLeaves lets another server take over repeatedly while clients connect. One
// of the two responds on each connection.
func TestPlaceholderLeaves(t *testing.T) {
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
					return // The last server may not have responded.
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
	// until waits for a response with the status.
	until := func(status int) {
		t.Helper()
		for await.Recv(t, "an answer", answers) != status {
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	for range 50 {
		p, err := newPlaceholder([]*os.File{socket}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		until(http.StatusServiceUnavailable)
		p.leave()
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

// TestConnectionsArePassed checks that the control plane serves connections to sandboxes'
// ports, and those that start with a call of the API itself, for as long as it accepts
// them, and that clients get the same responses as through Caddy.
func TestConnectionsArePassed(t *testing.T) {
	tell := func(by string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			from := r.Header.Get("X-Forwarded-For") // set by Caddy
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
			t.Errorf("the control plane accepts none: by %q: %s", by, got)
		}
	}
	if n, err := client.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("a connection that the control plane has closed: %d, %v", n, err)
	}
	// Nobody accepts: the control plane hangs, or was killed before it could.
	takePassed(t, s)
	_, ask := dial()
	if by, got := ask(get(sandbox, "/")); by != "Caddy" {
		t.Errorf("the control plane does not accept: by %q: %s", by, got)
	}
}

// TestConnectionsPerAddress opens connections without a request from one address until
// Caddy closes further ones. The server counts those that Caddy passed on.
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

// inNamespace runs the calling test again in a new network namespace with these
// addresses, and returns true there.
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
	deploytest.Caddy(t) // building it may need the network
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// TestUsedLately checks that Caddy sends a request that must not arrive twice over a
// connection used within [upstream.HopOnceIdle] or over a new one. A stopping server
// relies on that.
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
