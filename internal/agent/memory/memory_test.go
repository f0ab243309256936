package memory

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// pagesOf are the given blocks of mem, in order.
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

// same compares an image with the memory that it stands for, by both ways of
// reading it.
func same(t *testing.T, m *Image, mem []byte) {
	t.Helper()
	got := make([]byte, len(mem))
	if _, err := m.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, mem) {
		t.Fatal("the image reads other than the memory")
	}
	// As a restore does: the base's file, and what changed laid over it.
	restored, err := os.ReadFile(m.Base())
	if err != nil {
		t.Fatal(err)
	}
	for p, err := range m.Changed() {
		if err != nil {
			t.Fatal(err)
		}
		copy(restored[p.Block*BlockSize:], p.Data)
	}
	if !bytes.Equal(restored, mem) {
		t.Fatal("the base with the changes is other than the memory")
	}
	if err := m.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.h.check(); err != nil {
		t.Fatal(err)
	}
}

// TestAgainstByteArray drives random writes, zeroings, snapshots, merges and
// reopenings against a plain byte array.
func TestAgainstByteArray(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		blocks := 1 + rng.IntN(200)
		mem := make([]byte, blocks*BlockSize)
		fill := func(b uint64) {
			part := mem[b*BlockSize : (b+1)*BlockSize]
			switch rng.IntN(4) {
			case 0:
				clear(part)
			case 1:
				part[rng.IntN(len(part))] = byte(rng.IntN(3)) // perhaps no change at all
			default:
				for i := range part {
					part[i] = byte(rng.Uint32())
				}
			}
		}
		for b := range blocks {
			if rng.IntN(2) == 0 {
				fill(uint64(b))
			}
		}
		dir := t.TempDir()
		m, err := Create(t.Context(), dir, int64(len(mem)), pagesOf(mem, everyBlock(blocks)))
		if err != nil {
			t.Fatal(err)
		}
		same(t, m, mem)
		for range 25 {
			dirty := map[uint64]bool{}
			for range rng.IntN(30) {
				b, run := rng.IntN(blocks), 1+rng.IntN(10)
				for i := b; i < min(b+run, blocks); i++ {
					dirty[uint64(i)] = true
					if rng.IntN(8) > 0 { // else reported dirty, and unchanged
						fill(uint64(i))
					}
				}
			}
			next, err := m.Append(t.Context(), pagesOf(mem, dirty))
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			m = next
			if m.Generations() > MaxGenerations {
				t.Fatalf("%d generations", m.Generations())
			}
			same(t, m, mem)
			if rng.IntN(6) == 0 {
				merged, err := m.Merge(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				m.Close()
				m = merged
				if m.Generations() != 1 {
					t.Fatalf("%d generations after a merge", m.Generations())
				}
				same(t, m, mem)
			}
			if rng.IntN(4) == 0 {
				m.Close()
				if err := Sweep(dir); err != nil {
					t.Fatal(err)
				}
				if m, err = Open(dir); err != nil {
					t.Fatal(err)
				}
				same(t, m, mem)
			}
		}
		m.Close()
	}
}

func TestUnchangedAndZeroCostNothing(t *testing.T) {
	dir := t.TempDir()
	mem := bytes.Repeat([]byte{1}, 100*BlockSize)
	m, err := Create(t.Context(), dir, int64(len(mem)), pagesOf(mem, everyBlock(100)))
	if err != nil {
		t.Fatal(err)
	}
	clear(mem[:50*BlockSize])
	next, err := m.Append(t.Context(), pagesOf(mem, everyBlock(100)))
	if err != nil {
		t.Fatal(err)
	}
	if n := next.Generations(); n != 1 {
		t.Errorf("pages that are zero or unchanged made a layer: %d generations", n)
	}
	same(t, next, mem)
}

