// Package disk makes and reads sandboxes' disks, which are layers over a template's file
// system. Guests write only to the highest layer. A [Format] stores a layer in a file.
package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/wrenn-dev/wrenn/internal/agent/sparse"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// ErrNoSpace means that the file system has less than Reserve free.
var ErrNoSpace = errors.New("no space left for a sandbox's disk")

// Reserve is the number of bytes that must be free before a new disk is made, because
// layers grow and a full file system stops all guests.
const Reserve = 1 << 30

// Format stores layers of disks in files. A layer's file does not name the layer below,
// so that a guest's disk contains no path of the host. Whoever opens it names it.
type Format interface {
	// Name is the format's name and the extension of its files. It never changes.
	Name() string
	// Create writes an empty layer, of a disk of size bytes, to the empty file f.
	Create(f *os.File, size int64) error
	// Open opens the layer in f, whose length is end bytes. The caller closes f after the
	// last use of the layer. A guest that took over its monitor may have written f, so
	// Open or [Layer.At] returns [ErrCorrupt] for content that no monitor writes.
	Open(f *os.File, end int64) (Layer, error)
}

// Layer is a layer that is open for reading. It is safe for concurrent use.
type Layer interface {
	// Size is the size of the disk in bytes.
	Size() int64
	// At returns the kind of content at off, which must be below Size, and the number of
	// bytes of that kind from there, n at most. [Data] is at pos in the file.
	At(off, n int64) (what Content, pos, run int64, err error)
}

// Content is a kind of content of a layer.
type Content int

// The kinds of content.
const (
	Nothing Content = iota // that of the layer below
	Hole                   // zeros
	Data
)

// Create makes an empty layer at path for a disk of size bytes. Only the user uid can
// read it.
func Create(format Format, path string, size int64, uid int) (err error) {
	if size <= 0 || size%512 != 0 {
		return fmt.Errorf("make layer: size of %d bytes is not a positive multiple of 512", size)
	}
	if err := checkSpace(filepath.Dir(path)); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("make layer: %w", err)
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(fmt.Errorf("make layer: %w", err), os.Remove(path))
		}
	}()
	if err := format.Create(f, size); err != nil {
		return err
	}
	return f.Chown(uid, uid)
}

// Allocated returns the bytes that the file at path takes on the host's disk.
func Allocated(path string) (int64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, fmt.Errorf("measure disk: %w", err)
	}
	return sparse.Allocated(info), nil
}

func checkSpace(dir string) error {
	free, err := room.Of(dir)()
	if err != nil {
		return err
	}
	if free < Reserve {
		return fmt.Errorf("%w: %d MiB are free, but %d MiB must stay free", ErrNoSpace, free>>20, Reserve>>20)
	}
	return nil
}
