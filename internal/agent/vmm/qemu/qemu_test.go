package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	"github.com/wrenn-dev/wrenn/internal/programs"
)

const testUID = 1_999_998

func open(t *testing.T) (*Driver, vmm.Spec) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to start virtual machines")
	}
	if _, err := programs.QEMU.Find(); err != nil {
		t.Skip("needs QEMU")
	}
	if err := cgroup.Available(); err != nil {
		t.Skip(err)
	}
	in := imagetest.Prepare(t)
	d, err := Open(vmmtest.Accelerator(), t.TempDir(), slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	d.starts = vmmtest.Within(t, startTimeout)
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	s := vmm.Spec{
		ID: uuid.New(), Dir: t.TempDir(), Kernel: in.Kernel.Vmlinux, Initrd: in.Kernel.Initrd, Cmdline: guest.Cmdline("vmm-test"),
		VCPUs: 1, MemoryMiB: 256, Base: in.Minimal.Rootfs, UID: testUID,
		DiskBytes: int64(in.Minimal.DiskMiB) << 20,
	}
	s.Overlay = filepath.Join(s.Dir, "overlay.qcow2")
	if err := disk.Create(disk.Qcow2, s.Overlay, int64(in.Minimal.DiskMiB)<<20, s.UID); err != nil {
		t.Fatal(err)
	}
	return d, s
}

// bootTime bounds a boot under emulation on a machine that does other things
// besides. TestBootOnABusyHost has an eighth of a processor, and a guest that
// hangs there never gets on.
const bootTime = 5 * time.Minute

// awaitConsole waits until the guest has printed text. Nothing tells when.
func awaitConsole(t *testing.T, vm vmm.VM, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), vmmtest.Within(t, bootTime))
	defer cancel()
	var console []byte
	for {
		more, err := vm.Console(ctx)
		if err != nil {
			t.Fatalf("%v; the console before: %s", err, console)
		}
		console = more
		if strings.Contains(string(console), text) {
			return
		}
		select {
		case <-vm.Done():
			t.Fatalf("%v: %s", vm.Err(), console)
		case <-ctx.Done():
			t.Fatalf("no %q on the console: %s", text, console)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func nothingLeft(t *testing.T, vm vmm.VM) {
	t.Helper()
	st := vm.State()
	// A machine that was taken back is another's child, who may not have heard
	// of its end yet.
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", st.PID))
	if start, err := parseStartTime(string(stat)); err == nil && start == st.StartTime && !strings.Contains(string(stat), ") Z ") {
		t.Error("the process is left")
	}
	if _, err := os.Stat(st.Socket); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the socket is left")
	}
	if _, err := (cgroup.Group{Name: st.ID.String()}).Memory(); err == nil {
		t.Error("the control group is left")
	}
}

func TestBootBoundsAttachKill(t *testing.T) {
	d, s := open(t)
	vm, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vm.Kill(context.Background()) })
	awaitConsole(t, vm, "no network card")

	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", vm.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d\n", testUID, testUID, testUID, testUID),
		fmt.Sprintf("Gid:\t%d\t%d\t%d\t%d\n", testUID, testUID, testUID, testUID),
		"Groups:\t \n", "CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n",
		"NoNewPrivs:\t1\n", "Seccomp:\t2\n",
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("the process lacks %q:\n%s", want, status)
		}
	}
	// It sees no other process: it is the first of a namespace of its own.
	if !strings.Contains(string(status), fmt.Sprintf("NSpid:\t%d\t1\n", vm.PID())) {
		t.Errorf("the process has no namespace of processes of its own:\n%s", status)
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", vm.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.Contains(" usr lib lib64 lib32 libx32 bin sbin etc dev proc ", " "+e.Name()+" ") {
			t.Errorf("the jail shows %s", e.Name())
		}
	}
	// What the test's folders have, not what others mount meanwhile.
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), filepath.Dir(t.TempDir())) {
		t.Errorf("the jail's mounts show outside of it: %s, %v", mounts, err)
	}
	if m, err := vm.Memory(); err != nil || m < 16<<20 {
		t.Errorf("memory is %d, %v", m, err)
	}

	// The agent is restarted.
	_ = vm.(*machine).qmp.Close()
	other, err := Open(vmmtest.Accelerator(), t.TempDir(), d.log)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	again, err := other.Attach(t.Context(), vm.State())
	if err != nil {
		t.Fatal(err)
	}
	if lives, err := other.Lives(vm.State().ID); err != nil || !lives {
		t.Errorf("the machine lives: %v, %v", lives, err)
	}
	if err := again.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-vm.Done()
	nothingLeft(t, again)
	if lives, err := other.Lives(vm.State().ID); err != nil || lives {
		t.Errorf("the machine lives: %v, %v", lives, err)
	}
	if _, err := other.Attach(t.Context(), vm.State()); !errors.Is(err, vmm.ErrGone) {
		t.Errorf("attached to a machine that is gone: %v", err)
	}
	wrong := vm.State()
	wrong.PID = os.Getpid()
	if _, err := other.Attach(t.Context(), wrong); !errors.Is(err, vmm.ErrGone) {
		t.Errorf("attached to another process: %v", err)
	}
	if err := other.Reap(t.Context(), vm.State()); err != nil {
		t.Errorf("reap what is gone: %v", err)
	}
}

