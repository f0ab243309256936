package memory

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// pagesOf returns the given blocks of mem, in order.
func pagesOf(mem []byte, blocks map[uint64]bool) Pages {
	return func(yield func(Page, error) bool) {
		for _, b := range slices.Sorted(maps.Keys(blocks)) {
			if !yield(Page{b, mem[b*BlockSize : (b+1)*BlockSize]}, nil) {
				return
			}
		}
	}
}

func everyBlock(blocks int) map[uint64]bool {
	all := map[uint64]bool{}
	for b := range blocks {
		all[uint64(b)] = true
	}
	return all
}

// create creates an image of mem in its own folder.
func create(t testing.TB, mem []byte) (*Image, string) {
	t.Helper()
	dir := t.TempDir()
	m, err := Create(t.Context(), dir, int64(len(mem)), pagesOf(mem, everyBlock(len(mem)/BlockSize)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m, dir
}

// appended appends pages of mem to m, in a new folder.
func appended(t testing.TB, m *Image, mem []byte, dirty map[uint64]bool, base *Image) (*Image, string) {
	t.Helper()
	dir := t.TempDir()
	next, err := m.Append(t.Context(), dir, pagesOf(mem, dirty), base)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { next.Close() })
	return next, dir
}

// materialized returns the content of an image's file.
func materialized(t testing.TB, m *Image) []byte {
	t.Helper()
	f, err := m.Materialize(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := io.ReadAll(io.NewSectionReader(f, 0, m.Size()+1))
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// same checks that an image has the expected memory, with each method that reads it.
func same(t testing.TB, m *Image, mem []byte) {
	t.Helper()
	got := make([]byte, len(mem))
	if _, err := m.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, mem) {
		t.Fatal("the image differs from the memory")
	}
	if !bytes.Equal(materialized(t, m), mem) {
		t.Fatal("the image's file differs from the memory")
	}
	restoresTo(t, m, nil, make([]byte, len(mem)), mem)
	if err := m.h.check(); err != nil {
		t.Fatal(err)
	}
}

// restoresTo writes the changes since base over base's memory, like a restore, and checks that
// the result is mem. It returns the number of changed pages.
func restoresTo(t testing.TB, m, base *Image, baseMem, mem []byte) int {
	t.Helper()
	restored := bytes.Clone(baseMem)
	n := 0
	for p, err := range m.ChangedFrom(base) {
		if err != nil {
			t.Fatal(err)
		}
		copy(restored[p.Block*BlockSize:], p.Data)
		n++
	}
	if !bytes.Equal(restored, mem) {
		t.Fatal("base with the changes differs from the memory")
	}
	return n
}

// world is the state of TestAgainstByteArray: a sandbox that is paused and resumed, and
// the templates captured from it.
type world struct {
	t   *testing.T
	rng *rand.Rand
	mem []byte // the expected memory

	image, base *Image // the sandbox's image, and the one it started from
	dir         string // of image
	baseMem     []byte
	dirty       map[uint64]bool // what a driver would report: every block written since base
	longest     int             // the most adjacent blocks that one write covers
	merges      int
}

func (w *world) blocks() int { return len(w.mem) / BlockSize }

func (w *world) fill(b uint64) {
	part := w.mem[b*BlockSize : (b+1)*BlockSize]
	switch w.rng.IntN(5) {
	case 0, 1:
		clear(part)
	case 2:
		part[w.rng.IntN(len(part))] = byte(w.rng.IntN(3)) // possibly no change
	default:
		binary.LittleEndian.PutUint64(part[w.rng.IntN(len(part)-8):], w.rng.Uint64())
	}
}

func (w *world) run() {
	for range w.rng.IntN(30) {
		b, run := w.rng.IntN(w.blocks()), 1+w.rng.IntN(w.longest)
		for i := b; i < min(b+run, w.blocks()); i++ {
			w.dirty[uint64(i)] = true
			if w.rng.IntN(8) > 0 { // otherwise it is dirty, but unchanged
				w.fill(uint64(i))
			}
		}
	}
}

func (w *world) pause() {
	before := w.layerCount()
	w.image, w.dir = appended(w.t, w.image, w.mem, w.dirty, w.base)
	if kept := w.image.h.shared(w.base.h); kept < len(w.base.h.layers) && len(w.base.h.layers) < maxLayers && w.base.h.above(0) <= (allSpread-ownSpread-1)*w.base.h.blocks {
		w.t.Fatalf("the image kept %d of its base's %d layers", kept, len(w.base.h.layers))
	} else if n := len(w.image.h.layers); n > kept+MaxGenerations || n > maxLayers {
		w.t.Fatalf("the image has %d layers, %d of them its base's; before the pause it had %d", n, kept, before)
	} else if before == kept+MaxGenerations && n == kept+1 {
		w.merges++
	}
}

func (w *world) layerCount() int { return len(w.image.h.layers) }

// capture captures a template of the sandbox, which then continues on that template.
func (w *world) capture() {
	w.pause()
	w.base, w.baseMem, w.dirty = w.image, bytes.Clone(w.mem), map[uint64]bool{}
}

func (w *world) reopen() {
	m, err := Open(w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { m.Close() })
	if w.base == w.image {
		w.base = m
	}
	w.image = m
}

// TestAgainstByteArray compares random writes, zeroings, pauses, captures, merges and
// reopenings with a plain byte array.
func TestAgainstByteArray(t *testing.T) {
	var merges atomic.Int64
	t.Cleanup(func() {
		if n := merges.Load(); !t.Failed() && n < 4 {
			t.Errorf("generations were merged %d times, want at least 4", n)
		}
	})
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel() // the test mostly waits for the disk
			rng := rand.New(rand.NewPCG(seed, 1))
			blocks := 1 + rng.IntN(100)
			w := &world{t: t, rng: rng, longest: 10, dirty: map[uint64]bool{}}
			if seed%3 == 0 { // later generations do not hide earlier ones
				blocks, w.longest = blocks+300, 1
			}
			w.mem = make([]byte, blocks*BlockSize)
			defer func() { merges.Add(int64(w.merges)) }()
			for b := range w.blocks() {
				if rng.IntN(2) == 0 {
					w.fill(uint64(b))
				}
			}
			w.image, w.dir = create(t, w.mem)
			w.base, w.baseMem = w.image, bytes.Clone(w.mem)
			for range 30 {
				w.run()
				if rng.IntN(10) == 0 {
					w.capture()
				} else {
					w.pause()
				}
				if rng.IntN(4) == 0 {
					w.reopen()
				}
				same(t, w.image, w.mem)
				same(t, w.base, w.baseMem)
				if n := restoresTo(t, w.image, w.base, w.baseMem, w.mem); n > len(w.dirty) {
					t.Fatalf("%d pages differ, but only %d were written", n, len(w.dirty))
				}
			}
		})
	}
}

