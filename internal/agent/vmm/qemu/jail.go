package qemu

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/jail"
)

// cell is the jail of all QEMUs.
type cell struct {
	*jail.Jail
	mu    sync.Mutex // held during a start, which changes the thread's namespace and group
	hostN *os.File   // the agent's network namespace
}

// newCell makes a jail on the empty folder mountPoint. It has only the devices that QEMU
// opens by name. All other files are passed to QEMU as descriptors.
func newCell(mountPoint string) (*cell, error) {
	if err := os.MkdirAll(mountPoint, 0o700); err != nil {
		return nil, fmt.Errorf("make jail: %w", err)
	}
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("make jail: %w", err)
	}
	j, err := jail.New(mountPoint, "null", "zero", "urandom", "kvm")
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return &cell{Jail: j, hostN: ns}, nil
}

func (c *cell) close() error {
	c.Close()
	return c.hostN.Close()
}

// do runs start on the jail's thread, in the given network namespace and
// control group.
func (c *cell) do(netNS string, g cgroup.Group, start func() error) (err error) {
	var ns *os.File
	if netNS != "" {
		if ns, err = os.Open(netNS); err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		defer ns.Close()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// From this thread, because the jail's thread does not see the control groups' files.
	if err := g.AddThread(c.Thread()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cgroup.LeaveThread(c.Thread())) }()
	return c.Do(func() (err error) {
		if ns != nil {
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter network namespace: %w", err)
			}
			defer func() { err = errors.Join(err, unix.Setns(int(c.hostN.Fd()), unix.CLONE_NEWNET)) }()
		}
		return start()
	})
}
