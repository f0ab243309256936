// Package lingertest provides clients that are still sending when the response arrives.
package lingertest

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/linger"
)

// NewServer starts a server for h whose connections linger, as those of Wrenn do.
func NewServer(h http.Handler) *httptest.Server {
	s := httptest.NewUnstartedServer(h)
	s.Listener = linger.Listener(s.Listener)
	s.Start()
	return s
}

// chunk is the size of the pieces of a chunked body. Every body is a multiple of it.
const chunk = 32 << 10

// Refusal is a request that a server answers before it has read the body.
type Refusal struct {
	Method, Path, Host string // POST, /, localhost
	Header             http.Header
	// Status is the expected status, and Contains must be in the body.
	Status   int
	Contains string
}

// Refused sends r with large bodies over HTTP/1.1, tries times each with Go's client and
// with a raw one. It fails the test unless each reads the whole response. dial connects
// to the server.
func Refused(t *testing.T, dial func() (net.Conn, error), r Refusal, tries int) {
	t.Helper()
	if r.Method == "" {
		r.Method = http.MethodPost
	}
	if r.Path == "" {
		r.Path = "/"
	}
	if r.Host == "" {
		r.Host = "localhost"
	}
	clients := []func(func() (net.Conn, error), Refusal, int, bool) error{viaGo, viaRaw, viaRawThatReadsLast}
	const together = 16
	places := make(chan struct{}, together)
	var all sync.WaitGroup
	for n := range tries {
		for i, send := range clients {
			places <- struct{}{}
			all.Go(func() {
				defer func() { <-places }()
				mib := 1 << (n % 7) // to 64
				if n%14 >= 4 {
					mib = min(mib, 4) // with larger ones only, the test would take minutes
				}
				if err := send(dial, r, mib<<20+chunk, n%2 == 1); err != nil {
					t.Errorf("client %d, try %d of %d MiB: %v", i, n, mib, err)
				}
			})
		}
	}
	all.Wait()
}

// endless is a body of x.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	copy(p, bytes.Repeat([]byte("x"), len(p)))
	return len(p), nil
}

func (r Refusal) check(resp *http.Response, body []byte, err error) error {
	if err != nil {
		return fmt.Errorf("read body after %s %q: %w", resp.Status, body, err)
	}
	if resp.StatusCode != r.Status || !bytes.Contains(body, []byte(r.Contains)) {
		return fmt.Errorf("got %s %q, want %d", resp.Status, body, r.Status)
	}
	return nil
}

func viaGo(dial func() (net.Conn, error), r Refusal, size int, chunked bool) error {
	transport := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return dial() }}
	defer transport.CloseIdleConnections()
	// A reader whose length Go cannot find out.
	req, err := http.NewRequest(r.Method, "http://"+r.Host+r.Path, io.LimitReader(endless{}, int64(size)))
	if err != nil {
		return err
	}
	for name, values := range r.Header {
		req.Header[name] = values
	}
	if !chunked {
		req.ContentLength = int64(size)
	}
	c := http.Client{Transport: transport, Timeout: await.Hang}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return r.check(resp, body, err)
}

// viaRaw reads while it writes. A failed write is an error.
func viaRaw(dial func() (net.Conn, error), r Refusal, size int, chunked bool) error {
	return raw(dial, r, size, chunked, false)
}

// viaRawThatReadsLast reads only after it has written everything.
func viaRawThatReadsLast(dial func() (net.Conn, error), r Refusal, size int, chunked bool) error {
	return raw(dial, r, size, chunked, true)
}

func raw(dial func() (net.Conn, error), r Refusal, size int, chunked, readsLast bool) error {
	conn, err := dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(await.Hang)); err != nil {
		return err
	}
	wrote := make(chan error, 1)
	go func() { wrote <- write(conn, r, size, chunked) }()
	if readsLast {
		if err := <-wrote; err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	if err := r.check(resp, body, err); err != nil {
		return err
	}
	if !readsLast {
		if err := <-wrote; err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	if !resp.Close {
		return nil
	}
	if more, err := io.ReadAll(in); err != nil || len(more) > 0 {
		return fmt.Errorf("after the answer: %q, %w", more, err)
	}
	return nil
}

func write(conn net.Conn, r Refusal, size int, chunked bool) error {
	w := bufio.NewWriterSize(conn, 64<<10)
	fmt.Fprintf(w, "%s %s HTTP/1.1\r\nHost: %s\r\n", r.Method, r.Path, r.Host)
	_ = r.Header.Write(w)
	if !chunked {
		fmt.Fprintf(w, "Content-Length: %d\r\n\r\n", size)
		if _, err := io.Copy(w, io.LimitReader(endless{}, int64(size))); err != nil {
			return err
		}
		return w.Flush()
	}
	fmt.Fprint(w, "Transfer-Encoding: chunked\r\n\r\n")
	for range size / chunk {
		fmt.Fprintf(w, "%x\r\n", chunk)
		if _, err := io.Copy(w, io.LimitReader(endless{}, chunk)); err != nil {
			return err
		}
		fmt.Fprint(w, "\r\n")
	}
	fmt.Fprint(w, "0\r\n\r\n")
	return w.Flush()
}
