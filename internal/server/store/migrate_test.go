package store

import (
	"io/fs"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

// migratedFrom fills a database whose schema is the one before the named migration, migrates
// it, and returns it.
func migratedFrom(t *testing.T, name string, fill func(exec func(query string, args ...any))) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), pgtest.New(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	conn := stdlib.OpenDBFromPool(pool)
	defer conn.Close()
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		t.Fatal(err)
	}
	p, err := goose.NewProvider(goose.DialectPostgres, conn, files)
	if err != nil {
		t.Fatal(err)
	}
	var before int64
	for _, s := range p.ListSources() {
		if strings.HasSuffix(s.Path, "_"+name+".sql") {
			break
		}
		before = s.Version
	}
	if _, err := p.UpTo(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	fill(func(query string, args ...any) {
		t.Helper()
		if _, err := pool.Exec(t.Context(), query, args...); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
	})
	if done, err := p.Up(t.Context()); err != nil || len(done) == 0 || !strings.HasSuffix(done[0].Source.Path, "_"+name+".sql") {
		t.Fatalf("migrated: %v, %v", done, err)
	}
	return pool
}

// TestChannelsBeforeConfirmation checks that the migration confirms mail channels to a
// member's verified address, and that others get nothing.
func TestChannelsBeforeConfirmation(t *testing.T) {
	team, other := uuid.New(), uuid.New()
	pool := migratedFrom(t, "channel_confirmation", func(exec func(string, ...any)) {
		exec("INSERT INTO teams (id, name) VALUES ($1, 't'), ($2, 'o')", team, other)
		for email, verified := range map[string]bool{"Ada@example.com": true, "new@example.com": false} {
			u := uuid.New()
			exec("INSERT INTO users (id, email, verified_at) VALUES ($1, $2, CASE WHEN $3 THEN now() END)", u, email, verified)
			exec("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, 'member')", team, u)
		}
		for _, c := range []struct {
			of           uuid.UUID
			kind, target string
		}{{team, "email", "ada@example.com"}, {team, "email", "new@example.com"}, {team, "email", "x@example.com"}, {other, "email", "ada@example.com"}, {team, "webhook", "https://example.com"}} {
			exec("INSERT INTO channels (id, team_id, name, kind, events, target, sealed) VALUES (gen_random_uuid(), $1, 'c', $2, '{test}', $3, '')", c.of, c.kind, c.target)
		}
		exec("SELECT notify_channels(NULL, 'test', '{}')")
	})
	pending := func() (list string) {
		t.Helper()
		err := pool.QueryRow(t.Context(), "SELECT string_agg(kind || ' ' || target, ', ' ORDER BY kind) FROM deliveries JOIN channels c ON c.id = channel_id").Scan(&list)
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	const want = "email ada@example.com, webhook https://example.com"
	if got := pending(); got != want {
		t.Errorf("waiting deliveries go to %s, want %s", got, want)
	}
	if _, err := pool.Exec(t.Context(), "DELETE FROM deliveries; SELECT notify_channels(NULL, 'test', '{}')"); err != nil {
		t.Fatal(err)
	}
	if got := pending(); got != want {
		t.Errorf("new deliveries go to %s, want %s", got, want)
	}
}
