package qemu

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/launcher"
)

// A guest with a balloon reports the memory that it has freed (free page reporting of
// virtio-balloon), and QEMU returns these pages to the host. For memory that is a file,
// QEMU first punches a hole into the file. But our file is shared by all machines of a
// template, and sealed, so that fails, and QEMU leaves it at that. The next step,
// madvise(MADV_DONTNEED), would be enough: it drops the machine's private copy of a page,
// and the guest sees the file's again.
//
// So QEMU gets a library (LD_PRELOAD) with its own fallocate, which reports success for a
// hole in a sealed file, and does nothing. All other calls go to the kernel.

// balloonDevice is QEMU's device. Without page-poison, a guest whose kernel expects zeros
// in freed pages reports none.
const balloonDevice = "virtio-balloon-device,free-page-reporting=on,page-poison=off"

// fallocateCode is the machine code of the library's fallocate(fd, mode, offset, length). It
// ends with the displacement of the address of libc's syscall function.
var fallocateCode = bytes.Join([][]byte{
	{0x83, 0xfe, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE}, // cmp esi, mode
	{0x75, 31},                // jne kernel
	{0x57},                    // push rdi
	{0x56},                    // push rsi
	{0x52},                    // push rdx
	{0x51},                    // push rcx
	{0xbe, 0x0a, 4, 0, 0},     // mov esi, F_GET_SEALS
	{0xb8, 72, 0, 0, 0},       // mov eax, SYS_fcntl
	{0x0f, 0x05},              // syscall
	{0x59},                    // pop rcx
	{0x5a},                    // pop rdx
	{0x5e},                    // pop rsi
	{0x5f},                    // pop rdi
	{0x85, 0xc0},              // test eax, eax
	{0x78, 7},                 // js kernel: the file cannot be sealed
	{0xa8, unix.F_SEAL_WRITE}, // test al, F_SEAL_WRITE
	{0x74, 3},                 // jz kernel
	{0x31, 0xc0},              // xor eax, eax
	{0xc3},                    // ret
	// kernel: return syscall(SYS_fallocate, fd, mode, offset, length)
	{0x49, 0x89, 0xc8},       // mov r8, rcx
	{0x48, 0x89, 0xd1},       // mov rcx, rdx
	{0x89, 0xf2},             // mov edx, esi
	{0x89, 0xfe},             // mov esi, edi
	{0xbf, 0x1d, 0x01, 0, 0}, // mov edi, SYS_fallocate
	{0xff, 0x25},             // jmp [rip + displacement]
}, nil)

// The parts of the library. The writable ones are on a page of their own.
const (
	libraryPage    = 0x1000
	libraryHeaders = 4
)

