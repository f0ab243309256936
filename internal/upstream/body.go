package upstream

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"
)

// continueWait is how long a body with "Expect: 100-continue" waits for a response
// 100. After that it is sent without one.
const continueWait = time.Second

// body is a request's body, which several attempts may send.
type body struct {
	src    io.ReadCloser // nil: no body
	again  func() (io.ReadCloser, error)
	expect bool // the request expects a response 100
	last   *sending
}

func newBody(req *http.Request) *body {
	if req.Body == nil || req.Body == http.NoBody {
		return &body{}
	}
	return &body{src: req.Body, again: req.GetBody, expect: strings.EqualFold(req.Header.Get("Expect"), "100-continue")}
}

// replayable reports whether the body can be sent any number of times.
func (b *body) replayable() bool { return b.src == nil || b.again != nil }

// rewind ends an attempt, and reports whether another one is possible.
func (b *body) rewind() bool { return b.last.end() || b.replayable() }

// stop ends the last attempt.
func (b *body) stop() {
	b.last.end()
	if b.src != nil {
		_ = b.src.Close()
	}
}

// begin begins an attempt over c; it returns nil if there is no body.
func (b *body) begin(c *conn) (*sending, error) {
	if b.src == nil {
		return nil, nil
	}
	s := &sending{conn: c, src: b.src, done: make(chan struct{}), proceeds: make(chan struct{})}
	if b.again != nil {
		var err error
		if s.src, err = b.again(); err != nil {
			return nil, err
		}
		// net/http recognizes a body in memory by its type, and writes it with the header.
		s.own = !b.expect
	}
	if !b.expect {
		s.proceed()
	}
	b.last = s
	return s, nil
}

// sending is one attempt to send a request with a body. It is nil for a request without
// one.
type sending struct {
	conn *conn
	src  io.ReadCloser
	own  bool          // no other attempt uses src
	done chan struct{} // closed when writing the request has ended or failed

	mu       sync.Mutex
	proceeds chan struct{} // closed when the body may be sent
	going    bool
	over     bool  // the body must not be read any more
	read     bool  // some of the body was read
	ended    bool  // the body was read to its end
	cause    error // why reading the body failed
	err      error // why writing failed; set before done is closed
}

func (s *sending) reader() io.ReadCloser {
	if s.own {
		return s.src
	}
	return (*source)(s)
}

// proceed lets the body be sent.
func (s *sending) proceed() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.going {
		s.going = true
		close(s.proceeds)
	}
}

func (s *sending) finish(err error) {
	s.mu.Lock()
	s.err = err
	lost := s.cause != nil
	s.mu.Unlock()
	close(s.done)
	if lost {
		s.conn.close() // The upstream waits for the rest.
	}
}

// failed returns why reading the body failed, or nil.
func (s *sending) failed() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cause
}

// end stops reading the body, and reports whether none of it was read.
func (s *sending) end() (untouched bool) {
	if s == nil {
		return true
	}
	s.mu.Lock()
	s.over = true
	untouched = !s.read
	s.mu.Unlock()
	s.proceed()
	return untouched
}

// sent reports whether the whole request was sent.
func (s *sending) sent() bool {
	if s == nil {
		return true
	}
	s.mu.Lock()
	soon := s.own || s.ended
	s.mu.Unlock()
	if soon {
		timer := time.NewTimer(sendWait)
		defer timer.Stop()
		select {
		case <-s.done:
		case <-timer.C:
			return false
		}
	}
	select {
	case <-s.done:
		return s.err == nil
	default:
		return false
	}
}

// awaitHeader waits until it is known whether the header was written. The connection must be
// closed.
func (s *sending) awaitHeader() {
	if s == nil {
		return
	}
	s.mu.Lock()
	read := s.read
	s.mu.Unlock()
	if read {
		return // The header comes before the body.
	}
	timer := time.NewTimer(sendWait)
	defer timer.Stop()
	select {
	case <-s.done:
	case <-timer.C:
	}
}

// source reads the body of a sending.
type source sending

var errOver = errors.New("the exchange is over")

// Read is called by the goroutine that writes the request.
func (r *source) Read(p []byte) (int, error) {
	if err := r.conn.bw.Flush(); err != nil {
		return 0, err
	}
	select {
	case <-r.proceeds:
	default:
		timer := time.NewTimer(continueWait)
		select {
		case <-r.proceeds:
		case <-timer.C:
			(*sending)(r).proceed()
		}
		timer.Stop()
	}
	r.mu.Lock()
	if r.over {
		r.mu.Unlock()
		return 0, errOver
	}
	r.read = true
	r.mu.Unlock()
	n, err := r.src.Read(p)
	if err != nil {
		r.mu.Lock()
		if r.ended = err == io.EOF; !r.ended && !r.over {
			r.cause = err
		}
		r.mu.Unlock()
	}
	return n, err
}

// Close does nothing: the sender of the request closes its body.
func (r *source) Close() error { return nil }
