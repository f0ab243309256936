package upstream

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/http/httpguts"
)

// Server answers plain HTTP/1.1 requests: those without a body or an upgrade. For each
// request, [net/http.Server] starts and stops a goroutine that notices when the client
// leaves, which takes about as long as the rest of a hop. Server does so only for a
// request that takes longer than lookAfter. With the first request that is not plain,
// or that Takes refuses, a connection goes to net/http for good.
type Server struct {
	Handler http.Handler
	// Takes reports whether the server answers a plain request. If not, net/http does.
	Takes func(*http.Request) bool
	// Pass, if not nil, is called with a connection whose first request the server
	// takes, and the bytes read of it. If it returns true, another program serves it.
	Pass func(c net.Conn, read []byte) bool
	// PassToo has prefixes of first requests for which Pass is called although they are
	// not plain.
	PassToo []string
	// HeaderTimeout bounds the wait for a request's header, and IdleTimeout the wait
	// for a connection's next request.
	HeaderTimeout, IdleTimeout time.Duration
	// WriteIdle is how long a client may read nothing of its response (1 h).
	WriteIdle time.Duration
	ErrorLog  *log.Logger // nil: the standard logger
}

const (
	// maxPlain is the maximum size of a plain request's header.
	maxPlain = 4 << 10
	// lookAfter is how long a request runs before the server begins to look whether
	// its client leaves.
	lookAfter = 250 * time.Millisecond
	// freshWait is how long a connection may still send its first request after the
	// listener was closed.
	freshWait = time.Second
	// A connection may get 1/idleSlack less than the idle timeout, so that not every
	// request moves its deadline.
	idleSlack = 8
)

// Listener accepts the connections that a [Server] leaves to net/http.
type Listener struct {
	net.Listener
	server  *Server
	handed  chan accepted // what Accept returns next
	closing chan struct{}
	close   sync.Once
	// ended is closed when Accept returns no more connections, up to freshWait after
	// closing.
	ended                chan struct{}
	freshWait, writeIdle time.Duration

	mu        sync.Mutex
	conns     map[*served]struct{}
	accepting bool // accept may have a connection that is not in conns yet
	fresh     int  // number of fresh connections in conns, plus one while accepting
	closed    bool
	none      chan struct{} // closed when the listener is closed and no connection is left
}

// accepted is a result of Accept.
type accepted struct {
	net.Conn
	error
}

// Listen serves the connections of l until the listener that it returns is closed.
// Close closes l and the connections that wait for another request. Connections that wait
// for their first request get a second more. [Listener.Wait] waits for the others.
func (s *Server) Listen(l net.Listener) *Listener {
	ln := &Listener{
		writeIdle: cmp.Or(s.WriteIdle, time.Hour), // as the Caddyfile's write_idle
		Listener:  l, server: s, handed: make(chan accepted), closing: make(chan struct{}),
		ended: make(chan struct{}), freshWait: freshWait,
		conns: make(map[*served]struct{}), none: make(chan struct{}),
		accepting: true, fresh: 1,
	}
	go ln.accept()
	return ln
}

// accept accepts connections until the listener is closed.
func (l *Listener) accept() {
	defer l.acceptsNoMore()
	for {
		nc, err := l.Listener.Accept()
		if err != nil {
			if l.isClosing() || !l.hand(accepted{error: err}) || errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		raw := rawConn(nc)
		_, secure := nc.(interface{ ConnectionState() tls.ConnectionState })
		if secure || raw == nil {
			go l.hand(accepted{Conn: nc})
			continue
		}
		c := &served{Conn: nc, l: l, raw: raw}
		if !l.enter(c) {
			_ = nc.Close()
			continue
		}
		go c.serve()
	}
}

// hand gives net/http a connection or an error, unless it gets no more.
func (l *Listener) hand(a accepted) bool {
	select {
	case l.handed <- a:
		return true
	case <-l.ended:
		if a.Conn != nil {
			_ = a.Conn.Close()
		}
		return false
	}
}

// Accept implements [net.Listener].
func (l *Listener) Accept() (net.Conn, error) {
	for {
		select {
		case a := <-l.handed:
			if a.error == nil || !l.isClosing() {
				return a.Conn, a.error
			}
		case <-l.ended:
			return nil, net.ErrClosed
		}
	}
}

// Close implements [net.Listener]. Accept continues while connections wait for their first
// request, because net/http's server waits for Accept when it stops.
func (l *Listener) Close() error {
	err := net.ErrClosed
	l.close.Do(func() {
		close(l.closing)
		err = l.Listener.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.closed = true
		for c := range l.conns {
			if c.state.CompareAndSwap(idle, over) {
				_ = c.Conn.Close()
			}
		}
		if l.fresh == 0 {
			l.endLocked()
		} else {
			time.AfterFunc(l.freshWait, l.end)
		}
		l.emptyLocked()
	})
	return err
}

// Wait returns once the requests that the server answers have ended. Call it after
// Close. If ctx is done first, Wait closes their connections and returns ctx's error.
func (l *Listener) Wait(ctx context.Context) error {
	select {
	case <-l.none:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.conns) == 0 {
		return nil
	}
	for c := range l.conns {
		_ = c.Conn.Close()
		c.stop()
	}
	return ctx.Err()
}

func (l *Listener) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endLocked()
}

