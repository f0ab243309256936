package qemu

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/network"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// bench is a driver, a network slot, and a machine on it.
type bench struct {
	*testing.T
	d     *Driver
	spec  vmm.Spec
	slot  *network.Slot
	guest *guest.Client
	vm    vmm.VM
	begin time.Time
	loses bool // the model loses interrupts, and lost says how many
	lost  int
}

func newBench(t *testing.T) *bench {
	t.Helper()
	d, s := open(t)
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
	p, err := network.Open(t.Context(), network.Config{
		Dir: layout.Dir(t.TempDir()), Ready: 1, Upstreams: []netip.Addr{netip.MustParseAddr("192.0.2.53")},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, d: d, spec: s, begin: time.Now()}
	t.Cleanup(func() {
		b.kill()
		ctx := context.Background()
		if b.slot != nil {
			if err := p.Release(ctx, b.slot); err != nil {
				t.Error(err)
			}
		}
		if err := p.Close(ctx, nil); err != nil {
			t.Error(err)
		}
	})
	if b.slot, err = p.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.spec.NetNS, b.spec.MAC = b.slot.NetNS(), guest.MAC
	return b
}

// took logs how long it was since the last time.
func (b *bench) took(what string) {
	b.Helper()
	b.Logf("%s: %v", what, time.Since(b.begin).Round(100*time.Microsecond))
	b.begin = time.Now()
}

func (b *bench) must(err error) {
	b.Helper()
	if err == nil {
		return
	}
	if b.vm != nil {
		console, _ := b.vm.Console(context.Background())
		b.Logf("console: %s", console[max(0, len(console)-2000):])
	}
	b.Fatal(err)
}

// run starts a machine, restored unless from is nil, and makes it ready.
func (b *bench) run(from *vmm.Saved, shown, token string) {
	b.Helper()
	tap, err := b.slot.OpenTap()
	b.must(err)
	defer tap.Close()
	b.spec.Tap = tap
	b.begin = time.Now()
	if from == nil {
		b.vm, err = b.d.Start(b.Context(), b.spec)
		b.must(err)
		b.took("start")
	} else {
		b.vm, err = b.d.Restore(b.Context(), b.spec, *from)
		b.must(err)
		b.took("exec to ready")
		// A disk can be made larger before its guest runs.
		disk, err := b.vm.(*machine).top(b.Context())
		b.must(err)
		b.must(b.vm.Grow(b.Context(), disk.Image.Bytes))
		b.must(b.vm.Run(b.Context()))
		b.took("run")
	}
	b.init(shown, token)
}

func (b *bench) init(shown, token string) {
	b.Helper()
	if b.guest != nil {
		b.guest.Close()
	}
	b.guest = guest.New(b.slot.Address, shown)
	ctx, cancel := context.WithTimeout(b.Context(), vmmtest.Within(b, 90*time.Second))
	defer cancel()
	_, err := b.guest.Init(ctx, guest.Settings{Token: token, Envs: map[string]string{}, Hostname: "saved"})
	b.must(err)
	b.took("init")
}

// sh runs a script in the guest as root.
func (b *bench) sh(script string) string {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), vmmtest.Within(b, 90*time.Second))
	defer cancel()
	r, err := b.guest.Exec(ctx, guest.Command{Cmd: "sh", Args: []string{"-c", script}, User: "root"}, nil)
	b.must(err)
	if r.Code != 0 {
		b.Fatalf("%s: exit code %d, %s", script, r.Code, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout))
}

func (b *bench) number(script string) int {
	b.Helper()
	n, err := strconv.Atoi(b.sh(script))
	b.must(err)
	return n
}

