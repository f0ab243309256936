package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// subject is the kind of object that a key names.
type subject string

const (
	sandbox  subject = "sandbox"
	template subject = "template"
)

// key names one object. At most one action per object runs at a time.
type key struct {
	of subject
	id uuid.UUID
}

// lane is a share of a queue's workers, so that slow or hanging actions leave workers to
// the others.
type lane struct {
	workers int
	// within bounds one action. An action that ignores its context keeps its object busy,
	// but frees its worker a while later.
	within time.Duration
}

// The lanes of a host.
var (
	// records are actions that only write to the database.
	records = &lane{workers: 2, within: 30 * time.Second}
	// calls are actions that call the host. removals are separate, because they hang most
	// often.
	calls    = &lane{workers: 4, within: time.Minute}
	removals = &lane{workers: 8, within: time.Minute}
	// captures and drains write guests' memory to disk.
	captures = &lane{workers: 2, within: 10 * time.Minute}
	drains   = &lane{workers: 2, within: 10 * time.Minute}
)

// lanes maps each kind of action to its lane.
var lanes = map[Kind]*lane{
	Fail: records, Find: records, Lose: records, Learn: records, Forget: records, Ready: records, GiveUp: records,
	Adopt: calls, Refresh: calls, Revive: calls,
	Stop: removals, Destroy: removals, Remove: removals,
	Capture: captures,
	Drain:   drains,
}

const (
	// firstBackoff and mostBackoff are the backoff of an object after its first failure
	// and after many.
	firstBackoff = time.Second
	mostBackoff  = 30 * time.Second
	// overdue is how long after its time limit an action keeps its worker, and how long
	// close waits for a cancelled one.
	overdue = 10 * time.Second
)

// task is the queued action of an object.
type task struct {
	action   Action
	wanted   time.Time // since when
	due      time.Time
	waits    *backoff.Backoff
	running  bool
	dropped  bool // a comparison during its run found it unnecessary
	failures int
}

// queue executes the actions of one host. It is level-triggered: want replaces the queued
// actions by those that are needed now.
type queue struct {
	do      func(context.Context, Action) error
	log     *slog.Logger
	metrics *metrics

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	// mu is not held during calls to other code.
	mu     sync.Mutex
	closed bool
	tasks  map[key]*task
	// used counts the busy workers of each lane.
	used map[*lane]int
	// count is how many actions have ended. ended has the count at which each object's
	// last one did.
	count uint64
	ended map[key]uint64
	wake  *time.Timer
}

func newQueue(ctx context.Context, do func(context.Context, Action) error, m *metrics, log *slog.Logger) *queue {
	q := &queue{do: do, log: log, metrics: m, tasks: make(map[key]*task), used: make(map[*lane]int), ended: make(map[key]uint64)}
	q.ctx, q.cancel = context.WithCancel(ctx)
	return q
}

// close cancels the running actions and waits for them. It abandons an action that
// ignores its context for longer than overdue; the next watch may repeat it.
func (q *queue) close() {
	q.mu.Lock()
	q.closed = true
	if q.wake != nil {
		q.wake.Stop()
	}
	q.mu.Unlock()
	q.cancel()
	ended := make(chan struct{})
	go func() { // ends with the last action
		q.work.Wait()
		close(ended)
	}()
	late := time.NewTimer(overdue)
	defer late.Stop()
	select {
	case <-ended:
		return
	case <-late.C:
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for k, t := range q.tasks {
		if t.running {
			q.log.Error("reconcile: abandoning an action that ignores its cancellation", "action", t.action.Kind, string(k.of), k.id)
		}
	}
}

// mark returns the queue's logical time, for want.
func (q *queue) mark() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.count
}

