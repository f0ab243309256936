package all

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/caarlos0/env/v11"

	"github.com/wrenn-dev/wrenn/deploy"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/settings"
)

var update = flag.Bool("update", false, "write docs/configuration.md")

const root = "../../.."

// TestDocumentation checks that docs/configuration.md has the programs' settings.
func TestDocumentation(t *testing.T) {
	path := filepath.Join(root, "docs", "configuration.md")
	if *update {
		if err := os.WriteFile(path, []byte(markdown()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != markdown() {
		t.Error("docs/configuration.md does not match the settings: run make generate")
	}
}

// TestRegistry checks that every setting says what it is for, and that the registry has
// every parsed setting.
func TestRegistry(t *testing.T) {
	for _, c := range []struct {
		settings.Program
		config any
	}{{ServerProgram, &Server{}}, {AgentProgram, &Agent{}}, {client, &Client{}}} {
		fields, err := env.GetFieldParams(c.config)
		if err != nil {
			t.Fatal(err)
		}
		parsed := map[string]bool{}
		for _, f := range fields {
			if f.OwnKey != "" {
				parsed[f.Key] = true
			}
		}
		keys := map[string]bool{}
		for _, s := range c.Settings {
			if s.Help == "" || strings.HasSuffix(s.Help, ".") {
				t.Errorf("%s: its tag help is %q: say what it is for, without a full stop", s.Name, s.Help)
			}
			if !parsed[s.Name] || keys[s.Key()] {
				t.Errorf("%s is not parsed, or twice", s.Name)
			}
			keys[s.Key()] = true
			delete(parsed, s.Name)
		}
		if len(parsed) > 0 || len(keys) == 0 {
			t.Errorf("%s: not in the registry: %v", c.Name, parsed)
		}
	}
	used := map[string]bool{}
	for _, m := range regexp.MustCompile(`\{\$(\w+)`).FindAllStringSubmatch(string(deploy.Caddyfile), -1) {
		used[m[1]] = true
	}
	for _, s := range frontDoor.Settings {
		if !used[s.Name] || s.Help == "" {
			t.Errorf("the Caddyfile documents %s, and uses it: %v", s.Name, used[s.Name])
		}
		delete(used, s.Name)
	}
	if len(used) > 0 {
		t.Errorf("the Caddyfile does not document %v", used)
	}
}

// TestUsualSize checks that an agent prepares for sandboxes of the default size.
func TestUsualSize(t *testing.T) {
	want := map[string]int{"WRENN_DEFAULT_VCPUS": hostwire.DefaultVCPUs, "WRENN_DEFAULT_MEMORY_MIB": hostwire.DefaultMemoryMiB}
	for _, s := range AgentProgram.Settings {
		if n, ok := want[s.Name]; ok && s.Default != strconv.Itoa(n) {
			t.Errorf("%s is %s by default, want %d", s.Name, s.Default, n)
		}
		delete(want, s.Name)
	}
	if len(want) > 0 {
		t.Errorf("the agent has no settings %v", want)
	}
}

// TestCodeUsesOnlySettings checks that every variable that the programs' code names is a
// setting.
func TestCodeUsesOnlySettings(t *testing.T) {
	known := map[string]bool{"WRENN_BENCH": true}
	for _, p := range []settings.Program{ServerProgram, AgentProgram, client, frontDoor} {
		for _, s := range p.Settings {
			known[s.Name] = true
		}
	}
	out, err := exec.Command("git", "-C", root, "ls-files", "cmd", "client", "internal").Output()
	if err != nil {
		t.Skipf("list files: %v", err)
	}
	name, seen := regexp.MustCompile(`\bWRENN_[A-Z][A-Z_]*[A-Z]\b`), 0
	for file := range strings.FieldsSeq(string(out)) {
		// Programs that only tests run have their own variables.
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") || strings.Contains(file, "test/") || strings.Contains(file, "internal/gen/") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(root, file))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range name.FindAll(text, -1) {
			seen++
			if !known[string(word)] && !bytes.HasPrefix(word, []byte("WRENN_TEST_")) {
				t.Errorf("%s: %s is not a setting", file, word)
			}
		}
	}
	if seen < len(known) {
		t.Errorf("the code names settings %d times", seen)
	}
}

// TestHelp checks that docs/configuration.md has the names, values and meanings that the
// programs print, in the same order.
func TestHelp(t *testing.T) {
	printed := regexp.MustCompile(`(?m)^  (\w+) \((.+)\)\n      (.+)$`)
	row := regexp.MustCompile("(?m)^\\| `(\\w+)` \\| (.+?) \\| (.+) \\|$")
	page, err := os.ReadFile(filepath.Join(root, "docs", "configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	for heading, p := range map[string]settings.Program{"## The server\n": ServerProgram, "## The agent\n": AgentProgram} {
		_, rest, _ := strings.Cut(string(page), heading)
		section, _, _ := strings.Cut(rest, "\n## ")
		help := printed.FindAllStringSubmatch(p.Help(), -1)
		table := row.FindAllStringSubmatch(strings.ReplaceAll(section, `\|`, "|"), -1)
		if len(help) != len(p.Settings) || len(table) != len(help) {
			t.Errorf("the %s has %d settings, prints %d and documents %d", p.Name, len(p.Settings), len(help), len(table))
			continue
		}
		for i, h := range help {
			if !slices.Equal(h[1:], table[i][1:]) {
				t.Errorf("the %s prints %q and documents %q", p.Name, h[1:], table[i][1:])
			}
		}
	}
}

// TestLoadWarnsBeforeItFails checks that the warnings include the misspelled name of a
// required setting, although that is missing.
func TestLoadWarnsBeforeItFails(t *testing.T) {
	t.Setenv(settings.FileVariable, filepath.Join(t.TempDir(), "wrenn.yaml"))
	if err := os.WriteFile(os.Getenv(settings.FileVariable), []byte("server:\n  secrt_key: x\nagnet:\n  warm: 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("WRENN_SECRET_KAY", "x")
	for _, name := range []string{"DATABASE_URL", "REDIS_URL", "WRENN_SECRET_KEY"} {
		t.Setenv(name, "") // so that the test restores it
		os.Unsetenv(name)
	}
	warnings, err := Load(ServerProgram, &Server{})
	if err == nil || !strings.Contains(err.Error(), "WRENN_SECRET_KEY") {
		t.Errorf("read settings: %v", err)
	}
	all := strings.Join(warnings, "\n")
	for _, want := range []string{"WRENN_SECRET_KAY is not a setting: did you mean WRENN_SECRET_KEY?", "server.secrt_key is not a setting: did you mean secret_key?", "agnet is not a section: did you mean agent?"} {
		if !strings.Contains(all, want) {
			t.Errorf("the warnings lack %q:\n%s", want, all)
		}
	}
}
