package deploy

import (
	"cmp"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestUnitsServeProfiles checks that each program serves profiles in a directory that
// systemd makes for it, because the server's user can create none in /run.
func TestUnitsServeProfiles(t *testing.T) {
	for _, program := range []string{"server", "agent"} {
		unit, err := os.ReadFile("systemd/wrenn-" + program + ".service")
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{"RuntimeDirectory=wrenn-" + program, "Environment=WRENN_DEBUG_LISTEN=unix:%t/wrenn-" + program + "/debug.sock"} {
			if !strings.Contains(string(unit), "\n"+line+"\n") {
				t.Errorf("the unit of the %s lacks %s", program, line)
			}
		}
	}
}

// TestTimes compares the Caddyfile's time limits with those of the listener that serves
// requests instead of Caddy.
func TestTimes(t *testing.T) {
	source, err := os.ReadFile("caddy/ports.go")
	if err != nil {
		t.Fatal(err)
	}
	units := map[string]string{"Second": "s", "Minute": "m", "Hour": "h"}
	for option, constant := range map[string]string{"grace_period": "gracePeriod", "read_header": "readHeader", "idle": "idle", "write_idle": "writeIdle"} {
		set := regexp.MustCompile(`(?m)^\s*`+option+` (\S+)$`).FindAllSubmatch(Caddyfile, -1)
		if len(set) != 1 {
			t.Fatalf("the Caddyfile sets %s %d times", option, len(set))
		}
		want, err := time.ParseDuration(string(set[0][1]))
		if err != nil {
			t.Fatal(err)
		}
		has := regexp.MustCompile(`(?m)^\t` + constant + `\s+= (?:(\d+) \* )?time\.(\w+)$`).FindSubmatch(source)
		if has == nil {
			t.Fatalf("ports.go has no %s", constant)
		}
		got, err := time.ParseDuration(cmp.Or(string(has[1]), "1") + units[string(has[2])])
		if err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Errorf("%s is %v in the Caddyfile and %v in ports.go", option, want, got)
		}
		if n := strings.Count(string(source), constant); n < 2 {
			t.Errorf("ports.go does not use %s", constant)
		}
	}
}
