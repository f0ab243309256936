package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// ErrCorrupt means that a layer has content that no monitor writes to a layer from
// [Create]. A guest that took over its monitor may have written it.
var ErrCorrupt = errors.New("overlay is damaged")

// Qcow2 is QEMU's format.
var Qcow2 Format = qcow2Format{}

type qcow2Format struct{}

// Name implements Format.
func (qcow2Format) Name() string { return "qcow2" }

// Create implements Format.
func (qcow2Format) Create(f *os.File, size int64) error {
	image, length := emptyQcow2(size)
	if _, err := f.Write(image); err != nil {
		return err
	}
	return f.Truncate(length)
}

// Open implements Format.
func (qcow2Format) Open(f *os.File, end int64) (Layer, error) {
	q := &qcow2{file: f, end: end, index: -1}
	if err := q.readHeader(); err != nil {
		return nil, err
	}
	return q, nil
}

const (
	magic       = "QFI\xfb"
	clusterBits = 16
	clusterSize = 1 << clusterBits
	tableLength = clusterSize / 8           // entries of an L2 table
	perTable    = tableLength * clusterSize // bytes of the disk that an L2 table maps

	// maxSize bounds the size of a disk, and so of L1 tables: 8 bytes for each 512 MiB.
	maxSize = 64 << 40

	offsetMask = 0x00ff_ffff_ffff_fe00 // bits of an L1 or L2 entry
	copied     = 1 << 63
	compressed = 1 << 62 // L2
	allZero    = 1       // L2

	featureDirty = 1 << 0 // reference counts may be wrong; readers do not use them
)

// qcow2 is a layer that is open for reading. It supports the subset of QEMU's
// docs/interop/qcow2.txt that QEMU uses in a layer made by Create.
type qcow2 struct {
	file *os.File
	end  int64    // length of the file
	size int64    // size of the disk
	l1   []uint64 // entries

	mu     sync.Mutex
	index  int // L1 index of the table in l2; -1: none
	l2     [tableLength]uint64
	buffer [clusterSize]byte
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

// readHeader reads the header (its fields are listed at emptyQcow2) and the L1
// table.
func (q *qcow2) readHeader() error {
	var h [104]byte
	if _, err := q.file.ReadAt(h[:], 0); errors.Is(err, io.EOF) {
		return corrupt("too short for a header")
	} else if err != nil {
		return err
	}
	be := binary.BigEndian
	if string(h[:4]) != magic {
		return corrupt("not a qcow2 image")
	}
	features := be.Uint64(h[72:])
	size := be.Uint64(h[24:])
	switch {
	case be.Uint32(h[4:]) != 3:
		return corrupt("version %d", be.Uint32(h[4:]))
	case be.Uint64(h[8:]) != 0 || be.Uint32(h[16:]) != 0:
		return corrupt("it names a backing file")
	case be.Uint32(h[20:]) != clusterBits:
		return corrupt("clusters of 2^%d bytes", be.Uint32(h[20:]))
	case size == 0 || size%512 != 0 || size > maxSize:
		return corrupt("disk of %d bytes", size)
	case be.Uint32(h[32:]) != 0:
		return corrupt("it is encrypted")
	case be.Uint32(h[60:]) != 0:
		return corrupt("it has %d snapshots", be.Uint32(h[60:]))
	case features&^featureDirty != 0:
		return corrupt("incompatible features %#x", features)
	case be.Uint32(h[96:]) != 4:
		return corrupt("reference counts of 2^%d bits", be.Uint32(h[96:]))
	case be.Uint32(h[100:]) < 104 || be.Uint32(h[100:]) > clusterSize:
		return corrupt("header of %d bytes", be.Uint32(h[100:]))
	}
	q.size = int64(size)
	entries := (size + perTable - 1) / perTable
	if n := be.Uint32(h[36:]); uint64(n) < entries {
		return corrupt("L1 table of %d entries for %d bytes", n, size)
	}
	at := be.Uint64(h[40:])
	if at == 0 || at%clusterSize != 0 || at > uint64(q.end) || entries*8 > uint64(q.end)-at {
		return corrupt("L1 table at %#x", at)
	}
	table := make([]byte, entries*8)
	if _, err := q.file.ReadAt(table, int64(at)); err != nil {
		return err
	}
	q.l1 = make([]uint64, entries)
	for i := range q.l1 {
		q.l1[i] = be.Uint64(table[i*8:])
	}
	return nil
}

// Size implements Layer.
func (q *qcow2) Size() int64 { return q.size }

// At implements Layer.
func (q *qcow2) At(off, n int64) (what Content, pos, run int64, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	index := int(off / perTable)
	within := off % perTable
	n = min(n, perTable-within, q.size-off)
	if q.l1[index]&^copied == 0 {
		return Nothing, 0, n, nil
	}
	if err := q.load(index); err != nil {
		return 0, 0, 0, err
	}
	i := within / clusterSize
	inside := within % clusterSize
	what, start, err := q.entry(index, i)
	if err != nil {
		return 0, 0, 0, err
	}
	run = clusterSize - inside
	for next := start + clusterSize; run < n; next += clusterSize {
		i++
		w, p, err := q.entry(index, i)
		if err != nil || w != what || w == Data && p != next {
			break // the call that reaches an error returns it
		}
		run += clusterSize
	}
	return what, start + inside, min(run, n), nil
}

// load reads the L2 table of an L1 entry, unless it is loaded.
func (q *qcow2) load(index int) error {
	if index == q.index {
		return nil
	}
	e := q.l1[index]
	at := int64(e & offsetMask)
	if e&^(offsetMask|copied) != 0 || at%clusterSize != 0 || at > q.end-clusterSize {
		return corrupt("entry %d of L1 is %#x", index, e)
	}
	q.index = -1
	if _, err := q.file.ReadAt(q.buffer[:], at); err != nil {
		return err
	}
	for i := range q.l2 {
		q.l2[i] = binary.BigEndian.Uint64(q.buffer[i*8:])
	}
	q.index = index
	return nil
}

// entry decodes entry i of the loaded L2 table.
func (q *qcow2) entry(table int, i int64) (what Content, pos int64, err error) {
	e := q.l2[i]
	pos = int64(e & offsetMask)
	switch {
	case e&compressed != 0:
		return 0, 0, corrupt("entry %d of L2 table %d is compressed", i, table)
	case e&^(offsetMask|copied|allZero) != 0, pos%clusterSize != 0:
		return 0, 0, corrupt("entry %d of L2 table %d is %#x", i, table, e)
	case e&allZero != 0: // it may have a preallocated cluster
		return Hole, 0, nil
	case pos == 0:
		return Nothing, 0, nil
	case pos >= q.end: // the last cluster may extend past the end of the file, where it is zero
		return 0, 0, corrupt("entry %d of L2 table %d is past the end of the file", i, table)
	}
	return Data, pos, nil
}

// openRegular opens a file for reading and returns its length.
func openRegular(path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, info.Size(), nil
}

// emptyQcow2 returns the beginning of an empty qcow2 image for a disk of size bytes, and
// the length of the file, whose remainder is zero. The format is QEMU's
// docs/interop/qcow2.txt; all numbers are big-endian.
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
	const cluster = clusterSize
	entries := (size + perTable - 1) / perTable
	l1Clusters := (entries*8 + cluster - 1) / cluster
	clusters := 3 + l1Clusters

	image = make([]byte, 3*cluster)
	be := binary.BigEndian
	copy(image, magic)
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
