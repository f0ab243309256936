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
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

const (
	// DefaultMiB is how much a spool holds unless its settings say otherwise.
	DefaultMiB = 32 << 10
	// teamShare is the part of a spool that one team can have: one in so many.
	teamShare = 4
	// step is how much is reserved at once for a body of unknown length, in bytes.
	step = 4 << 20
	// spare is how much of the file system is left to others, in bytes.
	spare = 256 << 20
	// retryAfter is when an upload that found no room is worth another attempt.
	retryAfter = 30 * time.Second
)

// Spool holds bodies that are under way, up to a bound for each team and for all
// together. Its methods can be called concurrently.
type Spool struct {
	dir        string
	most, team int64

	mu    sync.Mutex // held for no call that can block but statfs
	used  int64      // bytes reserved
	dry   int64      // bytes reserved that are not written yet
	teams map[uuid.UUID]int64
}

// New returns a spool of so many MiB in a folder, which it creates. Its files
// have no names, so nothing of them is left if the process dies.
func New(dir string, mib int64) (*Spool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create spool: %w", err)
	}
	return &Spool{dir: dir, most: mib << 20, team: mib << 20 / teamShare, teams: make(map[uuid.UUID]int64)}, nil
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
	team  uuid.UUID
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
	if f.spool.teams[f.team] -= f.room; f.spool.teams[f.team] == 0 {
		delete(f.spool.teams, f.team)
	}
	return err
}

// TooLong is the error of a body of more bytes than were allowed.
type TooLong struct{ Most int64 }

func (e *TooLong) Error() string { return fmt.Sprintf("the body is longer than %d bytes", e.Most) }

// Receive reads a body of a team to its end and returns it. Room is reserved
// before bytes are written: all of it at once if the length is known. A body of
// more than most bytes is a [*TooLong]; all other errors of the client, and of a
// full spool, are faults.
func (s *Spool) Receive(team uuid.UUID, b Body, most int64) (_ *File, err error) {
	most = min(most, s.team)
	if b.Length > most {
		return nil, &TooLong{most}
	}
	file, err := os.CreateTemp(s.dir, "body-")
	if err != nil {
		return nil, full(err)
	}
	f := &File{file: file, spool: s, team: team}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if err := os.Remove(file.Name()); err != nil {
		return nil, err
	}
	if b.Length > 0 {
		if err := s.reserve(f, b.Length); err != nil {
			return nil, err
		}
	}
	buf := make([]byte, 256<<10)
	for {
		n, readErr := b.Read(buf)
		if f.size+int64(n) > most {
			return nil, &TooLong{most}
		}
		if err := s.write(f, buf[:n], most); err != nil {
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

func (s *Spool) write(f *File, p []byte, most int64) error {
	for need := f.size + int64(len(p)); need > f.room; {
		if err := s.reserve(f, min(step, most-f.room)); err != nil {
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

// reserve takes n bytes more for a file, or fails.
func (s *Spool) reserve(f *File, n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.teams[f.team]+n > s.team:
		return busy("the team's uploads that are under way have %d MiB together, which is the most", s.team>>20)
	case s.used+n > s.most:
		return busy("too many uploads are under way")
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.dir, &fs); err != nil {
		return fmt.Errorf("measure spool: %w", err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free-s.dry-n < spare {
		return full(fmt.Errorf("spool %s has %d bytes free, %d of them reserved", s.dir, free, s.dry))
	}
	s.used, s.dry, s.teams[f.team], f.room = s.used+n, s.dry+n, s.teams[f.team]+n, f.room+n
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
