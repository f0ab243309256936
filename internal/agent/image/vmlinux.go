package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os/exec"
)

var errNoKernel = errors.New("not a Linux x86 kernel image")

// payload finds the compressed kernel in a bzImage: the setup header of the
// Linux x86 boot protocol, version 2.08 and later (the kernel's
// Documentation/arch/x86/boot.rst), gives its place relative to the protected
// mode code, which follows the boot sector and the setup sectors.
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
		return nil, fmt.Errorf("%w: its payload lies outside of it", errNoKernel)
	}
	return image[start:end], nil
}

// decompressors are the tools for the formats that a kernel may be in, by the
// format's first bytes. A kernel's payload ends with its size, which all but
// gzip's would call garbage, so that it is cut off first.
var decompressors = []struct {
	magic   []byte
	command []string
	trailer int
}{
	{[]byte{0xfd, '7', 'z', 'X', 'Z', 0}, []string{"xz", "-dc"}, 4},
	{[]byte{0x28, 0xb5, 0x2f, 0xfd}, []string{"zstd", "-dc"}, 4},
	{[]byte{0x02, 0x21, 0x4c, 0x18}, []string{"lz4", "-dc"}, 4},
	{[]byte{0x1f, 0x8b}, []string{"gzip", "-dc"}, 0},
}

// vmlinux is the uncompressed kernel of a bzImage: an ELF file that QEMU's
// and Firecracker's loaders start without the kernel unpacking itself, which
// takes seconds under emulation.
func vmlinux(ctx context.Context, image []byte) ([]byte, error) {
	data, err := payload(image)
	if err != nil {
		return nil, err
	}
	for _, d := range decompressors {
		if !bytes.HasPrefix(data, d.magic) {
			continue
		}
		cmd := exec.CommandContext(ctx, d.command[0], d.command[1:]...)
		cmd.Stdin = bytes.NewReader(data[:len(data)-d.trailer])
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("unpack kernel with %s: %w: %s", d.command[0], err, bytes.TrimSpace(stderr.Bytes()))
		}
		if !bytes.HasPrefix(out, []byte("\x7fELF")) {
			return nil, fmt.Errorf("%w: what it holds is no ELF file", errNoKernel)
		}
		return out, nil
	}
	return nil, fmt.Errorf("%w: unknown compression", errNoKernel)
}
