// Package image makes the kernel and the initrd that all virtual machines share, and
// stores templates and their captures.
package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cavaliergopher/cpio"

	"github.com/wrenn-dev/wrenn/internal/kmod"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/programs"
)

// kernelPackage is the distribution's package that depends on the newest kernel.
const kernelPackage = "linux-image-cloud-amd64"

// KernelFiles are the files that a virtual machine boots from.
type KernelFiles struct {
	Vmlinux string // path of the uncompressed kernel, an ELF file
	Initrd  string // path of the initrd, a cpio archive
	// Modules is the path of a read-only file system with all of the kernel's modules.
	// It is empty for files of an earlier release, which made no such file system.
	Modules string
	Version string // the kernel package's name and version
	Inputs  string // digest of the inputs of all files
	// Stale is the error that kept Kernel from making the newest files, if these are
	// earlier ones. It is nil if these are the newest.
	Stale error
}

// Kernel returns the kernel, its modules and the initrd. It makes them from the
// distribution's package and the guest daemon at envd, unless it made them before. It
// calls progress before each long step. If it cannot make the newest files, for example
// without a network, it returns the last ones with [KernelFiles.Stale]. It does not retry
// an attempt that failed a few minutes ago.
func Kernel(ctx context.Context, dir layout.Dir, envd string, progress func(string)) (KernelFiles, error) {
	unlock, err := lock(ctx, dir.Kernels(), progress)
	if err != nil {
		return KernelFiles{}, fmt.Errorf("kernel: %w", err)
	}
	defer unlock.Close()
	daemon, err := fileDigest(envd)
	if err != nil {
		return KernelFiles{}, fmt.Errorf("kernel: read guest daemon: %w", err)
	}
	files, err := newestFiles(ctx, dir, envd, daemon, progress)
	if err == nil {
		return files, nil
	}
	err = fmt.Errorf("kernel: %w", err)
	if ctx.Err() != nil {
		return KernelFiles{}, err
	}
	if files, ok := lastFiles(dir); ok {
		files.Stale = err
		return files, nil
	}
	return KernelFiles{}, err
}

// lastFiles returns the files that were published last. The caller holds the lock.
func lastFiles(dir layout.Dir) (last KernelFiles, ok bool) {
	entries, err := os.ReadDir(dir.Kernels())
	if err != nil {
		return last, false
	}
	var newest time.Time
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		info, err := os.Stat(inputsFile(dir, e.Name()))
		if err != nil || ok && info.ModTime().Before(newest) {
			continue
		}
		inputs, err := os.ReadFile(inputsFile(dir, e.Name()))
		if err != nil {
			continue
		}
		files := filesIn(dir, e.Name())
		_, kernel := os.Stat(files.Vmlinux)
		_, initrd := os.Stat(files.Initrd)
		if kernel != nil || initrd != nil {
			continue
		}
		files.Version, files.Inputs = e.Name(), string(inputs)
		last, newest, ok = files, info.ModTime(), true
	}
	return last, ok
}

// filesIn returns the paths of the files that were made from the package name.
func filesIn(dir layout.Dir, name string) KernelFiles {
	home := filepath.Join(dir.Kernels(), name)
	files := KernelFiles{Vmlinux: filepath.Join(home, "vmlinux"), Initrd: filepath.Join(home, "initrd")}
	if found, err := filepath.Glob(filepath.Join(home, "modules-*.ext4")); err == nil && len(found) == 1 {
		files.Modules = found[0]
	}
	return files
}

// inputsFile returns the path of the file with the digest of the inputs.
func inputsFile(dir layout.Dir, name string) string {
	return filepath.Join(dir.Kernels(), name, "inputs")
}

// newestFiles returns the files of apt's newest package and the guest daemon at envd with
// the digest daemon, and makes them if they are missing. The caller holds the lock.
func newestFiles(ctx context.Context, dir layout.Dir, envd, daemon string, progress func(string)) (files KernelFiles, err error) {
	name, version, err := newestKernel(ctx)
	if err != nil {
		return KernelFiles{}, err
	}
	home := filepath.Join(dir.Kernels(), name)
	modules := digest(modulesVersion, name, version)
	inputs := digest("2", name, version, daemon, strings.Join(wanted, " "), modules)
	made := func() KernelFiles {
		files := filesIn(dir, name)
		files.Version, files.Inputs = name+" "+version, inputs
		return files
	}
	if have, err := os.ReadFile(inputsFile(dir, name)); err == nil && string(have) == inputs {
		return made(), nil
	}
	if _, ok := lastFiles(dir); ok {
		if err := failedLately(dir.Kernels(), inputs); err != nil {
			return KernelFiles{}, err
		}
		defer func() {
			if err != nil && ctx.Err() == nil {
				noteFailure(dir.Kernels(), inputs, err)
			}
		}()
	}
	progress("kernel: unpacking " + name + " " + version)
	tmp, err := os.MkdirTemp(dir.Kernels(), tmpPrefix)
	if err != nil {
		return KernelFiles{}, err
	}
	defer os.RemoveAll(tmp)
	image := "modules-" + modules[:16] + ".ext4"
	if err := buildKernel(ctx, tmp, name, version, envd, inputs, image, filepath.Join(home, image)); err != nil {
		return KernelFiles{}, err
	}
	if err := publish(filepath.Join(tmp, "out"), home); err != nil {
		return KernelFiles{}, err
	}
	return made(), nil
}

