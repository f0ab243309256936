package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

// Delete destroys a team's sandbox and returns when nothing of it is left. The end of ctx
// does not stop it. If the host is unreachable, reconciliation finishes the deletion
// later. by names who asked for it, such as "user usr-…".
func (s *Service) Delete(ctx context.Context, team, sandbox uuid.UUID, by string) error {
	row, err := s.Get(ctx, team, sandbox)
	if err != nil || State(row.State).Ended() {
		return err
	}
	return s.End(ctx, row, by)
}

// End is [Service.Delete] for any sandbox that has not ended.
func (s *Service) End(ctx context.Context, row db.Sandbox, by string) error {
	end, err := s.beginDeletion(row.ID)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer end()
		done <- s.Work.Guard(func() error { return s.stop(s.Work.For(ctx), row, by) })
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stop marks the sandbox stopping, destroys it on its host, and marks it stopped.
func (s *Service) stop(ctx context.Context, row db.Sandbox, by string) error {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, row.ID))
	err := work.Persist(ctx, func(ctx context.Context) error {
		_, err := s.Store.SandboxStopping(ctx, db.SandboxStoppingParams{ID: row.ID, EndedBy: by})
		return err
	})
	if errors.Is(err, store.ErrNoRows) {
		return nil // It has ended already.
	}
	if err != nil {
		return fmt.Errorf("mark sandbox stopping: %w", err)
	}
	s.changed(row.ID)
	if row.HostID != nil {
		host, err := s.Hosts.Get(row.HostID)
		if err != nil {
			return err
		}
		if err := s.destroy(ctx, row.ID, host, log); err != nil {
			return hosts.Fault(err)
		}
	}
	err = work.Persist(ctx, func(ctx context.Context) error {
		_, err := s.Store.SandboxStopped(ctx, row.ID)
		return err
	})
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return fmt.Errorf("mark sandbox stopped: %w", err)
	}
	s.changed(row.ID)
	s.notifyEnded(row.ID)
	log.Info("sandbox deleted")
	return nil
}

// notifyEnded calls Config.Ended in the background, to delete what is stored outside the
// database. Whatever that misses expires.
func (s *Service) notifyEnded(sandbox uuid.UUID) {
	if s.Ended == nil {
		return
	}
	end, err := s.Work.Begin()
	if err != nil {
		return
	}
	go func() {
		defer end()
		ctx, cancel := context.WithTimeout(s.Work.Context(), 2*time.Second)
		defer cancel()
		if err := s.Ended(ctx, sandbox); err != nil {
			s.Log.Debug("delete data of an ended sandbox", "sandbox_id", id.Format(id.Sandbox, sandbox), "error", err)
		}
	}()
}

// destroy destroys a sandbox on a host. If that fails, it logs the error, and
// reconciliation tries again.
func (s *Service) destroy(ctx context.Context, sandbox uuid.UUID, host *hosts.Host, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, destroyTimeout)
	defer cancel()
	_, err := host.Agent.Destroy(ctx, connect.NewRequest(&hostagentv1.DestroyRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
	if connect.CodeOf(err) == connect.CodeNotFound && connect.IsWireError(err) {
		err = nil
	}
	if err != nil {
		log.Error("destroy sandbox", "error", err)
	}
	return err
}
