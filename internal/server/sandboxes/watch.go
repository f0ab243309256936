package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
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

// signsALife is how often in the time after which it is dead a server says
// that it is not.
const signsALife = 5

// watching is a host that this server watches.
type watching struct {
	host *hosts.Host
	stop func() // returns when it is no longer watched
}

// Run keeps the table and the hosts in agreement until ctx is done.
func (s *Service) Run(ctx context.Context) {
	var keys sync.WaitGroup
	keys.Go(func() { s.forgetKeys(ctx) })
	defer keys.Wait()
	watched := make(map[uuid.UUID]watching)
	defer func() {
		for _, w := range watched {
			w.stop()
		}
	}()
	// Judging that a host was not heard of takes having listened.
	var since time.Time
	patience := 2 * s.Hosts.Heartbeat
	tick := time.NewTicker(s.Hosts.Heartbeat / signsALife)
	defer tick.Stop()
	failing := false
	for {
		err := s.watchHosts(ctx, watched)
		if err == nil {
			if since.IsZero() {
				since = time.Now()
			}
			if time.Since(since) > patience {
				err = s.sweep(ctx)
			}
		}
		if err != nil {
			since = time.Time{}
			if !failing && ctx.Err() == nil {
				s.Log.Warn("keep watch over hosts", "error", err)
			}
		}
		failing = err != nil
		select {
		case <-tick.C:
		case <-s.moved:
		case <-ctx.Done():
			return
		}
	}
}

// watchHosts says that this server is alive, and makes the hosts that it
// watches those that are its to watch.
func (s *Service) watchHosts(ctx context.Context, watched map[uuid.UUID]watching) error {
	within := s.Hosts.Heartbeat.Seconds()
	if err := s.Store.ServerAlive(ctx, s.Store.Server); err != nil {
		return fmt.Errorf("say that this server is alive: %w", err)
	}
	if err := s.Store.ClaimHosts(ctx, db.ClaimHostsParams{Server: &s.Store.Server, Within: within}); err != nil {
		return fmt.Errorf("claim hosts: %w", err)
	}
	rows, err := s.Hosts.Refresh(ctx)
	if err != nil {
		return err
	}
	mine := make(map[uuid.UUID]*hosts.Host)
	for _, row := range rows {
		if row.Watcher == nil || *row.Watcher != s.Store.Server {
			continue
		}
		if h, err := s.Hosts.Get(&row.ID); err == nil {
			mine[row.ID] = h
		}
	}
	for host, w := range watched {
		if mine[host] != w.host {
			w.stop()
			delete(watched, host)
		}
	}
	for host, h := range mine {
		if _, ok := watched[host]; !ok {
			watched[host] = s.watch(ctx, h)
		}
	}
	return nil
}

// watch begins to watch a host.
func (s *Service) watch(ctx context.Context, h *hosts.Host) watching {
	ctx, cancel := context.WithCancel(ctx)
	w := &watch{Service: s, host: h, log: s.Log.With("host", h.URL), poke: make(chan struct{}, 1), missing: make(map[uuid.UUID]time.Time), stray: make(map[uuid.UUID]time.Time), idle: make(chan []db.Sandbox)}
	var wg sync.WaitGroup
	wg.Go(func() { w.listen(ctx) })
	wg.Go(func() { w.compareLoop(ctx) })
	if s.Watching != nil {
		wg.Go(func() { s.Watching(ctx, h) })
	}
	wg.Go(func() { w.drainLoop(ctx) })
	return watching{host: h, stop: func() { cancel(); wg.Wait() }}
}

// sweep writes down which hosts and sandboxes are not heard of.
func (s *Service) sweep(ctx context.Context) error {
	missing, err := s.Hosts.Sweep(ctx)
	if err != nil {
		return err
	}
	for _, sandbox := range missing {
		s.Log.Warn("sandbox is missing", "sandbox_id", id.Format(id.Sandbox, sandbox))
		s.changed(sandbox)
	}
	return nil
}

// atWorkElsewhere are the host's sandboxes that other living servers work on.
func (w *watch) atWorkElsewhere(ctx context.Context) (map[uuid.UUID]bool, error) {
	ids, err := w.Store.ListAtWork(ctx, db.ListAtWorkParams{HostID: &w.host.ID, Server: w.Store.Server, Within: w.Hosts.Heartbeat.Seconds()})
	if err != nil {
		return nil, fmt.Errorf("list what other servers work on: %w", err)
	}
	all := make(map[uuid.UUID]bool, len(ids))
	for _, sandbox := range ids {
		all[sandbox] = true
	}
	return all, nil
}

// found writes that a sandbox whose host is back is as it was.
func (w *watch) found(ctx context.Context, row db.Sandbox, sb *hostagentv1.Sandbox) error {
	_, err := w.Store.SandboxFound(ctx, db.SandboxFoundParams{ID: row.ID, ExpiresAt: expiry(sb)})
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write that sandbox is back: %w", err)
	}
	w.changed(row.ID)
	w.log.Info("sandbox is back", "sandbox_id", sb.SandboxId)
	return nil
}
