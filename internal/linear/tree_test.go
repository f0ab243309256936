package linear

import (
	"bytes"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// module is the path prefix of the tree's own packages.
const module = "github.com/wrenn-dev/wrenn/"

// gathers are the functions that put together what arrives in pieces, with the check that
// they are linear: the name that a test passes to [Check], or the reason why there is
// none. A new one must be listed here.
var gathers = map[string]string{
	"client.FollowBuild":                    "passes each event on",
	"client.Logs":                           "io.ReadAll, which is linear; the server bounds it",
	"client.sendInput":                      "passes each piece on",
	"client.streamCode":                     "passes each event on",
	"client.unpack":                         "check: receive",
	"internal/agent.ReadFile":               "io.ReadAll of a bounded file, which is linear",
	"internal/agent.feed":                   "passes each piece on",
	"internal/agent.receive":                "passes each piece on",
	"internal/agent.relay":                  "passes each piece on",
	"internal/agent/enroll.call":            "the server's answer, of bounded length",
	"internal/agent/guest.collect":          "appends to one slice for each stream, up to MaxOutput",
	"internal/agent/guest.init":             "64 KiB",
	"internal/agent/image.unpack":           "the machine's own packages",
	"internal/agent/image/oci.contents":     "check: contents",
	"internal/agent/image/oci.layer":        "check: layer",
	"internal/agent/network.discard":        "the agent's own slots",
	"internal/agent/network.fingerprint":    "the agent's own rules",
	"internal/agent/network.parseResolvers": "the machine's own settings",
	"internal/agent/network.receive":        "passes each piece on",
	"internal/agent/sandbox.clean":          "the agent's own leftovers",
	"internal/agent/vmm/qemu.Devices":       "io.ReadAll of a bounded file, which is linear",
	"internal/agent/vmm/qemu.library":       "a library of fixed size",
	"internal/cli.json":                     "check: json",
	"internal/cli.source":                   "what the user types",
	"internal/envd.init":                    "4 MiB of the agent's, by io.ReadAll",
	"internal/envd/account.eachLine":        "the guest's own, of bounded size",
	"internal/envd/files.sized":             "a file of the kernel's, of bounded size",
	"internal/envd/files.unpackTree":        "check: unpackTree",
	"internal/envd/filesystem.run":          "passes each event on",
	"internal/envd/machine.environment":     "the agent's, once for each creation",
	"internal/envd/machine.hosts":           "the guest's own, on its own processors",
	"internal/envd/machine.profile":         "the agent's, once for each creation",
	"internal/envd/machine.readText":        "the guest's own, of bounded size",
	"internal/envd/machine.sudoEnvironment": "the agent's, once for each creation",
	"internal/envd/ports.parse":             "the guest's own, on its own processors",
	"internal/envd/process.pump":            "passes each piece on",
	"internal/kmod.lines":                   "the machine's own kernel",
	"internal/nametext.Name":                "check: names",
	"internal/nametext.Text":                "check: names",
	"internal/recipe.String":                "check: word",
	"internal/recipe.array":                 "check: sources as a list",
	"internal/recipe.expand":                "its result is bounded",
	"internal/recipe.render":                "check: variables",
	"internal/recipe/buildcontext.all":      "check: archive of a folder",
	"internal/server/builds.exec":           "check: output of a step",
	"internal/server/hosts.bound":           "200 characters",
	"internal/server/reconcile.follow":      "passes each event on",
	"internal/server/rest.RunCode":          "passes each piece on",
	"internal/server/rest.collectCode":      "check: collectCode",
	"internal/server/rest.copyIn":           "passes each piece on",
	"internal/server/rest.copyOut":          "passes each piece on",
	"internal/server/rest.readBody":         "check: readBody",
	"internal/server/rest.relay":            "io.ReadAll of a bounded answer, which is linear",
	"internal/server/sandboxes.exec":        "check: kept",
	"internal/server/sandboxes.run":         "check: kept",
	"internal/server/templates.send":        "passes each piece on",
	"internal/up.healthy":                   "4 KiB",
	"internal/upstream.pass":                "passes each piece on",
}

// copies are the functions that may copy everything they have for each piece, with the
// reason.
var copies = map[string]string{
	"client.Import":                   "once for each call",
	"client.URL":                      "once for each call",
	"client.execStream":               "once for each call",
	"client.once":                     "once for each call",
	"internal/cli.pack":               "once for each file",
	"internal/envd/files.packTree":    "once for each file",
	"internal/server/builds.write":    "once for each file",
	"internal/server/rest.admit":      "once for each request",
	"internal/server/rest.New":        "at the start",
	"internal/server/rest.pumpOutput": "one piece, of bounded length",
	"internal/agent/launcher.New":     "once for each machine",
}

// TestGathersAreChecked finds the functions of the tree that gather pieces, and those
// that copy everything they have for each piece: s += piece in a loop or on a field, and
// append(other, …). The first need a check, the others a reason.
func TestGathersAreChecked(t *testing.T) {
	found := map[string]bool{}
	for name, kind := range look(t) {
		found[name] = true
		switch {
		case kind.copies && copies[name] == "":
			t.Errorf("%s copies everything it has for each piece (%s): gather it in a strings.Builder, bytes.Buffer or one slice", name, kind.where)
		case kind.gathers && gathers[name] == "" && copies[name] == "":
			t.Errorf("%s gathers pieces (%s): check with linear.Check that it is linear, and add it to gathers", name, kind.where)
		}
	}
	for name := range maps.Keys(gathers) {
		if !found[name] {
			t.Errorf("gathers lists %s, which no longer gathers anything", name)
		}
	}
	for name := range maps.Keys(copies) {
		if !found[name] {
			t.Errorf("copies lists %s, which no longer copies anything", name)
		}
	}
	checks := checks(t)
	for name, how := range gathers {
		if check, ok := strings.CutPrefix(how, "check: "); ok && !checks[check] {
			t.Errorf("%s: no test calls linear.Check(t, %q, …)", name, check)
		}
	}
}

// checks returns the names that the tree's tests pass to Check. For a table of inputs,
// these are the table's keys.
func checks(t *testing.T) map[string]bool {
	names := map[string]bool{}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, "internal/linear/tree_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(text, []byte("linear.Check(")) {
			return err
		}
		for _, m := range regexp.MustCompile(`linear\.Check\(t, "([^"]+)"|(?m)^\t+"([^"]+)": +func\((?:\w+ )?int\)`).FindAllSubmatch(text, -1) {
			names[string(m[1])+string(m[2])] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// kind describes what a function does, and where.
type kind struct {
	gathers, copies bool
	where           string
}

// look type-checks the tree's own packages and classifies their functions.
func look(t *testing.T) map[string]*kind {
	t.Helper()
	list := exec.CommandContext(t.Context(), "go", "list", "-export", "-deps", "-f", `{{.ImportPath}}|{{.Export}}|{{.Dir}}|{{join .GoFiles ","}}`, "./client/...", "./cmd/...", "./internal/...")
	list.Dir = "../.."
	var stderr bytes.Buffer
	list.Stderr = &stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("list packages: %v\n%s", err, &stderr)
	}
	exports := map[string]string{}
	ours := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSpace(line), "|")
		exports[f[0]] = f[1]
		name, ok := strings.CutPrefix(f[0], module)
		if ok && !strings.HasPrefix(name, "internal/gen/") && !strings.HasSuffix(name, "test") && !strings.Contains(name, "test/") {
			for file := range strings.SplitSeq(f[3], ",") {
				ours[name] = append(ours[name], filepath.Join(f[2], file))
			}
		}
	}
	if len(ours) < 50 {
		t.Fatalf("found %d packages", len(ours))
	}
	files := token.NewFileSet()
	imports := importer.ForCompiler(files, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
	all := map[string]*kind{}
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		var parsed []*ast.File
		for _, path := range ours[name] {
			f, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			parsed = append(parsed, f)
		}
		s := &seen{files: files, info: &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}, Defs: map[*ast.Ident]types.Object{}}}
		if _, err := (&types.Config{Importer: imports}).Check(module+name, files, parsed, s.info); err != nil {
			t.Fatal(err)
		}
		for _, f := range parsed {
			for _, d := range f.Decls {
				fn, ok := d.(*ast.FuncDecl)
				if !ok || fn.Body == nil {
					continue
				}
				if k := s.function(fn); k.gathers || k.copies {
					key := name + "." + fn.Name.Name
					if old := all[key]; old != nil {
						k.gathers, k.copies = k.gathers || old.gathers, k.copies || old.copies
					}
					all[key] = k
				}
			}
		}
	}
	return all
}

