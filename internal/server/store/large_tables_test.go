package store

import (
	"context"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// fill adds rows to every table that grows, like an installation in use.
func fill(t *testing.T, conn *pgx.Conn) {
	t.Helper()
	ctx := context.Background()
	// 30,000 sandboxes of 30 teams on 30 hosts, one in a hundred of them alive.
	for _, sql := range []string{
		`UPDATE platform_settings SET max_running = NULL, max_vcpus = NULL, max_memory_mib = NULL, max_disk_mib = NULL`,
		`INSERT INTO teams (id, name) SELECT gen_random_uuid(), 'team' || n FROM generate_series(1, 30) n`,
		`INSERT INTO hosts (id, url, status) SELECT gen_random_uuid(), 'unix:/' || n, 'online' FROM generate_series(1, 30) n`,
		`INSERT INTO sandboxes (id, team_id, host_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at)
		 SELECT gen_random_uuid(), (array(SELECT id FROM teams))[1 + n % 30], (array(SELECT id FROM hosts))[1 + n % 30], gen_random_uuid(), 'minimal',
		 CASE WHEN n % 100 = 0 THEN 'running' ELSE 'stopped' END, 1, 512, 5120, 300, jsonb_build_object('n', n::text), now() - n * interval '1 second'
		 FROM generate_series(1, 30000) n`,
		`INSERT INTO api_keys (id, team_id, name, prefix, hash) SELECT gen_random_uuid(), id, 'k', 'wrn_', sha256(convert_to(id::text || n, 'UTF8')) FROM teams, generate_series(1, 300) n`,
		`INSERT INTO host_certificates SELECT n::text, (array(SELECT id FROM hosts))[1 + n % 30], now() FROM generate_series(1, 10000) n`,
		`INSERT INTO idempotency_keys (team_id, key, request_hash, sandbox_id) SELECT team_id, id::text, '\x00', id FROM sandboxes`,
		`INSERT INTO sandbox_runs (sandbox_id, team_id, vcpus, memory_mib, first, started_at, ended_at) SELECT id, team_id, 1, 512, true, created_at, created_at + interval '1 second' FROM sandboxes WHERE state = 'stopped'`,
		`INSERT INTO audit_records SELECT gen_random_uuid(), created_at, team_id, 'key', NULL, NULL, 'exec', 'sandbox', id::text, '', '', 'ok', '' FROM sandboxes`,
		`INSERT INTO channels (id, team_id, name, kind, events, target, sealed) SELECT gen_random_uuid(), id, 'c', 'webhook', '{}', '', '' FROM teams`,
		`INSERT INTO deliveries (id, channel_id, event, body, state, created_at) SELECT gen_random_uuid(), (array(SELECT id FROM channels))[1 + n % 30], 'e', '{}', 'delivered', now() - n * interval '1 second' FROM generate_series(1, 10000) n`,
		`INSERT INTO users (id, email, verified_at) SELECT gen_random_uuid(), 'u' || n || '@example.com', now() FROM generate_series(1, 20000) n`,
		`INSERT INTO sessions (id, user_id, refresh_hash, expires_at, user_agent, address) SELECT gen_random_uuid(), id, '\x00', now() + interval '1 day', '', '' FROM users`,
		`INSERT INTO identities (provider, subject, user_id) SELECT 'github', id::text, id FROM users`,
		`INSERT INTO mail_tokens (hash, user_id, purpose, expires_at) SELECT sha256(convert_to(id::text, 'UTF8')), id, 'reset', now() + interval '1 hour' FROM users`,
		// Many teams that are seldom active.
		`INSERT INTO teams (id, name) SELECT gen_random_uuid(), 'quiet' || n FROM generate_series(1, 10000) n`,
		`INSERT INTO team_members (team_id, user_id, role) SELECT t.id, u.id, 'member' FROM (SELECT id, row_number() OVER () AS n FROM users) u
		 JOIN (SELECT id, row_number() OVER () AS n FROM teams) t ON t.n = u.n / 2 + 1`,
		`INSERT INTO team_quotas (team_id, max_running) SELECT id, 10 FROM teams WHERE name LIKE 'quiet%'`,
		`INSERT INTO team_usage (team_id, running, vcpus, memory_mib, disk_mib) SELECT id, 0, 0, 0, 0 FROM teams WHERE name LIKE 'quiet%' ON CONFLICT DO NOTHING`,
		`INSERT INTO channels (id, team_id, name, kind, events, target, sealed) SELECT gen_random_uuid(), id, 'c', 'webhook', '{}', '', '' FROM teams WHERE name LIKE 'quiet%'`,
		`INSERT INTO templates (id, team_id, name, version, size_bytes, created_at) SELECT gen_random_uuid(), id, 't', v, 1, now() FROM teams, generate_series(1, 2) v WHERE name LIKE 'quiet%'`,
		`INSERT INTO templates (id, team_id, name, kind, layer_key, size_bytes, created_at) SELECT gen_random_uuid(), id, '', 'layer', sha256(convert_to(id::text, 'UTF8')), 1, now() FROM teams WHERE name LIKE 'quiet%'`,
		`INSERT INTO template_tags (team_id, name, tag, template_id) SELECT team_id, name, 'latest', id FROM templates WHERE kind = 'template' AND version = 2`,
		`INSERT INTO host_templates SELECT (array(SELECT id FROM hosts))[1 + n % 30], id FROM (SELECT id, row_number() OVER () AS n FROM templates) t`,
		`INSERT INTO failed_imports SELECT id, 't', 'why', now() FROM teams`,
		`INSERT INTO builds (id, team_id, name, tags, recipe, options, state, total_steps, template_id, version, created_at)
		 SELECT gen_random_uuid(), team_id, name, '{}', '', '{}', 'succeeded', 1, id, version, now() FROM templates WHERE kind = 'template'`,
		`INSERT INTO build_steps SELECT id, n, '{}' FROM builds, generate_series(1, 2) n`,
		`INSERT INTO build_archives SELECT id, 'd', 1, now() FROM teams`,
		`INSERT INTO build_archive_chunks (team_id, digest, number, data) SELECT team_id, digest, 0, 'x' FROM build_archives`,
		`INSERT INTO usage_rollups SELECT '2020-01-01'::date + n FROM generate_series(1, 2000) n`,
		`INSERT INTO usage_days SELECT t.id, '2026-01-01'::date + n, 1, 1, 1 FROM (SELECT id FROM teams LIMIT 1000) t, generate_series(1, 30) n`,
		// So that plans do not depend on whether the table has been vacuumed since.
		`INSERT INTO record_charges (team_id, bytes) SELECT id, 1 FROM teams`,
		`ANALYZE`,
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
}

// TestPlans checks that on large tables no query reads a whole table.
func TestPlans(t *testing.T) {
	conn := connect(t)
	fill(t, conn)
	t.Run("typical", func(t *testing.T) { typicalPlans(t, conn) })
	t.Run("every", func(t *testing.T) { everyPlan(t, conn) })
}

// typicalPlans plans frequent queries with typical arguments.
func typicalPlans(t *testing.T, conn *pgx.Conn) {
	ctx := context.Background()
	const team, host = `(SELECT id FROM teams WHERE name = 'team7')`, `(SELECT id FROM hosts LIMIT 1)`
	for name, sql := range map[string]string{
		"key":         `SELECT * FROM api_keys WHERE hash = '\x01'`,
		"sandbox":     `SELECT * FROM sandboxes WHERE id = '00000000-0000-0000-0000-000000000001'`,
		"live":        `SELECT * FROM sandboxes WHERE team_id = TEAM AND state NOT IN ('stopped', 'error') AND metadata @> '{}' AND (created_at, id) < ('9999-01-01', 'ffffffff-ffff-ffff-ffff-ffffffffffff') ORDER BY created_at DESC, id DESC LIMIT 101`,
		"by state":    `SELECT * FROM sandboxes WHERE team_id = TEAM AND state = ANY ('{stopped}') AND metadata @> '{}' AND (created_at, id) < (now(), 'ffffffff-ffff-ffff-ffff-ffffffffffff') ORDER BY created_at DESC, id DESC LIMIT 101`,
		"by metadata": `SELECT * FROM sandboxes WHERE team_id = TEAM AND state = ANY ('{stopped}') AND metadata @> '{"n": "7777"}' AND (created_at, id) < ('9999-01-01', 'ffffffff-ffff-ffff-ffff-ffffffffffff') ORDER BY created_at DESC, id DESC LIMIT 101`,
		"of a host":   `SELECT * FROM sandboxes WHERE host_id = HOST AND state NOT IN ('stopped', 'error')`,
		"missing":     `UPDATE sandboxes SET state = 'missing' WHERE state = 'running' AND host_id IN (SELECT id FROM hosts WHERE status IN ('unreachable', 'offline') AND deleted_at IS NULL)`,
		"room":        `SELECT count(*), sum(memory_mib), sum(vcpus) FROM sandboxes WHERE host_id = HOST AND state NOT IN ('stopped', 'error') AND state <> 'paused'`,
		"places":      `SELECT hosts.id, used.n FROM hosts LEFT JOIN LATERAL (SELECT count(*) AS n FROM sandboxes WHERE host_id = hosts.id AND state NOT IN ('stopped', 'error') AND state <> 'paused') used ON true WHERE hosts.status = 'online'`,
		"at work":     `SELECT sandboxes.id FROM sandboxes JOIN servers ON servers.id = worker WHERE host_id = HOST AND state NOT IN ('stopped', 'error') AND servers.seen_at > now()`,
		"certificate": `SELECT EXISTS (SELECT 1 FROM host_certificates WHERE serial = '1' AND host_id = HOST AND not_after > now())`,
		"lost":        `UPDATE sandboxes SET state = 'stopped' WHERE host_id = HOST AND state NOT IN ('stopped', 'error')`,
		"count":       `SELECT state, count(*) FROM sandboxes WHERE state NOT IN ('stopped', 'error') GROUP BY state`,
		"a run":       `SELECT * FROM sandbox_runs WHERE sandbox_id = '00000000-0000-0000-0000-000000000001' AND ended_at IS NULL`,
		"today":       `SELECT sum(vcpus) FROM sandbox_runs WHERE team_id = TEAM AND started_at < now() AND (ended_at IS NULL OR ended_at >= now() - interval '1 hour')`,
		"audit":       `SELECT * FROM audit_records WHERE team_id = TEAM AND (at, id) < (now(), 'ffffffff-ffff-ffff-ffff-ffffffffffff') AND at >= '-infinity' ORDER BY at DESC, id DESC LIMIT 101`,
		"all audit":   `SELECT * FROM audit_records WHERE (at, id) < (now(), 'ffffffff-ffff-ffff-ffff-ffffffffffff') AND at >= '-infinity' ORDER BY at DESC, id DESC LIMIT 101`,
		"old audit":   `DELETE FROM audit_records WHERE id IN (SELECT a.id FROM audit_records a WHERE a.at < now() - interval '90 days' ORDER BY a.at LIMIT 1000)`,
		"deliveries":  `SELECT * FROM deliveries WHERE channel_id = (SELECT id FROM channels LIMIT 1) AND (created_at, id) < (now(), 'ffffffff-ffff-ffff-ffff-ffffffffffff') ORDER BY created_at DESC, id DESC LIMIT 101`,
		"due":         `SELECT id FROM deliveries WHERE state = 'pending' AND next_at <= now() ORDER BY next_at LIMIT 16 FOR UPDATE SKIP LOCKED`,
		"idempotency": `SELECT * FROM idempotency_keys WHERE team_id = TEAM AND key = 'x'`,
		"free a key":  `DELETE FROM idempotency_keys WHERE sandbox_id = '00000000-0000-0000-0000-000000000001'`,
		"caller": `SELECT u.id, m.team_id, m.role FROM sessions s JOIN users u ON u.id = s.user_id LEFT JOIN LATERAL (
			SELECT tm.team_id, tm.role FROM team_members tm JOIN teams t ON t.id = tm.team_id WHERE tm.user_id = u.id AND t.deleting_at IS NULL ORDER BY tm.created_at LIMIT 1) m ON true
			WHERE s.id = '00000000-0000-0000-0000-000000000001' AND s.user_id = '00000000-0000-0000-0000-000000000001' AND u.active`,
		"user":            `SELECT * FROM users WHERE lower(email) = lower('U7@example.com')`,
		"users by prefix": `SELECT * FROM users WHERE lower(email) LIKE 'u77%' AND active ORDER BY lower(email) LIMIT 10`,
		"page of users":   `SELECT * FROM users WHERE lower(email) LIKE '%' AND lower(email) > 'u7' ORDER BY lower(email) LIMIT 100`,
		"identity":        `SELECT u.* FROM identities i JOIN users u ON u.id = i.user_id WHERE i.provider = 'github' AND i.subject = 'x'`,
		"log out":         `DELETE FROM sessions WHERE user_id = '00000000-0000-0000-0000-000000000001'`,
		"old sessions":    `DELETE FROM sessions WHERE expires_at < now()`,
		"old links":       `DELETE FROM mail_tokens WHERE expires_at < now()`,
		"a user's links":  `DELETE FROM mail_tokens WHERE user_id = '00000000-0000-0000-0000-000000000001'`,
		"unverified":      `DELETE FROM users WHERE verified_at IS NULL AND created_at < now() - interval '7 days'`,
		"members":         `SELECT * FROM team_members WHERE team_id = TEAM AND user_id = '00000000-0000-0000-0000-000000000001'`,
		"team's keys":     `SELECT * FROM api_keys WHERE team_id = TEAM AND (created_at, id) < (now(), 'ffffffff-ffff-ffff-ffff-ffffffffffff') ORDER BY created_at DESC, id DESC LIMIT 101`,
		"everybody's":     `SELECT * FROM sandboxes WHERE (created_at, id) < (now(), 'ffffffff-ffff-ffff-ffff-ffffffffffff') ORDER BY created_at DESC, id DESC LIMIT 101`,
		"old keys":        `DELETE FROM idempotency_keys WHERE created_at < now() - interval '1 day'`,
	} {
		sql = strings.NewReplacer("TEAM", team, "HOST", host).Replace(sql)
		rows, err := conn.Query(ctx, "EXPLAIN "+sql)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, line := range plan {
			for _, table := range []string{"sandboxes", "api_keys", "idempotency_keys", "host_certificates", "sandbox_runs", "audit_records", "deliveries", "users", "sessions", "identities", "mail_tokens", "team_members"} {
				if strings.Contains(line, "Seq Scan on "+table) {
					t.Errorf("%s reads all of %s:\n%s", name, table, strings.Join(plan, "\n"))
				}
			}
		}
	}
}
