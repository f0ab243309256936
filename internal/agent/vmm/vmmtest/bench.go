package vmmtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/network"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// testUID is the user as which the tests' monitors run.
const testUID = 1_999_998

// bootTime bounds a boot under emulation on a busy host, where a guest may get an eighth of a
// processor.
const bootTime = 5 * time.Minute

// callTime bounds a call to a guest.
const callTime = 90 * time.Second

// Log returns a logger that writes to the test's output.
func Log(t *testing.T) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// Open opens the driver for the test t. It skips the test on machines that cannot run
// virtual machines.
func (s Subject) Open(t *testing.T) vmm.Driver {
	t.Helper()
	return s.open(t, s.New)
}

func (s Subject) open(t *testing.T, open Opener) vmm.Driver {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to start virtual machines")
	}
	if err := cgroup.Available(); err != nil {
		t.Skip(err)
	}
	if s.Needs != nil {
		if err := s.Needs(); err != nil {
			t.Skip(err)
		}
	}
	d, err := open(t.TempDir(), Log(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// NewSpec returns the spec of a machine with the minimal template's disk and no network.
func NewSpec(t *testing.T, d vmm.Driver) vmm.Spec {
	t.Helper()
	in := imagetest.Prepare(t)
	s := vmm.Spec{
		ID: uuid.New(), Dir: t.TempDir(), Kernel: in.Kernel.Vmlinux, Initrd: in.Kernel.Initrd, Modules: in.Kernel.Modules, Cmdline: guest.Cmdline("vmm-test"),
		VCPUs: 1, MemoryMiB: 256, Base: in.Minimal.Rootfs, UID: testUID,
		DiskBytes: int64(in.Minimal.DiskMiB) << 20,
	}
	s.Overlay = filepath.Join(s.Dir, "overlay")
	if err := disk.Create(d.Disks(), s.Overlay, s.DiskBytes, s.UID); err != nil {
		t.Fatal(err)
	}
	return s
}

// start boots a machine, and kills it when the test ends.
func start(t *testing.T, d vmm.Driver, s vmm.Spec) vmm.VM {
	t.Helper()
	vm, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vm.Kill(context.Background()) })
	return vm
}

// kill kills a machine and checks that nothing of it is left.
func kill(t *testing.T, d vmm.Driver, vm vmm.VM) {
	t.Helper()
	if err := vm.Kill(context.Background()); err != nil {
		t.Error(err)
	}
	select {
	case <-vm.Done():
	default:
		t.Error("Done is not closed after Kill")
	}
	nothingLeft(t, d, vm.State())
}

// nothingLeft checks that nothing of a machine is left.
func nothingLeft(t *testing.T, d vmm.Driver, st vmm.State) {
	t.Helper()
	// A zombie is fine: the parent of an adopted machine may not have reaped it yet.
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", st.PID))
	if strings.Contains(string(stat), fmt.Sprintf(" %d ", st.StartTime)) && !strings.Contains(string(stat), ") Z ") {
		t.Error("the monitor's process is left")
	}
	if _, err := os.Stat(st.Socket); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the monitor's socket is left")
	}
	gone(t, d, st.ID)
}

// gone checks that neither a process nor a control group of a machine is left.
func gone(t *testing.T, d vmm.Driver, id uuid.UUID) {
	t.Helper()
	if lives, err := d.Lives(id); err != nil || lives {
		t.Errorf("the machine lives: %v, %v", lives, err)
	}
	if _, err := (cgroup.Group{Name: id.String()}).Memory(); err == nil {
		t.Error("the control group is left")
	}
}

// awaitConsole polls the console until the guest has printed text.
func awaitConsole(t *testing.T, vm vmm.VM, text string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), await.Scale(bootTime))
	defer cancel()
	var console []byte
	if !await.Within(await.Scale(bootTime), func() bool {
		more, err := vm.Console(ctx)
		if err != nil {
			t.Fatalf("%v; the console so far: %s", err, console)
		}
		console = more
		if strings.Contains(string(console), text) {
			return true
		}
		select {
		case <-vm.Done():
			t.Fatalf("%v: %s", vm.Err(), console)
		default:
		}
		return false
	}) {
		t.Fatalf("no %q on the console: %s", text, console)
	}
}

