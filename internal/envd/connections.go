package envd

import (
	"context"
	"net"
	"net/http"
	"sync"

	"github.com/wrenn-dev/wrenn/internal/linger"
)

// connections are those that the daemon's server has open. A guest that goes
// on from captured memory holds connections whose other ends are gone, or are
// another guest's: nothing ever comes of them, not even an end.
type connections struct {
	mu   sync.Mutex
	open map[net.Conn]struct{}
}

type connectionKey struct{}

// watch makes srv tell what it has open. It is called before srv serves.
func (c *connections) watch(srv *http.Server) {
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

// shed closes every connection but the one that ctx's request came on. Its
// requests' contexts end with a connection.
func (c *connections) shed(ctx context.Context) {
	own, _ := ctx.Value(connectionKey{}).(net.Conn)
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.open {
		if conn == own {
			continue
		}
		if c, ok := conn.(*linger.Conn); ok {
			_ = c.Abort() // Nobody is there to take what is still unsent.
			continue
		}
		_ = conn.Close()
	}
}