// seen is a type-checked package.
type seen struct {
	files *token.FileSet
	info  *types.Info
}

// called returns the full name of the called function, or "".
func (s *seen) called(c *ast.CallExpr) string {
	switch f := c.Fun.(type) {
	case *ast.SelectorExpr:
		if fn, ok := s.info.Uses[f.Sel].(*types.Func); ok {
			return fn.FullName()
		}
	case *ast.Ident:
		if b, ok := s.info.Uses[f].(*types.Builtin); ok {
			return b.Name()
		}
	}
	return ""
}

// outer reports whether an expression refers to a variable declared outside a loop.
func (s *seen) outer(e ast.Expr, loop ast.Node) bool {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			o := s.info.ObjectOf(x)
			return x.Name != "_" && o != nil && (o.Pos() < loop.Pos() || o.Pos() > loop.End())
		case *ast.SelectorExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		case *ast.UnaryExpr:
			e = x.X
		default:
			return true
		}
	}
}

// string reports whether an expression is a string, and whether it is part of something.
func (s *seen) string(e ast.Expr) (is, part bool) {
	t := s.info.TypeOf(e)
	if t == nil {
		return false, false
	}
	b, ok := t.Underlying().(*types.Basic)
	_, ident := e.(*ast.Ident)
	return ok && b.Info()&types.IsString != 0, !ident
}

