package budget

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// streamed serves h with a budget for two responses of one owner that nobody reads.
func streamed(t *testing.T, h http.HandlerFunc) (*Budget, *httptest.Server) {
	t.Helper()
	b := New(2 * Share * Unread)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := b.Reserve("a").Stream(w, func(err error) {
			if !fault.Is(err, fault.RateLimited) {
				t.Error(err)
			}
			http.Error(w, "later", http.StatusTooManyRequests)
		})
		h(answer, r)
		answer.Finish()
	}))
	t.Cleanup(s.Close)
	return b, s
}

// gated is a response whose client reads nothing until the gate is closed.
type gated struct {
	*httptest.ResponseRecorder
	gate chan struct{}
}

func (g gated) Write(p []byte) (int, error) {
	<-g.gate
	return g.ResponseRecorder.Write(p)
}

// TestUnreadTakesMemory checks that responses that nobody reads take their owner's memory, and
// that further ones are refused until memory is free again. Short responses are served.
func TestUnreadTakesMemory(t *testing.T) {
	b := New(2 * Share * Unread)
	answer := func(gate chan struct{}, n int) *httptest.ResponseRecorder {
		w := gated{httptest.NewRecorder(), gate}
		s := b.Reserve("a").Stream(w, func(err error) {
			if !fault.Is(err, fault.RateLimited) {
				t.Error(err)
			}
			w.WriteHeader(http.StatusTooManyRequests)
		})
		s.Header().Set("X-Of", "the handler")
		s.WriteHeader(http.StatusAccepted)
		if _, err := s.Write(make([]byte, n)); (err != nil) != s.Refused() {
			t.Errorf("a write: %v", err)
		}
		s.Finish()
		return w.ResponseRecorder
	}
	shut, open := make(chan struct{}), make(chan struct{})
	close(open)
	var unread sync.WaitGroup
	for range 2 {
		unread.Go(func() { answer(shut, Free+1) })
	}
	await.Until(t, "both take their room", func() bool { return b.Used() == 2*Unread })
	if w := answer(open, Free+1); w.Code != http.StatusTooManyRequests || w.Header().Get("X-Of") != "" || w.Body.Len() > 0 {
		t.Errorf("without room: %d, %v with %d bytes", w.Code, w.Header(), w.Body.Len())
	}
	if w := answer(open, Free); w.Code != http.StatusAccepted || w.Body.Len() != Free || w.Header().Get("X-Of") == "" {
		t.Errorf("a short response: %d with %d bytes", w.Code, w.Body.Len())
	}
	close(shut)
	unread.Wait()
	if w := answer(open, Free+1); w.Code != http.StatusAccepted || w.Body.Len() != Free+1 || b.Used() != 0 {
		t.Errorf("with room: %d with %d bytes, %d are used", w.Code, w.Body.Len(), b.Used())
	}
}

// TestUnreadBreaksOff checks that a response that has begun is aborted if there is no memory,
// so that no client mistakes its part for the whole. So is a connection that changed its
// protocol.
func TestUnreadBreaksOff(t *testing.T) {
	full := make(chan struct{})
	b, s := streamed(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hijack" {
			c, rw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\n\r\nbegun")
			_ = rw.Flush()
			<-full
			if _, err := c.Write(make([]byte, 2*Free)); !fault.Is(err, fault.RateLimited) {
				t.Errorf("a write without room: %v", err)
			}
			return
		}
		fmt.Fprint(w, "begun")
		_ = http.NewResponseController(w).Flush()
		<-full
		if _, err := w.Write(make([]byte, 2*Free)); !fault.Is(err, fault.RateLimited) {
			t.Errorf("a write without room: %v", err)
		}
		_, _ = w.Write([]byte("more"))
	})
	taken := b.Reserve("a")
	defer taken.Release()
	resp, err := http.Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := taken.Grow(2 * Unread); err != nil {
		t.Fatal(err)
	}
	full <- struct{}{}
	if body, err := io.ReadAll(resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) || string(body) != "begun" {
		t.Errorf("%q, %v", body, err)
	}
	c, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET /hijack HTTP/1.1\r\nHost: x\r\n\r\n")
	full <- struct{}{}
	all, err := io.ReadAll(bufio.NewReader(c))
	if err != nil || !strings.HasSuffix(string(all), "begun") {
		t.Errorf("%q, %v", all, err)
	}
}
