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

// Config is what a Service works with.
type Config struct {
	Store     *store.Store
	Hosts     *hosts.Registry
	Sandboxes *sandboxes.Service
	// Spool holds archives that are being uploaded.
	Spool *spool.Spool
	// Work runs what was asked for.
	Work *work.Group
	Log  *slog.Logger
}

const (
	// captureWithin bounds a capture, which writes memory to disk.
	captureWithin = 10 * time.Minute
	// removeWithin bounds the removal of a template from all its hosts.
	removeWithin = time.Minute
	// shortCall bounds what the database is asked before a host is.
	shortCall = 15 * time.Second
	// lookAgain is how long another server's word is waited for before the table
	// is looked at all the same, and replayWithin how long in all for a template
	// that nobody is at work on.
	lookAgain    = 2 * time.Second
	replayWithin = 30 * time.Second
)

// Service is the life of every team's templates: how they are captured, imported
// and removed.
type Service struct {
	*Catalog
	Config

	// mu guards the maps, and is held for no call of anything else. A template is
	// marked before a sandbox's turn is taken, or in one, but marks wait for
	// nothing.
	mu sync.Mutex
	// working counts what this server does to a template.
	working map[uuid.UUID]int
	// importing counts the images that it imports for each team.
	importing map[uuid.UUID]int
}

// New returns the life of the templates of a catalog.
func New(catalog *Catalog, c Config) *Service {
	return &Service{Catalog: catalog, Config: c, working: make(map[uuid.UUID]int), importing: make(map[uuid.UUID]int)}
}

// begin marks a template as worked on until end. Call it before the template's
// row is there, or the controller would take it for a dead server's.
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
// together already have maxImports under way.
func (s *Service) beginImport(payer, template uuid.UUID) (end func(), err error) {
	if s.count(s.importing, payer, 1) > maxImports {
		s.count(s.importing, payer, -1)
		return nil, fault.New(fault.Conflict, "the team, and its owner's other teams, import %d images at this moment: wait for one of them", maxImports)
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

// count adds to a count, which is there while it is not 0, and returns it.
func (s *Service) count(counts map[uuid.UUID]int, of uuid.UUID, n int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	counts[of] += n
	if counts[of] == 0 {
		delete(counts, of)
	}
	return counts[of]
}

// Busy says whether this server makes or removes the template.
func (s *Service) Busy(template uuid.UUID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.working[template] > 0
}

// What follows is for package reconcile, which decides when it is called. Each
// may be called twice, and late: what was done changes nothing.

// Made writes that a pending template, which nobody works on any more, is there
// after all.
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

// CaptureAgain finishes a capture that an earlier server, or one that lost the
// host, began.
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
		return nil // It is something else's turn; this comes up again.
	}
	return err
}

// GiveUp writes that an import failed which broke off.
func (s *Service) GiveUp(ctx context.Context, row db.Template) error {
	end, err := s.begin(row.ID)
	if err != nil {
		return err
	}
	defer end()
	return s.importFails(ctx, row, "the server or the host that was at it went away", row.CreatedAt, true)
}

// RemoveAgain finishes a removal.
func (s *Service) RemoveAgain(ctx context.Context, row db.Template) error {
	end, err := s.begin(row.ID)
	if err != nil {
		return err
	}
	defer end()
	return s.remove(ctx, row)
}
