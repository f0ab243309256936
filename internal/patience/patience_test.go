package patience

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// never is longer than any test runs.
const never = time.Hour

// serve responds with the result of reading a body, over HTTP/1.1.
func serve(t *testing.T, l Limits, say func(*http.Request)) string {
	t.Helper()
	s := httptest.NewServer(Handler(reads(say), l))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// reads responds with the result of reading a body.
func reads(say func(*http.Request)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if say != nil {
			say(r)
		}
		b, err := io.ReadAll(r.Body)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			w.WriteHeader(http.StatusRequestTimeout)
			return
		}
		fmt.Fprintf(w, "%d bytes, %v", len(b), err)
	}
}

// open starts a request with a body of length bytes, and sends only begun.
func open(t *testing.T, address string, length int, begun string) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(await.Hang))
	fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", length, begun)
	return c, bufio.NewReader(c)
}

// pipes is a listener whose connections are in memory, for tests in a synctest bubble.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

// inBubble serves h in a synctest bubble.
func inBubble(t *testing.T, h http.Handler) *pipes {
	p := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	s := &http.Server{Handler: h}
	go func() { _ = s.Serve(p) }()
	t.Cleanup(func() { _ = s.Close() })
	return p
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	close(p.closed)
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: "pipe"} }

func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	p.conns <- theirs
	return ours, nil
}

// client returns a client of the server.
func (p *pipes) client(t *testing.T) *http.Client {
	tr := &http.Transport{DialContext: p.dial}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func answer(t *testing.T, in *bufio.Reader) (int, string) {
	t.Helper()
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestStalls(t *testing.T) {
	long := Limits{Whole: never, Grace: never, Rate: 1 << 10, Longest: never, Idle: never}
	for name, tt := range map[string]struct {
		limits func(*Limits)
		say    func(*http.Request)
	}{
		"whole":  {func(l *Limits) { l.Whole = 10 * time.Millisecond }, nil},
		"stream": {func(l *Limits) { l.Grace = 10 * time.Millisecond }, Stream},
		"long":   {func(l *Limits) { l.Longest = 10 * time.Millisecond }, Stream},
		"idle":   {func(l *Limits) { l.Idle = 10 * time.Millisecond }, Idle},
	} {
		t.Run(name, func(t *testing.T) {
			l := long
			tt.limits(&l)
			_, in := open(t, serve(t, l, tt.say), 10, "x")
			if status, _ := answer(t, in); status != http.StatusRequestTimeout {
				t.Errorf("status %d", status)
			}
			// The server does not wait for the rest of it.
			if _, err := in.ReadByte(); err != io.EOF {
				t.Errorf("the connection is still open: %v", err)
			}
		})
	}
}

// TestUnread checks that the connection ends if a request is refused before its body is
// read.
func TestUnread(t *testing.T) {
	s := httptest.NewServer(Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }), Limits{Whole: 10 * time.Millisecond}))
	t.Cleanup(s.Close)
	_, in := open(t, s.Listener.Addr().String(), 10, "x")
	if status, _ := answer(t, in); status != 401 {
		t.Errorf("status %d", status)
	}
	if _, err := in.ReadByte(); err != io.EOF {
		t.Errorf("the connection is still open: %v", err)
	}
}

// TestSlow checks that a slow streamed body passes, and that the connection can be used
// afterwards.
func TestSlow(t *testing.T) {
	l := Limits{Whole: time.Second, Grace: never, Rate: 1, Longest: never, Idle: never}
	for name, say := range map[string]func(*http.Request){"stream": Stream, "idle": Idle, "trusted": Trust} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, err := inBubble(t, Handler(reads(say), l)).dial(t.Context(), "", "")
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				in := bufio.NewReader(c)
				for range 2 {
					fmt.Fprint(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
					for _, b := range []string{"a", "b", "c"} {
						time.Sleep(2 * l.Whole)
						if _, err := c.Write([]byte(b)); err != nil {
							t.Fatal(err)
						}
					}
					if status, said := answer(t, in); status != 200 || said != "3 bytes, <nil>" {
						t.Fatalf("%d %s", status, said)
					}
				}
			})
		})
	}
}

// TestLongAnswer checks that a handler may work on after its body ended.
func TestLongAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const whole = time.Second
		p := inBubble(t, Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			select {
			case <-r.Context().Done():
				w.WriteHeader(500)
			case <-time.After(2 * whole):
			}
		}), Limits{Whole: whole}))
		resp, err := p.client(t).Post("http://x", "text/plain", strings.NewReader("all"))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 {
			t.Errorf("status %d", resp.StatusCode)
		}
	})
}