func TestTemplatesLayersAreShared(t *testing.T) {
	template, sandbox := t.TempDir(), t.TempDir()
	mem := bytes.Repeat([]byte{1}, 10*BlockSize)
	m, err := Create(t.Context(), template, int64(len(mem)), pagesOf(mem, everyBlock(10)))
	if err != nil {
		t.Fatal(err)
	}
	h, err := os.ReadFile(filepath.Join(template, headerFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(sandbox, headerFile), h, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(sandbox, template)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Clone(mem)
	changed[0] = 7
	next, err := s.Append(t.Context(), pagesOf(changed, everyBlock(10)))
	if err != nil {
		t.Fatal(err)
	}
	same(t, next, changed)
	same(t, m, mem)
	if merged, err := next.Merge(t.Context()); err != nil {
		t.Error(err)
	} else {
		same(t, merged, changed)
	}
	if err := os.Remove(m.Base()); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(template); !errors.Is(err, ErrCorrupt) {
		t.Errorf("opened without its layer: %v", err)
	}
}

func TestFailureLeavesWhatWas(t *testing.T) {
	dir := t.TempDir()
	mem := bytes.Repeat([]byte{1}, 10*BlockSize)
	m, err := Create(t.Context(), dir, int64(len(mem)), pagesOf(mem, everyBlock(10)))
	if err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadDir(dir)
	broken := errors.New("broken")
	changed := bytes.Repeat([]byte{2}, BlockSize)
	for name, pages := range map[string]Pages{
		"an error": func(yield func(Page, error) bool) {
			_ = yield(Page{0, changed}, nil) && yield(Page{}, broken)
		},
		"out of order": func(yield func(Page, error) bool) {
			_ = yield(Page{1, changed}, nil) && yield(Page{0, changed}, nil)
		},
		"behind the end": func(yield func(Page, error) bool) { yield(Page{10, changed}, nil) },
		"half a page":    func(yield func(Page, error) bool) { yield(Page{0, changed[1:]}, nil) },
	} {
		if _, err := m.Append(t.Context(), pages); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Append(ctx, pagesOf(mem, everyBlock(10))); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := m.Merge(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	after, _ := os.ReadDir(dir)
	if len(after) != len(before) {
		t.Errorf("%d files became %d", len(before), len(after))
	}
	if _, err := Create(t.Context(), dir, BlockSize, pagesOf(mem, nil)); !errors.Is(err, fs.ErrExist) {
		t.Errorf("made over one that is there: %v", err)
	}
	same(t, m, mem)
}

func TestDamageIsNoticed(t *testing.T) {
	dir := t.TempDir()
	mem := bytes.Repeat([]byte{1}, 10*BlockSize)
	m, err := Create(t.Context(), dir, int64(len(mem)), pagesOf(mem, everyBlock(10)))
	if err != nil {
		t.Fatal(err)
	}
	header, err := os.ReadFile(filepath.Join(dir, headerFile))
	if err != nil {
		t.Fatal(err)
	}
	for i := range header {
		bad := bytes.Clone(header)
		bad[i] ^= 0x10
		if _, err := decodeHeader(bad); err == nil {
			t.Errorf("byte %d of the header may be anything", i)
		}
	}
	if err := os.Chmod(m.Base(), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(m.Base(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{9}, 5000); err != nil {
		t.Fatal(err)
	}
	if err := m.Verify(t.Context()); !errors.Is(err, ErrCorrupt) {
		t.Errorf("got %v", err)
	}
	if err := f.Truncate(BlockSize); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrCorrupt) {
		t.Errorf("got %v", err)
	}
}

func FuzzDecodeHeader(f *testing.F) {
	h := &header{blocks: 10, layers: []layer{{blocks: 10}}, extents: []extent{{0, 2, 0, 0}, {5, 1, zeroLayer, 0}}}
	f.Add(h.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeHeader(b)
		if err == nil && !bytes.Equal(h.encode(), b) {
			t.Error("a header reads as another than it is")
		}
	})
}
