package sandbox

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestTrackerClock checks that the tracker measures times of use by the monotonic clock, so
// that a change of the host's clock neither expires a sandbox nor keeps it.
func TestTrackerClock(t *testing.T) {
	tr := NewTracker()
	monotonic := func(when string) {
		t.Helper()
		tr.mu.Lock()
		defer tr.mu.Unlock()
		if !strings.Contains(tr.last.String(), " m=") {
			t.Errorf("%s: %v has no reading of the monotonic clock", when, tr.last)
		}
	}
	monotonic("new")
	leave, ok := tr.Enter()
	if !ok {
		t.Fatal("refused")
	}
	monotonic("in use")
	leave()
	monotonic("used")
	tr.Touch()
	monotonic("touched")
}

// lastUsed sets the last use to d ago.
func (t *Tracker) lastUsed(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = time.Now().Add(-d)
}

// TestTrackerExpires checks when a tracker reports that its sandbox was not used for the
// timeout, and that it refuses uses from then on.
func TestTrackerExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const timeout = time.Minute
		tr := NewTracker()
		wants := func(want time.Duration) {
			t.Helper()
			if expired, left, busy := tr.expire(timeout); expired || left != want || busy != nil {
				t.Errorf("expired %v, %v left, want %v; in use %v", expired, left, want, busy != nil)
			}
		}
		wants(timeout)
		time.Sleep(timeout - time.Second)
		wants(time.Second)
		leave, ok := tr.Enter()
		if !ok {
			t.Fatal("refused")
		}
		time.Sleep(2 * timeout)
		expired, _, busy := tr.expire(timeout)
		if expired || busy == nil {
			t.Fatalf("in use: expired %v", expired)
		}
		leave()
		<-busy
		wants(timeout)
		time.Sleep(timeout / 2)
		tr.Touch()
		wants(timeout)
		time.Sleep(timeout)
		if expired, _, _ := tr.expire(timeout); !expired {
			t.Error("not expired after the timeout")
		}
		if _, ok := tr.Enter(); ok {
			t.Error("an expired sandbox can be used")
		}
	})
}

func TestTrackerWaits(t *testing.T) {
	tr := NewTracker()
	leave, ok := tr.Enter()
	if !ok {
		t.Fatal("a new tracker is shut")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := tr.ShutAndWait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ShutAndWait with a use in flight: %v", err)
	}
	if _, ok := tr.Enter(); ok {
		t.Error("entered a tracker that is shut")
	}
	leave()
	leave()
	if n := tr.InFlight(); n != 0 {
		t.Errorf("%d in flight", n)
	}
	if err := tr.ShutAndWait(t.Context()); err != nil {
		t.Error(err)
	}
	tr.Reopen()
	if leave, ok = tr.Enter(); !ok {
		t.Error("shut after reopening")
	} else {
		leave()
	}
}
