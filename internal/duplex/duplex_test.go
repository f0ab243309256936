package duplex

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/linger"
	"github.com/wrenn-dev/wrenn/internal/linger/lingertest"
)

// serve serves h in full duplex and fails the test if the server logs anything.
func serve(t *testing.T, h func(http.ResponseWriter, *http.Request)) *httptest.Server {
	t.Helper()
	var log bytes.Buffer
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { Serve(w, r, h) }))
	s.Config.ErrorLog = slog.NewLogLogger(slog.NewTextHandler(&log, nil), slog.LevelError)
	s.Listener = linger.Listener(s.Listener)
	s.Start()
	t.Cleanup(func() {
		s.Close() // Now nothing writes to the log.
		if log.Len() > 0 {
			t.Errorf("the server logged: %.500s", log.String())
		}
	})
	return s
}

// TestBodyLeftUnread sends many requests over one connection to a handler that does not
// read their bodies.
func TestBodyLeftUnread(t *testing.T) {
	s := serve(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusBadGateway) })
	for n := range 200 {
		req, err := http.NewRequest(http.MethodPost, s.URL, io.NopCloser(strings.NewReader("hello")))
		if err != nil {
			t.Fatal(err)
		}
		if req.ContentLength = 5; n%2 == 0 {
			req.ContentLength = -1
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "no\n" {
			t.Errorf("%q, %v", b, err)
		}
		resp.Body.Close()
	}
}

// half sends a request with the first of its body's five bytes.
func half(t *testing.T, s *httptest.Server) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nh")
	return conn
}

// TestResponseDoesNotWaitForBody has clients that send the rest of their body only after
// they have the whole response, or disconnect instead.
func TestResponseDoesNotWaitForBody(t *testing.T) {
	no := func(w http.ResponseWriter) { http.Error(w, "no", http.StatusBadGateway) }
	for name, h := range map[string]func(http.ResponseWriter, *http.Request){
		"unread": func(w http.ResponseWriter, _ *http.Request) { no(w) },
		"closed": func(w http.ResponseWriter, r *http.Request) { r.Body.Close(); no(w) },
		// Like a transport whose server went away.
		"closed while it is read": func(w http.ResponseWriter, r *http.Request) {
			first := make(chan struct{})
			go func() {
				_, _ = r.Body.Read(make([]byte, 1))
				close(first)
				_, _ = r.Body.Read(make([]byte, 1))
			}()
			<-first
			r.Body.Close()
			no(w)
		},
	} {
		t.Run(name, func(t *testing.T) { responseDoesNotWait(t, h) })
	}
}

func responseDoesNotWait(t *testing.T, h func(http.ResponseWriter, *http.Request)) {
	s := serve(t, h)
	for _, rest := range []string{"ello", ""} {
		conn := half(t, s)
		r := bufio.NewReader(conn)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil || string(b) != "no\n" || !resp.Close {
			t.Errorf("got %q, %v; the connection will close: %t", b, err, resp.Close)
		}
		if rest == "" {
			conn.Close() // The server, which waits for all handlers, can close.
			continue
		}
		fmt.Fprint(conn, rest)
		if more, err := io.ReadAll(r); err != nil || len(more) > 0 {
			t.Errorf("after the response: %q, %v", more, err)
		}
	}
}

// TestClientThatDoesNotGo checks that the server drops a client that neither sends the
// rest of its body nor disconnects, whether or not a handler still reads the body.
func TestClientThatDoesNotGo(t *testing.T) {
	for name, reads := range map[string]bool{"unread": false, "while it is read": true} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if reads {
					first, over := make(chan struct{}), make(chan struct{})
					t.Cleanup(func() { <-over })
					go func() {
						defer close(over)
						_, _ = r.Body.Read(make([]byte, 1))
						close(first)
						if _, err := r.Body.Read(make([]byte, 1)); err == nil {
							t.Error("a second byte came")
						}
					}()
					<-first
				}
				http.Error(w, "no", http.StatusBadGateway)
			})
			conn := half(t, s)
			if all, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(all), "\r\n\r\nno\n") {
				t.Errorf("got %q, %v", all, err)
			}
		})
	}
}

// TestRefusalArrives responds early to clients that send large bodies.
func TestRefusalArrives(t *testing.T) {
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		go func() { _, _ = io.Copy(io.Discard, io.LimitReader(r.Body, 100<<10)) }() // Like a proxy.
		http.Error(w, "no", http.StatusBadGateway)
	})
	dial := func() (net.Conn, error) { return net.Dial("tcp", s.Listener.Addr().String()) }
	lingertest.Refused(t, dial, lingertest.Refusal{Status: http.StatusBadGateway, Contains: "no"}, 70)
}

// TestBreakDoesNotWaitForBody aborts a response while the client waits for more of it:
// the connection ends at once.
func TestBreakDoesNotWaitForBody(t *testing.T) {
	s := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "a part")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	resp, err := http.ReadResponse(bufio.NewReader(half(t, s)), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); string(b) != "a part" || !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %q, %v", b, err)
	}
}
