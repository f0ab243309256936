// Package reconcile keeps the database and the hosts in agreement.
//
// For each host that this server watches, a [Controller] tracks whether the host is
// reachable, follows its events, compares its lists with the database, and reconciles the
// differences. Each of these has its own goroutines, so a call to one host, or about one
// sandbox, that hangs delays nothing else. The pure functions [Sandboxes] and [Templates]
// decide the actions; the domain packages execute them.
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

// Each server writes a heartbeat to the table of servers. Other servers leave alone what
// a live server owns: the hosts that it watches and the sandboxes in transit that it
// works on. A server without a recent heartbeat is dead, and others take over both.
//
// For a moment, two servers can believe that they watch the same host, for example if the
// first one's heartbeat is late. That is harmless: every write names the state that it
// changes, acknowledgements of events only move forward, and a sandbox is destroyed only
// after no row has owned it for a while. So writes need no fencing.

const (
	// beatsPerInterval is how many heartbeats a server writes in the time after which it
	// counts as dead.
	beatsPerInterval = 5
	// roundWithin bounds one round of database calls.
	roundWithin = 15 * time.Second
)

// Config configures a [Controller].
type Config struct {
	Store     *store.Store
	Hosts     *hosts.Registry
	Sandboxes *sandboxes.Service
	Templates *templates.Service
	// DrainIdle is how long a sandbox on a draining host must be idle before it is paused
	// (0: [DefaultDrainIdle]).
	DrainIdle time.Duration
	// Watching runs while this server watches a host, until its context is done; may be
	// nil.
	Watching func(context.Context, *hosts.Host)
	Log      *slog.Logger
}

// DefaultDrainIdle is the default of Config.DrainIdle.
const DefaultDrainIdle = 30 * time.Second

// Controller keeps the database and the hosts in agreement.
type Controller struct {
	Config
	metrics     *metrics
	writeWithin time.Duration
	// again asks Run to read the hosts now.
	again chan struct{}

	// mu guards watched. It is not held during calls to other code.
	mu sync.Mutex
	// watched has the hosts that this server watches.
	watched map[uuid.UUID]*watch
}

// New returns a controller. It works while [Controller.Run] runs.
func New(c Config) *Controller {
	if c.DrainIdle == 0 {
		c.DrainIdle = DefaultDrainIdle
	}
	return &Controller{Config: c, metrics: newMetrics(), writeWithin: writeWithin, again: make(chan struct{}, 1), watched: make(map[uuid.UUID]*watch)}
}

// Look makes the controller read the hosts from the database now, because one was added,
// removed or registered again. It does not block.
func (c *Controller) Look() {
	select {
	case c.again <- struct{}{}:
	default:
	}
}

// Run writes this server's heartbeat, watches the hosts that it has claimed, and marks
// silent hosts unreachable, until ctx is done. It waits only for the database, and each
// wait is bounded.
func (c *Controller) Run(ctx context.Context) {
	var watches sync.WaitGroup
	defer watches.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Judge hosts only after having listened for long enough.
	var since time.Time
	patience := 2 * c.Hosts.Heartbeat
	tick := time.NewTicker(c.Hosts.Heartbeat / beatsPerInterval)
	defer tick.Stop()
	failing := false
	for {
		err := c.round(ctx, &watches, !since.IsZero() && time.Since(since) > patience)
		switch {
		case err != nil:
			since = time.Time{}
			if !failing && ctx.Err() == nil {
				c.Log.Warn("claim and check hosts", "error", err)
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

// Linger writes this server's heartbeat until ctx is done, so that other servers leave
// its unfinished work alone, and releases its hosts to them. Call it when Run's context
// is done.
func (c *Controller) Linger(ctx context.Context) {
	tick := time.NewTicker(c.Hosts.Heartbeat / beatsPerInterval)
	defer tick.Stop()
	for {
		if err := c.linger(ctx); err != nil && ctx.Err() == nil {
			c.Log.Warn("write heartbeat during shutdown", "error", err)
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

// round is one iteration of Run.
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

// claim writes this server's heartbeat and returns the hosts that it watches.
func (c *Controller) claim(ctx context.Context) (map[uuid.UUID]*hosts.Host, error) {
	if err := c.Store.Vital.ServerAlive(ctx, c.Store.Server); err != nil {
		return nil, fmt.Errorf("write server's heartbeat: %w", err)
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

// watchAll starts and cancels watches so that exactly mine are watched. It does not wait
// for a cancelled watch, which may be in a call to its host.
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
