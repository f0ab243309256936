package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

// probeTimeout bounds the boot of a kernel under KVM, which takes a fraction
// of a second where KVM works.
const probeTimeout = 10 * time.Second

// probeMarker is what the initrd prints when a kernel has got that far.
const probeMarker = "wrenn-init:"

// verdict is what a probe found out, and for which host.
type verdict struct {
	Key string `json:"key"`
	Why string `json:"why"` // empty: KVM works
}

// ProbeKVM boots a kernel under KVM to find out whether that works here: a
// host can have /dev/kvm and still be unable to. It returns nil or why not.
// The answer is remembered in dir until the host boots again or QEMU or the
// kernel changes.
func ProbeKVM(ctx context.Context, kernel, initrd, dir string, log *slog.Logger) error {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return fmt.Errorf("no KVM: %w", err)
	}
	key, err := probeKey(kernel, initrd)
	if err != nil {
		return fmt.Errorf("probe KVM: %w", err)
	}
	cache := filepath.Join(dir, "kvm-probe.json")
	var v verdict
	if b, err := os.ReadFile(cache); err != nil || json.Unmarshal(b, &v) != nil || v.Key != key {
		v = verdict{Key: key}
		if err := bootKVM(ctx, kernel, initrd, dir, log); err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("probe KVM: %w", ctx.Err())
			}
			v.Why = err.Error()
		}
		b, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if err := os.WriteFile(cache, b, 0o600); err != nil {
			return fmt.Errorf("probe KVM: %w", err)
		}
	}
	if v.Why != "" {
		return errors.New(v.Why)
	}
	return nil
}

// probeKey changes when the answer may.
func probeKey(kernel, initrd string) (string, error) {
	key, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	for _, name := range []string{Binary, kernel, initrd} {
		info, err := os.Stat(name)
		if err != nil {
			return "", err
		}
		key = fmt.Appendf(bytes.TrimSpace(key), " %d.%d", info.Size(), info.ModTime().UnixNano())
	}
	return string(key), nil
}

// bootKVM boots a machine without a disk, which gets as far as saying so.
func bootKVM(ctx context.Context, kernel, initrd, dir string, log *slog.Logger) (err error) {
	tmp, err := os.MkdirTemp(dir, "probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	d, err := Open(KVM, tmp, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	deadline, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	vm, err := d.Start(deadline, vmm.Spec{
		ID: uuid.New(), Dir: tmp, Kernel: kernel, Initrd: initrd, VCPUs: 1, MemoryMiB: 256, UID: probeUID,
		Cmdline: "console=ttyS0 reboot=t panic=-1",
	})
	if err != nil {
		return err
	}
	defer func() {
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
		defer cancel()
		err = errors.Join(err, vm.Kill(kill))
	}()
	// Without a disk the guest reboots, which ends the machine.
	select {
	case <-vm.Done():
	case <-deadline.Done():
		return fmt.Errorf("KVM is there, but a kernel does not boot on it within %v", probeTimeout)
	}
	console, err := vm.Console(ctx)
	if err != nil {
		return err
	}
	if !bytes.Contains(console, []byte(probeMarker)) {
		return fmt.Errorf("KVM is there, but a kernel does not get to user space: %w", vm.Err())
	}
	return nil
}

// probeUID is the user that a probe's QEMU runs as.
const probeUID = 1_999_999
