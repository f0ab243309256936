// Package spool keeps what clients send on disk until all of it has arrived.
// Whoever receives a body this way takes locks, connections and slots
// afterwards, so that a slow client holds nothing that others wait for.
package spool

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/room"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

const (
	// DefaultMiB is how much a spool holds unless its settings say otherwise.
	DefaultMiB = 32 << 10
	// share is the part of a spool that one owner can have: one in so many.
	share = 4
	// step is how much is reserved at once, in bytes. What a client says that it
	// will send reserves nothing: a client that then sends nothing holds one step.
	step = 4 << 20
	// spare is how much of the file system is left to others, in bytes.
	spare = 256 << 20
	// retryAfter is when an upload that found no room is worth another attempt.
	retryAfter = 30 * time.Second
)

// Spool holds bodies that are under way, up to a bound for each owner and for all
// together. Its methods can be called concurrently.
type Spool struct {
	dir  string
	most int64
	free func() (int64, error) // bytes; tests replace it

	mu     sync.Mutex // held for no call that can block but statfs
	used   int64      // bytes reserved
	dry    int64      // bytes reserved that are not written yet
	owners map[uuid.UUID]int64
}

// New returns a spool of so many MiB in a folder, which it creates. Its files
// have no names, so nothing of them is left if the process dies.
func New(dir string, mib int64) (*Spool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create spool: %w", err)
	}
	return &Spool{dir: dir, most: mib << 20, free: room.Of(dir), owners: make(map[uuid.UUID]int64)}, nil
}

// Body is what a client sends.
type Body struct {
	io.Reader
	// Length is how many bytes the client says it has; -1: it does not say.
	Length int64
}

// File is a body that has arrived.
type File struct {
	*io.SectionReader
	file  *os.File
	spool *Spool
	owner uuid.UUID
	size  int64
	room  int64
}

// Size returns the length in bytes.
func (f *File) Size() int64 { return f.size }

// Close removes the file and gives its room back.
func (f *File) Close() error {
	err := f.file.Close()
	f.spool.mu.Lock()
	defer f.spool.mu.Unlock()
	f.spool.used -= f.room
	f.spool.dry -= f.room - f.size
	if f.spool.owners[f.owner] -= f.room; f.spool.owners[f.owner] == 0 {
		delete(f.spool.owners, f.owner)
	}
	return err
}

// TooLong is the error of a body of more bytes than were allowed.
type TooLong struct{ Most int64 }

func (e *TooLong) Error() string { return fmt.Sprintf("the body is longer than %d bytes", e.Most) }

// Receive reads a body to its end and returns it. It counts as its owner's: all
// teams of one owner share one part of the spool. Room is reserved in steps, just
// ahead of what arrives. A body of more than most bytes is a [*TooLong]; all other
// errors of the client, and of a full spool, are faults.
func (s *Spool) Receive(owner uuid.UUID, b Body, most int64) (_ *File, err error) {
	most = min(most, s.most/share)
	if b.Length > most {
		return nil, &TooLong{most}
	}
	if b.Length > 0 {
		if err := s.fits(b.Length); err != nil {
			return nil, err
		}
	}
	file, err := os.CreateTemp(s.dir, "body-")
	if err != nil {
		return nil, full(err)
	}
	f := &File{file: file, spool: s, owner: owner}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := os.Remove(file.Name()); err != nil {
		return nil, err
	}
	end := most // what is never reserved beyond
	if b.Length > 0 {
		end = b.Length
	}
	buf := make([]byte, 256<<10)
	for {
		n, readErr := b.Read(buf)
		if f.size+int64(n) > end {
			return nil, &TooLong{end}
		}
		if err := s.write(f, buf[:n], end); err != nil {
			return nil, err
		}
		if readErr == io.EOF {
			break
		}
		if readErr != nil {
			return nil, broke(readErr)
		}
	}
	f.SectionReader = io.NewSectionReader(file, 0, f.size)
	return f, nil
}

// broke is the error of a body that does not arrive.
func broke(err error) error {
	var known *fault.Error
	var long *http.MaxBytesError
	switch {
	case errors.As(err, &known):
		return known
	case errors.As(err, &long):
		return &TooLong{long.Limit}
	}
	return fault.Body(err)
}

func (s *Spool) write(f *File, p []byte, end int64) error {
	for need := f.size + int64(len(p)); need > f.room; {
		if err := s.reserve(f, min(step, end-f.room)); err != nil {
			return err
		}
	}
	n, err := f.file.Write(p)
	s.mu.Lock()
	f.size += int64(n)
	s.dry -= int64(n)
	s.mu.Unlock()
	if err != nil {
		return full(err)
	}
	return nil
}

// fits fails if a body of n bytes has no room even if its owner has nothing else
// under way.
func (s *Spool) fits(n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	room, err := s.room()
	if err == nil && n > room/share {
		err = full(fmt.Errorf("spool %s has room for %d bytes, and the body alone has %d", s.dir, room, n))
	}
	return err
}

// room returns how many bytes all can have together: the spool's, or what the
// disk has for it if that is less. s.mu is held.
func (s *Spool) room() (int64, error) {
	free, err := s.free()
	if err != nil {
		return 0, err
	}
	return min(s.most, free-spare+s.used-s.dry), nil
}

// reserve takes n bytes more for a file, or fails.
func (s *Spool) reserve(f *File, n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	room, err := s.room()
	if err != nil {
		return err
	}
	has := s.owners[f.owner]
	switch {
	case has+n > s.most/share:
		return busy("the uploads under way of the team, and of its owner's other teams, have %d MiB together, which is the most", s.most/share>>20)
	case s.used+n > s.most:
		return busy("too many uploads are under way")
	case has+n > room/share || s.used+n > room:
		return full(fmt.Errorf("spool %s has room for %d bytes, and %d are reserved, %d of them by the upload's owner", s.dir, room, s.used, has))
	}
	s.used, s.dry, s.owners[f.owner], f.room = s.used+n, s.dry+n, has+n, f.room+n
	return nil
}

func busy(format string, args ...any) error {
	f := fault.New(fault.RateLimited, format, args...)
	f.RetryAfter = retryAfter
	return f
}

func full(err error) error {
	f := fault.Because(err, fault.NoSpace, "the control plane has no space for the upload now")
	f.RetryAfter = retryAfter
	return f
}
