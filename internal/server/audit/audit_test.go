package audit

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// open returns a store on a new database, another connection to it, and a function that
// executes a statement there. options is added to the store's URL.
func open(t *testing.T, options string) (*store.Store, *pgx.Conn, func(statement string, args ...any)) {
	t.Helper()
	url := storetest.New(t)
	s, err := store.Open(context.Background(), url+options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	conn := pgtest.Connect(t, url)
	return s, conn, func(statement string, args ...any) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), statement, args...); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

// TestCharge checks that audit records, sandboxes' run times, tags and deliveries are
// charged to a team and its owner at once, and that a team keeps its newest audit records.
func TestCharge(t *testing.T) {
	ctx := t.Context()
	s, conn, exec := open(t, "")
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
	exec("INSERT INTO channels (id, team_id, name, kind, events, target, sealed) SELECT gen_random_uuid(), $1, 'c', 'slack', '{e}', 'x', '' FROM generate_series(1, 2) n", teams[0])
	exec("SELECT notify_channels($1, 'e', jsonb_build_object('k', repeat('x', 1000)))", teams[0])
	l := New(s, time.Hour, slog.New(slog.DiscardHandler))
	recount := func(most int64) {
		t.Helper()
		if err := l.Recount(ctx, most); err != nil {
			t.Fatal(err)
		}
	}
	charged := func(team uuid.UUID) int64 {
		t.Helper()
		return number("SELECT COALESCE((SELECT record_bytes FROM team_usage WHERE team_id = $1), 0) + unsettled_bytes($1)", team)
	}
	const others = 8*256 + 2*(512+1009)
	charges := func(when string, of ...int64) {
		t.Helper()
		for i, team := range teams {
			if got := charged(team); got != of[i] {
				t.Errorf("%s: team %d is charged for %d bytes, want %d", when, i, got, of[i])
			}
		}
	}
	charges("written", records*512+others, 0)
	// The owner's other team has less room even before the charges are recounted.
	exec("UPDATE platform_settings SET max_stored_mib = 3")
	template := func(team uuid.UUID) error {
		_, err := conn.Exec(ctx, `INSERT INTO templates (id, team_id, name, size_bytes, created_at, state, disk_mib, memory_mib) VALUES (gen_random_uuid(), $1, 'x', 0, now(), 'pending', 1, 1)`, team)
		return err
	}
	refused := func(when string) {
		t.Helper()
		if err := template(teams[1]); err == nil {
			t.Error(when + ": a team exceeds its owner's quota")
		} else if _, over := store.OverQuota(err); !over {
			t.Fatal(err)
		}
	}
	refused("written")
	for range 2 {
		recount(1 << 30)
		charges("recounted", records*512+others, 0)
	}
	if n := number("SELECT count(*) FROM record_charges"); n != 0 {
		t.Errorf("%d charges are not recounted", n)
	}
	refused("recounted")
	// The oldest records are removed, and the charge follows.
	recount(1000)
	if n, oldest := number("SELECT count(*) FROM audit_records"), number("SELECT max(object_id::integer) FROM audit_records"); n != 1000 || oldest != 1000 {
		t.Errorf("%d records are kept, the oldest of %d s ago", n, oldest)
	}
	charges("the oldest are gone", 1000*512+others, 0)
	if err := template(teams[1]); err != nil {
		t.Error("there should be room again: ", err)
	}
	made := charged(teams[1])
	exec("DELETE FROM audit_records")
	exec("DELETE FROM sandbox_runs")
	exec("DELETE FROM template_tags")
	exec("DELETE FROM channels")
	charges("all are gone", 0, made)
	recount(1000)
	charges("all are gone, and recounted", 0, made)
	// Records and charges of a deleted team count for nobody.
	exec("INSERT INTO record_charges (team_id, bytes) VALUES (gen_random_uuid(), 1)")
	exec(`INSERT INTO audit_records (id, at, team_id, actor, action, object, object_id, address, request_id, result, code)
		VALUES (gen_random_uuid(), now(), gen_random_uuid(), 'platform', 'x', '', '', '', '', 'ok', '')`)
	recount(1000)
	if n := number("SELECT count(*) FROM record_charges"); n != 0 {
		t.Errorf("%d charges of deleted teams are left", n)
	}
}

