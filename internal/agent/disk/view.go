package disk

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"github.com/wrenn-dev/wrenn/internal/agent/sparse"
)

// Chain names the files that make up a sandbox's disk.
type Chain struct {
	Base   string   // raw image below all layers
	Format Format   // format of the layers
	Layers []string // lowest first
	Size   int64    // of the disk in bytes; the highest layer must have this size
}

// View reads a disk, to which nobody may write while it is open. It is safe for
// concurrent use.
type View struct {
	base   *os.File
	end    int64 // length of base
	layers []openLayer
	size   int64
}

// openLayer is a layer and its file.
type openLayer struct {
	Layer
	file *os.File
}

// Open opens a disk for reading. Content past the end of a layer, or of the base, is
// zero. Open or a later read returns [ErrCorrupt] for a layer that no monitor can have
// written.
func Open(c Chain) (*View, error) {
	if c.Size <= 0 || c.Size > maxSize {
		return nil, fmt.Errorf("open disk: size of %d bytes", c.Size)
	}
	base, end, err := openRegular(c.Base)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	v := &View{base: base, end: end, size: c.Size}
	for _, path := range c.Layers {
		f, end, err := openRegular(path)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open disk: %w", err), v.Close())
		}
		l, err := c.Format.Open(f, end)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open disk: read %s: %w", path, err), f.Close(), v.Close())
		}
		v.layers = append(v.layers, openLayer{l, f})
	}
	if n := len(v.layers); n > 0 && v.layers[n-1].Size() != c.Size {
		err := corrupt("highest layer has a disk of %d bytes instead of %d", v.layers[n-1].Size(), c.Size)
		return nil, errors.Join(fmt.Errorf("open disk: %w", err), v.Close())
	}
	return v, nil
}

// Close closes the disk's files.
func (v *View) Close() error {
	err := v.base.Close()
	for _, l := range v.layers {
		err = errors.Join(err, l.file.Close())
	}
	return err
}

// Size returns the disk's size in bytes.
func (v *View) Size() int64 { return v.size }

// at finds the content at off, which must be below Size. It returns the file that has
// it, nil for zeros, the position there, and the number of bytes, n at most.
func (v *View) at(off, n int64) (f *os.File, pos, run int64, err error) {
	n = min(n, v.size-off)
	for i := len(v.layers) - 1; i >= 0; i-- {
		l := v.layers[i]
		if off >= l.Size() {
			return nil, 0, n, nil
		}
		what, pos, run, err := l.At(off, n)
		if err != nil {
			return nil, 0, 0, err
		}
		switch what {
		case Hole:
			return nil, 0, run, nil
		case Data:
			return l.file, pos, run, nil
		case Nothing: // look in the layer below
		}
		n = run
	}
	if off >= v.end {
		return nil, 0, n, nil
	}
	return v.base, off, min(n, v.end-off), nil
}

// ReadAt implements io.ReaderAt.
func (v *View) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, errors.New("read disk: negative offset")
	}
	for n < len(p) {
		at := off + int64(n)
		if at >= v.size {
			return n, io.EOF
		}
		f, pos, run, err := v.at(at, int64(len(p)-n))
		if err != nil {
			return n, fmt.Errorf("read disk: %w", err)
		}
		part := p[n:][:run]
		if f == nil {
			clear(part)
		} else if got, err := f.ReadAt(part, pos); errors.Is(err, io.EOF) {
			clear(part[got:])
		} else if err != nil {
			return n, fmt.Errorf("read disk: %w", err)
		}
		n += len(part)
	}
	return n, nil
}

// Data yields the parts of the disk that may not be zero, in order. It ends after the
// first error.
func (v *View) Data() iter.Seq2[sparse.Range, error] {
	return func(yield func(sparse.Range, error) bool) {
		for off := int64(0); off < v.size; {
			f, _, run, err := v.at(off, v.size-off)
			if err != nil {
				yield(sparse.Range{}, fmt.Errorf("read disk: %w", err))
				return
			}
			here := sparse.Range{Start: off, End: off + run}
			off += run
			switch f {
			case nil:
			case v.base:
				for r, err := range sparse.Data(f, here) {
					if err != nil {
						yield(sparse.Range{}, fmt.Errorf("read disk: %w", err))
						return
					}
					if !yield(r, nil) {
						return
					}
				}
			default:
				if !yield(here, nil) {
					return
				}
			}
		}
	}
}
