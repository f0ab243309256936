package ports

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tcpListen is the kernel's number of the state in which a TCP socket listens.
const tcpListen = 10

// events tells when a TCP socket begins or ceases to listen, in any network namespace. The
// kernel records that in a ring buffer for each processor, which nobody reads.
type events struct {
	// C receives a value after one or more events. Nothing watches between a value and the
	// next receive, so a guest that causes many events wakes the daemon no more often than
	// it receives.
	C     chan struct{}
	polls []unix.PollFd // the first is readable once Close was called
	rings [][]byte
	stop  chan struct{}
	done  chan struct{}
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
	closed, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open event: %w", err)
	}
	e := &events{C: make(chan struct{}), stop: make(chan struct{}), done: make(chan struct{})}
	e.poll(closed)
	for cpu := range runtime.NumCPU() {
		if err := e.add(id, cpu); err != nil {
			e.free()
			return nil, fmt.Errorf("watch processor %d: %w", cpu, err)
		}
	}
	go e.watch()
	return e, nil
}

// poll adds fd to the descriptors that watch polls, and free closes.
func (e *events) poll(fd int) {
	e.polls = append(e.polls, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
}

// add makes the kernel record the events of one processor.
func (e *events) add(tracepoint uint64, cpu int) error {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Config: tracepoint, Sample: 1, Wakeup: 1, Bits: unix.PerfBitDisabled}
	attr.Size = uint32(unsafe.Sizeof(attr))
	fd, err := unix.PerfEventOpen(&attr, -1, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open event: %w", err)
	}
	e.poll(fd)
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
	return nil
}

// watch sends to C after events. The kernel remembers those that come between two polls.
func (e *events) watch() {
	defer close(e.done)
	for {
		_, err := unix.Poll(e.polls, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || e.polls[0].Revents != 0 {
			return
		}
		for i := range e.polls {
			if p := &e.polls[i]; p.Revents&^unix.POLLIN != 0 {
				p.Fd = -1 - p.Fd // The processor is gone. Poll skips negative descriptors.
			}
		}
		select {
		case e.C <- struct{}{}:
		case <-e.stop:
			return
		}
	}
}

// Close stops watching.
func (e *events) Close() {
	close(e.stop)
	_, _ = unix.Write(int(e.polls[0].Fd), binary.NativeEndian.AppendUint64(nil, 1))
	<-e.done
	e.free()
}

func (e *events) free() {
	for _, r := range e.rings {
		_ = unix.Munmap(r)
	}
	for _, p := range e.polls {
		_ = unix.Close(int(max(p.Fd, -1-p.Fd)))
	}
}
