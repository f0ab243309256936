package patience

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// answering serves h, also over cleartext HTTP/2.
func answering(t *testing.T, l Limits, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(Answers(h, l))
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s
}

// flood writes until a write fails.
func flood(w io.Writer) (err error) {
	for piece := make([]byte, 32<<10); err == nil; {
		_, err = w.Write(piece)
	}
	return err
}

// TestUnreadAnswers checks that writes to clients that read nothing fail.
func TestUnreadAnswers(t *testing.T) {
	soon, long := 50*time.Millisecond, Limits{Unread: never, Idle: never}
	for name, tt := range map[string]struct {
		limits func(*Limits)
		write  func(http.ResponseWriter) error
	}{
		"answer": {func(l *Limits) { l.Unread = soon }, func(w http.ResponseWriter) error { return flood(w) }},
		"the handler's own deadline": {func(*Limits) {}, func(w http.ResponseWriter) error {
			_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(soon))
			return flood(w)
		}},
		"flushed": {func(l *Limits) { l.Unread = soon }, func(w http.ResponseWriter) error {
			for {
				_, _ = w.Write(make([]byte, 1<<10))
				if err := http.NewResponseController(w).Flush(); err != nil {
					return err
				}
			}
		}},
		"another protocol": {func(l *Limits) { l.Idle = soon }, func(w http.ResponseWriter) error {
			c, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return err
			}
			defer c.Close()
			return flood(c)
		}},
		"another protocol, by the buffer": {func(l *Limits) { l.Idle = soon }, func(w http.ResponseWriter) error {
			c, rw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return err
			}
			defer c.Close()
			return flood(rw)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l, ended := long, make(chan error, 1)
			tt.limits(&l)
			s := answering(t, l, func(w http.ResponseWriter, _ *http.Request) { ended <- tt.write(w) })
			c, err := net.Dial("tcp", s.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			if err := await.Recv(t, "the write ends", ended); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestUnreadStream has an HTTP/2 client that does not read one stream. That stream ends,
// and the connection's other streams continue.
func TestUnreadStream(t *testing.T) {
	ended := make(chan error, 1)
	begun, over := make(chan struct{}), make(chan struct{})
	s := answering(t, Limits{Unread: 100 * time.Millisecond, Idle: never}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/flood" {
			ended <- flood(w)
			return
		}
		close(begun)
		<-over // without a write for longer than a piece may stay unread, like the other
		_, _ = w.Write([]byte("all"))
	})
	tr := &http.Transport{Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	defer tr.CloseIdleConnections()
	get := func(path string) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(await.Context(t), http.MethodGet, s.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	others := make(chan *http.Response, 1)
	go func() { others <- get("/") }()
	await.Recv(t, "the other request begins", begun)
	unread := get("/flood")
	defer unread.Body.Close()
	if err := await.Recv(t, "the write ends", ended); err == nil {
		t.Error("it did not fail")
	}
	close(over)
	other := await.Recv(t, "the other response", others)
	defer other.Body.Close()
	if b, err := io.ReadAll(other.Body); err != nil || string(b) != "all" || other.ProtoMajor != 2 {
		t.Errorf("%s of HTTP/%d, %v", b, other.ProtoMajor, err)
	}
}

// TestSlowReader lets a client read slowly, and pause between requests.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, unread = 8 << 20, time.Second
		p := inBubble(t, Answers(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.Copy(w, io.LimitReader(bytes.NewReader(make([]byte, size)), size))
		}), Limits{Unread: unread, Idle: never}))
		c := p.client(t)
		for range 2 {
			resp, err := c.Get("http://x")
			if err != nil {
				t.Fatal(err)
			}
			n, piece := int64(0), make([]byte, 256<<10)
			for {
				m, err := io.ReadFull(resp.Body, piece)
				n += int64(m)
				if err != nil {
					break
				}
				time.Sleep(unread / 25)
			}
			resp.Body.Close()
			if n != size {
				t.Errorf("%d bytes of %d", n, size)
			}
			time.Sleep(2 * unread) // until the last write's deadline is over
		}
	})
}

// TestHalfClosed ends the output of a handler of another protocol: its client sees that,
// and can still send.
func TestHalfClosed(t *testing.T) {
	got := make(chan string, 1)
	s := answering(t, Limits{Unread: never, Idle: never}, func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		half, ok := c.(interface{ CloseWrite() error })
		if !ok {
			t.Error("the connection has no CloseWrite")
			close(got)
			return
		}
		if err := half.CloseWrite(); err != nil {
			t.Error(err)
		}
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	c, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := io.ReadAll(c); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "more")
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if said := await.Recv(t, "what the client sends ends", got); said != "more" {
		t.Errorf("%q", said)
	}
}
