// Package programs has the table of the distribution's programs that Wrenn runs, and is
// the only package that starts them. Because Wrenn can only run what is in the table,
// `wrenn doctor`, the Makefile and the README list every package that a machine needs. The
// drivers of virtual machine monitors add their own programs to the table.
package programs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Program is one of the distribution's programs.
type Program struct {
	// File is a name in $PATH, or an absolute path, in which * can stand for a version.
	File string
	// Package is the Debian package that has it.
	Package string
	// Base means that every Debian has the package.
	Base bool
	// UpOnly means that only `wrenn up` runs the program, and a host agent does not.
	UpOnly bool
}

// The programs that Wrenn runs.
var (
	AptCache   = Add(Program{File: "apt-cache", Package: "apt", Base: true})
	AptGet     = Add(Program{File: "apt-get", Package: "apt", Base: true})
	DpkgDeb    = Add(Program{File: "dpkg-deb", Package: "dpkg", Base: true})
	Tar        = Add(Program{File: "tar", Package: "tar", Base: true})
	Depmod     = Add(Program{File: "depmod", Package: "kmod"})
	Mmdebstrap = Add(Program{File: "mmdebstrap", Package: "mmdebstrap"})
	Mke2fs     = Add(Program{File: "mke2fs", Package: "e2fsprogs"})
	Debugfs    = Add(Program{File: "debugfs", Package: "e2fsprogs"})

	// Wrenn does not run this one, but needs the certificates in its package for HTTPS.
	_ = Add(Program{File: "update-ca-certificates", Package: "ca-certificates"})

	// These run in a jail, which has no $PATH.
	Prlimit   = Add(Program{File: "/usr/bin/prlimit", Package: "util-linux", Base: true})
	E2fsck    = Add(Program{File: "/sbin/e2fsck", Package: "e2fsprogs"})
	Resize2fs = Add(Program{File: "/sbin/resize2fs", Package: "e2fsprogs"})

	Postgres = Add(Program{File: "/usr/lib/postgresql/*/bin/postgres", Package: "postgresql", UpOnly: true})
	InitDB   = Add(Program{File: "/usr/lib/postgresql/*/bin/initdb", Package: "postgresql", UpOnly: true})
	Redis    = Add(Program{File: "redis-server", Package: "redis-server", UpOnly: true})
)

// Iptables is not in the table, because an agent only runs it to change Docker's rules,
// and Docker depends on it.
var Iptables = Program{File: "iptables"}

var table []Program

// Add adds a program to the table and returns it. It is for variables of packages.
func Add(p Program) Program {
	table = append(table, p)
	return p
}

// All returns the table, with the programs of all packages that are linked into this one.
func All() []Program { return slices.Clone(table) }

// Find returns the program's path, the newest version if there are several. The error
// says which package to install.
func (p Program) Find() (string, error) {
	path, err := p.find()
	if err != nil && p.Package != "" {
		return "", fmt.Errorf("%w: apt-get install %s", err, p.Package)
	}
	return path, err
}

func (p Program) find() (string, error) {
	if !strings.Contains(p.File, "*") {
		return exec.LookPath(p.File)
	}
	found, err := filepath.Glob(p.File)
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		return "", fmt.Errorf("%s: %w", p.File, os.ErrNotExist)
	}
	before, after, _ := strings.Cut(p.File, "*")
	version := func(path string) int {
		n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(path, before), after))
		return n
	}
	return slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) }), nil
}

// Command returns a command that runs the program. If the program does not exist,
// starting the command fails.
func (p Program) Command(args ...string) *exec.Cmd {
	return p.CommandContext(context.Background(), args...)
}

// CommandContext is Command with a context that kills the process when it ends.
func (p Program) CommandContext(ctx context.Context, args ...string) *exec.Cmd {
	path, err := p.Find()
	if err != nil {
		path = p.File
	}
	cmd := exec.CommandContext(ctx, path, args...)
	if err != nil {
		cmd.Err = err
	}
	return cmd
}

// Self returns the program that is running, which is not in the table.
func Self() (Program, error) {
	path, err := os.Executable()
	return Program{File: path}, err
}
