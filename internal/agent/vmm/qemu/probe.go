package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

const (
	// probeStall is the time without output after which a probe gives up. A kernel that KVM
	// cannot run prints nothing, while a slow one keeps printing.
	probeStall = 10 * time.Second
	// probeTimeout bounds a whole probe.
	probeTimeout = 60 * time.Second
	// probeInterval is the time between two reads of the guest's console, because QEMU has no
	// event for new output.
	probeInterval = 200 * time.Millisecond
)

// probeMarker is the initrd's output when the kernel has reached user space.
const probeMarker = "wrenn-init:"

// probeUID is the user that a probe's QEMU runs as.
const probeUID = 1_999_999

// verdict is the result of a probe, with the key for which it is valid.
type verdict struct {
	Key string `json:"key"`
	Why string `json:"why"` // why KVM does not work (empty: it works)
}

// brokenError is a reason against KVM that QEMU or the guest reported, unlike a timeout. It
// stays valid until the host, QEMU or the kernel changes.
type brokenError struct{ err error }

func (e brokenError) Error() string { return e.err.Error() }
func (e brokenError) Unwrap() error { return e.err }

// KVMWorks returns nil if a kernel boots under KVM, or the reason why not. A host can have
// /dev/kvm and still be unable to boot one. KVMWorks keeps the result in c.Dir, and uses it
// again until the host reboots or QEMU or the kernel changes.
func KVMWorks(ctx context.Context, c vmm.Config) error {
	if err := haveKVM(); err != nil {
		return err
	}
	key, err := probeKey(c.Kernel, c.Initrd)
	if err != nil {
		return fmt.Errorf("probe KVM: %w", err)
	}
	if v, err := readVerdict(c.Dir); err == nil && v.Key == key {
		if v.Why != "" {
			return errors.New(v.Why)
		}
		return nil
	}
	return probeKVM(ctx, c)
}

// probeKVM is [KVMWorks] without using an earlier result. It replaces that result, or removes
// it if the probe is inconclusive.
func probeKVM(ctx context.Context, c vmm.Config) error {
	if err := haveKVM(); err != nil {
		return err
	}
	key, err := probeKey(c.Kernel, c.Initrd)
	if err != nil {
		return fmt.Errorf("probe KVM: %w", err)
	}
	why := bootKVM(ctx, c)
	if ctx.Err() != nil {
		return fmt.Errorf("probe KVM: %w", ctx.Err())
	}
	if err := remember(c.Dir, key, why); err != nil {
		return fmt.Errorf("probe KVM: %w", err)
	}
	return why
}

func haveKVM() error {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return fmt.Errorf("no KVM: %w", err)
	}
	return nil
}

func verdictFile(dir string) string { return filepath.Join(dir, "kvm-probe.json") }

func readVerdict(dir string) (v verdict, err error) {
	b, err := os.ReadFile(verdictFile(dir))
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(b, &v)
}

// remember stores the result of a probe. If the probe was inconclusive, because it was too
// slow or failed itself, remember removes the stored result.
func remember(dir, key string, why error) error {
	v := verdict{Key: key}
	if why != nil {
		if !errors.As(why, new(brokenError)) {
			err := os.Remove(verdictFile(dir))
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		v.Why = why.Error()
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(verdictFile(dir), b, 0o600)
}

// probeKey returns a key that changes whenever the result of a probe may change.
func probeKey(kernel, initrd string) (string, error) {
	key, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	for _, name := range []string{Program.File, kernel, initrd} {
		info, err := os.Stat(name)
		if err != nil {
			return "", err
		}
		key = fmt.Appendf(bytes.TrimSpace(key), " %d.%d", info.Size(), info.ModTime().UnixNano())
	}
	return string(key), nil
}

// bootKVM boots a machine without a disk, and waits until its guest prints probeMarker.
func bootKVM(ctx context.Context, c vmm.Config) (err error) {
	tmp, err := os.MkdirTemp(c.Dir, "probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	c.Dir = tmp
	d, err := Open(KVM, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	deadline, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	vm, err := d.Start(deadline, vmm.Spec{
		ID: uuid.New(), Dir: tmp, Kernel: c.Kernel, Initrd: c.Initrd, VCPUs: 1, MemoryMiB: 256, UID: probeUID,
		Cmdline: "console=ttyS0 reboot=t panic=-1",
	})
	if err != nil {
		var said complaintError
		if deadline.Err() == nil && !errors.Is(err, context.DeadlineExceeded) && errors.As(err, &said) {
			return brokenError{fmt.Errorf("KVM is available, but no machine starts with it: %s", strings.Join(strings.Fields(said.Error()), " "))}
		}
		return err
	}
	defer func() {
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
		defer cancel()
		err = errors.Join(err, vm.Kill(kill))
	}()
	return awaitUserSpace(deadline, vm.(*machine))
}

// awaitUserSpace waits until the guest has reached user space.
func awaitUserSpace(ctx context.Context, m *machine) error {
	tick := time.NewTicker(probeInterval)
	defer tick.Stop()
	printed, at := 0, time.Now()
	for {
		ended := false
		select {
		case <-m.Done(): // without a disk, the guest reboots in the end, which ends the machine
			ended = true
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("no kernel reached user space under KVM within %v", probeTimeout)
		}
		console, err := m.Console(ctx)
		if err != nil && !ended {
			return err
		}
		if bytes.Contains(console, []byte(probeMarker)) {
			return nil
		}
		if ended {
			if err := m.reported(); err != nil {
				return brokenError{fmt.Errorf("KVM is available, but a kernel does not reach user space: %w", err)}
			}
			return m.Err()
		}
		if status, err := m.status(ctx); err == nil && status == stateInternalError {
			return brokenError{errors.New("KVM is available, but cannot run a kernel (QEMU stopped with an internal error)")}
		}
		if len(console) > printed {
			printed, at = len(console), time.Now()
		}
		if time.Since(at) > probeStall {
			return fmt.Errorf("a kernel under KVM printed nothing for %v", probeStall)
		}
	}
}
