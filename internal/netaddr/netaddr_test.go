package netaddr

import (
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
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
		t.Error("a socket in use was taken over")
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
