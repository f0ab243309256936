package netaddr

import (
	"bytes"
	"io"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// served serves h like an agent's calls, and returns a client for it.
func served(t *testing.T, h http.HandlerFunc) (_ *http.Client, base string) {
	t.Helper()
	addr := "unix:" + filepath.Join(t.TempDir(), "s.sock")
	l, err := Listen(t.Context(), addr, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	srv, done := Server(h), make(chan error, 1)
	Separate(srv)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	c, base := HTTPClient(addr)
	t.Cleanup(c.CloseIdleConnections)
	return c, base
}

// TestUnreadBodies leaves the bodies of more requests unread than one connection carries:
// other requests' bodies still arrive.
func TestUnreadBodies(t *testing.T) {
	const unread = 150
	reading, release := make(chan struct{}, unread), make(chan struct{})
	c, base := served(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/unread" {
			reading <- struct{}{}
			<-release
			return
		}
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write(b)
	})
	var stuck sync.WaitGroup
	defer stuck.Wait()
	defer close(release)
	for range unread {
		stuck.Go(func() {
			// This body ends only when the server responds without having read it.
			resp, err := c.Post(base+"/unread", "", io.LimitReader(zeros{}, 16<<20))
			if err == nil {
				resp.Body.Close()
			}
		})
	}
	for range unread {
		await.Recv(t, "a body is left unread", reading)
	}
	sent := make([]byte, 16<<10)
	for range 1000 { // enough to block the others
		req, err := http.NewRequestWithContext(await.Context(t), http.MethodPost, base+"/read", bytes.NewReader(sent))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(got, sent) || resp.ProtoMajor != 2 {
			t.Fatalf("%d bytes over HTTP/%d, %v", len(got), resp.ProtoMajor, err)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestUnreadResponse reads nothing of a response: little of it is buffered.
func TestUnreadResponse(t *testing.T) {
	wrote := make(chan int, 1)
	c, base := served(t, func(w http.ResponseWriter, _ *http.Request) {
		control, n := http.NewResponseController(w), 0
		for err := error(nil); err == nil; {
			_ = control.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
			if _, err = w.Write(make([]byte, 1<<10)); err == nil {
				err = control.Flush()
			}
			n += 1 << 10
		}
		wrote <- n
	})
	resp, err := c.Get(base)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n := await.Recv(t, "the writes end", wrote); n > 2*Window {
		t.Errorf("the client took %d bytes before it read any", n)
	}
}
