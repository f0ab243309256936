// Package linear checks in tests that work grows no faster than its input, so that nobody
// can keep a processor busy with an input of a few megabytes.
package linear

import (
	"runtime"
	"syscall"
	"testing"
	"time"
)

// Check runs work with inputs of the sizes n, 2n and 4n. It fails the test if one of them
// allocates more than three times as much memory as the one before, or if 4n takes more
// than nine times as much processor time as n. Linear work allocates twice as much for a
// doubled input, or up to three times if its buffers double. Quadratic work takes sixteen
// times as long for a fourfold input.
//
// 4n should be near the largest input that is accepted; work that is fast even then
// passes. Other goroutines must be idle.
func Check(t *testing.T, what string, n int, work func(n int)) {
	t.Helper()
	work(n) // so that one-time allocations do not count
	var before uint64
	for _, size := range []int{n, 2 * n, 4 * n} {
		took := allocated(func() { work(size) })
		if before != 0 && took > 3*before {
			t.Errorf("%s: an input of %d allocates %d bytes, one of half the size %d", what, size, took, before)
		}
		before = took
	}
	if short, long, ok := grows(n, work); !ok {
		t.Errorf("%s: an input of %d takes %v of processor time, one of a quarter of the size %v", what, 4*n, long, short)
	}
}

const (
	// soon is a processor time that is acceptable, whatever its growth.
	soon = 50 * time.Millisecond
	// tries is how often work that seems slow is measured. The shortest time of each size
	// counts, because other load only adds to it.
	tries = 5
)

// grows reports with ok whether work with 4n takes at most nine times as long as with n.
func grows(n int, work func(n int)) (short, long time.Duration, ok bool) {
	for try := range tries {
		l := busy(func() { work(4 * n) })
		if try == 0 || l < long {
			long = l
		}
		if long < soon {
			return short, long, true
		}
		s := busy(func() { work(n) })
		if try == 0 || s < short {
			short = s
		}
		if long <= 9*short {
			return short, long, true
		}
	}
	return short, long, false
}

// busy returns the processor time of the process while f runs.
func busy(f func()) time.Duration {
	used := func() time.Duration {
		var u syscall.Rusage
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // fails for wrong arguments only
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	runtime.GC() // collects earlier garbage
	begin := used()
	f()
	return used() - begin
}

// allocated returns how many bytes f allocates. Other goroutines must be idle.
func allocated(f func()) uint64 {
	var begin, end runtime.MemStats
	runtime.ReadMemStats(&begin)
	f()
	runtime.ReadMemStats(&end)
	return end.TotalAlloc - begin.TotalAlloc
}
