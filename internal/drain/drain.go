// Package drain stops an HTTP server without losing a connection that it has accepted.
//
// Once [http.Server.Shutdown] is called, net/http closes a connection whose first
// request arrives only then, without an answer, although the client could not know.
package drain

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

// freshWait is how long a connection may still send its first request after the
// listener is closed.
const freshWait = time.Second

// waiter is a listener that answers requests itself. It is closed before Wait is called.
type waiter interface {
	Wait(ctx context.Context) error
}

var _ waiter = (*upstream.Listener)(nil)

// Serve serves l with srv, over TLS if identity is not nil, until ctx is done. Then it
// closes l and stops within the given time: a connection without a request gets a second
// to send its first, idle connections are closed, and requests under way may end. The
// handler must have told clients that their connections end. If l has a Wait method, as
// [upstream.Listener] has, Serve waits for l's own requests too. Serve returns nil
// unless l failed.
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
		err = <-served // From here on, f knows each connection.
	}
	if errors.Is(err, net.ErrClosed) && ctx.Err() != nil {
		err = nil
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), within)
	defer cancel()
	f.wait(drain)
	if srv.Shutdown(drain) != nil {
		_ = srv.Close() // streams that last
	}
	if w, ok := l.(waiter); ok {
		_ = w.Wait(drain) // On an error it has closed their connections.
	}
	return err
}

// fresh has a server's connections that have not had their first request.
type fresh struct {
	mu     sync.Mutex
	conns  map[net.Conn]*conn
	closed bool          // Nobody accepts any more.
	none   chan struct{} // closed when closed is set and conns is empty
}

type conn struct {
	net.Conn
	begun atomic.Bool // The handler has its first request, or it ended without one.
}

type connKey struct{}

// follow hooks into srv to keep track of its fresh connections. A connection is fresh
// until the handler is called: net/http drops a request that it has only read.
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
		// HTTP/2 is idle before its first request, and loses none that way.
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

// wait returns once no connection waits for its first request, or the time for that is
// over. Nothing may accept connections any more.
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
