// Package docs holds the manual. Its tests check what it says about
// the source tree.
package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestPagesNameTests checks that every test that these pages name exists.
func TestPagesNameTests(t *testing.T) {
	missing := make(map[string]bool)
	for _, file := range []string{"security.md", "changing.md"} {
		page, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile("`(Test[A-Za-z0-9]+)`").FindAllStringSubmatch(string(page), -1) {
			missing["func "+m[1]+"(t "] = true
		}
	}
	if len(missing) < 20 {
		t.Fatalf("the pages name %d tests", len(missing))
	}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for name := range missing {
			if strings.Contains(string(b), name) {
				delete(missing, name)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range missing {
		t.Errorf("the page names a test that does not exist: %s", name)
	}
}

var (
	file = regexp.MustCompile("`((?:api|client|cmd|deploy|internal|test)/[a-z0-9_/.-]*|Makefile|README.md|CHANGELOG.md)`")
	word = regexp.MustCompile("`(?:[a-z]+\\.)?([A-Za-z][A-Za-z0-9_]*)`")
)

// TestChangingNamesFiles checks that every file and folder that changing.md names exists.
func TestChangingNamesFiles(t *testing.T) {
	page, err := os.ReadFile("changing.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range file.FindAllStringSubmatch(string(page), -1) {
		n++
		if _, err := os.Stat(filepath.Join("..", m[1])); err != nil {
			t.Error(err)
		}
	}
	if n < 50 {
		t.Errorf("the page names %d files", n)
	}
}

// TestChangingNamesCode checks that every name of code in a section of changing.md is in one
// of the files and folders that the section names, or in a migration.
func TestChangingNamesCode(t *testing.T) {
	page, err := os.ReadFile("changing.md")
	if err != nil {
		t.Fatal(err)
	}
	// A linter, and a name that PostgreSQL made.
	elsewhere := map[string]bool{"exhaustive": true, "channels_kind_check": true}
	n := 0
	for _, section := range strings.Split(string(page), "\n## ") {
		title, _, _ := strings.Cut(section, "\n")
		var text strings.Builder
		add := func(path string) {
			if info, err := os.Stat(path); err == nil && !info.IsDir() {
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				text.Write(b)
			}
		}
		folders := []string{"internal/server/store/migrations"}
		for _, m := range file.FindAllStringSubmatch(section, -1) {
			folders = append(folders, m[1])
			add(filepath.Join("..", m[1]))
		}
		for _, folder := range folders {
			inside, err := filepath.Glob(filepath.Join("..", folder, "*"))
			if err != nil {
				t.Fatal(err)
			}
			for _, path := range inside {
				add(path)
			}
		}
		for _, m := range word.FindAllStringSubmatch(section, -1) {
			if strings.HasPrefix(m[1], "Test") || elsewhere[m[1]] {
				continue
			}
			if info, err := os.Stat(filepath.Join("../internal/server", m[1])); err == nil && info.IsDir() {
				continue
			}
			n++
			if !regexp.MustCompile(`\b` + m[1] + `\b`).MatchString(text.String()) {
				t.Errorf("%s: no file that it names has %s", title, m[1])
			}
		}
	}
	if n < 80 {
		t.Errorf("the page names %d pieces of code", n)
	}
}

// TestPagesNameCode checks that every source file that a page names exists, and that it has
// the names of code that follow in parentheses.
func TestPagesNameCode(t *testing.T) {
	sources := make(map[string]string)
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == "node_modules" || path != ".." && strings.HasPrefix(d.Name(), ".")) {
			return fs.SkipDir
		}
		if err != nil || d.IsDir() || !slices.Contains([]string{".go", ".sql", ".proto"}, filepath.Ext(path)) {
			return err
		}
		b, err := os.ReadFile(path)
		sources[filepath.ToSlash(path)] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var pages []string
	for _, pattern := range []string{"*.md", "*/*.md", "../*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		pages = append(pages, found...)
	}
	source := regexp.MustCompile("`([a-z0-9_./]+\\.(?:go|sql|proto))`(?: \\(((?:`[A-Za-z]+`(?:, | and )?)+)\\))?")
	files, names := 0, 0
	for _, page := range pages {
		for _, m := range source.FindAllStringSubmatch(read(t, page), -1) {
			var found []string // a page may name a file without its folders
			for path, text := range sources {
				if strings.HasSuffix(path, "/"+m[1]) {
					found = append(found, text)
				}
			}
			if files++; len(found) == 0 {
				t.Errorf("%s: there is no %s", page, m[1])
				continue
			}
			for _, n := range word.FindAllStringSubmatch(m[2], -1) {
				names++
				if !strings.HasPrefix(n[1], "Test") && !slices.ContainsFunc(found, regexp.MustCompile(`\b`+n[1]+`\b`).MatchString) {
					t.Errorf("%s: %s has no %s", page, m[1], n[1])
				}
			}
		}
	}
	if files < 150 || names < 10 {
		t.Errorf("the pages name %d files, and %d names in them", files, names)
	}
}
