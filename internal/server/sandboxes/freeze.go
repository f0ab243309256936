package sandboxes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
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

// turn is what this process does to one sandbox: there is one at a time.
type turn struct {
	// to is the state that it leads to, or "" where nobody can share it.
	to   State
	done chan struct{}
	// row and err are set before done is closed.
	row db.Sandbox
	err error
}

// settling is the turn that finds out which state a sandbox is in.
const settling State = "settling"

// errMoved is why nothing was done: the sandbox is in another state than was
// thought, and whoever asked must look again.
var errMoved = errors.New("the sandbox is in another state by now")

// turn has f lead the sandbox to a state, on a goroutine of the service's own,
// and returns how that went. Whoever wants the same meanwhile shares it;
// whoever wants something else gets errMoved when it is over.
func (s *Service) turn(ctx context.Context, sandbox uuid.UUID, to State, f func() (db.Sandbox, error)) (db.Sandbox, error) {
	s.mu.Lock()
	m, taken := s.turns[sandbox]
	if !taken {
		if s.closed {
			s.mu.Unlock()
			return db.Sandbox{}, fault.New(fault.Unavailable, "the server is stopping")
		}
		m = &turn{to: to, done: make(chan struct{})}
		s.turns[sandbox] = m
		s.work.Add(1)
	}
	s.mu.Unlock()
	if !taken {
		go func() {
			defer s.finish(func() {
				delete(s.turns, sandbox)
				close(m.done)
			})
			m.err = fault.Guard(s.Log, func() (err error) {
				m.row, err = f()
				return err
			})
		}()
	} else {
		defer s.metrics.wait()()
	}
	select {
	case <-m.done:
	case <-ctx.Done():
		return db.Sandbox{}, ctx.Err()
	}
	if taken && (to == "" || m.to != to) {
		return db.Sandbox{}, errMoved
	}
	return m.row, m.err
}

// current is what this process does to the sandbox, or nil.
func (s *Service) current(sandbox uuid.UUID) *turn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.turns[sandbox]
}

// wait returns errMoved when a sandbox in transit may have settled. What this
// process does about it is waited for to its end, and shared where it leads to
// the same; what others do until the deadline.
func (s *Service) wait(ctx context.Context, row db.Sandbox, to State, deadline time.Time) (db.Sandbox, error) {
	defer s.metrics.wait()()
	change := s.change(row.ID)
	if m := s.current(row.ID); m != nil {
		select {
		case <-m.done:
		case <-ctx.Done():
			return row, ctx.Err()
		}
		if m.to == to {
			return m.row, m.err
		}
		return row, errMoved
	}
	if is, err := s.Lookup(ctx, row.ID); err != nil || is.State != row.State {
		return row, cmp.Or(err, errMoved)
	}
	if time.Now().After(deadline) {
		return row, fault.New(fault.Conflict, "the sandbox is %s", row.State)
	}
	return row, cmp.Or(lookAgainAfter(ctx, change, lookAgain), errMoved)
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
			row, err = s.turn(ctx, sandbox, Paused, func() (db.Sandbox, error) { return s.pause(row) })
		case Pausing, Resuming:
			row, err = s.wait(ctx, row, Paused, deadline)
		default:
			return row, notRunning(row)
		}
		if !errors.Is(err, errMoved) {
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
			row, err = s.turn(ctx, sandbox, Running, func() (db.Sandbox, error) { return s.resume(was) })
		case Pausing, Resuming:
			if !asked && !row.AutoResume && !row.Drained && row.State == string(Pausing) {
				return row, notRunning(row)
			}
			row, err = s.wait(ctx, row, Running, deadline)
		default:
			return row, notRunning(row)
		}
		if !errors.Is(err, errMoved) {
			return row, err
		}
		if row, err = s.Lookup(ctx, sandbox); err != nil {
			return row, err
		}
	}
}

// mark writes the state that leads to another one, before a host is asked.
func (s *Service) mark(sandbox uuid.UUID, write func(context.Context, uuid.UUID) (db.Sandbox, error)) error {
	ctx, cancel := context.WithTimeout(s.ctx, shortCall)
	defer cancel()
	_, err := write(ctx, sandbox)
	if errors.Is(err, store.ErrNoRows) {
		return errMoved
	}
	if err != nil {
		return fmt.Errorf("write sandbox's state: %w", err)
	}
	s.changed(sandbox)
	return nil
}

