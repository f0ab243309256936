// Package modprobe replaces kmod's modprobe in images that lack it. The kernel calls it to
// load the modules that programs need, and root can call it, too.
package modprobe

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/kmod"
)

// Main loads the modules that the arguments name, and does not return, if this program
// was started as modprobe. Under any other name it returns at once.
func Main() {
	if filepath.Base(os.Args[0]) != "modprobe" {
		return
	}
	var kernel unix.Utsname
	r, err := parse(os.Args[1:])
	if err == nil {
		err = unix.Uname(&kernel)
	}
	if err == nil {
		err = probe(filepath.Join("/lib/modules", unix.ByteSliceToString(kernel.Release[:])), r, load)
	}
	if err == nil {
		os.Exit(0)
	}
	if !r.quiet || !errors.Is(err, kmod.ErrNotFound) {
		fmt.Fprintf(os.Stderr, "modprobe: FATAL: %v\n", err)
	}
	os.Exit(1)
}

// loader loads the module in a file. If the kernel already has it, that is not an error.
type loader func(file, parameters string) error

// long maps the long form of an option to its letter.
var long = map[string]string{"--all": "a", "--quiet": "q", "--use-blacklist": "b", "--syslog": "s", "--verbose": "v"}

// request is a parsed command line.
type request struct {
	quiet      bool // do not report a missing module
	names      []string
	parameters string
}

// parse parses the arguments of modprobe: names of modules with -a, otherwise a name and
// parameters. It ignores options that do not change which modules are loaded.
func parse(args []string) (r request, err error) {
	var all bool
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		option := args[0]
		args = args[1:]
		if option == "--" {
			break
		}
		letters, ok := long[option]
		if !ok {
			letters = option[1:]
		}
		for _, c := range letters {
			switch c {
			case 'a':
				all = true
			case 'q':
				r.quiet = true
			case 'b', 's', 'v':
			default:
				return r, fmt.Errorf("option %s needs the modprobe of the package kmod", option)
			}
		}
	}
	if len(args) == 0 {
		return r, errors.New("no module is named")
	}
	if all {
		r.names = args
	} else {
		r.names, r.parameters = args[:1], strings.Join(args[1:], " ")
	}
	return r, nil
}

// probe loads the modules that r names from dir, and their dependencies.
func probe(dir string, r request, load loader) error {
	x, err := kmod.Open(dir)
	if err != nil {
		return err
	}
	var failed error
	for _, name := range r.names {
		found := x.Find(name)
		if len(found) == 0 {
			failed = errors.Join(failed, fmt.Errorf("module %s not found in %s: %w", name, dir, kmod.ErrNotFound))
		}
		for _, m := range found {
			failed = errors.Join(failed, insert(x, dir, m, r.parameters, load))
		}
	}
	return failed
}

// insert loads a module with its dependencies. Its soft dependencies may fail.
func insert(x *kmod.Index, dir, module, parameters string, load loader) error {
	before, after := x.Soft(module)
	like := func(names []string) {
		for _, n := range names {
			for _, m := range x.Find(n) {
				_ = inOrder(x, dir, m, "", load)
			}
		}
	}
	like(before)
	if err := inOrder(x, dir, module, parameters, load); err != nil {
		return err
	}
	like(after)
	return nil
}

// inOrder loads a module after its dependencies.
func inOrder(x *kmod.Index, dir, module, parameters string, load loader) error {
	files, err := x.Order(module)
	if err != nil {
		return err
	}
	for i, file := range files {
		own := ""
		if i == len(files)-1 {
			own = parameters
		}
		if err := load(filepath.Join(dir, file), own); err != nil {
			return fmt.Errorf("could not insert %s: %w", kmod.Name(file), err)
		}
	}
	return nil
}

func load(file, parameters string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), parameters, 0); !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}
