package sandbox

import (
	"context"
	"sync"
	"time"
)

// Tracker counts the uses of a sandbox in flight, and records its last use. It can refuse new
// uses: for good, or until those in flight have ended.
type Tracker struct {
	mu   sync.Mutex
	n    int
	last time.Time
	shut bool
	idle chan struct{} // closed while nothing is in flight
}

// NewTracker makes a tracker whose last use is now.
func NewTracker() *Tracker {
	t := &Tracker{last: time.Now(), idle: make(chan struct{})}
	close(t.idle)
	return t
}

// Enter begins a use, which leave ends. ok is false if the tracker refuses new uses. leave is
// idempotent.
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

// InFlight returns the number of uses in flight.
func (t *Tracker) InFlight() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.n
}

// LastUse returns the time of the last use, which is now while one is in flight.
func (t *Tracker) LastUse() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n > 0 {
		return time.Now()
	}
	return t.last
}

// Idle returns the time since the last use, or 0 while one is in flight.
func (t *Tracker) Idle() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.n > 0 {
		return 0
	}
	return time.Since(t.last)
}

// Touch sets the time of the last use to now.
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

// Reopen accepts new uses again.
func (t *Tracker) Reopen() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.shut = false
}

// ShutAndWait refuses new uses, and waits until those in flight have ended or ctx is done.
// New uses stay refused either way.
func (t *Tracker) ShutAndWait(ctx context.Context) error {
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

// expire shuts the tracker if the last use was at least timeout ago. Otherwise it returns the
// time that is left or, while a use is in flight, a channel that is closed when none is.
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
