// Package upstream receives a proxy's requests and forwards them over HTTP/1.1.
//
// [net/http.Transport] has two goroutines for each connection, and passes every request
// and response between them. A proxy already has a goroutine for each request. In this
// package that goroutine writes the request and reads the response itself, which takes
// about half of the processor time. Only a request's body has a goroutine of its own,
// because it may be sent while the response arrives. A failed exchange does not wait for
// that goroutine.
package upstream

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"time"
)

var (
	// ErrNoResponse means that the connection ended before the first byte of a response.
	ErrNoResponse = errors.New("upstream closed the connection before responding")
	// ErrHTTP2 means that the upstream speaks only HTTP/2, and so did not read the
	// request.
	ErrHTTP2 = errors.New("upstream speaks only HTTP/2")
	// ErrUnsent means that nothing of the request was sent.
	ErrUnsent = errors.New("nothing of the request was sent")
	// ErrBody means that reading the request's body failed, which is the sender's fault,
	// not the upstream's.
	ErrBody = errors.New("the request's body could not be read")
)

// unsentError adds [ErrUnsent] to an error and keeps its message.
type unsentError struct{ error }

func (u unsentError) Unwrap() []error { return []error{u.error, ErrUnsent} }

// bodyError adds [ErrBody] to an error and keeps its message.
type bodyError struct{ error }

func (b bodyError) Unwrap() []error { return []error{b.error, ErrBody} }

var errClosed = errors.New("upstream: the transport is closed")

// HopOnceIdle is the OnceIdle of every [Transport] that calls a server or an agent. A
// server or agent that stops closes a connection only when it has been idle for longer,
// so it closes none over which a request is on its way.
const HopOnceIdle = time.Second

// Transport is an [http.RoundTripper] that keeps connections. Its fields must
// not change once it is used.
//
// If a request fails on a kept connection before the first byte of its response, the
// transport retries it once, over a new connection, provided that the request is
// idempotent or nothing of it was sent, and that its body is unread or can be reread.
type Transport struct {
	// Dial connects to addr, the host of a request's URL.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Redial returns a function that waits before each retry if new connections fail
	// before anything was sent over them, and that returns false to give up. If Redial
	// is nil, there is no retry.
	Redial func() (wait func(context.Context) bool)
	// IdleTimeout is how long an unused connection is kept.
	IdleTimeout time.Duration
	// OnceIdle is how long after its last response a connection may carry a request that
	// cannot be sent twice (IdleTimeout). Such a request is lost if the upstream closes
	// the connection before reading it.
	OnceIdle time.Duration
	// MaxIdle is the maximum number of unused connections, MaxIdlePerHost that for one
	// address.
	MaxIdle, MaxIdlePerHost int
	// MaxHeaderBytes bounds the header of a response.
	MaxHeaderBytes int64

	mu     sync.Mutex
	closed bool
	idle   map[string][]*conn // by address; the most recently used is last
	n      int                // number of idle connections
	// waiting has the requests that are connecting, oldest first. Each takes at most one
	// connection instead of its own.
	waiting map[string][]chan *conn
	sweep   *time.Timer // set while there are idle connections
}

// RoundTrip implements [http.RoundTripper]. Unlike most, it may return while the
// body is still being read; that ends soon after the body is closed.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	body := newBody(req)
	var wait func(context.Context) bool
	untouched := true // nothing was sent
	fail := func(err error) (*http.Response, error) {
		body.stop()
		if untouched {
			err = unsentError{err}
		}
		return nil, err
	}
	for fresh := false; ; fresh = true {
		c, err := t.connect(ctx, req.URL.Host, fresh, body.replayable() && idempotent(req))
		if err != nil {
			return fail(err)
		}
		resp, err := c.exchange(req, body)
		if err == nil {
			return resp, nil
		}
		none := c.kill(body.last)
		untouched = untouched && none
		switch {
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		case broken(err) && (none || c.kept && idempotent(req)) && body.rewind():
			if wait == nil && t.Redial != nil {
				wait = t.Redial()
			}
			if c.kept || wait != nil && wait(ctx) {
				continue
			}
		}
		return fail(err)
	}
}

