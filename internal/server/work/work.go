// Package work tracks operations of services that continue after their caller has left.
// They end with the server.
package work

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

// persistWithin bounds [Persist].
const persistWithin = 30 * time.Second

// Group is a set of operations that end together. It is safe for concurrent use.
type Group struct {
	ctx    context.Context
	cancel context.CancelFunc
	log    *slog.Logger

	// mu is not held during calls to other code.
	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup
}

// New returns a group. End it with [Group.Close].
func New(log *slog.Logger) *Group {
	g := &Group{log: log}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

// Context is cancelled when the group gives up its work. Operations use it instead of
// their caller's context.
func (g *Group) Context() context.Context { return g.ctx }

// For returns [Group.Context] with the id and the trace of the request that ctx
// belongs to.
func (g *Group) For(ctx context.Context) context.Context {
	return tracing.Carry(ctx, requestid.With(g.ctx, requestid.From(ctx)))
}

// Begin registers an operation until end. It fails with unavailable after Close was
// called.
func (g *Group) Begin() (end func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, fault.New(fault.Unavailable, "the server is stopping")
	}
	g.wg.Add(1)
	return g.wg.Done, nil
}

// Guard calls f and returns a panic as an error (see [fault.Guard]).
func (g *Group) Guard(f func() error) error { return fault.Guard(g.log, f) }

// Close waits for running operations until ctx is done, and then cancels them. The next
// server reconciles what they leave.
func (g *Group) Close(ctx context.Context) {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		g.wg.Wait()
	}()
	select {
	case <-idle:
	case <-ctx.Done():
	}
	g.cancel()
	<-idle
}

// Persist is [store.Persist] with a time limit, for an f that stores a result. If it
// fails, reconciliation finds the result later.
func Persist(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, persistWithin)
	defer cancel()
	return store.Persist(ctx, f)
}
