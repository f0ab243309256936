package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// quotaTest returns a store with a team, and the store's connections.
func quotaTest(t *testing.T) (*Store, *pgxpool.Pool, uuid.UUID) {
	t.Helper()
	s, err := Open(context.Background(), migrated.New(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	team := uuid.New()
	if err := s.InsertTeam(context.Background(), db.InsertTeamParams{ID: team, Name: "t"}); err != nil {
		t.Fatal(err)
	}
	return s, s.pool, team
}

func (s *Store) quota(t *testing.T, team uuid.UUID, running, vcpus int32, memory, disk int64) {
	t.Helper()
	err := s.SetQuota(context.Background(), db.SetQuotaParams{TeamID: team, MaxRunning: &running, MaxVCPUs: &vcpus, MaxMemoryMiB: &memory, MaxDiskMiB: &disk})
	if err != nil {
		t.Fatal(err)
	}
}

const insertSandbox = `INSERT INTO sandboxes (id, team_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at)
	VALUES ($1, $2, gen_random_uuid(), 'x', 'starting', $3, $4, $5, 0, '{}', now())`

// TestQuotaTogether requests a hundred sandboxes at once, and the quota has room for
// seven.
func TestQuotaTogether(t *testing.T) {
	s, pool, team := quotaTest(t)
	s.quota(t, team, 7, 1000, 1<<40, 1<<40)
	var made, refused atomic.Int32
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			_, err := pool.Exec(context.Background(), insertSandbox, uuid.New(), team, 1, 512, 0)
			if why, over := OverQuota(err); over && why != "" {
				refused.Add(1)
			} else if err != nil {
				t.Errorf("insert: %v", err)
			} else {
				made.Add(1)
			}
		})
	}
	wg.Wait()
	if made.Load() != 7 || refused.Load() != 93 {
		t.Errorf("%d created, %d refused; want 7 and 93", made.Load(), refused.Load())
	}
}

func TestQuotaBounds(t *testing.T) {
	s, pool, team := quotaTest(t)
	ctx := context.Background()
	insert := func(vcpus, memory, disk int) error {
		_, err := pool.Exec(ctx, insertSandbox, uuid.New(), team, vcpus, memory, disk)
		return err
	}
	refused := func(what string, err error) {
		t.Helper()
		if _, over := OverQuota(err); !over {
			t.Errorf("%s: %v; want a refusal", what, err)
		}
	}
	const disks = 2*hostwire.DefaultDiskMiB + 1000
	s.quota(t, team, 10, 4, 2048, disks)
	refused("vCPUs", insert(5, 512, 1))
	refused("memory", insert(1, 2049, 1))
	refused("disk", insert(1, 512, disks+1))
	if err := insert(2, 1024, hostwire.DefaultDiskMiB); err != nil {
		t.Fatal(err)
	}
	// A disk of unknown size counts as one of the default size: two fit, three do not.
	if err := insert(1, 512, 0); err != nil {
		t.Fatal(err)
	}
	refused("unknown disk", insert(1, 512, 0))
	// A size that becomes known later is counted, and never refused.
	if _, err := pool.Exec(ctx, "UPDATE sandboxes SET state = 'running', disk_mib = 9000 WHERE disk_mib = 0"); err != nil {
		t.Error(err)
	}
	u, err := s.GetUsage(ctx, team)
	if err != nil || u.Running != 2 || u.VCPUs != 3 || u.MemoryMiB != 1536 || u.DiskMiB != hostwire.DefaultDiskMiB+9000 {
		t.Errorf("usage %+v, %v", u, err)
	}
	// Lowering a quota below the usage ends nothing, and sandboxes can still end.
	s.quota(t, team, 0, 0, 0, 0)
	if _, err := pool.Exec(ctx, "UPDATE sandboxes SET state = 'stopping'"); err != nil {
		t.Error(err)
	}
	if _, err := pool.Exec(ctx, "UPDATE sandboxes SET state = 'stopped'"); err != nil {
		t.Error(err)
	}
	if u, err = s.GetUsage(ctx, team); err != nil || u != (db.GetUsageRow{}) {
		t.Errorf("after the end: usage %+v, %v", u, err)
	}
	// A team that is being deleted gets nothing.
	s.quota(t, team, 10, 10, 10000, 100000)
	if n, err := s.MarkTeamDeleting(ctx, team); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if err := insert(1, 512, 0); !TeamGone(err) {
		t.Errorf("insert for a team that is being deleted: %v", err)
	}
}

