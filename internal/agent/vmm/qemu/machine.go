package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/launcher"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qmp"
)

// consoleBytes is the number of bytes kept of the console's end, a power of two.
const consoleBytes = 64 << 10

// spaceInterval is the time between two attempts of a machine to write to a full disk.
// Nothing reports when the disk has space again.
const spaceInterval = time.Second

// machine implements vmm.VM.
type machine struct {
	state vmm.State
	group cgroup.Group
	qmp   *qmp.Conn
	done  chan struct{} // closed when the process has ended
	// endings belongs to the driver.
	endings *endings
	log     *slog.Logger

	// running is held while the guest is made to run or stop, so that retry does not continue
	// a held machine.
	running sync.Mutex

	mu      sync.Mutex
	stale   bool // QEMU may have descriptors that it does not need
	console []byte
	reason  error
	// forbidden says that QEMU made a forbidden system call. If the agent attached to QEMU,
	// which is then not its child, the agent knows that only from newer kernels.
	forbidden bool
	signal    syscall.Signal // the signal that killed QEMU; 0: none or unknown
}

// State implements vmm.VM.
func (m *machine) State() vmm.State { return m.state }

// PID implements vmm.VM.
func (m *machine) PID() int { return m.state.PID }

// Done implements vmm.VM.
func (m *machine) Done() <-chan struct{} { return m.done }

// Memory implements vmm.VM.
func (m *machine) Memory() (int64, error) { return m.group.Memory() }

// Err implements vmm.VM.
func (m *machine) Err() error {
	if err := m.reported(); err != nil {
		return err
	}
	if err := m.stopped(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.signal != 0 {
		return fmt.Errorf("QEMU was killed by %s", unix.SignalName(m.signal))
	}
	return errors.New("QEMU ended")
}

// errForbidden means that QEMU made a forbidden system call. Its guest may have taken it
// over.
var errForbidden = errors.New("the jail ended QEMU because of a forbidden system call")

// ended records how QEMU ended.
func (m *machine) ended(s syscall.WaitStatus) {
	m.mu.Lock()
	if s.Signaled() {
		m.signal = s.Signal()
	}
	m.forbidden = launcher.Forbidden(s)
	forbidden := m.forbidden
	m.mu.Unlock()
	if !forbidden {
		return
	}
	m.log.Error("the guest may have taken over its QEMU; the kernel's log has the call", "sandbox", m.state.ID, "pid", m.state.PID, "error", errForbidden)
}

// stopped returns [errForbidden] if that ended QEMU.
func (m *machine) stopped() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.forbidden {
		return errForbidden
	}
	return nil
}

// reported returns why the guest ended, if QEMU reported it.
func (m *machine) reported() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reason
}

// handleEvents handles QEMU's events until QEMU ends. QEMU keeps a guest that has shut
// down or crashed; handleEvents reads its console and ends QEMU. QEMU stops a guest that
// cannot write to a full disk; handleEvents retries until the disk has space. If waits is
// set, the guest is in this state already.
func (m *machine) handleEvents(waits bool) {
	var retry <-chan time.Time
	if waits {
		retry = time.After(spaceInterval)
	}
	for {
		select {
		case e, ok := <-m.qmp.Events():
			if !ok {
				return
			}
			switch {
			case e.Name == "SHUTDOWN":
				m.shutdown(e)
			case e.Name == "BLOCK_IO_ERROR" && retry == nil:
				m.log.Warn("the guest waits for space on the host's disk", "sandbox", m.state.ID)
				retry = time.After(spaceInterval)
			}
		case <-retry:
			if retry = nil; m.retry() {
				retry = time.After(spaceInterval)
			}
		}
	}
}

// retry continues a machine that QEMU stopped on a full disk. If the disk is still full, the
// next write stops it again. retry reports whether the caller must retry again.
func (m *machine) retry() (again bool) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	m.running.Lock()
	defer m.running.Unlock()
	status, err := m.status(ctx)
	if err == nil && status != stateNoSpace {
		m.log.Info("the guest no longer waits for space on the host's disk", "sandbox", m.state.ID)
		return false
	}
	if err == nil {
		err = m.qmp.Execute(ctx, "cont", nil, nil)
	}
	if errors.Is(err, qmp.ErrClosed) {
		return false
	}
	if err != nil {
		m.log.Warn("cannot continue a guest that waits for disk space", "sandbox", m.state.ID, "error", err)
	}
	return true
}

// guestShutdown is QEMU's reason for the end of a guest that shut down.
const guestShutdown = "guest-shutdown"

