package spool

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// receiving starts to receive a body, of which one byte has come when it returns. end breaks
// the body off.
func receiving(t *testing.T, s *Spool, owner uuid.UUID, length int64) (end func()) {
	t.Helper()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		f, err := s.Receive(owner, Body{r, length}, 1<<40)
		if err == nil {
			err = f.Close()
		}
		r.CloseWithError(err) // A writer to a refused body must not hang.
		done <- err
	}()
	// The second write returns once the first byte is kept.
	for _, b := range []string{"x", ""} {
		if _, err := w.Write([]byte(b)); err != nil {
			t.Fatal(err)
		}
	}
	return func() {
		w.CloseWithError(errors.New("gone"))
		if err := <-done; !fault.Is(err, fault.InvalidArgument) {
			t.Errorf("a body that broke off: %v", err)
		}
	}
}

func TestReceive(t *testing.T) {
	dir := t.TempDir()
	s, err := New(dir, 64)
	if err != nil {
		t.Fatal(err)
	}
	team := uuid.New()
	for _, length := range []int64{-1, 10 << 20} {
		sent := bytes.Repeat([]byte("0123456789"), 1<<20)
		f, err := s.Receive(team, Body{bytes.NewReader(sent), length}, 1<<40)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // The file can be read again.
			if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d bytes came back, %v", len(got), err)
			}
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				t.Error(err)
			}
		}
		if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
			t.Errorf("the spool has visible files: %v, %v", names, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	var long *TooLong
	for _, b := range []Body{{strings.NewReader("0123456789"), -1}, {strings.NewReader(""), 10}, {strings.NewReader("0123456789"), 5}} {
		if _, err := s.Receive(team, b, 9); !errors.As(err, &long) {
			t.Errorf("a long body: %v", err)
		}
	}
	if _, err := s.Receive(team, Body{io.LimitReader(zeros{}, 1<<40), -1}, 1<<40); !errors.As(err, &long) {
		t.Errorf("more than the owner's share: %v", err)
	}
	if s.used != 0 || s.dry != 0 || len(s.owners) != 0 {
		t.Errorf("still reserved: %+v", s)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestShares checks that one owner gets at most a quarter of the spool, and all together no
// more than the whole. What has arrived counts, and not what was declared.
func TestShares(t *testing.T) {
	s, err := New(t.TempDir(), 64)
	if err != nil {
		t.Fatal(err)
	}
	small := func() error {
		f, err := s.Receive(uuid.New(), Body{strings.NewReader("abc"), 3}, 1<<40)
		if err != nil {
			return err
		}
		return f.Close()
	}
	hog := uuid.New()
	var ends []func()
	for range 4 {
		ends = append(ends, receiving(t, s, hog, 16<<20)) // four steps of 4 MiB fill its share
	}
	if _, err := s.Receive(hog, Body{strings.NewReader("x"), -1}, 1<<40); !fault.Is(err, fault.RateLimited) {
		t.Errorf("more than the owner's share: %v", err)
	}
	if err := small(); err != nil {
		t.Errorf("another owner: %v", err)
	}
	// Four owners who declare their whole share but send a byte reserve one step each.
	for range 3 {
		ends = append(ends, receiving(t, s, uuid.New(), 16<<20))
	}
	if err := small(); err != nil {
		t.Errorf("besides four owners who declared everything: %v", err)
	}
	for range 9 {
		ends = append(ends, receiving(t, s, uuid.New(), -1))
	}
	if err := small(); !fault.Is(err, fault.RateLimited) {
		t.Errorf("more than the total: %v", err)
	}
	for _, end := range ends {
		end()
	}
	if s.used != 0 || s.dry != 0 || len(s.owners) != 0 {
		t.Errorf("still reserved: %+v", s)
	}
}

// TestSmallDisk checks that one owner gets at most a quarter of the disk's space, if that
// is less than the spool's limit.
func TestSmallDisk(t *testing.T) {
	s, err := New(t.TempDir(), 32<<10)
	if err != nil {
		t.Fatal(err)
	}
	disk := int64(32 << 20)
	s.free = func() (int64, error) { return spare + disk - (s.used - s.dry), nil }
	hog := uuid.New()
	ends := []func(){receiving(t, s, hog, -1), receiving(t, s, hog, 8<<20)}
	for _, length := range []int64{-1, 5} {
		if _, err := s.Receive(hog, Body{strings.NewReader("hello"), length}, 1<<40); !fault.Is(err, fault.NoSpace) {
			t.Errorf("length %d: more than a quarter of the disk: %v", length, err)
		}
	}
	if f, err := s.Receive(uuid.New(), Body{strings.NewReader("hello"), 5}, 1<<40); err != nil {
		t.Errorf("another owner: %v", err)
	} else if err := f.Close(); err != nil {
		t.Error(err)
	}
	// A body that cannot fit is refused before any of it is read.
	if _, err := s.Receive(uuid.New(), Body{nil, 8<<20 + 1}, 1<<40); !fault.Is(err, fault.NoSpace) {
		t.Errorf("a body of more than a quarter of the disk: %v", err)
	}
	for _, end := range ends {
		end()
	}
}
