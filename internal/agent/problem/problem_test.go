package problem

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestList(t *testing.T) {
	path := filepath.Join(t.TempDir(), "problems.json")
	l := Open(path, slog.New(slog.DiscardHandler))
	is := func(want ...string) {
		t.Helper()
		written, err := Read(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, all := range [][]Problem{l.All(), written} {
			var got []string
			for _, p := range all {
				got = append(got, string(p.Kind)+" "+p.Object+" "+p.Message)
			}
			if strings.Join(got, "\n") != strings.Join(want, "\n") {
				t.Errorf("got %q, want %q", got, want)
			}
		}
	}
	is()
	l.Report(Firewall, "", "a")
	l.Report(Firewall, "slot 1", "b")
	since := l.All()[0].Since
	l.Report(Firewall, "", "c")
	is("firewall  c", "firewall slot 1 b")
	if got := l.All()[0].Since; got != since {
		t.Errorf("a problem whose message changed began at %v, not %v", got, since)
	}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(l)
	families, err := r.Gather()
	if err != nil || len(families) != 2 || len(families[0].Metric) != len(kinds) {
		t.Fatalf("metrics %v, %v", families, err)
	}
	for _, m := range families[0].Metric {
		want := 0.0
		if m.Label[0].GetValue() == string(Firewall) {
			want = 2
		}
		if got := m.Gauge.GetValue(); got != want {
			t.Errorf("metric of %s is %v, want %v", m.Label[0].GetValue(), got, want)
		}
	}
	if lost, err := l.Restore(); lost || err != nil {
		t.Errorf("Restore reports that an intact file was lost: %v, %v", lost, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if lost, err := l.Restore(); !lost || err != nil {
		t.Errorf("Restore does not report that the file was lost: %v, %v", lost, err)
	}
	is("firewall  c", "firewall slot 1 b")
	l.Clear(Firewall, "")
	l.Clear(Firewall, "none")
	is("firewall slot 1 b")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if all, err := Read(path); err != nil || len(all) > 0 {
		t.Errorf("after the end: %v, %v", all, err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(path); err == nil {
		t.Error("a damaged list was accepted")
	}
	var none *List
	none.Report(Firewall, "", "a")
	none.Clear(Firewall, "")
	if none.All() != nil {
		t.Error("a nil list keeps problems")
	}
}

// TestNoFile checks that a list whose file cannot be written still works in memory.
func TestNoFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "problems.json")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	l := Open(path, slog.New(slog.DiscardHandler))
	l.Report(Firewall, "", "a")
	if len(l.All()) != 1 {
		t.Error("it keeps nothing")
	}
}

// TestKindsAreDocumented looks for each kind in the table of docs/sharing.md.
func TestKindsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../../docs/sharing.md")
	if err != nil {
		t.Fatal(err)
	}
	for k := range kinds {
		if !strings.Contains(string(page), "\n| `"+string(k)+"` |") {
			t.Errorf("docs/sharing.md does not have %s", k)
		}
	}
}