// pause has the host pause a running sandbox and writes down how that went.
func (s *Service) pause(row db.Sandbox) (db.Sandbox, error) {
	return s.pauseIdle(row, 0)
}

// pauseIdle is pause for a sandbox that drains: it is paused if its host still
// drains and nothing has used it for the time idle. idle 0: in any case.
func (s *Service) pauseIdle(row db.Sandbox, idle time.Duration) (db.Sandbox, error) {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, row.ID))
	host, err := s.Hosts.Get(row.HostID)
	if err != nil {
		return row, err
	}
	mark, ask := s.Store.SandboxPausing, &hostagentv1.PauseRequest{SandboxId: id.Format(id.Sandbox, row.ID)}
	if idle > 0 {
		mark, ask.Idle = s.Store.SandboxDrains, durationpb.New(idle)
	}
	if err := s.mark(row.ID, mark); err != nil {
		return row, err
	}
	defer s.changed(row.ID)
	ctx, cancel := context.WithTimeout(s.ctx, pauseTimeout)
	defer cancel()
	begun := time.Now()
	_, err = host.Agent.Pause(ctx, connect.NewRequest(ask))
	if err != nil {
		return row, s.turnFailed("pause", err, log, func(ctx context.Context) error {
			_, err := s.Store.SandboxGoesOn(ctx, db.SandboxGoesOnParams{ID: row.ID, ExpiresAt: row.ExpiresAt})
			return err
		})
	}
	var paused db.Sandbox
	err = s.persist(s.ctx, func(ctx context.Context) error {
		var err error
		paused, err = s.Store.SandboxPaused(ctx, db.SandboxPausedParams{ID: row.ID, PausedAt: now(), CameFrom: []string{string(Pausing)}})
		return err
	})
	if err != nil {
		return row, s.turnLost("pause", err, log)
	}
	log.Info("sandbox paused", "took", time.Since(begun))
	return paused, nil
}

// resume has the host resume a paused sandbox and writes down how that went.
func (s *Service) resume(row db.Sandbox) (db.Sandbox, error) {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, row.ID))
	host, err := s.Hosts.Get(row.HostID)
	if err != nil {
		return row, err
	}
	if err := s.mark(row.ID, s.Store.SandboxResuming); err != nil {
		return row, err
	}
	defer s.changed(row.ID)
	ctx, cancel := context.WithTimeout(s.ctx, resumeTimeout)
	defer cancel()
	begun := time.Now()
	answer, err := host.Agent.Resume(ctx, connect.NewRequest(&hostagentv1.ResumeRequest{SandboxId: id.Format(id.Sandbox, row.ID)}))
	if err != nil {
		return row, s.turnFailed("resume", err, log, func(ctx context.Context) error {
			_, err := s.Store.SandboxPaused(ctx, db.SandboxPausedParams{ID: row.ID, PausedAt: now(), CameFrom: []string{string(Resuming)}})
			return err
		})
	}
	var running db.Sandbox
	err = s.persist(s.ctx, func(ctx context.Context) error {
		var err error
		running, err = s.Store.SandboxGoesOn(ctx, db.SandboxGoesOnParams{ID: row.ID, ExpiresAt: Expiry(answer.Msg.GetSandbox())})
		return err
	})
	if err != nil {
		return row, s.turnLost("resume", err, log)
	}
	log.Info("sandbox resumed", "took", time.Since(begun))
	return running, nil
}

// definite says whether an error of a host means that what was asked for did
// not happen and will not.
func definite(err error) bool {
	if !connect.IsWireError(err) {
		// Without a connection nothing was sent; else the host may have got the
		// call and still be at it.
		var failed *net.OpError
		return errors.As(err, &failed) && failed.Op == "dial"
	}
	switch connect.CodeOf(err) {
	case connect.CodeCanceled, connect.CodeDeadlineExceeded:
		return false
	}
	return true
}

