// Package graceful stops an HTTP server without dropping a request on a connection that the
// server has accepted.
//
// [http.Server.Shutdown] closes an accepted connection whose first request has not
// arrived yet, without a response.
package graceful

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// InFlight is how long a server or an agent that stops waits for requests in flight. The
// systemd units (TestUnitsWait) and `wrenn up` allow for it.
const InFlight = 10 * time.Second

// freshWait is how long a connection may still send its first request after the
// listener is closed.
const freshWait = time.Second

// waiter is a listener that also serves requests itself. Close it before Wait.
type waiter interface {
	Wait(ctx context.Context) error
}

var _ waiter = (*upstream.Listener)(nil)

// Serve serves l with srv, over TLS if identity is not nil, until ctx is done. Then it
// closes l and stops within the given time: a new connection gets a second to send its
// first request, idle connections are closed, and requests under way may finish. Before
// that, the handler must have told clients to close their connections. If l has a Wait
// method, as [upstream.Listener] has, Serve also waits for the requests that l serves.
// Serve returns nil unless l failed.
//
// Serve changes fields of srv, so the caller must not use srv for anything else.
func Serve(ctx context.Context, srv *http.Server, l net.Listener, identity *tls.Config, within time.Duration) error {
	f := follow(srv)
	served := make(chan error, 1)
	go func() {
		if identity == nil {
			served <- srv.Serve(l)
			return
		}
		srv.TLSConfig = identity
		served <- srv.ServeTLS(l, "", "")
	}()
	var err error
	select {
	case err = <-served:
	case <-ctx.Done():
		_ = l.Close()
		err = <-served // from now on, f has every fresh connection
	}
	if errors.Is(err, net.ErrClosed) && ctx.Err() != nil {
		err = nil
	}
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), within)
	defer cancel()
	f.wait(stopping)
	if srv.Shutdown(stopping) != nil {
		_ = srv.Close() // ends streams that are still open
	}
	if w, ok := l.(waiter); ok {
		_ = w.Wait(stopping) // if it fails, it has closed their connections
	}
	return err
}

// fresh tracks a server's connections that have not had a request yet.
type fresh struct {
	mu     sync.Mutex
	conns  map[net.Conn]*conn
	closed bool          // the server accepts no more connections
	none   chan struct{} // closed when closed is set and conns is empty
}

type conn struct {
	net.Conn
	begun atomic.Bool // the handler has the first request, or the connection ended without one
}

type connKey struct{}

// follow hooks into srv to track its fresh connections. A connection is fresh until the
// handler is called, because net/http drops a request that it has only read.
func follow(srv *http.Server) *fresh {
	f := &fresh{conns: make(map[net.Conn]*conn), none: make(chan struct{})}
	srv.ConnContext = func(ctx context.Context, nc net.Conn) context.Context {
		c := &conn{Conn: nc}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.conns[nc] = c
		return context.WithValue(ctx, connKey{}, c)
	}
	srv.ConnState = func(nc net.Conn, state http.ConnState) {
		// An HTTP/2 connection is idle before its first request, and loses none.
		if state == http.StateNew || state == http.StateActive {
			return
		}
		f.mu.Lock()
		c := f.conns[nc]
		f.mu.Unlock()
		f.begin(c)
	}
	next := srv.Handler
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := r.Context().Value(connKey{}).(*conn); ok {
			f.begin(c)
		}
		next.ServeHTTP(w, r)
	})
	return f
}

// begin removes a connection from f, unless it was removed before or is nil.
func (f *fresh) begin(c *conn) {
	if c == nil || c.begun.Swap(true) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, c.Conn)
	f.endLocked()
}

func (f *fresh) endLocked() {
	if f.closed && len(f.conns) == 0 {
		close(f.none)
	}
}

// wait returns when no connection is fresh any more, or after freshWait. The server must
// accept no more connections.
func (f *fresh) wait(ctx context.Context) {
	f.mu.Lock()
	f.closed = true
	f.endLocked()
	f.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, freshWait)
	defer cancel()
	select {
	case <-f.none:
	case <-ctx.Done():
	}
}
