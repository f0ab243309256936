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
	ready    *box           // if not nil, the warm machine that becomes the sandbox
	nested   bool           // for a machine that boots; see [vmm.Spec]
}

// create makes all parts of a sandbox. After an error, [box.clean] removes them.
func (b *box) create(ctx context.Context) error {
	if b.begin.ready == nil && b.begin.capture == nil {
		err := b.step(ctx, "capture", func(ctx context.Context) (err error) {
			b.begin.capture, err = b.m.capture(ctx, b.begin.template, b.rec.Spec.VCPUs, b.rec.Spec.MemoryMiB, b.m.mayNest(b.rec.Spec.Team))
			return err
		})
		if err != nil {
			return err
		}
	}
	leave, err := b.queue(ctx)
	if err != nil {
		if w := b.begin.ready; w != nil {
			b.m.mu.Lock()
			b.m.warm.discard(w)
			b.m.mu.Unlock()
		}
		return err
	}
	defer leave()
	ctx, cancel := b.m.inTime(ctx, "come up")
	defer cancel()
	if w := b.begin.ready; w != nil {
		err = b.step(ctx, "take", func(ctx context.Context) error { return b.take(w) })
	} else {
		err = b.prepare(ctx, b.begin.capture)
	}
	if err != nil {
		return err
	}
	return b.awake(ctx)
}

