package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// doer counts actions and decides their results. It is used in synctest bubbles, where
// time advances when all goroutines wait.
type doer struct {
	mu   sync.Mutex
	done map[uuid.UUID]int
	at   map[uuid.UUID][]time.Time
	how  map[uuid.UUID]func(context.Context) error
}

func newDoer() *doer {
	return &doer{done: make(map[uuid.UUID]int), at: make(map[uuid.UUID][]time.Time), how: make(map[uuid.UUID]func(context.Context) error)}
}

func (d *doer) do(ctx context.Context, a Action) error {
	d.mu.Lock()
	d.at[a.ID] = append(d.at[a.ID], time.Now())
	how := d.how[a.ID]
	d.mu.Unlock()
	if how != nil {
		if err := how(ctx); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done[a.ID]++
	return nil
}

func (d *doer) ended(u uuid.UUID) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.done[u]
}

func (d *doer) begun(u uuid.UUID) []time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.at[u]
}

// inQueue runs a test with its own queue in a bubble.
func inQueue(t *testing.T, f func(t *testing.T, q *queue, d *doer)) {
	synctest.Test(t, func(t *testing.T) {
		d := newDoer()
		q := newQueue(t.Context(), d.do, newMetrics(), slog.New(slog.DiscardHandler))
		defer q.close()
		f(t, q, d)
	})
}

