package up

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wrenn-dev/wrenn/internal/linger"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

const (
	// retryAfter is when a client should ask again while this machine starts.
	retryAfter = 5 * time.Second
	// doormanLeaves bounds the wait for answers that are on their way.
	doormanLeaves = 2 * time.Second
)

// doorman answers every request at the front door's sockets until Caddy is
// started: the first start takes minutes, and clients would wait without a word.
type doorman struct {
	server  *http.Server
	serving sync.WaitGroup
	doing   atomic.Pointer[string]
	close   func() // may be called again
}

// newDoorman answers at the sockets, which stay open when it is closed.
func newDoorman(sockets []*os.File) (*doorman, error) {
	d := &doorman{}
	d.prepares("everything")
	d.server = netaddr.Server(d)
	d.server.ErrorLog = log.New(io.Discard, "", 0)
	d.server.SetKeepAlivesEnabled(false) // the next request is Caddy's
	d.close = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), doormanLeaves)
		defer cancel()
		if d.server.Shutdown(ctx) != nil {
			_ = d.server.Close()
		}
		d.serving.Wait()
	})
	for _, f := range sockets {
		l, err := net.FileListener(f)
		if err != nil {
			d.close()
			return nil, fmt.Errorf("answer at the front door: %w", err)
		}
		d.serving.Go(func() { _ = d.server.Serve(linger.Listener(l)) })
	}
	return d, nil
}

// prepares sets what clients are told: what this machine prepares, in words that
// anybody may read.
func (d *doorman) prepares(what string) { d.doing.Store(&what) }

// ServeHTTP implements [http.Handler].
func (d *doorman) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("Retry-After", strconv.Itoa(int(retryAfter.Seconds())))
	w.WriteHeader(http.StatusServiceUnavailable)
	_ = json.NewEncoder(w).Encode(map[string]map[string]string{"error": {
		"code": "unavailable", "message": fmt.Sprintf("Wrenn is starting and prepares %s: try again in a few seconds", *d.doing.Load()),
	}})
}
