package sandboxes

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

// newActivities returns a service without database or hosts.
func newActivities(t *testing.T) *Service {
	log := slog.New(slog.DiscardHandler)
	jobs := work.New(log)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), await.Hang)
		defer cancel()
		jobs.Close(ctx)
	})
	return New(Config{Work: jobs, Log: log})
}

func (s *Service) kept() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.activities)
}

// TestTurn checks that concurrent callers of the same operation on a sandbox share one run of
// it. A caller of another operation must read the state again afterwards.
func TestTurn(t *testing.T) {
	s := newActivities(t)
	sandbox := uuid.New()
	ran, let := atomic.Int32{}, make(chan struct{})
	begun := make(chan struct{})
	f := func() (db.Sandbox, error) {
		ran.Add(1)
		close(begun)
		<-let
		return db.Sandbox{ID: sandbox}, nil
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if row, err := s.turn(t.Context(), sandbox, Paused, f); err != nil || row.ID != sandbox {
			t.Errorf("the first: %v, %v", row.ID, err)
		}
	})
	<-begun
	if !s.Busy(sandbox) {
		t.Error("no operation is reported for it")
	}
	// A cancelled caller stops nothing.
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, err := s.turn(gone, sandbox, Paused, f); !errors.Is(err, context.Canceled) {
		t.Errorf("the cancelled caller: %v", err)
	}
	for range 10 {
		wg.Go(func() {
			if row, err := s.turn(t.Context(), sandbox, Paused, f); err != nil || row.ID != sandbox {
				t.Errorf("a caller who wants the same: %v, %v", row.ID, err)
			}
		})
		wg.Go(func() {
			if _, err := s.turn(t.Context(), sandbox, Running, f); !errors.Is(err, ErrMoved) {
				t.Errorf("a caller who wants something else: %v", err)
			}
		})
		wg.Go(func() {
			if err := s.Alone(t.Context(), sandbox, func() error { _, err := f(); return err }); !errors.Is(err, ErrMoved) {
				t.Errorf("a caller who wants to be alone: %v", err)
			}
		})
	}
	await.Until(t, "all of them wait", func() bool { return testutil.ToFloat64(s.metrics.waiting) == 30 })
	close(let)
	wg.Wait()
	if n := ran.Load(); n != 1 {
		t.Errorf("it ran %d times", n)
	}
	if n := s.kept(); n != 0 {
		t.Errorf("%d activities are kept", n)
	}
}

// TestTurnPanics checks that a turn ends when it panics, and that the next caller gets
// its turn.
func TestTurnPanics(t *testing.T) {
	s := newActivities(t)
	sandbox := uuid.New()
	err := s.Alone(t.Context(), sandbox, func() error { panic("no") })
	var panicked *fault.Panic
	if !errors.As(err, &panicked) || panicked.Value != "no" {
		t.Errorf("a panic is %v", err)
	}
	if err := s.Alone(t.Context(), sandbox, func() error { return nil }); err != nil {
		t.Errorf("the next caller: %v", err)
	}
}

// TestActivitiesStress does everything to a few sandboxes at once. In the end nobody waits and
// no activity is kept.
func TestActivitiesStress(t *testing.T) {
	s := newActivities(t)
	sandboxes := make([]uuid.UUID, 4)
	held := make([]atomic.Int32, len(sandboxes))
	for i := range sandboxes {
		sandboxes[i] = uuid.New()
	}
	ctx := await.Context(t)
	var wg sync.WaitGroup
	for worker := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(worker, 0))
			for range 500 {
				i := r.IntN(len(sandboxes))
				sandbox := sandboxes[i]
				switch r.IntN(6) {
				case 0:
					err := s.Alone(ctx, sandbox, func() error {
						if held[i].Add(1) != 1 {
							t.Error("two callers have the turn of one sandbox")
						}
						s.Changed(sandbox)
						held[i].Add(-1)
						return nil
					})
					if err != nil && !errors.Is(err, ErrMoved) {
						t.Error(err)
					}
				case 1:
					end, err := s.beginDeletion(sandbox)
					if err != nil {
						t.Error(err)
						continue
					}
					if !s.Busy(sandbox) {
						t.Error("a sandbox that is deleted is not busy")
					}
					end()
				case 2:
					fresh := uuid.New()
					end, err := s.beginCreation(fresh)
					if err != nil {
						t.Error(err)
						continue
					}
					created := s.Created(fresh)
					end([]db.Sandbox{{ID: fresh}}, nil)
					<-created
				case 3:
					looks := 0
					err := s.Until(ctx, sandbox, time.Millisecond, func() (bool, error) {
						looks++
						return looks > 2, nil
					})
					if err != nil {
						t.Error(err)
					}
				case 4:
					s.Changed(sandbox)
				case 5:
					s.Disconnected(r.IntN(2) == 0)
				}
			}
		})
	}
	wg.Wait()
	if n := s.kept(); n != 0 {
		t.Errorf("%d activities are kept", n)
	}
}

// TestUntil checks that a change is seen when it is announced, not only after a time.
func TestUntil(t *testing.T) {
	s := newActivities(t)
	sandbox := uuid.New()
	ctx := await.Context(t)
	looked := make(chan struct{})
	done := make(chan error, 1)
	var is atomic.Bool
	go func() {
		first := true
		done <- s.Until(ctx, sandbox, 10*await.Hang, func() (bool, error) {
			if first {
				first = false
				close(looked)
			}
			return is.Load(), nil
		})
	}()
	<-looked
	is.Store(true)
	s.ChangedElsewhere(sandbox)
	if err := <-done; err != nil {
		t.Errorf("it was announced, but %v", err)
	}
	no := errors.New("no")
	if err := s.Until(ctx, sandbox, await.Hang, func() (bool, error) { return false, no }); !errors.Is(err, no) {
		t.Errorf("a failed look: %v", err)
	}
	if n := s.kept(); n != 0 {
		t.Errorf("%d activities are kept", n)
	}
}