// queue waits until fewer than Boots machines start. The caller must call leave.
func (b *box) queue(ctx context.Context) (leave func(), err error) {
	err = b.step(ctx, "wait", func(ctx context.Context) error {
		select {
		case b.m.boots <- struct{}{}:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	return func() { <-b.m.boots }, err
}

// prepare restores a machine from c, and leaves it held.
func (b *box) prepare(ctx context.Context, c *image.Capture) error {
	dir, home := b.m.Dir, b.rec.Home
	if err := b.m.Driver.Restores(c.Kind); err != nil {
		return failBecause(err, ErrInvalid, "the template cannot be used on this host: it was captured by another virtual machine monitor")
	}
	if err := b.checkNesting(c.Kind, ErrInvalid, "the template"); err != nil {
		return err
	}
	b.set(func() { b.rec.Limits = c.Defaults.Limits })
	if err := b.step(ctx, "slot", func(ctx context.Context) error { return b.acquire(ctx) }); err != nil {
		return err
	}
	err := b.step(ctx, "folder", func(ctx context.Context) error {
		if err := os.Mkdir(dir.Sandbox(home), 0o700); err != nil {
			return fmt.Errorf("make folder: %w", err)
		}
		if err := b.rec.jot(dir); err != nil {
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
	err = b.step(ctx, "memory", func(ctx context.Context) (err error) {
		if c, err = image.OpenCapture(dir.SandboxOrigin(home)); err != nil {
			return err
		}
		if under := b.begin.base; under != nil && b.m.bases.share(under) {
			b.base = under
			return nil
		}
		b.base, err = b.m.bases.acquire(ctx, c)
		return err
	})
	if err != nil {
		return err
	}
	err = b.step(ctx, "disk", func(ctx context.Context) error {
		return b.firstDisk(int64(c.DiskMiB) << 20)
	})
	if err != nil {
		return err
	}
	return b.step(ctx, "restore", func(ctx context.Context) (err error) {
		devices, err := os.ReadFile(c.Devices())
		if err != nil {
			return fmt.Errorf("read the captured devices: %w", err)
		}
		from := vmm.Saved{Memory: b.base.file, Devices: devices, Kind: c.Kind}
		if b.base == b.begin.base {
			m, e := memory.Open(c.Memory())
			if e != nil {
				return fmt.Errorf("read the captured memory: %w", e)
			}
			defer func() { err = errors.Join(err, m.Close()) }()
			from.Changed = m.ChangedFrom(b.base.image)
		}
		return b.restore(ctx, c, from)
	})
}

// firstDisk makes the sandbox's first layer.
func (b *box) firstDisk(bytes int64) error {
	format := b.m.Driver.Disks()
	b.rec.Disks, b.rec.DiskFormat = 1, format.Name()
	return Full(disk.Create(format, b.rec.disk(b.m.Dir, 0), bytes, b.uid()))
}

// acquire acquires a network slot for the sandbox.
func (b *box) acquire(ctx context.Context) error {
	s, err := b.m.Networks.Acquire(ctx)
	if errors.Is(err, network.ErrExhausted) {
		return fail(ErrExhausted, "this host has no network slot left")
	}
	if err != nil {
		return fmt.Errorf("get a network slot: %w", err)
	}
	i := s.Index()
	b.set(func() { b.slot, b.rec.Slot = s, &i })
	if err := s.Limit(b.rates()); err != nil {
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
func (b *box) checkNesting(kind string, sort error, what string) error {
	if !b.m.Driver.Nested(kind) || b.m.mayNest(b.rec.Spec.Team) {
		return nil
	}
	return fail(sort, "%s was saved with nested virtualization, which this host does not allow the team", what)
}

// rates returns the sandbox's limits on the host's disk and network.
func (b *box) rates() rates.Rates {
	return b.rec.Limits.Within(b.m.TemplateRates.Of(b.rec.Spec.Template, b.m.Rates))
}

// uid returns the user of the sandbox's machine.
func (b *box) uid() int { return firstUID + b.slot.Index() }

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
func (b *box) machine(origin *image.Capture, layers []string) (vmm.Spec, error) {
	dir, home, spec := b.m.Dir, b.rec.Home, &b.rec.Spec
	tap, err := b.slot.OpenTap()
	if err != nil {
		return vmm.Spec{}, fmt.Errorf("open the guest's network card: %w", err)
	}
	for n := range b.rec.Disks - 1 {
		layers = append(layers, b.rec.disk(dir, n))
	}
	return vmm.Spec{
		ID: home, Dir: dir.Sandbox(home),
		Kernel: b.m.Kernel, Initrd: b.m.Initrd, Cmdline: guest.Cmdline("sandbox"),
		VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB, Nested: b.begin.nested,
		Overlay: b.rec.disk(dir, b.rec.Disks-1), Layers: layers, Base: origin.Rootfs(), Modules: b.modules(origin),
		DiskBytes: int64(spec.DiskMiB) << 20, Rates: b.rates(),
		NetNS: b.slot.NetNS(), Tap: tap, MAC: guest.MAC, UID: b.uid(),
	}, nil
}

// restore restores the sandbox's machine from a saved state above origin, and leaves it held.
func (b *box) restore(ctx context.Context, origin *image.Capture, from vmm.Saved) error {
	return b.launch(ctx, "restore", origin, originLayers(origin), func(ctx context.Context, spec vmm.Spec) (vmm.VM, error) {
		return b.m.Driver.Restore(ctx, spec, from)
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
func (b *box) launch(ctx context.Context, doing string, origin *image.Capture, layers []string, f func(context.Context, vmm.Spec) (vmm.VM, error)) error {
	spec, err := b.machine(origin, layers)
	if err != nil {
		return err
	}
	defer spec.Tap.Close()
	b.maybeVM = true
	vm, err := f(ctx, spec)
	if err != nil && ctx.Err() != nil {
		return because(ctx, err)
	}
	if err != nil {
		return fmt.Errorf("%s the virtual machine: %w", doing, err)
	}
	b.setVM(vm)
	return nil
}

// boot boots a machine from the disk of origin and its layers. It boots the host's present
// kernel, so it gets and keeps that kernel's modules.
func (b *box) boot(ctx context.Context, origin *image.Capture, layers []string) error {
	if b.m.Modules != "" {
		own := b.m.Dir.SandboxModules(b.rec.Home)
		err := os.Remove(own)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			err = os.Link(b.m.Modules, own)
		}
		if err != nil {
			return fmt.Errorf("link the kernel's modules: %w", err)
		}
	}
	return b.launch(ctx, "start", origin, layers, b.m.Driver.Start)
}

// modules returns the path of the machine's kernel modules (empty: none). origin is the
// capture from which it began.
func (b *box) modules(origin *image.Capture) string {
	own := b.m.Dir.SandboxModules(b.rec.Home)
	if _, err := os.Stat(own); err == nil {
		return own
	}
	return origin.Modules()
}

// setVM sets the sandbox's machine.
func (b *box) setVM(vm vmm.VM) {
	st := vm.State()
	b.set(func() { b.vm, b.rec.VM = vm, &st })
}

// take makes a warm machine the sandbox's.
func (b *box) take(w *box) error {
	b.base, b.maybeVM = w.base, true
	b.set(func() {
		b.slot, b.vm = w.slot, w.vm
		b.rec.Home, b.rec.Slot, b.rec.VM = w.rec.Home, w.rec.Slot, w.rec.VM
		b.rec.Disks, b.rec.Sealed, b.rec.DiskFormat = w.rec.Disks, w.rec.Sealed, w.rec.DiskFormat
		b.rec.Limits = w.rec.Limits
	})
	return Full(b.rec.jot(b.m.Dir))
}

// awake runs a held machine that was restored from a capture, and makes it the sandbox.
func (b *box) awake(ctx context.Context) error {
	spec := &b.rec.Spec
	origin, err := image.OpenCapture(b.m.Dir.SandboxOrigin(b.rec.Home))
	if err != nil {
		return err
	}
	err = b.step(ctx, "run", func(ctx context.Context) error {
		if err := b.slot.Describe(spec.metadata()); err != nil {
			return fmt.Errorf("set metadata: %w", err)
		}
		if spec.DiskMiB > origin.DiskMiB {
			if err := b.vm.Grow(ctx, int64(spec.DiskMiB)<<20); err != nil {
				return fmt.Errorf("grow the disk: %w", err)
			}
		}
		return b.vm.Run(ctx)
	})
	if err != nil {
		return err
	}
	err = b.step(ctx, "init", func(ctx context.Context) error {
		shown := origin.Token
		if w := b.begin.ready; w != nil {
			shown = w.rec.Spec.Token
		}
		b.connect(shown)
		return b.init(ctx, spec.DiskMiB > origin.DiskMiB)
	})
	if err != nil {
		return err
	}
	return b.step(ctx, "commit", func(ctx context.Context) error {
		next := b.rec
		next.State = Running
		if err := next.save(b.m.Dir); err != nil {
			return Full(err)
		}
		b.set(func() { b.rec = next })
		return nil
	})
}

// init configures the guest for the sandbox: its token, environment, name, random pool and
// clock. If the machine ends or ctx does, the error has the end of the console.
func (b *box) init(ctx context.Context, grow bool) error {
	spec := &b.rec.Spec
	origin, err := image.OpenCapture(b.m.Dir.SandboxOrigin(b.rec.Home))
	if err != nil {
		return err
	}
	settings := defaults(origin.Defaults)
	maps.Copy(settings.Envs, spec.Envs)
	settings.Token, settings.Hostname, settings.Thaw = spec.Token, id.Format(id.Sandbox, spec.ID), true
	settings.Debug = b.log.Enabled(ctx, slog.LevelDebug)
	if grow {
		settings.GrowDisk = int64(spec.DiskMiB) << 20
	}
	err = b.become(ctx, settings)
	if b.rec.Lost != nil && guest.Said(err) {
		// A booted guest rejects a default user that its disk does not have any more.
		settings.User = ""
		err = b.become(ctx, settings)
	}
	return err
}

// become sends the guest its settings.
func (b *box) become(ctx context.Context, settings guest.Settings) error {
	return b.guarded(ctx, func(ctx context.Context) error {
		report, err := b.guest.Init(ctx, settings)
		for _, w := range report.Warnings {
			b.log.Warn("warning of the guest", "warning", firstLine(w))
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
func (b *box) guarded(ctx context.Context, f func(context.Context) error) error {
	died := errors.New("the virtual machine ended while it started")
	guarded, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	noticed := make(chan struct{})
	go func() {
		defer close(noticed)
		select {
		case <-b.vm.Done():
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
		err = fmt.Errorf("%w: %w", died, b.vm.Err())
	case errors.Is(err, ErrState), errors.Is(err, ErrClosing):
		return err // not the guest's fault
	case errors.Is(err, ErrSlow):
		return fmt.Errorf("%w%s", err, b.lastWords())
	}
	return fmt.Errorf("%w: %w%s", errBoot, err, b.lastWords())
}