// IdempotentMethod reports whether a request with this method may arrive twice (RFC
// 9110, section 9.2.2). As in [http.Request], no method means GET.
func IdempotentMethod(method string) bool {
	switch method {
	case "", http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// idempotent reports whether a request may arrive twice.
func idempotent(req *http.Request) bool {
	return IdempotentMethod(req.Method) || req.Header["Idempotency-Key"] != nil || req.Header["X-Idempotency-Key"] != nil
}

// broken reports whether an exchange failed because the connection ended before a
// response began.
func broken(err error) bool {
	var e *noResponse
	if !errors.As(err, &e) {
		return false
	}
	for _, cause := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(e.cause, cause) {
			return true
		}
	}
	return false
}

// connect returns a connection to addr: a new one if fresh is set, otherwise preferably a
// kept one. Unless old is set, it uses only a kept connection that was used recently.
func (t *Transport) connect(ctx context.Context, addr string, fresh, old bool) (*conn, error) {
	for !fresh {
		c, err := t.take(addr, old)
		if err != nil {
			return nil, err
		}
		if c == nil {
			break
		}
		if c.alive() {
			return c, nil
		}
		c.close()
	}
	if fresh {
		return t.dial(ctx, addr)
	}
	return t.dialOrWait(ctx, addr)
}

func (t *Transport) dial(ctx context.Context, addr string) (*conn, error) {
	nc, err := t.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	return newConn(t, addr, nc), nil
}

// dialOrWait returns a new connection, or one that becomes free first: if many requests
// arrive at once, connecting takes longer than most of them.
func (t *Transport) dialOrWait(ctx context.Context, addr string) (*conn, error) {
	freed := make(chan *conn, 1)
	t.mu.Lock()
	if t.waiting == nil {
		t.waiting = make(map[string][]chan *conn)
	}
	t.waiting[addr] = append(t.waiting[addr], freed)
	t.mu.Unlock()
	type result struct {
		*conn
		error
	}
	dialled := make(chan result, 1)
	go func() {
		c, err := t.dial(ctx, addr)
		dialled <- result{c, err}
	}()
	select {
	case c := <-freed:
		go func() {
			if r := <-dialled; r.error == nil {
				t.put(r.conn)
			}
		}()
		return c, nil
	case r := <-dialled:
		if c := t.giveUp(addr, freed); c != nil {
			t.put(c)
		}
		return r.conn, r.error
	}
}

// giveUp ends a wait, and returns the connection that the waiter got, if any.
func (t *Transport) giveUp(addr string, freed chan *conn) *conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := t.waiting[addr]
	i := slices.Index(list, freed)
	if i < 0 {
		return <-freed
	}
	t.setWaitingLocked(addr, slices.Delete(list, i, i+1))
	return nil
}

func (t *Transport) setWaitingLocked(addr string, list []chan *conn) {
	if len(list) == 0 {
		delete(t.waiting, addr)
		return
	}
	t.waiting[addr] = list
}

// take returns the most recently used connection to addr, or nil if there is none.
// Unless old is set, it closes those that are too old, because a server that serves one
// connection at a time would wait for them.
func (t *Transport) take(addr string, old bool) (*conn, error) {
	var closing []*conn
	defer func() {
		for _, c := range closing {
			c.close()
		}
	}()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, errClosed
	}
	list := t.idle[addr]
	if len(list) == 0 {
		return nil, nil
	}
	c := list[len(list)-1]
	if !old && t.OnceIdle > 0 && time.Since(c.used) > t.OnceIdle {
		closing = list
		t.n -= len(list)
		t.setLocked(addr, nil)
		return nil, nil
	}
	t.setLocked(addr, list[:len(list)-1])
	t.n--
	return c, nil
}

// put keeps a connection whose exchange is over.
func (t *Transport) put(c *conn) {
	c.kept, c.used = true, time.Now()
	c.state.Store(unsent)
	t.mu.Lock()
	if w := t.waiting[c.addr]; len(w) > 0 && !t.closed {
		w[0] <- c
		t.setWaitingLocked(c.addr, w[1:])
		t.mu.Unlock()
		return
	}
	list := t.idle[c.addr]
	if t.closed || t.n >= t.MaxIdle || len(list) >= t.MaxIdlePerHost {
		t.mu.Unlock()
		c.close()
		return
	}
	defer t.mu.Unlock()
	t.setLocked(c.addr, append(list, c))
	t.n++
	if t.sweep == nil {
		t.sweep = time.AfterFunc(t.IdleTimeout, t.expire)
	}
}

func (t *Transport) setLocked(addr string, list []*conn) {
	if t.idle == nil {
		t.idle = make(map[string][]*conn)
	}
	if len(list) == 0 {
		delete(t.idle, addr)
		return
	}
	t.idle[addr] = list
}

// expire closes the connections that were not used for the idle timeout.
func (t *Transport) expire() {
	var old []*conn
	t.mu.Lock()
	for addr, list := range t.idle {
		n := 0
		for n < len(list) && time.Since(list[n].used) >= t.IdleTimeout {
			n++
		}
		old = append(old, list[:n]...)
		t.n -= n
		t.setLocked(addr, slices.Delete(list, 0, n))
	}
	if t.sweep = nil; t.n > 0 {
		t.sweep = time.AfterFunc(t.IdleTimeout/2, t.expire)
	}
	t.mu.Unlock()
	for _, c := range old {
		c.close()
	}
}

// CloseIdle closes the connections that no request uses.
func (t *Transport) CloseIdle() {
	t.mu.Lock()
	idle := t.idle
	t.idle, t.n = nil, 0
	t.mu.Unlock()
	for _, list := range idle {
		for _, c := range list {
			c.close()
		}
	}
}

// Close closes the connections that no request uses, and each of the others when its
// request is over. Further requests fail.
func (t *Transport) Close() {
	t.mu.Lock()
	t.closed = true
	if t.sweep != nil {
		t.sweep.Stop()
	}
	t.mu.Unlock()
	t.CloseIdle()
}
