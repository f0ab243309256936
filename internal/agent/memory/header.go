// Package memory stores the memory of virtual machines as images. An image is a header and
// layers, each with the pages that changed from one pause to the next.
//
// docs/formats.md specifies the files.
package memory

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sort"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
)

// BlockSize is the size of a block of memory in bytes, a page of x86-64.
const BlockSize = 4096

// ErrCorrupt means that an image's files are damaged.
var ErrCorrupt = errors.New("memory image is damaged")

const (
	magic = "WRNMEMH\x00"

	headerBytes = 32
	layerBytes  = 32
	extentBytes = 24
	sumBytes    = 4 // a block's checksum in its layer's table

	// maxBlocks is 16 TiB of memory. maxLayers and maxExtents keep a damaged header from
	// making the agent allocate too much memory.
	maxBlocks  = 1 << 32
	maxLayers  = 64
	maxExtents = 1 << 26

	// zeroLayer is the layer of extents of zeros, which exist only in RAM. On disk, blocks
	// without an extent are zero.
	zeroLayer = math.MaxUint32
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// layer is one file of blocks.
type layer struct {
	id     uuid.UUID
	blocks uint64 // number of blocks in its file
	crc    uint32 // CRC-32C of its table, which has the CRC-32C of each block
}

// size returns the length of the layer's file in bytes.
func (l layer) size() int64 { return int64(l.blocks) * (BlockSize + sumBytes) }

// extent maps count blocks from first on to blocks of a layer's file from offset on.
type extent struct {
	first, count uint64
	layer        uint32
	offset       uint64
}

func (e extent) end() uint64 { return e.first + e.count }

// header maps every block of a memory to a block of a layer, or to zero if no extent has
// it. Extents are sorted, do not overlap and are as long as possible.
type header struct {
	blocks  uint64
	layers  []layer
	extents []extent
}

// encode encodes the header for the disk.
func (h *header) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, headerBytes+len(h.layers)*layerBytes+len(h.extents)*extentBytes+4)
	b = append(b, magic...)
	b = le.AppendUint32(b, uint32(format.Memory.Version))
	b = le.AppendUint32(b, BlockSize)
	b = le.AppendUint64(b, h.blocks)
	b = le.AppendUint32(b, uint32(len(h.layers)))
	b = le.AppendUint32(b, uint32(len(h.extents)))
	for _, l := range h.layers {
		b = append(b, l.id[:]...)
		b = le.AppendUint64(b, l.blocks)
		b = le.AppendUint32(b, l.crc)
		b = le.AppendUint32(b, 0)
	}
	for _, e := range h.extents {
		b = le.AppendUint64(b, e.first)
		b = le.AppendUint32(b, uint32(e.count))
		b = le.AppendUint32(b, e.layer)
		b = le.AppendUint64(b, e.offset)
	}
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// Check returns a [format.NewerError] if a later release wrote the memory image in dir. It
// reads only the version.
func Check(dir string) error {
	path := filepath.Join(dir, headerFile)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, len(magic)+4)
	if _, err := io.ReadFull(f, b); err != nil || string(b[:len(magic)]) != magic {
		return fmt.Errorf("%w: %s has no header", ErrCorrupt, path)
	}
	return format.Memory.Check(path, int(binary.LittleEndian.Uint32(b[len(magic):])))
}

// decodeHeader decodes the result of encode and rejects everything else.
func decodeHeader(b []byte) (*header, error) {
	bad := func(format string, args ...any) (*header, error) {
		return nil, fmt.Errorf("%w: header: %s", ErrCorrupt, fmt.Sprintf(format, args...))
	}
	le := binary.LittleEndian
	if len(b) < headerBytes+4 || string(b[:8]) != magic {
		return bad("not a header")
	}
	body, sum := b[:len(b)-4], le.Uint32(b[len(b)-4:])
	if err := format.Memory.Check("memory image", int(le.Uint32(b[8:]))); err != nil {
		return nil, err
	}
	if got := crc32.Checksum(body, castagnoli); got != sum {
		return bad("checksum is %08x instead of %08x", got, sum)
	}
	if s := le.Uint32(b[12:]); s != BlockSize {
		return bad("blocks of %d bytes", s)
	}
	h := &header{blocks: le.Uint64(b[16:])}
	layers, extents := uint64(le.Uint32(b[24:])), uint64(le.Uint32(b[28:]))
	if h.blocks > maxBlocks || layers > maxLayers || extents > maxExtents {
		return bad("%d blocks, %d layers, %d extents are too many", h.blocks, layers, extents)
	}
	if want := headerBytes + layers*layerBytes + extents*extentBytes; uint64(len(body)) != want {
		return bad("%d bytes instead of %d", len(body), want)
	}
	rest := body[headerBytes:]
	for range layers {
		l := layer{id: uuid.UUID(rest[:16]), blocks: le.Uint64(rest[16:]), crc: le.Uint32(rest[24:])}
		if l.blocks > maxBlocks || le.Uint32(rest[28:]) != 0 {
			return bad("layer %s is invalid", l.id)
		}
		h.layers = append(h.layers, l)
		rest = rest[layerBytes:]
	}
	for range extents {
		h.extents = append(h.extents, extent{le.Uint64(rest), uint64(le.Uint32(rest[8:])), le.Uint32(rest[12:]), le.Uint64(rest[16:])})
		rest = rest[extentBytes:]
	}
	if err := h.check(); err != nil {
		return nil, err
	}
	return h, nil
}

