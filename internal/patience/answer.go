package patience

import (
	"bufio"
	"errors"
	"net"
	"net/http"
	"time"
)

// Answers returns next with a deadline for each write of a response: l.Unread, or l.Idle
// after the connection changed its protocol. A client that has not read by then loses the
// connection. A handler may set an earlier deadline.
func Answers(next http.Handler, l Limits) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := &response{ResponseWriter: w, control: http.NewResponseController(w), limits: l, http2: r.ProtoMajor >= 2}
		// The server itself also writes, before and after the handler.
		a.arm()
		defer func() {
			if !a.hijacked {
				a.until = time.Time{}
				a.arm()
			}
		}()
		if a.http2 {
			a.disarm()
		}
		next.ServeHTTP(a, r)
	})
}

// response sets a deadline for each write of a response.
type response struct {
	http.ResponseWriter
	control  *http.ResponseController
	limits   Limits
	http2    bool
	hijacked bool
	until    time.Time // the handler's own deadline; zero: none
	set      time.Time // the deadline that is set; zero: none
}

// arm sets the deadline of the next write, unless the present one is close enough.
func (a *response) arm() {
	to := time.Now().Add(a.limits.Unread)
	if !a.until.IsZero() && a.until.Before(to) {
		to = a.until
	}
	if !a.set.IsZero() && to.Sub(a.set).Abs() < a.limits.Unread/resolution && a.until.IsZero() {
		return
	}
	a.set = to
	// A writer without deadlines, such as a test's recorder, never blocks.
	_ = a.control.SetWriteDeadline(to)
}

// disarm removes the deadline, because HTTP/2 resets a stream at its deadline even if
// nobody writes.
func (a *response) disarm() {
	a.set = time.Time{}
	_ = a.control.SetWriteDeadline(time.Time{})
}

// Write implements [http.ResponseWriter].
func (a *response) Write(p []byte) (int, error) {
	a.arm()
	n, err := a.ResponseWriter.Write(p)
	if a.http2 {
		a.disarm()
	}
	return n, err
}

// Flush implements [http.Flusher].
func (a *response) Flush() { _ = a.FlushError() }

// FlushError implements the method that [http.ResponseController] calls.
func (a *response) FlushError() error {
	a.arm()
	err := a.control.Flush()
	if a.http2 {
		a.disarm()
	}
	return err
}

// SetWriteDeadline implements the method that [http.ResponseController] calls. A zero
// time restores the default deadlines.
func (a *response) SetWriteDeadline(t time.Time) error {
	a.until, a.set = t, time.Time{}
	a.arm()
	if a.http2 && t.IsZero() {
		a.disarm()
	}
	return nil
}

// Hijack implements [http.Hijacker].
func (a *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := a.control.Hijack()
	if err != nil {
		return nil, nil, err
	}
	a.hijacked = true
	bounded := &conn{Conn: c, idle: a.limits.Idle}
	return bounded, bufio.NewReadWriter(rw.Reader, bufio.NewWriter(bounded)), nil
}

// Unwrap lets [http.ResponseController] reach the other methods.
func (a *response) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// conn is a hijacked connection. It sets its own deadline for every write.
type conn struct {
	net.Conn
	idle time.Duration
}

// Write implements [net.Conn].
func (c *conn) Write(p []byte) (int, error) {
	if err := c.Conn.SetWriteDeadline(time.Now().Add(c.idle)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// CloseWrite closes the sending direction, if the connection supports that. A proxy needs
// it when one side has finished and the other has not.
func (c *conn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}
