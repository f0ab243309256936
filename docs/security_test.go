// Package docs holds the manual. Its tests check what it says about
// the source tree.
package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
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

// TestChangingNamesFiles checks that every file and folder that changing.md names exists.
func TestChangingNamesFiles(t *testing.T) {
	page, err := os.ReadFile("changing.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range regexp.MustCompile("`((?:api|client|cmd|deploy|internal)/[a-z0-9_/.-]*)`").FindAllStringSubmatch(string(page), -1) {
		n++
		if _, err := os.Stat(filepath.Join("..", m[1])); err != nil {
			t.Error(err)
		}
	}
	for _, m := range regexp.MustCompile("`(000[a-z0-9_]+\\.sql)`").FindAllStringSubmatch(string(page), -1) {
		n++
		if _, err := os.Stat(filepath.Join("..", "internal/server/store/migrations", m[1])); err != nil {
			t.Error(err)
		}
	}
	if n < 50 {
		t.Errorf("the page names %d files", n)
	}
}
