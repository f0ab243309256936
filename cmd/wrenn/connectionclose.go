package main

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// keptFor is how long a connection stays open after a response that did not close it. The
// client reuses the connection within HopOnceIdle; half a second more is for the network.
const keptFor = upstream.HopOnceIdle + 500*time.Millisecond

// connectionClose lets a server or an agent stop without closing a connection on which a
// request is about to arrive. Once the program is asked to stop, each response tells the
// client not to reuse the connection ("Connection: close"). The program stops keptFor
// after the last response without that header.
type connectionClose struct {
	asked context.Context // done once the program is asked to stop
	sleep func(time.Duration)
	last  atomic.Int64 // when the last response without "Connection: close" ended, in Unix ns
}

// context returns a context for the program's servers. Once the program is asked to stop,
// the context is done as soon as no client can still reuse a connection: keptFor after
// the last response that did not close it.
func (c *connectionClose) context() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(c.asked))
	stop := context.AfterFunc(c.asked, func() {
		c.sleep(keptFor - time.Since(time.Unix(0, c.last.Load())))
		cancel()
	})
	return ctx, func() { stop(); cancel() }
}

// handler wraps next. It notes when each response that keeps its connection has ended,
// and adds "Connection: close" to responses once the program is asked to stop.
func (c *connectionClose) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c.asked.Err() == nil {
			defer func() { c.last.Store(time.Now().UnixNano()) }()
		} else if r.Header.Get("Upgrade") == "" {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}
