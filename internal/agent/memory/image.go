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
	"strings"

	"github.com/google/uuid"
)

// MaxGenerations is how many layers an image has at most: the one that would
// be one more is merged with all the others.
const MaxGenerations = 8

const (
	headerFile = "header"
	layerExt   = ".mem"
	tmpPrefix  = ".tmp-"
)

// Page is one block of memory.
type Page struct {
	Block uint64
	Data  []byte // BlockSize bytes, valid until the next page
}

// Pages are pages of memory in rising order of their blocks. An error ends them.
type Pages = iter.Seq2[Page, error]

// Image is a memory image that is open for reading. It never changes: what
// changes it makes another.
type Image struct {
	dir    string
	shared []string
	h      *header
	files  []*os.File // of the layers
}

// Open opens the image in dir. Layers that are not there are looked for in the
// shared folders: those of the templates that the image began with.
func Open(dir string, shared ...string) (*Image, error) {
	b, err := os.ReadFile(filepath.Join(dir, headerFile))
	if err != nil {
		return nil, fmt.Errorf("open memory image: %w", err)
	}
	h, err := decodeHeader(b)
	if err != nil {
		return nil, fmt.Errorf("open memory image: %w", err)
	}
	m := &Image{dir: dir, shared: shared, h: h}
	for _, l := range h.layers {
		f, err := openLayer(l, append([]string{dir}, shared...))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open memory image: %w", err), m.Close())
		}
		m.files = append(m.files, f)
	}
	return m, nil
}

func layerName(dir string, id uuid.UUID) string { return filepath.Join(dir, id.String()+layerExt) }

func openLayer(l layer, dirs []string) (*os.File, error) {
	for _, dir := range dirs {
		f, err := os.Open(layerName(dir, l.id))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if uint64(info.Size()) != l.blocks*BlockSize {
			return nil, errors.Join(fmt.Errorf("%w: layer %s has %d bytes, not %d", ErrCorrupt, l.id, info.Size(), l.blocks*BlockSize), f.Close())
		}
		return f, nil
	}
	return nil, fmt.Errorf("%w: layer %s is missing", ErrCorrupt, l.id)
}

// Close closes the image's files.
func (m *Image) Close() error {
	var errs []error
	for _, f := range m.files {
		errs = append(errs, f.Close())
	}
	m.files = nil
	return errors.Join(errs...)
}

// Size is the memory's size in bytes.
func (m *Image) Size() int64 { return int64(m.h.blocks) * BlockSize }

// Generations is how many layers the image has.
func (m *Image) Generations() int { return len(m.h.layers) }

// Base is the path of generation 0's file, which has every block at its own
// place, so that it can be mapped as the memory it was.
func (m *Image) Base() string { return m.files[0].Name() }

// ReadAt implements io.ReaderAt on the whole memory.
func (m *Image) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, errors.New("read memory image: negative offset")
	}
	for n < len(p) {
		at := off + int64(n)
		if at >= m.Size() {
			return n, io.EOF
		}
		e, _ := m.h.lookup(uint64(at) / BlockSize)
		within := at - int64(e.first)*BlockSize
		part := p[n:]
		part = part[:min(int64(len(part)), int64(e.count)*BlockSize-within)]
		if e.layer == zeroLayer {
			clear(part)
		} else if _, err := m.files[e.layer].ReadAt(part, int64(e.offset)*BlockSize+within); err != nil {
			return n, fmt.Errorf("read memory image: %w", err)
		}
		n += len(part)
	}
	return n, nil
}

// Changed are the pages that differ from generation 0: what is to be written
// over a mapping of Base to have the memory. Pages that were zeroed since are
// among them, as zeros.
func (m *Image) Changed() Pages {
	return func(yield func(Page, error) bool) {
		buf := make([]byte, BlockSize)
		for _, e := range m.h.extents {
			if e.layer == 0 {
				continue
			}
			for i := range e.count {
				data := zeros[:]
				if e.layer != zeroLayer {
					data = buf
					if _, err := m.files[e.layer].ReadAt(data, int64(e.offset+i)*BlockSize); err != nil {
						yield(Page{}, fmt.Errorf("read memory image: %w", err))
						return
					}
				}
				if !yield(Page{e.first + i, data}, nil) {
					return
				}
			}
		}
	}
}

