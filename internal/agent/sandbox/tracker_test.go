package sandbox

import (
	"strings"
	"testing"
)

// TestTrackerClock checks that a host's clock that is set back or forth neither
// ends a sandbox nor keeps it: times of use are compared by the monotonic clock.
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
	monotonic("made")
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
