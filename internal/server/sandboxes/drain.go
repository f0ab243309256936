package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// A host that drains gets no new sandboxes, and those on it that are idle are
// paused: nothing was in flight to them for a while, be it a request to a port
// that lasts, a command that somebody waits for, or a call. That nobody asked
// for the pause is written down with it (drained). So the next use resumes the
// sandbox, whatever its auto_resume says, and one that ends unused after a
// time still ends then, by [Service.ExpireDrained] where its host has no timer
// for it any more.

// Drain pauses a sandbox of a host that drains, unless it was used within the
// time idle after all.
func (s *Service) Drain(ctx context.Context, row db.Sandbox, idle time.Duration) error {
	// Shared with nobody: it may come to nothing, which whoever asks for a pause
	// does not mean.
	_, err := s.turn(ctx, row.ID, "", func() (db.Sandbox, error) { return s.pauseIdle(ctx, row, idle) })
	if errors.Is(err, ErrMoved) || fault.Is(err, fault.Conflict) {
		return nil
	}
	return err
}

// ExpireDrained begins the end of a host's sandboxes that were paused because
// it drains and that nobody has used for their timeout.
func (s *Service) ExpireDrained(ctx context.Context, host uuid.UUID) error {
	ended, err := s.Store.DrainedExpire(ctx, &host)
	if err != nil {
		return fmt.Errorf("end what drained and was not used: %w", err)
	}
	s.Changed(ended...)
	return nil
}
