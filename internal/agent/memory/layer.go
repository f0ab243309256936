package memory

import (
	"bufio"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"os"

	"github.com/google/uuid"
)

// layerWriter writes a layer's file, under a temporary name until it is whole.
type layerWriter struct {
	dir    string
	file   *os.File
	buf    *bufio.Writer
	sum    hash.Hash32
	blocks uint64 // written or skipped so far
}

func newLayerWriter(dir string) (*layerWriter, error) {
	f, err := os.CreateTemp(dir, tmpPrefix)
	if err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	return &layerWriter{dir: dir, file: f, buf: bufio.NewWriterSize(f, 1<<20), sum: crc32.New(castagnoli)}, nil
}

// write adds a block.
func (w *layerWriter) write(b []byte) error {
	if _, err := w.buf.Write(b); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	_, _ = w.sum.Write(b) // never fails
	w.blocks++
	return nil
}

// skipTo leaves a hole up to a block.
func (w *layerWriter) skipTo(block uint64) error {
	if block == w.blocks {
		return nil
	}
	if err := w.buf.Flush(); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	if _, err := w.file.Seek(int64(block)*BlockSize, 0); err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	for ; w.blocks < block; w.blocks++ {
		_, _ = w.sum.Write(zeros[:])
	}
	return nil
}

// finish gives the file its name, for good, and returns what the header must
// know of it.
func (w *layerWriter) finish() (layer, error) {
	l := layer{id: uuid.New(), blocks: w.blocks, crc: w.sum.Sum32()}
	err := w.buf.Flush()
	if err == nil {
		err = w.file.Truncate(int64(w.blocks) * BlockSize) // a hole at the end
	}
	if err == nil {
		err = w.file.Chmod(0o400)
	}
	err = errors.Join(err, w.file.Sync(), w.file.Close())
	if err == nil {
		err = os.Rename(w.file.Name(), layerName(w.dir, l.id))
	}
	if err == nil {
		w.file = nil
		err = syncDir(w.dir)
	}
	if err != nil {
		return layer{}, fmt.Errorf("write layer: %w", err)
	}
	return l, nil
}

// discard removes what was not finished.
func (w *layerWriter) discard() {
	if w.file != nil {
		w.file.Close()
		_ = os.Remove(w.file.Name()) // else the next sweep does
	}
}
