package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qmp"
)

const (
	// maxDevices bounds the state of a machine's devices, in bytes. It needs a few kilobytes,
	// but the guest may have taken over QEMU.
	maxDevices = 16 << 20
	// commandTimeout bounds a command that changes QEMU's state. Such a command does not end
	// with its caller's context.
	commandTimeout = 30 * time.Second
	// devicesFD is the purpose of the descriptor to which QEMU writes the devices' state.
	devicesFD = "devices"
)

// LostInterrupts is the driver's log message for a saved state whose restored guest might
// hang; see [redeliver].
const LostInterrupts = "the saved state has lost the end of an interrupt"

// The states of QEMU (its RunState) that matter to the driver.
const (
	stateRunning = "running"
	statePaused  = "paused"
	// stateNoSpace means that a write of the guest to its disk failed. QEMU repeats it when
	// the machine continues.
	stateNoSpace = "io-error"
	// stateInternalError means that KVM cannot run the guest's instructions.
	stateInternalError = "internal-error"
)

// status returns QEMU's state.
func (m *machine) status(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := m.qmp.Execute(ctx, "query-status", nil, &s)
	return s.Status, err
}

// Hold implements vmm.VM.
func (m *machine) Hold(ctx context.Context) error {
	ctx, cancel := unbroken(ctx)
	defer cancel()
	m.running.Lock()
	defer m.running.Unlock()
	if err := m.qmp.Execute(ctx, "stop", nil, nil); err != nil {
		return fmt.Errorf("hold: %w", err)
	}
	switch status, err := m.status(ctx); {
	case err != nil:
		return fmt.Errorf("hold: %w", err)
	case status == statePaused:
		return nil
	case status == stateNoSpace:
		return errors.New("hold: the guest waits for space on its disk")
	default:
		return fmt.Errorf("hold: the machine's state is %q", status)
	}
}

// Run implements vmm.VM.
func (m *machine) Run(ctx context.Context) error {
	ctx, cancel := unbroken(ctx)
	defer cancel()
	m.running.Lock()
	err := m.qmp.Execute(ctx, "cont", nil, nil)
	m.running.Unlock()
	if err != nil {
		return fmt.Errorf("run: %w", err)
	}
	if err := m.dropDescriptors(ctx); err != nil {
		m.log.Warn("cannot make QEMU close unneeded descriptors", "sandbox", m.state.ID, "error", err)
	}
	return nil
}

// unbroken returns a context that does not end with ctx.
func unbroken(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), commandTimeout)
}

// Devices implements vmm.VM.
//
// QEMU's command for Xen saves a migration stream (docs/devel/migration.rst) without memory,
// disks and configuration.
func (m *machine) Devices(ctx context.Context) (_ []byte, err error) {
	fail := func(err error) ([]byte, error) { return nil, fmt.Errorf("save devices: %w", err) }
	status, err := m.status(ctx)
	if err != nil {
		return fail(err)
	}
	if status != statePaused {
		return fail(fmt.Errorf("the machine's state is %q", status))
	}
	f, err := memfd("devices")
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	// QEMU needs a write-only descriptor.
	w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_WRONLY, 0)
	if err != nil {
		return fail(err)
	}
	defer w.Close()
	m.mayDrop()
	added, err := m.qmp.Pass(ctx, w, -1, devicesFD)
	if err != nil {
		return fail(err)
	}
	// Without live, QEMU keeps control of the disks, so that it can continue.
	err = m.qmp.Execute(ctx, "xen-save-devices-state", map[string]any{"filename": fdset(added.Set), "live": false}, nil)
	if err != nil {
		return fail(err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fail(err)
	}
	state, err := io.ReadAll(io.LimitReader(f, maxDevices+1))
	if err != nil {
		return fail(err)
	}
	if len(state) == 0 || len(state) > maxDevices {
		return fail(fmt.Errorf("QEMU wrote %d bytes, which is none or too many", len(state)))
	}
	if lost := len(lostInterrupts(state)); lost > 0 {
		m.log.Error(LostInterrupts, "sandbox", m.state.ID, "interrupts", lost)
	}
	return state, nil
}

// mayDrop notes that QEMU may soon have descriptors that it does not need.
func (m *machine) mayDrop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stale = true
}

// dropDescriptors makes a running QEMU close descriptors that it received and no longer
// needs. Some versions do not close any while they hold the guest.
func (m *machine) dropDescriptors(ctx context.Context) error {
	m.mu.Lock()
	stale := m.stale
	m.stale = false
	m.mu.Unlock()
	if !stale {
		return nil
	}
	top, err := m.top(ctx)
	if err != nil && !errors.Is(err, errNoDisk) {
		return err
	}
	var sets []struct {
		Set int `json:"fdset-id"`
		FDs []struct {
			FD     int    `json:"fd"`
			Opaque string `json:"opaque"`
		} `json:"fds"`
	}
	if err := m.qmp.Execute(ctx, "query-fdsets", nil, &sets); err != nil {
		return err
	}
	var errs []error
	for _, s := range sets {
		for _, fd := range s.FDs {
			if fd.Opaque != devicesFD && (fd.Opaque == writableFD(top.Name) || !isWritableFD(fd.Opaque)) {
				continue
			}
			errs = append(errs, m.qmp.Execute(ctx, "remove-fd", qmp.Descriptor{Set: s.Set, FD: fd.FD}, nil))
		}
	}
	return errors.Join(errs...)
}