// TestUsageAgrees changes sandboxes of several teams at random, many in one statement and
// concurrently: the teams' recorded usage always matches their sandboxes.
func TestUsageAgrees(t *testing.T) {
	_, pool, _ := quotaTest(t)
	ctx := context.Background()
	for _, sql := range []string{
		"UPDATE platform_settings SET max_running = NULL, max_vcpus = NULL, max_memory_mib = NULL, max_disk_mib = NULL, max_stored_mib = NULL",
		"ALTER TABLE sandboxes DROP CONSTRAINT sandboxes_state_check", // allows made-up states
		"INSERT INTO teams (id, name) SELECT gen_random_uuid(), 'team' || n FROM generate_series(1, 5) n",
	} {
		if _, err := pool.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	const states = "(array['starting', 'running', 'pausing', 'paused', 'resuming', 'stopping', 'stopped', 'error'])[1 + floor(random() * 8)::int]"
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			for range 40 {
				n := 1 + rand.IntN(5)
				var sql string
				switch rand.IntN(4) {
				case 0, 1:
					sql = fmt.Sprintf(`INSERT INTO sandboxes (id, team_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at, on_timeout, forked_from)
						SELECT gen_random_uuid(), t.id, gen_random_uuid(), 'x', %s, 1 + n, 128 * n, CASE WHEN n %% 2 = 0 THEN 0 ELSE 1000 * n END, 0, '{}', now(),
							CASE WHEN random() < 0.3 THEN 'pause' ELSE 'destroy' END, CASE WHEN random() < 0.3 THEN gen_random_uuid() END
						FROM (SELECT id FROM teams ORDER BY random() LIMIT 2) t, generate_series(1, %d) n`, states, n)
				case 2:
					sql = fmt.Sprintf("UPDATE sandboxes SET state = %s, disk_mib = disk_mib + 10, error = repeat('e', (random() * 9)::integer) WHERE id IN (SELECT id FROM sandboxes ORDER BY random() LIMIT %d FOR UPDATE SKIP LOCKED)", states, n)
				case 3:
					sql = fmt.Sprintf("DELETE FROM sandboxes WHERE id IN (SELECT id FROM sandboxes ORDER BY random() LIMIT %d FOR UPDATE SKIP LOCKED)", n)
				}
				if _, err := pool.Exec(ctx, sql); err != nil {
					t.Errorf("%s: %v", sql, err)
				}
			}
		})
	}
	wg.Wait()
	for _, table := range []string{"audit_records", "sandbox_runs"} {
		if number(t, pool, "SELECT count(*) FROM "+table) == 0 {
			t.Errorf("%s is empty", table)
		}
	}
	var wrong, some int
	err := pool.QueryRow(ctx, `
		SELECT count(*) FILTER (WHERE (COALESCE(u.running, 0), COALESCE(u.vcpus, 0), COALESCE(u.memory_mib, 0), COALESCE(u.disk_mib, 0), COALESCE(u.stored_mib, 0),
				COALESCE(u.record_bytes - u.swept_bytes, 0), COALESCE(u.swept_bytes, 0) + unsettled_bytes(t.id), COALESCE(u.ended, 0), COALESCE(u.ended_bytes, 0))
			IS DISTINCT FROM (COALESCE(h.running, 0), COALESCE(h.vcpus, 0), COALESCE(h.memory, 0), COALESCE(h.disk, 0), COALESCE(h.stored, 0),
				COALESCE(h.bytes, 0), 512 * (SELECT count(*) FROM audit_records a WHERE a.team_id = t.id) + 256 * (SELECT count(*) FROM sandbox_runs r WHERE r.team_id = t.id), COALESCE(h.ended, 0), COALESCE(h.ended_bytes, 0))), count(*) FILTER (WHERE h.running > 0)
		FROM teams t LEFT JOIN team_usage u ON u.team_id = t.id LEFT JOIN (
			SELECT team_id, count(*) FILTER (WHERE state NOT IN ('paused', 'stopped', 'error')) AS running,
				sum(vcpus) FILTER (WHERE state NOT IN ('paused', 'stopped', 'error')) AS vcpus,
				sum(memory_mib) FILTER (WHERE state NOT IN ('paused', 'stopped', 'error')) AS memory,
				sum(CASE disk_mib WHEN 0 THEN $1 ELSE disk_mib END) FILTER (WHERE state NOT IN ('stopped', 'error')) AS disk,
				sum(memory_mib) FILTER (WHERE state NOT IN ('stopped', 'error') AND (saved OR on_timeout = 'pause' OR state IN ('pausing', 'resuming'))) AS stored,
				sum(2048 + 2 * length(metadata::text) + length(error)) AS bytes, count(*) FILTER (WHERE state IN ('stopped', 'error')) AS ended,
				sum(2048 + 2 * length(metadata::text) + length(error)) FILTER (WHERE state IN ('stopped', 'error')) AS ended_bytes
			FROM sandboxes GROUP BY team_id) h ON h.team_id = t.id`, hostwire.DefaultDiskMiB).Scan(&wrong, &some)
	if err != nil || wrong > 0 || some == 0 {
		t.Errorf("usage of %d teams is wrong, %d have sandboxes: %v", wrong, some, err)
	}
}

