package image

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/layout"
)

// TestMirrorIsAway checks that a failed build is not repeated at once, because a mirror
// that does not respond costs minutes, but later, or when something newer exists.
func TestMirrorIsAway(t *testing.T) {
	bin, asked := t.TempDir(), filepath.Join(t.TempDir(), "asked")
	put := func(path, content string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	put(filepath.Join(bin, "apt-cache"), `#!/bin/sh
case "$1" in depends) echo "  Depends: linux-image-9";; show) echo "Version: 9";; esac
`)
	put(filepath.Join(bin, "apt-get"), `#!/bin/sh
case "$*" in *indextargets*) echo "http://mirror/|bookworm|bookworm|main|Debian|yes"; exit;; esac
echo apt-get >>`+asked+`
exit 100
`)
	put(filepath.Join(bin, "mmdebstrap"), `#!/bin/sh
echo mmdebstrap >>`+asked+`
exit 25
`)
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	dir := layout.Dir(t.TempDir())
	envd := filepath.Join(string(dir), "envd")
	put(envd, "daemon")
	for _, file := range []string{"vmlinux", "initrd", "inputs"} {
		put(filepath.Join(dir.Kernels(), "old", file), "old")
	}
	home := dir.Template(uuid.Nil, uuid.Nil)
	put(filepath.Join(home, rootfsFile), "")
	if err := (Template{Name: "minimal", DiskMiB: 64, Inputs: "before"}).write(home); err != nil {
		t.Fatal(err)
	}
	start := func(want string) {
		t.Helper()
		_ = os.Remove(asked)
		if k, err := Kernel(t.Context(), dir, envd, func(string) {}); err != nil || k.Stale == nil || k.Inputs != "old" {
			t.Errorf("the kernel is %+v, %v", k, err)
		}
		if m, err := EnsureMinimal(t.Context(), dir, envd, func(string) {}); err != nil || m.Stale == nil || m.Inputs != "before" {
			t.Errorf("the template is %+v, %v", m, err)
		}
		if got, _ := os.ReadFile(asked); string(got) != want {
			t.Errorf("it built %q, want %q", got, want)
		}
	}
	const both = "apt-get\nmmdebstrap\n"
	start(both)
	start("")
	for _, of := range []string{dir.Kernels(), filepath.Dir(home)} {
		at := time.Now().Add(-notAgainFor - time.Minute)
		if err := os.Chtimes(filepath.Join(of, failedFile), at, at); err != nil {
			t.Fatal(err)
		}
	}
	start(both)
	put(envd, "another daemon")
	start(both)
}

// TestWithoutApt checks that without apt's lists or without the mirror, existing images
// are used.
func TestWithoutApt(t *testing.T) {
	const knows = `#!/bin/sh
case "$1" in depends) echo "  Depends: linux-image-9";; show) echo "Version: 9";; esac
`
	const fails = `#!/bin/sh
echo "no network" >&2
exit 100
`
	for name, cache := range map[string]string{"no lists": fails, "no mirror": knows} {
		t.Run(name, func(t *testing.T) {
			bin := t.TempDir()
			put := func(path, content string) {
				t.Helper()
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o755)); err != nil {
					t.Fatal(err)
				}
			}
			put(filepath.Join(bin, "apt-cache"), cache)
			put(filepath.Join(bin, "apt-get"), fails)
			t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			dir := layout.Dir(t.TempDir())
			envd := filepath.Join(string(dir), "envd")
			put(envd, "daemon")
			quiet := func(string) {}

			if k, err := Kernel(t.Context(), dir, envd, quiet); err == nil {
				t.Errorf("built the kernel %+v from nothing", k)
			}
			if m, err := EnsureMinimal(t.Context(), dir, envd, quiet); err == nil {
				t.Errorf("built the template %+v from nothing", m)
			}

			for i, name := range []string{"old", "newest", "incomplete"} {
				for _, file := range []string{"vmlinux", "initrd", "inputs"} {
					path := filepath.Join(dir.Kernels(), name, file)
					put(path, name)
					at := time.Unix(int64(i), 0)
					if err := os.Chtimes(path, at, at); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := os.Remove(filepath.Join(dir.Kernels(), "incomplete", "inputs")); err != nil {
				t.Fatal(err)
			}
			home := dir.Template(uuid.Nil, uuid.Nil)
			put(filepath.Join(home, rootfsFile), "")
			if err := (Template{Name: "minimal", DiskMiB: 64, Inputs: "before"}).write(home); err != nil {
				t.Fatal(err)
			}
			k, err := Kernel(t.Context(), dir, envd, quiet)
			if err != nil || k.Stale == nil || k.Vmlinux != filepath.Join(dir.Kernels(), "newest", "vmlinux") || k.Inputs != "newest" {
				t.Errorf("the kernel is %+v, %v", k, err)
			}
			m, err := EnsureMinimal(t.Context(), dir, envd, quiet)
			if err != nil || m.Stale == nil || m.Inputs != "before" {
				t.Errorf("the template is %+v, %v", m, err)
			}
			if m, err := EnsureMore(t.Context(), dir, envd, More{Name: "minimal"}, quiet); err == nil {
				t.Errorf("built %+v without apt", m)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if k, err := Kernel(ctx, dir, envd, quiet); err == nil {
				t.Errorf("a cancelled start continued with %+v", k)
			}
		})
	}
}