// endLocked ends Accept, and closes the connections that had no request.
func (l *Listener) endLocked() {
	select {
	case <-l.ended:
		return
	default:
	}
	close(l.ended)
	for c := range l.conns {
		if c.state.CompareAndSwap(fresh, over) {
			_ = c.Conn.Close()
		}
	}
}

// enter adds a connection, unless Accept has ended.
func (l *Listener) enter(c *served) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.ended:
		return false
	default:
	}
	l.conns[c] = struct{}{}
	l.fresh++
	return true
}

func (l *Listener) acceptsNoMore() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.accepting = false
	l.lessFreshLocked()
	l.emptyLocked()
}

func (l *Listener) lessFreshLocked() {
	if l.fresh--; l.closed && l.fresh == 0 {
		l.endLocked()
	}
}

// emptyLocked lets Wait return if no connection is left.
func (l *Listener) emptyLocked() {
	if l.closed && !l.accepting && len(l.conns) == 0 {
		close(l.none)
	}
}

// begin marks a connection as one with a request. It returns false if the
// listener closed the connection before.
func (l *Listener) begin(c *served) bool {
	if c.state.CompareAndSwap(idle, busy) {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.beginFirstLocked(c)
}

func (l *Listener) beginFirstLocked(c *served) bool {
	if !c.state.CompareAndSwap(fresh, busy) {
		return false
	}
	l.lessFreshLocked()
	return true
}

func (l *Listener) leave(c *served) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.beginFirstLocked(c) // if this is its first request
	delete(l.conns, c)
	l.emptyLocked()
}

func (l *Listener) isClosing() bool {
	select {
	case <-l.closing:
		return true
	default:
		return false
	}
}

// served is a client's connection, until net/http or another program gets it.
type served struct {
	net.Conn
	l   *Listener
	raw syscall.RawConn
	br  *bufio.Reader
	bw  *bufio.Writer // set while a request is in flight

	state     atomic.Int32
	until     time.Time // the deadline for reading; zero: none
	sendUntil time.Time // the deadline for writing; zero: unknown
	sendOwn   bool      // the handler has set the deadline for writing

	// looks calls look once a request has run for lookAfter. mu guards the fields below.
	looks   *time.Timer
	mu      sync.Mutex
	cancel  context.CancelFunc // cancels the request in flight; nil if there is none
	looking chan struct{}      // closed when look has returned; nil if look does not run
}

// States of a connection. Closing the listener closes those that are idle, and later
// those that are still fresh.
const (
	fresh = iota // waits for its first request
	idle         // waits for another request
	busy         // has a request in flight
	over         // closed by the listener
)

// plainMethods has the prefixes of requests that may be plain.
var plainMethods = []string{"GET /", "HEAD /", "DELETE /", "OPTIONS /"}

var longPast = time.Unix(1, 0)

// serve answers requests until the connection ends or goes to net/http.
func (c *served) serve() {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if p != http.ErrAbortHandler {
			c.logf("http: panic serving %v: %v\n%s", c.RemoteAddr(), p, debug.Stack())
		}
		_ = c.Conn.Close()
		c.l.leave(c)
	}()
	c.br = bufio.NewReaderSize(c.Conn, maxPlain)
	ctx := context.WithValue(context.Background(), http.LocalAddrContextKey, c.LocalAddr())
	remote := c.RemoteAddr().String()
	keep := true
	for first := true; keep; first = false {
		n, err := c.header(first)
		if err != nil {
			break
		}
		r := c.parse(n)
		if r == nil {
			if !first || !c.passesToo() || !c.pass() {
				c.handOver()
			}
			return
		}
		r.RemoteAddr = remote
		if !c.l.server.Takes(r) {
			c.handOver()
			return
		}
		if !c.l.begin(c) {
			break
		}
		if first && c.pass() {
			return
		}
		_, _ = c.br.Discard(n)
		keep = c.answer(ctx, r)
		c.state.Store(idle)
		keep = keep && !c.l.isClosing()
	}
	_ = c.Conn.Close()
	c.l.leave(c)
}

