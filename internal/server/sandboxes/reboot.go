package sandboxes

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

// rebooting is the target of a turn that reboots a sandbox. During it, the sandbox's row
// has the state resuming.
const rebooting State = "rebooting"

// Reboot starts a team's running or paused sandbox from its disk, without its memory, and
// returns when it runs. The end of ctx does not stop it, and concurrent calls share it.
// After a failure, the sandbox runs as before, or is paused without its memory.
func (s *Service) Reboot(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	deadline := time.Now().Add(transitTimeout)
	for {
		row, err := s.Get(ctx, team, sandbox)
		if err != nil {
			return row, err
		}
		switch was := row; State(row.State) {
		case Running, Paused:
			row, err = s.turn(ctx, sandbox, rebooting, func() (db.Sandbox, error) { return s.reboot(ctx, was) })
		case Pausing, Resuming:
			row, err = s.wait(ctx, row, rebooting, deadline)
		default:
			return row, notRunning(row)
		}
		if !errors.Is(err, ErrMoved) {
			return row, err
		}
	}
}

func (s *Service) reboot(ctx context.Context, row db.Sandbox) (db.Sandbox, error) {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, row.ID))
	host, err := s.Hosts.Get(row.HostID)
	if err != nil {
		return row, err
	}
	if err := s.step(s.Work.For(ctx), "reboot", stepMark, func(ctx context.Context) error { return s.mark(ctx, row.ID, s.Store.SandboxRebooting) }); err != nil {
		return row, err
	}
	defer s.changed(row.ID)
	ctx, cancel := context.WithTimeout(s.Work.For(ctx), resumeTimeout)
	defer cancel()
	begun := time.Now()
	var answer *connect.Response[hostagentv1.RebootResponse]
	err = s.step(ctx, "reboot", stepHost, func(ctx context.Context) (err error) {
		answer, err = host.Agent.Reboot(ctx, connect.NewRequest(&hostagentv1.RebootRequest{SandboxId: id.Format(id.Sandbox, row.ID)}))
		return err
	})
	if err != nil {
		return row, s.turnFailed("reboot", err, log, func(ctx context.Context) error {
			// Only the host knows whether the sandbox has lost its memory.
			_, _, err := s.look(ctx, row.ID, []State{Resuming})
			return err
		})
	}
	var running db.Sandbox
	err = s.step(s.Work.For(ctx), "reboot", stepWrite, func(ctx context.Context) error {
		return work.Persist(ctx, func(ctx context.Context) (err error) {
			running, err = s.Store.SandboxGoesOn(ctx, db.SandboxGoesOnParams{ID: row.ID, HostID: row.HostID, ExpiresAt: Expiry(row, answer.Msg.GetSandbox(), store.Now())})
			return err
		})
	})
	if err != nil {
		return row, s.turnLost("reboot", err, log)
	}
	log.Info("sandbox rebooted", "took", time.Since(begun))
	return running, nil
}

// WriteConditions stores the conditions that a host reports for running sandboxes.
func (s *Service) WriteConditions(ctx context.Context, p db.SandboxesConditionParams) error {
	changed, err := s.Store.SandboxesCondition(ctx, p)
	if err != nil {
		return err
	}
	s.Changed(changed...)
	return nil
}
