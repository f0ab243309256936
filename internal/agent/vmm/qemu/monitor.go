package qemu

import (
	"context"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

// monitor implements vmm.Monitor for QEMU with an accelerator.
type monitor struct{ accel string }

// Monitors returns a monitor for each accelerator, the faster one first.
func Monitors() []vmm.Monitor { return []vmm.Monitor{monitor{KVM}, monitor{TCG}} }

// Name implements vmm.Monitor.
func (monitor) Name() string { return name }

// Accelerator implements vmm.Monitor.
func (m monitor) Accelerator() string { return m.accel }

// Works implements vmm.Monitor. Emulation works on every host.
func (m monitor) Works(ctx context.Context, c vmm.Config, again bool) error {
	if m.accel != KVM {
		return nil
	}
	probe := KVMWorks
	if again {
		probe = probeKVM
	}
	return probe(ctx, c)
}

// Open implements vmm.Monitor.
func (m monitor) Open(c vmm.Config) (vmm.Driver, error) {
	d, err := Open(m.accel, c)
	if err != nil {
		return nil, err // not d, because a nil *Driver is not a nil interface
	}
	return d, nil
}