// A guest that boots while the host is busy once in a while gets no time for
// longer than it waits for a timer.
func TestBootOnABusyHost(t *testing.T) {
	d, s := open(t)
	stop := make(chan struct{})
	var hogs sync.WaitGroup
	for range 3 * runtime.NumCPU() {
		hogs.Add(1)
		cmd := exec.Command("sh", "-c", "ulimit -t 300; while :; do :; done") // which ends should the test not
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() {
			defer hogs.Done()
			<-stop
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
	}
	defer hogs.Wait()
	defer close(stop)
	vm, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := vm.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	awaitConsole(t, vm, "no network card")
}

func TestTSC(t *testing.T) {
	a, err := tscKHz()
	if err != nil {
		t.Fatal(err)
	}
	b, err := tscKHz()
	if err != nil {
		t.Fatal(err)
	}
	if d := a - b; d > a/1000 || -d > a/1000 {
		t.Errorf("measured %d and then %d kHz", a, b)
	}
}

// TestInheritsNothing: QEMU has no descriptor that this process was started with,
// or that anything in it opened carelessly.
func TestInheritsNothing(t *testing.T) {
	d, s := open(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(secret, unix.O_RDONLY, 0) // without O_CLOEXEC
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	vm, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vm.Kill(context.Background()) })
	home := fmt.Sprintf("/proc/%d/fd", vm.PID())
	all, err := os.ReadDir(home)
	if err != nil || len(all) < 3 {
		t.Fatalf("QEMU has %d descriptors, %v", len(all), err)
	}
	for _, e := range all {
		if target, err := os.Readlink(filepath.Join(home, e.Name())); err == nil && target == secret {
			t.Errorf("QEMU inherited descriptor %s, of %s", e.Name(), target)
		}
	}
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, vm)
}

func TestKilledQEMUIsNoticed(t *testing.T) {
	d, s := open(t)
	vm, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vm.Kill(context.Background()) })
	if err := syscall.Kill(vm.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-vm.Done():
	case <-time.After(vmmtest.Within(t, 60*time.Second)):
		t.Fatal("Done is not closed")
	}
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, vm)
}

func TestGuestThatEndsLeavesItsConsole(t *testing.T) {
	d, s := open(t)
	s.Cmdline = "console=ttyS0 reboot=t panic=-1" // names no root
	vm, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vm.Kill(context.Background()) })
	select {
	case <-vm.Done():
	case <-time.After(vmmtest.Within(t, 60*time.Second)):
		t.Error("a guest that rebooted still runs")
	}
	console, err := vm.Console(t.Context())
	if err != nil || !strings.Contains(string(console), "names no root") {
		t.Errorf("the console is %q, %v", console, err)
	}
	// The guest's own reason, not "host-qmp-quit", which is how the driver ends QEMU.
	if got := vm.Err().Error(); got != "the guest shut down (guest-reset)" {
		t.Errorf("the machine ended by %q", got)
	}
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, vm)
}

func TestFailedStartSaysWhyAndLeavesNothing(t *testing.T) {
	d, s := open(t)
	s.Kernel = filepath.Join(s.Dir, "kernel")
	if err := os.WriteFile(s.Kernel, []byte("no kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	if vm, err := d.Start(t.Context(), s); err == nil || !strings.Contains(err.Error(), "QEMU says") {
		t.Errorf("started %v, %v", vm, err)
	}
	if _, err := os.Stat(filepath.Join(s.Dir, socketName)); err == nil {
		t.Error("the socket is left")
	}
	if err := (cgroup.Group{Name: s.ID.String()}).Destroy(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestParseStartTime(t *testing.T) {
	got, err := parseStartTime("7 (a) b) c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 0 0")
	if err != nil || got != 12345 {
		t.Errorf("got %d, %v", got, err)
	}
	for _, bad := range []string{"", "7 (a", "7 (a) S 1"} {
		if _, err := parseStartTime(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func FuzzParseStartTime(f *testing.F) {
	f.Fuzz(func(_ *testing.T, s string) { _, _ = parseStartTime(s) })
}
