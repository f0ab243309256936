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

// A draining host gets no new sandboxes and pauses idle ones: those without a request to
// a port, a command or a call in flight for a while. The pause is recorded as not
// requested (drained). So the next use resumes the sandbox even without auto_resume. The
// sandbox's timeout still applies; if its host no longer has a timer for it,
// [Service.ExpireDrained] ends it.

// Drain pauses a sandbox of a draining host, unless it was used within the last idle.
func (s *Service) Drain(ctx context.Context, row db.Sandbox, idle time.Duration) error {
	// Do not share this turn: it may do nothing, and a caller of Pause needs a pause.
	_, err := s.turn(ctx, row.ID, "", func() (db.Sandbox, error) { return s.pauseIdle(ctx, row, idle) })
	if errors.Is(err, ErrMoved) || fault.Is(err, fault.Conflict) {
		return nil
	}
	return err
}

// ExpireDrained marks stopping the host's drained sandboxes that nobody has used for
// their timeout.
func (s *Service) ExpireDrained(ctx context.Context, host uuid.UUID) error {
	ended, err := s.Store.DrainedExpire(ctx, &host)
	if err != nil {
		return fmt.Errorf("expire drained sandboxes: %w", err)
	}
	s.Changed(ended...)
	return nil
}
