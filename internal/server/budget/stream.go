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

// Unread is the memory that a response takes while its client does not read it, in bytes:
// the window of the connection to the agent, and the copy buffer.
const Unread = netaddr.Window + 32<<10

// Stream is a response of any length. Each write takes [Unread] from the owner's budget
// until it returns, which takes long if the client does not read. The first [Free] bytes
// take nothing. Only Flush may be called concurrently.
type Stream struct {
	http.ResponseWriter
	budget *Budget
	owner  string
	refuse func(error)

	mu      sync.Mutex
	header  http.Header // before the handler changed it
	status  int         // the handler's, sent with the first byte; 0: none
	begun   bool
	written int
	refused error
	broken  bool
}

// Stream wraps w, the response to h's request. If a write exceeds the budget, Stream calls
// refuse to send a fault.RateLimited; if the response has begun, it aborts it instead. The
// caller calls [Stream.Finish] when the handler has returned.
func (h *Reservation) Stream(w http.ResponseWriter, refuse func(error)) *Stream {
	return &Stream{ResponseWriter: w, budget: h.budget, owner: h.owner, refuse: refuse, header: maps.Clone(w.Header())}
}

// Refused reports whether refuse was called.
func (s *Stream) Refused() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused != nil && !s.broken
}

// Finish sends the status of a response without a body. It panics with
// [http.ErrAbortHandler] if the response was aborted, so that no client takes a part of
// it for the whole.
func (s *Stream) Finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken {
		panic(http.ErrAbortHandler)
	}
	s.begin()
}

// begin sends the handler's status, if there is one. The caller holds s.mu.
func (s *Stream) begin() {
	if s.begun || s.refused != nil {
		return
	}
	if s.status != 0 {
		s.begun = true
		s.ResponseWriter.WriteHeader(s.status)
	}
}

// WriteHeader implements [http.ResponseWriter]. The status is sent with the first byte,
// so that a write without room can still be refused.
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

// take reserves memory for a write of n bytes, unless it is within [Free].
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
	if err := s.budget.Reserve(s.owner).Grow(Unread); err != nil {
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

// start calls begin, with the status 200 if the handler set none. The caller holds s.mu.
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

// Hijack implements [http.Hijacker]. Writes to the connection take from the budget too; a
// write that exceeds it closes the connection.
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

// Unwrap lets [http.ResponseController] use the other methods of the wrapped writer.
func (s *Stream) Unwrap() http.ResponseWriter { return s.ResponseWriter }

// conn is a hijacked [Stream]. It must not be written to concurrently.
type conn struct {
	net.Conn
	budget *Budget
	owner  string
	left   int // bytes that still take nothing
}

// Write implements [net.Conn].
func (c *conn) Write(p []byte) (int, error) {
	if c.left -= len(p); c.left < 0 {
		c.left = 0
		if err := c.budget.Reserve(c.owner).Grow(Unread); err != nil {
			return 0, errors.Join(err, c.Conn.Close())
		}
		defer c.budget.give(c.owner, Unread)
	}
	return c.Conn.Write(p)
}

// CloseWrite closes the connection for writing, if it supports that.
func (c *conn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}
