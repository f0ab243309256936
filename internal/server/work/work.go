// Package work keeps account of what services do on their own context: it goes
// on when the caller who asked for it leaves, and ends with the server.
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

// Group is the work of services that end together.
type Group struct {
	ctx    context.Context
	cancel context.CancelFunc
	log    *slog.Logger

	// mu is held for no call of anything else.
	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup
}

// New returns a group, to be ended with Close.
func New(log *slog.Logger) *Group {
	g := &Group{log: log}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

// Context ends when the group's work is given up. Work uses it instead of the
// context of whoever asked.
func (g *Group) Context() context.Context { return g.ctx }

// For returns [Group.Context] with the id and the trace of the request that ctx
// belongs to.
func (g *Group) For(ctx context.Context) context.Context {
	return tracing.Carry(ctx, requestid.With(g.ctx, requestid.From(ctx)))
}

// Begin registers a piece of work, which ends with end. It fails with
// unavailable once the group is being closed.
func (g *Group) Begin() (end func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, fault.New(fault.Unavailable, "the server is stopping")
	}
	g.wg.Add(1)
	return g.wg.Done, nil
}

// Guard calls f and turns a panic of it into an error (see [fault.Guard]).
func (g *Group) Guard(f func() error) error { return fault.Guard(g.log, f) }

// Close waits for the work under way until ctx is done, then gives it up: the
// next server finds out how it ended.
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

// Persist is [store.Persist] within a bound, for f that writes what has already
// happened. What could not be written is found out by whoever compares the hosts
// with the database.
func Persist(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, persistWithin)
	defer cancel()
	return store.Persist(ctx, f)
}
