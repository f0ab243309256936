package budget

import (
	"bufio"
	"errors"
	"maps"
	"net"
	"net/http"
	"sync"

	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// Unread is what a response can hold of the memory while its client does not read it: what
// the connection to an agent lets the agent send, and the buffer that is copied with.
const Unread = netaddr.Window + 32<<10

// Stream is a response of any length. Each write takes [Unread] of the budget for as long as
// it lasts, which with a client that does not read is long. The first [Free] bytes take
// nothing. One goroutine uses it at a time, but for Flush.
type Stream struct {
	http.ResponseWriter
	budget *Budget
	owner  string
	refuse func(error)

	mu      sync.Mutex
	header  http.Header // as it was at first
	status  int         // not sent yet; 0: none
	begun   bool
	written int
	refused error
	broken  bool
}

// Stream returns w as the response to h's request. If a write finds no room, refuse answers
// the request with a fault.RateLimited, unless the response has begun: then it breaks off.
// Whoever calls Stream calls [Stream.Finish] when the handler has returned.
func (h *Held) Stream(w http.ResponseWriter, refuse func(error)) *Stream {
	return &Stream{ResponseWriter: w, budget: h.budget, owner: h.owner, refuse: refuse, header: maps.Clone(w.Header())}
}

// Refused says whether refuse answered the request.
func (s *Stream) Refused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused != nil && !s.broken
}

// Finish sends the status of a response without a body. It panics with
// [http.ErrAbortHandler] if the response broke off, so that no client takes a part of it
// for the whole.
func (s *Stream) Finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken {
		panic(http.ErrAbortHandler)
	}
	s.begin()
}

// begin sends the status that the handler chose. s.mu is held.
func (s *Stream) begin() {
	if s.begun || s.refused != nil {
		return
	}
	if s.status != 0 {
		s.begun = true
		s.ResponseWriter.WriteHeader(s.status)
	}
}

// WriteHeader implements [http.ResponseWriter]. It keeps the status until the first byte.
func (s *Stream) WriteHeader(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.refused != nil || s.begun:
	case status < 200:
		s.begun = status == http.StatusSwitchingProtocols
		s.ResponseWriter.WriteHeader(status)
	case s.status == 0:
		s.status = status
	}
}

// take takes room for a write of n bytes, if it needs any.
func (s *Stream) take(n int) (give func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refused != nil {
		return nil, s.refused
	}
	if s.written += n; s.written <= Free {
		s.start()
		return func() {}, nil
	}
	if err := s.budget.Hold(s.owner).Grow(Unread); err != nil {
		s.refused = err
		if s.broken = s.begun; s.broken {
			return nil, err
		}
		h := s.Header()
		clear(h)
		maps.Copy(h, s.header)
		s.refuse(err)
		return nil, err
	}
	s.start()
	return func() { s.budget.give(s.owner, Unread) }, nil
}

// start is begin for a response with a body. s.mu is held.
func (s *Stream) start() {
	if s.status == 0 {
		s.status = http.StatusOK
	}
	s.begin()
}

// Write implements [http.ResponseWriter].
func (s *Stream) Write(p []byte) (int, error) {
	give, err := s.take(len(p))
	if err != nil {
		return 0, err
	}
	defer give()
	return s.ResponseWriter.Write(p)
}

// Flush implements [http.Flusher].
func (s *Stream) Flush() { _ = s.FlushError() }

// FlushError serves [http.ResponseController].
func (s *Stream) FlushError() error {
	give, err := s.take(0)
	if err != nil {
		return err
	}
	defer give()
	return http.NewResponseController(s.ResponseWriter).Flush()
}

// Hijack implements [http.Hijacker]. Writes to the connection take room, too; it is closed
// if there is none.
func (s *Stream) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(s.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	s.begun, s.status = true, 0
	s.mu.Unlock()
	bounded := &conn{Conn: c, budget: s.budget, owner: s.owner, left: Free}
	return bounded, bufio.NewReadWriter(rw.Reader, bufio.NewWriter(bounded)), nil
}

// Unwrap lets [http.ResponseController] reach the rest.
func (s *Stream) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// conn is a connection that a [Stream] was. One goroutine writes at a time.
type conn struct {
	net.Conn
	budget *Budget
	owner  string
	left   int // of the bytes that take nothing
}

// Write implements [net.Conn].
func (c *conn) Write(p []byte) (int, error) {
	if c.left -= len(p); c.left < 0 {
		c.left = 0
		if err := c.budget.Hold(c.owner).Grow(Unread); err != nil {
			return 0, errors.Join(err, c.Conn.Close())
		}
		defer c.budget.give(c.owner, Unread)
	}
	return c.Conn.Write(p)
}

// CloseWrite ends one direction, if the connection can.
func (c *conn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}
