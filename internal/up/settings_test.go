package up

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/settings"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
)

// serverSettings returns the server's settings in this process's environment.
func serverSettings(t *testing.T) settings.Values {
	t.Helper()
	values, _, err := all.ServerProgram.Read(os.Environ())
	if err != nil {
		t.Fatal(err)
	}
	return values
}

// TestIgnoredFile checks that `wrenn up` says which settings of the file it does not use,
// and leaves all others to the programs, which read the file.
func TestIgnoredFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "wrenn.yaml")
	if err := os.WriteFile(file, []byte("agent:\n  listen: 192.0.2.1:7070\n  dir: /d\n  warm: 3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(settings.FileVariable, file)
	values, _, err := all.AgentProgram.Read(os.Environ())
	if err != nil {
		t.Fatal(err)
	}
	env, unused := passed(all.AgentProgram, values, []string{"WRENN_LISTEN=unix:/x", "WRENN_DIR=/d"})
	if want := []string{"agent.listen in the settings file"}; !slices.Equal(unused, want) {
		t.Errorf("it does not use %q, want %q", unused, want)
	}
	for _, pair := range env {
		if strings.HasPrefix(pair, "WRENN_WARM=") {
			t.Errorf("it passes %s, which would override the file", pair)
		}
	}
}

// TestSettingsArePassed checks that every setting reaches the programs that `wrenn up`
// starts, unless it chooses the value itself and says so.
func TestSettingsArePassed(t *testing.T) {
	chosen := []string{"WRENN_LISTEN=unix:/x", "WRENN_DIR=/d"}
	for _, p := range []settings.Program{all.ServerProgram, all.AgentProgram} {
		var want, ignored []string
		for _, s := range p.Settings {
			switch s.Name {
			case "WRENN_LISTEN":
				t.Setenv(s.Name, "mine")
				want, ignored = append(want, "WRENN_LISTEN=unix:/x"), append(ignored, s.Name)
			case "WRENN_DIR":
				t.Setenv(s.Name, "/d")
			default:
				t.Setenv(s.Name, "of "+s.Name)
				want = append(want, s.Name+"=of "+s.Name)
			}
		}
		t.Setenv("WRENN_NO_SETTING", "x")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "x")
		got, unused := passed(p, nil, chosen)
		want = append(want, "WRENN_DIR=/d")
		slices.Sort(want)
		slices.Sort(got)
		if len(want) < 20 || !slices.Equal(got, want) {
			t.Errorf("the %s gets %q, want %q", p.Name, got, want)
		}
		if !slices.Equal(unused, ignored) {
			t.Errorf("the %s does not use %q, want %q", p.Name, unused, ignored)
		}
	}
}
