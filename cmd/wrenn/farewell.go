package main

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// keptFor is how long after an answer a request that must not arrive twice can still come
// over the same connection: until HopOnceIdle is over, plus half a second on its way.
const keptFor = upstream.HopOnceIdle + 500*time.Millisecond

// farewell lets a server or an agent stop without closing a connection over which a
// request is on its way. Once asked is done, answers to new requests say that their
// connection ends, and the program stops keptFor after the last answer that did not.
type farewell struct {
	asked context.Context
	sleep func(time.Duration)
	last  atomic.Int64 // end of the last answer that kept its connection, in Unix ns
}

// context returns a context that is done when the program may stop.
func (f *farewell) context() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(f.asked))
	stop := context.AfterFunc(f.asked, func() {
		f.sleep(keptFor - time.Since(time.Unix(0, f.last.Load())))
		cancel()
	})
	return ctx, func() { stop(); cancel() }
}

// handler returns next. Each answer ends its connection once asked is done, and until
// then records when it ended.
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
