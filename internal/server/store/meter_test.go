package store

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
)

// TestMetered checks that every kind of query, in a transaction or not, calls the meter
// with its rows' sizes, ends with the meter's error, and returns its connection.
func TestMetered(t *testing.T) {
	s, err := Open(context.Background(), migrated.New(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	team := uuid.New()
	if err := s.InsertTeam(t.Context(), db.InsertTeamParams{ID: team, Name: "0123456789"}); err != nil {
		t.Fatal(err)
	}
	queries := map[string]func(context.Context, *db.Queries) error{
		"one row": func(ctx context.Context, q *db.Queries) error {
			row, err := q.GetTeam(ctx, team)
			if err == nil && row.Name != "0123456789" {
				t.Errorf("read %+v", row)
			}
			return err
		},
		"several rows": func(ctx context.Context, q *db.Queries) error {
			rows, err := q.ListTeams(ctx, db.ListTeamsParams{MaxRows: 10})
			if err == nil && len(rows) != 1 {
				t.Errorf("read %+v", rows)
			}
			return err
		},
		"no row": func(ctx context.Context, q *db.Queries) error {
			if _, err := q.GetTeam(ctx, uuid.New()); !errors.Is(err, ErrNoRows) {
				t.Errorf("a row that does not exist: %v", err)
			}
			return nil
		},
	}
	ways := map[string]func(context.Context, func(context.Context, *db.Queries) error) error{
		"": func(ctx context.Context, f func(context.Context, *db.Queries) error) error { return f(ctx, s.Queries) },
		" in a transaction": func(ctx context.Context, f func(context.Context, *db.Queries) error) error {
			return s.InTx(ctx, func(q *db.Queries) error { return f(ctx, q) })
		},
	}
	full := errors.New("full")
	for what, query := range queries {
		for how, run := range ways {
			var bytes atomic.Int64
			if err := run(Metered(t.Context(), func(n int) error { bytes.Add(int64(n)); return nil }), query); err != nil {
				t.Errorf("%s%s: %v", what, how, err)
			}
			if n := bytes.Load(); what != "no row" && (n < 10 || n > 100) || what == "no row" && n != 0 {
				t.Errorf("%s%s: %d bytes were metered", what, how, n)
			}
			err := run(Metered(t.Context(), func(int) error { return full }), query)
			if what != "no row" && !errors.Is(err, full) || what == "no row" && err != nil {
				t.Errorf("%s%s, refused by the meter: %v", what, how, err)
			}
			if n := s.Acquired(); n != 0 {
				t.Errorf("%s%s: %d connections are in use", what, how, n)
			}
		}
	}
}
