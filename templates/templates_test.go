package templates_test

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/recipe"
	"github.com/wrenn-dev/wrenn/templates"
)

// TestRecipes parses the shipped recipes and checks that the files that they copy exist.
func TestRecipes(t *testing.T) {
	for _, name := range templates.Names() {
		folder, err := templates.Folder(name)
		if err != nil {
			t.Fatal(err)
		}
		text, err := fs.ReadFile(folder, "Recipe")
		if err != nil {
			t.Fatal(err)
		}
		r, err := recipe.Parse(string(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for line := range strings.Lines(r.String()) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "COPY" {
				if _, err := fs.Stat(folder, f[1]); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
	}
	for _, name := range []string{"", ".", "..", "../templates", "none", "node/Recipe"} {
		if _, err := templates.Folder(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v", name, err)
		}
	}
}
