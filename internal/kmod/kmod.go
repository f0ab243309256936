// Package kmod reads the index of a kernel's modules that depmod(8) writes. The host
// selects the modules of the initrd with it, and the guest those that it loads later.
package kmod

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// ErrNotFound means that a kernel has no module with a name.
var ErrNotFound = errors.New("the kernel has no such module")

// Name returns the name of the module in a file. The kernel treats "-" as "_".
func Name(file string) string {
	base, _, _ := strings.Cut(path.Base(file), ".")
	return underscores(base)
}

func underscores(s string) string { return strings.ReplaceAll(s, "-", "_") }

// Index has the names, files and dependencies of a kernel's modules.
type Index struct {
	file  map[string]string   // "" if the kernel has it built in
	needs map[string][]string // files
	// pre and post are the modules that should be loaded before and after another.
	pre, post map[string][]string
	aliases   []alias
}

// alias is another name of a module; pattern may have *, ? and [.
type alias struct{ pattern, module string }

// Open reads the index in a kernel's folder, such as /lib/modules/6.1.0-57-cloud-amd64.
func Open(dir string) (*Index, error) {
	var text [len(files)][]byte
	for i, name := range files {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil && (i == 0 || !errors.Is(err, fs.ErrNotExist)) {
			return nil, fmt.Errorf("read index of modules: %w", err)
		}
		text[i] = b
	}
	return parse(text), nil
}

// files are the files of an index. Only the first one must exist.
var files = [...]string{"modules.dep", "modules.builtin", "modules.softdep", "modules.alias", "modules.symbols", "modules.builtin.modinfo"}

func parse(text [len(files)][]byte) *Index {
	x := &Index{file: map[string]string{}, needs: map[string][]string{}, pre: map[string][]string{}, post: map[string][]string{}}
	for line := range lines(text[0]) {
		if file, rest, ok := strings.Cut(line, ":"); ok {
			x.file[Name(file)], x.needs[Name(file)] = file, strings.Fields(rest)
		}
	}
	for line := range lines(text[1]) {
		if _, ok := x.file[Name(line)]; !ok {
			x.file[Name(line)] = ""
		}
	}
	for line := range lines(text[2]) {
		x.soft(strings.Fields(line))
	}
	for _, t := range text[3:5] {
		for line := range lines(t) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "alias" {
				x.aliases = append(x.aliases, alias{underscores(f[1]), underscores(f[2])})
			}
		}
	}
	for line := range bytes.SplitSeq(text[5], []byte{0}) {
		name, rest, _ := strings.Cut(string(line), ".")
		if a, ok := strings.CutPrefix(rest, "alias="); ok {
			x.aliases = append(x.aliases, alias{underscores(a), underscores(name)})
		}
	}
	return x
}

func lines(text []byte) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan() && yield(s.Text()); {
		}
	}
}

// soft reads a line of modules.softdep: "softdep NAME pre: A B post: C". Without
// "pre:" or "post:" the names mean nothing, as in kmod.
func (x *Index) soft(f []string) {
	if len(f) < 2 || f[0] != "softdep" {
		return
	}
	name, into := underscores(f[1]), map[string][]string(nil)
	for _, w := range f[2:] {
		switch {
		case w == "pre:":
			into = x.pre
		case w == "post:":
			into = x.post
		case into != nil:
			into[name] = append(into[name], w)
		}
	}
}

// Order returns the files of the named modules and of their dependencies, in the order in
// which they must be loaded. Built-in modules have no file.
func (x *Index) Order(names ...string) (order []string, err error) {
	done := map[string]bool{}
	for _, n := range names {
		if err := x.visit(underscores(n), nil, done, &order); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func (x *Index) visit(name string, chain []string, done map[string]bool, order *[]string) error {
	if slices.Contains(chain, name) {
		return fmt.Errorf("modules need each other: %s", strings.Join(append(chain, name), " needs "))
	}
	if done[name] {
		return nil
	}
	file, ok := x.file[name]
	if !ok {
		return fmt.Errorf("%s: %w", name, ErrNotFound)
	}
	for _, n := range x.needs[name] {
		if err := x.visit(Name(n), append(chain, name), done, order); err != nil {
			return err
		}
	}
	done[name] = true
	if file != "" {
		*order = append(*order, file)
	}
	return nil
}

// Find returns the module with the given name, or the modules for which it is an alias.
func (x *Index) Find(name string) []string {
	name = underscores(name)
	if _, ok := x.file[name]; ok {
		return []string{name}
	}
	var found []string
	for _, a := range x.aliases {
		if matches(a.pattern, name) && !slices.Contains(found, a.module) {
			found = append(found, a.module)
		}
	}
	return found
}

// matches is fnmatch(3) without flags, in which * matches a / too.
func matches(pattern, name string) bool {
	flat := strings.NewReplacer("/", "\x00").Replace
	ok, err := path.Match(flat(pattern), flat(name))
	return ok && err == nil
}

// Soft returns the modules that should be loaded before and after a module, as far as the
// kernel has them.
func (x *Index) Soft(module string) (before, after []string) {
	return x.pre[module], x.post[module]
}
