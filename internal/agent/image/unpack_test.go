package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

var update = flag.Bool("update", false, "write testdata/kernels with the programs that pack kernels")

// packers are the commands of the kernel's scripts/Makefile.lib, verbatim, one for each
// compression that an x86 kernel can be built with.
var packers = []struct {
	name    string
	command []string
	sized   bool // the Makefile appends the size
}{
	{"gzip", []string{"gzip", "-n", "-f", "-9", "-c"}, false},
	{"bzip2", []string{"bzip2", "-9", "-c"}, true},
	{"lzma", []string{"xz", "--format=lzma", "-9", "-c"}, true},
	{"xz", []string{"xz", "--check=crc32", "--x86", "--lzma2=,dict=128MiB", "-c"}, true},
	{"lz4", []string{"lz4", "-l", "-9", "-c"}, true},
	{"zstd", []string{"zstd", "-22", "--ultra", "-c"}, true},
}

// sampleKernel returns an ELF file with the machine code that xz filters: calls of the
// same function from many places.
func sampleKernel() []byte {
	b := []byte("\x7fELF")
	for i := range 2_000 {
		b = append(b, bytes.Repeat([]byte{0x90}, i%13)...)
		b = binary.LittleEndian.AppendUint32(append(b, 0xe8), uint32(0x1000-len(b)-5))
	}
	return b
}

// boot returns a bzImage with a payload.
func boot(packed []byte) []byte { return append(bzImage(1024, 0, uint32(len(packed))), packed...) }

func sized(packed []byte, size int) []byte {
	return binary.LittleEndian.AppendUint32(bytes.Clone(packed), uint32(size))
}

// packed returns the sample kernel in each format, as a kernel's payload.
func packed(t testing.TB) map[string][]byte {
	all := map[string][]byte{"nothing": sampleKernel()}
	for _, p := range packers {
		name := filepath.Join("testdata", "kernels", p.name)
		if *update {
			cmd := exec.Command(p.command[0], p.command[1:]...)
			cmd.Stdin = bytes.NewReader(sampleKernel())
			out, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, out, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if p.sized {
			b = sized(b, len(sampleKernel()))
		}
		all[p.name] = b
	}
	return all
}

func TestVmlinuxOfEachFormat(t *testing.T) {
	// It must need no program, because a plain Debian has none of them.
	t.Setenv("PATH", "")
	want := sampleKernel()
	for name, data := range packed(t) {
		t.Run(name, func(t *testing.T) {
			got, err := vmlinux(boot(data))
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("got %d bytes of %d, %v", len(got), len(want), err)
			}
			if name == "nothing" {
				return
			}
			for cut := 1; cut < len(data)-8; cut += max(1, len(data)/50) {
				part := sized(data[:cut], len(want))
				if got, err := vmlinux(boot(part)); !errors.Is(err, errNoKernel) {
					t.Fatalf("a payload cut after %d bytes was accepted as %d bytes: %v", cut, len(got), err)
				}
			}
		})
	}
}

// TestVmlinuxIsBounded checks that a stream cannot unpack to more than the payload
// declares, and that a payload cannot declare more than a kernel's possible size.
func TestVmlinuxIsBounded(t *testing.T) {
	for name, data := range packed(t) {
		if name == "nothing" || name == "gzip" {
			continue
		}
		data = data[:len(data)-4]
		for _, size := range []int{0, 100, len(sampleKernel()) - 1} {
			if _, err := vmlinux(boot(sized(data, size))); !errors.Is(err, errNoKernel) || !errors.Is(err, errTooLarge) {
				t.Errorf("%s with size %d: got %v", name, size, err)
			}
		}
		for _, size := range []int{len(sampleKernel()) + 1, maxKernel + 1, 1<<32 - 1} {
			if _, err := vmlinux(boot(sized(data, size))); !errors.Is(err, errNoKernel) {
				t.Errorf("%s with size %d: got %v", name, size, err)
			}
		}
	}
	// Before reading on, the reader would allocate this dictionary of 4 GiB.
	huge := append([]byte{0x5d, 0, 0, 0xff, 0xff}, make([]byte, 100)...)
	if _, err := unpack(huge, 1<<20); err == nil {
		t.Error("a dictionary of 4 GiB was accepted")
	}
}

func TestUnpackNamesWhatItCannotDo(t *testing.T) {
	if _, err := unpack([]byte("\x89LZO\x00\r\n\x1a\n"), 1<<20); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("LZO: got %v", err)
	}
	if _, err := unpack([]byte("what is this?"), 1<<20); !errors.Is(err, errCompression) {
		t.Errorf("got %v", err)
	}
}

func FuzzVmlinux(f *testing.F) {
	for _, data := range packed(f) {
		f.Add(data[:min(len(data), 4<<10)], uint32(1<<16))
	}
	f.Fuzz(func(t *testing.T, data []byte, size uint32) {
		if len(data) < 8 {
			return
		}
		const most = 1 << 20
		got, err := unpack(data, most)
		if len(got) > most || err != nil && got != nil {
			t.Errorf("got %d bytes, %v", len(got), err)
		}
		size %= most // keeps each round short
		if got, err := vmlinux(boot(sized(data, int(size)))); err == nil && len(got) < 4 {
			t.Errorf("a kernel of %d bytes", len(got))
		}
	})
}
