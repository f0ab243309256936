// Package reconcile keeps the database and the hosts in agreement.
//
// For each host that this server watches, a [Controller] hears whether the host
// is there, follows its events, compares its lists with the database, and does
// what the difference asks for. Each of these has goroutines of its own: what
// hangs on one host, or about one sandbox, delays nothing else. What a
// difference asks for is decided by pure functions, [Sandboxes] and
// [Templates]; the domain packages do it.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// Of several servers each says at intervals that it is alive, in the table of
// servers. What a living server has marked as its own the others leave alone:
// the hosts that it watches and the sandboxes in transit that it works on. A
// server that was not seen for a heartbeat is dead, and both are anybody's.
//
// Nothing is lost when two believe for a moment that they watch one host, as
// they do when the first one's word comes late: every write names the state
// that it changes, acknowledged events only go forward, and what is destroyed
// is what no row has owned for a while. So no write needs to be fenced.

const (
	// signsALife is how often, in the time after which it is dead, a server says
	// that it is not.
	signsALife = 5
	// roundWithin bounds one round of what a loop asks of the database alone.
	roundWithin = 15 * time.Second
)

// Config is what a Controller works with.
type Config struct {
	Store     *store.Store
	Hosts     *hosts.Registry
	Sandboxes *sandboxes.Service
	Templates *templates.Service
	// DrainIdle is for how long nothing must have used a sandbox for it to be
	// paused because its host drains; 0: [DefaultDrainIdle].
	DrainIdle time.Duration
	// Watching runs beside the watch over a host, until its context is done;
	// nil: nothing does.
	Watching func(context.Context, *hosts.Host)
	Log      *slog.Logger
}

// DefaultDrainIdle is for how long nothing uses a sandbox that is idle.
const DefaultDrainIdle = 30 * time.Second

// Controller keeps the database and the hosts in agreement.
type Controller struct {
	Config
	metrics     *metrics
	writeWithin time.Duration
	// again asks for the hosts to be looked at now.
	again chan struct{}

	// mu guards the map, and is held for no call of anything else.
	mu sync.Mutex
	// watched are the hosts that this server watches.
	watched map[uuid.UUID]*watch
}

// New returns a controller. Run must run for it to do anything.
func New(c Config) *Controller {
	if c.DrainIdle == 0 {
		c.DrainIdle = DefaultDrainIdle
	}
	return &Controller{Config: c, metrics: newMetrics(), writeWithin: writeWithin, again: make(chan struct{}, 1), watched: make(map[uuid.UUID]*watch)}
}

// Look has the controller look at the hosts of the database now: one may have
// been added, removed or registered anew. It does not block.
func (c *Controller) Look() {
	select {
	case c.again <- struct{}{}:
	default:
	}
}

// Run renews this server's sign of life, watches the hosts that this server has
// claimed, and marks hosts that it has not heard from, until ctx is done. It waits
// for nothing but the database, within a bound.
func (c *Controller) Run(ctx context.Context) {
	var watches sync.WaitGroup
	defer watches.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Judging that a host was not heard of takes having listened.
	var since time.Time
	patience := 2 * c.Hosts.Heartbeat
	tick := time.NewTicker(c.Hosts.Heartbeat / signsALife)
	defer tick.Stop()
	failing := false
	for {
		err := c.round(ctx, &watches, !since.IsZero() && time.Since(since) > patience)
		switch {
		case err != nil:
			since = time.Time{}
			if !failing && ctx.Err() == nil {
				c.Log.Warn("keep watch over hosts", "error", err)
			}
		case since.IsZero():
			since = time.Now()
		}
		failing = err != nil
		select {
		case <-tick.C:
		case <-c.again:
		case <-ctx.Done():
			return
		}
	}
}

// Linger says that this server is alive, until ctx is done, so that others leave
// alone what it still works on, and lets them have its hosts. Call it when Run's
// context is done.
func (c *Controller) Linger(ctx context.Context) {
	tick := time.NewTicker(c.Hosts.Heartbeat / signsALife)
	defer tick.Stop()
	for {
		if err := c.linger(ctx); err != nil && ctx.Err() == nil {
			c.Log.Warn("say that this server finishes its work", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (c *Controller) linger(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, roundWithin)
	defer cancel()
	return errors.Join(c.Store.Vital.ServerAlive(ctx, c.Store.Server), c.Store.Vital.ReleaseHosts(ctx, c.Store.Server))
}

// round is what Run does each time.
func (c *Controller) round(ctx context.Context, watches *sync.WaitGroup, judge bool) error {
	bounded, cancel := context.WithTimeout(ctx, roundWithin)
	defer cancel()
	mine, err := c.claim(bounded)
	if err != nil {
		return err
	}
	c.watchAll(ctx, watches, mine)
	if !judge {
		return nil
	}
	missing, err := c.Hosts.Sweep(bounded)
	for _, sandbox := range missing {
		c.Log.Warn("sandbox is missing", "sandbox_id", id.Format(id.Sandbox, sandbox))
	}
	c.Sandboxes.Changed(missing...)
	return err
}

// claim says that this server is alive and returns the hosts that it watches.
func (c *Controller) claim(ctx context.Context) (map[uuid.UUID]*hosts.Host, error) {
	if err := c.Store.Vital.ServerAlive(ctx, c.Store.Server); err != nil {
		return nil, fmt.Errorf("say that this server is alive: %w", err)
	}
	if err := c.Store.Vital.ClaimHosts(ctx, db.ClaimHostsParams{Server: &c.Store.Server, Within: c.Hosts.Heartbeat.Seconds()}); err != nil {
		return nil, fmt.Errorf("claim hosts: %w", err)
	}
	rows, err := c.Hosts.Refresh(ctx)
	if err != nil {
		return nil, err
	}
	mine := make(map[uuid.UUID]*hosts.Host)
	for _, row := range rows {
		if row.Watcher == nil || *row.Watcher != c.Store.Server {
			continue
		}
		if h, err := c.Hosts.Get(&row.ID); err == nil {
			mine[row.ID] = h
		}
	}
	return mine, nil
}

// watchAll makes the hosts that are watched those given. A watch that ends is
// not waited for: it may be in a call of its host.
func (c *Controller) watchAll(ctx context.Context, watches *sync.WaitGroup, mine map[uuid.UUID]*hosts.Host) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for host, w := range c.watched {
		if mine[host] != w.host {
			w.cancel()
			delete(c.watched, host)
		}
	}
	for host, h := range mine {
		if _, ok := c.watched[host]; !ok {
			w := newWatch(ctx, c, h)
			c.watched[host] = w
			watches.Go(w.run)
		}
	}
}
