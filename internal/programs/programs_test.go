package programs

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// root is the source tree.
const root = "../.."

// starters are the functions and types that start processes or find programs,
// by their package's import path.
var starters = map[string][]string{
	"os/exec":               {"Command", "CommandContext", "LookPath", "Cmd"},
	"os":                    {"StartProcess"},
	"syscall":               {"StartProcess", "ForkExec", "Exec"},
	"golang.org/x/sys/unix": {"Exec"},
}

// elsewhere names the code that the table does not cover, with the reason.
var elsewhere = map[string]string{
	"internal/envd":     "runs in the guest",
	"internal/programs": "is the table",
	"test":              "only tests run it",
	".cache":            "is not the source",
	"bin":               "is not the source",
}

// TestOnlyTheTableMakesCommands checks that every program that Wrenn runs is in the
// table; otherwise doctor, the Makefile and the README could not know of it.
func TestOnlyTheTableMakesCommands(t *testing.T) {
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		if d.IsDir() && (elsewhere[name] != "" || d.Name() == ".git" || d.Name() == "node_modules" || strings.HasSuffix(name, "test") || d.Name() == "testdata") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		found, err := starts(source)
		for _, f := range found {
			t.Errorf("%s uses %s: take the program from internal/programs", name, f)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// starts returns the uses of starters in a file's source. A parameter or a result may
// have the type exec.Cmd; only a literal can be a new command.
func starts(source []byte) ([]string, error) {
	f, err := parser.ParseFile(token.NewFileSet(), "", source, 0)
	if err != nil {
		return nil, err
	}
	imported := map[string]string{} // import paths by name in this file
	for _, i := range f.Imports {
		path := strings.Trim(i.Path.Value, `"`)
		name := path[strings.LastIndex(path, "/")+1:]
		if i.Name != nil {
			name = i.Name.Name
		}
		imported[name] = path
	}
	var found []string
	use := func(e ast.Expr, types bool) {
		s, ok := e.(*ast.SelectorExpr)
		if !ok {
			return
		}
		x, ok := s.X.(*ast.Ident)
		if ok && (s.Sel.Name == "Cmd") == types && slices.Contains(starters[imported[x.Name]], s.Sel.Name) {
			found = append(found, x.Name+"."+s.Sel.Name)
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CompositeLit:
			use(n.Type, true)
		case *ast.SelectorExpr:
			use(n, false)
		}
		return true
	})
	return found, nil
}

func TestStartsFindsEveryWay(t *testing.T) {
	const source = `package p
import ("os"; e "os/exec"; "syscall"; "golang.org/x/sys/unix")
func f(cmd *e.Cmd) *e.Cmd {
	e.Command("a"); e.CommandContext(nil, "a"); look := e.LookPath; os.StartProcess("a", nil, nil)
	syscall.ForkExec("a", nil, nil); unix.Exec("a", nil, nil)
	return &e.Cmd{Path: "a"}
}`
	got, err := starts([]byte(source))
	if err != nil || len(got) != 7 {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	for _, v := range []string{"9", "15", "x"} {
		if err := os.MkdirAll(filepath.Join(dir, v), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, v, "server"), []byte("#!/bin/sh\necho $1\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p := Program{File: filepath.Join(dir, "*", "server"), Package: "server"}
	if got, err := p.Find(); err != nil || got != filepath.Join(dir, "15", "server") {
		t.Errorf("got %s, %v", got, err)
	}
	if out, err := p.Command("hello").Output(); err != nil || string(out) != "hello\n" {
		t.Errorf("got %q, %v", out, err)
	}
	for _, missing := range []Program{{File: filepath.Join(dir, "*", "client"), Package: "client"}, {File: "no-such-program", Package: "client"}} {
		err := missing.Command().Run()
		if err == nil || !strings.Contains(err.Error(), "apt-get install client") || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, exec.ErrNotFound) {
			t.Errorf("%s: got %v", missing.File, err)
		}
	}
}
