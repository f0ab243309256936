package sandboxes

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/api"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// sqlSets are the database's functions for the sets of states.
var sqlSets = map[string]set{
	"sandbox_is_live": live, "sandbox_is_starting": starting, "sandbox_uses_host": usesHost,
	"sandbox_is_billed": billed, "sandbox_has_image": hasImage, "sandbox_in_transit": inTransit,
}

// schema returns a connection to a database with an empty schema.
func schema(t *testing.T) *pgx.Conn {
	t.Helper()
	return pgtest.Connect(t, storetest.New(t))
}

// TestStates checks that the database and the API document have the table's states, and
// that the database has its sets.
func TestStates(t *testing.T) {
	conn := schema(t)
	var want []string
	for _, s := range States() {
		want = append(want, string(s))
	}
	if got := allowed(t, conn)["sandboxes"]; !slices.Equal(got, want) {
		t.Errorf("the table sandboxes allows %q, want %q", got, want)
	}
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
	var document []string
	for _, s := range spec.Components.Schemas["SandboxState"].Value.Enum {
		document = append(document, s.(string))
	}
	slices.Sort(document)
	if !slices.Equal(document, want) {
		t.Errorf("the API document has %q, want %q", document, want)
	}
	for name, in := range sqlSets {
		for state := range sets {
			var got bool
			if err := conn.QueryRow(t.Context(), "SELECT "+name+"($1)", string(state)).Scan(&got); err != nil {
				t.Fatal(err)
			}
			if got != state.is(in) {
				t.Errorf("%s('%s') is %v", name, state, got)
			}
		}
	}
}

// TestDefaultSizes checks the default sizes where hostwire's constants cannot be used: in the
// API document, and in the database, which assumes them for objects without a size.
func TestDefaultSizes(t *testing.T) {
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
	for schema, from := range map[string]string{"CreateSandbox": "template's", "CreateBuild": "base's"} {
		for field, size := range map[string]int{"vcpus": hostwire.DefaultVCPUs, "memory_mib": hostwire.DefaultMemoryMiB} {
			says := spec.Components.Schemas[schema].Value.Properties[field].Value.Description
			if want := fmt.Sprintf("absent: the %s or %d.", from, size); !strings.Contains(says, want) {
				t.Errorf("%s.%s: the document says %q, want %q in it", schema, field, says, want)
			}
		}
	}
	var disk, memory, sandbox int
	var template int64
	err = schema(t).QueryRow(t.Context(), "SELECT default_disk_mib(), default_memory_mib(), sandbox_disk('running', 0), template_stored('pending', 0, 0, 0)").Scan(&disk, &memory, &sandbox, &template)
	if err != nil {
		t.Fatal(err)
	}
	if disk != hostwire.DefaultDiskMiB || memory != hostwire.DefaultMemoryMiB {
		t.Errorf("the database assumes %d and %d MiB, want %d and %d", disk, memory, hostwire.DefaultDiskMiB, hostwire.DefaultMemoryMiB)
	}
	if sandbox != disk || template != int64(disk+memory) {
		t.Errorf("a sandbox counts as %d MiB, a template as %d, want %d and %d", sandbox, template, disk, disk+memory)
	}
}

// allowed returns the states that each table's constraint allows, sorted.
func allowed(t *testing.T, conn *pgx.Conn) map[string][]string {
	t.Helper()
	rows, err := conn.Query(t.Context(), `SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint
		WHERE contype = 'c' AND conname LIKE '%_state_check'`)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string][]string)
	var table, def string
	if _, err := pgx.ForEachRow(rows, []any{&table, &def}, func() error {
		all[table] = literals(def)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

var (
	literal = regexp.MustCompile(`'([^']*)'`)
	comment = regexp.MustCompile(`--[^\n]*`)
	// compared matches what a statement compares a state with, or sets it to.
	compared = regexp.MustCompile(`\b(?:NEW\.|OLD\.)?\w*\.?state (?:=|<>|IN|NOT IN) ('\w+'|\([^()]*\))`)
	table    = regexp.MustCompile(`\b(?:FROM|JOIN|UPDATE|INTO) (\w+)`)
)

func literals(sql string) []string {
	var all []string
	for _, m := range literal.FindAllStringSubmatch(sql, -1) {
		all = append(all, m[1])
	}
	slices.Sort(all)
	return all
}

// TestStateLiterals checks that the states that queries and triggers name exist, and that
// none lists a set that has a function.
func TestStateLiterals(t *testing.T) {
	conn := schema(t)
	allowed := allowed(t, conn)
	statements := make(map[string]string)
	tables := make(map[string][]string)

	queries := os.DirFS("../store/queries")
	files, err := fs.Glob(queries, "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := fs.ReadFile(queries, f)
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range strings.Split(string(text), "-- name: ")[1:] {
			name, body, _ := strings.Cut(q, "\n")
			statements[name] = comment.ReplaceAllString(body, "")
			for _, m := range table.FindAllStringSubmatch(statements[name], -1) {
				tables[name] = append(tables[name], m[1])
			}
		}
	}
	rows, err := conn.Query(t.Context(), `SELECT p.proname, p.prosrc, COALESCE(array_agg(tgrelid::regclass::text) FILTER (WHERE tgrelid IS NOT NULL), '{}')
		FROM pg_proc p LEFT JOIN pg_trigger ON tgfoid = p.oid
		WHERE p.pronamespace = 'public'::regnamespace AND p.prolang IN (SELECT oid FROM pg_language WHERE lanname IN ('sql', 'plpgsql')) GROUP BY p.oid`)
	if err != nil {
		t.Fatal(err)
	}
	var name, body string
	var of []string
	if _, err := pgx.ForEachRow(rows, []any{&name, &body, &of}, func() error {
		statements[name] = comment.ReplaceAllString(body, "")
		tables[name] = slices.Clone(of)
		switch {
		case strings.HasPrefix(name, "sandbox_"):
			tables[name] = append(tables[name], "sandboxes")
		case strings.HasPrefix(name, "template_"):
			tables[name] = append(tables[name], "templates")
		}
		for _, m := range table.FindAllStringSubmatch(statements[name], -1) {
			tables[name] = append(tables[name], m[1])
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	found := 0
	for _, name := range slices.Sorted(maps.Keys(statements)) {
		var known []string
		for _, table := range tables[name] {
			known = append(known, allowed[table]...)
		}
		for _, m := range compared.FindAllStringSubmatch(statements[name], -1) {
			found++
			named := literals(m[1])
			for _, s := range named {
				if !slices.Contains(known, s) {
					t.Errorf("%s names the state %q, which none of %q has", name, s, tables[name])
				}
			}
			if _, is := sqlSets[name]; is || !slices.Contains(tables[name], "sandboxes") {
				continue
			}
			if function := setOf(named); function != "" {
				t.Errorf("%s lists %q: call %s", name, named, function)
			}
		}
	}
	if found < 40 {
		t.Errorf("found %d states in %d statements", found, len(statements))
	}
}

// setOf returns the function of the set that has exactly these states, or exactly the
// others.
func setOf(named []string) string {
	for _, function := range slices.Sorted(maps.Keys(sqlSets)) {
		var in, out []string
		for s := range sets {
			if s.is(sqlSets[function]) {
				in = append(in, string(s))
			} else {
				out = append(out, string(s))
			}
		}
		slices.Sort(in)
		slices.Sort(out)
		if slices.Equal(named, in) || slices.Equal(named, out) {
			return fmt.Sprintf("%s()", function)
		}
	}
	return ""
}