func hangs(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

func actions(kind Kind, ids ...uuid.UUID) []Action {
	all := make([]Action, len(ids))
	for i, u := range ids {
		all[i] = Action{Kind: kind, ID: u}
	}
	return all
}

// TestQueueApart has three objects whose actions fail, hang and panic: a fourth's
// succeeds at once, the three are retried with growing delays, and a repaired one
// succeeds.
func TestQueueApart(t *testing.T) {
	inQueue(t, func(t *testing.T, q *queue, d *doer) {
		fails, hanging, panics, works := uuid.New(), uuid.New(), uuid.New(), uuid.New()
		d.how[fails] = func(context.Context) error { return errors.New("no") }
		d.how[hanging] = hangs
		d.how[panics] = func(context.Context) error { panic("no") }
		q.want(sandbox, q.mark(), actions(Stop, fails, hanging, panics, works))
		synctest.Wait()
		if d.ended(works) != 1 {
			t.Error("the working action did not run at once")
		}
		if n, since := q.depth(); n != 3 || time.Since(since) != 0 {
			t.Errorf("%d actions wait, since %v", n, since)
		}
		time.Sleep(5 * time.Minute)
		for what, u := range map[string]uuid.UUID{"fails": fails, "panics": panics, "hangs": hanging} {
			at := d.begun(u)
			if len(at) < 3 {
				t.Fatalf("the action that %s was started %d times", what, len(at))
			}
			last := at[len(at)-1].Sub(at[len(at)-2])
			if first := at[1].Sub(at[0]); last <= first {
				t.Errorf("the retry delay of the action that %s is %v at first and %v at last", what, first, last)
			}
			if most := mostBackoff*4/3 + removals.within; last > most {
				t.Errorf("the retry delay of the action that %s is %v", what, last)
			}
		}
		if n, since := q.depth(); n != 3 || time.Since(since) != 5*time.Minute {
			t.Errorf("%d actions wait, since %v", n, since)
		}
		for how, u := range map[string]uuid.UUID{"error": fails, "panic": panics, "timeout": hanging} {
			got := testutil.ToFloat64(q.metrics.actions.WithLabelValues(string(Stop), how))
			if want := len(d.begun(u)); int(got) != want && int(got) != want-1 {
				t.Errorf("%s was counted %v times of %d", how, got, want)
			}
		}
		d.mu.Lock()
		clear(d.how)
		d.mu.Unlock()
		time.Sleep(2 * time.Minute)
		for _, u := range []uuid.UUID{fails, hanging, panics} {
			if d.ended(u) != 1 {
				t.Error("the repaired action did not succeed")
			}
		}
		if n, _ := q.depth(); n != 0 {
			t.Errorf("%d actions wait", n)
		}
	})
}

// TestQueueRemovalsHang checks that hanging removals, even as many as there are workers
// for them, leave workers for the actions that query the host.
func TestQueueRemovalsHang(t *testing.T) {
	inQueue(t, func(t *testing.T, q *queue, d *doer) {
		all := actions(Refresh, uuid.New())
		for range removals.workers {
			u := uuid.New()
			d.how[u] = hangs
			all = append(all, actions(Destroy, u)...)
		}
		q.want(sandbox, q.mark(), all)
		synctest.Wait()
		if d.ended(all[0].ID) != 1 {
			t.Error("hanging removals block queries of the host")
		}
	})
}

// TestQueueBound checks that no more actions of a lane run at once than it has workers.
// When all of them hang, the other lanes continue, and its own does once they have timed
// out.
func TestQueueBound(t *testing.T) {
	inQueue(t, func(t *testing.T, q *queue, d *doer) {
		var all []uuid.UUID
		for range 3 * removals.workers {
			u := uuid.New()
			d.how[u] = hangs
			all = append(all, u)
		}
		other, write := uuid.New(), uuid.New()
		q.want(sandbox, q.mark(), append(actions(Stop, all...), actions(Lose, write)...))
		synctest.Wait()
		begun := 0
		for _, u := range all {
			begun += len(d.begun(u))
		}
		if begun != removals.workers {
			t.Errorf("%d run at once, want %d", begun, removals.workers)
		}
		if d.ended(write) != 1 {
			t.Error("the other lane waits")
		}
		q.want(sandbox, q.mark(), append(actions(Stop, all...), actions(Destroy, other)...))
		time.Sleep(4 * removals.within)
		if d.ended(other) != 1 {
			t.Error("a working action waits although the hanging ones have timed out")
		}
		for _, u := range all {
			if len(d.begun(u)) == 0 {
				t.Error("one action never ran")
			}
		}
	})
}

// TestQueueOutlastedTimeout checks that an action that ignores its timeout blocks its object, but
// releases its worker.
func TestQueueOutlastedTimeout(t *testing.T) {
	inQueue(t, func(t *testing.T, q *queue, d *doer) {
		let := make(chan struct{})
		var deaf []uuid.UUID
		for range removals.workers {
			u := uuid.New()
			d.how[u] = func(context.Context) error { <-let; return nil }
			deaf = append(deaf, u)
		}
		works := uuid.New()
		q.want(sandbox, q.mark(), actions(Stop, deaf...))
		synctest.Wait()
		q.want(sandbox, q.mark(), actions(Stop, append(deaf, works)...))
		time.Sleep(removals.within)
		if d.ended(works) != 0 {
			t.Error("more workers than allowed are active")
		}
		time.Sleep(2 * overdue)
		if d.ended(works) != 1 {
			t.Error("a working action waits for hanging ones")
		}
		time.Sleep(time.Hour)
		close(let)
		synctest.Wait()
		for _, u := range deaf {
			if n := len(d.begun(u)); n != 1 {
				t.Errorf("an unfinished action was started %d times", n)
			}
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.used[removals] != 0 {
			t.Errorf("%d workers are at work", q.used[removals])
		}
	})
}

// TestQueueCloses checks that the queue closes although an action ignores its context.
func TestQueueCloses(t *testing.T) {
	inQueue(t, func(t *testing.T, q *queue, d *doer) {
		let := make(chan struct{})
		defer close(let)
		deaf, hanging := uuid.New(), uuid.New()
		d.how[deaf] = func(context.Context) error { <-let; return nil }
		d.how[hanging] = hangs
		q.want(sandbox, q.mark(), actions(Stop, deaf, hanging))
		synctest.Wait()
		begun := time.Now()
		q.close()
		if took := time.Since(begun); took != overdue {
			t.Errorf("it ended after %v", took)
		}
	})
}

// TestQueueLevel checks that actions no longer wanted are dropped, that an action
// completed after the look is not repeated for it, and that an object's latest action
// counts.
func TestQueueLevel(t *testing.T) {
	inQueue(t, func(t *testing.T, q *queue, d *doer) {
		fails, once := uuid.New(), uuid.New()
		d.how[fails] = func(context.Context) error { return errors.New("no") }
		before := q.mark()
		q.want(sandbox, before, actions(Stop, fails, once))
		synctest.Wait()
		// This look is older than the action's completion.
		q.want(sandbox, before, actions(Stop, fails, once))
		synctest.Wait()
		if n := d.ended(once); n != 1 {
			t.Errorf("it ran %d times", n)
		}
		// Another subject's needs do not affect these.
		q.want(template, q.mark(), nil)
		if n, _ := q.depth(); n != 1 {
			t.Errorf("%d actions wait", n)
		}
		q.want(sandbox, q.mark(), actions(Lose, fails))
		d.mu.Lock()
		clear(d.how)
		d.mu.Unlock()
		time.Sleep(time.Minute)
		if got := testutil.ToFloat64(q.metrics.actions.WithLabelValues(string(Lose), "ok")); got != 1 {
			t.Errorf("the latest action ran %v times", got)
		}
		d.how[fails] = func(context.Context) error { return errors.New("no") }
		q.want(sandbox, q.mark(), actions(Stop, fails))
		synctest.Wait()
		n := len(d.begun(fails))
		q.want(sandbox, q.mark(), nil)
		time.Sleep(time.Hour)
		if got := len(d.begun(fails)); got != n {
			t.Errorf("the dropped action ran %d more times", got-n)
		}
		q.mu.Lock()
		defer q.mu.Unlock()
		if len(q.tasks) != 0 || len(q.ended) > 2 {
			t.Errorf("%d tasks and %d ends are kept", len(q.tasks), len(q.ended))
		}
	})
}
