package image_test

import (
	"context"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
)

// TestImages checks the kernel and minimal without booting them; other tests do that.
func TestImages(t *testing.T) {
	in := imagetest.Prepare(t)
	kernel, err := os.ReadFile(in.Kernel.Vmlinux)
	if err != nil || !strings.HasPrefix(string(kernel), "\x7fELF") {
		t.Errorf("the kernel is no ELF file: %v", err)
	}
	if out, err := exec.Command("e2fsck", "-fn", in.Minimal.Rootfs).CombinedOutput(); err != nil {
		t.Errorf("the root file system has faults: %v: %s", err, out)
	}
	for file, want := range map[string]string{
		"/usr/local/bin/envd":   "Mode:  0755",
		"/usr/sbin/wrenn-init":  `Fast link dest: "/usr/local/bin/envd"`,
		"/home/user":            "User:  1000",
		"/etc/sudoers.d/user":   "Mode:  0440",
		"/usr/bin/tini":         "Type: regular",
		"/etc/machine-id":       "Size: 0",
		"/etc/apt/sources.list": "Type: regular",
	} {
		out, err := exec.Command("debugfs", "-R", "stat "+file, in.Minimal.Rootfs).CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s lacks %q: %v: %s", file, want, err, out)
		}
	}
	if in.Minimal.SizeBytes >= 2<<30 {
		t.Errorf("the root file system takes %d MiB", in.Minimal.SizeBytes>>20)
	}
	t.Logf("minimal takes %d MiB", in.Minimal.SizeBytes>>20)

	// Existing images are not built again, not even with another envd.
	again, err := image.EnsureMinimal(t.Context(), in.Dir, in.Envd, func(s string) { t.Errorf("built again: %s", s) })
	if err != nil || !reflect.DeepEqual(again, in.Minimal) {
		t.Errorf("got %+v, %v", again, err)
	}
	all, damaged, err := image.Load(in.Dir)
	if err != nil || len(damaged) != 0 || len(all) != 1 || !reflect.DeepEqual(all[0], in.Minimal) {
		t.Errorf("loaded %+v, damaged %v, %v", all, damaged, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := image.EnsureMinimal(ctx, in.Dir, in.Envd, func(string) {}); err == nil {
		t.Error("a cancelled build went on")
	}
}
