package auth_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// TestWatchOthers has looks at some of a team's open calls hang, fail and panic:
// the look at another, which ends it, does not wait for them.
func TestWatchOthers(t *testing.T) {
	url := pgtest.New(t)
	st, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	w := auth.NewWatch(st, slog.New(slog.DiscardHandler))
	who := auth.Principal{Team: uuid.New()}
	ended := make(chan struct{})
	for range 5 {
		_, done := w.While(t.Context(), who, w.Mark(), func(ctx context.Context) error {
			select {
			case <-ended:
			case <-ctx.Done():
				select {
				case <-ended: // just before
				default:
					t.Error("the others waited for a look that hangs")
				}
			}
			panic("oops")
		})
		defer done()
	}
	while, done := w.While(t.Context(), who, w.Mark(), func(context.Context) error { return fault.New(fault.PermissionDenied, "no more") })
	defer done()
	ctx, cancel := context.WithCancel(t.Context())
	run := make(chan struct{})
	go func() { defer close(run); w.Run(ctx) }() // which doubts everybody at first
	select {
	case <-while.Done():
	case <-time.After(time.Minute):
		t.Error("it goes on")
	}
	close(ended)
	cancel()
	<-run
}

// TestWatchLooksAgain has a look fail, as while the database is too busy to
// answer: there is another one soon, not only when everybody is looked at again.
func TestWatchLooksAgain(t *testing.T) {
	st, err := store.Open(t.Context(), pgtest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	w := auth.NewWatch(st, slog.New(slog.DiscardHandler))
	looks := 0
	while, done := w.While(t.Context(), auth.Principal{Team: uuid.New()}, w.Mark(), func(ctx context.Context) error {
		switch looks++; looks {
		case 1:
			return errors.New("the database does not answer")
		case 2:
			<-ctx.Done()
			return ctx.Err()
		}
		return fault.New(fault.PermissionDenied, "no more")
	})
	defer done()
	ctx, cancel := context.WithCancel(t.Context())
	run := make(chan struct{})
	go func() { defer close(run); w.Run(ctx) }()
	select {
	case <-while.Done():
	case <-time.After(50 * time.Second): // Everybody is looked at each minute.
		t.Error("it goes on")
	}
	cancel()
	<-run
}
