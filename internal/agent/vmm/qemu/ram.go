package qemu

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

// A guest's memory is a private mapping, in QEMU's process, of a file that nobody can write
// to. All machines that map the file share the pages that they only read. When a guest
// writes to a page, the kernel gives it an anonymous copy. So the changed pages are exactly
// the anonymous ones, and need neither a dirty log nor help from QEMU.
//
// A restored machine begins with anonymous pages, which differ from the file. If the kernel
// has soft-dirty bits (its Documentation/admin-guide/mm/soft-dirty.rst; Debian's kernel has
// them), they show which of these pages the guest has written to since. Otherwise it may
// have written to all.

// seals make a memory's file immutable, even for QEMU, which insists on opening it for
// writing.
const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

const (
	// mapChunk is the number of pages whose entries are read from the pagemap at a time.
	mapChunk = 64 << 10
	// runPages is the number of pages that are copied at a time.
	runPages = 256
)

// emptyMemory makes the file of zeros that a booting machine maps as its memory.
func emptyMemory(bytes int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "ram")
	err = f.Truncate(bytes)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make memory: %w", err), f.Close())
	}
	return f, nil
}

// checkMemory returns an error for a file that does not have the given length or is not
// sealed.
func checkMemory(f *os.File, bytes int64) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("check memory file: %w", err)
	}
	if st.Size != bytes {
		return nil, fmt.Errorf("memory file has %d bytes, but the machine %d", st.Size, bytes)
	}
	got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("memory file cannot be sealed: %w", err)
	}
	if got&seals != seals {
		return nil, errors.New("memory file is not sealed, so one VM could modify it for all others")
	}
	return &st, nil
}

// ram is the guest's memory in QEMU's process.
type ram struct {
	start   int64 // its address there
	blocks  uint64
	tracked bool // only pages written to since [ram.track] are soft-dirty
	pagemap *os.File
	mem     *os.File
	refs    *os.File // nil: read-only
}

// openRAM opens the guest's memory in the process that st names. It fails if a QEMU that its
// guest has taken over has moved the mapping.
func openRAM(st vmm.State, flag int) (_ *ram, err error) {
	proc := fmt.Sprintf("/proc/%d/", st.PID)
	maps, err := os.Open(proc + "maps")
	if err != nil {
		return nil, err
	}
	defer maps.Close()
	r := &ram{blocks: uint64(st.MemoryBytes / memory.BlockSize), tracked: st.MemoryTracked}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if r.pagemap, err = os.Open(proc + "pagemap"); err != nil {
		return nil, err
	}
	if r.mem, err = os.OpenFile(proc+"mem", flag, 0); err != nil {
		return nil, err
	}
	if flag != os.O_RDONLY {
		if r.refs, err = os.OpenFile(proc+"clear_refs", os.O_WRONLY, 0); err != nil {
			return nil, err
		}
	}
	// After all files are open, so that they belong to this process.
	if start, err := startTime(st.PID); err != nil || start != st.StartTime {
		return nil, vmm.ErrGone
	}
	r.start, err = findMapping(maps, st)
	return r, err
}

func (r *ram) close() {
	for _, f := range []*os.File{r.pagemap, r.mem, r.refs} {
		if f != nil {
			f.Close()
		}
	}
}

// findMapping returns the address of the mapping of the memory's file, from /proc/PID/maps
// (proc(5)). It fails unless there is exactly one, which is private, writable and covers the
// whole file.
func findMapping(maps io.Reader, st vmm.State) (start int64, err error) {
	found := false
	s := bufio.NewScanner(maps)
	for s.Scan() {
		// address perms offset dev inode path
		f := strings.Fields(s.Text())
		if len(f) < 5 {
			return 0, errors.New("find memory: a mapping has no inode")
		}
		inode, err := strconv.ParseUint(f[4], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("find memory: %w", err)
		}
		if inode != st.MemoryInode || f[3] != fmt.Sprintf("%02x:%02x", unix.Major(st.MemoryDevice), unix.Minor(st.MemoryDevice)) {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		first, err1 := strconv.ParseInt(from, 16, 64)
		end, err2 := strconv.ParseInt(to, 16, 64)
		offset, err3 := strconv.ParseInt(f[2], 16, 64)
		if err := errors.Join(err1, err2, err3); err != nil {
			return 0, fmt.Errorf("find memory: %w", err)
		}
		if found || f[1] != "rw-p" || offset != 0 || end-first != st.MemoryBytes {
			return 0, fmt.Errorf("find memory: QEMU has an unexpected mapping: %s", s.Text())
		}
		start, found = first, true
	}
	if err := s.Err(); err != nil {
		return 0, fmt.Errorf("find memory: %w", err)
	}
	if !found {
		return 0, errors.New("find memory: QEMU does not map it")
	}
	return start, nil
}

// changed reports whether an entry of /proc/PID/pagemap (Linux's
// Documentation/admin-guide/mm/pagemap.rst) is for an anonymous page.
func changed(entry uint64) bool {
	const present, swapped, file = 1 << 63, 1 << 62, 1 << 61
	return entry&(present|swapped) != 0 && entry&file == 0
}

// softDirty is the bit of an entry of /proc/PID/pagemap for pages written to, and mappings
// made, since the bits were cleared.
const softDirty = 1 << 55

// TracksMemory implements vmm.Driver.
func (d *Driver) TracksMemory() bool {
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Munmap(page) }()
	page[0] = 1
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false
	}
	defer f.Close()
	var entry [8]byte
	_, err = f.ReadAt(entry[:], int64(uintptr(unsafe.Pointer(&page[0])))/int64(os.Getpagesize())*8)
	return err == nil && binary.NativeEndian.Uint64(entry[:])&softDirty != 0
}

