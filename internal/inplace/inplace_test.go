package inplace

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestBtrfs checks that on btrfs a folder is copy-on-write until Set, and that files and
// folders created in it afterwards are not.
func TestBtrfs(t *testing.T) {
	if _, err := exec.LookPath("mkfs.btrfs"); err != nil || os.Geteuid() != 0 {
		t.Skip("needs mkfs.btrfs and root")
	}
	dir := t.TempDir()
	image, disk := filepath.Join(dir, "image"), filepath.Join(dir, "disk")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 256<<20), os.Mkdir(disk, 0o700)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.btrfs", "-q", image).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", image, disk).CombinedOutput(); err != nil {
		t.Skipf("needs loop devices and btrfs: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", disk).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	set, old := filepath.Join(disk, "set"), filepath.Join(disk, "set", "old")
	if err := os.MkdirAll(old, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Check(set); !errors.Is(err, ErrCopies) {
		t.Errorf("before: %v", err)
	}
	if err := errors.Join(Possible(set), Set(set), Set(set), Check(set)); err != nil {
		t.Error(err)
	}
	if err := Check(old); !errors.Is(err, ErrCopies) {
		t.Errorf("a folder from before: %v", err)
	}
	fresh, file := filepath.Join(set, "fresh"), filepath.Join(set, "file")
	if err := errors.Join(os.Mkdir(fresh, 0o700), Check(fresh), os.WriteFile(file, nil, 0o600), Check(file)); err != nil {
		t.Error(err)
	}
}

// TestInPlace checks that the test machine's folder needs no setting, or is reported as
// copy-on-write.
func TestInPlace(t *testing.T) {
	dir := t.TempDir()
	if err := Possible(dir); err != nil && !errors.Is(err, ErrCopies) {
		t.Error(err)
	}
	if err := Set(dir); err == nil {
		if err := Check(dir); err != nil {
			t.Error(err)
		}
	}
	if Check(filepath.Join(dir, "none")) == nil {
		t.Error("a missing folder is accepted")
	}
}
