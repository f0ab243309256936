// Package memory keeps what is in a virtual machine's memory: a header, and
// layers of the pages that changed from one pause to the next.
//
// docs/formats.md has the files byte by byte.
package memory

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"sort"

	"github.com/google/uuid"
)

// BlockSize is what memory is divided in, in bytes: a page of x86-64.
const BlockSize = 4096

// ErrCorrupt is returned, wrapped, for files that are not what was written.
var ErrCorrupt = errors.New("memory image is damaged")

const (
	magic   = "WRNMEMH\x00"
	version = 1

	headerBytes = 32
	layerBytes  = 32
	extentBytes = 24

	// maxBlocks is 16 TiB of memory; maxLayers and maxExtents only keep a
	// damaged header from asking for more memory than there is.
	maxBlocks  = 1 << 32
	maxLayers  = 64
	maxExtents = 1 << 26

	// zeroLayer stands for blocks that were zeroed since generation 0. Blocks
	// that no extent names are zero, and were so in generation 0.
	zeroLayer = math.MaxUint32
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// layer is one file of blocks.
type layer struct {
	id     uuid.UUID
	blocks uint64 // length of the file
	crc    uint32 // of the whole file, CRC-32C
}

// extent maps blocks first, first+1, … to blocks offset, offset+1, … of a
// layer's file, or to zeros.
type extent struct {
	first, count uint64
	layer        uint32
	offset       uint64
}

func (e extent) end() uint64 { return e.first + e.count }

// header maps every block of a memory to a place in a layer. Extents are in
// order, do not overlap and are as long as can be.
type header struct {
	blocks  uint64
	layers  []layer
	extents []extent
}

// encode is the header in its form on disk.
func (h *header) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, headerBytes+len(h.layers)*layerBytes+len(h.extents)*extentBytes+4)
	b = append(b, magic...)
	b = le.AppendUint32(b, version)
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

// decodeHeader reads what encode wrote and takes nothing else.
func decodeHeader(b []byte) (*header, error) {
	bad := func(format string, args ...any) (*header, error) {
		return nil, fmt.Errorf("%w: header: %s", ErrCorrupt, fmt.Sprintf(format, args...))
	}
	le := binary.LittleEndian
	if len(b) < headerBytes+4 || string(b[:8]) != magic {
		return bad("not one")
	}
	body, sum := b[:len(b)-4], le.Uint32(b[len(b)-4:])
	if v := le.Uint32(b[8:]); v != version {
		return nil, fmt.Errorf("memory image has version %d, this program reads %d", v, version)
	}
	if got := crc32.Checksum(body, castagnoli); got != sum {
		return bad("checksum is %08x, not %08x", got, sum)
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
		return bad("%d bytes, not %d", len(body), want)
	}
	rest := body[headerBytes:]
	for range layers {
		h.layers = append(h.layers, layer{id: uuid.UUID(rest[:16]), blocks: le.Uint64(rest[16:]), crc: le.Uint32(rest[24:])})
		if le.Uint32(rest[28:]) != 0 {
			return bad("reserved bytes are not 0")
		}
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

// check returns an error for a header that breaks what its type promises.
func (h *header) check() error {
	var end uint64
	for i, e := range h.extents {
		switch {
		case e.count == 0, e.first < end, e.first > h.blocks, e.count > h.blocks-e.first:
			return fmt.Errorf("%w: extent %d is out of place", ErrCorrupt, i)
		case e.layer == zeroLayer && e.offset != 0:
			return fmt.Errorf("%w: extent %d of zeros has an offset", ErrCorrupt, i)
		case e.layer == zeroLayer:
		case e.layer >= uint32(len(h.layers)):
			return fmt.Errorf("%w: extent %d names layer %d of %d", ErrCorrupt, i, e.layer, len(h.layers))
		case e.offset > h.layers[e.layer].blocks, e.count > h.layers[e.layer].blocks-e.offset:
			return fmt.Errorf("%w: extent %d ends behind its layer", ErrCorrupt, i)
		}
		end = e.end()
	}
	return nil
}

// lookup returns the extent that block lies in, or a hole up to the next one.
func (h *header) lookup(block uint64) (e extent, found bool) {
	i := sort.Search(len(h.extents), func(i int) bool { return h.extents[i].end() > block })
	if i < len(h.extents) && h.extents[i].first <= block {
		return h.extents[i], true
	}
	next := h.blocks
	if i < len(h.extents) {
		next = h.extents[i].first
	}
	return extent{first: block, count: next - block, layer: zeroLayer}, false
}

// overlay returns the header with changes, in order and apart from one
// another, laid over it. The layers stay.
func (h *header) overlay(changes []extent) *header {
	out := &header{blocks: h.blocks, layers: slices.Clone(h.layers)}
	below := h.extents
	// takeBelow moves what of the old extents lies before block to out, and
	// drops what lies in the skipped blocks up to end.
	takeBelow := func(block, end uint64) {
		for len(below) > 0 && below[0].first < end {
			e := below[0]
			if e.first < block {
				kept := e
				kept.count = min(e.end(), block) - e.first
				out.add(kept)
			}
			if e.end() <= end {
				below = below[1:]
				continue
			}
			cut := end - e.first
			rest := extent{first: end, count: e.count - cut, layer: e.layer, offset: e.offset}
			if e.layer != zeroLayer {
				rest.offset += cut
			}
			below = append([]extent{rest}, below[1:]...)
			return
		}
	}
	for _, c := range changes {
		takeBelow(c.first, c.end())
		out.add(c)
	}
	for _, e := range below {
		out.add(e)
	}
	return out
}

// add appends an extent, to the last one where it goes on from it.
func (h *header) add(e extent) {
	if n := len(h.extents); n > 0 {
		last := &h.extents[n-1]
		joined := last.count+e.count <= math.MaxUint32
		if joined && last.end() == e.first && last.layer == e.layer && (e.layer == zeroLayer || last.offset+last.count == e.offset) {
			last.count += e.count
			return
		}
	}
	h.extents = append(h.extents, e)
}

var zeros [BlockSize]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }
