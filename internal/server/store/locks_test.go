package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
)

// alone lists the queries that change several rows in no order, with the reason why
// nobody else locks those rows. All other queries must lock rows in order.
var alone = map[string]string{
	"ForgetUsageDay":     "LockUsage",
	"ClearBuildSteps":    "one worker has the build",
	"ForgetFailedImport": "it is one row",
	"RemoveTag":          "it is one row",
	"DeleteMember":       "it is one row",
	"SetMemberRole":      "it is one row",
	"SetArchiveSize":     "it is one row",
	"SetSettings":        "it is one row",
}

var (
	changes = regexp.MustCompile(`(?m)(?:^|[(\s])(?:UPDATE|DELETE FROM) ([a-z_]+)`)
	// A row selected by its key, or by a query with a limit.
	keyed = regexp.MustCompile(`WHERE (?:[a-z]+\.)?(?:id|hash|team_id|serial|digest) = (?:@id\b|@template_id\b|\$1\b|\(\s*SELECT [^;]* LIMIT 1\b)`)
	// A condition for a team's rows, of which most tables can have several.
	byTeam  = regexp.MustCompile(`WHERE team_id = (?:\$1|@team_id)`)
	ordered = regexp.MustCompile(`ORDER BY [^;()]+ FOR (?:NO KEY )?UPDATE`)
	comment = regexp.MustCompile(`(?m)^--.*$`)
	locking = regexp.MustCompile(`FOR (?:NO KEY )?UPDATE|DO UPDATE`)
)

// TestLockOrder finds every query that changes several rows of a table, and fails for
// each that does not first lock them in key order.
func TestLockOrder(t *testing.T) {
	files, err := filepath.Glob("queries/*.sql")
	if err != nil {
		t.Fatal(err)
	}
	several, used := 0, make(map[string]bool)
	for name := range alone {
		used[name] = false
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, query := range strings.Split(string(text), "-- name: ")[1:] {
			name, _, _ := strings.Cut(query, " ")
			sql := strings.TrimSpace(comment.ReplaceAllString(query[strings.Index(query, "\n"):], ""))
			if !changes.MatchString(locking.ReplaceAllString(sql, "")) {
				continue
			}
			one := keyed.MatchString(sql) && (!byTeam.MatchString(sql) || strings.Contains(sql, "key = ") || strings.Contains(sql, "digest = ") || strings.Contains(sql, "team_quotas"))
			why, excused := alone[name]
			if excused && !one {
				used[name] = true
			}
			switch {
			case ordered.MatchString(sql):
				several++
				if excused {
					t.Errorf("%s locks its rows in order: remove its excuse (%s)", name, why)
				}
			case one || excused:
			default:
				t.Errorf("%s: %s changes several rows without locking them in order first:\n%s", file, name, sql)
			}
		}
	}
	for name, is := range used {
		if !is {
			t.Errorf("%s needs no excuse", name)
		}
	}
	if several < 20 {
		t.Errorf("found only %d queries that change several rows", several)
	}
}