// handOver gives net/http the connection, with the bytes that were read of it.
func (c *served) handOver() {
	c.state.CompareAndSwap(idle, busy) // A fresh one stays fresh, so that Accept goes on until it returns this one.
	c.deadline(time.Time{})
	_ = c.Conn.SetWriteDeadline(time.Time{})
	c.l.hand(accepted{Conn: &replayed{c.Conn, c.br}})
	c.l.leave(c)
}

// passesToo reports whether a request that is not plain begins with a prefix in PassToo.
// If only a part of the prefix has arrived, it returns false.
func (c *served) passesToo() bool {
	b, _ := c.br.Peek(c.br.Buffered())
	return slices.ContainsFunc(c.l.server.PassToo, func(begin string) bool { return strings.HasPrefix(string(b[:min(len(b), len(begin))]), begin) })
}

// pass offers the connection to Pass, and reports whether another program has it now.
func (c *served) pass() bool {
	pass := c.l.server.Pass
	if pass == nil {
		return false
	}
	read, _ := c.br.Peek(c.br.Buffered())
	c.deadline(time.Time{})
	if !pass(c.Conn, read) {
		return false
	}
	c.l.leave(c)
	return true
}

// deadline sets the deadline for reading.
func (c *served) deadline(until time.Time) {
	c.until = until
	_ = c.Conn.SetReadDeadline(until)
}

// out writes to the client, within writeIdle.
type out struct{ *served }

// Write implements [io.Writer].
func (o out) Write(p []byte) (int, error) {
	now, wait := time.Now(), o.l.writeIdle
	if !o.sendOwn && o.sendUntil.Before(now.Add(wait-wait/idleSlack)) {
		o.sendUntil = now.Add(wait)
		_ = o.Conn.SetWriteDeadline(o.sendUntil)
	}
	return o.Conn.Write(p)
}

// header waits for the header of a request, and returns its length, or 0 if net/http must
// judge the request.
func (c *served) header(first bool) (int, error) {
	s := c.l.server
	wait := s.IdleTimeout
	if first {
		wait = s.HeaderTimeout
	}
	if c.br.Buffered() == 0 {
		if now := time.Now(); c.until.Before(now.Add(wait - wait/idleSlack)) {
			c.deadline(now.Add(wait))
		}
		if _, err := c.br.Peek(1); err != nil {
			return 0, err
		}
	}
	for began := false; ; began = true {
		b, _ := c.br.Peek(c.br.Buffered())
		if !plausible(b) {
			return 0, nil
		}
		if end := bytes.Index(b, []byte("\r\n\r\n")); end >= 0 {
			return end + 4, nil
		}
		// net/http accepts a line feed alone as the end of a line.
		if len(b) == maxPlain || bytes.Contains(b, []byte("\n\n")) || bytes.Contains(b, []byte("\n\r\n")) {
			return 0, nil
		}
		if !began {
			c.deadline(time.Now().Add(s.HeaderTimeout))
		}
		if _, err := c.br.Peek(len(b) + 1); err == io.EOF {
			return 0, nil // net/http reports the error.
		} else if err != nil {
			return 0, err
		}
	}
}

// plausible reports whether a plain request can begin with b.
func plausible(b []byte) bool {
	for _, m := range plainMethods {
		n := min(len(b), len(m))
		if string(b[:n]) == m[:n] {
			return true
		}
	}
	return false
}

// head has the readers for parsing one header.
type head struct {
	b  bytes.Reader
	br *bufio.Reader
}

var (
	heads   = sync.Pool{New: func() any { return &head{br: bufio.NewReaderSize(nil, maxPlain)} }}
	writers = sync.Pool{New: func() any { return bufio.NewWriter(nil) }}
)

