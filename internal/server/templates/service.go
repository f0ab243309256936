package templates

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/spool"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

// Config configures a [Service].
type Config struct {
	Store     *store.Store
	Hosts     *hosts.Registry
	Sandboxes *sandboxes.Service
	// Spool buffers archives during an upload.
	Spool *spool.Spool
	// Work runs operations that continue after their caller has left.
	Work *work.Group
	Log  *slog.Logger
}

const (
	// captureWithin bounds a capture, which writes memory to disk.
	captureWithin = 10 * time.Minute
	// removeWithin bounds the removal of a template from all its hosts.
	removeWithin = time.Minute
	// shortCall bounds the database calls before the call to a host.
	shortCall = 15 * time.Second
	// lookAgain is how often waiting callers read the database if no notification
	// arrives. replayWithin bounds the wait for a template that no server works on.
	lookAgain    = 2 * time.Second
	replayWithin = 30 * time.Second
)

// Service captures, imports and deletes templates of all teams.
type Service struct {
	*Catalog
	Config

	// mu guards the maps below. It is a leaf lock and is not held during calls to other
	// code. Marking a template never blocks, so it can happen before or during a
	// sandbox's turn.
	mu sync.Mutex
	// working counts the operations of this server on each template.
	working map[uuid.UUID]int
	// importing counts the imports of each owner.
	importing map[uuid.UUID]int
}

// New returns a service on a catalog.
func New(catalog *Catalog, c Config) *Service {
	return &Service{Catalog: catalog, Config: c, working: make(map[uuid.UUID]int), importing: make(map[uuid.UUID]int)}
}

// begin marks a template as busy until end. Call it before the template's row exists, or
// the reconciler takes the row for a dead server's.
func (s *Service) begin(template uuid.UUID) (end func(), err error) {
	over, err := s.Work.Begin()
	if err != nil {
		return nil, err
	}
	s.count(s.working, template, 1)
	return func() {
		s.count(s.working, template, -1)
		over()
	}, nil
}

// beginImport is begin for an import. It fails with conflict if the payer's teams
// together already run maxImports.
func (s *Service) beginImport(payer, template uuid.UUID) (end func(), err error) {
	if s.count(s.importing, payer, 1) > maxImports {
		s.count(s.importing, payer, -1)
		return nil, fault.New(fault.Conflict, "the team and its owner's other teams already import %d images: wait until one is finished", maxImports)
	}
	over, err := s.begin(template)
	if err != nil {
		s.count(s.importing, payer, -1)
		return nil, err
	}
	return func() {
		s.count(s.importing, payer, -1)
		over()
	}, nil
}

// count adds n to an entry and returns the result. It removes entries that are 0.
func (s *Service) count(counts map[uuid.UUID]int, of uuid.UUID, n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	counts[of] += n
	if counts[of] == 0 {
		delete(counts, of)
	}
	return counts[of]
}

// Busy reports whether this server works on the template.
func (s *Service) Busy(template uuid.UUID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.working[template] > 0
}

// The methods below are for package reconcile. All are idempotent and can be late.

// Made marks ready a pending template that no server works on and that its host has.
func (s *Service) Made(ctx context.Context, host uuid.UUID, row db.Template, has *hostagentv1.Template) error {
	var err error
	if isImport(row) {
		_, err = s.imported(ctx, host, row, has)
	} else {
		_, err = s.Store.TemplateReady(ctx, Measured(host, row, has))
	}
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return fmt.Errorf("mark template ready: %w", err)
	}
	return nil
}

// CaptureAgain repeats a capture that a dead server began, or whose host was unreachable.
func (s *Service) CaptureAgain(ctx context.Context, row db.Template) error {
	end, err := s.begin(row.ID)
	if err != nil {
		return err
	}
	defer end()
	err = s.Sandboxes.Alone(ctx, *row.CapturedFrom, func() error {
		is, err := s.Store.GetTemplate(s.Work.Context(), row.ID)
		if errors.Is(err, store.ErrNoRows) || err == nil && is.State != row.State {
			return nil // Somebody else finished it.
		}
		if err == nil {
			_, err = s.capture(ctx, is)
		}
		return err
	})
	if errors.Is(err, sandboxes.ErrMoved) {
		return nil // The sandbox is busy. The reconciler retries.
	}
	return err
}

// GiveUp marks an interrupted import failed.
func (s *Service) GiveUp(ctx context.Context, row db.Template) error {
	end, err := s.begin(row.ID)
	if err != nil {
		return err
	}
	defer end()
	return s.importFails(ctx, row, "the server or the host stopped during the import", row.CreatedAt, true)
}

// RemoveAgain finishes an interrupted deletion.
func (s *Service) RemoveAgain(ctx context.Context, row db.Template) error {
	end, err := s.begin(row.ID)
	if err != nil {
		return err
	}
	defer end()
	return s.remove(ctx, row)
}
