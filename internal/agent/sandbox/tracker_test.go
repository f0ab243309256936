package sandbox

import (
	"context"
	"errors"
	"strings"
	"testing"
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
