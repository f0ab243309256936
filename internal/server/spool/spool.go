// Package spool buffers request bodies on disk until they are complete. Callers take
// locks, connections and slots afterwards, so that a slow client does not block others.
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
	// DefaultMiB is the default size of a spool.
	DefaultMiB = 32 << 10
	// share is the divisor for one owner, who may use a quarter of a spool.
	share = 4
	// step is how many bytes are reserved at once. A client's Content-Length reserves
	// nothing, so a client that then sends nothing holds only one step.
	step = 4 << 20
	// spare is how many bytes of the file system are left to others.
	spare = 256 << 20
	// retryAfter is the Retry-After of an upload that found no room.
	retryAfter = 30 * time.Second
)

// Spool holds bodies during their upload, up to a limit per owner and in total. It is
// safe for concurrent use.
type Spool struct {
	dir  string
	most int64
	free func() (int64, error) // bytes; tests replace it

	mu     sync.Mutex // not held during calls that block, except statfs
	used   int64      // bytes reserved
	dry    int64      // bytes reserved but not written yet
	owners map[uuid.UUID]int64
}

// New returns a spool of mib MiB in a folder, which it creates. The spool's files have no
// names, so nothing is left if the process dies.
func New(dir string, mib int64) (*Spool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create spool: %w", err)
	}
	return &Spool{dir: dir, most: mib << 20, free: room.Of(dir), owners: make(map[uuid.UUID]int64)}, nil
}

// Body is a request's body.
type Body struct {
	io.Reader
	// Length is the Content-Length; -1: unknown.
	Length int64
}

// File is a complete body.
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

// Close deletes the file and releases its room.
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

// TooLong is the error of a body that exceeds its limit.
type TooLong struct{ Most int64 }

func (e *TooLong) Error() string { return fmt.Sprintf("the body is longer than %d bytes", e.Most) }

// Receive stores a complete body. It counts towards the owner's share, which all teams of
// the owner use together. Receive reserves room in steps, just ahead of the data. It
// fails with a [*TooLong] if the body has more than most bytes. All other errors of the
// client, and those of a full spool, are faults.
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
	end := most // limit of the reservation
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

// broke converts the error of reading a body.
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

// fits fails if a body of n bytes does not fit even if its owner has no other upload.
func (s *Spool) fits(n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	room, err := s.room()
	if err == nil && n > room/share {
		err = full(fmt.Errorf("spool %s has room for %d bytes, and the body alone has %d", s.dir, room, n))
	}
	return err
}

// room returns how many bytes all uploads together may have, which the free disk space
// can limit. The caller holds s.mu.
func (s *Spool) room() (int64, error) {
	free, err := s.free()
	if err != nil {
		return 0, err
	}
	return min(s.most, free-spare+s.used-s.dry), nil
}

// reserve reserves n more bytes for a file, or fails.
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
		return busy("the current uploads of the team and its owner's other teams have reached the limit of %d MiB", s.most/share>>20)
	case s.used+n > s.most:
		return busy("there are too many uploads at the moment")
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
	f := fault.Because(err, fault.NoSpace, "the control plane has no disk space for the upload at the moment")
	f.RetryAfter = retryAfter
	return f
}
