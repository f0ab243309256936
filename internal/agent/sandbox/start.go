package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/network"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// start says what a sandbox starts from.
type start struct {
	template image.Template
	capture  *image.Capture // nil: the template's capture for the sandbox's size
	copied   bool           // the sandbox is a copy, whose capture will be deleted
	base     *base          // if not nil, the memory below what the capture changed
	ready    *instance      // if not nil, the warm machine that becomes the sandbox
	nested   bool           // for a machine that boots; see [vmm.Spec]
}

// create makes all parts of a sandbox. After an error, [instance.clean] removes them.
func (inst *instance) create(ctx context.Context) error {
	if inst.begin.ready == nil && inst.begin.capture == nil {
		err := inst.step(ctx, "capture", func(ctx context.Context) (err error) {
			inst.begin.capture, err = inst.m.capture(ctx, inst.begin.template, inst.rec.Spec.VCPUs, inst.rec.Spec.MemoryMiB, inst.m.mayNest(inst.rec.Spec.Team))
			return err
		})
		if err != nil {
			return err
		}
	}
	leave, err := inst.queue(ctx)
	if err != nil {
		if w := inst.begin.ready; w != nil {
			inst.m.mu.Lock()
			inst.m.warm.discard(w)
			inst.m.mu.Unlock()
		}
		return err
	}
	defer leave()
	ctx, cancel := inst.m.inTime(ctx, "come up")
	defer cancel()
	if w := inst.begin.ready; w != nil {
		err = inst.step(ctx, "take", func(ctx context.Context) error { return inst.take(w) })
	} else {
		err = inst.prepare(ctx, inst.begin.capture)
	}
	if err != nil {
		return err
	}
	return inst.awake(ctx)
}

