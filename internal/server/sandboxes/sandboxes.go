// Package sandboxes holds the rules of sandboxes: how they come to be, what
// may be done to them in which state, and how the table and the hosts are
// kept in agreement.
//
// The database is written before a host is asked and put right when the host
// fails, so that whoever compares the two never mistakes a sandbox in transit.
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

// Bounds of what the service does on its own once it was asked.
const (
	createTimeout  = 5 * time.Minute
	destroyTimeout = time.Minute
	// shortCall bounds calls that a host answers from what it has at hand.
	shortCall = 15 * time.Second
	// lookAgain is how long another server's word is waited for before the table
	// is looked at all the same.
	lookAgain = 2 * time.Second
)

// Config is what a Service works with.
type Config struct {
	Store     *store.Store
	Hosts     *hosts.Registry
	Templates Templates
	Tokens    auth.Tokens
	// Work runs what was asked for.
	Work *work.Group
	// Tell tells the other servers that a sandbox changed; nil: there are none.
	// It must not block.
	Tell func(sandbox uuid.UUID)
	// Ended is told that a sandbox has ended, by the server that wrote it down;
	// nil: nobody is.
	Ended func(ctx context.Context, sandbox uuid.UUID) error
	Log   *slog.Logger
}

// Templates finds what sandboxes are started from.
type Templates interface {
	// Locate returns the template that a team means by a name or an id, or fails
	// with not_found.
	Locate(ctx context.Context, team uuid.UUID, ref string) (db.Template, error)
}

// Service is every team's sandboxes.
type Service struct {
	Config
	metrics metrics

	// mu guards the map: see [box].
	mu    sync.Mutex
	boxes map[uuid.UUID]*box

	hooks []func(uuid.UUID)
	// deafness is told whether other servers' changes can be missed.
	deafness []func(bool)
}

// New returns the service of a store.
func New(c Config) *Service {
	return &Service{Config: c, metrics: newMetrics(c.Store), boxes: make(map[uuid.UUID]*box)}
}

// Collectors are the service's Prometheus metrics.
func (s *Service) Collectors() []prometheus.Collector { return s.metrics.collectors() }

// OnChange has f called after every change of a sandbox's state, by whichever
// server it was changed. Call it before the service is used; f must not block.
func (s *Service) OnChange(f func(sandbox uuid.UUID)) { s.hooks = append(s.hooks, f) }

// changed tells everybody who waits or caches that the sandbox changed, here
// and in other servers.
func (s *Service) changed(sandbox uuid.UUID) {
	s.Heard(sandbox)
	if s.Tell != nil {
		s.Tell(sandbox)
	}
}

// Changed is for those who changed sandboxes by other means than the service's.
func (s *Service) Changed(sandboxes ...uuid.UUID) {
	for _, sandbox := range sandboxes {
		s.changed(sandbox)
	}
}

// Heard tells everybody here who waits or caches that another server changed
// the sandbox.
func (s *Service) Heard(sandbox uuid.UUID) {
	s.inBox(sandbox, (*box).wake)
	for _, f := range s.hooks {
		f(sandbox)
	}
}

// Deaf tells everybody here whether other servers' changes can be missed from
// now on; before they cannot, anything may have changed.
func (s *Service) Deaf(is bool) {
	s.wakeAll()
	for _, f := range s.deafness {
		f(is)
	}
}

// OnDeaf has f called as [Service.Deaf] is. Call it before the service is used.
func (s *Service) OnDeaf(f func(bool)) { s.deafness = append(s.deafness, f) }

// Get returns a team's sandbox, or fails with not_found.
func (s *Service) Get(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	return found(s.Store.GetTeamSandbox(ctx, db.GetTeamSandboxParams{ID: sandbox, TeamID: team}))
}

// Lookup returns any team's sandbox, or fails with not_found.
func (s *Service) Lookup(ctx context.Context, sandbox uuid.UUID) (db.Sandbox, error) {
	return found(s.Store.GetSandbox(ctx, sandbox))
}

// LookupPayer is [Service.Lookup] that also returns whose quota the sandbox counts for:
// that of its team's owner, or of the team if it has none.
func (s *Service) LookupPayer(ctx context.Context, sandbox uuid.UUID) (row db.Sandbox, payer uuid.UUID, err error) {
	r, err := s.Store.GetSandboxPayer(ctx, sandbox)
	row, err = found(r.Sandbox, err)
	return row, r.Payer, err
}

// TeamIs fails with not_found where there is no such team, or it is being deleted.
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

// found is what a query for one sandbox came to.
func found(row db.Sandbox, err error) (db.Sandbox, error) {
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no such sandbox")
	}
	if err != nil {
		return row, fmt.Errorf("look up sandbox: %w", err)
	}
	return row, nil
}
