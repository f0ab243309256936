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

// A guest's memory is a private mapping, in QEMU's process, of a file that
// nobody can write to. Pages that the guest only reads are the file's, and
// shared by all that map it; a page that it writes to becomes its own: in the
// kernel's words anonymous. So those that changed need no dirty log, no second
// copy and no help from QEMU: they are the anonymous ones.
//
// A machine that is restored has anonymous pages from the beginning, those that
// differ from the file. Where the kernel has soft-dirty bits (its
// Documentation/admin-guide/mm/soft-dirty.rst; Debian's has) they tell which of
// them were written to since; where it has none all of them may have been.

// seals keep a memory's file as it is, even from those who open it for
// writing. That is why QEMU, which insists on doing that, may.
const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

const (
	// mapChunk is for how many pages the kernel is asked at a time.
	mapChunk = 64 << 10
	// runPages is how many pages are copied at a time.
	runPages = 256
)

// emptyMemory makes the file that the memory of a machine which boots is
// mapped from: it reads as zeros.
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

// checkMemory refuses a file that is not bytes long or that could change.
func checkMemory(f *os.File, bytes int64) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("memory: %w", err)
	}
	if st.Size != bytes {
		return nil, fmt.Errorf("memory: its file has %d bytes, the machine %d", st.Size, bytes)
	}
	got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("memory: its file has no seals: %w", err)
	}
	if got&seals != seals {
		return nil, errors.New("memory: its file is not sealed: a virtual machine could change it under all others")
	}
	return &st, nil
}

// ram is the guest's memory in QEMU's process.
type ram struct {
	start   int64 // its address there
	blocks  uint64
	tracked bool // what was not written to since [ram.track] is not marked
	pagemap *os.File
	mem     *os.File
	refs    *os.File // nil: only read
}

// openRAM finds the guest's memory in the process that st names. A QEMU that
// its guest has taken over may have moved it: then there is none.
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
	// Asked after all were opened, so that they are of this process.
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

// findMapping returns the address of the one mapping, in the format of
// /proc/PID/maps (proc(5)), that is private, writable, and of the whole of the
// memory's file and no more.
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
			return 0, fmt.Errorf("find memory: QEMU does not map it as it should: %s", s.Text())
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

// changed tells of an entry of /proc/PID/pagemap whether the page is the
// process's own (Linux's Documentation/admin-guide/mm/pagemap.rst).
func changed(entry uint64) bool {
	const present, swapped, file = 1 << 63, 1 << 62, 1 << 61
	return entry&(present|swapped) != 0 && entry&file == 0
}

// softDirty is set in an entry of /proc/PID/pagemap for what was written to
// since it was cleared, and for all of a mapping that was made since.
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

// track has the kernel mark what is written to from now on, and tells whether
// it does. The process stands still.
func (r *ram) track() (bool, error) {
	marked := func() (bool, error) {
		var entry [8]byte
		_, err := r.pagemap.ReadAt(entry[:], r.start/memory.BlockSize*8)
		return binary.NativeEndian.Uint64(entry[:])&softDirty != 0, err
	}
	// All of a new mapping is marked, by a kernel that does mark.
	if can, err := marked(); err != nil || !can {
		return false, err
	}
	if _, err := r.refs.WriteString("4"); err != nil {
		return false, err
	}
	still, err := marked()
	return !still, err
}

// pages yields the pages that are no longer the file's; those of them that
// were written to since, where that is known.
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

// write lays pages over the memory.
func (r *ram) write(pages memory.Pages) error {
	run := make([]byte, 0, runPages*memory.BlockSize)
	var first, next uint64 // of the pages in run, and after them
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
			return fmt.Errorf("write memory: page %d of %d bytes in a memory of %d pages", p.Block, len(p.Data), r.blocks)
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
