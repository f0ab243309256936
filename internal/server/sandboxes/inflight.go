package sandboxes

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
)

// activity tracks what this server does to one sandbox now, and who waits for the sandbox to
// change. It exists only while there is either.
//
// Service.mu guards all activities. It is a leaf lock and is not held during I/O or calls to
// other code. A turn lasts as long as its work. The holder of a turn takes no other.
type activity struct {
	// creating is the creation or fork of the sandbox.
	creating *creation
	// deleting counts deletions in progress.
	deleting int
	// turn is the current transition. There is at most one.
	turn *turn
	// changed is closed at the next change of the sandbox's row. waiting counts who waits
	// for that.
	changed chan struct{}
	waiting int
}

// creation is a creation in progress. row and err are set before done is closed.
type creation struct {
	done chan struct{}
	row  db.Sandbox
	err  error
}

// turn is an exclusive transition of a sandbox from one state to another.
type turn struct {
	// to is the target state. Callers that want the same state share the turn; nobody
	// shares it if to is empty.
	to   State
	done chan struct{}
	// row and err are set before done is closed.
	row db.Sandbox
	err error
}

// refreshing is the target of a turn that asks the host for the sandbox's state.
const refreshing State = "refreshing"

// ErrMoved reports that the sandbox has changed its state, so the caller must read it
// again.
var ErrMoved = errors.New("the sandbox has changed its state")

// withActivity calls f with a sandbox's activity under the lock. f may only read and set its
// fields.
func (s *Service) withActivity(sandbox uuid.UUID, f func(*activity)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.activities[sandbox]
	if a == nil {
		a = new(activity)
	}
	f(a)
	if *a == (activity{}) {
		delete(s.activities, sandbox)
	} else {
		s.activities[sandbox] = a
	}
}

// Busy reports whether this server works on the sandbox.
func (s *Service) Busy(sandbox uuid.UUID) (busy bool) {
	s.withActivity(sandbox, func(a *activity) { busy = a.creating != nil || a.deleting > 0 || a.turn != nil })
	return busy
}

// Created returns a channel that is closed when this server has finished creating the
// sandbox; nil if it is not creating it.
func (s *Service) Created(sandbox uuid.UUID) <-chan struct{} {
	if c := s.creation(sandbox); c != nil {
		return c.done
	}
	return nil
}

func (s *Service) creation(sandbox uuid.UUID) (c *creation) {
	s.withActivity(sandbox, func(a *activity) { c = a.creating })
	return c
}

// beginCreation marks sandboxes as being created, before their rows exist. Otherwise the
// reconciler would take the rows for a dead server's. Call end with the results.
func (s *Service) beginCreation(sandboxes ...uuid.UUID) (end func(rows []db.Sandbox, err error), err error) {
	over, err := s.Work.Begin()
	if err != nil {
		return nil, err
	}
	made := make([]*creation, len(sandboxes))
	for i, sandbox := range sandboxes {
		made[i] = &creation{done: make(chan struct{})}
		s.withActivity(sandbox, func(a *activity) { a.creating = made[i] })
	}
	return func(rows []db.Sandbox, err error) {
		defer over()
		for i, sandbox := range sandboxes {
			if made[i].err = err; err == nil {
				made[i].row = rows[i]
			}
			s.withActivity(sandbox, func(a *activity) { a.creating = nil })
			close(made[i].done)
			s.changed(sandbox)
		}
	}, nil
}

// beginDeletion marks a sandbox as being deleted until the call of end.
func (s *Service) beginDeletion(sandbox uuid.UUID) (end func(), err error) {
	over, err := s.Work.Begin()
	if err != nil {
		return nil, err
	}
	s.withActivity(sandbox, func(a *activity) { a.deleting++ })
	return func() {
		s.withActivity(sandbox, func(a *activity) { a.deleting-- })
		over()
	}, nil
}

// turn runs f, which brings the sandbox to a state, in the service's own goroutine, and
// returns its result. Concurrent callers with the same target state share the result.
// Others wait for the end and get ErrMoved.
func (s *Service) turn(ctx context.Context, sandbox uuid.UUID, to State, f func() (db.Sandbox, error)) (db.Sandbox, error) {
	over, err := s.Work.Begin()
	if err != nil {
		return db.Sandbox{}, err
	}
	mine := &turn{to: to, done: make(chan struct{})}
	is := mine
	s.withActivity(sandbox, func(a *activity) {
		if a.turn == nil {
			a.turn = mine
		}
		is = a.turn
	})
	if is != mine {
		over()
		return s.share(ctx, is, to)
	}
	go func() {
		defer over()
		mine.err = s.Work.Guard(func() (err error) {
			mine.row, err = f()
			return err
		})
		s.withActivity(sandbox, func(a *activity) { a.turn = nil })
		close(mine.done)
	}()
	select {
	case <-mine.done:
		return mine.row, mine.err
	case <-ctx.Done():
		return db.Sandbox{}, ctx.Err()
	}
}

