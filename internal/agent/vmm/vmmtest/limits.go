package vmmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/await"
)

// booted is what the guest's init prints after a boot without a network.
const booted = "no network card"

// boot kills an agent after it started a machine, and another after it held the machine. Then
// it attaches to the machine and checks the jail of the monitor's process.
func (s *suite) boot(t *testing.T) {
	d := s.Open(t)
	spec := NewSpec(t, d)
	if !strings.Contains(d.Kind(false), Accelerator()) || d.Accelerator() != Accelerator() || d.Name() == "" {
		t.Errorf("the driver is %q with %q, of the kind %q", d.Name(), d.Accelerator(), d.Kind(false))
	}
	if err := d.Restores(d.Kind(false)); err != nil {
		t.Errorf("the driver does not restore its own kind: %v", err)
	}
	for _, kind := range []string{"", "none", "none 1.2.3 " + Accelerator() + " 0123456789abcdef"} {
		if d.Restores(kind) == nil {
			t.Errorf("the driver restores machines of the kind %q", kind)
		}
	}
	st := s.killedAgent(t, orders{Start: &spec})
	t.Cleanup(func() { _ = d.Reap(context.Background(), st) })
	if st.ID != spec.ID || st.Kind != d.Kind(false) || st.MemoryBytes != int64(spec.MemoryMiB)<<20 {
		t.Errorf("the state is %+v", st)
	}
	// A held machine must stay held when its agent dies.
	again := s.killedAgent(t, orders{Hold: &st})
	if again.ID != st.ID || again.PID != st.PID || again.StartTime != st.StartTime {
		t.Errorf("the state was %+v before the agent held the machine, and is %+v", st, again)
	}
	vm, err := d.Attach(t.Context(), st)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := vm.Devices(t.Context()); err != nil {
		t.Errorf("the machine is not held: %v", err)
	}
	for range 2 { // the second call has nothing to do
		if err := vm.Run(t.Context()); err != nil {
			t.Error(err)
		}
	}
	awaitConsole(t, vm, booted)
	if _, err := vm.Devices(t.Context()); err == nil {
		t.Error("the driver saved the devices of a running machine")
	}
	jailed(t, vm, spec)
	if m, err := vm.Memory(); err != nil || m < 16<<20 {
		t.Errorf("the machine takes %d bytes of memory, %v", m, err)
	}
	if lives, err := d.Lives(st.ID); err != nil || !lives {
		t.Errorf("the machine lives: %v, %v", lives, err)
	}
	confined(t, d, st, spec)
	kill(t, d, vm)
	if _, err := d.Attach(t.Context(), st); !errors.Is(err, vmm.ErrGone) {
		t.Errorf("attach to a machine that is gone: %v", err)
	}
	for name, change := range map[string]func(*vmm.State){
		"another process":              func(st *vmm.State) { st.PID = os.Getpid() },
		"a process of an earlier boot": func(st *vmm.State) { st.PID = os.Getpid(); st.BootID = "another boot" },
		"no process":                   func(st *vmm.State) { st.PID = 0 },
		"the host's init":              func(st *vmm.State) { st.PID = 1 },
	} {
		wrong := st
		change(&wrong)
		if _, err := d.Attach(t.Context(), wrong); !errors.Is(err, vmm.ErrGone) {
			t.Errorf("attach to %s: %v", name, err)
		}
	}
	if err := d.Reap(t.Context(), st); err != nil {
		t.Errorf("reap a machine that is gone: %v", err)
	}
}

// jailed checks that the monitor's process is in its jail.
func jailed(t *testing.T, vm vmm.VM, spec vmm.Spec) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", vm.PID()))
	if err != nil {
		t.Fatal(err)
	}
	uid := spec.UID
	for _, want := range []string{
		fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d\n", uid, uid, uid, uid),
		fmt.Sprintf("Gid:\t%d\t%d\t%d\t%d\n", uid, uid, uid, uid),
		"Groups:\t \n", "CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n",
		"NoNewPrivs:\t1\n", "Seccomp:\t2\n",
		// As the first process of its own namespace, it sees no other.
		fmt.Sprintf("NSpid:\t%d\t1\n", vm.PID()),
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("the monitor's status lacks %q:\n%s", want, status)
		}
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
	// Look only for this test's folder, because other tests mount theirs.
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), filepath.Dir(t.TempDir())) {
		t.Errorf("the jail's mounts are visible outside of it: %s, %v", mounts, err)
	}
}

// confined moves the monitor out of its control group, which a [vmm.Confiner] must repair.
func confined(t *testing.T, d vmm.Driver, st vmm.State, spec vmm.Spec) {
	t.Helper()
	c, ok := d.(vmm.Confiner)
	if !ok {
		return
	}
	for _, out := range []bool{false, true, false} {
		if out {
			if err := MoveOut(st.PID); err != nil {
				t.Fatal(err)
			}
		}
		if repaired, err := c.Confine(st, vmm.Spec{VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB}); err != nil || repaired != out {
			t.Errorf("moved out: %v; repaired: %v, %v", out, repaired, err)
		}
	}
}

