// Package disk makes sandboxes' disks: qcow2 overlays over templates' file
// systems, which are never written to.
package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/wrenn-dev/wrenn/internal/agent/sparse"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// ErrNoSpace is returned when the file system has less than Reserve free.
var ErrNoSpace = errors.New("no space left for a sandbox's disk")

// Reserve is how many bytes must be free for a disk to be made: overlays grow
// as their guests write, and a file system that is full stops them all.
const Reserve = 1 << 30

const clusterBits = 16

// CreateOverlay makes an empty qcow2 overlay at path with the given virtual
// size in bytes, owned by uid and by nobody else readable. What lies below it
// is named by whoever opens it, not in the file: a guest's disk holds no path
// of the host.
func CreateOverlay(path string, size int64, uid int) (err error) {
	if size <= 0 || size%512 != 0 {
		return fmt.Errorf("make overlay: size of %d bytes is not a number of sectors", size)
	}
	if err := checkSpace(filepath.Dir(path)); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("make overlay: %w", err)
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(fmt.Errorf("make overlay: %w", err), os.Remove(path))
		}
	}()
	image, length := emptyQcow2(size)
	if _, err := f.Write(image); err != nil {
		return err
	}
	if err := f.Truncate(length); err != nil {
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

// emptyQcow2 is the beginning of an empty qcow2 image of the given virtual
// size, and the length that the file must have: what follows is zeros. The
// format is QEMU's docs/interop/qcow2.txt; all numbers are big-endian.
//
//	cluster 0   header, version 3: the fields below
//	cluster 1   refcount table: one entry, the offset of cluster 2
//	cluster 2   refcount block: 16-bit counts, 1 for every cluster here
//	cluster 3…  L1 table: 8 bytes for each 512 MiB of the disk, all 0
//
//	byte  0  "QFI\xfb"           48  refcount table's offset
//	      4  version, 3          56  refcount table's clusters
//	      8  backing file, none  60  snapshots, 0
//	     20  bits of a cluster   72  incompatible features, 0
//	     24  size                80  compatible features, 0
//	     32  encryption, none    88  autoclear features, 0
//	     36  entries of L1       96  refcount order, 4 (16 bits)
//	     40  L1's offset        100  header's length
func emptyQcow2(size int64) (image []byte, length int64) {
	const cluster = 1 << clusterBits
	const perL1 = cluster / 8 * cluster // bytes of disk that an entry of L1 maps
	entries := (size + perL1 - 1) / perL1
	l1Clusters := (entries*8 + cluster - 1) / cluster
	clusters := 3 + l1Clusters

	image = make([]byte, 3*cluster)
	be := binary.BigEndian
	copy(image, "QFI\xfb")
	be.PutUint32(image[4:], 3)
	be.PutUint32(image[20:], clusterBits)
	be.PutUint64(image[24:], uint64(size))
	be.PutUint32(image[36:], uint32(entries))
	be.PutUint64(image[40:], 3*cluster)
	be.PutUint64(image[48:], 1*cluster)
	be.PutUint32(image[56:], 1)
	be.PutUint32(image[96:], 4)
	be.PutUint32(image[100:], 104)
	be.PutUint64(image[cluster:], 2*cluster)
	for i := range clusters {
		be.PutUint16(image[2*cluster+2*i:], 1)
	}
	return image, clusters * cluster
}