// pieces matches the methods that return the next piece of something.
var pieces = regexp.MustCompile(`\)\.(Receive|Scan|Next|ReadToken|Token|Decode|Read|ReadString|ReadBytes|ReadLine|ReadRune)$`)

// writes matches the methods that add to what their receiver has.
var writes = regexp.MustCompile(`\)\.(Write|WriteString|WriteByte|WriteRune|add|keep|put|mark|entry|check)$`)

func (s *seen) function(fn *ast.FuncDecl) *kind {
	k := &kind{}
	note := func(n ast.Node, copies bool) {
		if copies {
			k.copies = true
		} else {
			k.gathers = true
		}
		at := s.files.Position(n.Pos())
		k.where = filepath.Base(at.Filename) + at.String()[strings.LastIndex(at.String()[:strings.LastIndex(at.String(), ":")], ":"):]
	}
	var loops []ast.Node
	ast.PreorderStack(fn.Body, nil, func(n ast.Node, stack []ast.Node) bool {
		loops = loops[:0]
		for _, outer := range stack {
			switch outer.(type) {
			case *ast.ForStmt, *ast.RangeStmt:
				loops = append(loops, outer)
			}
		}
		s.node(n, loops, note)
		return true
	})
	return k
}

func (s *seen) node(n ast.Node, loops []ast.Node, note func(ast.Node, bool)) {
	within := func(e ast.Expr) bool {
		return slices.ContainsFunc(loops, func(loop ast.Node) bool { return s.outer(e, loop) })
	}
	switch x := n.(type) {
	case *ast.AssignStmt:
		for i, to := range x.Lhs {
			is, part := s.string(to)
			grown := x.Tok == token.ADD_ASSIGN
			if x.Tok == token.ASSIGN && i < len(x.Rhs) {
				e := x.Rhs[i]
				for b, ok := e.(*ast.BinaryExpr); ok && b.Op == token.ADD; b, ok = e.(*ast.BinaryExpr) {
					e, grown = b.X, true
				}
				grown = grown && types.ExprString(e) == types.ExprString(to)
			}
			if is && grown && (part || within(to)) {
				note(x, true)
			}
			if i >= len(x.Rhs) {
				continue
			}
			c, ok := x.Rhs[i].(*ast.CallExpr)
			if ok && s.called(c) == "append" && len(loops) > 0 && types.ExprString(c.Args[0]) != types.ExprString(to) && c.Ellipsis != token.NoPos && within(to) {
				note(x, true)
			}
		}
	case *ast.CallExpr:
		name := s.called(x)
		f, method := x.Fun.(*ast.SelectorExpr)
		switch {
		case name == "io.ReadAll", strings.HasSuffix(name, "bytes.Buffer).ReadFrom"):
			note(x, false)
		case method && (strings.HasPrefix(name, "(*strings.Builder).Write") || strings.HasPrefix(name, "(*bytes.Buffer).Write")) && within(f.X):
			note(x, false)
		case method && pieces.MatchString(name) && len(loops) > 0:
			loop := loops[len(loops)-1]
			if s.grows(loop) {
				note(x, false)
			}
		}
	}
}

// grows reports whether a loop adds to something declared before it.
func (s *seen) grows(loop ast.Node) (does bool) {
	ast.Inspect(loop, func(n ast.Node) bool {
		switch x := n.(type) {
		case *ast.AssignStmt:
			for i, to := range x.Lhs {
				if !s.outer(to, loop) {
					continue
				}
				_, indexed := to.(*ast.IndexExpr)
				c := (*ast.CallExpr)(nil)
				if i < len(x.Rhs) {
					c, _ = x.Rhs[i].(*ast.CallExpr)
				}
				does = does || indexed || c != nil && s.called(c) == "append"
			}
		case *ast.CallExpr:
			// A function value may keep its arguments.
			if id, ok := x.Fun.(*ast.Ident); ok {
				_, value := s.info.Uses[id].(*types.Var)
				does = does || value && s.outer(id, loop)
			}
			f, ok := x.Fun.(*ast.SelectorExpr)
			does = does || ok && writes.MatchString(s.called(x)) && s.outer(f.X, loop)
		}
		return !does
	})
	return does
}
