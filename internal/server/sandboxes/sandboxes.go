// Package sandboxes has the rules of sandboxes: how they are created, which operations
// each state allows, and how package reconcile updates them.
//
// The service writes an operation's intermediate state to the database before it calls
// the host, and reverts it if the call fails. So nobody who compares the two misjudges a
// sandbox in transit.
package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

// Time limits of operations that continue after their caller has left.
const (
	createTimeout  = 5 * time.Minute
	destroyTimeout = time.Minute
	// shortCall bounds calls that a host answers without slow work.
	shortCall = 15 * time.Second
	// lookAgain is how often waiting callers read the database if no notification
	// arrives.
	lookAgain = 2 * time.Second
)

// Config configures a [Service].
type Config struct {
	Store     *store.Store
	Hosts     *hosts.Registry
	Templates Templates
	Tokens    auth.Tokens
	// Work runs operations that continue after their caller has left.
	Work *work.Group
	// Announce tells the other servers that a sandbox changed; nil: there are none. It must
	// not block.
	Announce func(sandbox uuid.UUID)
	// Ended is called after this server marked a sandbox ended; may be nil.
	Ended func(ctx context.Context, sandbox uuid.UUID) error
	Log   *slog.Logger
}

// Templates finds the templates that sandboxes start from.
type Templates interface {
	// Locate returns the template that a name or an id means for a team, or fails with
	// not_found.
	Locate(ctx context.Context, team uuid.UUID, ref string) (db.Template, error)
}

// Service manages the sandboxes of all teams.
type Service struct {
	Config
	metrics metrics

	// mu guards activities: see [activity].
	mu         sync.Mutex
	activities map[uuid.UUID]*activity

	// known has where sandboxes run.
	known *Cache[place]

	hooks []func(uuid.UUID)
	// onDisconnected is called when other servers' changes can, or can no longer, be missed.
	onDisconnected []func(bool)
}

// New returns a service.
func New(c Config) *Service {
	s := &Service{Config: c, metrics: newMetrics(c.Store), activities: make(map[uuid.UUID]*activity)}
	s.known = NewCache[place](s)
	return s
}

// Collectors returns the service's Prometheus metrics.
func (s *Service) Collectors() []prometheus.Collector { return s.metrics.collectors() }

// OnChange registers f, which is called after every change of a sandbox's state by any
// server. Call it before the service is used. f must not block.
func (s *Service) OnChange(f func(sandbox uuid.UUID)) { s.hooks = append(s.hooks, f) }

// changed notifies waiting callers and caches of this and the other servers that the
// sandbox changed.
func (s *Service) changed(sandbox uuid.UUID) {
	s.ChangedElsewhere(sandbox)
	if s.Announce != nil {
		s.Announce(sandbox)
	}
}

// Changed notifies everybody of sandboxes that other code changed in the database.
func (s *Service) Changed(sandboxes ...uuid.UUID) {
	for _, sandbox := range sandboxes {
		s.changed(sandbox)
	}
}

// ChangedElsewhere notifies waiting callers and caches of this server that another server
// changed the sandbox.
func (s *Service) ChangedElsewhere(sandbox uuid.UUID) {
	s.withActivity(sandbox, (*activity).wake)
	for _, f := range s.hooks {
		f(sandbox)
	}
}

// Disconnected records whether this server can miss other servers' changes from now on.
// Before Disconnected(false), anything may have changed.
func (s *Service) Disconnected(is bool) {
	s.wakeAll()
	for _, f := range s.onDisconnected {
		f(is)
	}
}

// OnDisconnected registers f, which is called with the argument of
// [Service.Disconnected]. Call it before the service is used.
func (s *Service) OnDisconnected(f func(bool)) { s.onDisconnected = append(s.onDisconnected, f) }

// Get returns a team's sandbox, or fails with not_found.
func (s *Service) Get(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	return found(s.Store.GetTeamSandbox(ctx, db.GetTeamSandboxParams{ID: sandbox, TeamID: team}))
}

// Lookup returns any team's sandbox, or fails with not_found.
func (s *Service) Lookup(ctx context.Context, sandbox uuid.UUID) (db.Sandbox, error) {
	return found(s.Store.GetSandbox(ctx, sandbox))
}

// LookupPayer is [Service.Lookup], and also returns whose quota the sandbox counts
// towards: its team's owner, or the team if it has no owner.
func (s *Service) LookupPayer(ctx context.Context, sandbox uuid.UUID) (row db.Sandbox, payer uuid.UUID, err error) {
	r, err := s.Store.GetSandboxPayer(ctx, sandbox)
	row, err = found(r.Sandbox, err)
	return row, r.Payer, err
}

// TeamIs fails with not_found if the team does not exist or is being deleted.
func (s *Service) TeamIs(ctx context.Context, team uuid.UUID) error {
	_, err := s.Store.GetTeam(ctx, team)
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.NotFound, "no such team")
	}
	if err != nil {
		return fmt.Errorf("look up team: %w", err)
	}
	return nil
}

// found converts the error of a query for one sandbox.
func found(row db.Sandbox, err error) (db.Sandbox, error) {
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no such sandbox")
	}
	if err != nil {
		return row, fmt.Errorf("look up sandbox: %w", err)
	}
	return row, nil
}
