package sandboxes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

const (
	// pauseTimeout bounds pauses and snapshots, which write memory to disk.
	pauseTimeout  = 10 * time.Minute
	resumeTimeout = 2 * time.Minute
	// transitTimeout is how long callers wait for a sandbox in transit that another server
	// works on.
	transitTimeout = 30 * time.Second
	// askEvery is how often this server polls a host that pauses or resumes a sandbox by
	// itself, because a host reports no event for a failed pause.
	askEvery = 250 * time.Millisecond
)

// wait returns ErrMoved when a sandbox in transit may have reached another state. It
// waits for this server's turn without a limit, and shares the result if the target is
// the same. It waits for other servers until the deadline.
func (s *Service) wait(ctx context.Context, row db.Sandbox, to State, deadline time.Time) (db.Sandbox, error) {
	changed, stop := s.subscribe(row.ID)
	defer stop()
	if t := s.current(row.ID); t != nil {
		return s.share(ctx, t, to)
	}
	defer s.metrics.wait()()
	if is, err := s.Lookup(ctx, row.ID); err != nil || is.State != row.State {
		return row, cmp.Or(err, ErrMoved)
	}
	if time.Now().After(deadline) {
		return row, fault.New(fault.Conflict, "the sandbox is %s", row.State)
	}
	return row, cmp.Or(waitFor(ctx, changed, lookAgain), ErrMoved)
}

// Pause saves a team's running sandbox on its host's disk and returns when that is done.
// The end of ctx does not stop it. Pausing a paused sandbox does nothing.
func (s *Service) Pause(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	deadline := time.Now().Add(transitTimeout)
	for {
		row, err := s.Get(ctx, team, sandbox)
		if err != nil {
			return row, err
		}
		switch State(row.State) {
		case Paused:
			if !row.Drained {
				return row, nil
			}
			if row, err = s.Store.SandboxStaysPaused(ctx, sandbox); errors.Is(err, store.ErrNoRows) {
				continue
			}
			return row, err
		case Running:
			row, err = s.turn(ctx, sandbox, Paused, func() (db.Sandbox, error) { return s.pause(ctx, row) })
		case Pausing, Resuming:
			row, err = s.wait(ctx, row, Paused, deadline)
		default:
			return row, notRunning(row)
		}
		if !errors.Is(err, ErrMoved) {
			return row, err
		}
	}
}

// Resume resumes a team's paused sandbox and returns when it runs. The end of ctx does
// not stop it. Resuming a running sandbox does nothing.
func (s *Service) Resume(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	row, err := s.Get(ctx, team, sandbox)
	if err != nil {
		return row, err
	}
	return s.wake(ctx, row, true)
}

// wake returns the sandbox when it runs. It resumes a paused sandbox if the caller asked
// for that, or if calls and requests may resume it.
func (s *Service) wake(ctx context.Context, row db.Sandbox, asked bool) (db.Sandbox, error) {
	sandbox, deadline := row.ID, time.Now().Add(transitTimeout)
	for {
		var err error
		switch was := row; State(row.State) {
		case Running:
			return row, nil
		case Paused:
			if !asked && !row.AutoResume && !row.Drained {
				return row, notRunning(row)
			}
			row, err = s.turn(ctx, sandbox, Running, func() (db.Sandbox, error) { return s.resume(ctx, was) })
		case Pausing, Resuming:
			if !asked && !row.AutoResume && !row.Drained && row.State == string(Pausing) {
				return row, notRunning(row)
			}
			row, err = s.wait(ctx, row, Running, deadline)
		default:
			return row, notRunning(row)
		}
		if !errors.Is(err, ErrMoved) {
			return row, err
		}
		if row, err = s.Lookup(ctx, sandbox); err != nil {
			return row, err
		}
	}
}

// mark stores the intermediate state before the call to the host.
func (s *Service) mark(ctx context.Context, sandbox uuid.UUID, write func(context.Context, uuid.UUID) (db.Sandbox, error)) error {
	ctx, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	_, err := write(ctx, sandbox)
	if errors.Is(err, store.ErrNoRows) {
		return ErrMoved
	}
	if err != nil {
		return fmt.Errorf("update sandbox's state: %w", err)
	}
	s.changed(sandbox)
	return nil
}

// pause makes the host pause a running sandbox and stores the result.
func (s *Service) pause(ctx context.Context, row db.Sandbox) (db.Sandbox, error) {
	return s.pauseIdle(ctx, row, 0)
}

