package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// spec describes a chain as the JSON file name that QEMU's tools take.
func spec(base string, layers ...string) string {
	s := `{"driver":"raw","file":{"driver":"file","filename":"` + base + `"}}`
	for _, l := range layers {
		s = `{"driver":"qcow2","discard":"unmap","file":{"driver":"file","filename":"` + l + `"},"backing":` + s + `}`
	}
	return "json:" + s
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return string(out)
}

// readAll reads a disk in pieces of random size. It then reads only the ranges that Data
// reports, and checks that the rest of the disk is zero.
func readAll(t testing.TB, v *View, rng *rand.Rand) []byte {
	t.Helper()
	whole := make([]byte, v.Size())
	for off := int64(0); off < v.Size(); {
		n := min(1+rng.Int64N(300<<10), v.Size()-off)
		if _, err := v.ReadAt(whole[off:off+n], off); err != nil {
			t.Fatal(err)
		}
		off += n
	}
	parts := make([]byte, v.Size())
	end := int64(0)
	for r, err := range v.Data() {
		if err != nil {
			t.Fatal(err)
		}
		if r.Start < end || r.End <= r.Start || r.End > v.Size() {
			t.Fatalf("the data range %+v is invalid after a range that ends at %d", r, end)
		}
		if _, err := v.ReadAt(parts[r.Start:r.End], r.Start); err != nil {
			t.Fatal(err)
		}
		end = r.End
	}
	if !bytes.Equal(whole, parts) {
		t.Fatal("Data omits a range that is not zero")
	}
	if n, err := v.ReadAt(make([]byte, 10), v.Size()-4); n != 4 || !errors.Is(err, io.EOF) {
		t.Errorf("read %d bytes past the end: %v", n, err)
	}
	return whole
}