// track clears the soft-dirty bits, so that the kernel marks pages written to from now on.
// It reports whether the kernel supports that. The guest must not run.
func (r *ram) track() (bool, error) {
	marked := func() (bool, error) {
		var entry [8]byte
		_, err := r.pagemap.ReadAt(entry[:], r.start/memory.BlockSize*8)
		return binary.NativeEndian.Uint64(entry[:])&softDirty != 0, err
	}
	// A kernel with soft-dirty bits has marked the whole new mapping.
	if can, err := marked(); err != nil || !can {
		return false, err
	}
	if _, err := r.refs.WriteString("4"); err != nil {
		return false, err
	}
	still, err := marked()
	return !still, err
}

// pages yields the anonymous pages or, if tracked, those written to since track.
func (r *ram) pages(yield func(memory.Page, error) bool) {
	fail := func(err error) { yield(memory.Page{}, fmt.Errorf("read memory: %w", err)) }
	entries := make([]byte, 8*mapChunk)
	data := make([]byte, runPages*memory.BlockSize)
	for first := uint64(0); first < r.blocks; first += mapChunk {
		n := min(mapChunk, r.blocks-first)
		if _, err := r.pagemap.ReadAt(entries[:8*n], (r.start/memory.BlockSize+int64(first))*8); err != nil {
			fail(fmt.Errorf("page map: %w", err))
			return
		}
		isChanged := func(i uint64) bool {
			entry := binary.NativeEndian.Uint64(entries[8*i:])
			return changed(entry) && (!r.tracked || entry&softDirty != 0)
		}
		for i := uint64(0); i < n; {
			if !isChanged(i) {
				i++
				continue
			}
			run := uint64(1)
			for run < runPages && i+run < n && isChanged(i+run) {
				run++
			}
			part := data[:run*memory.BlockSize]
			if _, err := r.mem.ReadAt(part, r.start+int64(first+i)*memory.BlockSize); err != nil {
				fail(err)
				return
			}
			for ; run > 0; run-- {
				if !yield(memory.Page{Block: first + i, Data: part[:memory.BlockSize]}, nil) {
					return
				}
				part, i = part[memory.BlockSize:], i+1
			}
		}
	}
}

// write writes pages to the memory.
func (r *ram) write(pages memory.Pages) error {
	run := make([]byte, 0, runPages*memory.BlockSize)
	var first, next uint64 // block of the first page in run, and of the one after the last
	flush := func() error {
		if len(run) == 0 {
			return nil
		}
		_, err := r.mem.WriteAt(run, r.start+int64(first)*memory.BlockSize)
		run = run[:0]
		return err
	}
	for p, err := range pages {
		if err != nil {
			return err
		}
		if p.Block >= r.blocks || len(p.Data) != memory.BlockSize {
			return fmt.Errorf("write memory: invalid page %d with %d bytes, of %d pages", p.Block, len(p.Data), r.blocks)
		}
		if p.Block != next || len(run) == cap(run) {
			if err := flush(); err != nil {
				return fmt.Errorf("write memory: %w", err)
			}
		}
		if len(run) == 0 {
			first = p.Block
		}
		run = append(run, p.Data...)
		next = p.Block + 1
	}
	if err := flush(); err != nil {
		return fmt.Errorf("write memory: %w", err)
	}
	return nil
}

// Pages implements vmm.VM.
func (m *machine) Pages() memory.Pages {
	return func(yield func(memory.Page, error) bool) {
		r, err := openRAM(m.state, os.O_RDONLY)
		if err != nil {
			yield(memory.Page{}, fmt.Errorf("read memory: %w", err))
			return
		}
		defer r.close()
		r.pages(yield)
	}
}
