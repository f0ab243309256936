// Package metrictest checks in tests that docs/metrics.md lists the metrics that programs
// register.
package metrictest

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// Update is the flag that makes [Documented] write the page.
var Update = flag.Bool("update", false, "write docs/metrics.md")

// Documented fails the test unless the page, in the repository at root, has the table of
// a program's metrics: those of c whose names begin with wrenn_. The table is between the
// comments "<!-- program -->" and "<!-- end -->".
func Documented(t *testing.T, root, program string, c prometheus.Collector) {
	t.Helper()
	path := filepath.Join(root, "docs", "metrics.md")
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := fmt.Sprintf("<!-- %s -->\n", program), "<!-- end -->"
	before, rest, ok := strings.Cut(string(page), begin)
	have, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		t.Fatalf("%s has no table between %q and %q", path, begin, end)
	}
	want := table(t, c)
	if have == want {
		return
	}
	if !*Update {
		t.Fatalf("%s is not what the %s registers; run this test with -update:\n%s", path, program, want)
	}
	if err := os.WriteFile(path, []byte(before+begin+want+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

// descriptor matches the text of a [prometheus.Desc], which has no accessors.
var descriptor = regexp.MustCompile(`^Desc\{fqName: "([a-z_]+)", help: "(.+)", unit: "", constLabels: \{\}, variableLabels: \{([a-z,]*)\}\}$`)

// table describes metrics, sorted by name.
func table(t *testing.T, c prometheus.Collector) string {
	t.Helper()
	all := make(chan *prometheus.Desc)
	go func() {
		defer close(all)
		c.Describe(all)
	}()
	type row struct{ name, labels, help string }
	var rows []row
	for d := range all {
		if strings.Contains(d.String(), `fqName: "go_`) || strings.Contains(d.String(), `fqName: "process_`) {
			continue
		}
		m := descriptor.FindStringSubmatch(d.String())
		if m == nil {
			t.Errorf("cannot read the metric %s", d)
			continue
		}
		labels := ""
		if m[3] != "" {
			labels = "`" + strings.ReplaceAll(m[3], ",", "`, `") + "`"
		}
		rows = append(rows, row{m[1], labels, m[2]})
	}
	if len(rows) == 0 {
		t.Fatal("there are no metrics")
	}
	slices.SortFunc(rows, func(a, b row) int { return cmp.Compare(a.name, b.name) })
	var out strings.Builder
	out.WriteString("\n| metric | labels | what it is |\n| --- | --- | --- |\n")
	for _, r := range rows {
		fmt.Fprintf(&out, "| `%s` | %s | %s |\n", r.name, r.labels, r.help)
	}
	out.WriteString("\n")
	return out.String()
}
