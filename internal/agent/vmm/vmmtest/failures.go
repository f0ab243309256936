package vmmtest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/await"
)

// names returns the names of a folder's entries.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

// maker starts or restores a machine.
type maker func(context.Context, vmm.Spec) (vmm.VM, error)

// fails checks that f fails and leaves nothing of the machine behind, in its folder dir or
// elsewhere. It returns f's error.
func fails(t *testing.T, d vmm.Driver, dir string, spec vmm.Spec, f maker) error {
	t.Helper()
	before := names(t, dir)
	spec.ID = uuid.New()
	vm, err := f(t.Context(), spec)
	if err == nil {
		_ = vm.Kill(context.Background())
		t.Fatal("the machine started")
	}
	t.Log(err)
	gone(t, d, spec.ID)
	if after := names(t, dir); !slices.Equal(before, after) {
		t.Errorf("the machine's folder had %q before, and has %q", before, after)
	}
	return err
}

// abandoned cancels f at several moments, and checks that f either starts a machine or leaves
// nothing of it behind.
func abandoned(t *testing.T, d vmm.Driver, spec vmm.Spec, f maker) {
	t.Helper()
	for _, after := range []time.Duration{0, 5, 20, 40, 80, 160} {
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
		spec.ID = uuid.New()
		vm, err := f(ctx, spec)
		cancel()
		if err == nil {
			kill(t, d, vm)
			continue
		}
		gone(t, d, spec.ID)
	}
}

// absent is a path that does not exist.
const absent = "/nonexistent/file"

// brokenParts are changes to a spec that make both a start and a restore fail.
var brokenParts = map[string]func(*vmm.Spec){
	"no folder":         func(s *vmm.Spec) { s.Dir = absent },
	"no base":           func(s *vmm.Spec) { s.Base = absent },
	"no layer":          func(s *vmm.Spec) { s.Layers = []string{absent} },
	"no overlay":        func(s *vmm.Spec) { s.Overlay = filepath.Join(filepath.Dir(s.Overlay), "absent") },
	"a kernel as disk":  func(s *vmm.Spec) { s.Overlay = s.Kernel },
	"no size":           func(s *vmm.Spec) { s.DiskBytes = 0 },
	"no namespace":      func(s *vmm.Spec) { s.NetNS = absent },
	"no namespace file": func(s *vmm.Spec) { s.NetNS = s.Base },
}

// failedStart makes each step of a start fail, and checks that the driver leaves nothing behind.
func (s *suite) failedStart(t *testing.T) {
	d := s.Open(t)
	spec := NewSpec(t, d)
	garbage := filepath.Join(spec.Dir, "garbage")
	if err := os.WriteFile(garbage, []byte("no kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	broken := maps.Clone(brokenParts)
	broken["no kernel"] = func(s *vmm.Spec) { s.Kernel = absent }
	broken["no initrd"] = func(s *vmm.Spec) { s.Initrd = absent }
	broken["garbage for a layer"] = func(s *vmm.Spec) { s.Layers = []string{garbage} }
	for name, change := range broken {
		t.Run(name, func(t *testing.T) {
			spec, dir := spec, spec.Dir
			change(&spec)
			_ = fails(t, d, dir, spec, d.Start)
		})
	}
	t.Run("garbage for a kernel", func(t *testing.T) {
		spec := spec
		spec.Kernel = garbage
		if err := fails(t, d, spec.Dir, spec, d.Start); !strings.Contains(err.Error(), s.Complains) {
			t.Errorf("the error does not say why: %v", err)
		}
	})
	abandoned(t, d, spec, d.Start)
	if left := names(t, spec.Dir); !slices.Equal(left, []string{"garbage", "overlay"}) {
		t.Errorf("the machine's folder has %q", left)
	}
	vm := start(t, d, spec) // the unchanged spec works
	kill(t, d, vm)
}

// sealed returns a file in memory with the given size and seals. A driver accepts it as a
// machine's memory if it has all seals in failedRestore.
func sealed(t *testing.T, bytes int64, seals int) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "ram")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(bytes); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		t.Fatal(err)
	}
	return f
}

