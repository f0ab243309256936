package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// refresh asks the host for the state of a running or missing sandbox and stores it,
// because the host may have changed it by itself. With wait, it polls while the host is
// changing it.
func (s *Service) refresh(ctx context.Context, sandbox uuid.UUID, wait bool) error {
	return s.refreshFrom(ctx, sandbox, wait, Running, Missing)
}

func (s *Service) refreshFrom(ctx context.Context, sandbox uuid.UUID, wait bool, from ...State) error {
	_, err := s.turn(ctx, sandbox, refreshing, func() (db.Sandbox, error) {
		ctx, cancel := context.WithTimeout(s.Work.Context(), transitTimeout)
		defer cancel()
		var row db.Sandbox
		err := s.until(ctx, sandbox, askEvery, func() (bool, error) {
			var done bool
			var err error
			row, done, err = s.look(ctx, sandbox, from)
			return done || !wait, err
		})
		if err != nil && ctx.Err() != nil {
			err = fault.New(fault.Conflict, "the sandbox is pausing or resuming")
		}
		return row, err
	})
	if errors.Is(err, ErrMoved) {
		return nil // Another turn has stored the state.
	}
	return err
}

// look asks the host once and stores its answer. done is false while the host is
// changing the state.
func (s *Service) look(ctx context.Context, sandbox uuid.UUID, from []State) (row db.Sandbox, done bool, err error) {
	if row, err = s.Lookup(ctx, sandbox); err != nil {
		return row, false, err
	}
	was := State(row.State)
	if !slices.Contains(from, was) {
		return row, true, nil
	}
	host, err := s.Hosts.Get(row.HostID)
	if err != nil {
		return row, false, err
	}
	ask, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	answer, err := host.Agent.Get(ask, connect.NewRequest(&hostagentv1.GetRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
	if err != nil {
		return row, false, hosts.Fault(err)
	}
	has := answer.Msg.GetSandbox()
	switch has.GetState() {
	case onHostPaused:
		if was == Paused {
			return row, true, nil
		}
		if c := conditionOf(row, has); c.Reason.Kind() == condition.MemoryLost {
			row, err = s.Store.SandboxMemoryLost(ctx, db.SandboxMemoryLostParams{
				ID: sandbox, HostID: row.HostID, PausedAt: pausedAt(row, has), CameFrom: []string{string(was)}, Reason: string(c.Reason), Detail: c.Detail, Since: c.Since,
			})
			break
		}
		row, err = s.Store.SandboxPaused(ctx, db.SandboxPausedParams{ID: sandbox, HostID: row.HostID, PausedAt: pausedAt(row, has), CameFrom: []string{string(was)}})
	case onHostRunning:
		if was == Running || was == Missing {
			return row, true, nil // The reconciler finds missing sandboxes.
		}
		row, err = s.Store.SandboxGoesOn(ctx, db.SandboxGoesOnParams{ID: sandbox, HostID: row.HostID, ExpiresAt: Expiry(row, has, store.Now())})
	case hostagentv1.SandboxState_SANDBOX_STATE_STOPPING:
		return row, true, nil // The host will report its end.
	default:
		return row, false, nil
	}
	if errors.Is(err, store.ErrNoRows) {
		return row, false, nil
	}
	if err != nil {
		return row, false, fmt.Errorf("update sandbox's state: %w", err)
	}
	s.changed(sandbox)
	s.Log.Info("stored the host's state of a sandbox", "sandbox_id", id.Format(id.Sandbox, sandbox), "was", was, "is", row.State)
	return row, true, nil
}