// parse returns the plain request whose header the next n bytes are, or nil if net/http
// must judge the request. The bytes stay in the buffer.
func (c *served) parse(n int) *http.Request {
	if n == 0 {
		return nil
	}
	b, _ := c.br.Peek(n)
	h := heads.Get().(*head)
	defer heads.Put(h)
	h.b.Reset(b)
	h.br.Reset(&h.b)
	r, err := http.ReadRequest(h.br)
	if err != nil || h.br.Buffered()+h.b.Len() > 0 || r.Proto != "HTTP/1.1" || r.ContentLength != 0 || r.TransferEncoding != nil || r.Close {
		return nil
	}
	hosts := 0
	for line := range bytes.SplitSeq(b, []byte("\r\n")) {
		if name, _, ok := bytes.Cut(line, []byte(":")); ok && len(name) == 4 && bytes.EqualFold(name, []byte("host")) {
			hosts++
		}
	}
	if hosts != 1 || !httpguts.ValidHostHeader(r.Host) || r.Host == "" {
		return nil
	}
	for name, values := range r.Header {
		switch name {
		case "Connection":
			if len(values) != 1 || !strings.EqualFold(values[0], "keep-alive") {
				return nil
			}
		case "Content-Length", "Transfer-Encoding", "Trailer", "Upgrade", "Expect", "Http2-Settings":
			return nil
		}
		if !httpguts.ValidHeaderFieldName(name) || slices.ContainsFunc(values, func(v string) bool { return !httpguts.ValidHeaderFieldValue(v) }) {
			return nil
		}
	}
	return r
}

// answer calls the handler for a request, and reports whether the connection can have
// another request.
func (c *served) answer(ctx context.Context, r *http.Request) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := &reply{c: c, r: r, header: make(http.Header, 12), length: -1}
	c.bw = writers.Get().(*bufio.Writer)
	c.bw.Reset(out{c})
	c.sendOwn = false
	c.lookLater(cancel)
	defer func() {
		c.stopLooking()
		c.bw.Reset(nil)
		writers.Put(c.bw)
		c.bw = nil
	}()
	c.l.server.Handler.ServeHTTP(w, r.WithContext(ctx))
	return w.finish()
}

func (c *served) logf(format string, args ...any) {
	if l := c.l.server.ErrorLog; l != nil {
		l.Printf(format, args...)
		return
	}
	log.Printf(format, args...)
}

// lookLater arranges that cancel is called if the client leaves before stopLooking is called.
func (c *served) lookLater(cancel context.CancelFunc) {
	c.mu.Lock()
	c.cancel = cancel
	c.mu.Unlock()
	if c.looks == nil {
		c.looks = time.AfterFunc(lookAfter, c.look)
		return
	}
	c.looks.Reset(lookAfter)
}

// stopLooking undoes lookLater, and waits until look returns.
func (c *served) stopLooking() {
	c.looks.Stop()
	c.mu.Lock()
	c.cancel = nil
	looking := c.looking
	c.mu.Unlock()
	if looking == nil {
		return
	}
	c.deadline(longPast) // ends the look
	<-looking
	c.deadline(time.Time{})
	c.mu.Lock()
	c.looking = nil
	c.mu.Unlock()
}

// stop cancels the request in flight.
func (c *served) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cancel != nil {
		c.cancel()
	}
}

// look waits until the client leaves, which cancels the request, or sends something.
func (c *served) look() {
	c.mu.Lock()
	cancel := c.cancel
	if cancel == nil || c.looking != nil {
		c.mu.Unlock()
		return
	}
	ended := make(chan struct{})
	defer close(ended)
	c.looking = ended
	_ = c.Conn.SetReadDeadline(time.Time{}) // before stopLooking sets its own
	c.mu.Unlock()
	gone := true
	err := c.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		if err == syscall.EAGAIN || err == syscall.EINTR {
			return false
		}
		gone = err != nil || n == 0
		return true
	})
	if err == nil && gone {
		cancel()
	}
}

// replayed is a connection whose first bytes were already read. It returns them again.
type replayed struct {
	net.Conn
	br *bufio.Reader
}

// Read implements [net.Conn].
func (r *replayed) Read(p []byte) (int, error) {
	if r.br != nil {
		if r.br.Buffered() > 0 {
			return r.br.Read(p)
		}
		r.br = nil
	}
	return r.Conn.Read(p)
}

// CloseWrite lets net/http complete a response before it closes the connection.
func (r *replayed) CloseWrite() error {
	if c, ok := r.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errors.ErrUnsupported
}

// NetConn returns the underlying connection.
func (r *replayed) NetConn() net.Conn { return r.Conn }