// busyHost boots a guest on a host so busy that the guest sometimes gets no processor time
// for longer than its kernel waits for a timer.
func (s *suite) busyHost(t *testing.T) {
	d := s.Open(t)
	spec := NewSpec(t, d)
	stop := make(chan struct{})
	var hogs sync.WaitGroup
	for range 3 * runtime.NumCPU() {
		cmd := exec.Command("sh", "-c", "ulimit -t 300; while :; do :; done") // the limit ends it even if the test does not
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		hogs.Go(func() {
			<-stop
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
	}
	defer hogs.Wait()
	defer close(stop)
	vm := start(t, d, spec)
	awaitConsole(t, vm, booted)
	kill(t, d, vm)
}

// descriptors checks that the monitor does not inherit a descriptor that this process opened
// without O_CLOEXEC.
func (s *suite) descriptors(t *testing.T) {
	d := s.Open(t)
	spec := NewSpec(t, d)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(secret, unix.O_RDONLY, 0) // without O_CLOEXEC
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	vm := start(t, d, spec)
	home := fmt.Sprintf("/proc/%d/fd", vm.PID())
	all, err := os.ReadDir(home)
	if err != nil || len(all) < 3 {
		t.Fatalf("the monitor has %d descriptors, %v", len(all), err)
	}
	for _, e := range all {
		if target, err := os.Readlink(filepath.Join(home, e.Name())); err == nil && target == secret {
			t.Errorf("the monitor inherited descriptor %s, of %s", e.Name(), target)
		}
	}
	kill(t, d, vm)
}

// console checks that a machine ends when its guest reboots, and that its console says why
// the guest rebooted.
func (s *suite) console(t *testing.T) {
	d := s.Open(t)
	spec := NewSpec(t, d)
	spec.Cmdline = "console=ttyS0 reboot=t panic=-1" // lacks root=, so the init fails
	vm := start(t, d, spec)
	await.Recv(t, "the machine ends after its guest has rebooted", vm.Done())
	console, err := vm.Console(t.Context())
	if err != nil || !strings.Contains(string(console), "names no root") || len(console) > consoleBytes {
		t.Errorf("the console is %q, %v", console, err)
	}
	if got := vm.Err().Error(); got != s.Rebooted {
		t.Errorf("the machine ended with %q, want %q", got, s.Rebooted)
	}
	kill(t, d, vm)
}

// consoleBytes is the maximum number of bytes that a driver keeps of a console.
const consoleBytes = 64 << 10

// end kills the monitor's process and checks that the driver notices. It also checks that
// Kill and Reap are idempotent.
func (s *suite) end(t *testing.T) {
	d := s.Open(t)
	spec := NewSpec(t, d)
	vm := start(t, d, spec)
	if err := syscall.Kill(vm.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await.Recv(t, "Done is closed after the monitor was killed", vm.Done())
	if vm.Err() == nil {
		t.Error("a machine whose monitor was killed has no error")
	}
	for name, f := range onHeld(t, vm, spec) {
		if err := f(t.Context()); err == nil {
			t.Errorf("%s succeeds on a machine that has ended", name)
		}
	}
	for range 2 {
		kill(t, d, vm)
	}
	// Reap must also end a running machine, such as one that a killed agent left.
	spec.ID = uuid.New()
	vm = start(t, d, spec)
	if err := d.Reap(t.Context(), vm.State()); err != nil {
		t.Error(err)
	}
	await.Recv(t, "Done is closed after Reap", vm.Done())
	nothingLeft(t, d, vm.State())
	kill(t, d, vm)
}

// onHeld returns the operations, by name, that need a response of the monitor. Each fails if
// the machine has ended.
func onHeld(t *testing.T, vm vmm.VM, spec vmm.Spec) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"Hold":    vm.Hold,
		"Run":     vm.Run,
		"Devices": func(ctx context.Context) error { _, err := vm.Devices(ctx); return err },
		"Divert":  func(ctx context.Context) error { return vm.Divert(ctx, spec.Overlay) },
		"Grow":    func(ctx context.Context) error { return vm.Grow(ctx, spec.DiskBytes) },
		"Pages": func(context.Context) error {
			for p, err := range vm.Pages() {
				if err != nil {
					return err
				}
				if len(p.Data) == 0 {
					t.Error("Pages yields an empty page")
				}
			}
			return nil
		},
	}
}

// standstill stops the monitor's process with SIGSTOP. All calls must respect their contexts,
// and the driver must be able to kill the machine.
func (s *suite) standstill(t *testing.T) {
	d := s.Open(t)
	spec := NewSpec(t, d)
	vm := start(t, d, spec)
	if err := syscall.Kill(vm.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "all threads of the monitor are stopped", func() bool {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", vm.PID()))
		return err == nil && len(tasks) > 0 && !slices.ContainsFunc(tasks, func(task string) bool {
			stat, err := os.ReadFile(task)
			return err == nil && !strings.Contains(string(stat), ") T ")
		})
	})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := vm.Console(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("read the console of a stopped monitor: %v", err)
	}
	if _, err := vm.Devices(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("save the devices of a stopped monitor: %v", err)
	}
	if lives, err := d.Lives(spec.ID); err != nil || !lives {
		t.Errorf("the machine lives: %v, %v", lives, err)
	}
	s.Forget(vm)
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := d.Attach(ctx, vm.State()); err == nil || errors.Is(err, vmm.ErrGone) {
		t.Errorf("attach to a stopped monitor: %v", err)
	}
	kill(t, d, vm)
}
