package memory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// MaxGenerations is how many layers an image has at most above those of the
// base that it began with: when there would be one more they are merged.
const MaxGenerations = 8

// Multiples of the memory's size that an image's layers may take: ownSpread those
// above the base's, allSpread all together. Above ownSpread, Append merges the
// image's own layers; above allSpread, the base's too, because by then guests have
// written as much as the merge writes.
const ownSpread, allSpread = 2, 6

// thin is the share of a layer's blocks, one in so many, that are so few that a
// pause takes them over into the layer that it writes: the others take space
// and are of use to nobody.
const thin = 8

const (
	headerFile = "header"
	layerExt   = ".mem"

	// chunkBytes is how much of a layer is read at a time.
	chunkBytes = 256 << 10
)

// Page is one block of memory.
type Page struct {
	Block uint64
	Data  []byte // BlockSize bytes, to read only, valid until the next page
}

// Pages are pages of memory in rising order of their blocks. An error ends them.
type Pages = iter.Seq2[Page, error]

// Image is a memory image that is open for reading. It never changes, on disk
// neither: what changes it makes another, in a folder of its own. It holds its
// files open, so that its folder may be renamed or removed. Whatever reads an
// image returns ErrCorrupt for blocks that are not what was written.
type Image struct {
	h      *header
	layers []*layerFile // of h.layers
}

// Open opens the image in dir.
func Open(dir string) (*Image, error) {
	b, err := os.ReadFile(filepath.Join(dir, headerFile))
	if err != nil {
		return nil, fmt.Errorf("open memory image: %w", err)
	}
	h, err := decodeHeader(b)
	if err != nil {
		return nil, fmt.Errorf("open memory image: %w", err)
	}
	m := &Image{h: h}
	for _, l := range h.layers {
		f, err := openLayer(dir, l)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open memory image: %w", err), m.Close())
		}
		m.layers = append(m.layers, f)
	}
	return m, nil
}

// Close closes the image's files.
func (m *Image) Close() error {
	var errs []error
	for _, l := range m.layers {
		errs = append(errs, l.file.Close())
	}
	m.layers = nil
	return errors.Join(errs...)
}

// Size is the memory's size in bytes.
func (m *Image) Size() int64 { return int64(m.h.blocks) * BlockSize }

// Generations is how many layers the image has, its base's among them.
func (m *Image) Generations() int { return len(m.h.layers) }

// ReadAt implements io.ReaderAt on the whole memory.
func (m *Image) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, errors.New("read memory image: negative offset")
	}
	var block [BlockSize]byte
	for n < len(p) {
		at := off + int64(n)
		if at >= m.Size() {
			return n, io.EOF
		}
		e, within := m.h.lookup(uint64(at)/BlockSize), at%BlockSize
		part := p[n:]
		switch {
		case e.layer == zeroLayer:
			part = part[:min(int64(len(part)), int64(e.count)*BlockSize-within)]
			clear(part)
		case within == 0 && len(part) >= BlockSize:
			part = part[:min(uint64(len(part))/BlockSize, e.count)*BlockSize]
			err = m.layers[e.layer].read(part, e.offset)
		default:
			err = m.layers[e.layer].read(block[:], e.offset)
			part = part[:copy(part, block[within:])]
		}
		if err != nil {
			return n, fmt.Errorf("read memory image: %w", err)
		}
		n += len(part)
	}
	return n, nil
}

// part is a run of blocks and what is in them.
type part struct {
	first uint64
	data  []byte
}

// read reads the blocks of e, which are not zero, into buf, again and again.
func (m *Image) read(ctx context.Context, e extent, buf []byte) iter.Seq2[part, error] {
	return func(yield func(part, error) bool) {
		for e.count > 0 {
			err := ctx.Err()
			n := min(e.count, uint64(len(buf))/BlockSize)
			data := buf[:n*BlockSize]
			if err == nil {
				err = m.layers[e.layer].read(data, e.offset)
			}
			if !yield(part{e.first, data}, err) || err != nil {
				return
			}
			if n == e.count {
				return
			}
			e = e.from(e.first + n)
		}
	}
}

