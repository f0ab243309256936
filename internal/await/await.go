// Package await lets tests wait for events that they do not control.
//
// Tests order events by gates and conditions. The time limit here only catches hangs: it
// is much longer than any working code takes, even on a busy machine.
package await

import (
	"context"
	"os"
	"strconv"
	"testing"
	"time"
)

// Hang is how long a test waits before it reports a hang: two minutes, scaled by [Scale].
var Hang = Scale(2 * time.Minute)

// Scale returns d multiplied by the variable WRENN_TEST_TIMEOUT_FACTOR, or d if that is not
// set. Slow machines, such as the emulated one of `make test-kvm`, set a factor above 1.
// Use Scale only for time limits that catch hangs.
func Scale(d time.Duration) time.Duration {
	const name = "WRENN_TEST_TIMEOUT_FACTOR"
	text := os.Getenv(name)
	if text == "" {
		return d
	}
	factor, err := strconv.ParseFloat(text, 64)
	if err != nil || factor <= 0 {
		panic(name + " is " + strconv.Quote(text) + ", which is not a positive number")
	}
	return time.Duration(factor * float64(d))
}

// Until calls ok until it returns true. It fails the test if that takes longer than
// [Hang]. Use it for conditions that no channel signals.
func Until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !Within(Hang, ok) {
		t.Fatalf("not within %v: %s", Hang, what)
	}
}

// Within is [Until] without a test: it returns false if limit ends before ok returns true.
func Within(limit time.Duration, ok func() bool) bool {
	for end, pause := time.Now().Add(limit), time.Millisecond; !ok(); pause = min(2*pause, 32*time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
		time.Sleep(pause)
	}
	return true
}

// Recv receives a value from c, or the zero value if c is closed. It fails the test if
// that takes longer than [Hang].
func Recv[T any](t testing.TB, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(Hang):
		t.Fatalf("not within %v: %s", Hang, what)
	}
	return v
}

// Context returns the context of a test, bounded by [Hang].
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Hang)
	t.Cleanup(cancel)
	return ctx
}
