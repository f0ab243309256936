// Package linear checks that work grows with its input and no faster, so that
// nobody can keep a processor busy with an input of a few megabytes.
package linear

import (
	"runtime"
	"syscall"
	"testing"
	"time"
)

// Check runs work with inputs of n, 2n and 4n, and fails the test where one
// allocates over three times as much memory as the one before, or where 4n
// takes over nine times as much processor time as n. Work that is linear
// allocates twice as much; with what doubles its room, up to three times. Work
// that copies or looks at all it has at each step takes sixteen times as long.
//
// 4n should be near the largest input that is accepted: work that is quick even
// then may grow as it likes. No other goroutine must do much meanwhile.
func Check(t *testing.T, what string, n int, work func(n int)) {
	t.Helper()
	work(n) // what is made once is not counted
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
	// soon is the processor time that nobody minds.
	soon = 50 * time.Millisecond
	// tries are how often what seems to be slow is measured again: the shortest
	// times of each size count, because other work only adds to them.
	tries = 5
)

// grows says whether work with 4n takes at most nine times as long as with n.
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

// busy is the processor time that the process takes while f runs.
func busy(f func()) time.Duration {
	used := func() time.Duration {
		var u syscall.Rusage
		_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // fails for wrong arguments only
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	runtime.GC() // what came before is not f's
	begin := used()
	f()
	return used() - begin
}

// allocated is how many bytes f allocates. No other goroutine must do much.
func allocated(f func()) uint64 {
	var begin, end runtime.MemStats
	runtime.ReadMemStats(&begin)
	f()
	runtime.ReadMemStats(&end)
	return end.TotalAlloc - begin.TotalAlloc
}
