// Package linear checks that work grows with its input and no faster, so that
// nobody can keep a processor busy with an input of a few megabytes.
package linear

import (
	"runtime"
	"testing"
)

// Check runs work with inputs of n, 2n and 4n, and fails the test where one
// allocates over three times as much memory as the one before. Bytes are
// counted because, unlike time, they are the same on a busy machine. Work that
// is linear allocates twice as much; with what doubles its room, up to three
// times. Work that copies all it has at each step allocates four times as much.
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
}

// allocated is how many bytes f allocates. No other goroutine must do much.
func allocated(f func()) uint64 {
	var begin, end runtime.MemStats
	runtime.ReadMemStats(&begin)
	f()
	runtime.ReadMemStats(&end)
	return end.TotalAlloc - begin.TotalAlloc
}
