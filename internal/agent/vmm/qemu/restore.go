package qemu

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qmp"
)

// incomingFD is the descriptor, in a restored QEMU, of the pipe with the state of its
// devices.
const incomingFD = 3

// Restore implements vmm.Driver.
func (d *Driver) Restore(ctx context.Context, s vmm.Spec, from vmm.Saved) (vmm.VM, error) {
	fail := func(err error) (vmm.VM, error) { return nil, fmt.Errorf("restore QEMU: %w", err) }
	if len(from.Devices) == 0 {
		return fail(errors.New("the state of devices is empty")) // QEMU would wait for it
	}
	as, cpu, err := d.model(cmp.Or(from.Kind, d.Kind(false)))
	if err != nil {
		return fail(err)
	}
	devices := from.Devices
	if as.repaired {
		var lost int
		if devices, lost = redeliver(devices); lost > 0 {
			d.log.Warn("the saved machine lost the end of an interrupt; delivering the interrupt again", "sandbox", s.ID, "interrupts", lost)
		}
	}
	// A pipe, because all versions of QEMU can read a migration from one.
	r, w, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer r.Close()
	defer w.Close()
	vm, err := d.launch(ctx, s, as, cpu, from.Memory, r, func(ctx context.Context, m *machine) error {
		// The memory first, because devices read it when they are restored, and Attach takes
		// a machine with its devices for a complete one.
		if err := m.restoreMemory(from); err != nil {
			return err
		}
		return m.restoreDevices(ctx, devices, w)
	})
	if err != nil {
		return fail(err)
	}
	return vm, nil
}

func (m *machine) restoreMemory(from vmm.Saved) error {
	r, err := openRAM(m.state, os.O_RDWR)
	if err != nil {
		return err
	}
	defer r.close()
	if from.Changed != nil {
		if err := r.write(from.Changed); err != nil {
			return err
		}
	}
	if m.state.MemoryTracked, err = r.track(); err != nil {
		return fmt.Errorf("track changes of memory: %w", err)
	}
	return nil
}

// restoreDevices writes state to w, the other end of QEMU's incoming pipe, and waits until
// QEMU has restored it.
func (m *machine) restoreDevices(ctx context.Context, state []byte, w *os.File) error {
	events := object{"capabilities": []object{{"capability": "events", "state": true}}}
	if err := m.qmp.Execute(ctx, "migrate-set-capabilities", events, nil); err != nil {
		return err
	}
	if err := m.qmp.Execute(ctx, "migrate-incoming", object{"uri": fmt.Sprintf("fd:%d", incomingFD)}, nil); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { w.Close() })
	defer stop()
	if _, err := w.Write(state); err != nil {
		return fmt.Errorf("write state of devices: %w", err)
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("write state of devices: %w", err)
	}
	for {
		select {
		case e, ok := <-m.qmp.Events():
			if !ok {
				return fmt.Errorf("restore devices: %w", qmp.ErrClosed)
			}
			if e.Name != "MIGRATION" {
				continue
			}
			var data struct {
				Status string `json:"status"`
			}
			if err := json.Unmarshal(e.Data, &data); err != nil {
				return fmt.Errorf("restore devices: %w", err)
			}
			switch data.Status {
			case "completed":
				return m.restored(ctx)
			case "failed":
				return errors.New("restore devices: QEMU rejected their state")
			}
		case <-ctx.Done():
			return fmt.Errorf("restore devices: %w", ctx.Err())
		}
	}
}

// restored checks that a machine is held after its restore.
func (m *machine) restored(ctx context.Context) error {
	status, err := m.status(ctx)
	if err != nil {
		return err
	}
	if status != statePaused {
		return fmt.Errorf("restore devices: the machine's state is %q", status)
	}
	return nil
}
