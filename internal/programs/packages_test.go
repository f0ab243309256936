package programs_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	_ "github.com/wrenn-dev/wrenn/internal/agent/vmm/drivers" // adds the monitors
	"github.com/wrenn-dev/wrenn/internal/programs"
)

// packages returns the packages that a machine needs and a plain Debian lacks.
func packages(agent bool) []string {
	var names []string
	for _, p := range programs.All() {
		if !p.Base && !(agent && p.UpOnly) {
			names = append(names, p.Package)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// line returns the words after prefix in the first line of a file that has it, and in its
// continuation lines.
func line(t *testing.T, file, prefix string) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../..", file))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(strings.ReplaceAll(string(b), "\\\n", " "), prefix)
	if !ok {
		t.Fatalf("%s has no %q", file, prefix)
	}
	rest, _, _ = strings.Cut(rest, "\n")
	words := strings.Fields(rest)
	slices.Sort(words)
	return words
}

func TestMakefileInstallsWhatTheTableNeeds(t *testing.T) {
	if got, want := line(t, "Makefile", "\nRUN_PACKAGES  := "), packages(false); !slices.Equal(got, want) {
		t.Errorf("RUN_PACKAGES has %q, the table %q", got, want)
	}
}

func TestREADMEInstallsWhatAnAgentNeeds(t *testing.T) {
	if got, want := line(t, "README.md", "\n    apt-get update && apt-get install -y --no-install-recommends "), packages(true); !slices.Equal(got, want) {
		t.Errorf("the README has %q, the table %q", got, want)
	}
}
