package sandboxes

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
)

// box is what this server does to one sandbox now, and who waits for the
// sandbox to change. A sandbox has one while there is anything of either.
//
// All boxes are guarded by Service.mu, which is held for no I/O and for no call
// of anything else, and under which no other lock is taken. A turn is held for
// as long as what it does takes; whoever has one takes no other.
type box struct {
	// creating is the sandbox's creation, or its fork's.
	creating *creation
	// deleting counts the deletions.
	deleting int
	// turn is what else is done to it: one thing at a time.
	turn *turn
	// changed is closed at the next change of its row; waiting counts who waits
	// for that.
	changed chan struct{}
	waiting int
}

// creation is a sandbox on its way. row and err are set before done is closed.
type creation struct {
	done chan struct{}
	row  db.Sandbox
	err  error
}

// turn leads a sandbox from one state to another.
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

// ErrMoved is why nothing was done: the sandbox is in another state than was
// thought, and whoever asked must look again.
var ErrMoved = errors.New("the sandbox is in another state by now")

// inBox calls f with a sandbox's box, under the lock: f only reads and sets its
// fields.
func (s *Service) inBox(sandbox uuid.UUID, f func(*box)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.boxes[sandbox]
	if b == nil {
		b = new(box)
	}
	f(b)
	if *b == (box{}) {
		delete(s.boxes, sandbox)
	} else {
		s.boxes[sandbox] = b
	}
}

// Busy says whether this server is at work on the sandbox.
func (s *Service) Busy(sandbox uuid.UUID) (busy bool) {
	s.inBox(sandbox, func(b *box) { busy = b.creating != nil || b.deleting > 0 || b.turn != nil })
	return busy
}

// Created returns a channel that is closed when this server no longer creates
// the sandbox; nil: it does not create it.
func (s *Service) Created(sandbox uuid.UUID) <-chan struct{} {
	if c := s.creation(sandbox); c != nil {
		return c.done
	}
	return nil
}

func (s *Service) creation(sandbox uuid.UUID) (c *creation) {
	s.inBox(sandbox, func(b *box) { c = b.creating })
	return c
}

// beginCreation marks sandboxes as being created, before their rows are there:
// without that, the controller would take them for a dead server's. end takes
// what became of each.
func (s *Service) beginCreation(sandboxes ...uuid.UUID) (end func(rows []db.Sandbox, err error), err error) {
	over, err := s.Work.Begin()
	if err != nil {
		return nil, err
	}
	made := make([]*creation, len(sandboxes))
	for i, sandbox := range sandboxes {
		made[i] = &creation{done: make(chan struct{})}
		s.inBox(sandbox, func(b *box) { b.creating = made[i] })
	}
	return func(rows []db.Sandbox, err error) {
		defer over()
		for i, sandbox := range sandboxes {
			if made[i].err = err; err == nil {
				made[i].row = rows[i]
			}
			s.inBox(sandbox, func(b *box) { b.creating = nil })
			close(made[i].done)
			s.changed(sandbox)
		}
	}, nil
}

// beginDeletion marks a sandbox as being deleted until end.
func (s *Service) beginDeletion(sandbox uuid.UUID) (end func(), err error) {
	over, err := s.Work.Begin()
	if err != nil {
		return nil, err
	}
	s.inBox(sandbox, func(b *box) { b.deleting++ })
	return func() {
		s.inBox(sandbox, func(b *box) { b.deleting-- })
		over()
	}, nil
}

// turn has f lead the sandbox to a state, on a goroutine of the service's own,
// and returns how that went. Whoever wants the same meanwhile shares it;
// whoever wants something else gets ErrMoved when it is over.
func (s *Service) turn(ctx context.Context, sandbox uuid.UUID, to State, f func() (db.Sandbox, error)) (db.Sandbox, error) {
	over, err := s.Work.Begin()
	if err != nil {
		return db.Sandbox{}, err
	}
	mine := &turn{to: to, done: make(chan struct{})}
	is := mine
	s.inBox(sandbox, func(b *box) {
		if b.turn == nil {
			b.turn = mine
		}
		is = b.turn
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
		s.inBox(sandbox, func(b *box) { b.turn = nil })
		close(mine.done)
	}()
	select {
	case <-mine.done:
		return mine.row, mine.err
	case <-ctx.Done():
		return db.Sandbox{}, ctx.Err()
	}
}

// Alone runs f while this server does nothing else to the sandbox, and returns
// its error. It fails with ErrMoved, after a while, if something else was being
// done. f goes on when ctx ends before.
func (s *Service) Alone(ctx context.Context, sandbox uuid.UUID, f func() error) error {
	_, err := s.turn(ctx, sandbox, "", func() (db.Sandbox, error) { return db.Sandbox{}, f() })
	return err
}

// Hold is Alone for a team's sandbox that runs or is paused, and stays so; f
// gets its row. It waits for one that is pausing or resuming.
func (s *Service) Hold(ctx context.Context, team, sandbox uuid.UUID, f func(db.Sandbox) error) error {
	deadline := time.Now().Add(settleWithin)
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

// share waits for a turn of somebody else's and returns how it went, if it leads
// to the same, and ErrMoved if not.
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

// current is what this server does to the sandbox, or nil.
func (s *Service) current(sandbox uuid.UUID) (t *turn) {
	s.inBox(sandbox, func(b *box) { t = b.turn })
	return t
}

// watch returns a channel that is closed at the sandbox's next change, if that
// comes before stop is called.
func (s *Service) watch(sandbox uuid.UUID) (changed <-chan struct{}, stop func()) {
	s.inBox(sandbox, func(b *box) {
		if b.changed == nil {
			b.changed = make(chan struct{})
		}
		b.waiting++
		changed = b.changed
	})
	return changed, func() {
		s.inBox(sandbox, func(b *box) {
			if b.changed != changed {
				return // It has changed, and nobody counts any more.
			}
			if b.waiting--; b.waiting == 0 {
				b.changed = nil
			}
		})
	}
}

// Until calls look until look is done or fails: at once, after each change of
// the sandbox, and at least once per every, because the word of a change can get
// lost. Use it in calls that wait for an earlier call.
func (s *Service) Until(ctx context.Context, sandbox uuid.UUID, every time.Duration, look func() (done bool, err error)) error {
	defer s.metrics.wait()()
	return s.until(ctx, sandbox, every, look)
}

func (s *Service) until(ctx context.Context, sandbox uuid.UUID, every time.Duration, look func() (done bool, err error)) error {
	for {
		changed, stop := s.watch(sandbox)
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

// waitFor waits for a change, but no longer than most.
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

// wakeAll wakes whoever waits for any sandbox to change.
func (s *Service) wakeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for sandbox, b := range s.boxes {
		b.wake()
		if *b == (box{}) {
			delete(s.boxes, sandbox)
		}
	}
}

// wake wakes every caller that waits for the sandbox to change. The caller holds
// Service.mu.
func (b *box) wake() {
	if b.changed != nil {
		close(b.changed)
	}
	b.changed, b.waiting = nil, 0
}