// want replaces the queued actions of one subject by those that a comparison found
// necessary. The comparison began at mark. want skips an object whose action ended later,
// because the comparison may have missed its effect.
func (q *queue) want(of subject, mark uint64, actions []Action) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	needed := make(map[key]bool, len(actions))
	for _, a := range actions {
		k := key{of, a.ID}
		needed[k] = true
		if t := q.tasks[k]; t != nil {
			t.action, t.dropped = a, false
		} else if q.ended[k] <= mark {
			q.tasks[k] = &task{action: a, wanted: now, due: now, waits: backoff.New(firstBackoff, mostBackoff)}
		}
	}
	for k, t := range q.tasks {
		if k.of != of || needed[k] {
			continue
		}
		t.dropped = true
		if !t.running {
			delete(q.tasks, k)
		}
	}
	for k, at := range q.ended {
		if k.of == of && at <= mark {
			delete(q.ended, k)
		}
	}
	q.dispatch()
}

// dispatch starts due actions while there are workers, the longest due first. The caller
// holds q.mu.
func (q *queue) dispatch() {
	if q.closed {
		return
	}
	for {
		now := time.Now()
		var first *task
		var name key
		var next time.Time
		for k, t := range q.tasks {
			l := lanes[t.action.Kind]
			switch {
			case t.running:
			case t.due.After(now):
				if next.IsZero() || t.due.Before(next) {
					next = t.due
				}
			case q.used[l] < l.workers && (first == nil || t.due.Before(first.due)):
				first, name = t, k
			}
		}
		if first == nil {
			q.wakeAt(next)
			return
		}
		q.start(name, first)
	}
}

// wakeAt schedules the next dispatch. The caller holds q.mu.
func (q *queue) wakeAt(at time.Time) {
	if q.wake != nil {
		q.wake.Stop()
		q.wake = nil
	}
	if at.IsZero() {
		return
	}
	q.wake = time.AfterFunc(time.Until(at), func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.dispatch()
	})
}

// start runs a task's action in a goroutine. The caller holds q.mu.
func (q *queue) start(k key, t *task) {
	a, l := t.action, lanes[t.action.Kind]
	t.running = true
	q.used[l]++
	free := sync.OnceFunc(func() { q.used[l]-- })
	late := time.AfterFunc(l.within+overdue, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.log.Error("reconcile: freeing the worker of an action that ignores its time limit", "action", a.Kind, string(k.of), a.ID)
		free()
		q.dispatch()
	})
	q.work.Go(func() {
		ctx, cancel := context.WithTimeout(q.ctx, l.within)
		defer cancel()
		begun := time.Now()
		err := fault.Guard(q.log, func() error { return q.do(ctx, a) })
		q.metrics.acted(a.Kind, err, time.Since(begun))
		late.Stop()
		q.mu.Lock()
		defer q.mu.Unlock()
		free()
		q.finish(k, t, a, err)
		q.dispatch()
	})
}

// finish removes a task or schedules its retry. The caller holds q.mu.
func (q *queue) finish(k key, t *task, a Action, err error) {
	t.running = false
	q.count++
	q.ended[k] = q.count
	if err == nil || t.dropped || q.ctx.Err() != nil {
		delete(q.tasks, k)
		return
	}
	t.failures++
	wait := t.waits.Next()
	t.due = time.Now().Add(wait)
	q.log.Warn("reconcile", "action", a.Kind, string(k.of), a.ID, "failures", t.failures, "again_in", wait, "error", err)
}

// depth returns how many objects have a queued or running action, and since when the
// oldest has.
func (q *queue) depth() (n int, oldest time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, t := range q.tasks {
		if oldest.IsZero() || t.wanted.Before(oldest) {
			oldest = t.wanted
		}
	}
	return len(q.tasks), oldest
}

// result returns the metric label for the result of an action.
func result(err error) string {
	var panicked *fault.Panic
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &panicked):
		return "panic"
	case errors.Is(err, context.DeadlineExceeded), connect.CodeOf(err) == connect.CodeDeadlineExceeded:
		return "timeout"
	}
	return "error"
}
