package up

import (
	"context"
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
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/deploy"
	"github.com/wrenn-dev/wrenn/deploy/deploytest"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// openDoor starts a front door for server at its own address.
func openDoor(t *testing.T, server http.Handler) (s *service, address string, stopServer func()) {
	t.Helper()
	return openDoorOf(t, server, deploy.Caddyfile)
}

// openDoorOf is openDoor with the test's own configuration.
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
	// The kernel chose the port; Caddy gets the socket, not the port.
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

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestFrontDoor(t *testing.T) {
	// The server responds with the request's host and path.
	door, listen, stopServer := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
	refused := func(host, path string) {
		t.Helper()
		id := strings.NewReplacer("/", "_", ".", "_").Replace(host + path)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+listen+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host + ":" + port
		req.Header.Set("X-Request-Id", id)
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if got := resp.Header.Get("X-Request-Id"); resp.StatusCode != http.StatusBadGateway || got != "ext-"+id {
			t.Errorf("%s%s: %d with the id %q, want ext-%s", host, path, resp.StatusCode, got, id)
		}
		await.Until(t, "Caddy's log says why it refused "+id, func() bool {
			text, _ := os.ReadFile(filepath.Join(door.dir.Logs(), "caddy.log"))
			for line := range strings.Lines(string(text)) {
				if strings.Contains(line, `"ext-`+id+`"`) && strings.Contains(line, "unavailable") && strings.Contains(line, "error") {
					return true
				}
			}
			return false
		})
	}
	refused("localhost", "/breaks")
	stopServer()
	refused("localhost", "/v1/x")
	refused("80-cl-x.localhost", "/v1/x")
	for _, host := range []string{"localhost", "80-cl-x.localhost"} {
		want := `{"error":{"code":"unavailable","message":"the front door cannot connect to the control plane: it is starting or has stopped"}}`
		if status, body := get(host, "/v1/x"); status != 502 || body != want {
			t.Errorf("%s without a server: %d %q", host, status, body)
		}
	}
}

// TestNameWithDot checks that a sandbox's name with a trailing dot means the same
// sandbox, whether or not Caddy's handlers see the request.
func TestNameWithDot(t *testing.T) {
	t.Setenv(sandboxDomain, "sandboxes.localhost")
	_, listen, _ := openDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
	for _, host := range []string{"80-cl-x.localhost.", "80-CL-x.sandboxes.localhost.:80", "x.sandboxes.localhost.", "sandboxes.localhost."} {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			if _, path := exchange(t, listen, method, host, "/api/x", ""); path != "/api/x" {
				t.Errorf("%s %s: the server gets %q", method, host, path)
			}
		}
	}
}

// TestEmptySettings checks that an empty setting means its default.
func TestEmptySettings(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) }))
	defer server.Close()
	settings := regexp.MustCompile(`\{\$(WRENN_\w+)`).FindAllSubmatch(deploy.Caddyfile, -1)
	var empty []string
	for _, s := range settings {
		// The test needs its own port, address and control plane.
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
		// Through the listener wrapper, and through Caddy's handlers.
		{"80-cl-x.localhost", http.MethodGet, "/api/x", "/api/x"},
		{"80-cl-x.localhost", http.MethodPost, "/api/x", "/api/x"},
	} {
		if resp, path := exchange(t, door.Address, want.method, want.host, want.asked, ""); resp.StatusCode != http.StatusOK || path != want.path {
			t.Errorf("%s %s: %s, and the server gets %q", want.method, want.host, resp.Status, path)
		}
	}
}

// TestFrontDoorComesBack kills Caddy: the port stays open, and the next Caddy serves the
// same socket.
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
	err = poll(t.Context(), func(context.Context) error { // The first connection may still belong to the dead Caddy.
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

// TestPortInUse runs another program at each address that one of our clients could reach
// by mistake.
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
		// They are different sockets, but "localhost" names both.
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
			t.Errorf("nothing holds %s: %v", ours, err)
		}
		for _, f := range files {
			f.Close()
		}
	}
}

// TestUpStopsAtTakenPort runs `wrenn up` as a whole, which must not start anything.
func TestUpStopsAtTakenPort(t *testing.T) {
	s := newService(t)
	deploytest.Caddy(t)
	other := httptest.NewServer(http.NotFoundHandler()) // the other program
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
