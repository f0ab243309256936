package qemu

import (
	"context"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

// monitor implements vmm.Monitor: QEMU with an accelerator.
type monitor struct{ accel string }

// Monitors returns QEMU with each accelerator, the faster one first.
func Monitors() []vmm.Monitor { return []vmm.Monitor{monitor{KVM}, monitor{TCG}} }

// Name implements vmm.Monitor.
func (monitor) Name() string { return name }

// Accelerator implements vmm.Monitor.
func (m monitor) Accelerator() string { return m.accel }

// Works implements vmm.Monitor. Emulation needs nothing of the host.
func (m monitor) Works(ctx context.Context, c vmm.Config, again bool) error {
	if m.accel != KVM {
		return nil
	}
	probe := KVMWorks
	if again {
		probe = ProbeKVM
	}
	return probe(ctx, c.Kernel, c.Initrd, c.Dir, c.Log, options(c)...)
}

// Open implements vmm.Monitor.
func (m monitor) Open(c vmm.Config) (vmm.Driver, error) {
	d, err := Open(m.accel, c.Dir, c.Log, options(c)...)
	if err != nil {
		return nil, err // not a nil *Driver
	}
	return d, nil
}

// options are what c says of how to run QEMU.
func options(c vmm.Config) (opts []Option) {
	if c.Unfiltered {
		opts = append(opts, WithoutSeccomp())
	}
	if c.Processor != "" {
		opts = append(opts, WithProcessor(c.Processor))
	}
	return opts
}
