package audit

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// TestCharge: a team and its owner are charged for audit records, times that sandboxes
// ran and tags, and a team keeps its newest audit records.
func TestCharge(t *testing.T) {
	ctx, url := t.Context(), pgtest.New(t)
	s, err := store.Open(context.Background(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	conn := pgtest.Connect(t, url)
	exec := func(query string, args ...any) {
		t.Helper()
		if _, err := conn.Exec(ctx, query, args...); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
	}
	number := func(query string, args ...any) (n int64) {
		t.Helper()
		if err := conn.QueryRow(ctx, query, args...).Scan(&n); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
		return n
	}
	owner, teams := uuid.New(), []uuid.UUID{uuid.New(), uuid.New()}
	exec("INSERT INTO users (id, email) VALUES ($1, 'a@example.com')", owner)
	for _, team := range teams {
		exec("INSERT INTO teams (id, name) VALUES ($1, 't')", team)
		exec("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, 'owner')", team, owner)
	}
	const records = 6000 // three MiB
	exec(`INSERT INTO audit_records (id, at, team_id, actor, action, object, object_id, address, request_id, result, code)
		SELECT gen_random_uuid(), now() - n * interval '1 second', $1, 'platform', 'x', '', n::text, '', '', 'ok', '' FROM generate_series(1, $2::integer) n`, teams[0], records)
	exec("INSERT INTO sandbox_runs (sandbox_id, team_id, vcpus, memory_mib, first, started_at, ended_at) SELECT gen_random_uuid(), $1, 1, 1, true, now(), now() FROM generate_series(1, 4) n", teams[0])
	exec("INSERT INTO templates (id, team_id, name, size_bytes, created_at) VALUES (gen_random_uuid(), $1, 't', 1, now())", teams[0])
	exec("INSERT INTO template_tags SELECT team_id, 't', n::text, id FROM templates, generate_series(1, 4) n WHERE team_id = $1", teams[0])
	l := New(s, time.Hour, slog.New(slog.DiscardHandler))
	charge := func(most int64) {
		t.Helper()
		if err := l.Charge(ctx, most); err != nil {
			t.Fatal(err)
		}
	}
	charged := func(team uuid.UUID) int64 {
		t.Helper()
		return number("SELECT COALESCE((SELECT record_bytes FROM team_usage WHERE team_id = $1), 0)", team)
	}
	const others = 8 * 256
	for range 2 {
		if charge(1 << 30); charged(teams[0]) != records*512+others || charged(teams[1]) != 0 {
			t.Errorf("the teams are charged for %d and %d bytes", charged(teams[0]), charged(teams[1]))
		}
	}
	// The owner's other team has less room.
	exec("UPDATE platform_settings SET max_stored_mib = 3")
	template := func(team uuid.UUID) error {
		_, err := conn.Exec(ctx, `INSERT INTO templates (id, team_id, name, size_bytes, created_at, state, disk_mib, memory_mib) VALUES (gen_random_uuid(), $1, 'x', 0, now(), 'pending', 1, 1)`, team)
		return err
	}
	if err := template(teams[1]); err == nil {
		t.Error("a team stores what its owner has no room for")
	} else if _, over := store.OverQuota(err); !over {
		t.Fatal(err)
	}
	// The oldest are forgotten; what a team is charged for follows.
	charge(1000)
	if n, oldest := number("SELECT count(*) FROM audit_records"), number("SELECT max(object_id::integer) FROM audit_records"); n != 1000 || oldest != 1000 {
		t.Errorf("%d records are kept, the oldest of %d s ago", n, oldest)
	}
	if charge(1000); charged(teams[0]) != 1000*512+others {
		t.Errorf("the team is charged for %d bytes", charged(teams[0]))
	}
	if err := template(teams[1]); err != nil {
		t.Error("there is room again: ", err)
	}
	exec("DELETE FROM audit_records")
	exec("DELETE FROM sandbox_runs")
	exec("DELETE FROM template_tags")
	if charge(1000); charged(teams[0]) != 0 {
		t.Errorf("nothing is there, and the team is charged for %d bytes", charged(teams[0]))
	}
}
