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
	// settleWithin is how long callers wait for a sandbox in transit that this
	// process is not at work on.
	settleWithin = 30 * time.Second
	// askEvery is how often a host is asked that is at work on a sandbox by
	// itself: that a pause failed is no event.
	askEvery = 250 * time.Millisecond
)

// stateHeader is where a host says in which state the sandbox is that it
// refuses to use.
const stateHeader = "Wrenn-Sandbox-State"

// wait returns ErrMoved when a sandbox in transit may have settled. What this
// process does about it is waited for to its end, and shared where it leads to
// the same; what others do until the deadline.
func (s *Service) wait(ctx context.Context, row db.Sandbox, to State, deadline time.Time) (db.Sandbox, error) {
	changed, stop := s.watch(row.ID)
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

// Pause writes a team's running sandbox to its host's disk and returns when it
// is there. It goes on when ctx ends before. Pausing a paused sandbox is none.
func (s *Service) Pause(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	deadline := time.Now().Add(settleWithin)
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

// Resume lets a team's paused sandbox go on and returns when it runs. It goes
// on when ctx ends before. Resuming a running sandbox is none.
func (s *Service) Resume(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	row, err := s.Get(ctx, team, sandbox)
	if err != nil {
		return row, err
	}
	return s.wake(ctx, row, true)
}

// wake returns the sandbox when it runs. Where it is paused it is resumed, if
// it is one that calls and requests resume, or if that was asked for.
func (s *Service) wake(ctx context.Context, row db.Sandbox, asked bool) (db.Sandbox, error) {
	sandbox, deadline := row.ID, time.Now().Add(settleWithin)
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

// mark writes the state that leads to another one, before a host is asked.
func (s *Service) mark(ctx context.Context, sandbox uuid.UUID, write func(context.Context, uuid.UUID) (db.Sandbox, error)) error {
	ctx, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	_, err := write(ctx, sandbox)
	if errors.Is(err, store.ErrNoRows) {
		return ErrMoved
	}
	if err != nil {
		return fmt.Errorf("write sandbox's state: %w", err)
	}
	s.changed(sandbox)
	return nil
}

// pause has the host pause a running sandbox and writes down how that went.
func (s *Service) pause(ctx context.Context, row db.Sandbox) (db.Sandbox, error) {
	return s.pauseIdle(ctx, row, 0)
}

// pauseIdle is pause for a sandbox that drains: it is paused if its host still
// drains and nothing has used it for the time idle. idle 0: in any case.
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

// resume has the host resume a paused sandbox and writes down how that went.
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

// turnFailed undoes what was marked where it is certain that the host did not
// do what it was asked for, and leaves it to the reconciler where it is not.
// It returns what the caller is told.
func (s *Service) turnFailed(doing string, err error, log *slog.Logger, undo func(context.Context) error) error {
	if s.Work.Context().Err() != nil {
		// The row stays as it is, the next server looks.
		return fault.New(fault.Unavailable, "the server is stopping")
	}
	if connect.CodeOf(err) == connect.CodeAborted {
		log.Info(doing+" sandbox", "error", err) // It is in use after all.
	} else {
		log.Error(doing+" sandbox", "error", err)
	}
	if hosts.Definite(err) {
		if err := work.Persist(s.Work.Context(), undo); err != nil && !errors.Is(err, store.ErrNoRows) {
			log.Error("write that sandbox is as before", "error", err)
		}
	}
	return hosts.FaultIn(doing, err)
}

// turnLost is what the caller is told when what happened could not be written.
func (s *Service) turnLost(doing string, err error, log *slog.Logger) error {
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.Conflict, "the sandbox ended meanwhile")
	}
	log.Error("write how it went to "+doing+" sandbox", "error", err)
	return err
}

// held says whether a host refuses to use a sandbox because of its state.
func held(err error) bool {
	var e *connect.Error
	return errors.As(err, &e) && e.Code() == connect.CodeFailedPrecondition && e.Meta().Get(stateHeader) != ""
}