// TestThinLayersAreDropped checks that Append drops a layer of which little is in use.
func TestThinLayersAreDropped(t *testing.T) {
	const blocks = 64
	mem := make([]byte, blocks*BlockSize)
	base, _ := create(t, mem)
	m := base
	for n := byte(1); n < 6; n++ {
		dirty := everyBlock(blocks)
		for left := range uint64(blocks / thin) { // these keep the first layer's content
			if n > 1 {
				delete(dirty, 8*left)
			}
		}
		for b := range dirty {
			mem[b*BlockSize] = n
		}
		m, _ = appended(t, m, mem, dirty, base)
		same(t, m, mem)
		if got := m.h.layers[len(m.h.layers)-1].blocks; len(m.h.layers) != 2 || got != blocks {
			t.Fatalf("%d layers, the last has %d blocks", len(m.h.layers), got)
		}
	}
	// With one more block in use, the layer stays.
	dirty := everyBlock(blocks)
	for left := range uint64(blocks/thin + 1) {
		delete(dirty, 7*left)
	}
	for b := range dirty {
		mem[b*BlockSize] = 6
	}
	if m, _ = appended(t, m, mem, dirty, base); len(m.h.layers) != 3 {
		t.Errorf("%d layers", len(m.h.layers))
	}
	same(t, m, mem)
}