// save holds the machine and returns its state: over image, or whole.
func (b *bench) save(over *memory.Image) (*memory.Image, []byte) {
	b.Helper()
	b.begin = time.Now()
	b.must(b.vm.Hold(b.Context()))
	b.took("hold")
	devices, err := b.vm.Devices(b.Context())
	b.must(err)
	b.took("save devices")
	// The controllers are found where QEMU's sources put them, and no interrupt is lost.
	apics, ioapics := sections(devices, "apic", apicVersion, apicBytes, false), sections(devices, "ioapic", ioapicVersion, ioapicBytes, true)
	if len(apics) != b.spec.VCPUs || len(ioapics) == 0 {
		b.Errorf("the state has %d local and %d I/O APICs", len(apics), len(ioapics))
	}
	lost := len(lostInterrupts(devices))
	if b.lost += lost; lost > 0 && !b.loses {
		b.Errorf("the state has lost the ends of %d interrupts", lost)
	}
	dir := b.TempDir()
	var m *memory.Image
	if over == nil {
		m, err = memory.Create(b.Context(), dir, int64(b.spec.MemoryMiB)<<20, b.vm.Pages())
	} else {
		m, err = over.Append(b.Context(), dir, b.vm.Pages(), nil)
	}
	b.must(err)
	b.took(fmt.Sprintf("save memory (%d bytes of devices)", len(devices)))
	b.Cleanup(func() { m.Close() })
	return m, devices
}

// writable are the files in the sandbox's folder that QEMU has open for writing.
func (b *bench) writable() []string {
	b.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", b.vm.PID())
	entries, err := os.ReadDir(dir)
	b.must(err)
	found := map[string]bool{}
	for _, e := range entries {
		name, err := os.Readlink(dir + e.Name())
		if err != nil || !strings.HasPrefix(name, b.spec.Dir) {
			continue
		}
		info, err := os.Lstat(dir + e.Name()) // its mode is the descriptor's
		if err == nil && info.Mode()&0o200 != 0 {
			found[name] = true
		}
	}
	return slices.Collect(maps.Keys(found))
}

func (b *bench) kill() {
	b.Helper()
	if b.vm == nil {
		return
	}
	if err := b.vm.Kill(context.Background()); err != nil {
		b.Error(err)
	}
	nothingLeft(b.T, b.vm)
	b.vm = nil
}