// shutdown reads the console of an ended guest, and then ends QEMU. Only the first SHUTDOWN
// event says why the guest ended.
func (m *machine) shutdown(e qmp.Event) {
	var data struct {
		Guest  bool   `json:"guest"`
		Reason string `json:"reason"`
	}
	_ = json.Unmarshal(e.Data, &data) // the reason is only informative
	m.mu.Lock()
	first := m.reason == nil
	if first {
		m.reason = &vmm.GuestEnd{Off: data.Reason == guestShutdown, Reason: data.Reason}
	}
	m.mu.Unlock()
	if !first {
		return // our own "quit" (host-qmp-quit)
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if _, err := m.Console(ctx); err != nil {
		m.log.Warn("cannot read the console of an ended guest", "sandbox", m.state.ID, "error", err)
	}
	if err := m.qmp.Execute(ctx, "quit", nil, nil); err != nil && !errors.Is(err, qmp.ErrClosed) {
		m.log.Warn("cannot end the QEMU of an ended guest", "sandbox", m.state.ID, "error", err)
	}
}

// Console implements vmm.VM.
func (m *machine) Console(ctx context.Context) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var fresh string
	err := m.qmp.Execute(ctx, "ringbuf-read", map[string]any{"device": "console", "size": consoleBytes, "format": "utf8"}, &fresh)
	if err != nil && !errors.Is(err, qmp.ErrClosed) {
		return nil, fmt.Errorf("read console: %w", err)
	}
	// Keep it, because QEMU returns each byte once.
	m.console = append(m.console, fresh...)
	m.console = m.console[max(0, len(m.console)-consoleBytes):]
	return append([]byte(nil), m.console...), nil
}

// Kill implements vmm.VM.
func (m *machine) Kill(ctx context.Context) error {
	if err := m.endings.end(ctx, m.state, m.state.BootID); err != nil {
		return fmt.Errorf("kill QEMU: %w", err)
	}
	select {
	case <-m.done:
	case <-ctx.Done():
		return fmt.Errorf("kill QEMU: %w", ctx.Err())
	}
	if m.qmp != nil {
		_ = m.qmp.Close() // QEMU is gone
	}
	return removeSocket(m.state.Socket)
}

// Attach implements vmm.Driver.
func (d *Driver) Attach(ctx context.Context, st vmm.State) (_ vmm.VM, err error) {
	fail := func(err error) (vmm.VM, error) { return nil, fmt.Errorf("attach to QEMU: %w", err) }
	pidfd, err := openProcess(st, d.bootID)
	if err != nil {
		return fail(err)
	}
	m := &machine{state: st, group: cgroup.Group{Name: st.ID.String()}, done: make(chan struct{}), endings: &d.endings, log: d.log, stale: true}
	go func() { // ends with QEMU, or if Attach fails
		defer close(m.done)
		defer pidfd.Close()
		if err := awaitEnd(pidfd); err != nil && !errors.Is(err, os.ErrClosed) {
			d.log.Error("cannot wait for QEMU's end", "sandbox", st.ID, "error", err)
		} else if err == nil {
			m.ended(exitStatus(pidfd))
		}
	}()
	defer func() {
		if err == nil {
			return
		}
		// Not ErrGone for a QEMU that is merely silent.
		if hasEnded(pidfd) {
			err = errors.Join(vmm.ErrGone, err)
		}
		_ = pidfd.Close()
		<-m.done
	}()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := m.connect(ctx); err != nil {
		return fail(err)
	}
	status, err := m.status(ctx)
	if err != nil {
		return fail(errors.Join(err, m.qmp.Close()))
	}
	switch status {
	case stateRunning, statePaused, stateNoSpace:
	case "prelaunch", "inmigrate": // the agent died during its start or restore
		return fail(errors.Join(vmm.ErrGone, errors.New("the machine never ran"), m.qmp.Close()))
	default:
		return fail(errors.Join(vmm.ErrGone, fmt.Errorf("the machine's state is %q", status), m.qmp.Close()))
	}
	go m.handleEvents(status == stateNoSpace)
	return m, nil
}

