package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// maxInterim is the maximum number of interim responses (1xx) before a final one.
	maxInterim = 16
	// maxInline is the maximum size of a body in memory that is sent without a
	// goroutine, in bytes.
	maxInline = 4 << 10
	// sendWait is how long a connection whose response is complete waits for the end of
	// its request to be written. After that it is closed.
	sendWait = 50 * time.Millisecond
)

// noResponse is the error of an exchange that ended before the first byte of a response.
type noResponse struct{ cause error }

func (e *noResponse) Error() string   { return ErrNoResponse.Error() + ": " + e.cause.Error() }
func (e *noResponse) Unwrap() []error { return []error{ErrNoResponse, e.cause} }

// conn is a connection to an upstream. One request uses it at a time.
type conn struct {
	t    *Transport
	addr string
	net.Conn
	raw syscall.RawConn // the socket; nil if unknown
	br  *bufio.Reader
	bw  *bufio.Writer

	kept bool      // was used before
	used time.Time // when the last request gave it back
	// state changes from unsent to sent when a request's first byte is written (the
	// goroutine of its body may do that), or to dead.
	state atomic.Int32
	// room is the number of bytes that a response's header may still have; if it is
	// negative, there is no limit.
	room int64
}

func newConn(t *Transport, addr string, nc net.Conn) *conn {
	c := &conn{t: t, addr: addr, Conn: nc, raw: rawConn(nc), room: -1}
	c.br, c.bw = bufio.NewReader(reader{c}), bufio.NewWriter(writer{c})
	return c
}

// rawConn returns the socket of a connection, which may be wrapped, or nil.
func rawConn(nc net.Conn) syscall.RawConn {
	for {
		switch v := nc.(type) {
		case syscall.Conn:
			raw, err := v.SyscallConn()
			if err != nil {
				return nil
			}
			return raw
		case interface{ NetConn() net.Conn }:
			nc = v.NetConn()
		default:
			return nil
		}
	}
}

// alive reports whether the upstream has neither closed an unused connection nor sent
// data without a request.
func (c *conn) alive() bool {
	if c.raw == nil {
		return true
	}
	waits := false
	err := c.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		waits = err == syscall.EAGAIN
		return true
	})
	return err == nil && waits
}

func (c *conn) close() { _ = c.Conn.Close() }

// reader limits the size of a response's header.
type reader struct{ *conn }

var errHeader = errors.New("the header of the response is too long")

func (r reader) Read(p []byte) (int, error) {
	if r.room < 0 {
		return r.Conn.Read(p)
	}
	if r.room == 0 {
		return 0, errHeader
	}
	n, err := r.Conn.Read(p[:min(int64(len(p)), r.room)])
	r.room -= int64(n)
	return n, err
}

type writer struct{ *conn }

func (w writer) Write(p []byte) (int, error) {
	first := w.state.CompareAndSwap(unsent, sent)
	if w.state.Load() == dead {
		return 0, net.ErrClosed
	}
	n, err := w.Conn.Write(p)
	if first && n == 0 {
		w.state.Store(unsent)
	}
	return n, err
}

// States of a connection's request.
const (
	unsent = iota
	sent
	dead // nothing may be sent any more
)

// kill closes the connection and reports whether nothing of the request was sent.
func (c *conn) kill(s *sending) bool {
	c.close()
	s.awaitHeader()
	return c.state.CompareAndSwap(unsent, dead)
}

// exchange sends a request and returns the response, whose body gives the connection
// back. If it fails, the caller must close the connection.
func (c *conn) exchange(req *http.Request, b *body) (*http.Response, error) {
	ctx := req.Context()
	s, err := b.begin(c)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, c.close)
	var lost error // why a request without a body was not sent
	if s == nil {
		lost = c.send(req)
	} else {
		out := *req
		out.Body = s.reader()
		if out.ContentLength < 0 {
			out.TransferEncoding = []string{"chunked"} // Otherwise net/http reads some bodies first.
		}
		if s.own && out.ContentLength > 0 && out.ContentLength <= maxInline {
			s.finish(c.send(&out)) // The socket's buffer is empty, so this does not block.
		} else {
			go func() { s.finish(c.send(&out)) }()
		}
	}
	// A server may respond without reading the request, so read the response first.
	resp, err := c.receive(req, s)
	if err != nil {
		stop()
		if e := s.failed(); e != nil {
			err = bodyError{e}
		} else if lost != nil {
			err = &noResponse{lost}
		}
		return nil, err
	}
	r := &response{conn: c, stop: stop, s: s, src: resp.Body}
	r.keep = lost == nil && !resp.Close && !req.Close
	switch {
	case resp.StatusCode == http.StatusSwitchingProtocols:
		resp.Body = &upgraded{r}
	case resp.Body == http.NoBody:
		r.end(true)
	default:
		resp.Body = r
	}
	return resp, nil
}