// TestReadsAsQEMU lets QEMU write overlays on overlays, and compares what View reads with
// what QEMU reads.
func TestReadsAsQEMU(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skip("needs qemu-io:", err)
	}
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 2))
		dir := t.TempDir()
		c := Chain{Format: Qcow2, Base: filepath.Join(dir, "base")}
		base := make([]byte, 512*(1+rng.IntN(8<<10)))
		for i := 0; i < len(base); i += 4096 {
			if rng.IntN(3) > 0 {
				base[i] = byte(1 + rng.IntN(255))
			}
		}
		if err := os.WriteFile(c.Base, base, 0o600); err != nil {
			t.Fatal(err)
		}
		c.Size = int64(len(base))
		for i := range 1 + rng.IntN(3) {
			c.Size += 512 * rng.Int64N(4<<10)
			if rng.IntN(4) == 0 {
				c.Size = 512 * (1 + rng.Int64N(4<<10)) // shorter than the layer below
			}
			name := filepath.Join(dir, fmt.Sprint("layer", i))
			if err := Create(Qcow2, name, c.Size, os.Getuid()); err != nil {
				t.Fatal(err)
			}
			c.Layers = append(c.Layers, name)
			var args []string
			for range rng.IntN(40) {
				off := 512 * rng.Int64N(c.Size/512)
				n := min(512*(1+rng.Int64N(400)), c.Size-off)
				if rng.IntN(2) == 0 { // whole clusters
					off = off / clusterSize * clusterSize
					n = min(n/clusterSize*clusterSize+clusterSize, c.Size-off)
				}
				what := []string{fmt.Sprint("write -P ", 1+rng.IntN(255)), "write -z", "write -z -u", "discard", "write -P 0"}[rng.IntN(5)]
				args = append(args, "-c", fmt.Sprint(what, " ", off, " ", n))
			}
			if rng.IntN(3) == 0 {
				c.Size += 512 * rng.Int64N(4<<10)
				args = append(args, "-c", fmt.Sprintf("truncate %d", c.Size))
			}
			run(t, "qemu-io", append(args, spec(c.Base, c.Layers...))...)
		}
		flat := filepath.Join(dir, "flat")
		run(t, "qemu-img", "convert", "-O", "raw", spec(c.Base, c.Layers...), flat)
		want, err := os.ReadFile(flat)
		if err != nil {
			t.Fatal(err)
		}
		v, err := Open(c)
		if err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, v, rng); !bytes.Equal(got, want) {
			t.Errorf("seed %d: View reads other data than QEMU", seed)
		}
		out, err := os.Create(filepath.Join(dir, "out"))
		if err != nil {
			t.Fatal(err)
		}
		if err := v.writeTo(t.Context(), out); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(out.Name()); !bytes.Equal(got, want) {
			t.Errorf("seed %d: writeTo writes other data than QEMU", seed)
		}
		if err := errors.Join(out.Close(), v.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// small returns an overlay of 1 MiB with one cluster of data and one of zeros.
func small(t testing.TB) []byte {
	image, length := emptyQcow2(1 << 20)
	b := make([]byte, length+2*clusterSize)
	copy(b, image)
	be := binary.BigEndian
	be.PutUint64(b[3*clusterSize:], 4*clusterSize|copied)
	be.PutUint64(b[4*clusterSize:], 5*clusterSize|copied)
	be.PutUint64(b[4*clusterSize+8:], allZero)
	copy(b[5*clusterSize:], bytes.Repeat([]byte{7}, clusterSize))
	return b
}

func baseOf(t testing.TB, b byte) string {
	path := filepath.Join(t.TempDir(), "base")
	if err := os.WriteFile(path, bytes.Repeat([]byte{b}, 300<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// readOverlay reads the overlay b above base.
func readOverlay(t testing.TB, base string, b []byte) ([]byte, error) {
	t.Helper()
	fd, err := unix.MemfdCreate("overlay", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "overlay")
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	v, err := Open(Chain{Format: Qcow2, Base: base, Layers: []string{fmt.Sprintf("/proc/self/fd/%d", fd)}, Size: 1 << 20})
	if err != nil {
		return nil, err
	}
	defer v.Close()
	got := make([]byte, v.Size())
	if _, err := v.ReadAt(got, 0); err != nil {
		return nil, err
	}
	for _, err := range v.Data() {
		if err != nil {
			t.Fatalf("ReadAt succeeded, but Data failed: %v", err)
		}
	}
	return got, nil
}

func TestRefusesInvalidOverlays(t *testing.T) {
	base := baseOf(t, 1)
	want := append(bytes.Repeat([]byte{7}, clusterSize), make([]byte, 1<<20-clusterSize)...)
	copy(want[2*clusterSize:300<<10], bytes.Repeat([]byte{1}, 300<<10))
	if got, err := readOverlay(t, base, small(t)); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read the unchanged overlay: %v", err)
	}
	be := binary.BigEndian
	for name, change := range map[string]func(b []byte) []byte{
		"not qcow2":           func(b []byte) []byte { b[0]++; return b },
		"empty":               func(b []byte) []byte { return nil },
		"half a header":       func(b []byte) []byte { return b[:70] },
		"version 2":           func(b []byte) []byte { b[7] = 2; return b },
		"backing file":        func(b []byte) []byte { be.PutUint64(b[8:], 200); return b },
		"backing file's name": func(b []byte) []byte { be.PutUint32(b[16:], 5); return b },
		"other cluster size":  func(b []byte) []byte { be.PutUint32(b[20:], 12); return b },
		"another size":        func(b []byte) []byte { be.PutUint64(b[24:], 2<<20); return b },
		"huge size":           func(b []byte) []byte { be.PutUint64(b[24:], 1<<63); return b },
		"encrypted":           func(b []byte) []byte { be.PutUint32(b[32:], 2); return b },
		"no L1":               func(b []byte) []byte { be.PutUint32(b[36:], 0); return b },
		"L1 beyond the end":   func(b []byte) []byte { be.PutUint64(b[40:], 1<<40); return b },
		"L1 in the header":    func(b []byte) []byte { be.PutUint64(b[40:], 0); return b },
		"snapshots":           func(b []byte) []byte { be.PutUint32(b[60:], 1); return b },
		"corrupt":             func(b []byte) []byte { be.PutUint64(b[72:], 2); return b },
		"external data":       func(b []byte) []byte { be.PutUint64(b[72:], 4); return b },
		"another compression": func(b []byte) []byte { be.PutUint64(b[72:], 8); return b },
		"extended L2":         func(b []byte) []byte { be.PutUint64(b[72:], 16); return b },
		"refcount bits":       func(b []byte) []byte { be.PutUint32(b[96:], 3); return b },
		"short header":        func(b []byte) []byte { be.PutUint32(b[100:], 72); return b },
		"L1 reserved":         func(b []byte) []byte { b[3*clusterSize+7] |= 2; return b },
		"L2 beyond the end":   func(b []byte) []byte { be.PutUint64(b[3*clusterSize:], 6*clusterSize); return b },
		"L2 cut off":          func(b []byte) []byte { return b[:4*clusterSize+100] },
		"L2 compressed":       func(b []byte) []byte { be.PutUint64(b[4*clusterSize:], compressed|5*clusterSize); return b },
		"L2 reserved":         func(b []byte) []byte { b[4*clusterSize+7] |= 2; return b },
		"L2 unaligned":        func(b []byte) []byte { be.PutUint64(b[4*clusterSize:], 5*clusterSize+512); return b },
		"data beyond the end": func(b []byte) []byte { return b[:5*clusterSize] },
	} {
		if _, err := readOverlay(t, base, change(small(t))); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	dirty := small(t)
	be.PutUint64(dirty[72:], featureDirty)
	if got, err := readOverlay(t, base, dirty); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read an overlay whose reference counts are dirty: %v", err)
	}
	if _, err := Open(Chain{Format: Qcow2, Base: t.TempDir(), Size: 512}); err == nil {
		t.Error("opened a folder as a disk")
	}
	if _, err := Open(Chain{Format: Qcow2, Base: base, Size: maxSize + 512}); err == nil {
		t.Error("opened a disk above the maximum size")
	}
}

func FuzzOverlay(f *testing.F) {
	base := baseOf(f, 1)
	// The corpus holds only the first bytes of each cluster, because the others do not matter.
	join := func(b []byte) (head []byte) {
		for i := 0; i < len(b); i += clusterSize {
			head = append(head, b[i:i+128]...)
		}
		return head
	}
	f.Add(join(small(f)))
	f.Fuzz(func(t *testing.T, head []byte) {
		if len(head) > 16*128 {
			return
		}
		var b []byte
		for i := 0; i < len(head); i += 128 {
			b = append(b, head[i:min(i+128, len(head))]...)
			b = append(b, make([]byte, (i/128+1)*clusterSize-len(b))...)
		}
		if _, err := readOverlay(t, base, b); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Errorf("got %v", err)
		}
	})
}

func TestCopy(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range []int64{0, 1 << 20, 5 << 20} {
		if _, err := f.WriteAt(bytes.Repeat([]byte("wrenn"), 20000), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(8 << 20); err != nil {
		t.Fatal(err)
	}
	if err := Copy(t.Context(), dst, src); err != nil {
		t.Fatal(err)
	}
	want, _ := os.ReadFile(src)
	if _, err := f.WriteAt([]byte("changed"), 0); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(dst); !bytes.Equal(got, want) {
		t.Error("the copy differs")
	}
	var st unix.Stat_t
	if err := unix.Stat(dst, &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o7777 != 0o400 || st.Blocks*512 > 1<<20 {
		t.Errorf("mode %o, %d bytes on disk", st.Mode, st.Blocks*512)
	}
	if err := Copy(t.Context(), dst, src); !errors.Is(err, os.ErrExist) {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	other := filepath.Join(dir, "other")
	if err := Copy(ctx, other, src); !errors.Is(err, context.Canceled) && err != nil {
		t.Errorf("got %v", err)
	} else if _, statErr := os.Stat(other); err != nil && statErr == nil {
		t.Error("left a file")
	}
}

// testUID is a user id that no other process uses.
const testUID = 1_999_901

// TestFlattenAndExpand creates a file system, applies a guest's changes to it, and
// compares the files of the result.
func TestFlattenAndExpand(t *testing.T) {
	for _, tool := range []string{"qemu-io", "qemu-img", "mke2fs", "debugfs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("needs "+tool+":", err)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 40 {
		name := filepath.Join(tree, fmt.Sprintf("d%d", i%5), fmt.Sprintf("f%d", i))
		b := make([]byte, rng.IntN(200<<10))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	const size = 256 << 20
	c := Chain{Format: Qcow2, Base: filepath.Join(dir, "base"), Layers: []string{filepath.Join(dir, "overlay")}, Size: size}
	if err := os.WriteFile(c.Base, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Create(Qcow2, c.Layers[0], size, os.Getuid()); err != nil {
		t.Fatal(err)
	}
	// QEMU writes a file system with the tree, as a guest would.
	raw := filepath.Join(dir, "raw")
	run(t, "mke2fs", "-q", "-t", "ext4", "-d", tree, raw, "256M")
	run(t, "qemu-img", "convert", "-n", "--target-image-opts", "-f", "raw", raw,
		"driver=qcow2,file.driver=file,file.filename="+c.Layers[0])

	flat := filepath.Join(dir, "flat")
	if err := Flatten(t.Context(), flat, c, testUID); err != nil {
		t.Fatal(err)
	}
	sameTree(t, flat, tree)
	info, err := os.Stat(flat)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(flat, &st); err != nil {
		t.Fatal(err)
	}
	t.Logf("flattened %d MiB to %d MiB, %d MiB on disk", size>>20, info.Size()>>20, st.Blocks*512>>20)
	if info.Size() > 32<<20 || st.Mode&0o7777 != 0o400 || st.Uid != uint32(os.Getuid()) {
		t.Errorf("%d bytes, mode %o, owner %d", info.Size(), st.Mode, st.Uid)
	}
	if err := Expand(t.Context(), flat, 128<<20, testUID); err != nil {
		t.Fatal(err)
	}
	sameTree(t, flat, tree)
	if out := run(t, "dumpe2fs", "-h", flat); !strings.Contains(out, "Block count:              131072\n") && !strings.Contains(out, "Block count:              32768\n") {
		t.Errorf("the expanded file system: %s", out)
	}
	if err := Expand(t.Context(), flat, 1<<20, testUID); err == nil {
		t.Error("expanded to a smaller size")
	}
	if err := Flatten(t.Context(), flat, c, testUID); !errors.Is(err, os.ErrExist) {
		t.Errorf("got %v", err)
	}

	// Flatten refuses a disk without a file system, and leaves no file.
	other := filepath.Join(dir, "other")
	for name, c := range map[string]Chain{
		"zeros":   {Format: Qcow2, Base: c.Base, Size: 8 << 20},
		"garbage": {Base: filepath.Join(tree, "d1", "f1"), Size: 8 << 20},
	} {
		if err := Flatten(t.Context(), other, c, testUID); err == nil || !strings.Contains(err.Error(), "e2fsck") {
			t.Errorf("%s: got %v", name, err)
		}
		if _, err := os.Stat(other); err == nil {
			t.Errorf("%s: left a file", name)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Flatten(ctx, other, c, testUID); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// sameTree compares a file system image with the folder tree.
func sameTree(t *testing.T, image, tree string) {
	t.Helper()
	run(t, "e2fsck", "-fn", image)
	out := t.TempDir()
	run(t, "debugfs", "-R", "rdump / "+out, image)
	if err := os.RemoveAll(filepath.Join(out, "lost+found")); err != nil {
		t.Fatal(err)
	}
	run(t, "diff", "-r", tree, out)
}
