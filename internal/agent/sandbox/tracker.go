package sandbox

import (
	"context"
	"sync"
	"time"
)

// Tracker counts what is in flight to one sandbox and knows when it was used
// last. It can refuse new uses: for good, or while those under way drain.
type Tracker struct {
	mu   sync.Mutex
	n    int
	last time.Time
	shut bool
	idle chan struct{} // closed while nothing is in flight
}

// NewTracker makes a tracker of a sandbox that is used for the first time now.
func NewTracker() *Tracker {
	t := &Tracker{last: time.Now(), idle: make(chan struct{})}
	close(t.idle)
	return t
}

// Enter counts a use until leave is called, once; false: none is taken now.
func (t *Tracker) Enter() (leave func(), ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.shut {
		return nil, false
	}
	if t.n == 0 {
		t.idle = make(chan struct{})
	}
	t.n++
	t.last = time.Now()
	return sync.OnceFunc(t.leave), true
}

func (t *Tracker) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = time.Now()
	if t.n--; t.n == 0 {
		close(t.idle)
	}
}

// InFlight is how many uses are under way.
func (t *Tracker) InFlight() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.n
}

// LastUse is when the sandbox was used last: now, when it is in use.
func (t *Tracker) LastUse() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n > 0 {
		return time.Now()
	}
	return t.last
}

// Idle is for how long nothing has used the sandbox; 0: something does.
func (t *Tracker) Idle() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n > 0 {
		return 0
	}
	return time.Since(t.last)
}

// Touch counts as a use that is over at once.
func (t *Tracker) Touch() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = time.Now()
}

// Shut refuses new uses until Reopen.
func (t *Tracker) Shut() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.shut = true
}

// Reopen takes uses again.
func (t *Tracker) Reopen() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.shut = false
}

// Drain refuses new uses and waits until those under way have ended or ctx is
// done. New ones stay refused either way.
func (t *Tracker) Drain(ctx context.Context) error {
	t.mu.Lock()
	t.shut = true
	idle := t.idle
	t.mu.Unlock()
	select {
	case <-idle:
		return nil
	default:
	}
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// expire shuts the tracker if there was no use for timeout. Else it tells how
// long there can be none at the earliest, or, when something is in flight, the
// channel that is closed when nothing is any more.
func (t *Tracker) expire(timeout time.Duration) (expired bool, left time.Duration, busy <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n > 0 {
		return false, 0, t.idle
	}
	if left = timeout - time.Since(t.last); left > 0 {
		return false, left, nil
	}
	t.shut = true
	return true, 0, nil
}