// ChangedFrom are the pages that differ from those of base: what is to be
// written over base's memory to have that of m. Pages that became zero are
// among them, as zeros. What differs is read from the headers: pages that
// both have in common are not read, those that have come to be the same by
// other ways are among what is returned. A nil base is zeros.
func (m *Image) ChangedFrom(base *Image) Pages {
	below := &header{blocks: m.h.blocks}
	if base != nil {
		below = base.h
	}
	return func(yield func(Page, error) bool) {
		if below.blocks != m.h.blocks {
			yield(Page{}, fmt.Errorf("compare memory images: %d blocks over %d", m.h.blocks, below.blocks))
			return
		}
		buf := make([]byte, chunkBytes)
		for e := range m.h.differing(below) {
			if e.layer == zeroLayer {
				for i := e.first; i < e.end(); i++ {
					if !yield(Page{i, zeros[:]}, nil) {
						return
					}
				}
				continue
			}
			for p, err := range m.read(context.Background(), e, buf) {
				if err != nil {
					yield(Page{}, fmt.Errorf("read memory image: %w", err))
					return
				}
				for i := range uint64(len(p.data) / BlockSize) {
					if !yield(Page{p.first + i, p.data[i*BlockSize:][:BlockSize]}, nil) {
						return
					}
				}
			}
		}
	}
}

// BytesChangedFrom is how many bytes of memory [Image.ChangedFrom] yields for
// an image of the same size.
func (m *Image) BytesChangedFrom(base *Image) int64 {
	var blocks uint64
	for e := range m.h.differing(base.h) {
		blocks += e.count
	}
	return int64(blocks) * BlockSize
}

// differing are the extents of h, in parts, that are not the same in other, a
// header of as many blocks.
func (h *header) differing(other *header) iter.Seq[extent] {
	return func(yield func(extent) bool) {
		for b := uint64(0); b < h.blocks; {
			e, o := h.lookup(b), other.lookup(b)
			e.count = min(e.count, o.count)
			b = e.end()
			switch {
			case e.layer == zeroLayer && o.layer == zeroLayer:
				continue
			case e.layer != zeroLayer && o.layer != zeroLayer &&
				h.layers[e.layer].id == other.layers[o.layer].id && e.offset == o.offset:
				continue
			}
			if !yield(e) {
				return
			}
		}
	}
}

// Create writes a new image of size bytes to dir, which must be there and
// empty: the pages given, and zeros elsewhere. Everything is synced when it
// returns. When it fails dir is empty again.
func Create(ctx context.Context, dir string, size int64, pages Pages) (*Image, error) {
	if size <= 0 || size%BlockSize != 0 || size/BlockSize > maxBlocks {
		return nil, fmt.Errorf("create memory image: size of %d bytes", size)
	}
	m, err := fill(dir, func() (*Image, error) {
		return (&Image{h: &header{blocks: uint64(size) / BlockSize}}).append(ctx, dir, pages, nil)
	})
	if err != nil {
		return nil, fmt.Errorf("create memory image: %w", err)
	}
	return m, nil
}

// Append writes the image that m becomes when the given pages are laid over
// it (nil: none) to dir, which must be there and empty. Of the pages only those
// that differ from m's take space, and of them not those that are zero. The
// layers stay shared with m, as links to the same files.
//
// The layers that m has in common with base, the image that it began with
// (nil: none), are merged only if there are too many, or all take too much, so
// that what began with base goes on sharing its pages.
//
// m and its folder stay as they are. Everything is synced when Append
// returns; the caller makes dir's name outlast a crash. When it fails dir is
// empty again.
func (m *Image) Append(ctx context.Context, dir string, pages Pages, base *Image) (*Image, error) {
	next, err := fill(dir, func() (*Image, error) { return m.append(ctx, dir, pages, base) })
	if err != nil {
		return nil, fmt.Errorf("append to memory image: %w", err)
	}
	return next, nil
}

// fill calls write to write an image to dir, and empties dir if that fails.
func fill(dir string, write func() (*Image, error)) (*Image, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	if len(entries) > 0 {
		return nil, fmt.Errorf("%s is not empty: %w", dir, fs.ErrExist)
	}
	m, err := write()
	if err == nil {
		return m, nil
	}
	entries, listErr := os.ReadDir(dir)
	err = errors.Join(err, listErr)
	for _, e := range entries {
		err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
	}
	return nil, err
}

func (m *Image) append(ctx context.Context, dir string, pages Pages, base *Image) (*Image, error) {
	keep := 0
	if base != nil {
		keep = m.h.shared(base.h)
	}
	h, fresh, err := m.write(ctx, dir, pages, max(keep, 1))
	if err != nil {
		return nil, err
	}
	defer func() { // it may be replaced by a merged one
		if fresh != nil {
			fresh.file.Close()
		}
	}()
	known := m.layers
	if fresh != nil {
		known = append(slices.Clone(known), fresh)
	}
	h.prune(max(keep, 1)) // generation 0 is flat, and stays first
	all := h.above(0) > allSpread*h.blocks
	if all || len(h.layers) > keep+MaxGenerations || len(h.layers) > maxLayers || h.above(keep) > ownSpread*h.blocks {
		if all || keep+1 > maxLayers {
			keep = 0
		}
		merged, l, err := (&Image{h: h, layers: ordered(h, known)}).merge(ctx, dir, keep)
		if err != nil {
			return nil, err
		}
		if fresh != nil {
			if err := errors.Join(fresh.file.Close(), os.Remove(layerName(dir, fresh.id))); err != nil {
				return nil, err
			}
		}
		h, fresh = merged, l
	}
	var g errgroup.Group
	if fresh != nil {
		g.Go(fresh.file.Sync) // beside the header's: a disk does both at once
	}
	if err := errors.Join(m.finish(ctx, dir, h), g.Wait()); err != nil {
		return nil, err
	}
	return Open(dir)
}

// finish adds to dir what h names of m's layers, and h.
func (m *Image) finish(ctx context.Context, dir string, h *header) error {
	for _, l := range ordered(h, m.layers) {
		if l == nil {
			continue // the new one
		}
		if err := l.link(ctx, dir); err != nil {
			return err
		}
	}
	return writeHeader(dir, h)
}

// ordered are the files of h's layers, as far as they are among those given.
func ordered(h *header, files []*layerFile) []*layerFile {
	byID := map[uuid.UUID]*layerFile{}
	for _, f := range files {
		byID[f.id] = f
	}
	list := make([]*layerFile, len(h.layers))
	for i, l := range h.layers {
		list[i] = byID[l.id]
	}
	return list
}

// write writes the pages that differ from m's to a new layer in dir, and what
// is left of the layers from the given one on of which little is. It returns
// the header with them and the layer, which is nil when there are none.
// Generation 0 is written even then, and every block of it at its own place.
func (m *Image) write(ctx context.Context, dir string, pages Pages, from int) (*header, *layerFile, error) {
	w, err := newLayerWriter(dir)
	if err != nil {
		return nil, nil, err
	}
	defer w.close()
	place := uint32(len(m.h.layers))
	flat := place == 0
	var changes []extent
	var old window
	last := int64(-1)
	if pages == nil {
		pages = func(func(Page, error) bool) {}
	}
	for p, err := range pages {
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = checkPage(p, m.h.blocks, last)
		}
		if err != nil {
			return nil, nil, err
		}
		last = int64(p.Block)
		e := m.h.lookup(p.Block)
		if isZero(p.Data) {
			if e.layer != zeroLayer {
				changes = join(changes, extent{first: p.Block, count: 1, layer: zeroLayer})
			}
			continue
		}
		if e.layer != zeroLayer {
			same, err := m.layers[e.layer].has(p.Data, e, &old)
			if err != nil {
				return nil, nil, err
			}
			if same {
				continue
			}
		}
		if flat {
			if err := w.skipTo(p.Block); err != nil {
				return nil, nil, err
			}
		}
		changes = join(changes, extent{first: p.Block, count: 1, layer: place, offset: w.blocks})
		if err := w.write(p.Data); err != nil {
			return nil, nil, err
		}
	}
	h := m.h.overlay(changes)
	if flat {
		if err := w.skipTo(m.h.blocks); err != nil {
			return nil, nil, err
		}
	} else if err := m.takeOver(ctx, w, h, from); err != nil {
		return nil, nil, err
	}
	if w.blocks == 0 {
		return h, nil, os.Remove(w.file.Name())
	}
	l, err := w.finish()
	if err != nil {
		return nil, nil, err
	}
	h.layers = append(h.layers, l.layer)
	return h, l, nil
}

// takeOver writes to w, the layer after all that h has, what h names of those
// layers from the given one on that have become thin, and has h name it there.
func (m *Image) takeOver(ctx context.Context, w *layerWriter, h *header, from int) error {
	used := make([]uint64, len(h.layers)+1)
	for _, e := range h.extents {
		used[e.layer] += e.count
	}
	buf := make([]byte, chunkBytes)
	extents := h.extents
	h.extents = nil
	for _, e := range extents {
		if l := int(e.layer); l >= from && l < len(h.layers) && used[l]*thin <= h.layers[l].blocks {
			at := w.blocks
			for p, err := range m.read(ctx, e, buf) {
				if err == nil {
					err = w.write(p.data)
				}
				if err != nil {
					return fmt.Errorf("take over blocks: %w", err)
				}
			}
			e.layer, e.offset = uint32(len(h.layers)), at
		}
		h.extents = join(h.extents, e)
	}
	return nil
}

// window is a part of a layer that was read at once: most blocks that are asked
// for come one after the other.
type window struct {
	layer       *layerFile
	first, next uint64 // what it holds
	ahead       uint64 // how many blocks were read
	buf         []byte
}

// maxAhead is how many blocks a window holds at most: 256 KiB.
const maxAhead = 64

// block returns a block of l, of which limit follow one another.
func (w *window) block(l *layerFile, block, limit uint64) ([]byte, error) {
	if w.layer != l || block < w.first || block >= w.next {
		if w.layer == l && block == w.next {
			w.ahead = min(2*w.ahead, maxAhead)
		} else {
			w.ahead = 1
		}
		if w.buf == nil {
			w.buf = make([]byte, maxAhead*BlockSize)
		}
		n := min(w.ahead, limit)
		if _, err := l.file.ReadAt(w.buf[:n*BlockSize], int64(block)*BlockSize); err != nil {
			w.layer = nil
			return nil, fmt.Errorf("read layer %s: %w", l.id, err)
		}
		w.layer, w.first, w.next = l, block, block+n
	}
	at := (block - w.first) * BlockSize
	return w.buf[at : at+BlockSize], nil
}

// has tells whether the first block of e, which lies in l, has the given data.
// What the checksum says is believed when it says no: a guest can make data of
// any checksum. A block that is damaged is not the same as anything.
func (l *layerFile) has(data []byte, e extent, old *window) (bool, error) {
	if crc32.Checksum(data, castagnoli) != l.sum(e.offset) {
		return false, nil
	}
	have, err := old.block(l, e.offset, e.count)
	return bytes.Equal(data, have), err
}

// merge writes all that m has above the layers to keep to one new layer in
// dir. When none is kept every block has its own place in it. The memory that
// it uses does not depend on how much that is, but for the checksums.
func (m *Image) merge(ctx context.Context, dir string, keep int) (*header, *layerFile, error) {
	w, err := newLayerWriter(dir)
	if err != nil {
		return nil, nil, err
	}
	defer w.close()
	h := &header{blocks: m.h.blocks, layers: slices.Clone(m.h.layers[:keep])}
	buf := make([]byte, chunkBytes)
	for _, e := range m.h.extents {
		if e.layer < uint32(keep) {
			h.extents = join(h.extents, e)
			continue
		}
		if keep == 0 {
			if err := w.skipTo(e.first); err != nil {
				return nil, nil, err
			}
		}
		h.extents = join(h.extents, extent{first: e.first, count: e.count, layer: uint32(keep), offset: w.blocks})
		for p, err := range m.read(ctx, e, buf) {
			if err == nil {
				err = w.write(p.data)
			}
			if err != nil {
				return nil, nil, fmt.Errorf("merge layers: %w", err)
			}
		}
	}
	if keep == 0 {
		if err := w.skipTo(m.h.blocks); err != nil {
			return nil, nil, err
		}
	}
	l, err := w.finish()
	if err != nil {
		return nil, nil, err
	}
	h.layers = append(h.layers, l.layer)
	return h, l, nil
}

// checkPage returns an error for a page that cannot come after block last.
func checkPage(p Page, blocks uint64, last int64) error {
	if len(p.Data) != BlockSize || p.Block >= blocks || int64(p.Block) <= last {
		return fmt.Errorf("page %d of %d bytes after page %d of %d", p.Block, len(p.Data), last, blocks)
	}
	return nil
}

// writeHeader writes h to dir, and makes all that is in dir outlast a crash.
func writeHeader(dir string, h *header) error {
	if err := h.check(); err != nil {
		return err
	}
	if err := atomicfile.Create(filepath.Join(dir, headerFile), h.encode(), 0o400); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return nil
}
