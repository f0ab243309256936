package programs

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// fakeCaddy writes a program that pretends to be Caddy.
func fakeCaddy(t *testing.T, path, version string, modules ...string) {
	t.Helper()
	script := "#!/bin/sh\ncase $1 in\nversion) echo '" + version + "' ;;\nlist-modules) printf 'admin.api.load\\n%b\\n' '" + strings.Join(modules, `\n`) + "' ;;\nesac\n"
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
}

func TestCheckCaddy(t *testing.T) {
	for _, c := range []struct{ prints, want string }{
		{"v2.11.9 h1:bhZtcRKQOq0=", ""},
		{"v2.12.0", ""},
		{"3.0.0", ""},
		{"2.6.2", "2.6.2, which is too old"},
		{"v2.10.2 h1:x", "2.10.2, which is too old"},
		{"v1.99.0", "1.99.0, which is too old"},
		{"unknown", "does not say which version"},
		{"", "does not say which version"},
	} {
		path := filepath.Join(t.TempDir(), "caddy")
		fakeCaddy(t, path, c.prints, caddyModules...)
		err := checkCaddy(t.Context(), path)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: got %v, want %q", c.prints, err, c.want)
		}
	}
	path := filepath.Join(t.TempDir(), "caddy")
	fakeCaddy(t, path, "v2.11.9", caddyModules[1:]...)
	if err := checkCaddy(t.Context(), path); err == nil || !strings.Contains(err.Error(), "lacks the module") {
		t.Errorf("a Caddy of the same version with fewer modules: %v", err)
	}
}

// TestFindCaddy finds Caddy on PATH if there is none beside the program.
func TestFindCaddy(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if _, err := FindCaddy(t.Context()); err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("without any: %v", err)
	}
	path := filepath.Join(dir, "caddy")
	fakeCaddy(t, path, "2.6.2")
	if _, err := FindCaddy(t.Context()); err == nil || !strings.Contains(err.Error(), "too old") {
		t.Errorf("with Debian's: %v", err)
	}
	fakeCaddy(t, path, "v2.11.9", caddyModules...)
	if got, err := FindCaddy(t.Context()); err != nil || got.File != path {
		t.Errorf("got %s, %v", got.File, err)
	}
}

// TestCaddyModules compares the required modules with those that the front door's Caddy
// registers.
func TestCaddyModules(t *testing.T) {
	files, err := filepath.Glob("../../deploy/caddy/*.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("no sources: %v", err)
	}
	var registered []string
	calls := 0
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		calls += strings.Count(string(source), "caddy.RegisterModule(")
		for _, m := range regexp.MustCompile(`caddy\.ModuleInfo\{ID: "([^"]+)"`).FindAllStringSubmatch(string(source), -1) {
			registered = append(registered, m[1])
		}
	}
	slices.Sort(registered)
	if calls != len(registered) || !slices.Equal(registered, caddyModules) {
		t.Errorf("%d calls register %q, but %q are required", calls, registered, caddyModules)
	}
}