// TestLayersAreBounded captures templates of templates until the limit of layers is
// reached.
func TestLayersAreBounded(t *testing.T) {
	mem := bytes.Repeat([]byte{1}, 70*BlockSize)
	m, _ := create(t, mem)
	flat := 0
	for i := range uint64(70) { // one block each, so that every layer stays in use
		base := m
		mem[i*BlockSize] = 2
		m, _ = appended(t, m, mem, map[uint64]bool{i: true}, base)
		if m.Generations() == 1 {
			flat++
		}
		if n := m.Generations(); n > maxLayers {
			t.Fatalf("%d layers", n)
		}
		restoresTo(t, m, base, materialized(t, base), mem)
	}
	same(t, m, mem)
	if flat != 1 {
		t.Errorf("all layers were rewritten into one %d times, want once", flat)
	}
}

func TestUnchangedAndZeroCostNothing(t *testing.T) {
	mem := bytes.Repeat([]byte{1}, 100*BlockSize)
	m, _ := create(t, mem)
	clear(mem[:50*BlockSize])
	next, dir := appended(t, m, mem, everyBlock(100), m)
	if n := next.Generations(); n != 1 {
		t.Errorf("zero or unchanged pages created a layer: %d generations", n)
	}
	same(t, next, mem)
	if n := restoresTo(t, next, m, bytes.Repeat([]byte{1}, len(mem)), mem); n != 50 {
		t.Errorf("%d pages differ, not 50", n)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("%d files, not the header and a layer", len(entries))
	}
	// A layer that a later one hides is dropped, without a merge.
	for i := range byte(20) {
		mem[99*BlockSize] = 100 + i
		next, _ = appended(t, next, mem, everyBlock(100), m)
		if n := next.Generations(); n != 2 {
			t.Fatalf("%d generations", n)
		}
	}
	same(t, next, mem)
}

