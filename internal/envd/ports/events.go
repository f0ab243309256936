package ports

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tcpListen is the kernel's number of the state in which a TCP socket listens.
const tcpListen = 10

// events tells when a TCP socket begins or ceases to listen, in any network namespace. The
// kernel counts that in a ring buffer for each processor, which nobody reads: a change of
// the buffer's head is the event.
type events struct {
	// C has an element if there was an event since the last receive.
	C     chan struct{}
	files []*os.File
	rings [][]byte
	watch sync.WaitGroup
}

// newEvents starts to watch. tracefs is where that file system is mounted.
func newEvents(tracefs string) (*events, error) {
	text, err := os.ReadFile(filepath.Join(tracefs, "events/sock/inet_sock_set_state/id"))
	if err != nil {
		return nil, err
	}
	id, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("read id of tracepoint: %w", err)
	}
	e := &events{C: make(chan struct{}, 1)}
	for cpu := range runtime.NumCPU() {
		if err := e.add(id, cpu); err != nil {
			e.Close()
			return nil, fmt.Errorf("watch processor %d: %w", cpu, err)
		}
	}
	return e, nil
}

// add watches one processor.
func (e *events) add(tracepoint uint64, cpu int) error {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Config: tracepoint, Sample: 1, Wakeup: 1, Bits: unix.PerfBitDisabled}
	attr.Size = uint32(unsafe.Sizeof(attr))
	fd, err := unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open event: %w", err)
	}
	err = unix.SetNonblock(fd, true) // or os.NewFile would not poll it
	file := os.NewFile(uintptr(fd), "tracepoint")
	e.files = append(e.files, file)
	if err != nil {
		return err
	}
	filter, err := unix.BytePtrFromString(fmt.Sprintf("oldstate == %d || newstate == %[1]d", tcpListen))
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PERF_EVENT_IOC_SET_FILTER, uintptr(unsafe.Pointer(filter))); errno != 0 {
		return fmt.Errorf("set filter: %w", errno)
	}
	// The mapping is read-only, so the kernel overwrites old records.
	ring, err := unix.Mmap(fd, 0, 2*os.Getpagesize(), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map buffer: %w", err)
	}
	e.rings = append(e.rings, ring)
	if err := unix.IoctlSetInt(fd, unix.PERF_EVENT_IOC_ENABLE, 0); err != nil {
		return fmt.Errorf("enable event: %w", err)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	head := &(*unix.PerfEventMmapPage)(unsafe.Pointer(&ring[0])).Data_head
	e.watch.Go(func() {
		seen := uint64(0)
		for raw.Read(func(uintptr) bool {
			now := atomic.LoadUint64(head)
			changed := now != seen
			seen = now
			return changed
		}) == nil {
			select {
			case e.C <- struct{}{}:
			default: // it has one already
			}
		}
	})
	return nil
}

// Close stops watching.
func (e *events) Close() {
	for _, f := range e.files {
		_ = f.Close()
	}
	e.watch.Wait()
	for _, r := range e.rings {
		_ = unix.Munmap(r)
	}
}