// pauseIdle is pause for a draining sandbox. It pauses the sandbox only if its host still
// drains and the sandbox was idle for that long. idle 0: always.
func (s *Service) pauseIdle(ctx context.Context, row db.Sandbox, idle time.Duration) (db.Sandbox, error) {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, row.ID))
	host, err := s.Hosts.Get(row.HostID)
	if err != nil {
		return row, err
	}
	mark, ask := s.Store.SandboxPausing, &hostagentv1.PauseRequest{SandboxId: id.Format(id.Sandbox, row.ID)}
	if idle > 0 {
		mark, ask.Idle = s.Store.SandboxDrains, durationpb.New(idle)
	}
	if err := s.step(s.Work.For(ctx), "pause", stepMark, func(ctx context.Context) error { return s.mark(ctx, row.ID, mark) }); err != nil {
		return row, err
	}
	defer s.changed(row.ID)
	ctx, cancel := context.WithTimeout(s.Work.For(ctx), pauseTimeout)
	defer cancel()
	begun := time.Now()
	err = s.step(ctx, "pause", stepHost, func(ctx context.Context) error {
		_, err := host.Agent.Pause(ctx, connect.NewRequest(ask))
		return err
	})
	if err != nil {
		return row, s.turnFailed("pause", err, log, func(ctx context.Context) error {
			_, err := s.Store.SandboxGoesOn(ctx, db.SandboxGoesOnParams{ID: row.ID, HostID: row.HostID, ExpiresAt: row.ExpiresAt})
			return err
		})
	}
	var paused db.Sandbox
	err = s.step(s.Work.For(ctx), "pause", stepWrite, func(ctx context.Context) error {
		return work.Persist(ctx, func(ctx context.Context) (err error) {
			paused, err = s.Store.SandboxPaused(ctx, db.SandboxPausedParams{ID: row.ID, HostID: row.HostID, PausedAt: store.Now(), CameFrom: []string{string(Pausing)}})
			return err
		})
	})
	if err != nil {
		return row, s.turnLost("pause", err, log)
	}
	log.Info("sandbox paused", "took", time.Since(begun))
	return paused, nil
}

// resume makes the host resume a paused sandbox and stores the result.
func (s *Service) resume(ctx context.Context, row db.Sandbox) (db.Sandbox, error) {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, row.ID))
	host, err := s.Hosts.Get(row.HostID)
	if err != nil {
		return row, err
	}
	if err := s.step(s.Work.For(ctx), "resume", stepMark, func(ctx context.Context) error { return s.mark(ctx, row.ID, s.Store.SandboxResuming) }); err != nil {
		return row, err
	}
	defer s.changed(row.ID)
	ctx, cancel := context.WithTimeout(s.Work.For(ctx), resumeTimeout)
	defer cancel()
	begun := time.Now()
	var answer *connect.Response[hostagentv1.ResumeResponse]
	err = s.step(ctx, "resume", stepHost, func(ctx context.Context) (err error) {
		answer, err = host.Agent.Resume(ctx, connect.NewRequest(&hostagentv1.ResumeRequest{SandboxId: id.Format(id.Sandbox, row.ID)}))
		return err
	})
	if err != nil {
		return row, s.turnFailed("resume", err, log, func(ctx context.Context) error {
			_, err := s.Store.SandboxPaused(ctx, db.SandboxPausedParams{ID: row.ID, HostID: row.HostID, PausedAt: store.Now(), CameFrom: []string{string(Resuming)}})
			return err
		})
	}
	var running db.Sandbox
	err = s.step(s.Work.For(ctx), "resume", stepWrite, func(ctx context.Context) error {
		return work.Persist(ctx, func(ctx context.Context) (err error) {
			running, err = s.Store.SandboxGoesOn(ctx, db.SandboxGoesOnParams{ID: row.ID, HostID: row.HostID, ExpiresAt: Expiry(row, answer.Msg.GetSandbox(), store.Now())})
			return err
		})
	})
	if err != nil {
		return row, s.turnLost("resume", err, log)
	}
	log.Info("sandbox resumed", "took", time.Since(begun))
	return running, nil
}

// turnFailed restores the previous state if the host certainly did not execute the call.
// Otherwise it leaves the sandbox to the reconciler. It returns the error for the caller.
func (s *Service) turnFailed(doing string, err error, log *slog.Logger, undo func(context.Context) error) error {
	if s.Work.Context().Err() != nil {
		// Leave the row to the next server.
		return fault.New(fault.Unavailable, "the server is stopping")
	}
	if connect.CodeOf(err) == connect.CodeAborted {
		log.Info(doing+" sandbox", "error", err) // The sandbox is in use.
	} else {
		log.Error(doing+" sandbox", "error", err)
	}
	if hosts.Definite(err) {
		if err := work.Persist(s.Work.Context(), undo); err != nil && !errors.Is(err, store.ErrNoRows) {
			log.Error("restore sandbox's state", "error", err)
		}
	}
	return hosts.FaultIn(doing, err)
}

// turnLost returns the error for the caller if the result could not be stored.
func (s *Service) turnLost(doing string, err error, log *slog.Logger) error {
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.Conflict, "the sandbox ended during the call")
	}
	log.Error("store result of call to "+doing+" sandbox", "error", err)
	return err
}

// refusedState reports whether a host refused a call because of the sandbox's state.
func refusedState(err error) bool {
	var e *connect.Error
	return errors.As(err, &e) && e.Code() == connect.CodeFailedPrecondition && e.Meta().Get(hostwire.SandboxState) != ""
}