// check returns an error if the header violates its type's invariants.
func (h *header) check() error {
	var end uint64
	for i, e := range h.extents {
		switch {
		case e.count == 0, e.first < end, e.first > h.blocks, e.count > h.blocks-e.first:
			return fmt.Errorf("%w: extent %d is out of place", ErrCorrupt, i)
		case e.layer >= uint32(len(h.layers)):
			return fmt.Errorf("%w: extent %d names layer %d of %d", ErrCorrupt, i, e.layer, len(h.layers))
		case e.offset > h.layers[e.layer].blocks, e.count > h.layers[e.layer].blocks-e.offset:
			return fmt.Errorf("%w: extent %d ends past its layer", ErrCorrupt, i)
		}
		end = e.end()
	}
	return nil
}

// lookup returns the part from block on of the extent that has it, or an extent of zeros
// up to the next one.
func (h *header) lookup(block uint64) extent {
	i := sort.Search(len(h.extents), func(i int) bool { return h.extents[i].end() > block })
	if i < len(h.extents) && h.extents[i].first <= block {
		return h.extents[i].from(block)
	}
	next := h.blocks
	if i < len(h.extents) {
		next = h.extents[i].first
	}
	return extent{first: block, count: next - block, layer: zeroLayer}
}

// from returns the part of e from block on, which must be in e.
func (e extent) from(block uint64) extent {
	cut := block - e.first
	e.first, e.count = block, e.count-cut
	if e.layer != zeroLayer {
		e.offset += cut
	}
	return e
}

// overlay returns a header in which changes, sorted and disjoint, replace what h maps
// there. It has the same layers.
func (h *header) overlay(changes []extent) *header {
	out := &header{blocks: h.blocks, layers: slices.Clone(h.layers)}
	below := slices.Clone(h.extents)
	// takeBelow moves the old extents before block to out, and drops those from block up to
	// end.
	takeBelow := func(block, end uint64) {
		for len(below) > 0 && below[0].first < end {
			e := below[0]
			if e.first < block {
				kept := e
				kept.count = min(e.end(), block) - e.first
				out.extents = join(out.extents, kept)
			}
			if e.end() > end {
				below[0] = e.from(end)
				return
			}
			below = below[1:]
		}
	}
	for _, c := range changes {
		takeBelow(c.first, c.end())
		if c.layer != zeroLayer {
			out.extents = join(out.extents, c)
		}
	}
	for _, e := range below {
		out.extents = join(out.extents, e)
	}
	return out
}

// shared returns the number of layers that h has in common with its base.
func (h *header) shared(base *header) int {
	n := 0
	for n < min(len(h.layers), len(base.layers)) && h.layers[n].id == base.layers[n].id {
		n++
	}
	return n
}

// above returns the number of blocks in the layers from the given one on.
func (h *header) above(from int) (blocks uint64) {
	for _, l := range h.layers[min(from, len(h.layers)):] {
		blocks += l.blocks
	}
	return blocks
}

// prune drops those of the layers from the given one on that no extent uses.
func (h *header) prune(from int) {
	seen := make([]bool, len(h.layers))
	for _, e := range h.extents {
		seen[e.layer] = true
	}
	place := make([]uint32, len(h.layers))
	kept := h.layers[:0:0]
	for i, l := range h.layers {
		place[i] = uint32(len(kept))
		if i < from || seen[i] {
			kept = append(kept, l)
		}
	}
	h.layers = kept
	for i := range h.extents {
		h.extents[i].layer = place[h.extents[i].layer]
	}
}

// join appends an extent to a list. If the extent continues the last one, join extends that
// one instead.
func join(list []extent, e extent) []extent {
	if n := len(list); n > 0 {
		last := &list[n-1]
		continues := last.end() == e.first && last.layer == e.layer && (e.layer == zeroLayer || last.offset+last.count == e.offset)
		if continues && last.count+e.count <= math.MaxUint32 {
			last.count += e.count
			return list
		}
	}
	return append(list, e)
}

var zeros [BlockSize]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }
