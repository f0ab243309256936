package store

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestQueriesAreCalled checks that the program, and not only a test, calls every query.
func TestQueriesAreCalled(t *testing.T) {
	called := make(map[string]bool)
	// Only the server's own packages: the client has methods of the same names.
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && d.Name() == "gen":
			return filepath.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				called[s.Sel.Name] = true
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	queries := generated(t)
	if len(queries) < 50 {
		t.Fatalf("found %d queries", len(queries))
	}
	for _, name := range slices.Sorted(maps.Keys(queries)) {
		if !called[name] {
			t.Errorf("nothing calls the query %s", name)
		}
	}
}