// openProcess returns a pidfd of the process that st names, or ErrGone.
func openProcess(st vmm.State, bootID string) (*os.File, error) {
	if st.BootID != bootID || st.PID <= 1 {
		return nil, vmm.ErrGone
	}
	fd, err := unix.PidfdOpen(st.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, vmm.ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("open process: %w", err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	// After PidfdOpen, so that the start time is that of the opened process.
	start, err := startTime(st.PID)
	switch {
	case err == nil && start == st.StartTime:
		return f, nil
	case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
		err = vmm.ErrGone
	}
	f.Close()
	return nil, err
}

// awaitEnd waits until the process behind a pidfd has ended.
func awaitEnd(pidfd *os.File) error {
	c, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return c.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
}

// reapTime bounds the wait until a dead process's parent has reaped it.
const reapTime = time.Second

// exitStatus returns how the process behind a pidfd ended, or 0 if the kernel does not tell.
// Kernels since 6.15 do, after the parent has reaped the process. Another goroutine may close
// the file during the call.
func exitStatus(pidfd *os.File) syscall.WaitStatus {
	c, err := pidfd.SyscallConn()
	if err != nil {
		return 0
	}
	for deadline := time.Now().Add(reapTime); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
		var err error
		if closed := c.Control(func(fd uintptr) { err = unix.IoctlPidfdInfo(int(fd), &info) }); closed != nil {
			return 0
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return 0
		}
		if err == nil && info.Mask&unix.PIDFD_INFO_EXIT != 0 {
			return syscall.WaitStatus(info.Exit_code)
		}
	}
	return 0
}

// Lives implements vmm.Driver.
func (d *Driver) Lives(id uuid.UUID) (bool, error) {
	return cgroup.Group{Name: id.String()}.Populated()
}

// Reap implements vmm.Driver.
func (d *Driver) Reap(ctx context.Context, st vmm.State) error {
	if err := d.endings.end(ctx, st, d.bootID); err != nil {
		return fmt.Errorf("reap QEMU: %w", err)
	}
	return removeSocket(st.Socket)
}

// endings tracks machines that are being ended. Confine must leave them alone, because the
// kernel accepts a dying process in a new control group, which nobody would remove.
type endings struct {
	mu sync.Mutex // held for a few system calls only
	of map[uuid.UUID]int
}

// begin marks a machine as being ended until the caller calls done.
func (e *endings) begin(machine uuid.UUID) (done func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.of == nil {
		e.of = make(map[uuid.UUID]int)
	}
	e.of[machine]++
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.of[machine]--; e.of[machine] == 0 {
			delete(e.of, machine)
		}
	}
}

// end kills the process that st names and all processes in its group. It does both, because
// a killed agent may not have recorded the process, and other software may have moved it out
// of the group.
func (e *endings) end(ctx context.Context, st vmm.State, bootID string) error {
	defer e.begin(st.ID)()
	pidfd, err := openProcess(st, bootID)
	if err == nil {
		defer pidfd.Close()
		err = unix.PidfdSendSignal(int(pidfd.Fd()), unix.SIGKILL, nil, 0)
		if errors.Is(err, unix.ESRCH) {
			err = nil
		}
	} else if errors.Is(err, vmm.ErrGone) {
		pidfd, err = nil, nil
	}
	if err != nil {
		return err
	}
	if err := (cgroup.Group{Name: st.ID.String()}).Destroy(ctx); err != nil {
		return err
	}
	if pidfd == nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = pidfd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := awaitEnd(pidfd); err != nil {
		return errors.Join(err, ctx.Err())
	}
	return nil
}

// hasEnded reports whether the process behind a pidfd has ended. A closed file means that it
// has, because Attach's goroutine closes it then.
func hasEnded(pidfd *os.File) (ended bool) {
	c, err := pidfd.SyscallConn()
	if err != nil {
		return true
	}
	closed := c.Control(func(fd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		ended = err == nil && n > 0
	})
	return ended || closed != nil
}

// yieldShare divides the weight of a machine that yields. A neighbour then waits for a
// processor about half as long as beside a machine of the same weight (TestFlood).
const yieldShare = 8

// Yield implements [vmm.Yielder].
func (d *Driver) Yield(st vmm.State, s vmm.Spec, yield bool) error {
	weight := float64(d.limits(s).Weight)
	if yield {
		weight /= yieldShare
	}
	if err := (cgroup.Group{Name: st.ID.String()}).SetWeight(weight); err != nil {
		return fmt.Errorf("change QEMU's share of the processors: %w", err)
	}
	return nil
}

// Confine implements [vmm.Confiner].
func (d *Driver) Confine(st vmm.State, s vmm.Spec) (repaired bool, err error) {
	pidfd, err := openProcess(st, d.bootID)
	if errors.Is(err, vmm.ErrGone) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("confine QEMU: %w", err)
	}
	defer pidfd.Close() // the pidfd keeps the pid from being reused
	d.endings.mu.Lock()
	defer d.endings.mu.Unlock()
	if d.endings.of[st.ID] > 0 || hasEnded(pidfd) {
		return false, nil
	}
	repaired, err = cgroup.Group{Name: st.ID.String()}.Confine(st.PID, d.limits(s))
	if err != nil {
		if hasEnded(pidfd) {
			return false, nil
		}
		return false, fmt.Errorf("confine QEMU: %w", err)
	}
	return repaired, nil
}
