package store

import (
	"context"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

// small are the tables that do not grow with use: a query may read all of one.
var small = map[string]bool{
	"hosts":   true, // machines
	"servers": true, // processes
	// These have one row.
	"platform_settings":   true,
	"installation_secret": true,
}

// readsAll are the queries that may read a whole table that grows, with the reason. Every
// such query must be listed.
var readsAll = map[string]string{
	"CountUsers":      "it stops at the first user who can log in",
	"CountRecords":    "it counts all records of all teams, every ten minutes",
	"CountUsersAudit": "it counts the records of no team, every ten minutes",
	// It runs after CountRecords.
	"ForgetCharges": "what is there are the charges of the last minutes, which RecountRecords has just counted",
}

// maySequential are the queries for which PostgreSQL may choose a sequential scan of a
// table that grows, in an installation like that of fill, with the reason. Every such
// query must be listed.
var maySequential = map[string]string{
	"CountUsers":             readsAll["CountUsers"],
	"CountRecords":           readsAll["CountRecords"],
	"CountUsersAudit":        readsAll["CountUsersAudit"],
	"ForgetUserAudit":        "it follows CountUsersAudit, for a user who has too many",
	"ForgetCharges":          readsAll["ForgetCharges"],
	"CountHostOnlyTemplates": hostsPart,
	"DropTemplatesOfHost":    hostsPart,
	"ListHostTemplates":      hostsPart,
	"ListUsageByTeam":        "it adds up every team's runs of the days that are not added up; which part of all that is, PostgreSQL cannot know beforehand",
}

const hostsPart = "a host has a good part of all templates: PostgreSQL joins them whole rather than row by row, and goes by index (TestEveryQuery) where it is a small part"

// TestEveryQuery plans each query of internal/gen/db, including rare ones, and fails for
// one that has to read a whole table that grows. PostgreSQL avoids sequential scans if it
// can, so that the result does not depend on the tables' sizes.
func TestEveryQuery(t *testing.T) {
	ctx, conn := context.Background(), connect(t)
	// Use plans for any arguments, with joins by index if possible.
	for _, setting := range []string{"plan_cache_mode = force_generic_plan", "enable_seqscan = off", "enable_hashjoin = off", "enable_mergejoin = off", "enable_material = off"} {
		if _, err := conn.Exec(ctx, "SET "+setting); err != nil {
			t.Fatal(err)
		}
	}
	// With the single team of an empty database, a sequential scan would be the best
	// plan.
	for _, sql := range []string{"INSERT INTO teams (id, name) SELECT gen_random_uuid(), n::text FROM generate_series(1, 20000) n", "ANALYZE teams"} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	partial := make(map[string]bool)
	rows, err := conn.Query(ctx, "SELECT indexrelid::regclass::text FROM pg_index WHERE indpred IS NOT NULL")
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		partial[n] = true
	}

	planAll(t, conn, readsAll, func(n node) []string { return n.scans(partial, false) })
}

// everyPlan plans each query of internal/gen/db for unknown arguments, as PostgreSQL
// would in an installation in use, without restrictions: a sequential scan of a table
// that grows fails the test.
func everyPlan(t *testing.T, conn *pgx.Conn) {
	if _, err := conn.Exec(context.Background(), "SET plan_cache_mode = force_generic_plan"); err != nil {
		t.Fatal(err)
	}
	planAll(t, conn, maySequential, node.sequential)
}

// connect returns a connection to the test's own database, with the schema.
func connect(t *testing.T) *pgx.Conn {
	t.Helper()
	return pgtest.Connect(t, migrated.New(t))
}

// planAll plans each query of internal/gen/db, and checks that exactly the excused
// queries read whole tables.
func planAll(t *testing.T, conn *pgx.Conn, excused map[string]string, reads func(node) []string) {
	t.Helper()
	queries := generated(t)
	if len(queries) < 50 {
		t.Fatalf("found %d queries", len(queries))
	}
	for _, name := range slices.Sorted(maps.Keys(queries)) {
		tables := reads(plan(t, conn, name, queries[name]))
		why, may := excused[name]
		switch {
		case len(tables) > 0 && !may:
			t.Errorf("%s reads all of %s", name, strings.Join(tables, " and of "))
		case len(tables) == 0 && may:
			t.Errorf("%s reads no whole table: remove its excuse (%s)", name, why)
		}
	}
	for name := range excused {
		if queries[name] == "" {
			t.Errorf("there is no query %s to excuse", name)
		}
	}
	t.Logf("%d queries", len(queries))
}

// sequential returns the growing tables that a plan scans sequentially.
func (n node) sequential() []string {
	var all []string
	if n.Type == "Seq Scan" && !small[n.Table] {
		all = append(all, n.Table)
	}
	for _, p := range n.Plans {
		all = append(all, p.sequential()...)
	}
	return all
}

// generated returns the text of each query that sqlc generated code for.
func generated(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("../../gen/db/*.sql.go")
	if err != nil {
		t.Fatal(err)
	}
	queries := make(map[string]string)
	for _, file := range files {
		tree, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			l, ok := n.(*ast.BasicLit)
			if !ok || l.Kind != token.STRING {
				return true
			}
			text, err := strconv.Unquote(l.Value)
			if err != nil {
				t.Fatal(err)
			}
			if head, sql, ok := strings.Cut(text, "\n"); ok && strings.HasPrefix(head, "-- name: ") {
				queries[strings.Fields(head)[2]] = sql
			}
			return true
		})
	}
	return queries
}

// node is a node of a plan in EXPLAIN (FORMAT JSON).
type node struct {
	Type      string `json:"Node Type"`
	Table     string `json:"Relation Name"`
	Index     string `json:"Index Name"`
	Condition string `json:"Index Cond"`
	Plans     []node
}

var parameter = regexp.MustCompile(`\$(\d+)`)

// plan returns PostgreSQL's plan for a query.
func plan(t *testing.T, conn *pgx.Conn, name, sql string) node {
	t.Helper()
	ctx := context.Background()
	n := 0
	for _, m := range parameter.FindAllStringSubmatch(sql, -1) {
		i, _ := strconv.Atoi(m[1])
		n = max(n, i)
	}
	args := ""
	if n > 0 {
		args = "(" + strings.TrimSuffix(strings.Repeat("NULL,", n), ",") + ")"
	}
	// Use the simple protocol, because the text itself prepares the query.
	if _, err := conn.PgConn().Exec(ctx, fmt.Sprintf("PREPARE q AS %s", sql)).ReadAll(); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	results, err := conn.PgConn().Exec(ctx, "EXPLAIN (FORMAT JSON) EXECUTE q"+args+"; DEALLOCATE q").ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	var plans []struct{ Plan node }
	if err := json.Unmarshal(results[0].Rows[0][0], &plans); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return plans[0].Plan
}

// scans returns the growing tables that a plan reads entirely. Below a limit, an index is
// read in order and only as far as needed; a partial index covers a part that does not
// grow.
func (n node) scans(partial map[string]bool, limited bool) []string {
	var all []string
	if !small[n.Table] {
		switch n.Type {
		case "Seq Scan":
			all = append(all, n.Table)
		case "Index Scan", "Index Only Scan":
			if n.Condition == "" && !partial[n.Index] && !limited {
				all = append(all, n.Table)
			}
		}
	}
	for _, p := range n.Plans {
		// A sort reads everything below it, with or without a limit.
		all = append(all, p.scans(partial, (limited || n.Type == "Limit") && n.Type != "Sort")...)
	}
	return all
}