// stored returns a team's storage in MiB.
func (s *Store) stored(t *testing.T, team uuid.UUID) int64 {
	t.Helper()
	u, err := s.GetUsage(t.Context(), team)
	if errors.Is(err, ErrNoRows) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	return u.StoredMiB
}

// TestQuotaStored checks that a template counts with its maximum size before it is
// created, and with its real size afterwards, and that saved memory and archives count
// likewise.
func TestQuotaStored(t *testing.T) {
	s, pool, team := quotaTest(t)
	ctx := t.Context()
	exec := func(query string, args ...any) error {
		_, err := pool.Exec(ctx, query, args...)
		return err
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := func(what string, err error) {
		t.Helper()
		if _, over := OverQuota(err); !over {
			t.Errorf("%s: %v; want a refusal", what, err)
		}
	}
	is := func(when string, want int64) {
		t.Helper()
		if got := s.stored(t, team); got != want {
			t.Errorf("%s: %d MiB are stored, want %d", when, got, want)
		}
	}
	const template = `INSERT INTO templates (id, team_id, name, size_bytes, created_at, state, disk_mib, memory_mib, kind) VALUES ($1, $2, $3, 0, now(), 'pending', $4, $5, $6)`
	bound := int64(7000)
	must(s.SetQuota(ctx, db.SetQuotaParams{TeamID: team, MaxStoredMiB: &bound}))
	refused("a huge image", exec(template, uuid.New(), team, "a", 1048576, 0, "template"))
	is("a refused import", 0)
	one := uuid.New()
	must(exec(template, one, team, "a", 5120, 512, "template"))
	is("an import under way", 5632)
	refused("a layer beside it", exec(template, uuid.New(), team, "b", 2000, 128, "layer"))
	must(exec("UPDATE templates SET state = 'ready', size_bytes = 3000::bigint << 20 WHERE id = $1", one))
	is("an import", 3000)
	must(exec(template, uuid.New(), team, "b", 2000, 128, "layer"))
	is("a layer beside it", 5128)

	box := uuid.New()
	must(exec(insertSandbox, box, team, 1, 1500, 0))
	must(exec("UPDATE sandboxes SET state = 'running' WHERE id = $1", box))
	is("a running sandbox", 5128)
	must(exec("UPDATE sandboxes SET state = 'pausing' WHERE id = $1", box))
	is("its memory", 6628)
	must(exec("UPDATE sandboxes SET state = 'paused' WHERE id = $1", box))
	refused("an archive", exec("INSERT INTO build_archives VALUES ($1, 'x', 400 << 20)", team))
	must(exec("INSERT INTO build_archives VALUES ($1, 'x', 1)", team))
	is("an archive of a byte", 6629)
	// The saved memory stays on the disk, and the next pause takes no more.
	must(exec("UPDATE sandboxes SET state = 'running' WHERE id = $1", box))
	is("it was resumed", 6629)
	must(exec("UPDATE templates SET size_bytes = 6000::bigint << 20 WHERE id = $1", one))
	is("a template has grown", 9629)
	must(exec("UPDATE sandboxes SET state = 'pausing' WHERE id = $1", box))
	must(exec("UPDATE sandboxes SET state = 'paused' WHERE id = $1", box))
	is("it is paused again", 9629)
	must(exec("UPDATE sandboxes SET state = 'stopping' WHERE id = $1", box))
	is("it is being removed", 9629)
	must(exec("UPDATE sandboxes SET state = 'stopped' WHERE id = $1", box))
	is("it was removed", 8129)
	another := uuid.New()
	refused("a sandbox, whose row is a record", exec(insertSandbox, another, team, 1, 1500, 0))
	must(exec("UPDATE team_quotas SET max_stored_mib = 9000 WHERE team_id = $1", team))
	must(exec(insertSandbox, another, team, 1, 1500, 0))
	must(exec("UPDATE sandboxes SET state = 'running' WHERE id = $1", another))
	refused("a pause", exec("UPDATE sandboxes SET state = 'pausing' WHERE id = $1", another))
	// A pause by the host itself, or of a draining host, is not refused.
	must(exec("UPDATE sandboxes SET state = 'pausing', drained = true WHERE id = $1", another))
	must(exec("UPDATE sandboxes SET state = 'running', drained = false WHERE id = $1", another))
	is("a pause failed", 8129)
	must(exec("UPDATE sandboxes SET state = 'stopped' WHERE id = $1", another))
	must(exec("DELETE FROM build_archives"))
	must(exec("DELETE FROM templates WHERE team_id = $1", team))
	is("all is gone", 0)

	// A deleted team takes its templates along.
	must(exec("DELETE FROM sandboxes"))
	must(exec(template, uuid.New(), team, "a", 0, 0, "template"))
	must(exec("DELETE FROM teams WHERE id = $1", team))
}

// TestQuotaOfTimeouts checks that a sandbox that will be paused at its timeout, and a
// fork of one, reserve memory from the start, so that no series of creations, timeouts
// and resumes exceeds the quota.
func TestQuotaOfTimeouts(t *testing.T) {
	s, pool, team := quotaTest(t)
	ctx := t.Context()
	bound := int64(3000)
	if err := s.SetQuota(ctx, db.SetQuotaParams{TeamID: team, MaxStoredMiB: &bound}); err != nil {
		t.Fatal(err)
	}
	insert := func(more string) error {
		_, err := pool.Exec(ctx, strings.Replace(strings.Replace(insertSandbox, "created_at)", "created_at, on_timeout, forked_from)", 1), "now())", "now(), "+more+")", 1), uuid.New(), team, 1, 512, 0)
		return err
	}
	made := 0
	for range 20 {
		err := insert("'pause', NULL")
		if err == nil {
			made++
		} else if _, over := OverQuota(err); !over {
			t.Fatal(err)
		}
		// Their hosts pause them, which the server cannot refuse.
		for _, state := range []string{"running", "paused"} {
			if _, err := pool.Exec(ctx, "UPDATE sandboxes SET state = $1", state); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := s.stored(t, team); made != 5 || got != 5*512 {
		t.Errorf("%d were created, which take %d MiB", made, got)
	}
	if _, over := OverQuota(insert("'destroy', gen_random_uuid()")); !over {
		t.Error("a fork was created without room")
	}
	if err := insert("'destroy', NULL"); err != nil {
		t.Errorf("a sandbox that is destroyed at its timeout: %v", err)
	}
	if _, err := pool.Exec(ctx, "UPDATE sandboxes SET state = 'stopped'"); err != nil {
		t.Fatal(err)
	}
	if err := insert("'destroy', gen_random_uuid()"); err != nil || s.stored(t, team) != 512 {
		t.Errorf("a fork: %v, %d MiB", err, s.stored(t, team))
	}
}

// TestSavedBefore checks that after the migration, sandboxes count that are paused, are
// forks, or will be paused at their timeout.
func TestSavedBefore(t *testing.T) {
	team := uuid.New()
	pool := migratedFrom(t, "saved_memory_quota", func(exec func(string, ...any)) {
		exec("INSERT INTO teams (id, name) VALUES ($1, 't')", team)
		for i, more := range []string{"'running', 'destroy', NULL", "'running', 'pause', NULL", "'paused', 'destroy', NULL", "'running', 'destroy', gen_random_uuid()", "'stopped', 'pause', NULL"} {
			exec(`INSERT INTO sandboxes (id, team_id, template_id, template_name, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at, state, on_timeout, forked_from)
				VALUES (gen_random_uuid(), $1, gen_random_uuid(), 'x', 1, 1 << $2::integer, 0, 0, '{}', now(), `+more+`)`, team, i)
		}
		exec("INSERT INTO build_archives VALUES ($1, 'x', 64 << 20)", team)
	})
	var stored int64
	if err := pool.QueryRow(t.Context(), "SELECT stored_mib FROM team_usage WHERE team_id = $1", team).Scan(&stored); err != nil || stored != 64+2+4+8 {
		t.Errorf("%d MiB are stored, %v", stored, err)
	}
}

// TestQuotaOfOwner checks that one owner's teams share the platform's quota, whatever
// their number and even concurrently, and that a team with its own quota does not.
func TestQuotaOfOwner(t *testing.T) {
	s, pool, _ := quotaTest(t)
	ctx := t.Context()
	exec := func(query string, args ...any) {
		t.Helper()
		if _, err := pool.Exec(ctx, query, args...); err != nil {
			t.Fatal(err)
		}
	}
	exec("UPDATE platform_settings SET max_running = 7")
	owner, other := uuid.New(), uuid.New()
	exec("INSERT INTO users (id, email) VALUES ($1, 'a@example.com'), ($2, 'b@example.com')", owner, other)
	var teams []uuid.UUID
	for range 50 {
		team := uuid.New()
		exec("INSERT INTO teams (id, name) VALUES ($1, 't')", team)
		exec("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, 'owner')", team, owner)
		// An owner who was added later is not charged.
		exec("INSERT INTO team_members (team_id, user_id, role, created_at) VALUES ($1, $2, 'owner', now() + interval '1 s')", team, other)
		teams = append(teams, team)
	}
	var made atomic.Int32
	var wg sync.WaitGroup
	for _, team := range teams {
		wg.Go(func() {
			_, err := pool.Exec(context.Background(), insertSandbox, uuid.New(), team, 1, 512, 0)
			if _, over := OverQuota(err); err == nil {
				made.Add(1)
			} else if !over {
				t.Errorf("insert: %v", err)
			}
		})
	}
	wg.Wait()
	if made.Load() != 7 {
		t.Errorf("an owner of 50 teams runs %d sandboxes, want 7", made.Load())
	}
	s.quota(t, teams[0], 50, 50, 1<<40, 1<<40)
	exec(insertSandbox, uuid.New(), teams[0], 1, 512, 0)
	own := uuid.New()
	exec("INSERT INTO teams (id, name) VALUES ($1, 't')", own)
	exec("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, 'owner')", own, other)
	exec(insertSandbox, uuid.New(), own, 1, 512, 0)
}
