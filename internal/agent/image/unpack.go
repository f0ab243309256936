package image

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
	"github.com/ulikunitz/xz/lzma"
)

// maxWindow bounds the dictionary of a compressed stream, in bytes. No kernel needs more.
const maxWindow = 128 << 20

var (
	errCompression = errors.New("unknown compression")
	errTooLarge    = errors.New("decompressed data is too large")
)

// formats are the compressions of kernels and modules, by their first bytes. LZO is not
// supported, because no Debian kernel uses it; its entry is for the error.
var formats = []struct {
	name, magic string
	open        func(io.Reader) (io.Reader, error)
}{
	// The kernel's build uses a BCJ filter, which ulikunitz/xz does not support.
	{"xz", "\xfd7zXZ\x00", func(r io.Reader) (io.Reader, error) { return xz.NewReader(r, maxWindow) }},
	{"zstd", "\x28\xb5\x2f\xfd", openZstd},
	{"LZ4", "\x02\x21\x4c\x18", openLZ4}, // the legacy frame, which the kernel's loader reads
	{"LZ4", "\x04\x22\x4d\x18", openLZ4},
	{"gzip", "\x1f\x8b\x08", func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }},
	{"bzip2", "BZh", func(r io.Reader) (io.Reader, error) { return bzip2.NewReader(r), nil }},
	{"LZMA", "\x5d\x00\x00", openLZMA},
	{"LZO", "\x89LZO\x00", func(io.Reader) (io.Reader, error) { return nil, errors.ErrUnsupported }},
	{"nothing", "\x7fELF", func(r io.Reader) (io.Reader, error) { return r, nil }},
}

// unpack decompresses data in one of the formats. It fails if the result has more than
// most bytes.
func unpack(data []byte, most int64) ([]byte, error) {
	for _, f := range formats {
		if !bytes.HasPrefix(data, []byte(f.magic)) {
			continue
		}
		r, err := f.open(bytes.NewReader(data))
		if err != nil {
			return nil, fmt.Errorf("unpack %s: %w", f.name, err)
		}
		out, err := io.ReadAll(io.LimitReader(r, most+1))
		if c, ok := r.(io.Closer); ok {
			_ = c.Close() // all in memory, so it cannot lose data
		}
		if err != nil {
			return nil, fmt.Errorf("unpack %s: %w", f.name, err)
		}
		if int64(len(out)) > most {
			return nil, fmt.Errorf("unpack %s: %w: more than %d bytes", f.name, errTooLarge, most)
		}
		return out, nil
	}
	return nil, errCompression
}

func openZstd(r io.Reader) (io.Reader, error) {
	d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	return d.IOReadCloser(), nil
}

func openLZ4(r io.Reader) (io.Reader, error) { return lz4.NewReader(r), nil }

// openLZMA opens an LZMA stream. It checks the size of the dictionary first, because the
// reader allocates whatever the header asks for.
func openLZMA(r io.Reader) (io.Reader, error) {
	header := make([]byte, lzma.HeaderLen)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	if size := binary.LittleEndian.Uint32(header[1:]); size > maxWindow {
		return nil, fmt.Errorf("dictionary of %d bytes", size)
	}
	return lzma.NewReader(io.MultiReader(bytes.NewReader(header), r))
}