func TestHolesTakeNoSpace(t *testing.T) {
	const blocks = 4096 // 16 MiB
	mem := make([]byte, blocks*BlockSize)
	mem[2000*BlockSize] = 1
	m, dir := create(t, mem)
	info, err := os.Stat(layerName(dir, m.h.layers[0].id))
	if err != nil {
		t.Fatal(err)
	}
	if n := info.Sys().(*syscall.Stat_t).Blocks * 512; n > 64<<10 {
		t.Errorf("one page takes %d bytes on disk", n)
	}
	f, err := m.Materialize(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if n := st.Blocks * 512; n > 2<<20 { // one huge page, if memfds use them
		t.Errorf("one page takes %d bytes of memory", n)
	}
}

func TestMaterializedIsSealed(t *testing.T) {
	mem := bytes.Repeat([]byte{1}, 2*BlockSize)
	m, _ := create(t, mem)
	f, err := m.Materialize(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{2}, 0); err == nil {
		t.Error("the file is writable")
	}
	if f.Truncate(0) == nil || f.Truncate(1<<20) == nil {
		t.Error("the file can be resized")
	}
	if b, err := unix.Mmap(int(f.Fd()), 0, len(mem), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		unix.Munmap(b)
		t.Error("the file can be mapped writable")
	}
	b, err := unix.Mmap(int(f.Fd()), 0, len(mem), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	b[0] = 2
	if !bytes.Equal(materialized(t, m), mem) {
		t.Error("a write to a private mapping changed the file")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Materialize(ctx, "test"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestImagesAreIndependent removes each of two images and reads the other.
func TestImagesAreIndependent(t *testing.T) {
	mem := bytes.Repeat([]byte{1}, 10*BlockSize)
	template, templateDir := create(t, mem)
	changed := bytes.Clone(mem)
	changed[0] = 7
	sandbox, dir := appended(t, template, changed, everyBlock(10), template)
	if err := os.RemoveAll(templateDir); err != nil {
		t.Fatal(err)
	}
	again, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	same(t, again, changed)
	same(t, template, mem) // its files are still open
	other, _ := appended(t, template, mem, nil, template)
	if got, want := linksOf(t, other, 0), linksOf(t, again, 0); got != want {
		t.Errorf("the layer has %d links seen from one image, %d from the other", got, want)
	}
	// Append copies a layer that has no name left to link to.
	if err := errors.Join(os.RemoveAll(dir), other.Close()); err != nil {
		t.Fatal(err)
	}
	moved := filepath.Join(t.TempDir(), "moved")
	if err := os.Mkdir(moved, 0o700); err != nil {
		t.Fatal(err)
	}
	copied, err := sandbox.Append(t.Context(), moved, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer copied.Close()
	if err := os.Rename(moved, moved+"2"); err != nil {
		t.Fatal(err)
	}
	same(t, copied, changed)
	same(t, sandbox, changed)
}

func linksOf(t *testing.T, m *Image, layer int) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(m.layers[layer].file.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return uint64(st.Nlink)
}

func TestLayersAreCopiedToOtherFileSystems(t *testing.T) {
	mem := bytes.Repeat([]byte{1}, 10*BlockSize)
	m, _ := create(t, mem)
	dir, err := os.MkdirTemp("/dev/shm", "wrenn-test-")
	if err != nil {
		t.Skip("needs a file system in memory:", err)
	}
	defer os.RemoveAll(dir)
	next, err := m.Append(t.Context(), dir, nil, m)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	same(t, next, mem)
}

func TestFailureLeavesNothing(t *testing.T) {
	mem := bytes.Repeat([]byte{1}, 10*BlockSize)
	m, home := create(t, mem)
	broken := errors.New("broken")
	changed := bytes.Repeat([]byte{2}, BlockSize)
	dir := t.TempDir()
	empty := func(name string) {
		t.Helper()
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("%s: left %v %v", name, entries, err)
		}
	}
	for name, pages := range map[string]Pages{
		"an error": func(yield func(Page, error) bool) {
			_ = yield(Page{0, changed}, nil) && yield(Page{}, broken)
		},
		"out of order": func(yield func(Page, error) bool) {
			_ = yield(Page{1, changed}, nil) && yield(Page{0, changed}, nil)
		},
		"beyond the end": func(yield func(Page, error) bool) { yield(Page{10, changed}, nil) },
		"half a page":    func(yield func(Page, error) bool) { yield(Page{0, changed[1:]}, nil) },
	} {
		if _, err := m.Append(t.Context(), dir, pages, m); err == nil {
			t.Errorf("%s: accepted", name)
		}
		empty(name)
		if _, err := Create(t.Context(), dir, m.Size(), pages); err == nil {
			t.Errorf("%s: accepted", name)
		}
		empty(name)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Append(ctx, dir, pagesOf(mem, everyBlock(10)), m); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	empty("cancelled context")
	for _, size := range []int64{0, -BlockSize, 100} {
		if _, err := Create(t.Context(), dir, size, nil); err == nil {
			t.Errorf("created with %d bytes", size)
		}
	}
	if _, err := Create(t.Context(), home, BlockSize, nil); !errors.Is(err, fs.ErrExist) {
		t.Errorf("created over an existing image: %v", err)
	}
	if _, err := m.Append(t.Context(), home, nil, nil); !errors.Is(err, fs.ErrExist) {
		t.Errorf("created over an existing image: %v", err)
	}
	same(t, m, mem)
}

// TestMergeEndsWithItsContext cancels an append that merges after its last page was read.
func TestMergeEndsWithItsContext(t *testing.T) {
	mem := bytes.Repeat([]byte{1}, 20*BlockSize)
	base, _ := create(t, mem)
	m := base
	for i := range uint64(MaxGenerations) {
		mem[i*BlockSize] = 2
		m, _ = appended(t, m, mem, map[uint64]bool{i: true}, base)
	}
	if n := m.Generations(); n != 1+MaxGenerations {
		t.Fatalf("%d generations", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	dir := t.TempDir()
	_, err := m.Append(ctx, dir, func(yield func(Page, error) bool) {
		yield(Page{19, bytes.Repeat([]byte{3}, BlockSize)}, nil)
		cancel()
	}, base)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) > 0 {
		t.Errorf("left %v", entries)
	}
	same(t, m, mem)
	mem[19*BlockSize] = 3
	if m, _ = appended(t, m, mem, map[uint64]bool{19: true}, base); m.Generations() != 2 {
		t.Errorf("%d generations after a merge", m.Generations())
	}
	same(t, m, mem)
}

func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("needs to mount a file system:", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	for _, d := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mem := make([]byte, 1<<20)
	for i := range mem[:len(mem)/2] {
		mem[i] = 1
	}
	m, err := Create(t.Context(), filepath.Join(dir, "a"), int64(len(mem)), pagesOf(mem, everyBlock(256)))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	full := bytes.Repeat([]byte{2}, len(mem))
	if _, err := m.Append(t.Context(), filepath.Join(dir, "b"), pagesOf(full, everyBlock(256)), m); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
	if entries, _ := os.ReadDir(filepath.Join(dir, "b")); len(entries) > 0 {
		t.Errorf("left %v", entries)
	}
	same(t, m, mem)
}

// damaged copies the image in home, changes one byte of one file, and returns the copy's
// folder.
func damaged(t testing.TB, home, file string, at int64, xor byte) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(home)); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, file)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= xor
	if err := errors.Join(os.Chmod(name, 0o600), os.WriteFile(name, b, 0)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// layered returns an image of three layers, all in use.
func layered(t testing.TB) (m *Image, dir string, mem []byte) {
	mem = bytes.Repeat([]byte{1}, 10*BlockSize)
	clear(mem[3*BlockSize : 5*BlockSize])
	base, _ := create(t, mem)
	mem[4*BlockSize] = 4
	m, _ = appended(t, base, mem, map[uint64]bool{4: true}, base)
	mem[5*BlockSize] = 5
	clear(mem[6*BlockSize : 7*BlockSize])
	m, dir = appended(t, m, mem, map[uint64]bool{5: true, 6: true}, base)
	if m.Generations() != 3 {
		t.Fatalf("%d generations", m.Generations())
	}
	return m, dir, mem
}

// checkDamaged opens an image that may be damaged, and checks that every read returns the
// right memory or reports the damage.
func checkDamaged(t testing.TB, dir string, mem []byte) (noticed bool) {
	t.Helper()
	m, err := Open(dir)
	if err != nil {
		if !errors.Is(err, ErrCorrupt) && !strings.Contains(err.Error(), "version") {
			t.Errorf("open: %v", err)
		}
		return true
	}
	defer m.Close()
	got := make([]byte, len(mem))
	_, readErr := m.ReadAt(got, 0)
	var changedErr error
	for _, err := range m.ChangedFrom(nil) {
		changedErr = err
	}
	f, err := m.Materialize(t.Context(), "test")
	if err == nil {
		f.Close()
	}
	for _, e := range []error{readErr, changedErr, err} {
		if (e != nil) != (err != nil) || e != nil && !errors.Is(e, ErrCorrupt) {
			t.Errorf("got %v, %v, %v", readErr, changedErr, err)
		}
	}
	if err == nil && !bytes.Equal(got, mem) {
		t.Error("a damaged image reads as different memory")
	}
	return err != nil
}

func TestDamageIsNoticed(t *testing.T) {
	m, home, mem := layered(t)
	for _, e := range []struct {
		file string
		step int
	}{
		{headerFile, 1},
		{m.h.layers[0].id.String() + layerExt, 977},
		{m.h.layers[1].id.String() + layerExt, 977},
		{m.h.layers[2].id.String() + layerExt, 977},
	} {
		info, err := os.Stat(filepath.Join(home, e.file))
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < int(info.Size()); at += e.step {
			noticed := checkDamaged(t, damaged(t, home, e.file, int64(at), 0x10), mem)
			if block := at / BlockSize; !noticed && (e.file != m.h.layers[0].id.String()+layerExt || block < 3 || block > 6) {
				t.Errorf("%s: damage of byte %d is not noticed", e.file, at)
			}
		}
		dir := damaged(t, home, e.file, 0, 0)
		if err := os.Truncate(filepath.Join(dir, e.file), info.Size()-1); err != nil {
			t.Fatal(err)
		}
		if !checkDamaged(t, dir, mem) {
			t.Errorf("%s: a missing byte is not noticed", e.file)
		}
		if err := os.Remove(filepath.Join(dir, e.file)); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir); err == nil {
			t.Errorf("%s: the image opened without the file", e.file)
		}
	}
}

// TestAppendReplacesDamagedBlock checks that an image with a damaged block can be read again
// once a later append has stored that block.
func TestAppendReplacesDamagedBlock(t *testing.T) {
	m, home, mem := layered(t)
	m, err := Open(damaged(t, home, m.h.layers[1].id.String()+layerExt, 100, 1))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.ReadAt(make([]byte, len(mem)), 0); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("got %v", err)
	}
	next, _ := appended(t, m, mem, map[uint64]bool{4: true}, nil)
	same(t, next, mem)
}

func FuzzDecodeHeader(f *testing.F) {
	h := &header{
		blocks: 10, layers: []layer{{id: uuid.New(), blocks: 10}, {id: uuid.New(), blocks: 3}},
		extents: []extent{{0, 2, 0, 0}, {5, 1, 1, 0}, {6, 2, 1, 1}},
	}
	f.Add(h.encode())
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= headerBytes+4 { // this test is not about the checksum
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b[:len(b)-4], castagnoli))
		}
		h, err := decodeHeader(b)
		if err != nil {
			return
		}
		if !bytes.Equal(h.encode(), b) {
			t.Error("a decoded header encodes to other bytes")
		}
		var end uint64 // each block must be in exactly one place
		for i := 0; end < h.blocks && i <= 2*len(h.extents); i++ {
			e := h.lookup(end)
			if e.first != end || e.count == 0 {
				t.Fatalf("block %d is in %+v", end, e)
			}
			end = e.end()
		}
		if end != h.blocks {
			t.Errorf("%d of %d blocks have a place", end, h.blocks)
		}
		if o := h.overlay(h.extents); !slices.Equal(o.extents, h.overlay(nil).extents) {
			t.Error("a header overlaid on itself changes")
		}
	})
}

