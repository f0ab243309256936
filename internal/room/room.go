// Package room measures the free space of a file system and reserves it for writes, so
// that concurrent writers do not all count on the same space. Reservations are only in
// memory: they end with the process, like the writes.
package room

import (
	"fmt"
	"io"
	"math"
	"sync"

	"golang.org/x/sys/unix"
)

// FullError means that there is no room for a write.
type FullError struct {
	// FreeMiB is free and not reserved by others, NeedMiB was requested, and ReserveMiB must
	// stay free.
	FreeMiB, NeedMiB, ReserveMiB int64
}

func (e *FullError) Error() string {
	return fmt.Sprintf("%d MiB of disk are free, %d MiB are needed, %d MiB are kept in reserve", e.FreeMiB, e.NeedMiB, e.ReserveMiB)
}

// Room reserves space on one file system. A nil Room has no limit. It is safe for
// concurrent use.
type Room struct {
	keepFree int64
	free     func() (int64, error)

	mu       sync.Mutex // held while free is called, and for nothing else that blocks
	reserved int64
}

// New returns a Room that keeps keepFree bytes of a file system free. free measures the
// free bytes, for example the function that [Of] returns.
func New(keepFree int64, free func() (int64, error)) *Room {
	return &Room{keepFree: keepFree, free: free}
}

// Of returns a function that measures the free bytes of the file system of dir.
func Of(dir string) func() (int64, error) {
	return func() (int64, error) {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			return 0, fmt.Errorf("measure disk: %w", err)
		}
		return int64(fs.Bavail) * fs.Bsize, nil
	}
}

// Reserve reserves bytes for a write until release is called, or fails with a [FullError].
// Bytes that are already written count twice until then, so reserve only what is written
// soon.
func (r *Room) Reserve(bytes int64) (release func(), err error) {
	if r == nil {
		return func() {}, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	free, err := r.free()
	if err != nil {
		return nil, err
	}
	if left := free - r.reserved; left-bytes < r.keepFree {
		return nil, &FullError{max(left, 0) >> 20, bytes >> 20, r.keepFree >> 20}
	}
	return r.take(bytes), nil
}

// Take is like [Room.Reserve], for a write that may use the reserve. It never fails.
func (r *Room) Take(bytes int64) (release func()) {
	if r == nil {
		return func() {}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.take(bytes)
}

func (r *Room) take(bytes int64) (release func()) {
	r.reserved += bytes
	return sync.OnceFunc(func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.reserved -= bytes
	})
}

// During reserves bytes while it calls write.
func (r *Room) During(bytes int64, write func() error) error {
	release, err := r.Reserve(bytes)
	if err != nil {
		return err
	}
	defer release()
	return write()
}

// Writer returns a writer to w that fails with a [FullError] when there is no room.
func (r *Room) Writer(w io.Writer) io.Writer { return &writer{r, w} }

type writer struct {
	room *Room
	to   io.Writer
}

func (w *writer) Write(p []byte) (n int, err error) {
	err = w.room.During(int64(len(p)), func() error {
		n, err = w.to.Write(p)
		return err
	})
	return n, err
}

// Left returns the most bytes that [Room.Reserve] would grant now.
func (r *Room) Left() (int64, error) {
	if r == nil {
		return math.MaxInt64, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	free, err := r.free()
	return max(free-r.reserved-r.keepFree, 0), err
}