// MoveOut moves a process out of its control groups to the root of each hierarchy, as other
// software on the host could.
func MoveOut(pid int) error {
	for _, dir := range cgroup.Folders() {
		if err := os.WriteFile(dir+"/../cgroup.procs", []byte(strconv.Itoa(pid)), 0); err != nil {
			return err
		}
	}
	return nil
}

// Bench is a driver, a network slot, and a machine on it.
type Bench struct {
	*testing.T
	Driver vmm.Driver
	Spec   vmm.Spec
	Slot   *network.Slot
	VM     vmm.VM // nil: none runs

	subject Subject
	dir     string // folder for saved machines (empty: the test's temporary folder)
	guest   *guest.Client
	begin   time.Time
}

// NewBench returns a bench without a machine. It skips the test on machines that cannot run
// virtual machines.
func (s Subject) NewBench(t *testing.T) *Bench {
	t.Helper()
	d := s.Open(t)
	b := &Bench{T: t, Driver: d, Spec: NewSpec(t, d), subject: s, begin: time.Now()}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
	p, err := network.Open(t.Context(), network.Config{
		Dir: layout.Dir(t.TempDir()), Ready: 1, Upstreams: []netip.Addr{netip.MustParseAddr("192.0.2.53")}, Log: Log(t),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.Kill()
		ctx := context.Background()
		if b.Slot != nil {
			if err := p.Release(ctx, b.Slot); err != nil {
				t.Error(err)
			}
		}
		if err := p.Close(ctx, nil); err != nil {
			t.Error(err)
		}
	})
	if b.Slot, err = p.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.Spec.NetNS, b.Spec.MAC = b.Slot.NetNS(), guest.MAC
	return b
}

// took logs the time since its last call.
func (b *Bench) took(what string) {
	b.Helper()
	b.Logf("%s: %v", what, time.Since(b.begin).Round(100*time.Microsecond))
	b.begin = time.Now()
}

// Must fails the test, and logs the end of the guest's console, unless err is nil.
func (b *Bench) Must(err error) {
	b.Helper()
	if err == nil {
		return
	}
	if b.VM != nil {
		console, _ := b.VM.Console(context.Background())
		b.Logf("console: %s", console[max(0, len(console)-2000):])
		select {
		case <-b.VM.Done():
			b.Logf("the machine has ended: %v", b.VM.Err())
		default:
		}
	}
	b.Fatal(err)
}

// Boot starts a machine and gives its guest daemon a token.
func (b *Bench) Boot(token string) {
	b.Helper()
	b.begin = time.Now()
	b.withTap(func() (err error) {
		b.VM, err = b.Driver.Start(b.Context(), b.Spec)
		return err
	})
	b.took("start")
	b.init("", token)
}

// restore restores a machine and leaves it held.
func (b *Bench) restore(from vmm.Saved) {
	b.Helper()
	b.Spec.Kernel, b.Spec.Initrd, b.Spec.Cmdline = "", "", ""
	b.begin = time.Now()
	b.withTap(func() (err error) {
		b.VM, err = b.Driver.Restore(b.Context(), b.Spec, from)
		return err
	})
	b.took("restore")
}

func (b *Bench) withTap(f func() error) {
	b.Helper()
	tap, err := b.Slot.OpenTap()
	b.Must(err)
	defer tap.Close()
	b.Spec.Tap = tap
	b.Must(f())
}

// Resume restores a machine, runs it, and replaces the daemon's token shown by token.
func (b *Bench) Resume(from vmm.Saved, shown, token string) {
	b.Helper()
	b.restore(from)
	b.Must(b.VM.Grow(b.Context(), b.Spec.DiskBytes)) // must work before the guest runs
	b.Must(b.VM.Run(b.Context()))
	b.took("run")
	b.init(shown, token)
}