// Verify reads every layer and compares it with its checksum.
func (m *Image) Verify(ctx context.Context) error {
	for i, l := range m.h.layers {
		sum := crc32.New(castagnoli)
		if err := copyTo(ctx, sum, io.NewSectionReader(m.files[i], 0, int64(l.blocks)*BlockSize)); err != nil {
			return fmt.Errorf("verify memory image: %w", err)
		}
		if sum.Sum32() != l.crc {
			return fmt.Errorf("verify memory image: %w: checksum of layer %s", ErrCorrupt, l.id)
		}
	}
	return nil
}

// copyTo copies with a bounded buffer, until ctx ends.
func copyTo(ctx context.Context, w io.Writer, r io.Reader) error {
	buf := make([]byte, 1<<20)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.Read(buf)
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// Create writes a new image of size bytes to dir, which must exist and have
// none: the pages given, and zeros elsewhere.
func Create(ctx context.Context, dir string, size int64, pages Pages) (*Image, error) {
	if size <= 0 || size%BlockSize != 0 || size/BlockSize > maxBlocks {
		return nil, fmt.Errorf("create memory image: size of %d bytes", size)
	}
	if _, err := os.Lstat(filepath.Join(dir, headerFile)); err == nil {
		return nil, fmt.Errorf("create memory image: %w", fs.ErrExist)
	}
	m, err := writeFlat(ctx, dir, uint64(size)/BlockSize, pages)
	if err != nil {
		return nil, fmt.Errorf("create memory image: %w", err)
	}
	return m, nil
}

// Append writes the image that m becomes when the given pages are laid over
// it, in m's folder and m's place. Of the pages only those that differ take
// space, and of them not those that are zero. m stays open, and right, until
// it is closed. When Append fails, or the machine does, m is what the folder
// holds.
func (m *Image) Append(ctx context.Context, pages Pages) (*Image, error) {
	next, err := m.append(ctx, pages)
	if err != nil {
		return nil, fmt.Errorf("append to memory image: %w", err)
	}
	if next.Generations() <= MaxGenerations {
		return next, nil
	}
	merged, err := next.Merge(ctx)
	if err != nil {
		return nil, errors.Join(err, next.Close())
	}
	return merged, next.Close()
}

func (m *Image) append(ctx context.Context, pages Pages) (_ *Image, err error) {
	w, err := newLayerWriter(m.dir)
	if err != nil {
		return nil, err
	}
	defer w.discard()
	var changes header // as a list of extents only
	place := uint32(len(m.h.layers))
	old := make([]byte, BlockSize)
	last := int64(-1)
	for p, err := range pages {
		if err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := checkPage(p, m.h.blocks, last); err != nil {
			return nil, err
		}
		last = int64(p.Block)
		e, mapped := m.h.lookup(p.Block)
		if e.layer == zeroLayer {
			if isZero(p.Data) {
				continue // was zero already
			}
		} else {
			if _, err := m.files[e.layer].ReadAt(old, int64(e.offset+p.Block-e.first)*BlockSize); err != nil {
				return nil, err
			}
			if bytes.Equal(old, p.Data) {
				continue
			}
		}
		if isZero(p.Data) {
			if mapped {
				changes.add(extent{first: p.Block, count: 1, layer: zeroLayer})
			}
			continue
		}
		changes.add(extent{first: p.Block, count: 1, layer: place, offset: w.blocks})
		if err := w.write(p.Data); err != nil {
			return nil, err
		}
	}
	h := m.h.overlay(changes.extents)
	if w.blocks > 0 {
		l, err := w.finish()
		if err != nil {
			return nil, err
		}
		h.layers = append(h.layers, l)
	}
	return m.become(h)
}

// Merge writes m as a single generation, in m's folder and m's place. Its
// memory use does not depend on the image's size.
func (m *Image) Merge(ctx context.Context) (*Image, error) {
	merged, err := writeFlat(ctx, m.dir, m.h.blocks, m.data(ctx))
	if err != nil {
		return nil, fmt.Errorf("merge memory image: %w", err)
	}
	return merged, sweep(m.dir, merged.h)
}

// data are all pages that are not zero.
func (m *Image) data(ctx context.Context) Pages {
	return func(yield func(Page, error) bool) {
		buf := make([]byte, 256*BlockSize)
		for _, e := range m.h.extents {
			if e.layer == zeroLayer {
				continue
			}
			for done := uint64(0); done < e.count; {
				if err := ctx.Err(); err != nil {
					yield(Page{}, err)
					return
				}
				part := buf[:min(uint64(len(buf)), (e.count-done)*BlockSize)]
				if _, err := m.files[e.layer].ReadAt(part, int64(e.offset+done)*BlockSize); err != nil {
					yield(Page{}, err)
					return
				}
				for len(part) > 0 {
					if !yield(Page{e.first + done, part[:BlockSize]}, nil) {
						return
					}
					part, done = part[BlockSize:], done+1
				}
			}
		}
	}
}

// become makes h the folder's header and opens it.
func (m *Image) become(h *header) (*Image, error) {
	if err := writeHeader(m.dir, h); err != nil {
		return nil, err
	}
	return Open(m.dir, m.shared...)
}

// checkPage returns an error for a page that cannot come after block last.
func checkPage(p Page, blocks uint64, last int64) error {
	if len(p.Data) != BlockSize || p.Block >= blocks || int64(p.Block) <= last {
		return fmt.Errorf("page %d of %d bytes after page %d of %d", p.Block, len(p.Data), last, blocks)
	}
	return nil
}

// writeFlat writes an image of one generation, in which every block that is
// not zero has its own place and the others are holes.
func writeFlat(ctx context.Context, dir string, blocks uint64, pages Pages) (_ *Image, err error) {
	w, err := newLayerWriter(dir)
	if err != nil {
		return nil, err
	}
	defer w.discard()
	h := &header{blocks: blocks}
	last := int64(-1)
	for p, err := range pages {
		if err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := checkPage(p, blocks, last); err != nil {
			return nil, err
		}
		last = int64(p.Block)
		if isZero(p.Data) {
			continue
		}
		if err := w.skipTo(p.Block); err != nil {
			return nil, err
		}
		if err := w.write(p.Data); err != nil {
			return nil, err
		}
		h.add(extent{first: p.Block, count: 1, offset: p.Block})
	}
	if err := w.skipTo(blocks); err != nil {
		return nil, err
	}
	l, err := w.finish()
	if err != nil {
		return nil, err
	}
	h.layers = []layer{l}
	return (&Image{dir: dir}).become(h)
}

// Sweep removes from dir what writers that were killed left there. Nobody may
// write to dir meanwhile.
func Sweep(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, headerFile))
	h := &header{}
	if err == nil {
		h, err = decodeHeader(b)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sweep memory image: %w", err)
	}
	return sweep(dir, h)
}

// sweep removes temporary files and the layers that h does not name.
func sweep(dir string, h *header) error {
	keep := map[string]bool{}
	for _, l := range h.layers {
		keep[filepath.Base(layerName(dir, l.id))] = true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sweep memory image: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) || strings.HasSuffix(e.Name(), layerExt) && !keep[e.Name()] {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("sweep memory image: %w", err)
			}
		}
	}
	return nil
}

// syncDir makes what was renamed in dir outlast a crash.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// writeHeader makes h the header in dir: from one moment to the next, and for
// good when it returns.
func writeHeader(dir string, h *header) (err error) {
	if err := h.check(); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, tmpPrefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(h.encode())
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, headerFile)); err != nil {
		return err
	}
	return syncDir(dir)
}
