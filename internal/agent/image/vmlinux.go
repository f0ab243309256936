package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

var errNoKernel = errors.New("not a Linux x86 kernel image")

// payload finds the compressed kernel in a bzImage. The setup header of the Linux x86 boot
// protocol, version 2.08 and later (the kernel's Documentation/arch/x86/boot.rst), has its
// offset from the protected mode code, which follows the boot sector and setup sectors.
func payload(image []byte) ([]byte, error) {
	const (
		setupSects    = 0x1f1
		magic         = 0x202
		version       = 0x206
		payloadOffset = 0x248
		payloadLength = 0x24c
		headerEnd     = 0x250
	)
	if len(image) < headerEnd || string(image[magic:magic+4]) != "HdrS" {
		return nil, errNoKernel
	}
	if v := binary.LittleEndian.Uint16(image[version:]); v < 0x208 {
		return nil, fmt.Errorf("%w: boot protocol %#x is older than 2.08", errNoKernel, v)
	}
	sects := uint64(image[setupSects])
	if sects == 0 {
		sects = 4 // as the protocol says, for compatibility
	}
	start := (sects+1)*512 + uint64(binary.LittleEndian.Uint32(image[payloadOffset:]))
	end := start + uint64(binary.LittleEndian.Uint32(image[payloadLength:]))
	if end > uint64(len(image)) || end-start < 8 {
		return nil, fmt.Errorf("%w: its payload is outside of the file", errNoKernel)
	}
	return image[start:end], nil
}

// maxKernel bounds the size of an uncompressed kernel, in bytes.
const maxKernel = 512 << 20

// vmlinux returns the uncompressed kernel of a bzImage, an ELF file that QEMU and
// Firecracker load directly. Under emulation, a kernel needs seconds to unpack itself.
func vmlinux(image []byte) ([]byte, error) {
	data, err := payload(image)
	if err != nil {
		return nil, err
	}
	// A payload ends with its uncompressed size. That is part of the gzip format; the
	// kernel's Makefile appends it to the others.
	size := int64(binary.LittleEndian.Uint32(data[len(data)-4:]))
	switch {
	case bytes.HasPrefix(data, []byte("\x7fELF")):
		size = int64(len(data)) // not compressed, so nothing was appended
	case !bytes.HasPrefix(data, []byte("\x1f\x8b")):
		data = data[:len(data)-4]
	}
	if size > maxKernel {
		return nil, fmt.Errorf("%w: decompresses to %d bytes", errNoKernel, size)
	}
	out, err := unpack(data, size)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoKernel, err)
	}
	if int64(len(out)) != size {
		return nil, fmt.Errorf("%w: decompresses to %d bytes instead of %d", errNoKernel, len(out), size)
	}
	if !bytes.HasPrefix(out, []byte("\x7fELF")) {
		return nil, fmt.Errorf("%w: its payload is not an ELF file", errNoKernel)
	}
	return out, nil
}
