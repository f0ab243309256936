package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// What follows is for package reconcile, which decides when it is called. Each
// may be called twice, and late: the writes name the states that they change.

// What a host says of a sandbox, where it matters here.
const (
	onHostRunning = hostagentv1.SandboxState_SANDBOX_STATE_RUNNING
	onHostPaused  = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED
)

// HostEnded writes that a sandbox of the host ended without being asked to.
func (s *Service) HostEnded(ctx context.Context, host, sandbox uuid.UUID, reason, why string, at time.Time) error {
	_, err := s.Store.SandboxEnded(ctx, db.SandboxEndedParams{ID: sandbox, HostID: &host, EndReason: reason, Error: why, EndedAt: at})
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write that sandbox ended: %w", err)
	}
	s.changed(sandbox)
	s.over(sandbox)
	s.Log.Info("sandbox ended", "sandbox_id", id.Format(id.Sandbox, sandbox), "reason", reason, "error", why)
	return nil
}

// Adopt takes over a sandbox that an earlier server asked for and the host made.
func (s *Service) Adopt(ctx context.Context, row db.Sandbox, has *hostagentv1.Sandbox) error {
	now := store.Now()
	at := between(has.GetCreatedAt().AsTime(), row.CreatedAt, now)
	_, err := s.Store.SandboxRunning(ctx, db.SandboxRunningParams{ID: row.ID, HostID: row.HostID, StartedAt: &at, ExpiresAt: Expiry(row, has, now), DiskMiB: disk(row, has)})
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return fmt.Errorf("take over sandbox: %w", err)
	}
	if err == nil {
		s.changed(row.ID)
		s.Log.Info("took over sandbox that an earlier server began", "sandbox_id", id.Format(id.Sandbox, row.ID))
	}
	if has.State == onHostPaused {
		return s.Settle(ctx, row.ID)
	}
	return nil
}

// Abandon gives up a sandbox that an earlier server asked for and the host does
// not have.
func (s *Service) Abandon(ctx context.Context, row db.Sandbox) error {
	err := s.fail(ctx, row, "the server was restarted while the sandbox started")
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("give up sandbox: %w", err)
	}
	s.changed(row.ID)
	s.Log.Info("gave up sandbox that an earlier server began", "sandbox_id", id.Format(id.Sandbox, row.ID))
	return nil
}

// Found writes that a sandbox whose host is back is as it was.
func (s *Service) Found(ctx context.Context, row db.Sandbox, has *hostagentv1.Sandbox) error {
	_, err := s.Store.SandboxFound(ctx, db.SandboxFoundParams{ID: row.ID, HostID: row.HostID, ExpiresAt: Expiry(row, has, store.Now())})
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write that sandbox is back: %w", err)
	}
	s.changed(row.ID)
	s.Log.Info("sandbox is back", "sandbox_id", id.Format(id.Sandbox, row.ID))
	return nil
}

// Unasked says whether the row is of a sandbox that its host ended or lost, so
// that the host may have it again: an operator can repair files that the agent
// could not read.
func Unasked(row db.Sandbox) bool {
	return State(row.State) == Stopped && row.EndReason != nil && (*row.EndReason == "exited" || *row.EndReason == "lost")
}

// Revive writes that a sandbox which its host had ended or lost is paused there.
func (s *Service) Revive(ctx context.Context, row db.Sandbox, has *hostagentv1.Sandbox) error {
	_, err := s.Store.SandboxRevived(ctx, db.SandboxRevivedParams{ID: row.ID, HostID: row.HostID, PausedAt: pausedAt(row, has)})
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write that sandbox is paused after all: %w", err)
	}
	s.changed(row.ID)
	s.Log.Warn("the host has a sandbox again that had ended", "sandbox_id", id.Format(id.Sandbox, row.ID))
	return nil
}

// Settle asks the sandbox's host which state it has it in, and writes that. It
// is for what the host did by itself, or what a dead server, or a lost host,
// left in transit. Nobody must be at work on it.
func (s *Service) Settle(ctx context.Context, sandbox uuid.UUID) error {
	err := s.settleFrom(ctx, sandbox, false, Running, Missing, Pausing, Paused, Resuming)
	if fault.Is(err, fault.NotFound) {
		return nil // It has ended: of that there is other news.
	}
	return err
}

// StopAgain finishes a deletion that was begun.
func (s *Service) StopAgain(ctx context.Context, row db.Sandbox) error {
	end, err := s.beginDeletion(row.ID)
	if err != nil {
		return err
	}
	defer end()
	return s.stop(ctx, row, "")
}

// DestroyStray destroys a sandbox on a host on which no row owns it.
func (s *Service) DestroyStray(ctx context.Context, sandbox uuid.UUID, host *hosts.Host) error {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, sandbox), "host", host.URL)
	log.Warn("destroy sandbox that is nobody's")
	return s.destroy(ctx, sandbox, host, log)
}
