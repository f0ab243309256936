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

// The methods below are for package reconcile. All are idempotent and can be late,
// because their writes name the states that they change.

// States on the host that matter here.
const (
	onHostRunning = hostagentv1.SandboxState_SANDBOX_STATE_RUNNING
	onHostPaused  = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED
)

// HostEnded marks stopped a sandbox that ended on the host without a request.
func (s *Service) HostEnded(ctx context.Context, host, sandbox uuid.UUID, reason, why string, at time.Time) error {
	_, err := s.Store.SandboxEnded(ctx, db.SandboxEndedParams{ID: sandbox, HostID: &host, EndReason: reason, Error: why, EndedAt: at})
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("mark sandbox ended: %w", err)
	}
	s.changed(sandbox)
	s.notifyEnded(sandbox)
	s.Log.Info("sandbox ended", "sandbox_id", id.Format(id.Sandbox, sandbox), "reason", reason, "error", why)
	return nil
}

// Adopt marks running a sandbox whose creation a dead server began and the host finished.
func (s *Service) Adopt(ctx context.Context, row db.Sandbox, has *hostagentv1.Sandbox) error {
	now := store.Now()
	at := between(has.GetCreatedAt().AsTime(), row.CreatedAt, now)
	_, err := s.Store.SandboxRunning(ctx, db.SandboxRunningParams{ID: row.ID, HostID: row.HostID, StartedAt: &at, ExpiresAt: Expiry(row, has, now), DiskMiB: disk(row, has)})
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return fmt.Errorf("adopt sandbox: %w", err)
	}
	if err == nil {
		s.changed(row.ID)
		s.Log.Info("adopted a sandbox that a dead server created", "sandbox_id", id.Format(id.Sandbox, row.ID))
	}
	if has.State == onHostPaused {
		return s.Refresh(ctx, row.ID)
	}
	return nil
}

// Abandon marks failed a sandbox whose creation a dead server began and that the host
// does not have.
func (s *Service) Abandon(ctx context.Context, row db.Sandbox) error {
	err := s.fail(ctx, row, "the server was restarted during the sandbox's start")
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("abandon sandbox: %w", err)
	}
	s.changed(row.ID)
	s.Log.Info("abandoned a sandbox that a dead server created", "sandbox_id", id.Format(id.Sandbox, row.ID))
	return nil
}

// Found marks a missing sandbox running, because its host is reachable again.
func (s *Service) Found(ctx context.Context, row db.Sandbox, has *hostagentv1.Sandbox) error {
	_, err := s.Store.SandboxFound(ctx, db.SandboxFoundParams{ID: row.ID, HostID: row.HostID, ExpiresAt: Expiry(row, has, store.Now())})
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("mark sandbox found: %w", err)
	}
	s.changed(row.ID)
	s.Log.Info("missing sandbox found", "sandbox_id", id.Format(id.Sandbox, row.ID))
	return nil
}

// MayRevive reports whether a sandbox ended without a request, by its host or because the
// host lost it. An operator can repair such a sandbox's files, after which the host has
// it again.
func MayRevive(row db.Sandbox) bool {
	return State(row.State) == Stopped && row.EndReason != nil && (*row.EndReason == "exited" || *row.EndReason == "lost")
}

// Revive marks paused a sandbox that its host had ended or lost and now has again.
func (s *Service) Revive(ctx context.Context, row db.Sandbox, has *hostagentv1.Sandbox) error {
	_, err := s.Store.SandboxRevived(ctx, db.SandboxRevivedParams{ID: row.ID, HostID: row.HostID, PausedAt: pausedAt(row, has)})
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("revive sandbox: %w", err)
	}
	s.changed(row.ID)
	s.Log.Warn("revived an ended sandbox that its host has again", "sandbox_id", id.Format(id.Sandbox, row.ID))
	return nil
}

// Refresh asks the host for the sandbox's state and stores it: after the host changed it
// by itself, or a dead server or an unreachable host left the sandbox in transit. Nobody
// else may work on the sandbox.
func (s *Service) Refresh(ctx context.Context, sandbox uuid.UUID) error {
	err := s.refreshFrom(ctx, sandbox, false, Running, Missing, Pausing, Paused, Resuming)
	if fault.Is(err, fault.NotFound) {
		return nil // It has ended, which the host reports as an event.
	}
	return err
}

// StopAgain finishes an interrupted deletion.
func (s *Service) StopAgain(ctx context.Context, row db.Sandbox) error {
	end, err := s.beginDeletion(row.ID)
	if err != nil {
		return err
	}
	defer end()
	return s.stop(ctx, row, "")
}

// DestroyStray destroys an orphan: a sandbox on a host where no row owns it.
func (s *Service) DestroyStray(ctx context.Context, sandbox uuid.UUID, host *hosts.Host) error {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, sandbox), "host", host.URL)
	log.Warn("destroying orphaned sandbox")
	return s.destroy(ctx, sandbox, host, log)
}