func (c *conn) send(req *http.Request) error {
	err := req.Write(sink{c.bw})
	if err == nil {
		err = c.bw.Flush()
	}
	if err != nil {
		c.bw.Reset(writer{c}) // A bufio.Writer keeps its error until then.
	}
	return err
}

// sink is the writer for a request. It is not an [io.ReaderFrom], so that a body can
// flush the buffer before it waits for more data.
type sink struct{ w *bufio.Writer }

func (s sink) Write(p []byte) (int, error)          { return s.w.Write(p) }
func (s sink) WriteByte(b byte) error               { return s.w.WriteByte(b) }
func (s sink) WriteString(text string) (int, error) { return s.w.WriteString(text) }

var errInterim = errors.New("read response: too many interim responses")

// receive reads a response's header.
func (c *conn) receive(req *http.Request, s *sending) (*http.Response, error) {
	c.room = c.t.MaxHeaderBytes
	first, err := c.br.Peek(1)
	if err != nil {
		return nil, &noResponse{err}
	}
	if first[0] == 0 && c.isHTTP2() {
		return nil, ErrHTTP2
	}
	for range maxInterim {
		resp, err := http.ReadResponse(c.br, req)
		if err != nil {
			return nil, fmt.Errorf("read response: %w", err)
		}
		if resp.StatusCode < 100 {
			return nil, errStatus(resp.StatusCode)
		}
		if resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			c.room = -1
			return resp, nil
		}
		if resp.StatusCode == http.StatusContinue {
			s.proceed()
		}
		if trace := httptrace.ContextClientTrace(req.Context()); trace != nil && trace.Got1xxResponse != nil {
			if err := trace.Got1xxResponse(resp.StatusCode, textproto.MIMEHeader(resp.Header)); err != nil {
				return nil, err
			}
		}
	}
	return nil, errInterim
}

// isHTTP2 reports whether the upstream's data begins with the SETTINGS frame that every
// HTTP/2 server sends first.
func (c *conn) isHTTP2() bool {
	const header, settings = 9, 4
	h, err := c.br.Peek(header)
	return err == nil && h[0] == 0 && h[1] == 0 && h[2]%6 == 0 && h[3] == settings
}

// response is the body of a response. Once it has been read to its end, the
// transport may use the connection for another request.
type response struct {
	conn *conn
	stop func() bool
	s    *sending
	src  io.Reader
	keep bool
	err  error // set once the body has ended
}

func (r *response) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	n, err := r.src.Read(p)
	if err != nil {
		r.err = err
		r.end(err == io.EOF)
	}
	return n, err
}

// Close implements [io.Closer]. Before the end it closes the connection.
func (r *response) Close() error {
	if r.err == nil {
		r.err = http.ErrBodyReadAfterClose
		r.end(false)
	}
	return nil
}

func (r *response) end(whole bool) {
	// stop returns false if the context ended, which has closed the connection.
	if r.stop() && whole && r.keep && r.s.sent() && r.conn.br.Buffered() == 0 {
		r.conn.t.put(r.conn)
		return
	}
	r.s.end()
	r.conn.close()
}

// upgraded is the connection after a response 101.
type upgraded struct{ *response }

func (u *upgraded) Read(p []byte) (int, error)  { return u.conn.br.Read(p) }
func (u *upgraded) Write(p []byte) (int, error) { return u.conn.Write(p) }

// Close implements [io.Closer]. It may be called while others read and write.
func (u *upgraded) Close() error {
	u.stop()
	return u.conn.Close()
}

// CloseWrite ends one direction, if the connection can.
func (u *upgraded) CloseWrite() error {
	if c, ok := u.conn.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}
