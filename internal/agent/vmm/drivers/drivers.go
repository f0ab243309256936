// Package drivers lists the virtual machine monitors that Wrenn supports, and chooses one.
package drivers

import (
	"context"
	"fmt"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qemu"
)

// Auto stands for any accelerator.
const Auto = "auto"

// all lists the monitors, preferred ones first. A new driver adds its own here.
var all = qemu.Monitors()

// Open opens the first driver with the accelerator or, for [Auto], the first one that works
// on this host.
func Open(ctx context.Context, accel string, c vmm.Config) (vmm.Driver, error) {
	return open(ctx, all, accel, c)
}

func open(ctx context.Context, all []vmm.Monitor, accel string, c vmm.Config) (vmm.Driver, error) {
	for _, m := range all {
		if accel != Auto && m.Accelerator() != accel {
			continue
		}
		if accel == Auto {
			err := m.Works(ctx, c, false)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil {
				c.Log.Warn("cannot run guests with this accelerator", "vmm", m.Name(), "accelerator", m.Accelerator(), "reason", err)
				continue
			}
			if m.Accelerator() == vmm.TCG {
				c.Log.Warn("guests are emulated, which is slow")
			}
		}
		return m.Open(c)
	}
	return nil, fmt.Errorf("no virtual machine monitor runs guests with accelerator %q", accel)
}

// Probe finds out which monitor can run guests with the accelerator on this host, without
// using earlier results. It returns the name of the first one, or the reason why none can.
func Probe(ctx context.Context, accel string, c vmm.Config) (name string, err error) {
	return probe(ctx, all, accel, c)
}

func probe(ctx context.Context, all []vmm.Monitor, accel string, c vmm.Config) (name string, err error) {
	err = fmt.Errorf("no virtual machine monitor runs guests with accelerator %q", accel)
	for _, m := range all {
		if m.Accelerator() != accel {
			continue
		}
		if err = m.Works(ctx, c, true); err == nil {
			return m.Name(), nil
		}
	}
	return "", err
}
