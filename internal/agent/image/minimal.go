package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image/tree"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/programs"
	"github.com/wrenn-dev/wrenn/internal/recipe"
	"github.com/wrenn-dev/wrenn/templates"
)

// clean removes files from mmdebstrap's tree, $1, that guests must not share.
const clean = `set -e
: >"$1/etc/machine-id"
rm -f "$1/etc/hostname" "$1/etc/resolv.conf" "$1/var/lib/dbus/machine-id"
rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/log/*.log "$1"/var/log/apt
`

// install is the prefix of the steps of minimal's recipe that install packages.
const install = "apt-get install -y --no-install-recommends "

// plan is the work for mmdebstrap.
type plan struct {
	packages []string // besides Debian's essential ones
	hooks    []string // shell commands after the installation; $1 is the tree
}

// planOf converts minimal's recipe to a plan. Steps that install packages must come
// first, because mmdebstrap installs all packages at once, with the machine's sources,
// keys and proxies, none of which may end up in the tree.
func planOf(text string) (plan, error) {
	var p plan
	r, err := recipe.Parse(text)
	if err != nil {
		return p, err
	}
	for _, step := range r.Steps {
		run, ok := step.(*recipe.Run)
		if !ok {
			return p, fmt.Errorf("%v: only RUN works without a guest", step.Position())
		}
		packages, installs := strings.CutPrefix(run.Command.Shell, install)
		switch {
		case !installs:
			p.hooks = append(p.hooks, `chroot "$1" /bin/sh -c `+quote(run.Command.Shell))
		case len(p.hooks) == 0:
			p.packages = append(p.packages, strings.Fields(packages)...)
		default:
			return p, fmt.Errorf("%v: steps that install packages must come first", step.Position())
		}
	}
	return p, nil
}

// quote quotes s for the shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// EnsureMinimal returns the built-in template minimal. It makes it from the machine's
// package sources and the guest daemon at envd, unless it made it before. It calls
// progress before each long step. If it cannot make it, for example without a network, it
// returns the existing one with [Template.Stale]. It does not retry an attempt that failed
// a few minutes ago.
func EnsureMinimal(ctx context.Context, dir layout.Dir, envd string, progress func(string)) (Template, error) {
	const name = "minimal"
	t, err := EnsureMore(ctx, dir, envd, More{Name: name, earlier: true}, progress)
	if err == nil || ctx.Err() != nil {
		return t, err
	}
	unlock, e := lock(ctx, filepath.Dir(dir.Template(uuid.Nil, uuid.Nil)), progress)
	if e != nil {
		return Template{}, errors.Join(err, e)
	}
	defer unlock.Close()
	if t, e = read(dir, uuid.Nil, uuid.Nil); e != nil || t.Name != name {
		return Template{}, err
	}
	t.Stale = err
	return t, nil
}

// More describes a template that has more than minimal.
type More struct {
	Name     string
	Packages []string
	// Customize is a shell command, in which $1 is the tree's folder.
	Customize string
	// earlier says that the caller falls back to the existing template after an error.
	earlier bool
}

// EnsureMore is [EnsureMinimal] for a template with more in it. It never returns a stale
// template.
func EnsureMore(ctx context.Context, dir layout.Dir, envd string, more More, progress func(string)) (Template, error) {
	t, err := ensureMinimal(ctx, dir, envd, more, progress)
	if err != nil {
		return Template{}, fmt.Errorf("template %s: %w", more.Name, err)
	}
	return t, nil
}

func ensureMinimal(ctx context.Context, dir layout.Dir, envd string, more More, progress func(string)) (made Template, err error) {
	home := dir.Template(uuid.Nil, uuid.Nil)
	parent := filepath.Dir(home)
	unlock, err := lock(ctx, parent, progress)
	if err != nil {
		return Template{}, err
	}
	defer unlock.Close()

	daemon, err := fileDigest(envd)
	if err != nil {
		return Template{}, fmt.Errorf("read guest daemon: %w", err)
	}
	sources, err := debianSources(ctx)
	if err != nil {
		return Template{}, err
	}
	todo, err := planOf(templates.Minimal)
	if err != nil {
		return Template{}, fmt.Errorf("recipe of minimal: %w", err)
	}
	todo.packages = append(todo.packages, more.Packages...)
	todo.hooks = append(todo.hooks, clean+more.Customize)
	base := digest("2", strings.Join(todo.hooks, "\x00"), strings.Join(todo.packages, " "), fmt.Sprint(sources))
	inputs := digest("1", base, daemon, fmt.Sprint(hostwire.DefaultDiskMiB))
	have, err := read(dir, uuid.Nil, uuid.Nil)
	if err == nil && have.Inputs == inputs {
		return have, nil
	}
	if err == nil && more.earlier {
		if err := failedLately(parent, inputs); err != nil {
			return Template{}, err
		}
		defer func() {
			if err != nil && ctx.Err() == nil {
				noteFailure(parent, inputs, err)
			}
		}()
	}

	tmp, err := os.MkdirTemp(parent, tmpPrefix)
	if err != nil {
		return Template{}, err
	}
	defer os.RemoveAll(tmp)
	tar, err := ensureBase(ctx, parent, tmp, base, todo, sources, progress)
	if err != nil {
		return Template{}, err
	}
	progress(more.Name + ": writing the file system")
	files, out := filepath.Join(tmp, "tree"), filepath.Join(tmp, "out")
	for _, d := range []string{files, out} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return Template{}, err
		}
	}
	if _, err := output(ctx, "", programs.Tar, "-C", files, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xf", tar); err != nil {
		return Template{}, err
	}
	if err := injectDaemon(files, envd); err != nil {
		return Template{}, err
	}
	if err := makeFilesystem(ctx, filepath.Join(out, rootfsFile), files, hostwire.DefaultDiskMiB); err != nil {
		return Template{}, err
	}
	t := Template{Name: more.Name, DiskMiB: hostwire.DefaultDiskMiB, CreatedAt: time.Now().UTC().Truncate(time.Second), Inputs: inputs}
	if err := t.write(out); err != nil {
		return Template{}, err
	}
	if err := publish(out, home); err != nil {
		return Template{}, err
	}
	return read(dir, uuid.Nil, uuid.Nil)
}