// fresh gives the next machine an identity and a copy of the overlay.
func (b *bench) fresh(overlay string) {
	b.Helper()
	b.spec.ID = uuid.New()
	b.spec.Overlay = filepath.Join(b.spec.Dir, b.spec.ID.String())
	in, err := os.Open(overlay)
	b.must(err)
	defer in.Close()
	out, err := os.OpenFile(b.spec.Overlay, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	b.must(err)
	defer out.Close()
	_, err = io.Copy(out, in)
	b.must(err)
	b.must(out.Chown(b.spec.UID, b.spec.UID))
}

func digest(t testing.TB, name string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// count is a process in the guest that counts in memory.
const count = `head -c 4000000 /dev/urandom >/dev/shm/blob; sha256sum /dev/shm/blob >/dev/shm/sum
setsid sh -c 'n=0; while :; do n=$((n+1)); echo $n >/dev/shm/count; sleep 0.05; done' >/dev/null 2>&1 &
sleep 0.3; sync`

func TestSaveRestoreDivert(t *testing.T) {
	b := newBench(t)
	b.run(nil, "", "first")
	b.sh(count)
	before := b.number("cat /dev/shm/count")
	image, devices := b.save(nil)
	overlay := b.spec.Overlay
	b.kill()
	ram, err := image.Materialize(t.Context(), "saved")
	b.must(err)
	defer ram.Close()

	// What was saved can be gone on from more than once.
	b.spec.Kernel, b.spec.Initrd, b.spec.Cmdline = "", "", ""
	saved := &vmm.Saved{Memory: ram, Devices: devices}
	for i := range 2 {
		b.fresh(overlay)
		b.run(saved, "first", "second")
		b.sh("sha256sum -c /dev/shm/sum")
		first := b.number("cat /dev/shm/count")
		if first < before {
			t.Errorf("restore %d: the count went back from %d to %d", i, before, first)
		}
		b.sh(fmt.Sprintf("until [ $(cat /dev/shm/count) -gt %d ]; do sleep 0.05; done", first))
		if i == 0 {
			b.kill()
		}
	}

	// Only what changed since is saved, and it is what the guest wrote.
	b.sh("printf 'a mark that only this guest %s' has >/dev/shm/mark")
	b.must(b.vm.Hold(t.Context()))
	n, marked := 0, false
	for p, err := range b.vm.Pages() {
		b.must(err)
		n++
		marked = marked || bytes.Contains(p.Data, []byte("a mark that only this guest has"))
	}
	t.Logf("%d of %d pages changed", n, image.Size()/memory.BlockSize)
	if !marked || n > 1<<14 {
		t.Errorf("%d pages changed; what was written is among them: %v", n, marked)
	}

	// The disk is diverted twice, with an agent that is restarted in between.
	former := b.spec.Overlay
	for i := range 2 {
		next := filepath.Join(b.spec.Dir, fmt.Sprintf("diverted-%d", i))
		b.must(disk.Create(disk.Qcow2, next, 5<<30, b.spec.UID))
		b.begin = time.Now()
		b.must(b.vm.Hold(t.Context()))
		b.must(b.vm.Divert(t.Context(), next))
		b.took("divert")
		sum := digest(t, former)
		b.must(b.vm.Run(t.Context()))
		b.sh(fmt.Sprintf("echo diverted %d >/root/file-%d; sync", i, i))
		if digest(t, former) != sum {
			t.Error("the former overlay was written to after it was diverted")
		}
		b.spec.Layers, former = append(b.spec.Layers, former), next

		// Another agent takes over, once a held machine and once one that runs.
		if i == 0 {
			b.must(b.vm.Hold(t.Context()))
		}
		_ = b.vm.(*machine).qmp.Close()
		b.vm, err = b.d.Attach(t.Context(), b.vm.State())
		b.must(err)
		b.must(b.vm.Run(t.Context()))
		b.must(b.vm.Run(t.Context())) // that it runs is no error
		b.sh("true")
	}
	b.spec.Overlay = former
	if got := b.writable(); len(got) != 1 || got[0] != former {
		t.Errorf("QEMU may still write to %q", got)
	}

	if size := b.number("cat /sys/block/vda/size"); size != 5<<30/512 {
		t.Errorf("the disk has %d sectors", size)
	}
	b.must(b.vm.Grow(t.Context(), 6<<30))
	b.sh(fmt.Sprintf("for i in 1 2 3 4 5 6 7 8 9; do [ $(cat /sys/block/vda/size) = %d ] && exit; sleep 0.2; done; exit 1", 6<<30/512))
	if err := b.vm.Grow(t.Context(), 5<<30); err == nil {
		t.Error("a disk was made smaller")
	}

	// All of it comes back, from a base and what changed over it.
	next, devices := b.save(image)
	b.kill()
	b.spec.ID = uuid.New()
	b.run(&vmm.Saved{Memory: ram, Changed: next.ChangedFrom(image), Devices: devices}, "second", "third")
	if got := b.sh("sha256sum -c /dev/shm/sum >/dev/null && cat /dev/shm/mark /root/file-0 /root/file-1"); got != "a mark that only this guest hasdiverted 0\ndiverted 1" {
		t.Errorf("it came back with %q", got)
	}

	// A guest that takes all its memory is not more than its bounds allow.
	b.sh(`python3 -c '
free = next(int(l.split()[1]) for l in open("/proc/meminfo") if l.startswith("MemAvailable")) << 10
b = bytearray(free * 8 // 10)
b[::4096] = b"x" * len(b[::4096])'`)
	b.kill()
}

func TestRestoreRefusesDamagedState(t *testing.T) {
	d, s := open(t)
	vm, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vm.Kill(context.Background()) })
	if _, err := vm.Devices(t.Context()); err == nil {
		t.Error("the devices of a machine that runs were saved")
	}
	if err := vm.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	devices, err := vm.Devices(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	ram, err := emptyMemory(int64(s.MemoryMiB) << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	s.Kernel, s.Initrd = "", ""
	for name, from := range map[string]vmm.Saved{
		"nothing":      {Memory: ram},
		"garbage":      {Memory: ram, Devices: bytes.Repeat([]byte("garbage"), 100)},
		"cut short":    {Memory: ram, Devices: devices[:len(devices)/2]},
		"failing page": {Memory: ram, Devices: devices, Changed: func(yield func(memory.Page, error) bool) { yield(memory.Page{}, io.ErrUnexpectedEOF) }},
		"foreign page": {Memory: ram, Devices: devices, Changed: func(yield func(memory.Page, error) bool) {
			yield(memory.Page{Block: 1 << 40, Data: make([]byte, memory.BlockSize)}, nil)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s.ID = uuid.New()
			vm, err := d.Restore(t.Context(), s, from)
			if err == nil {
				_ = vm.Kill(context.Background())
				t.Fatal("it was restored")
			}
			t.Log(err)
			if _, err := os.Stat(filepath.Join(s.Dir, socketName)); !errors.Is(err, os.ErrNotExist) {
				t.Error("the socket is left")
			}
		})
	}
}

func TestMemoryMustBeSealed(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := checkMemory(f, 1<<20); err == nil {
		t.Error("a file that anybody could change was taken")
	}
	ram, err := emptyMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	if _, err := checkMemory(ram, 1<<20); err != nil {
		t.Error(err)
	}
	if _, err := checkMemory(ram, 2<<20); err == nil {
		t.Error("a file of another size was taken")
	}
	if _, err := ram.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("a sealed file was written to: %v", err)
	}
}

func TestFindMapping(t *testing.T) {
	st := vmm.State{MemoryDevice: unix.Mkdev(0, 1), MemoryInode: 42, MemoryBytes: 0x2000}
	for name, test := range map[string]struct {
		maps string
		want int64 // 0: an error
	}{
		"right":      {"1000-2000 r--p 00000000 08:01 42 /lib\n7000-9000 rw-p 00000000 00:01 42 /memfd:ram (deleted)\n", 0x7000},
		"none":       {"7000-9000 rw-p 00000000 00:01 43 /memfd:ram (deleted)\n", 0},
		"twice":      {"7000-9000 rw-p 00000000 00:01 42\na000-c000 rw-p 00000000 00:01 42\n", 0},
		"too short":  {"7000-8000 rw-p 00000000 00:01 42\n", 0},
		"too long":   {"7000-a000 rw-p 00000000 00:01 42\n", 0},
		"shared":     {"7000-9000 rw-s 00000000 00:01 42\n", 0},
		"read-only":  {"7000-9000 r--p 00000000 00:01 42\n", 0},
		"elsewhere":  {"7000-9000 rw-p 00001000 00:01 42\n", 0},
		"no numbers": {"x-y rw-p 0 00:01 42\n", 0},
		"garbage":    {"what is this\n", 0},
		"empty":      {"", 0},
	} {
		got, err := findMapping(strings.NewReader(test.maps), st)
		if got != test.want || (err == nil) != (test.want != 0) {
			t.Errorf("%s: %#x, %v", name, got, err)
		}
	}
}

func FuzzFindMapping(f *testing.F) {
	f.Add("7000-9000 rw-p 00000000 00:01 42 /memfd:ram (deleted)\n")
	st := vmm.State{MemoryDevice: unix.Mkdev(0, 1), MemoryInode: 42, MemoryBytes: 0x2000}
	f.Fuzz(func(t *testing.T, maps string) {
		if start, err := findMapping(strings.NewReader(maps), st); err == nil && !strings.Contains(maps, "42") {
			t.Errorf("found %#x", start)
		}
	})
}