func (b *Bench) init(shown, token string) {
	b.Helper()
	if b.guest != nil {
		b.guest.Close()
	}
	b.guest = guest.New(b.Slot.Address, shown)
	ctx, cancel := context.WithTimeout(b.Context(), await.Scale(callTime))
	defer cancel()
	_, err := b.guest.Init(ctx, guest.Settings{Token: token, Envs: map[string]string{}, Hostname: "saved"})
	b.Must(err)
	b.took("init")
}

// Sh runs a script in the guest as root and returns what it printed.
func (b *Bench) Sh(script string) string {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), await.Scale(callTime))
	defer cancel()
	r, err := b.guest.Exec(ctx, guest.Command{Cmd: "sh", Args: []string{"-c", script}, User: "root"}, nil)
	b.Must(err)
	if r.Code != 0 {
		b.Fatalf("%s: exit code %d, %s", script, r.Code, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout))
}

// Number runs a script that prints a number.
func (b *Bench) Number(script string) int {
	b.Helper()
	n, err := strconv.Atoi(b.Sh(script))
	b.Must(err)
	return n
}

// Save holds the machine, and returns its memory and the state of its devices. It saves the
// memory as a layer over the given image or, if that is nil, as a new image.
func (b *Bench) Save(over *memory.Image) (m *memory.Image, devices []byte) {
	b.Helper()
	b.begin = time.Now()
	b.Must(b.VM.Hold(b.Context()))
	b.took("hold")
	devices, err := b.VM.Devices(b.Context())
	b.Must(err)
	b.took("save devices")
	if b.subject.Devices != nil {
		b.subject.Devices(b.T, b.Spec, devices)
	}
	dir := b.dir
	if dir == "" {
		dir = b.TempDir()
	}
	dir = filepath.Join(dir, "memory")
	b.Must(os.Mkdir(dir, 0o700))
	if over == nil {
		m, err = memory.Create(b.Context(), dir, int64(b.Spec.MemoryMiB)<<20, b.VM.Pages())
	} else {
		m, err = over.Append(b.Context(), dir, b.VM.Pages(), nil)
	}
	b.Must(err)
	b.took(fmt.Sprintf("save memory (%d bytes of devices)", len(devices)))
	if b.dir == "" {
		b.Cleanup(func() { m.Close() })
	}
	return m, devices
}

// Kill kills the machine, if there is one, and checks that nothing of it is left.
func (b *Bench) Kill() {
	b.Helper()
	if b.VM == nil {
		return
	}
	kill(b.T, b.Driver, b.VM)
	b.VM = nil
}

// Fresh gives the next machine a new id and a copy of the overlay.
func (b *Bench) Fresh(overlay string) {
	b.Helper()
	b.Spec.ID = uuid.New()
	b.Spec.Overlay = filepath.Join(b.Spec.Dir, b.Spec.ID.String())
	in, err := os.Open(overlay)
	b.Must(err)
	defer in.Close()
	out, err := os.OpenFile(b.Spec.Overlay, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	b.Must(err)
	defer out.Close()
	_, err = io.Copy(out, in)
	b.Must(err)
	b.Must(out.Chown(b.Spec.UID, b.Spec.UID))
}

// Counting is a script that starts a process that counts in a file in memory,
// /dev/shm/count. It also writes four megabytes to /dev/shm that do not change.
const Counting = `head -c 4000000 /dev/urandom >/dev/shm/blob; sha256sum /dev/shm/blob >/dev/shm/sum
setsid sh -c 'n=0; while :; do n=$((n+1)); echo $n >/dev/shm/count; sleep 0.05; done' >/dev/null 2>&1 &
until [ -s /dev/shm/count ]; do sleep 0.05; done; sync`
