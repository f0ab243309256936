package up

import (
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

// retryAfter is when a client should ask again while this machine starts.
const retryAfter = 5 * time.Second

// doorman answers every request at the front door's sockets until Caddy is
// started: the first start takes minutes, and clients would wait without a word.
type doorman struct {
	server  *http.Server
	serving sync.WaitGroup
	doing   atomic.Pointer[string]
	// leave stops accepting connections. Those that it has are still answered while
	// Caddy runs: [http.Server.Shutdown] would close them without an answer.
	leave func() // may be called again
}

// newDoorman answers at the sockets, which stay open when it leaves.
func newDoorman(sockets []*os.File) (*doorman, error) {
	d := &doorman{}
	d.prepares("everything")
	d.server = netaddr.Server(d)
	d.server.ErrorLog = log.New(io.Discard, "", 0)
	d.server.SetKeepAlivesEnabled(false) // the next request is Caddy's
	var listeners []net.Listener
	d.leave = sync.OnceFunc(func() {
		for _, l := range listeners {
			_ = l.Close()
		}
		d.serving.Wait()
	})
	for _, f := range sockets {
		l, err := net.FileListener(f)
		if err != nil {
			d.close()
			return nil, fmt.Errorf("answer at the front door: %w", err)
		}
		listeners = append(listeners, l)
	}
	for _, l := range listeners {
		d.serving.Go(func() { _ = d.server.Serve(linger.Listener(l)) })
	}
	return d, nil
}

// close stops accepting connections, and closes those that are still open.
func (d *doorman) close() {
	d.leave()
	_ = d.server.Close()
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
