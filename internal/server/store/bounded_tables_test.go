package store

import (
	"testing"

	"github.com/jackc/pgx/v5"
)

// kept names for every table what bounds the rows and files that a tenant can cause.
// Every new table, and every new kind of an old one, must be listed here.
var kept = map[string]string{
	"templates":            counted, // snapshots and builds' layers too
	"sandboxes":            counted, // disks, saved memory, and rows; 10,000 ended ones of a team, or 64 MiB
	"build_archives":       counted,
	"builds":               counted, // and their logs; 500 ended ones of a team, or 128 MiB
	"build_archive_chunks": "the bytes that build_archives counts",

	"api_keys":         "1000 of a team",
	"audit_records":    recorded, // 1,000,000 of a team, and of a user without one, 90 days; refusals are one row for each actor, action and minute
	"build_steps":      "the bytes that builds counts; 1000 of a build, with 4 MiB of output and their ends",
	"channels":         "50 of a team",
	"deliveries":       recorded, // 500 of a channel, for 7 days
	"failed_imports":   "20 of a team",
	"idempotency_keys": "one for each sandbox or template, which are bounded; forgotten in a day",
	"identities":       "one for each provider of a user",
	"mail_tokens":      "they expire; mails have a rate",
	"sandbox_runs":     recorded, // 40 days of runs, which have a quota and a rate
	"sessions":         "100 of a user",
	"team_members":     "teams of a user are bounded, and owners add whom they know",
	"teams":            "50 of a user",
	"template_tags":    recorded, // 10000 of a team, and one for each name
	"usage_days":       "a row for each team and day",
	"users":            "sign-ups have a rate, and those that are not opened are forgotten",

	"host_certificates":   "the platform's",
	"host_templates":      "the platform's",
	"hosts":               "the platform's",
	"installation_secret": "the platform's",
	"leases":              "the platform's",
	"lost_templates":      "the platform's",
	"platform_settings":   "the platform's",
	"servers":             "the platform's",
	"team_quotas":         "a row for each team",
	"team_usage":          "a row for each team",
	"usage_rollups":       "a row for each day",
	"goose_db_version":    "the platform's",
	"record_charges":      "recounted every ten minutes, and whenever the team's quota is checked",
}

// counted tables have triggers that charge a team before the row exists.
const counted = "charge_team"

// recorded tables have triggers that charge a team in the statement that writes a row,
// and refund the charge when the row is removed. Their rows record completed changes.
const recorded = "record_charges"

// TestAllThatIsKeptIsBounded checks that every table is listed, and that the charged ones
// charge for every way in which a row is added, changed or removed.
func TestAllThatIsKeptIsBounded(t *testing.T) {
	_, pool, team := quotaTest(t)
	names := func(query string) (list []string) {
		t.Helper()
		rows, err := pool.Query(t.Context(), query)
		if err == nil {
			list, err = pgx.CollectRows(rows, pgx.RowTo[string])
		}
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	there := make(map[string]bool)
	for _, table := range names("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") {
		there[table] = true
		if kept[table] == "" {
			t.Errorf("nothing bounds the table %s: add it to kept", table)
		}
		// A record's size does not change.
		want := map[string]int{counted: 3, recorded: 2}[kept[table]]
		if want == 0 {
			continue
		}
		var events int
		// The trigger may have any function that calls charge_team or writes to
		// record_charges.
		err := pool.QueryRow(t.Context(), `SELECT count(DISTINCT g.tgtype) FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
			WHERE g.tgrelid = $1::regclass AND g.tgenabled = 'O' AND p.prosrc LIKE '%' || $2 || '%'`, table, kept[table]).Scan(&events)
		if err != nil || events != want {
			t.Errorf("%s charges a team at %d of insert, update and delete, want %d, %v", table, events, want, err)
		}
	}
	for table := range kept {
		if !there[table] {
			t.Errorf("the table %s does not exist: remove it from kept", table)
		}
	}
	// Every kind of template counts, during its creation and afterwards, in every state.
	kinds := names("SELECT (regexp_matches(pg_get_constraintdef(oid), $$'([a-z]+)'::text$$, 'g'))[1] FROM pg_constraint WHERE conname = 'templates_kind_check'")
	states := names("SELECT (regexp_matches(pg_get_constraintdef(oid), $$'([a-z]+)'::text$$, 'g'))[1] FROM pg_constraint WHERE conname = 'templates_state_check'")
	if len(kinds) < 2 || len(states) < 3 {
		t.Fatalf("kinds %v, states %v", kinds, states)
	}
	charged := func(what string, want int64, query string, args ...any) {
		t.Helper()
		tx, err := pool.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = tx.Rollback(t.Context()) }()
		var stored int64
		if _, err := tx.Exec(t.Context(), query, args...); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		err = tx.QueryRow(t.Context(), "SELECT COALESCE(sum(stored_mib), 0) FROM team_usage").Scan(&stored)
		if err != nil || stored != want {
			t.Errorf("%s: %d MiB are stored, want %d, %v", what, stored, want, err)
		}
	}
	for _, kind := range kinds {
		for _, state := range states {
			want := int64(100)
			if state == "pending" {
				want = 3000 + 128 // its maximum size
			}
			charged(kind+" "+state, want, `INSERT INTO templates (id, team_id, name, size_bytes, created_at, state, disk_mib, memory_mib, kind)
				VALUES (gen_random_uuid(), $1, 'x', 100 << 20, now(), $2, 3000, 128, $3)`, team, state, kind)
		}
	}
	// So does a sandbox's saved memory, in every state but the last.
	for _, state := range names("SELECT (regexp_matches(pg_get_constraintdef(oid), $$'([a-z]+)'::text$$, 'g'))[1] FROM pg_constraint WHERE conname = 'sandboxes_state_check'") {
		want := int64(512)
		if state == "stopped" || state == "error" {
			want = 0
		}
		charged("a saved sandbox that is "+state, want, `INSERT INTO sandboxes (id, team_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at, saved)
			VALUES (gen_random_uuid(), $1, gen_random_uuid(), 'x', $2, 1, 512, 0, 0, '{}', now(), true)`, team, state)
	}
}