// turnFailed undoes what was marked where it is certain that the host did not
// do what it was asked for, and leaves it to the reconciler where it is not.
// It returns what the caller is told.
func (s *Service) turnFailed(doing string, err error, log *slog.Logger, undo func(context.Context) error) error {
	if s.ctx.Err() != nil {
		// The row stays as it is, the next server looks.
		return fault.New(fault.Unavailable, "the server is stopping")
	}
	if connect.CodeOf(err) == connect.CodeAborted {
		log.Info(doing+" sandbox", "error", err) // It is in use after all.
	} else {
		log.Error(doing+" sandbox", "error", err)
	}
	if definite(err) {
		if err := s.persist(s.ctx, undo); err != nil && !errors.Is(err, store.ErrNoRows) {
			log.Error("write that sandbox is as before", "error", err)
		}
	}
	return hostFault(doing, err)
}

// hostFault is hosts.Fault for what a host does with a whole sandbox.
func hostFault(doing string, err error) error {
	told := hosts.Fault(err)
	switch {
	case fault.Is(told, fault.Internal):
		return fault.Because(err, fault.Internal, "the host could not %s the sandbox", doing)
	case fault.Is(told, fault.NoCapacity) && doing != "resume" && doing != "fork":
		var e *connect.Error
		errors.As(err, &e)
		return fault.Because(err, fault.NoSpace, "the host could not %s the sandbox: %s", doing, e.Message())
	}
	return told
}

// turnLost is what the caller is told when what happened could not be written.
func (s *Service) turnLost(doing string, err error, log *slog.Logger) error {
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.Conflict, "the sandbox ended meanwhile")
	}
	log.Error("write how it went to "+doing+" sandbox", "error", err)
	return err
}

// settle writes down which state the host has a sandbox in, where the host
// brought it there by itself. With wait, a sandbox that the host is at work on
// is waited for.
func (s *Service) settle(ctx context.Context, sandbox uuid.UUID, wait bool) error {
	return s.settleFrom(ctx, sandbox, wait, Running, Missing)
}

func (s *Service) settleFrom(ctx context.Context, sandbox uuid.UUID, wait bool, from ...State) error {
	_, err := s.turn(ctx, sandbox, settling, func() (db.Sandbox, error) {
		ctx, cancel := context.WithTimeout(s.ctx, settleWithin)
		defer cancel()
		for {
			change := s.change(sandbox)
			row, settled, err := s.look(ctx, sandbox, from)
			if settled || err != nil || !wait {
				return row, err
			}
			if lookAgainAfter(ctx, change, askEvery) != nil {
				return row, fault.New(fault.Conflict, "the sandbox is pausing or resuming")
			}
		}
	})
	if errors.Is(err, errMoved) {
		return nil // Whatever that was, it has written what is so.
	}
	return err
}

// look asks the host once and writes down what it says; settled is false
// while the host is at work on the sandbox.
func (s *Service) look(ctx context.Context, sandbox uuid.UUID, from []State) (row db.Sandbox, settled bool, err error) {
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
		// Since when, the host knows: it may have been a while without a server.
		at := now()
		if has.GetPausedAt() != nil && has.GetPausedAt().AsTime().Before(at) {
			at = has.GetPausedAt().AsTime()
		}
		row, err = s.Store.SandboxPaused(ctx, db.SandboxPausedParams{ID: sandbox, PausedAt: at, CameFrom: []string{string(was)}})
	case onHostRunning:
		if was == Running || was == Missing {
			return row, true, nil // Whoever compares the host finds the missing.
		}
		row, err = s.Store.SandboxGoesOn(ctx, db.SandboxGoesOnParams{ID: sandbox, ExpiresAt: Expiry(has)})
	case hostagentv1.SandboxState_SANDBOX_STATE_STOPPING:
		return row, true, nil // Its end is on its way.
	default:
		return row, false, nil
	}
	if errors.Is(err, store.ErrNoRows) {
		return row, false, nil
	}
	if err != nil {
		return row, false, fmt.Errorf("write sandbox's state: %w", err)
	}
	s.changed(sandbox)
	s.Log.Info("the host has the sandbox in another state", "sandbox_id", id.Format(id.Sandbox, sandbox), "was", was, "is", row.State)
	return row, true, nil
}

// held says whether a host refuses to use a sandbox because of its state.
func held(err error) bool {
	var e *connect.Error
	return errors.As(err, &e) && e.Code() == connect.CodeFailedPrecondition && e.Meta().Get(stateHeader) != ""
}

// now is the time as the table keeps it.
func now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }
