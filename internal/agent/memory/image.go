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

// MaxGenerations is the maximum number of layers of an image above those of its base. If
// there would be one more, Append merges them.
const MaxGenerations = 8

// Bounds for the size of an image's layers, as multiples of the memory's size. If those
// above the base exceed ownSpread, Append merges them; if all exceed allSpread, it merges
// all, because by then guests have written as much as the merge writes.
const ownSpread, allSpread = 2, 6

// thin: if an image uses at most one in thin of a layer's blocks, a pause copies them to the
// new layer and drops the old one, whose other blocks waste space.
const thin = 8

const (
	headerFile = "header"
	layerExt   = ".mem"

	// chunkBytes is the number of bytes of a layer that are read at a time.
	chunkBytes = 256 << 10
)

// Page is one block of memory.
type Page struct {
	Block uint64
	Data  []byte // BlockSize bytes, read-only, valid until the next page
}

// Pages yields pages of memory sorted by block. It ends after the first error.
type Pages = iter.Seq2[Page, error]

// Image is a memory image that is open for reading. It is immutable, also on disk: Append
// writes a new one to another folder. It keeps its files open, so its folder can be renamed
// or removed. Its methods return [ErrCorrupt] for damaged blocks.
type Image struct {
	h      *header
	layers []*layerFile // files of h.layers
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

// Size returns the memory's size in bytes.
func (m *Image) Size() int64 { return int64(m.h.blocks) * BlockSize }

// Generations returns the number of the image's layers, including those of its base.
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

// part is a run of blocks and their content.
type part struct {
	first uint64
	data  []byte
}

// read yields the blocks of e, which must not be zeros, in parts. It reads each part into
// buf.
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

// ChangedFrom yields the pages that differ from base, including pages that became zero.
// Written over base's memory, they make it m's. A nil base is all zeros. Because it
// compares only headers, it also yields equal pages that m and base do not share.
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

// BytesChangedFrom returns the number of bytes that [Image.ChangedFrom] yields. base must
// have the same size.
func (m *Image) BytesChangedFrom(base *Image) int64 {
	var blocks uint64
	for e := range m.h.differing(base.h) {
		blocks += e.count
	}
	return int64(blocks) * BlockSize
}

// differing yields the parts of h's extents that other, which must have as many blocks,
// maps elsewhere.
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

// Create writes a new image of size bytes to dir, which must exist and be empty: the given
// pages, and zeros elsewhere. Everything is synced when it returns. After an error, dir is
// empty.
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

// Append writes m with the given pages (nil: none) laid over it, as a new image, to dir,
// which must exist and be empty. Only pages that differ from m's and are not zero take
// space. The images share layers as links to the same files.
//
// base is the image that m was made from (nil: none). Append merges the layers that they
// share only if there are too many or all take too much space, so that all images made
// from base share its pages.
//
// Append does not change m or its folder. Everything in dir is synced when it returns; the
// caller must sync dir's parent. After an error, dir is empty.
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
	defer func() { // a merged layer may replace it
		if fresh != nil {
			fresh.file.Close()
		}
	}()
	known := m.layers
	if fresh != nil {
		known = append(slices.Clone(known), fresh)
	}
	h.prune(max(keep, 1)) // generation 0 is flat and must stay first
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
		g.Go(fresh.file.Sync) // parallel to the header's sync
	}
	if err := errors.Join(m.finish(ctx, dir, h), g.Wait()); err != nil {
		return nil, err
	}
	return Open(dir)
}

// finish links the layers of m that h uses into dir, and writes h.
func (m *Image) finish(ctx context.Context, dir string, h *header) error {
	for _, l := range ordered(h, m.layers) {
		if l == nil {
			continue // the new layer, which is in dir
		}
		if err := l.link(ctx, dir); err != nil {
			return err
		}
	}
	return writeHeader(dir, h)
}

// ordered returns the files of h's layers, in order, with nil for those not in files.
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

// write writes the pages that differ from m's to a new layer in dir, together with the used
// blocks of thin layers from the given one on. It returns the new header and the layer,
// which is nil if it would be empty. Generation 0 is flat: each block is at its own offset.
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

// takeOver copies the used blocks of thin layers, among those from the given one on, to w,
// which becomes h's next layer, and makes h map them there.
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
					return fmt.Errorf("copy blocks of thin layers: %w", err)
				}
			}
			e.layer, e.offset = uint32(len(h.layers)), at
		}
		h.extents = join(h.extents, e)
	}
	return nil
}

// window is a read-ahead buffer for a layer, because most reads are sequential.
type window struct {
	layer       *layerFile
	first, next uint64 // it has the blocks from first up to next
	ahead       uint64 // number of blocks to read ahead
	buf         []byte
}

// maxAhead is the maximum number of blocks in a window: 256 KiB.
const maxAhead = 64

// block returns a block of l. limit is the number of blocks from there on that may be read.
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

// has reports whether the first block of e, which is in l, equals data. Equal checksums do
// not suffice, because a guest can produce any checksum. A damaged block equals nothing.
func (l *layerFile) has(data []byte, e extent, old *window) (bool, error) {
	if crc32.Checksum(data, castagnoli) != l.sum(e.offset) {
		return false, nil
	}
	have, err := old.block(l, e.offset, e.count)
	return bytes.Equal(data, have), err
}

// merge merges m's layers, except the first keep ones, to one new layer in dir. If keep is
// 0, the new layer is flat. Its use of memory does not depend on the layers' size, apart
// from the checksums.
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

// checkPage returns an error if a page is invalid or not after block last.
func checkPage(p Page, blocks uint64, last int64) error {
	if len(p.Data) != BlockSize || p.Block >= blocks || int64(p.Block) <= last {
		return fmt.Errorf("invalid page %d with %d bytes after page %d, of %d pages", p.Block, len(p.Data), last, blocks)
	}
	return nil
}

// writeHeader writes h to dir and syncs both.
func writeHeader(dir string, h *header) error {
	if err := h.check(); err != nil {
		return err
	}
	if err := atomicfile.Create(filepath.Join(dir, headerFile), h.encode(), 0o400); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return nil
}
