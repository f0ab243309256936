package auth_test

import (
	"context"
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
