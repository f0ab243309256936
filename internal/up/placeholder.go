package up

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/wrenn-dev/wrenn/internal/linger"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/requestid"
)

// retryAfter is the Retry-After of responses while `wrenn up` starts.
const retryAfter = 5 * time.Second

// placeholder answers every request at the front door's sockets until Caddy starts. The
// first start takes minutes, during which clients would otherwise hang.
type placeholder struct {
	server  *http.Server
	serving sync.WaitGroup
	log     *slog.Logger
	doing   atomic.Pointer[string]
	// leave stops accepting connections, and may be called again. Requests on accepted
	// connections still get an answer; [http.Server.Shutdown] would drop them.
	leave func()
}

// newPlaceholder returns a placeholder that answers at the sockets, and logs each request. It
// does not close the sockets.
func newPlaceholder(sockets []*os.File, logger *slog.Logger) (*placeholder, error) {
	p := &placeholder{log: logger}
	p.prepares("everything")
	p.server = netaddr.Server(requestid.Handler(p))
	p.server.ErrorLog = log.New(io.Discard, "", 0)
	p.server.SetKeepAlivesEnabled(false) // Caddy gets the next request
	var listeners []net.Listener
	p.leave = sync.OnceFunc(func() {
		for _, l := range listeners {
			_ = l.Close()
		}
		p.serving.Wait()
	})
	for _, f := range sockets {
		l, err := net.FileListener(f)
		if err != nil {
			p.close()
			return nil, fmt.Errorf("answer at the front door: %w", err)
		}
		listeners = append(listeners, l)
	}
	for _, l := range listeners {
		p.serving.Go(func() { _ = p.server.Serve(linger.Listener(l)) })
	}
	return p, nil
}

// close stops accepting connections, and closes those that are still open.
func (p *placeholder) close() {
	p.leave()
	_ = p.server.Close()
}

// prepares sets what the response says this machine is preparing. Anybody can read it.
func (p *placeholder) prepares(what string) { p.doing.Store(&what) }

// ServeHTTP implements [http.Handler].
func (p *placeholder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, doing := requestid.From(r.Context()), *p.doing.Load()
	p.log.InfoContext(r.Context(), "request refused, because wrenn up is starting", "request_id", id, "method", r.Method, "host", r.Host, "preparing", doing)
	h := w.Header()
	h.Set(requestid.Header, id)
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("Retry-After", strconv.Itoa(int(retryAfter.Seconds())))
	w.WriteHeader(http.StatusServiceUnavailable)
	_ = json.NewEncoder(w).Encode(map[string]map[string]string{"error": {
		"code": "unavailable", "message": fmt.Sprintf("Wrenn is starting and is preparing %s: try again in a few seconds", doing),
	}})
}