// ensureBase returns the path of an archive with the distribution's packages. It keeps the
// archive, so that a new guest daemon needs no new download.
func ensureBase(ctx context.Context, parent, tmp, inputs string, todo plan, sources []source, progress func(string)) (string, error) {
	kept := filepath.Join(parent, "base-"+inputs[:16]+".tar")
	if _, err := os.Stat(kept); err == nil {
		return kept, nil
	}
	progress("installing Debian's packages")
	tar := filepath.Join(tmp, "base.tar")
	args := []string{
		"--variant=minbase", "--mode=root", "--quiet", "--format=tar",
		"--include=" + strings.Join(todo.packages, ","),
		"--aptopt=Apt::Install-Recommends \"false\"",
		"--dpkgopt=force-unsafe-io", // no need to sync: a crash starts all over
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright",
	}
	for _, hook := range todo.hooks {
		args = append(args, "--customize-hook="+hook)
	}
	args = append(args, sources[0].suite, tar)
	for _, s := range sources {
		args = append(args, s.line())
	}
	if _, err := output(ctx, "", programs.Mmdebstrap, args...); err != nil {
		return "", err
	}
	if err := atomicfile.Sync(tar); err != nil {
		return "", err
	}
	old, err := filepath.Glob(filepath.Join(parent, "base-*.tar"))
	if err != nil {
		return "", err
	}
	if err := os.Rename(tar, kept); err != nil {
		return "", err
	}
	for _, f := range old {
		if err := os.Remove(f); err != nil {
			progress("warning: cannot remove older packages: " + err.Error())
		}
	}
	return kept, nil
}

// injectDaemon puts the guest daemon into a root file system's tree, as envd and as the
// first process, and replaces what an image has there. It makes folders that a boot needs
// but that small images lack.
func injectDaemon(dir, envd string) error {
	t, err := tree.Open(dir)
	if err != nil {
		return err
	}
	defer t.Close()
	if err := mountPoints(t); err != nil {
		return err
	}
	bin, err := t.MakeDir("usr/local/bin")
	if err != nil {
		return err
	}
	defer bin.Close()
	if err := bin.Remove("envd"); err != nil {
		return err
	}
	dst, err := bin.Create("envd", 0o755)
	if err != nil {
		return err
	}
	src, err := os.Open(envd)
	if err != nil {
		dst.Close()
		return err
	}
	defer src.Close()
	_, err = io.Copy(dst, src)
	if err := errors.Join(err, dst.Chmod(0o755), dst.Close()); err != nil {
		return fmt.Errorf("copy guest daemon: %w", err)
	}
	sbin, err := t.MakeDir("sbin")
	if err != nil {
		return err
	}
	defer sbin.Close()
	if err := sbin.Remove("wrenn-init"); err != nil {
		return err
	}
	return sbin.Symlink("/usr/local/bin/envd", "wrenn-init")
}

// mountPoints makes the folders that the initrd and wrenn-init use. dev and proc must not
// be links, which the initrd would follow outside of the tree.
func mountPoints(t *tree.Tree) error {
	root, err := t.Dir("")
	if err != nil {
		return err
	}
	defer root.Close()
	for _, name := range []string{"dev", "proc"} {
		if st, err := root.Lstat(name); err == nil && st.Mode&syscall.S_IFMT == syscall.S_IFDIR {
			continue
		}
		if err := root.Remove(name); err != nil {
			return err
		}
		if err := root.Mkdir(name, 0o755); err != nil {
			return err
		}
	}
	for _, f := range []struct {
		name string
		mode uint32
	}{{"sys", 0o755}, {"run", 0o755}, {"etc", 0o755}, {"root", 0o700}, {"tmp", 0o1777}} {
		d, err := t.Dir(f.name)
		if errors.Is(err, fs.ErrNotExist) {
			if err = root.Mkdir(f.name, f.mode); err == nil {
				continue
			}
		}
		if err != nil {
			return err
		}
		if err := d.Close(); err != nil {
			return err
		}
	}
	return nil
}

// makeFilesystem writes a sparse ext4 file system of sizeMiB with the files in dir. The
// guest's kernel zeroes its inode tables later, so that it takes little more than its
// files.
func makeFilesystem(ctx context.Context, name, dir string, sizeMiB int) error {
	_, err := output(ctx, "", programs.Mke2fs, "-q", "-t", "ext4", "-L", "wrenn", "-m", "0",
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
		"-d", dir, name, fmt.Sprintf("%dM", sizeMiB))
	return err
}
