package builds

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// TestFollowersAreForgotten follows builds that do not exist, have ended or still run: the
// service remembers none of them when nobody follows any more.
func TestFollowersAreForgotten(t *testing.T) {
	st, err := store.Open(context.Background(), storetest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	away := redis.NewClient(&redis.Options{Dialer: func(context.Context, string, string) (net.Conn, error) { return nil, net.ErrClosed }})
	t.Cleanup(func() { away.Close() })
	s := New(Config{Store: st, Redis: away, Log: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() { s.queue.Close() })
	team := uuid.New()
	if err := st.InsertTeam(t.Context(), db.InsertTeamParams{ID: team, Name: "team"}); err != nil {
		t.Fatal(err)
	}
	queue := func() uuid.UUID {
		t.Helper()
		row, err := st.InsertBuild(t.Context(), db.InsertBuildParams{ID: uuid.New(), TeamID: team, Name: "b", Tags: []string{}, Recipe: "r", Options: []byte("{}"), CreatedAt: store.Now(), Most: 10})
		if err != nil {
			t.Fatal(err)
		}
		return row.ID
	}
	ended, runs := queue(), queue()
	if _, err := s.Cancel(t.Context(), team, ended); err != nil {
		t.Fatal(err)
	}
	see := func(db.Build, []Step) error { return nil }
	if err := s.Follow(t.Context(), team, uuid.New(), see); !fault.Is(err, fault.NotFound) {
		t.Errorf("a build that does not exist: %v", err)
	}
	if err := s.Follow(t.Context(), team, ended, see); err != nil {
		t.Errorf("a build that has ended: %v", err)
	}
	left := errors.New("the follower leaves")
	if err := s.Follow(t.Context(), team, runs, func(db.Build, []Step) error { return left }); !errors.Is(err, left) {
		t.Errorf("a build that has not ended: %v", err)
	}
	// Two followers of one build, of which one leaves at once: the other hears of changes.
	ctx, cancel := context.WithCancel(t.Context())
	looks, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- s.Follow(ctx, team, runs, func(db.Build, []Step) error { looks <- struct{}{}; return nil })
	}()
	<-looks
	if err := s.Follow(t.Context(), team, runs, func(db.Build, []Step) error { return left }); !errors.Is(err, left) {
		t.Error(err)
	}
	s.heard(runs)
	<-looks
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("a follower that leaves: %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiting) != 0 {
		t.Errorf("%d builds are remembered", len(s.waiting))
	}
}
