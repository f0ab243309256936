package memory

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/sparse"
)

// layerFile is a layer that is open for reading.
type layerFile struct {
	layer
	file *os.File
	sums []byte // the table of checksums
}

func layerName(dir string, id uuid.UUID) string { return filepath.Join(dir, id.String()+layerExt) }

// openLayer opens l's file in dir and reads its table.
func openLayer(dir string, l layer) (_ *layerFile, err error) {
	f, err := os.Open(layerName(dir, l.id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: layer %s is missing", ErrCorrupt, l.id)
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != l.size() {
		return nil, fmt.Errorf("%w: layer %s has %d bytes instead of %d", ErrCorrupt, l.id, info.Size(), l.size())
	}
	sums := make([]byte, l.blocks*sumBytes)
	if _, err := f.ReadAt(sums, int64(l.blocks)*BlockSize); err != nil {
		return nil, err
	}
	if crc32.Checksum(sums, castagnoli) != l.crc {
		return nil, fmt.Errorf("%w: wrong checksum of layer %s's table", ErrCorrupt, l.id)
	}
	return &layerFile{l, f, sums}, nil
}

// sum returns the CRC-32C that a block must have.
func (l *layerFile) sum(block uint64) uint32 {
	return binary.LittleEndian.Uint32(l.sums[block*sumBytes:])
}

// read fills p with the layer's blocks from the given one on.
func (l *layerFile) read(p []byte, block uint64) error {
	if _, err := l.file.ReadAt(p, int64(block)*BlockSize); err != nil {
		return fmt.Errorf("read layer %s: %w", l.id, err)
	}
	for ; len(p) > 0; p, block = p[BlockSize:], block+1 {
		if crc32.Checksum(p[:BlockSize], castagnoli) != l.sum(block) {
			return fmt.Errorf("%w: wrong checksum of layer %s's block %d", ErrCorrupt, l.id, block)
		}
	}
	return nil
}

// link links the layer's file into dir. If that is impossible, because dir is on another
// file system or the file has lost its last name, link copies it.
func (l *layerFile) link(ctx context.Context, dir string) (err error) {
	name := layerName(dir, l.id)
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", l.file.Fd()), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EMLINK), errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOENT):
	default:
		return fmt.Errorf("link layer: %w", err)
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o400)
	if err != nil {
		return fmt.Errorf("copy layer: %w", err)
	}
	if err := errors.Join(sparse.Copy(ctx, f, l.file), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("copy layer: %w", err)
	}
	return nil
}

// layerWriter writes a layer's file.
type layerWriter struct {
	id     uuid.UUID
	file   *os.File
	buf    *bufio.Writer
	blocks uint64 // written or skipped so far
	sums   []byte // their checksums
}

func newLayerWriter(dir string) (*layerWriter, error) {
	id := uuid.New()
	f, err := os.OpenFile(layerName(dir, id), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o400)
	if err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	return &layerWriter{id: id, file: f, buf: bufio.NewWriterSize(f, 1<<20)}, nil
}

// write appends blocks.
func (w *layerWriter) write(b []byte) error {
	if _, err := w.buf.Write(b); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	for ; len(b) > 0; b = b[BlockSize:] {
		w.sums = binary.LittleEndian.AppendUint32(w.sums, crc32.Checksum(b[:BlockSize], castagnoli))
		w.blocks++
	}
	return nil
}

// skipTo leaves a hole up to the given block.
func (w *layerWriter) skipTo(block uint64) error {
	if block == w.blocks {
		return nil
	}
	w.sums = append(w.sums, make([]byte, (block-w.blocks)*sumBytes)...)
	w.blocks = block
	return w.seek(int64(block) * BlockSize)
}

func (w *layerWriter) seek(offset int64) error {
	if err := w.buf.Flush(); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	if _, err := w.file.Seek(offset, 0); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	return nil
}

// finish writes the table and returns the layer, which takes over the file. It does not
// sync.
func (w *layerWriter) finish() (*layerFile, error) {
	l := layer{id: w.id, blocks: w.blocks, crc: crc32.Checksum(w.sums, castagnoli)}
	for at := 0; at < len(w.sums); {
		part := w.sums[at:min(at+BlockSize, len(w.sums))]
		at += len(part)
		var err error
		if isZero(part) { // the checksums of a hole
			err = w.seek(int64(l.blocks)*BlockSize + int64(at))
		} else if _, err = w.buf.Write(part); err != nil {
			err = fmt.Errorf("write layer: %w", err)
		}
		if err != nil {
			return nil, err
		}
	}
	err := w.buf.Flush()
	if err == nil {
		err = w.file.Truncate(l.size()) // a hole at the end
	}
	if err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	f := w.file
	w.file = nil
	return &layerFile{l, f, w.sums}, nil
}

// close closes the file of a layer that was not finished.
func (w *layerWriter) close() {
	if w.file != nil {
		w.file.Close()
	}
}
