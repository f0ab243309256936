package await

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// mark begins a comment, on the same line or on those before, that says why a test waits for
// a fixed time.
const mark = "real time:"

// TestNoFixedWaits checks that no test waits for a fixed time, which is too short on a busy
// machine and too long on all others. Tests wait for events, or use package synctest. A bound
// of a minute or more, or one from this package, only catches hangs. Benchmarks may wait.
func TestNoFixedWaits(t *testing.T) {
	root := filepath.Join("..", "..")
	files := 0
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := filepath.ToSlash(strings.TrimPrefix(path, root+string(filepath.Separator)))
		if e.IsDir() && (name == "test/bench" || name == "web" || e.Name() == "node_modules" || strings.HasPrefix(e.Name(), ".") && path != root) {
			return filepath.SkipDir
		}
		dir := filepath.Base(filepath.Dir(path))
		if !strings.HasSuffix(name, "_test.go") && !(strings.HasSuffix(name, ".go") && strings.HasSuffix(dir, "test")) {
			return nil
		}
		files++
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		found, err := fixedWaits(name, text)
		for _, f := range found {
			t.Error(f)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 100 {
		t.Errorf("the check read only %d files", files)
	}
}

// fixedWaits lists the fixed waits in a file, and marks that excuse none.
func fixedWaits(name string, text []byte) (found []string, err error) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, name, text, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	line := func(p token.Pos) int { return set.Position(p).Line }
	marks := map[int]int{} // line → the line of its mark
	used := map[int]bool{} // by the line of the mark
	for _, c := range file.Comments {
		if !strings.Contains(c.Text(), mark) {
			continue
		}
		for n := line(c.Pos()); n <= line(c.End())+1; n++ {
			marks[n] = line(c.Pos())
		}
		used[line(c.Pos())] = false
	}
	report := func(p token.Pos, what string) {
		if m, ok := marks[line(p)]; ok {
			used[m] = true
			return
		}
		found = append(found, set.Position(p).String()+": "+what+": wait for an event, or say why in a comment that begins with \""+mark+"\"")
	}
	bubbles := bubbles(file)
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			return !bubbles["."+n.Name.Name]
		case *ast.CallExpr:
			switch pkg, name := selector(n.Fun); {
			case bubbles[pkg+"."+name]:
				return false // its clock does not wait
			case pkg != "time":
			case name == "Sleep", slices.Contains([]string{"After", "AfterFunc", "NewTicker", "NewTimer", "Tick"}, name) && !bound(n.Args[0]):
				report(n.Pos(), "time."+name)
			}
		case *ast.BasicLit:
			if n.Kind == token.STRING && sleeps(n.Value) {
				report(n.Pos(), "a script sleeps")
			}
		}
		return true
	})
	for m, ok := range used {
		if !ok {
			found = append(found, name+":"+strconv.Itoa(m)+": \""+mark+"\" without a fixed wait")
		}
	}
	slices.Sort(found)
	return found, nil
}

// bubbles returns the functions whose bodies and arguments run in a synctest bubble, as
// pkg.name: synctest.Test, and those of the file that call it.
func bubbles(file *ast.File) map[string]bool {
	all := map[string]bool{"synctest.Test": true}
	for _, d := range file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok || f.Recv != nil || f.Body == nil {
			continue
		}
		ast.Inspect(f.Body, func(n ast.Node) bool {
			if c, ok := n.(*ast.CallExpr); ok {
				if pkg, name := selector(c.Fun); pkg+"."+name == "synctest.Test" {
					all["."+f.Name.Name] = true
				}
			}
			return true
		})
	}
	return all
}

// selector splits an expression of the form pkg.name or name.
func selector(e ast.Expr) (pkg, name string) {
	switch e := e.(type) {
	case *ast.Ident:
		return "", e.Name
	case *ast.SelectorExpr:
		if x, ok := e.X.(*ast.Ident); ok {
			return x.Name, e.Sel.Name
		}
	}
	return "", ""
}

// bound reports whether d is a bound for hangs: a minute or more, or from this package.
func bound(d ast.Expr) bool {
	switch d := d.(type) {
	case *ast.CallExpr:
		pkg, _ := selector(d.Fun)
		return pkg == "await"
	case *ast.SelectorExpr:
		pkg, _ := selector(d)
		return pkg == "await" || unit(d) >= time.Minute
	case *ast.BinaryExpr:
		n, ok := d.X.(*ast.BasicLit)
		if !ok || d.Op != token.MUL {
			return false
		}
		times, err := strconv.Atoi(n.Value)
		return err == nil && time.Duration(times)*unit(d.Y) >= time.Minute
	}
	return false
}

// unit returns the value of an expression like time.Second, or 0.
func unit(e ast.Expr) time.Duration {
	switch pkg, name := selector(e); {
	case pkg != "time":
	case name == "Hour":
		return time.Hour
	case name == "Minute":
		return time.Minute
	case name == "Second":
		return time.Second
	}
	return 0
}

var sleep = regexp.MustCompile(`(?:\b|\\n)sleep ([0-9.]+[a-z]?)(; done)?`)

// sleeps reports whether a script waits for a fixed time. Loops that poll, and processes that
// only live until the test ends them, do not.
func sleeps(script string) bool {
	return slices.ContainsFunc(sleep.FindAllStringSubmatch(script, -1), func(m []string) bool {
		seconds, err := strconv.ParseFloat(m[1], 64)
		return err == nil && seconds < 60 && m[2] == ""
	})
}

func TestFixedWaits(t *testing.T) {
	for code, want := range map[string]bool{
		`time.Sleep(time.Millisecond)`:                                     true,
		`time.Sleep(time.Millisecond) // real time: because`:               false,
		"// real time: because\n time.Sleep(d)":                            false,
		"// real time: because\n\n time.Sleep(d)":                          true,
		"// real time: because\n f()":                                      true,
		`synctest.Test(t, func(t *testing.T) { time.Sleep(time.Second) })`: false,
		`bubble(t, func() { time.Sleep(time.Second) })`:                    false,
		`other(t, func() { time.Sleep(time.Second) })`:                     true,
		`<-time.After(59 * time.Second)`:                                   true,
		`<-time.After(60 * time.Second)`:                                   false,
		`<-time.After(time.Minute)`:                                        false,
		`<-time.After(d)`:                                                  true,
		`<-time.After(await.Hang)`:                                         false,
		`<-time.After(await.Scale(time.Second))`:                           false,
		`time.NewTicker(time.Millisecond)`:                                 true,
		`time.AfterFunc(time.Second, f)`:                                   true,
		`sh("sleep ` + `0.5; echo")`:                                       true,
		`sh("true\nsleep ` + `0.5")`:                                       true,
		`sh("sleep 600")`:                                                  false,
		`sh("until [ -e x ]; do sleep 0.1; done")`:                         false,
	} {
		found, err := fixedWaits("x.go", []byte("package x\nfunc bubble(f func()) { f = func() { time.Sleep(1) }; synctest.Test(f) }\nfunc f() {\n"+code+"\n}\n"))
		if err != nil || len(found) > 0 != want {
			t.Errorf("%s: %v, %v", code, found, err)
		}
	}
}
