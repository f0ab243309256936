package envd

import (
	"context"
	"net"
	"net/http"
	"sync"

	"github.com/wrenn-dev/wrenn/internal/linger"
)

// connections tracks the open connections of the daemon's server. After a restore, the
// other ends of captured connections are gone, or belong to another guest, and nothing
// ever arrives on them, not even an end.
type connections struct {
	mu   sync.Mutex
	open map[net.Conn]struct{}
}

type connectionKey struct{}

// track tracks the connections of srv. Call it before srv serves.
func (c *connections) track(srv *http.Server) {
	c.open = map[net.Conn]struct{}{}
	srv.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		return context.WithValue(ctx, connectionKey{}, conn)
	}
	srv.ConnState = func(conn net.Conn, state http.ConnState) {
		c.mu.Lock()
		defer c.mu.Unlock()
		switch state {
		case http.StateNew:
			c.open[conn] = struct{}{}
		case http.StateClosed, http.StateHijacked:
			delete(c.open, conn)
		}
	}
}

// shed closes every connection except that of ctx's request. The contexts of requests on
// a closed connection are cancelled.
func (c *connections) shed(ctx context.Context) {
	own, _ := ctx.Value(connectionKey{}).(net.Conn)
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.open {
		if conn == own {
			continue
		}
		if c, ok := conn.(*linger.Conn); ok {
			_ = c.Abort() // nobody would receive unsent data
			continue
		}
		_ = conn.Close()
	}
}
