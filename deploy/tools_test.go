package deploy

import (
	"encoding/json"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

// manifest is a package.json, or an entry of its lock file.
type manifest struct {
	Version         string            `json:"version"`
	Integrity       string            `json:"integrity"`
	Dependencies    map[string]string `json:"dependencies"`
	DevDependencies map[string]string `json:"devDependencies"`
}

// TestToolsAreLocked checks that lock files pin every npm program that make runs to one
// version, with a checksum for every file, and that make installs them in no other way.
func TestToolsAreLocked(t *testing.T) {
	parse := func(name string, into any) {
		t.Helper()
		b, err := os.ReadFile(name)
		if err == nil {
			err = json.Unmarshal(b, into)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	exact := regexp.MustCompile(`^\d+\.\d+\.\d+$`)
	var found []string
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "node_modules" || d.Name() == ".git" || d.Name() == ".cache") {
			return fs.SkipDir
		}
		if d.Name() == "package.json" {
			found = append(found, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(found, "../.ci/lint/package.json") {
		t.Errorf("the tools of make lint are not among %q", found)
	}
	for _, name := range found {
		var asked manifest
		parse(name, &asked)
		var lock struct{ Packages map[string]manifest }
		parse(filepath.Join(filepath.Dir(name), "package-lock.json"), &lock)
		all := maps.Clone(asked.DevDependencies)
		if all == nil {
			all = make(map[string]string)
		}
		maps.Copy(all, asked.Dependencies)
		for tool, version := range all {
			if !exact.MatchString(version) || lock.Packages["node_modules/"+tool].Version != version {
				t.Errorf("%s asks for %s %q, and its lock has %q", name, tool, version, lock.Packages["node_modules/"+tool].Version)
			}
		}
		for of, p := range lock.Packages {
			if of != "" && p.Integrity == "" {
				t.Errorf("the lock of %s has no checksum of %s", name, of)
			}
		}
	}
	scripts, err := filepath.Glob("../.ci/*")
	if err != nil {
		t.Fatal(err)
	}
	runs := regexp.MustCompile(`(?m)\bnpx\b|\bnpm (?:i|in|ins|inst|install|add|exec|x|update)\b`)
	for _, name := range append(scripts, "../Makefile") {
		if info, err := os.Stat(name); err != nil || info.IsDir() {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if at := runs.FindIndex(b); at != nil {
			t.Errorf("%s installs without the lock: %q", name, b[at[0]:min(at[0]+60, len(b))])
		}
	}
}