// queue waits until fewer than Boots machines start. The caller must call leave.
func (inst *instance) queue(ctx context.Context) (leave func(), err error) {
	err = inst.step(ctx, "wait", func(ctx context.Context) error {
		select {
		case inst.m.boots <- struct{}{}:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	return func() { <-inst.m.boots }, err
}

// prepare restores a machine from c, and leaves it held.
func (inst *instance) prepare(ctx context.Context, c *image.Capture) error {
	dir, home := inst.m.Dir, inst.rec.Home
	if err := inst.m.Driver.Restores(c.Kind); err != nil {
		return failBecause(err, ErrInvalid, "the template cannot be used on this host: it was captured by another virtual machine monitor")
	}
	if err := inst.checkNesting(c.Kind, ErrInvalid, "the template"); err != nil {
		return err
	}
	inst.set(func() { inst.rec.Limits = c.Defaults.Limits })
	if err := inst.step(ctx, "slot", func(ctx context.Context) error { return inst.acquire(ctx) }); err != nil {
		return err
	}
	err := inst.step(ctx, "folder", func(ctx context.Context) error {
		if err := os.Mkdir(dir.Sandbox(home), 0o700); err != nil {
			return fmt.Errorf("make folder: %w", err)
		}
		if err := inst.rec.jot(dir); err != nil {
			return Full(err)
		}
		// Links, so that the files stay if the template is deleted.
		err := image.LinkTree(c.Dir, dir.SandboxOrigin(home))
		if errors.Is(err, fs.ErrNotExist) {
			return fail(ErrNotFound, "the template is gone")
		}
		return Full(err)
	})
	if err != nil {
		return err
	}
	err = inst.step(ctx, "memory", func(ctx context.Context) (err error) {
		if c, err = image.OpenCapture(dir.SandboxOrigin(home)); err != nil {
			return err
		}
		if under := inst.begin.base; under != nil && inst.m.bases.share(under) {
			inst.base = under
			return nil
		}
		inst.base, err = inst.m.bases.acquire(ctx, c)
		return err
	})
	if err != nil {
		return err
	}
	err = inst.step(ctx, "disk", func(ctx context.Context) error {
		return inst.firstDisk(int64(c.DiskMiB) << 20)
	})
	if err != nil {
		return err
	}
	return inst.step(ctx, "restore", func(ctx context.Context) (err error) {
		devices, err := os.ReadFile(c.Devices())
		if err != nil {
			return fmt.Errorf("read the captured devices: %w", err)
		}
		from := vmm.Saved{Memory: inst.base.file, Devices: devices, Kind: c.Kind}
		if inst.base == inst.begin.base {
			m, e := memory.Open(c.Memory())
			if e != nil {
				return fmt.Errorf("read the captured memory: %w", e)
			}
			defer func() { err = errors.Join(err, m.Close()) }()
			from.Changed = m.ChangedFrom(inst.base.image)
		}
		return inst.restore(ctx, c, from)
	})
}

// firstDisk makes the sandbox's first layer.
func (inst *instance) firstDisk(bytes int64) error {
	format := inst.m.Driver.Disks()
	inst.rec.Disks, inst.rec.DiskFormat = 1, format.Name()
	return Full(disk.Create(format, inst.rec.disk(inst.m.Dir, 0), bytes, inst.uid()))
}

// acquire acquires a network slot for the sandbox.
func (inst *instance) acquire(ctx context.Context) error {
	s, err := inst.m.Networks.Acquire(ctx)
	if errors.Is(err, network.ErrExhausted) {
		return fail(ErrExhausted, "this host has no network slot left")
	}
	if err != nil {
		return fmt.Errorf("get a network slot: %w", err)
	}
	i := s.Index()
	inst.set(func() { inst.slot, inst.rec.Slot = s, &i })
	if err := s.Limit(inst.rates()); err != nil {
		return fmt.Errorf("limit the network: %w", err)
	}
	return nil
}

// mayNest reports whether the guests of a team's sandboxes may run virtual machines
// themselves.
func (m *Manager) mayNest(team uuid.UUID) bool {
	return slices.ContainsFunc(m.NestedTeams, func(t Team) bool { return uuid.UUID(t) == team })
}

// checkNesting returns an error of the given sort if a machine of the kind lets its guest run
// virtual machines, but the sandbox's team may not.
func (inst *instance) checkNesting(kind string, sort error, what string) error {
	if !inst.m.Driver.Nested(kind) || inst.m.mayNest(inst.rec.Spec.Team) {
		return nil
	}
	return fail(sort, "%s was saved with nested virtualization, which this host does not allow the team", what)
}

// rates returns the sandbox's limits on the host's disk and network.
func (inst *instance) rates() rates.Rates {
	return inst.rec.Limits.Within(inst.m.TemplateRates.Of(inst.rec.Spec.Template, inst.m.Rates))
}

// uid returns the user of the sandbox's machine.
func (inst *instance) uid() int { return firstUID + inst.slot.Index() }

// Full wraps err in [ErrExhausted] if it reports a full disk, or a [room.FullError].
func Full(err error) error {
	var full *room.FullError
	switch {
	case errors.As(err, &full):
		return failBecause(err, ErrExhausted, "this host has %d MiB of disk left, and keeps %d for pauses", full.FreeMiB, full.ReserveMiB)
	case errors.Is(err, disk.ErrNoSpace), isFull(err):
		return failBecause(err, ErrExhausted, "this host has no disk space left")
	}
	return err
}

// machine returns the spec of the sandbox's machine, whose disk is on origin's file system
// and the given layers. The caller must close its tap.
func (inst *instance) machine(origin *image.Capture, layers []string) (vmm.Spec, error) {
	dir, home, spec := inst.m.Dir, inst.rec.Home, &inst.rec.Spec
	tap, err := inst.slot.OpenTap()
	if err != nil {
		return vmm.Spec{}, fmt.Errorf("open the guest's network card: %w", err)
	}
	for n := range inst.rec.Disks - 1 {
		layers = append(layers, inst.rec.disk(dir, n))
	}
	return vmm.Spec{
		ID: home, Dir: dir.Sandbox(home),
		Kernel: inst.m.Kernel, Initrd: inst.m.Initrd, Cmdline: guest.Cmdline("sandbox"),
		VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB, Nested: inst.begin.nested,
		Overlay: inst.rec.disk(dir, inst.rec.Disks-1), Layers: layers, Base: origin.Rootfs(), Modules: inst.modules(origin),
		DiskBytes: int64(spec.DiskMiB) << 20, Rates: inst.rates(),
		NetNS: inst.slot.NetNS(), Tap: tap, MAC: guest.MAC, UID: inst.uid(),
	}, nil
}

// restore restores the sandbox's machine from a saved state above origin, and leaves it held.
func (inst *instance) restore(ctx context.Context, origin *image.Capture, from vmm.Saved) error {
	return inst.launch(ctx, "restore", origin, originLayers(origin), func(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
		return inst.m.Driver.Restore(ctx, spec, from)
	})
}

// originLayers returns the paths of a capture's layers, lowest first.
func originLayers(c *image.Capture) (layers []string) {
	for n := range c.Layers {
		layers = append(layers, c.Layer(n))
	}
	return layers
}

// launch calls f to make the sandbox's machine. doing names the operation for errors.
func (inst *instance) launch(ctx context.Context, doing string, origin *image.Capture, layers []string, f func(context.Context, vmm.Spec) (vmm.VM, error)) error {
	spec, err := inst.machine(origin, layers)
	if err != nil {
		return err
	}
	defer spec.Tap.Close()
	inst.maybeVM = true
	vm, err := f(ctx, spec)
	if err != nil && ctx.Err() != nil {
		return because(ctx, err)
	}
	if err != nil {
		return fmt.Errorf("%s the virtual machine: %w", doing, err)
	}
	inst.setVM(vm)
	return nil
}

// boot boots a machine from the disk of origin and its layers. It boots the host's present
// kernel, so it gets and keeps that kernel's modules.
func (inst *instance) boot(ctx context.Context, origin *image.Capture, layers []string) error {
	if inst.m.Modules != "" {
		own := inst.m.Dir.SandboxModules(inst.rec.Home)
		err := os.Remove(own)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			err = os.Link(inst.m.Modules, own)
		}
		if err != nil {
			return fmt.Errorf("link the kernel's modules: %w", err)
		}
	}
	return inst.launch(ctx, "start", origin, layers, inst.m.Driver.Start)
}

// modules returns the path of the machine's kernel modules (empty: none). origin is the
// capture from which it began.
func (inst *instance) modules(origin *image.Capture) string {
	own := inst.m.Dir.SandboxModules(inst.rec.Home)
	if _, err := os.Stat(own); err == nil {
		return own
	}
	return origin.Modules()
}

// setVM sets the sandbox's machine.
func (inst *instance) setVM(vm vmm.VM) {
	st := vm.State()
	inst.set(func() { inst.vm, inst.rec.VM = vm, &st })
}

// take makes a warm machine the sandbox's.
func (inst *instance) take(w *instance) error {
	inst.base, inst.maybeVM = w.base, true
	inst.set(func() {
		inst.slot, inst.vm = w.slot, w.vm
		inst.rec.Home, inst.rec.Slot, inst.rec.VM = w.rec.Home, w.rec.Slot, w.rec.VM
		inst.rec.Disks, inst.rec.Sealed, inst.rec.DiskFormat = w.rec.Disks, w.rec.Sealed, w.rec.DiskFormat
		inst.rec.Limits = w.rec.Limits
	})
	return Full(inst.rec.jot(inst.m.Dir))
}

// awake runs a held machine that was restored from a capture, and makes it the sandbox.
func (inst *instance) awake(ctx context.Context) error {
	spec := &inst.rec.Spec
	origin, err := image.OpenCapture(inst.m.Dir.SandboxOrigin(inst.rec.Home))
	if err != nil {
		return err
	}
	err = inst.step(ctx, "run", func(ctx context.Context) error {
		if err := inst.slot.Describe(spec.metadata()); err != nil {
			return fmt.Errorf("set metadata: %w", err)
		}
		if spec.DiskMiB > origin.DiskMiB {
			if err := inst.vm.Grow(ctx, int64(spec.DiskMiB)<<20); err != nil {
				return fmt.Errorf("grow the disk: %w", err)
			}
		}
		return inst.vm.Run(ctx)
	})
	if err != nil {
		return err
	}
	err = inst.step(ctx, "init", func(ctx context.Context) error {
		shown := origin.Token
		if w := inst.begin.ready; w != nil {
			shown = w.rec.Spec.Token
		}
		inst.connect(shown)
		return inst.init(ctx, spec.DiskMiB > origin.DiskMiB)
	})
	if err != nil {
		return err
	}
	return inst.step(ctx, "commit", func(ctx context.Context) error {
		next := inst.rec
		next.State = Running
		if err := next.save(inst.m.Dir); err != nil {
			return Full(err)
		}
		inst.set(func() { inst.rec = next })
		return nil
	})
}

// init configures the guest for the sandbox: its token, environment, name, random pool and
// clock. If the machine ends or ctx does, the error has the end of the console.
func (inst *instance) init(ctx context.Context, grow bool) error {
	spec := &inst.rec.Spec
	origin, err := image.OpenCapture(inst.m.Dir.SandboxOrigin(inst.rec.Home))
	if err != nil {
		return err
	}
	settings := defaults(origin.Defaults)
	maps.Copy(settings.Envs, spec.Envs)
	settings.Token, settings.Hostname, settings.Thaw = spec.Token, id.Format(id.Sandbox, spec.ID), true
	settings.Debug = inst.log.Enabled(ctx, slog.LevelDebug)
	if grow {
		settings.GrowDisk = int64(spec.DiskMiB) << 20
	}
	err = inst.become(ctx, settings)
	if inst.rec.Lost != nil && guest.Said(err) {
		// A booted guest rejects a default user that its disk does not have any more.
		settings.User = ""
		err = inst.become(ctx, settings)
	}
	return err
}

// become sends the guest its settings.
func (inst *instance) become(ctx context.Context, settings guest.Settings) error {
	return inst.guarded(ctx, func(ctx context.Context) error {
		report, err := inst.guest.Init(ctx, settings)
		for _, w := range report.Warnings {
			inst.log.Warn("warning of the guest", "warning", firstLine(w))
		}
		return err
	})
}

// defaults returns a guest's settings from a template's defaults.
func defaults(d image.Defaults) guest.Settings {
	s := guest.Settings{Envs: map[string]string{}, User: d.User, Workdir: d.Workdir}
	maps.Copy(s.Envs, d.Envs)
	return s
}

// errBoot is wrapped by errors of guests that do not start.
var errBoot = errors.New("boot")

// inTime bounds ctx by BootTimeout. to completes the error "the guest did not …". The error
// is not [ErrGuest], because the host may just be busy.
func (m *Manager) inTime(ctx context.Context, to string) (context.Context, context.CancelFunc) {
	late := fail(ErrSlow, "the guest did not %s within %v; its host may be overloaded", to, m.BootTimeout)
	return context.WithTimeoutCause(ctx, m.BootTimeout, late)
}

// guarded calls f with a context that ends with the machine.
func (inst *instance) guarded(ctx context.Context, f func(context.Context) error) error {
	died := errors.New("the virtual machine ended while it started")
	guarded, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	noticed := make(chan struct{})
	go func() {
		defer close(noticed)
		select {
		case <-inst.vm.Done():
			cancel(died)
		case <-guarded.Done():
		}
	}()
	defer func() { cancel(nil); <-noticed }()
	err := f(guarded)
	if err == nil {
		return nil
	}
	if cause := context.Cause(guarded); cause != nil && !guest.Said(err) {
		err = cause
	}
	switch {
	case errors.Is(err, died):
		err = fmt.Errorf("%w: %w", died, inst.vm.Err())
	case errors.Is(err, ErrState), errors.Is(err, ErrClosing):
		return err // not the guest's fault
	case errors.Is(err, ErrSlow):
		return fmt.Errorf("%w%s", err, inst.lastWords())
	}
	return fmt.Errorf("%w: %w%s", errBoot, err, inst.lastWords())
}