// TestUsersAudit checks that a user keeps the newest of the records that no team is charged
// for, and that those of admins, hosts and the platform stay.
func TestUsersAudit(t *testing.T) {
	ctx := t.Context()
	s, conn, exec := open(t, "")
	user, admin, team := uuid.New(), uuid.New(), uuid.New()
	exec("INSERT INTO users (id, email, admin) VALUES ($1, 'a@example.com', false), ($2, 'b@example.com', true)", user, admin)
	exec("INSERT INTO teams (id, name) VALUES ($1, 't')", team)
	n := 0
	record := func(of string, team *uuid.UUID, actor string, id, user *uuid.UUID) {
		t.Helper()
		for range 3 {
			n++
			exec(`INSERT INTO audit_records (id, at, team_id, actor, actor_id, user_id, action, object, object_id, address, request_id, result, code)
				VALUES (gen_random_uuid(), now() + $1 * interval '1 second', $2, $3, $4, $5, $6, '', '', '', '', 'ok', '')`, n, team, actor, id, user, of)
		}
	}
	gone, key, host := uuid.New(), uuid.New(), uuid.New()
	record("of the account", nil, User, &user, nil)
	record("of a deleted team, by the user", &gone, User, &user, nil)
	record("of a deleted team, by their key", &gone, Key, &key, &user)
	record("of a team", &team, User, &user, nil)
	record("of an admin", nil, User, &admin, nil)
	record("of a host", nil, Host, &host, nil)
	record("of the platform", nil, Platform, nil, nil)
	if err := New(s, time.Hour, slog.New(slog.DiscardHandler)).Recount(ctx, 4); err != nil {
		t.Fatal(err)
	}
	for of, want := range map[string]int64{
		"of the account": 0, "of a deleted team, by the user": 1, "of a deleted team, by their key": 3,
		"of a team": 3, "of an admin": 3, "of a host": 3, "of the platform": 3,
	} {
		var kept int64
		if err := conn.QueryRow(ctx, "SELECT count(*) FROM audit_records WHERE action = $1", of).Scan(&kept); err != nil || kept != want {
			t.Errorf("%s: %d records are kept, want %d, %v", of, kept, want, err)
		}
	}
}

// TestRefusalsTakeNothing checks that refused requests share one record per minute, and
// that a team is charged for that record alone.
func TestRefusalsTakeNothing(t *testing.T) {
	ctx, team := t.Context(), uuid.New()
	s, conn, exec := open(t, "")
	exec("INSERT INTO teams (id, name) VALUES ($1, 't')", team)
	l := New(s, time.Hour, slog.New(slog.DiscardHandler))
	const requests = 300
	begun := time.Now().Unix() / 60
	for range requests {
		if err := l.Write(ctx, Record{Team: &team, Actor: Anonymous, Action: "x", Address: "192.0.2.1", Result: Refused, Code: "unauthenticated"}); err != nil {
			t.Fatal(err)
		}
	}
	minutes := time.Now().Unix()/60 - begun + 1
	var rows, of, bytes int64
	if err := conn.QueryRow(ctx, "SELECT count(*), sum(count), unsettled_bytes($1) FROM audit_records WHERE team_id = $1", team).Scan(&rows, &of, &bytes); err != nil {
		t.Fatal(err)
	}
	if rows > minutes || of != requests || bytes != rows*512 {
		t.Errorf("%d requests within %d minutes have %d records, which count %d requests; the team is charged %d bytes", requests, minutes, rows, of, bytes)
	}
}