// TestNoDeadlock changes the sandboxes of several teams on several hosts at once, in
// every way that locks many of them, without a deadlock.
func TestNoDeadlock(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	url := migrated.New(t)
	s, err := Open(ctx, url+"&pool_max_conns=12")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := s.pool.Exec(ctx, sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	const each = 60
	teams, hosts := []uuid.UUID{uuid.New(), uuid.New()}, []uuid.UUID{uuid.New(), uuid.New()}
	var ids []uuid.UUID
	for _, host := range hosts {
		exec("INSERT INTO hosts (id, url, status) VALUES ($1, $2, 'online')", host, "unix:/"+host.String())
	}
	for _, team := range teams {
		exec("INSERT INTO teams (id, name) VALUES ($1, 'one')", team)
		exec("INSERT INTO team_quotas (team_id) VALUES ($1)", team)
		for n := range each {
			// The order of their ids differs from the order in which they are stored.
			ids = append(ids, uuid.New())
			exec(`INSERT INTO sandboxes (id, team_id, host_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at)
				VALUES ($1, $2, $3, '00000000-0000-0000-0000-000000000000', 'minimal', 'running', 1, 1, 1, 60, '{}', now())`, ids[len(ids)-1], team, hosts[n%2])
		}
	}
	backwards := slices.Clone(ids)
	slices.Reverse(backwards)
	ats := func() []time.Time {
		all := make([]time.Time, len(ids))
		for i := range all {
			all[i] = Now().Add(time.Duration(time.Now().UnixNano()%1000) * time.Second)
		}
		return all
	}
	deeds := map[string]func() error{
		"revoke": func() error {
			_, err := s.pool.Exec(ctx, "SELECT revoke_tokens($1)", teams)
			return err
		},
		"expire": func() error {
			return s.SandboxesExpire(ctx, db.SandboxesExpireParams{HostID: &hosts[0], Ids: ids, Ats: ats()})
		},
		"expire backwards": func() error {
			return s.SandboxesExpire(ctx, db.SandboxesExpireParams{HostID: &hosts[1], Ids: backwards, Ats: ats()})
		},
		"missing": func() error {
			if _, err := s.pool.Exec(ctx, "UPDATE hosts SET status = 'offline' WHERE id = $1", hosts[0]); err != nil {
				return err
			}
			if _, err := s.SandboxesMissing(ctx); err != nil {
				return err
			}
			_, err := s.pool.Exec(ctx, "UPDATE hosts SET status = 'online' WHERE id = $1", hosts[0])
			return err
		},
		"found, paused, drained and expired": func() error {
			// One at a time, as hosts report it, and then all ended ones together.
			for i, u := range ids {
				if _, err := s.SandboxFound(ctx, db.SandboxFoundParams{ID: u, HostID: &hosts[i%each%2], ExpiresAt: nil}); err != nil && !errors.Is(err, ErrNoRows) {
					return err
				}
			}
			if _, err := s.pool.Exec(ctx, `UPDATE sandboxes SET state = 'paused', drained = true, expires_at = now() - interval '1 minute'
				WHERE id = ANY (ARRAY(SELECT id FROM sandboxes WHERE state = 'running' ORDER BY id LIMIT 20 FOR NO KEY UPDATE))`); err != nil {
				return err
			}
			for _, host := range hosts {
				if _, err := s.DrainedExpire(ctx, &host); err != nil {
					return err
				}
			}
			_, err := s.pool.Exec(ctx, `UPDATE sandboxes SET state = 'running', end_reason = NULL
				WHERE id = ANY (ARRAY(SELECT id FROM sandboxes WHERE state = 'stopping' ORDER BY id FOR NO KEY UPDATE))`)
			return err
		},
		"fork": func() error {
			return s.InTx(ctx, func(q *db.Queries) error {
				if err := q.LockSandboxes(ctx, backwards[:40]); err != nil {
					return err
				}
				for _, u := range backwards[:40] {
					if _, err := q.SandboxExpires(ctx, db.SandboxExpiresParams{ID: u, HostID: &hosts[0]}); err != nil && !errors.Is(err, ErrNoRows) {
						return err
					}
				}
				return nil
			})
		},
		"drop": func() error { return s.DropUnstarted(ctx, backwards) },
	}
	const times = 20
	var wg, enough sync.WaitGroup
	enough.Add(len(deeds))
	over := make(chan struct{}) // closed when each was done so many times
	go func() {
		enough.Wait()
		close(over)
	}()
	for what, deed := range deeds {
		wg.Go(func() {
			did := sync.OnceFunc(enough.Done)
			defer did()
			for n := 1; ; n++ {
				err := deed()
				var pg *pgconn.PgError
				if errors.As(err, &pg) && pg.Code == "40P01" {
					t.Errorf("%s: %s, %s", what, pg.Message, pg.Detail)
					return
				}
				if err != nil {
					t.Errorf("%s: %v", what, err)
					return
				}
				if n < times {
					continue
				}
				did()
				select {
				case <-over:
					t.Logf("%s: %d times", what, n)
					return
				default:
				}
			}
		})
	}
	wg.Wait()
}