// failedRestore restores from damaged states and with missing files, and checks that each
// restore fails and leaves nothing behind.
func (s *suite) failedRestore(t *testing.T) {
	const seals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	d := s.Open(t)
	spec := NewSpec(t, d)
	vm := start(t, d, spec)
	if err := vm.Hold(t.Context()); err != nil {
		t.Fatal(err)
	}
	devices, err := vm.Devices(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kill(t, d, vm)
	size := int64(spec.MemoryMiB) << 20
	ram := sealed(t, size, seals)
	plain, err := os.Create(filepath.Join(t.TempDir(), "plain"))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if err := plain.Truncate(size); err != nil {
		t.Fatal(err)
	}
	pages := func(p memory.Page, err error) memory.Pages {
		return func(yield func(memory.Page, error) bool) { yield(p, err) }
	}
	restore := func(from vmm.Saved) maker {
		return func(ctx context.Context, spec vmm.Spec) (vmm.VM, error) { return d.Restore(ctx, spec, from) }
	}
	for name, from := range map[string]vmm.Saved{
		"nothing":      {Memory: ram},
		"garbage":      {Memory: ram, Devices: bytes.Repeat([]byte("garbage"), 100)},
		"cut short":    {Memory: ram, Devices: devices[:len(devices)/2]},
		"failing page": {Memory: ram, Devices: devices, Changed: pages(memory.Page{}, io.ErrUnexpectedEOF)},
		"foreign page": {Memory: ram, Devices: devices, Changed: pages(memory.Page{Block: 1 << 40, Data: make([]byte, memory.BlockSize)}, nil)},
		"short page":   {Memory: ram, Devices: devices, Changed: pages(memory.Page{Data: make([]byte, 1)}, nil)},
		"another kind": {Memory: ram, Devices: devices, Kind: "none 1.2.3 none 0123456789abcdef"},
		// With these files, one machine could change the memory of all others.
		"a file":                   {Memory: plain, Devices: devices},
		"unsealed memory":          {Memory: sealed(t, size, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW), Devices: devices},
		"memory that grows":        {Memory: sealed(t, size, seals&^unix.F_SEAL_GROW), Devices: devices},
		"memory that is too small": {Memory: sealed(t, size/2, seals), Devices: devices},
	} {
		t.Run(name, func(t *testing.T) { _ = fails(t, d, spec.Dir, spec, restore(from)) })
	}
	good := vmm.Saved{Memory: ram, Devices: devices}
	for name, change := range brokenParts {
		t.Run(name, func(t *testing.T) {
			spec, dir := spec, spec.Dir
			change(&spec)
			_ = fails(t, d, dir, spec, restore(good))
		})
	}
	abandoned(t, d, spec, restore(good))
	if left := names(t, spec.Dir); !slices.Equal(left, []string{"overlay"}) {
		t.Errorf("the machine's folder has %q", left)
	}
	spec.ID = uuid.New()
	vm, err = d.Restore(t.Context(), spec, good) // the unchanged spec and state work
	if err != nil {
		t.Fatal(err)
	}
	kill(t, d, vm)
}

// hostile runs drivers with monitors that their guests have taken over. No call may hang or
// use more memory than allowed, and the driver must be able to kill the machine.
func (s *suite) hostile(t *testing.T) {
	if len(s.Hostile) == 0 {
		t.Fatal("the driver's test runs no hostile monitors")
	}
	for name, h := range s.Hostile {
		t.Run(name, func(t *testing.T) {
			d := s.open(t, h.New)
			spec := NewSpec(t, d)
			bounded := func(do func(context.Context) error) error {
				ctx, cancel := context.WithTimeout(t.Context(), await.Scale(3*time.Second))
				defer cancel()
				return do(ctx)
			}
			if !h.Starts {
				_ = fails(t, d, spec.Dir, spec, func(ctx context.Context, spec vmm.Spec) (vm vmm.VM, err error) {
					err = bounded(func(ctx context.Context) error { vm, err = d.Start(ctx, spec); return err })
					return vm, err
				})
				return
			}
			vm := start(t, d, spec)
			defer kill(t, d, vm)
			for name, f := range onHeld(t, vm, spec) {
				t.Logf("%s: %.200v", name, bounded(f))
			}
			err := bounded(func(ctx context.Context) error {
				devices, err := vm.Devices(ctx)
				if len(devices) > 16<<20 {
					t.Errorf("the state of devices has %d bytes", len(devices))
				}
				return err
			})
			if err == nil {
				t.Error("a hostile monitor saved its devices")
			}
			err = bounded(func(ctx context.Context) error {
				text, err := vm.Console(ctx)
				if len(text) > consoleBytes {
					t.Errorf("the console has %d bytes", len(text))
				}
				return err
			})
			t.Logf("Console: %.200v", err)
			s.Forget(vm)
			err = bounded(func(ctx context.Context) error { _, err := d.Attach(ctx, vm.State()); return err })
			if lives, e := d.Lives(spec.ID); e != nil || lives && errors.Is(err, vmm.ErrGone) {
				t.Errorf("attach: %v; the machine lives: %v, %v", err, lives, e)
			}
		})
	}
}
