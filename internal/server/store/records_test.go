package store

import (
	"context"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
)

// records are a team's remaining rows, and how much they count.
type records struct{ bytes, ended, endedBytes int64 }

func recordsOf(t *testing.T, pool *pgxpool.Pool, team uuid.UUID) (r records) {
	t.Helper()
	err := pool.QueryRow(t.Context(), "SELECT record_bytes - swept_bytes, ended, ended_bytes FROM team_usage WHERE team_id = $1", team).Scan(&r.bytes, &r.ended, &r.endedBytes)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// number returns the result of a counting query.
func number(t *testing.T, pool *pgxpool.Pool, query string, args ...any) (n int64) {
	t.Helper()
	if err := pool.QueryRow(t.Context(), query, args...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return n
}

// have creates a number of ended sandboxes of a team, the first one ended longest ago,
// each with an idempotency key.
const have = `WITH made AS (
	INSERT INTO sandboxes (id, team_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at, ended_at)
	SELECT gen_random_uuid(), $1, gen_random_uuid(), n::text, 'stopped', 1, 1, 1, 0, jsonb_build_object('m', repeat('m', $3)), now(), now() - (10000 - n) * interval '1 minute'
	FROM generate_series(1, $2::integer) n RETURNING id, template_name)
	INSERT INTO idempotency_keys (team_id, key, request_hash, sandbox_id) SELECT $1, template_name, '', id FROM made`

// TestEndedSandboxes checks that a team keeps its newest ended sandboxes, up to a number
// and a sum of bytes, with the idempotency keys that created them. Rows locked by another
// transaction do not delay a sandbox's end.
func TestEndedSandboxes(t *testing.T) {
	_, pool, team := quotaTest(t)
	exec := func(query string, args ...any) {
		t.Helper()
		if _, err := pool.Exec(t.Context(), query, args...); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
	}
	most, mostBytes := number(t, pool, "SELECT most_ended()"), number(t, pool, "SELECT most_ended_bytes()")
	// end creates a sandbox and ends it.
	end := func() {
		t.Helper()
		u := uuid.New()
		exec(insertSandbox, u, team, 1, 1, 1)
		err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(t.Context(), "SET LOCAL lock_timeout = '30s'"); err != nil {
				return err
			}
			_, err := tx.Exec(t.Context(), "UPDATE sandboxes SET state = 'stopped', ended_at = now(), error = 'gone' WHERE id = $1", u)
			return err
		})
		if err != nil {
			t.Fatal("an end waits for another transaction's locks: ", err)
		}
		if number(t, pool, "SELECT count(*) FROM sandboxes WHERE id = $1", u) != 1 {
			t.Error("the sandbox that has just ended was removed")
		}
	}
	there := func(name string) bool {
		t.Helper()
		rows, keys := number(t, pool, "SELECT count(*) FROM sandboxes WHERE template_name = $1", name), number(t, pool, "SELECT count(*) FROM idempotency_keys WHERE key = $1", name)
		if rows != keys {
			t.Errorf("%s has %d rows and %d keys", name, rows, keys)
		}
		return rows > 0
	}
	agrees := func() records {
		t.Helper()
		r := recordsOf(t, pool, team)
		is := records{
			number(t, pool, "SELECT sum(sandbox_bytes(metadata, error)) FROM sandboxes"),
			number(t, pool, "SELECT count(*) FROM sandboxes WHERE state = 'stopped'"),
			number(t, pool, "SELECT sum(sandbox_bytes(metadata, error)) FROM sandboxes WHERE state = 'stopped'"),
		}
		if r != is {
			t.Errorf("counted %+v, but there are %+v", r, is)
		}
		return r
	}
	exec(have, team, most, 0)
	if agrees().ended != most || !there("1") {
		t.Error("fewer are kept than a team may have")
	}

	// Another transaction has locked the oldest two, one of them by its key.
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	for _, lock := range []string{"SELECT FROM sandboxes WHERE template_name = '1' FOR UPDATE", "SELECT FROM idempotency_keys WHERE key = '2' FOR UPDATE"} {
		if _, err := tx.Exec(t.Context(), lock); err != nil {
			t.Fatal(err)
		}
	}
	end()
	if !there("1") || !there("2") {
		t.Error("a locked row was removed")
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	end()
	end()
	if r := agrees(); r.ended != most || there("1") || there("2") || there("3") || !there("4") {
		t.Errorf("%d of %d are kept, or not the newest", r.ended, most)
	}
	// If they are large, fewer are kept.
	exec("DELETE FROM sandboxes")
	if r := recordsOf(t, pool, team); r != (records{}) {
		t.Errorf("%+v are left", r)
	}
	exec(have, team, mostBytes>>20+8, 512<<10)
	end()
	r := agrees()
	if r.endedBytes > mostBytes || r.endedBytes < mostBytes-2<<20 || there("1") {
		t.Errorf("%d bytes are kept, want at most %d", r.endedBytes, mostBytes)
	}
}

// TestQuotaOfBuilds checks that a build counts with the maximum size of its log, and then
// with its real size. A team keeps its newest builds, and those that determine the next
// version.
func TestQuotaOfBuilds(t *testing.T) {
	s, pool, team := quotaTest(t)
	exec := func(query string, args ...any) error {
		_, err := pool.Exec(t.Context(), query, args...)
		return err
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	measure := func() {
		t.Helper()
		_, err := s.MeasureBuildLogs(t.Context(), 1000)
		must(err)
	}
	const insert = `INSERT INTO builds (id, team_id, name, tags, recipe, options, state, total_steps, created_at) VALUES ($1, $2, 'b', '{}', $3, '{}', 'queued', 1, now())`
	bound := int64(30)
	must(s.SetQuota(t.Context(), db.SetQuotaParams{TeamID: team, MaxStoredMiB: &bound}))
	one, two := uuid.New(), uuid.New()
	must(exec(insert, one, team, "r"))
	if got := s.stored(t, team); got != 16 {
		t.Errorf("a queued build counts %d MiB", got)
	}
	if _, over := OverQuota(exec(insert, two, team, "r")); !over {
		t.Error("a build without room for its log is accepted")
	}
	must(exec("UPDATE builds SET state = 'running'"))
	must(exec("INSERT INTO build_steps SELECT $1, n, to_jsonb((SELECT string_agg(md5(n || ' ' || i), '') FROM generate_series(1, 4096) i)) FROM generate_series(1, 40) n", one))
	must(exec("UPDATE builds SET state = 'failed', ended_at = now()"))
	measure()
	if got := s.stored(t, team); got < 3 || got > 5 {
		t.Errorf("a log of 5 MiB, which the database compresses, counts %d MiB", got)
	}
	must(exec(insert, two, team, strings.Repeat("r", 1<<20)))
	if got := s.stored(t, team); got < 20 {
		t.Errorf("it counts %d MiB with a build of a long recipe", got)
	}
	must(exec("DELETE FROM builds"))
	if r := recordsOf(t, pool, team); r != (records{}) {
		t.Errorf("%+v are left", r)
	}

	// Of 30 builds, 10 are kept, and the last one of a name whose template was deleted.
	must(s.DeleteQuota(t.Context(), team))
	const done = `INSERT INTO builds (id, team_id, name, version, tags, recipe, options, state, total_steps, created_at)
		SELECT gen_random_uuid(), $1, $2, n, '{}', '', '{}', 'succeeded', 1, now() - $3::integer * interval '1 hour' + n * interval '1 minute' FROM generate_series(1, $4::integer) n`
	must(exec(done, team, "gone", 9, 5))
	must(exec(done, team, "last", 8, 5))
	must(exec(done, team, "there", 7, 20))
	must(exec("INSERT INTO templates (id, team_id, name, size_bytes, created_at, version) VALUES (gen_random_uuid(), $1, 'last', 1, now(), 4), (gen_random_uuid(), $1, 'there', 1, now(), 20)", team))
	measure()
	forget := func(bytes int64) {
		t.Helper()
		must(s.ForgetBuilds(t.Context(), db.ForgetBuildsParams{TeamID: team, Most: 10, MostBytes: bytes}))
	}
	forget(1 << 30)
	kept := func(name string) int64 {
		t.Helper()
		return number(t, pool, "SELECT count(*) FROM builds WHERE name = $1", name)
	}
	if kept("gone") != 0 || kept("last") != 1 || kept("there") != 10 || number(t, pool, "SELECT version FROM builds WHERE name = 'last'") != 5 {
		t.Errorf("kept %d, %d and %d", kept("gone"), kept("last"), kept("there"))
	}
	forget(3 * 2048)
	if kept("there") != 3 {
		t.Errorf("%d are kept, but there is room for 3", kept("there"))
	}
	// A build whose sandbox still exists is not removed.
	must(exec(insertSandbox, uuid.New(), team, 1, 1, 1))
	must(exec("UPDATE sandboxes SET build_id = (SELECT id FROM builds WHERE name = 'there' ORDER BY version LIMIT 1)"))
	forget(1)
	if kept("there") != 1 || recordsOf(t, pool, team).bytes != number(t, pool, "SELECT (SELECT sum(build_bytes(log_bytes, recipe)) FROM builds) + (SELECT sum(sandbox_bytes(metadata, error)) FROM sandboxes)") {
		t.Errorf("%d are kept, or they are counted wrongly", kept("there"))
	}
}

// TestTagsAreBounded checks that a team may set a bounded number of tags, and that
// "latest" of a new name is not refused.
func TestTagsAreBounded(t *testing.T) {
	_, pool, team := quotaTest(t)
	exec := func(query string, args ...any) error {
		_, err := pool.Exec(t.Context(), query, args...)
		return err
	}
	for _, query := range []string{
		"INSERT INTO templates (id, team_id, name, size_bytes, created_at) VALUES (gen_random_uuid(), $1, 't', 1, now())",
		"INSERT INTO template_tags SELECT team_id, 't', n::text, id FROM templates, generate_series(1, most_tags()) n WHERE team_id = $1",
	} {
		if err := exec(query, team); err != nil {
			t.Fatal(err)
		}
	}
	tag := func(name, tag string) error {
		return exec("INSERT INTO template_tags SELECT team_id, $2, $3, id FROM templates WHERE team_id = $1 ON CONFLICT (team_id, name, tag) DO UPDATE SET template_id = EXCLUDED.template_id", team, name, tag)
	}
	if why, over := OverQuota(tag("t", "more")); !over || !strings.Contains(why, "10000") {
		t.Errorf("one more tag: refused is %v, %q", over, why)
	}
	if err := tag("t", "1"); err != nil {
		t.Errorf("moving an existing tag: %v", err)
	}
	if err := tag("u", "latest"); err != nil {
		t.Errorf("the latest of another name: %v", err)
	}
}

// TestRecordsBefore checks that existing rows count after the migration.
func TestRecordsBefore(t *testing.T) {
	team := uuid.New()
	pool := migratedFrom(t, "ended_rows_quota", func(exec func(string, ...any)) {
		exec("INSERT INTO teams (id, name) VALUES ($1, 't')", team)
		exec(have, team, 3, 10)
		exec(insertSandbox, uuid.New(), team, 1, 1, 1)
		exec(`INSERT INTO builds (id, team_id, name, tags, recipe, options, state, total_steps, created_at)
			SELECT gen_random_uuid(), $1, 'b', '{}', 'r', '{}', unnest('{queued,failed}'::text[]), 1, now()`, team)
		exec("INSERT INTO build_steps SELECT id, 1, to_jsonb(repeat('x', 100)) FROM builds WHERE state = 'failed'")
	})
	r := recordsOf(t, pool, team)
	sandboxes := 3*(2048+2*int64(len(`{"m": "mmmmmmmmmm"}`))) + 2048 + 4
	builds := r.bytes - sandboxes
	if r.ended != 3 || r.endedBytes != sandboxes-2048-4 || builds < 16<<20+2*2049+200 || builds > 16<<20+2*2049+250 {
		t.Errorf("%+v, %d of them builds'", r, builds)
	}
}
