package up

import (
	"os"
	"slices"
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
		got, unused := passed(p, chosen)
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
