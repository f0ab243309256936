package main

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// keptFor is how long after an answer the client's next request may still arrive over the
// same connection, if it is one that must not be sent twice: the client sends it within
// HopOnceIdle, and half a second is for its way.
const keptFor = upstream.HopOnceIdle + 500*time.Millisecond

// farewell lets a server or an agent stop without closing a connection over which a
// request is on its way. Once the program is asked to stop, each answer tells the client
// to send nothing more over the connection ("Connection: close"). The program stops
// keptFor after the last answer that did not say so.
type farewell struct {
	asked context.Context // done once the program is asked to stop
	sleep func(time.Duration)
	last  atomic.Int64 // end of the last answer that kept its connection, in Unix ns
}

// context returns a context for the program's servers. It is done keptFor after the last
// answer that kept its connection, so that they then lose no request.
func (f *farewell) context() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(f.asked))
	stop := context.AfterFunc(f.asked, func() {
		f.sleep(keptFor - time.Since(time.Unix(0, f.last.Load())))
		cancel()
	})
	return ctx, func() { stop(); cancel() }
}

// handler returns next with what farewell needs: the time of each answer that keeps its
// connection, and "Connection: close" in the others.
func (f *farewell) handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f.asked.Err() == nil {
			defer func() { f.last.Store(time.Now().UnixNano()) }()
		} else if r.Header.Get("Upgrade") == "" {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}
