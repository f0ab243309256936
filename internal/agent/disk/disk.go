// Package disk makes and reads sandboxes' disks: layers over templates' file
// systems, of which only the highest is written to. How a layer is stored is a
// [Format].
package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/wrenn-dev/wrenn/internal/agent/sparse"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// ErrNoSpace is returned when the file system has less than Reserve free.
var ErrNoSpace = errors.New("no space left for a sandbox's disk")

// Reserve is how many bytes must be free for a disk to be made: layers grow
// as their guests write, and a file system that is full stops them all.
const Reserve = 1 << 30

// Format is a way to store a layer of a disk in a file. A layer does not name
// what lies below it: whoever opens it does, so that a guest's disk holds no path
// of the host.
type Format interface {
	// Name is also the extension of the names of layers' files. It never changes.
	Name() string
	// Create writes an empty layer, of a disk of size bytes, to the empty file f.
	Create(f *os.File, size int64) error
	// Open opens the layer in f, whose length is end bytes. The caller closes f after
	// the last use of the layer. A guest may have written f: Open or [Layer.At] returns
	// [ErrCorrupt] if a monitor would not have.
	Open(f *os.File, end int64) (Layer, error)
}

// Layer is a layer that is open for reading. It is safe for concurrent use.
type Layer interface {
	// Size is the size of the disk in bytes.
	Size() int64
	// At returns what the layer has at off, which is below Size, and for how many
	// bytes that goes on, n at most. [Data] is at pos in the file.
	At(off, n int64) (what Content, pos, run int64, err error)
}

// Content is what a layer has in a place.
type Content int

// The kinds of content.
const (
	Nothing Content = iota // what lies below shows
	Hole                   // zeros
	Data
)

// Create makes an empty layer at path, for a disk of size bytes, owned by uid and
// by nobody else readable.
func Create(format Format, path string, size int64, uid int) (err error) {
	if size <= 0 || size%512 != 0 {
		return fmt.Errorf("make layer: size of %d bytes is not a number of sectors", size)
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

// Allocated returns how many bytes the file at path takes on the host's disk.
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
		return fmt.Errorf("%w: %d MiB are free, %d MiB are kept in reserve", ErrNoSpace, free>>20, Reserve>>20)
	}
	return nil
}