// newestKernel asks apt for the name and the version of the newest kernel's package.
func newestKernel(ctx context.Context) (name, version string, err error) {
	out, err := output(ctx, "", programs.AptCache, "depends", "--important", kernelPackage)
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(out) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: "); ok && strings.HasPrefix(n, "linux-image-") {
			name = n
		}
	}
	if name == "" {
		return "", "", fmt.Errorf("apt does not know the package %s; run apt-get update", kernelPackage)
	}
	out, err = output(ctx, "", programs.AptCache, "show", "--no-all-versions", name)
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(out) {
		if v, ok := strings.CutPrefix(line, "Version: "); ok {
			return name, strings.TrimSpace(v), nil
		}
	}
	return "", "", fmt.Errorf("apt does not know a version of %s", name)
}

// buildKernel makes the files in tmp/out. The file system of modules is named image. It is
// a link to the earlier file made, if that exists, because a new guest daemon does not
// change the modules, and links share the page cache.
func buildKernel(ctx context.Context, tmp, name, version, envd, inputs, image, made string) error {
	// As root, because apt's unprivileged user cannot write to this folder.
	if _, err := output(ctx, tmp, programs.AptGet, "-qq", "-o", "APT::Sandbox::User=root", "download", name+"="+version); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt downloaded %d packages instead of one", len(debs))
	}
	tree := filepath.Join(tmp, "tree")
	if _, err := output(ctx, tmp, programs.DpkgDeb, "-x", debs[0], tree); err != nil {
		return err
	}
	release := strings.TrimPrefix(name, "linux-image-")
	bzImage, err := os.ReadFile(filepath.Join(tree, "boot", "vmlinuz-"+release))
	if err != nil {
		return err
	}
	kernel, err := vmlinux(bzImage)
	if err != nil {
		return err
	}
	out := filepath.Join(tmp, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, "vmlinux"), kernel, 0o644); err != nil {
		return err
	}
	if err := indexModules(ctx, tree, release); err != nil {
		return err
	}
	if err := writeInitrd(filepath.Join(out, "initrd"), moduleTree(tree, release), envd); err != nil {
		return fmt.Errorf("initrd: %w", err)
	}
	if err := os.Link(made, filepath.Join(out, image)); err != nil {
		if err := writeModules(ctx, filepath.Join(out, image), moduleTree(tree, release)); err != nil {
			return fmt.Errorf("modules: %w", err)
		}
	}
	return os.WriteFile(filepath.Join(out, "inputs"), []byte(inputs), 0o644)
}

// writeInitrd writes an initrd with the guest daemon as /init and the modules that a
// machine needs to boot. It does not compress it, because an emulated processor
// decompresses more slowly than it reads.
func writeInitrd(name, modules, envd string) (err error) {
	index, err := kmod.Open(modules)
	if err != nil {
		return err
	}
	order, err := index.Order(wanted...)
	if err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := cpio.NewWriter(f)
	for _, d := range []string{"dev", "proc", "root", "modules"} {
		if err := w.WriteHeader(&cpio.Header{Name: d, Mode: cpio.TypeDir | 0o755}); err != nil {
			return err
		}
	}
	if err := w.WriteHeader(&cpio.Header{Name: "dev/console", Mode: cpio.TypeChar | 0o600, DeviceID: 5<<8 | 1}); err != nil {
		return err
	}
	var list bytes.Buffer
	for i, m := range order {
		data, err := os.ReadFile(filepath.Join(modules, m))
		if err != nil {
			return err
		}
		file := fmt.Sprintf("%02d-%s.ko", i, kmod.Name(m))
		fmt.Fprintln(&list, file)
		if err := add(w, "modules/"+file, 0o600, data); err != nil {
			return err
		}
	}
	if err := add(w, "modules/order", 0o600, list.Bytes()); err != nil {
		return err
	}
	daemon, err := os.ReadFile(envd)
	if err != nil {
		return err
	}
	if err := add(w, "init", 0o755, daemon); err != nil {
		return err
	}
	return w.Close()
}

func add(w *cpio.Writer, name string, mode cpio.FileMode, data []byte) error {
	if err := w.WriteHeader(&cpio.Header{Name: name, Mode: cpio.TypeReg | mode, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

// maxModule bounds the size of a module, in bytes.
const maxModule = 64 << 20

// readModule returns an uncompressed module.
func readModule(file string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	data, err = unpack(data, maxModule)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", filepath.Base(file), err)
	}
	return data, nil
}

// output runs a program in dir and returns its standard output. An error has the end of
// its standard error.
func output(ctx context.Context, dir string, program programs.Program, args ...string) (string, error) {
	return outputWith(ctx, nil, dir, program, args...)
}

// outputWith is [output] with additional environment variables.
func outputWith(ctx context.Context, env []string, dir string, program programs.Program, args ...string) (string, error) {
	cmd := program.CommandContext(ctx, args...)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive"), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		said := bytes.TrimSpace(stderr.Bytes())
		return "", fmt.Errorf("%s: %w: %s", program.File, err, said[max(0, len(said)-2000):])
	}
	return string(out), nil
}
