package deploy

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// documentedMetrics returns the labels of each metric in docs/metrics.md, which tests of
// server and agent compare with the registered metrics.
func documentedMetrics(t *testing.T) map[string][]string {
	t.Helper()
	page, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{"process_resident_memory_bytes": nil, "process_cpu_seconds_total": nil, "go_goroutines": nil}
	for _, m := range regexp.MustCompile("(?m)^\\| `(wrenn_[a-z_]+)` \\| ([^|]*) \\|").FindAllStringSubmatch(string(page), -1) {
		labels := []string{}
		for _, l := range regexp.MustCompile("`([a-z]+)`").FindAllStringSubmatch(m[2], -1) {
			labels = append(labels, l[1])
		}
		all[m[1]] = labels
	}
	return all
}

var (
	metricName = regexp.MustCompile(`\b(?:wrenn|go|process)_[a-z_]+`)
	grouped    = regexp.MustCompile(`\bby \(([^)]*)\)`)
	matched    = regexp.MustCompile(`([a-z]+)=~?"`)
	shown      = regexp.MustCompile(`\{\{(\w+)\}\}`)
)

// wrong returns the faults of a query: a metric that does not exist, a label that the
// metric does not have, or rate() of something other than a counter.
func wrong(metrics map[string][]string, expr, legend string) (problems []string) {
	names := slices.Compact(metricName.FindAllString(expr, -1))
	if len(names) != 1 {
		return []string{"want one metric"}
	}
	name, bucket := strings.CutSuffix(names[0], "_bucket")
	labels, ok := metrics[name]
	if !ok || bucket && !strings.HasSuffix(name, "_seconds") {
		return []string{"no such metric: " + names[0]}
	}
	if counter := bucket || strings.HasSuffix(name, "_total"); counter != strings.Contains(expr, "rate(") {
		problems = append(problems, "rate() is for counters, and for all of them")
	}
	labels = append(slices.Clone(labels), "job", "instance") // Prometheus adds these
	used := []string{}
	for _, m := range grouped.FindAllStringSubmatch(expr, -1) {
		for l := range strings.SplitSeq(m[1], ", ") {
			if l != "le" {
				used = append(used, l)
			}
		}
	}
	kept := used
	for _, m := range matched.FindAllStringSubmatch(expr, -1) {
		used = append(used, m[1])
	}
	for _, m := range shown.FindAllStringSubmatch(legend, -1) {
		used = append(used, m[1])
		if strings.Contains(expr, "by (") && !slices.Contains(kept, m[1]) {
			problems = append(problems, "the legend shows a label that the query drops: "+m[1])
		}
	}
	for _, l := range used {
		if !slices.Contains(labels, l) {
			problems = append(problems, name+" has no label "+l)
		}
	}
	return problems
}

// TestDashboard checks that the dashboard shows every metric, and queries only existing
// metrics and labels.
func TestDashboard(t *testing.T) {
	metrics := documentedMetrics(t)
	for expr, legend := range map[string]string{
		"wrenn_nothing": "", "rate(wrenn_builds[1m])": "", "wrenn_http_requests_total": "",
		"max by (host) (wrenn_builds)": "", `wrenn_builds{host="x"}`: "", "max by (state) (wrenn_builds)": "{{instance}}",
		"rate(wrenn_builds_bucket[1m])": "",
	} {
		if wrong(metrics, expr, legend) == nil {
			t.Errorf("this test lets %q with %q pass", expr, legend)
		}
	}
	text, err := os.ReadFile("grafana/wrenn.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		UID    string
		Panels []struct {
			ID      int
			Type    string
			Title   string
			Targets []struct {
				Expr, LegendFormat string
				Datasource         struct{ UID string }
			}
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	ids, asked := map[int]bool{}, map[string]bool{}
	for _, p := range board.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		ids[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("%s: has no query", p.Title)
		}
		for _, q := range p.Targets {
			for _, problem := range wrong(metrics, q.Expr, q.LegendFormat) {
				t.Errorf("%s: %s: %s", p.Title, q.Expr, problem)
			}
			if q.Datasource.UID != "${datasource}" {
				t.Errorf("%s: the data source is %q", p.Title, q.Datasource.UID)
			}
			for _, name := range metricName.FindAllString(q.Expr, -1) {
				asked[strings.TrimSuffix(name, "_bucket")] = true
			}
		}
	}
	for name := range metrics {
		if !asked[name] {
			t.Errorf("no panel shows %s", name)
		}
	}
}
