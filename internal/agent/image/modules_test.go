package image

import (
	"bytes"
	"compress/gzip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/kmod"
)

// TestModulesImage checks that the same modules always give the same bytes, and that a
// guest finds what it looks for.
func TestModulesImage(t *testing.T) {
	var images [2][]byte
	for i := range images {
		dir := t.TempDir()
		tree := filepath.Join(dir, "tree")
		put(t, filepath.Join(tree, "kernel", "net", "b.ko"), "module")
		put(t, filepath.Join(tree, "kernel", "a.ko"), string(bytes.Repeat([]byte("x"), 3<<20)))
		put(t, filepath.Join(tree, "modules.dep"), "kernel/net/b.ko: kernel/a.ko\n")
		at := time.Unix(int64(1e9*(i+1)), 7)
		for _, name := range []string{"modules.dep", "kernel/a.ko", "kernel", "."} {
			if err := os.Chtimes(filepath.Join(tree, name), at, at); err != nil {
				t.Fatal(err)
			}
		}
		name := filepath.Join(dir, "modules.ext4")
		if err := writeModules(t.Context(), name, tree); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("e2fsck", "-fn", name).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o444 {
			t.Errorf("%v, %v", info, err)
		}
		var err error
		if images[i], err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
		got, err := exec.Command("debugfs", "-R", "cat /kernel/net/b.ko", name).Output()
		if err != nil || string(got) != "module" {
			t.Errorf("a module is %q, %v", got, err)
		}
		// The next image is built in another second, the unit of a file system's times.
		built := time.Now().Unix()
		await.Until(t, "the next second", func() bool { return time.Now().Unix() > built })
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("the images differ")
	}
}

func put(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestIndexModules checks that compressed modules are unpacked, because a guest's
// modprobe may not be able to read them.
func TestIndexModules(t *testing.T) {
	const release = "6.1.0-1-test"
	tree := t.TempDir()
	dir := moduleTree(tree, release)
	const file = "kernel/drivers/net/sample.ko"
	put(t, filepath.Join(dir, "modules.builtin"), "")
	put(t, filepath.Join(dir, "modules.order"), file+"\n")
	elf := sampleModule(t)
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(elf); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, file+".gz"), packed.String())
	if err := indexModules(t.Context(), tree, release); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || !bytes.Equal(got, elf) {
		t.Errorf("unpacked %d bytes, %v", len(got), err)
	}
	if _, err := os.Stat(filepath.Join(dir, file+".gz")); err == nil {
		t.Error("the compressed module is still there")
	}
	x, err := kmod.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := x.Order("sample"); err != nil || len(got) != 1 || got[0] != file {
		t.Errorf("found %q, %v", got, err)
	}

	put(t, filepath.Join(dir, "kernel/bad.ko.xz"), "not packed")
	if err := indexModules(t.Context(), tree, release); err == nil {
		t.Error("a damaged module was accepted")
	}
}

// sampleModule returns an object file that depmod can read.
func sampleModule(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	put(t, filepath.Join(dir, "m.s"), `.section .modinfo,"a"`+"\n"+`.asciz "license=GPL"`+"\n")
	out := filepath.Join(dir, "m.ko")
	if b, err := exec.Command("gcc", "-c", "-o", out, filepath.Join(dir, "m.s")).CombinedOutput(); err != nil {
		t.Skipf("needs gcc: %v: %s", err, b)
	}
	elf, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return elf
}
