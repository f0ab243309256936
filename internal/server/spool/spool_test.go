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

// holding is a body that arrives when the test says so.
func holding(t *testing.T, s *Spool, team uuid.UUID, length int64) (end func()) {
	t.Helper()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		f, err := s.Receive(team, Body{r, length}, 1<<40)
		if err == nil {
			err = f.Close()
		}
		done <- err
	}()
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
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
		for range 2 { // It can be read again.
			if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d bytes came back, %v", len(got), err)
			}
			if _, err := f.Seek(0, io.SeekStart); err != nil {
				t.Error(err)
			}
		}
		if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
			t.Errorf("the spool has names: %v, %v", names, err)
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
		t.Errorf("more than the team's share: %v", err)
	}
	if s.used != 0 || s.dry != 0 || len(s.teams) != 0 {
		t.Errorf("reserved: %+v", s)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestShares lets one team have a quarter, and all together no more than all.
func TestShares(t *testing.T) {
	s, err := New(t.TempDir(), 64)
	if err != nil {
		t.Fatal(err)
	}
	one := Body{strings.NewReader("x"), -1}
	hog := uuid.New()
	ends := []func(){holding(t, s, hog, 10<<20)}
	// What was declared is taken before it is sent.
	if _, err := s.Receive(hog, Body{one, 10 << 20}, 1<<40); !fault.Is(err, fault.RateLimited) {
		t.Errorf("more than the team's share: %v", err)
	}
	if f, err := s.Receive(uuid.New(), Body{strings.NewReader("x"), 1}, 1<<40); err != nil {
		t.Errorf("another team: %v", err)
	} else if err := f.Close(); err != nil {
		t.Error(err)
	}
	for range 5 {
		ends = append(ends, holding(t, s, uuid.New(), 10<<20))
	}
	if _, err := s.Receive(uuid.New(), Body{one, 5 << 20}, 1<<40); !fault.Is(err, fault.RateLimited) {
		t.Errorf("more than all: %v", err)
	}
	for _, end := range ends {
		end()
	}
	if s.used != 0 || s.dry != 0 || len(s.teams) != 0 {
		t.Errorf("reserved: %+v", s)
	}
}