// Alone runs f while this server does nothing else to the sandbox. If a turn is in
// progress, it waits for its end and fails with ErrMoved. The end of ctx does not stop f.
func (s *Service) Alone(ctx context.Context, sandbox uuid.UUID, f func() error) error {
	_, err := s.turn(ctx, sandbox, "", func() (db.Sandbox, error) { return db.Sandbox{}, f() })
	return err
}

// AloneWhileStable is [Service.Alone] for a team's running or paused sandbox, which keeps
// its state during f. It waits while the sandbox is pausing or resuming.
func (s *Service) AloneWhileStable(ctx context.Context, team, sandbox uuid.UUID, f func(db.Sandbox) error) error {
	deadline := time.Now().Add(transitTimeout)
	for {
		row, err := s.Get(ctx, team, sandbox)
		if err != nil {
			return err
		}
		switch State(row.State) {
		case Running, Paused:
			err = s.Alone(ctx, sandbox, func() error {
				short, cancel := context.WithTimeout(s.Work.Context(), shortCall)
				defer cancel()
				is, err := s.Lookup(short, sandbox)
				if err != nil || is.State != row.State {
					return cmp.Or(err, ErrMoved)
				}
				return f(is)
			})
		case Pausing, Resuming:
			_, err = s.wait(ctx, row, "", deadline)
		default:
			err = notRunning(row)
		}
		if !errors.Is(err, ErrMoved) {
			return err
		}
	}
}

// share waits for another caller's turn. It returns the result if the turn has the same
// target state, and ErrMoved otherwise.
func (s *Service) share(ctx context.Context, t *turn, to State) (db.Sandbox, error) {
	defer s.metrics.wait()()
	select {
	case <-t.done:
	case <-ctx.Done():
		return db.Sandbox{}, ctx.Err()
	}
	if to == "" || t.to != to {
		return db.Sandbox{}, ErrMoved
	}
	return t.row, t.err
}

// current returns the sandbox's turn, or nil.
func (s *Service) current(sandbox uuid.UUID) (t *turn) {
	s.withActivity(sandbox, func(a *activity) { t = a.turn })
	return t
}

// subscribe returns a channel that is closed at the sandbox's next change. The caller
// must call stop.
func (s *Service) subscribe(sandbox uuid.UUID) (changed <-chan struct{}, stop func()) {
	s.withActivity(sandbox, func(a *activity) {
		if a.changed == nil {
			a.changed = make(chan struct{})
		}
		a.waiting++
		changed = a.changed
	})
	return changed, func() {
		s.withActivity(sandbox, func(a *activity) {
			if a.changed != changed {
				return // The change has reset the count.
			}
			if a.waiting--; a.waiting == 0 {
				a.changed = nil
			}
		})
	}
}

// Until calls look until it is done or fails: at once, after each change of the sandbox,
// and at least once per every, because notifications can get lost. Use it in calls that
// wait for an earlier call.
func (s *Service) Until(ctx context.Context, sandbox uuid.UUID, every time.Duration, look func() (done bool, err error)) error {
	defer s.metrics.wait()()
	return s.until(ctx, sandbox, every, look)
}

func (s *Service) until(ctx context.Context, sandbox uuid.UUID, every time.Duration, look func() (done bool, err error)) error {
	for {
		changed, stop := s.subscribe(sandbox)
		done, err := look()
		if !done && err == nil {
			err = waitFor(ctx, changed, every)
		}
		stop()
		if done || err != nil {
			return err
		}
	}
}

// waitFor waits for a change, but at most for most.
func waitFor(ctx context.Context, changed <-chan struct{}, most time.Duration) error {
	look := time.NewTimer(most)
	defer look.Stop()
	select {
	case <-changed:
	case <-look.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// wakeAll wakes all callers that wait for a change.
func (s *Service) wakeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for sandbox, a := range s.activities {
		a.wake()
		if *a == (activity{}) {
			delete(s.activities, sandbox)
		}
	}
}

// wake wakes all callers that wait for the sandbox to change. The caller holds
// Service.mu.
func (a *activity) wake() {
	if a.changed != nil {
		close(a.changed)
	}
	a.changed, a.waiting = nil, 0
}
