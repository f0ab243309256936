package auth_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// TestChecksAreIndependent makes the checks of some of a team's open calls hang, fail and panic:
// the check that ends another call does not wait for them.
func TestChecksAreIndependent(t *testing.T) {
	url := storetest.New(t)
	st, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	w := auth.NewAccessGuard(st, slog.New(slog.DiscardHandler))
	who := auth.Principal{Team: uuid.New()}
	ended := make(chan struct{})
	for range 5 {
		_, done := w.While(t.Context(), who, w.Mark(), func(ctx context.Context) error {
			select {
			case <-ended:
			case <-ctx.Done():
				select {
				case <-ended: // ended just before
				default:
					t.Error("the other call waited for a check that hangs")
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
	go func() { defer close(run); w.Run(ctx) }() // it checks everybody first
	await.Recv(t, "the call ends", while.Done())
	close(ended)
	cancel()
	<-run
}

// TestFailedCheckIsRetried makes a check fail, like one of a database that is too busy: the
// next check comes soon, not only with the next regular one.
func TestFailedCheckIsRetried(t *testing.T) {
	st, err := store.Open(t.Context(), storetest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	w := auth.NewAccessGuard(st, slog.New(slog.DiscardHandler))
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
	begun := time.Now()
	await.Recv(t, "the call ends", while.Done())
	if took := time.Since(begun); took > 50*time.Second { // The regular checks come each minute.
		t.Errorf("the call ended only after %v", took)
	}
	cancel()
	<-run
}
