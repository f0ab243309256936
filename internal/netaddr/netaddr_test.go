package netaddr

import (
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/linger/lingertest"
	"github.com/wrenn-dev/wrenn/internal/patience"
)

func TestUnixBothProtocols(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "s.sock")
	l, err := Listen(t.Context(), addr, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	srv := Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) }))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })

	if _, err := Listen(t.Context(), addr, 0o600); err == nil {
		t.Error("a socket in use was replaced")
	}
	h2, base := HTTPClient(addr)
	for want, c := range map[string]*http.Client{"HTTP/2.0": h2, "HTTP/1.1": {Transport: Transport(addr, false)}} {
		resp, err := c.Get(base + "/")
		if err != nil {
			t.Fatalf("%s: %v", want, err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(body) != want {
			t.Errorf("server saw %q, want %q", body, want)
		}
	}
}

func TestListenReplacesStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	l2, err := Listen(t.Context(), "unix:"+path, 0o600)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	l2.Close()
}

func TestListenRefusesLongPath(t *testing.T) {
	_, err := Listen(t.Context(), "unix:/"+strings.Repeat("x", 200), 0o600)
	if err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("got %v", err)
	}
}

// TestListeners lists every place that serves HTTP. Each limits its wait for headers and
// bodies: those of Server do, and package patience tests its bodies.
func TestListeners(t *testing.T) {
	listeners := map[string]string{
		"internal/netaddr/netaddr.go":         "Server: control plane, agent, their metrics, and the guest daemon",
		"internal/agent/metadata/metadata.go": "guests' metadata",
	}
	root := filepath.Join("..", "..")
	found := make(map[string]bool)
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, file)
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && file != root || d.Name() == "node_modules" || name == "internal/gen") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || strings.HasPrefix(name, "test/") || strings.HasPrefix(name, "examples/") || strings.Contains(name, "test/") {
			return nil
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		for _, how := range []string{"http.Server{", "http.ListenAndServe", "http.Serve(", "http.ServeTLS("} {
			if !strings.Contains(string(text), how) {
				continue
			}
			if listeners[name] == "" {
				t.Errorf("%s has its own listener: use netaddr.Server", name)
			}
			if name == "internal/agent/metadata/metadata.go" && !strings.Contains(string(text), "ReadTimeout:") {
				t.Errorf("%s has no limit for bodies", name)
			}
			found[name] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, what := range listeners {
		if found[name] {
			continue
		}
		t.Errorf("%s (%s) does not exist", name, what)
	}
	for file, has := range map[string][]string{
		"deploy/Caddyfile": {"max_header_size 64KiB", "read_header", "idle", "full_duplex", "linger", "read_body_idle -1s", "write_idle 1h"}, // the front door
	} {
		text, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range has {
			if !strings.Contains(string(text), word) {
				t.Errorf("%s lacks %s", file, word)
			}
		}
	}
	s := Server(http.NotFoundHandler())
	if s.ReadHeaderTimeout == 0 || s.IdleTimeout == 0 || s.MaxHeaderBytes == 0 || patience.Default.Whole == 0 || patience.Default.Grace == 0 || patience.Default.Rate == 0 || patience.Default.Longest == 0 || patience.Default.Idle == 0 {
		t.Errorf("without a bound: %+v, %+v", s, patience.Default)
	}
}

// TestRefusalArrives has a server that responds to large requests before it has read
// them, in every way that net/http and its handlers do.
func TestRefusalArrives(t *testing.T) {
	mux := http.NewServeMux()
	no := func(w http.ResponseWriter) { http.Error(w, "no", http.StatusUnauthorized) }
	mux.HandleFunc("/unread", func(w http.ResponseWriter, _ *http.Request) { no(w) })
	mux.HandleFunc("/partly", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.CopyN(io.Discard, r.Body, 300<<10)
		no(w)
	})
	mux.HandleFunc("/bounded", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, 100<<10))
		no(w)
	})
	mux.HandleFunc("/late", func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).SetReadDeadline(time.Unix(1, 0))
		_, _ = io.Copy(io.Discard, r.Body)
		no(w)
	})
	for _, network := range []string{"tcp", "unix"} {
		addr := "127.0.0.1:0"
		if network == "unix" {
			addr = "unix:" + filepath.Join(t.TempDir(), "s.sock")
		}
		l, err := Listen(t.Context(), addr, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		srv := Server(mux)
		done := make(chan error, 1)
		go func() { done <- srv.Serve(l) }()
		t.Cleanup(func() { srv.Close(); <-done })
		dial := func() (net.Conn, error) { return net.Dial(network, l.Addr().String()) }
		for _, want := range []lingertest.Refusal{
			{Path: "/unread", Status: 401, Contains: "no"},
			{Path: "/partly", Status: 401, Contains: "no"},
			{Path: "/bounded", Status: 401, Contains: "no"},
			{Path: "/late", Status: 401, Contains: "no"},
			{Path: "/unread", Status: 431, Header: http.Header{"X-Long": {strings.Repeat("x", 100<<10)}}},
			{Path: "/unread", Status: 417, Header: http.Header{"Expect": {"more"}}},
		} {
			t.Run(network+want.Path+strconv.Itoa(want.Status), func(t *testing.T) {
				t.Parallel()
				lingertest.Refused(t, dial, want, 14)
			})
		}
	}
}