func FuzzDamage(f *testing.F) {
	m, home, mem := layered(f)
	var files []string
	for _, l := range m.h.layers {
		files = append(files, l.id.String()+layerExt)
	}
	files = append(files, headerFile)
	f.Add(uint8(0), uint32(0), byte(1))
	f.Add(uint8(1), uint32(5000), byte(0xff))
	f.Add(uint8(3), uint32(100), byte(4))
	f.Fuzz(func(t *testing.T, file uint8, at uint32, xor byte) {
		name := files[int(file)%len(files)]
		info, err := os.Stat(filepath.Join(home, name))
		if err != nil {
			t.Fatal(err)
		}
		checkDamaged(t, damaged(t, home, name, int64(at)%info.Size(), xor), mem)
	})
}

// TestLayersTakeBoundedSpace checks that however a guest writes its memory, and however
// often it is captured and restarted, its layers take at most a few times its size.
func TestLayersTakeBoundedSpace(t *testing.T) {
	const blocks = 64
	mem := make([]byte, blocks*BlockSize)
	n := uint64(0)
	write := func(from int) map[uint64]bool {
		dirty := everyBlock(blocks)
		for b := range blocks {
			if b < from {
				delete(dirty, uint64(b))
				continue
			}
			n++
			binary.LittleEndian.PutUint64(mem[b*BlockSize:], n)
		}
		return dirty
	}
	write(0)
	m, _ := create(t, mem)
	base := m
	// Each pause leaves just enough of the layer below in use for it to stay.
	for i := range 40 {
		m, _ = appended(t, m, mem, write(i%MaxGenerations*blocks/MaxGenerations), base)
		same(t, m, mem)
		if own := m.h.above(m.h.shared(base.h)); own > ownSpread*blocks {
			t.Fatalf("after %d pauses its own layers have %d blocks, its memory %d", i+1, own, blocks)
		}
	}
	// Each sandbox starts from the previous one's capture.
	for i := range 40 {
		base = m
		m, _ = appended(t, m, mem, write(i%MaxGenerations*blocks/MaxGenerations), base)
		same(t, m, mem)
		if all := m.h.above(0); all > allSpread*blocks {
			t.Fatalf("after %d captures all layers have %d blocks, the memory %d", i+1, all, blocks)
		}
	}
}