// library returns the library: an ELF shared object without sections.
func library() []byte {
	names := []string{"fallocate", "fallocate64", "syscall"}
	strs := "\x00" + strings.Join(names, "\x00") + "\x00"
	name := func(n string) uint32 { return uint32(strings.Index(strs, "\x00"+n+"\x00") + 1) }

	var text bytes.Buffer // the first page
	add := func(v any) (at uint64) {
		for text.Len()%8 != 0 {
			text.WriteByte(0)
		}
		at = uint64(text.Len())
		_ = binary.Write(&text, binary.LittleEndian, v) // to a buffer, and v has a fixed size
		return at
	}
	add(make([]byte, binary.Size(elf.Header64{})+libraryHeaders*binary.Size(elf.Prog64{}))) // written last

	dynamicEntries := uint64(9)
	got := libraryPage + dynamicEntries*16 // behind the dynamic section
	code := add(fallocateCode)
	_ = binary.Write(&text, binary.LittleEndian, int32(got-uint64(text.Len())-4))
	size := uint64(text.Len()) - code
	defined := elf.Sym64{Info: elf.ST_INFO(elf.STB_GLOBAL, elf.STT_FUNC), Shndx: 1, Value: code, Size: size}
	fallocate, fallocate64 := defined, defined
	fallocate.Name, fallocate64.Name = name("fallocate"), name("fallocate64")
	symbols := add([]elf.Sym64{{}, fallocate, fallocate64, {Name: name("syscall"), Info: elf.ST_INFO(elf.STB_GLOBAL, elf.STT_FUNC)}})
	hash := add([]uint32{1, 4, 1, 0, 2, 0, 0}) // one bucket, of which symbols 1 and 2 are a chain
	relocations := add(elf.Rela64{Off: got, Info: elf.R_INFO(3, uint32(elf.R_X86_64_GLOB_DAT))})
	table := add([]byte(strs))

	dynamic := []elf.Dyn64{
		{Tag: int64(elf.DT_HASH), Val: hash},
		{Tag: int64(elf.DT_SYMTAB), Val: symbols},
		{Tag: int64(elf.DT_SYMENT), Val: uint64(binary.Size(elf.Sym64{}))},
		{Tag: int64(elf.DT_STRTAB), Val: table},
		{Tag: int64(elf.DT_STRSZ), Val: uint64(len(strs))},
		{Tag: int64(elf.DT_RELA), Val: relocations},
		{Tag: int64(elf.DT_RELASZ), Val: uint64(binary.Size(elf.Rela64{}))},
		{Tag: int64(elf.DT_RELAENT), Val: uint64(binary.Size(elf.Rela64{}))},
		{Tag: int64(elf.DT_NULL)},
	}
	data := dynamicEntries*16 + 8 // with the address of syscall

	lib := make([]byte, libraryPage+data)
	copy(lib, text.Bytes())
	_, _ = binary.Encode(lib[libraryPage:], binary.LittleEndian, dynamic)
	end := uint64(text.Len())
	segment := func(t elf.ProgType, flags elf.ProgFlag, at, size, align uint64) elf.Prog64 {
		return elf.Prog64{Type: uint32(t), Flags: uint32(flags), Off: at, Vaddr: at, Paddr: at, Filesz: size, Memsz: size, Align: align}
	}
	header := elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: uint64(binary.Size(elf.Header64{})), Ehsize: uint16(binary.Size(elf.Header64{})), Phentsize: uint16(binary.Size(elf.Prog64{})), Phnum: libraryHeaders,
		Shentsize: uint16(binary.Size(elf.Section64{})),
	}
	n, _ := binary.Encode(lib, binary.LittleEndian, header)
	_, _ = binary.Encode(lib[n:], binary.LittleEndian, []elf.Prog64{
		segment(elf.PT_LOAD, elf.PF_R|elf.PF_X, 0, end, libraryPage),
		segment(elf.PT_LOAD, elf.PF_R|elf.PF_W, libraryPage, data, libraryPage),
		segment(elf.PT_DYNAMIC, elf.PF_R|elf.PF_W, libraryPage, dynamicEntries*16, 8),
		segment(elf.PT_GNU_STACK, elf.PF_R|elf.PF_W, 0, 0, 16), // not executable
	})
	return lib
}

// newLibrary returns the library as a file.
func newLibrary() (*os.File, error) {
	f, err := launcher.Sealed(libraryName, library(), unix.MFD_EXEC)
	if err != nil {
		return nil, fmt.Errorf("make QEMU's library: %w", err)
	}
	return f, nil
}

// errNoBalloon is the error for machines with a balloon on a host without the library.
var errNoBalloon = errors.New("guests cannot return memory on this host, because QEMU does not load the library for that")

const libraryName = "wrenn-fallocate"

// preload returns the environment variable with which a program loads the library that is
// its descriptor fd.
func preload(fd int) string { return fmt.Sprintf("LD_PRELOAD=/proc/self/fd/%d", fd) }

// hasLibrary reports whether a process has loaded the library.
func hasLibrary(pid int) (bool, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return false, err
	}
	return bytes.Contains(maps, []byte("/memfd:"+libraryName)), nil
}
