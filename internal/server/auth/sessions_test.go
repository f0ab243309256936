package auth_test

import (
	"log/slog"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

// TestSessionsAreBounded checks that a user keeps the newest hundred sessions, and that
// other users' sessions do not end.
func TestSessionsAreBounded(t *testing.T) {
	st, err := store.Open(t.Context(), storetest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	sessions := auth.NewSessions(st, []byte("secret"), slog.New(slog.DiscardHandler))
	user := func(email string) uuid.UUID {
		u := uuid.New()
		if err := st.InsertUser(t.Context(), db.InsertUserParams{ID: u, Email: email}); err != nil {
			t.Fatal(err)
		}
		return u
	}
	start := func(u uuid.UUID) (g auth.Grant) {
		t.Helper()
		err := st.InTx(t.Context(), func(q *db.Queries) (err error) {
			g, err = sessions.Start(t.Context(), q, u, "agent", "address")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	works := func(g auth.Grant) bool {
		_, err := sessions.Refresh(t.Context(), g.Refresh)
		return err == nil
	}
	one, other := user("one@example.com"), user("other@example.com")
	bystander := start(other)
	var all []auth.Grant
	for range 103 {
		all = append(all, start(one))
	}
	for i, want := range map[int]bool{0: false, 2: false, 3: true, 102: true} {
		if got := works(all[i]); got != want {
			t.Errorf("session %d of 103 works: %v, want %v", i, got, want)
		}
	}
	if !works(bystander) {
		t.Error("another user's session has ended")
	}
}