// TestChargesTogether recounts charges while others write and remove records and check
// quotas: nothing is lost or counted twice.
func TestChargesTogether(t *testing.T) {
	ctx, team := t.Context(), uuid.New()
	s, conn, exec := open(t, "&pool_max_conns=10")
	exec("INSERT INTO teams (id, name) VALUES ($1, 't')", team)
	exec("INSERT INTO team_quotas (team_id) VALUES ($1)", team)
	l := New(s, time.Hour, slog.New(slog.DiscardHandler))
	const each = 40
	var writers, recounts sync.WaitGroup
	for range 4 {
		writers.Go(func() {
			for range each {
				if err := l.Write(ctx, Record{Team: &team, Actor: Platform, Action: "x", Result: OK}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Go(func() {
		for range each {
			if _, err := s.ForgetTeamAudit(ctx, db.ForgetTeamAuditParams{TeamID: team, MaxRows: 1}); err != nil {
				t.Error(err)
			}
		}
	})
	over := make(chan struct{})
	for _, do := range []func() error{
		func() error { return l.Recount(ctx, 1<<30) },
		func() error { return s.CheckRoom(ctx, team) },
	} {
		for range 2 {
			recounts.Go(func() {
				for {
					if err := do(); err != nil {
						t.Error(err)
					}
					select {
					case <-over:
						return
					default:
					}
				}
			})
		}
	}
	writers.Wait()
	close(over)
	recounts.Wait()
	var rows, charged, counted int64
	if err := conn.QueryRow(ctx, "SELECT count(*), (SELECT record_bytes + unsettled_bytes($1) FROM team_usage WHERE team_id = $1), (SELECT swept_bytes + unsettled_bytes($1) FROM team_usage WHERE team_id = $1) FROM audit_records WHERE team_id = $1", team).Scan(&rows, &charged, &counted); err != nil {
		t.Fatal(err)
	}
	if charged != rows*512 || counted != rows*512 {
		t.Errorf("the team has %d records, and is charged for %d bytes, %d of them recounted", rows, charged, counted)
	}
}

// TestEarly checks that a request whose record is written early ends up with exactly one
// record, which has the request's result.
func TestEarly(t *testing.T) {
	ctx := t.Context()
	s, conn, exec := open(t, "")
	team, key := uuid.New(), uuid.New()
	exec("INSERT INTO teams (id, name) VALUES ($1, 't')", team)
	l := New(s, time.Hour, slog.New(slog.DiscardHandler))
	as := func(result, code string) Record {
		return Record{Team: &team, Actor: Key, ActorID: &key, Action: "exec", Object: "sandbox", ObjectID: "x", Result: result, Code: code}
	}
	early := func() *Early {
		left, leave := context.WithCancel(ctx)
		leave() // The end of the request does not stop it.
		return l.WriteEarly(left, await.Hang, as(OK, ""))
	}
	written := func(when string, want ...string) {
		t.Helper()
		var got []string
		var charged int
		if err := conn.QueryRow(ctx, `SELECT array_agg(concat_ws(' ', result, NULLIF(code, ''), count) ORDER BY result, code),
			(SELECT sum(bytes) / 512 FROM record_charges) FROM audit_records`).Scan(&got, &charged); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) || charged != len(want) {
			t.Errorf("%s: %q, want %q; %d are charged", when, got, want, charged)
		}
	}
	if err := early().End(ctx, as(OK, "")); err != nil {
		t.Error(err)
	}
	written("a success", "ok 1")
	if err := early().End(ctx, as(Failed, "internal")); err != nil {
		t.Error(err)
	}
	written("and a failure", "failed internal 1", "ok 1")
	for {
		exec("DELETE FROM audit_records WHERE result = 'refused'")
		minute := time.Now().Unix() / 60
		for range 2 {
			if err := early().End(ctx, as(Refused, "not_found")); err != nil {
				t.Error(err)
			}
		}
		if time.Now().Unix()/60 == minute {
			break // Both are of the same minute, so they share a record.
		}
	}
	written("and two refusals", "failed internal 1", "ok 1", "refused not_found 2")

	// A record that the database did not take early is written at the end, or never.
	exec("ALTER TABLE audit_records ADD CONSTRAINT broken CHECK (result <> 'ok') NOT VALID")
	if err := early().End(ctx, as(OK, "")); err == nil {
		t.Error("no error says that the record is missing")
	}
	late := early()
	<-late.done
	exec("ALTER TABLE audit_records DROP CONSTRAINT broken")
	if err := late.End(ctx, as(OK, "")); err != nil {
		t.Error(err)
	}
	written("and a second try", "failed internal 1", "ok 1", "ok 1", "refused not_found 2")
}
