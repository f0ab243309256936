package disk

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

func TestQEMUAcceptsOverlay(t *testing.T) {
	img, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("needs qemu-img")
	}
	for _, size := range []int64{512, 1 << 20, 5 << 30, 64 << 30, 8 << 40} {
		path := filepath.Join(t.TempDir(), "o.qcow2")
		if err := Create(Qcow2, path, size, os.Getuid()); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(img, "check", "-f", "qcow2", path).CombinedOutput(); err != nil {
			t.Errorf("%d bytes: qemu-img check: %v: %s", size, err, out)
		}
		out, err := exec.Command(img, "info", "-f", "qcow2", "--output=json", path).CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte(`"virtual-size": `+strconv.FormatInt(size, 10))) {
			t.Errorf("%d bytes: qemu-img info: %v: %s", size, err, out)
		}
		if err := Create(Qcow2, path, size, os.Getuid()); err == nil {
			t.Error("an existing overlay was overwritten")
		}
	}
}

func TestOverlayReadsAsItsBase(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skip("needs qemu-io")
	}
	dir := t.TempDir()
	base, over, flat := filepath.Join(dir, "base"), filepath.Join(dir, "over"), filepath.Join(dir, "flat")
	if err := os.WriteFile(base, bytes.Repeat([]byte("wrenn!!\n"), 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Create(Qcow2, over, 1<<20, os.Getuid()); err != nil {
		t.Fatal(err)
	}
	spec := `json:{"driver":"qcow2","file":{"driver":"file","filename":"` + over + `"},"backing":{"driver":"raw","file":{"driver":"file","filename":"` + base + `"}}}`
	if out, err := exec.Command("qemu-io", "-c", "write -P 7 65536 4096", spec).CombinedOutput(); err != nil {
		t.Fatalf("qemu-io: %v: %s", err, out)
	}
	if out, err := exec.Command("qemu-img", "convert", "-O", "raw", spec, flat).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img convert: %v: %s", err, out)
	}
	got, err := os.ReadFile(flat)
	if err != nil {
		t.Fatal(err)
	}
	want, _ := os.ReadFile(base)
	want = append(want, make([]byte, 1<<20-len(want))...)
	copy(want[65536:], bytes.Repeat([]byte{7}, 4096))
	if !bytes.Equal(got, want) {
		t.Error("the overlay does not read as its base plus the writes")
	}
}

func TestOverlayRefusesBadSizes(t *testing.T) {
	for _, size := range []int64{0, -512, 1000} {
		path := filepath.Join(t.TempDir(), "o")
		if err := Create(Qcow2, path, size, os.Getuid()); err == nil {
			t.Errorf("%d bytes were accepted", size)
		}
		if _, err := os.Stat(path); err == nil {
			t.Error("the refused overlay left a file")
		}
	}
}
