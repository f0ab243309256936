package work

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// TestClose checks that Close waits for work in progress within its limit, then cancels
// it and waits, and that nothing starts any more.
func TestClose(t *testing.T) {
	for _, tt := range []struct {
		name         string
		takes, bound time.Duration
		want         time.Duration
	}{
		{"in time", time.Minute, time.Hour, time.Minute},
		{"too long", time.Hour, time.Minute, time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := New(slog.New(slog.DiscardHandler))
				end, err := g.Begin()
				if err != nil {
					t.Fatal(err)
				}
				ended := false
				go func() {
					defer end()
					select {
					case <-time.After(tt.takes):
					case <-g.Context().Done():
					}
					ended = true
				}()
				begun := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), tt.bound)
				defer cancel()
				g.Close(ctx)
				if took := time.Since(begun); took != tt.want || !ended {
					t.Errorf("Close took %v, and the work ended: %v", took, ended)
				}
				if _, err := g.Begin(); !fault.Is(err, fault.Unavailable) {
					t.Errorf("new work starts: %v", err)
				}
			})
		})
	}
}

// TestPersist checks that a write that the database refuses is not repeated.
func TestPersist(t *testing.T) {
	n, no := 0, errors.New("no")
	err := Persist(t.Context(), func(context.Context) error { n++; return no })
	if !errors.Is(err, no) || n != 1 {
		t.Errorf("after %d times: %v", n, err)
	}
}
