package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// maxDisks is the maximum number of sealed overlays of a sandbox. Each capture adds one.
const maxDisks = 64

// Snapshot captures a running or paused sandbox as a template of its team. The sandbox stays
// in its state. Snapshot is idempotent by the template's id. defaults are those of the
// template (nil: those of the sandbox's template).
func (m *Manager) Snapshot(ctx context.Context, sandbox, template uuid.UUID, name string, defaults *image.Defaults) (image.Template, error) {
	if template == uuid.Nil {
		return image.Template{}, fail(ErrInvalid, "the built-in template is not to be replaced")
	}
	inst, err := m.find(sandbox)
	if err != nil {
		return image.Template{}, err
	}
	var t image.Template
	err = inst.order(ctx, func(ctx context.Context) (err error) {
		t, err = inst.snapshot(ctx, template, name, defaults)
		return err
	})
	if err != nil { // the order may still run and write t
		return image.Template{}, err
	}
	return t, nil
}

func (inst *instance) snapshot(ctx context.Context, template uuid.UUID, name string, defaults *image.Defaults) (_ image.Template, err error) {
	dir, spec := inst.m.Dir, &inst.rec.Spec
	if t, err := image.Find(dir, spec.Team, template); err == nil {
		return t, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return image.Template{}, err
	}
	release, err := inst.reserveForCapture(0)
	if err != nil {
		return image.Template{}, err
	}
	defer release()
	begin := time.Now()
	ctx, end := inst.operation(ctx, "snapshot")
	defer func() { end(err) }()
	tmp, err := image.TempTemplate(dir)
	if err != nil {
		return image.Template{}, Full(err)
	}
	defer os.RemoveAll(tmp)
	captures := filepath.Join(tmp, "captures")
	if err := os.Mkdir(captures, 0o700); err != nil {
		return image.Template{}, Full(err)
	}
	c, err := inst.capture(ctx, filepath.Join(captures, image.Captured), defaults)
	if err != nil {
		return image.Template{}, fmt.Errorf("snapshot: %w", Full(err))
	}
	inst.m.Hook("snapshot: captured")
	t := image.Template{
		ID: template, Team: spec.Team, Name: name, DiskMiB: spec.DiskMiB, CreatedAt: time.Now().UTC().Truncate(time.Second),
		VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB, Defaults: c.Defaults,
	}
	err = inst.step(ctx, "publish", func(ctx context.Context) error { return image.PublishTemplate(dir, tmp, t) })
	if err != nil {
		return image.Template{}, fmt.Errorf("snapshot: %w", Full(err))
	}
	inst.m.Hook("snapshot: published")
	inst.log.Info("sandbox captured", "template", id.Format(id.Template, template), "took", time.Since(begin), "steps", stepsValue(inst.steps))
	return image.Find(dir, spec.Team, template)
}

// reserveForCapture reserves room on the host's disk for a capture of the sandbox and for
// more bytes. A capture of a running sandbox writes its memory and a copy of its overlay. A
// capture of a paused one only makes links.
func (inst *instance) reserveForCapture(more int64) (release func(), err error) {
	if inst.rec.State == Running {
		size, err := disk.Allocated(inst.rec.disk(inst.m.Dir, inst.rec.Disks-1))
		if err != nil {
			return nil, err
		}
		more += size + int64(inst.rec.Spec.MemoryMiB)<<20
	}
	release, err = inst.m.room.Reserve(more)
	return release, Full(err)
}

// capture captures the sandbox to a new folder. The sandbox stays in its state. defaults are
// those of the capture (nil: those of the sandbox's template).
func (inst *instance) capture(ctx context.Context, into string, defaults *image.Defaults) (_ *image.Capture, err error) {
	dir, home, spec := inst.m.Dir, inst.rec.Home, &inst.rec.Spec
	running := inst.rec.State == Running
	if !running && inst.rec.State != Paused {
		return nil, &StateError{inst.rec.State}
	}
	if inst.rec.Lost != nil {
		return nil, fail(ErrState, "the sandbox has lost its memory (%s): resume it first, which starts it from its disk", inst.rec.Lost.Reason.Text())
	}
	if inst.rec.Disks > maxDisks {
		return nil, fail(ErrCaptures, "the sandbox has been captured %d times, which is as often as it can be", maxDisks)
	}
	origin, err := image.OpenCapture(dir.SandboxOrigin(home))
	if err != nil {
		return nil, err
	}
	if err := inst.layersFit(origin); err != nil {
		return nil, err
	}
	if defaults == nil {
		defaults = &origin.Defaults
	}
	c := &image.Capture{
		ID: uuid.New(), Kind: inst.savedBy(origin), VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB, DiskMiB: spec.DiskMiB,
		Layers: origin.Layers + inst.rec.Disks, DiskFormat: origin.DiskFormat, Token: spec.Token, Defaults: *defaults, Dir: into,
	}
	if err := os.Mkdir(into, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(into) // otherwise a sweep removes it
		}
	}()
	// The present overlay becomes a layer to which nobody writes.
	disks := inst.rec.Disks
	if err := inst.step(ctx, "overlay", func(ctx context.Context) error { return inst.addDisk() }); err != nil {
		return nil, err
	}
	inst.m.Hook("snapshot: overlay")
	if running {
		err = inst.captureRunning(ctx, c)
	} else {
		saved := dir.SandboxSaved(home, *inst.rec.Saved)
		err = errors.Join(image.LinkTree(filepath.Join(saved, "memory"), c.Memory()), os.Link(filepath.Join(saved, "devices"), c.Devices()))
	}
	if err != nil {
		return nil, err
	}
	inst.m.Hook("snapshot: saved")
	return c, inst.step(ctx, "disks", func(ctx context.Context) error {
		if err := errors.Join(os.Link(origin.Rootfs(), c.Rootfs()), c.LinkModules(inst.modules(origin))); err != nil {
			return err
		}
		for n := range origin.Layers {
			if err := os.Link(origin.Layer(n), c.Layer(n)); err != nil {
				return err
			}
		}
		for n := range disks {
			if err := inst.shareDisk(ctx, n, c.Layer(origin.Layers+n)); err != nil {
				return err
			}
		}
		return c.Write()
	})
}

// layersFit returns [ErrCaptures] if the layers of the sandbox's disk, without the template's
// file system, take more than twice the disk's size. Each capture adds a layer, and a guest
// can write its whole disk between two captures.
func (inst *instance) layersFit(origin *image.Capture) error {
	taken, err := inst.layersTake(origin)
	if err != nil {
		return err
	}
	if most := 2 * int64(inst.rec.Spec.DiskMiB) << 20; taken > most {
		return fail(ErrCaptures, "the layers of the sandbox's disk take %d MiB; it can be captured only while they take %d", taken>>20, most>>20)
	}
	return nil
}

// layersTake returns the size of the layers of the sandbox's disk in bytes.
func (inst *instance) layersTake(origin *image.Capture) (taken int64, err error) {
	layers := originLayers(origin)
	for n := range inst.rec.Disks {
		layers = append(layers, inst.rec.disk(inst.m.Dir, n))
	}
	for _, l := range layers {
		size, err := disk.Allocated(l)
		if err != nil {
			return 0, err
		}
		taken += size
	}
	return taken, nil
}

// addDisk adds an empty overlay to the sandbox's disk. Its machine may still write to the one
// below, because an empty overlay does not change what is read.
func (inst *instance) addDisk() error {
	n := inst.rec.Disks
	uid := 0
	if inst.slot != nil {
		uid = inst.uid()
	}
	name := inst.rec.disk(inst.m.Dir, n)
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) { // left by a failed attempt
		return err
	}
	format, err := inst.format(inst.rec.DiskFormat)
	if err != nil {
		return err
	}
	if err := disk.Create(format, name, int64(inst.rec.Spec.DiskMiB)<<20, uid); err != nil {
		return err
	}
	next := inst.rec
	next.Disks++
	if next.State == Paused {
		next.Sealed = n
	}
	if err := inst.commit(next); err != nil {
		return errors.Join(err, os.Remove(name))
	}
	return nil
}

// format returns the disk format with this name. It fails unless that is the format of the
// host's driver.
func (inst *instance) format(name string) (disk.Format, error) {
	format := inst.m.Driver.Disks()
	if name = cmp.Or(name, disk.Qcow2.Name()); name != format.Name() {
		return nil, fail(ErrState, "the sandbox's disk is in the format %s, but this host's monitor uses %s", name, format.Name())
	}
	return format, nil
}

// captureRunning captures memory and devices of a running machine, and makes it write to the
// new overlay. It holds the machine for the time that it takes to copy the changed pages.
func (inst *instance) captureRunning(ctx context.Context, c *image.Capture) error {
	if uses, err := inst.vm.Memory(); err == nil {
		if free, err := availableMemory(); err == nil && int(uses>>20)+slackMiB > free {
			return fail(ErrExhausted, "the host has %d MiB of memory available, too little to copy what the sandbox has changed", free)
		}
	}
	var devices []byte
	var pages memory.Pages
	begin := time.Now()
	err := inst.step(ctx, "hold", func(ctx context.Context) (err error) {
		defer inst.letGoOn(ctx)
		if err := inst.freezeAndHold(ctx); err != nil {
			return err
		}
		inst.m.Hook("snapshot: held")
		held := time.Now()
		defer func() { inst.m.Observe(inst.doing, "held", time.Since(held), err) }()
		if devices, err = inst.vm.Devices(ctx); err != nil {
			return err
		}
		if pages, err = copyPages(inst.vm.Pages()); err != nil {
			return err
		}
		if err := inst.vm.Divert(ctx, inst.rec.disk(inst.m.Dir, inst.rec.Disks-1)); err != nil {
			return err
		}
		inst.m.Hook("snapshot: diverted")
		return nil
	})
	if err != nil {
		return err
	}
	inst.log.Debug("sandbox continues", "stopped_for", time.Since(begin))
	return inst.step(ctx, "save", func(ctx context.Context) error {
		if err := writeDevices(c.Devices(), devices); err != nil {
			return err
		}
		return inst.saveMemory(ctx, c.Memory(), pages)
	})
}

// copyPages copies pages, so that they stay valid when the machine continues.
func copyPages(pages memory.Pages) (memory.Pages, error) {
	const perChunk = 1024
	var blocks []uint64
	var chunks [][]byte
	for p, err := range pages {
		if err != nil {
			return nil, err
		}
		if len(blocks)%perChunk == 0 {
			chunks = append(chunks, make([]byte, 0, perChunk*memory.BlockSize))
		}
		last := &chunks[len(chunks)-1]
		*last = append(*last, p.Data...)
		blocks = append(blocks, p.Block)
	}
	return func(yield func(memory.Page, error) bool) {
		for i, n := range blocks {
			at := i % perChunk * memory.BlockSize
			if !yield(memory.Page{Block: n, Data: chunks[i/perChunk][at : at+memory.BlockSize]}, nil) {
				return
			}
		}
	}, nil
}

// shareDisk links overlay n, to which the machine does not write any more, to another folder.
// If a machine that its guest has taken over could still write to it, shareDisk links a copy
// instead, which also replaces the overlay.
func (inst *instance) shareDisk(ctx context.Context, n int, to string) error {
	own := inst.rec.disk(inst.m.Dir, n)
	if n < inst.rec.Sealed || inst.rec.State == Paused {
		return errors.Join(seal(own), os.Link(own, to))
	}
	if err := disk.Copy(ctx, to, own); err != nil {
		return err
	}
	tmp := own + ".tmp"
	if err := errors.Join(os.Link(to, tmp), os.Rename(tmp, own)); err != nil {
		return err
	}
	if n == inst.rec.Sealed {
		next := inst.rec
		next.Sealed = n + 1
		return inst.commit(next)
	}
	return nil
}

// Copy is a copy to make of a sandbox.
type Copy struct {
	ID    uuid.UUID
	Token string
}

// Fork makes copies of a running sandbox, which keeps running. It makes all of them or none.
func (m *Manager) Fork(ctx context.Context, sandbox uuid.UUID, copies []Copy) (_ []Info, err error) {
	inst, err := m.find(sandbox)
	if err != nil {
		return nil, err
	}
	for _, c := range copies {
		if _, err := m.find(c.ID); err == nil {
			return nil, fail(ErrExists, "another sandbox has the id of a copy")
		}
	}
	begin := time.Now()
	defer func() { m.Observe("fork", "", time.Since(begin), err) }()
	hidden := filepath.Join(m.Dir.Forks(), uuid.NewString())
	var spec Spec
	var under *base
	caller := ctx
	err = inst.order(ctx, func(ctx context.Context) error {
		if inst.rec.State != Running {
			return &StateError{inst.rec.State}
		}
		release, err := inst.reserveForCapture(0)
		if err != nil {
			return err
		}
		defer release()
		if err := os.MkdirAll(m.Dir.Forks(), 0o700); err != nil {
			return Full(err)
		}
		ctx, end := inst.operation(ctx, "capture")
		defer func() { end(err) }()
		spec, under = inst.rec.Spec, inst.base
		_, err = inst.capture(ctx, hidden, nil)
		if caller.Err() != nil { // Fork has returned, so nobody else removes it
			err = errors.Join(err, discard(hidden))
		}
		return Full(err)
	})
	defer func() { err = errors.Join(err, discard(hidden)) }()
	if err != nil {
		return nil, fmt.Errorf("fork: %w", err)
	}
	c, err := image.OpenCapture(hidden)
	if err != nil {
		return nil, fmt.Errorf("fork: %w", err)
	}
	begins := start{capture: c, copied: true}
	if under != nil && under.image != nil && m.bases.share(under) {
		defer m.bases.release(under)
		shares, err := m.sharesMemory(c, under, len(copies))
		if err != nil {
			return nil, fmt.Errorf("fork: %w", err)
		}
		if shares {
			begins.base = under
		}
	}
	if begins.base == nil {
		// Acquire it here, so that it stays loaded for all copies.
		one, err := m.bases.acquire(ctx, c)
		if err != nil {
			return nil, fmt.Errorf("fork: %w", err)
		}
		defer func() {
			m.bases.release(one)
			m.bases.forget(c.ID)
		}()
	}

	infos, errs := make([]Info, len(copies)), make([]error, len(copies))
	var wg sync.WaitGroup
	for i, n := range copies {
		s := spec
		s.ID, s.Token = n.ID, n.Token
		wg.Go(func() {
			var copied *instance
			if copied, errs[i] = m.enroll(ctx, s, begins); errs[i] == nil {
				infos[i], errs[i] = copied.await(ctx)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
		defer cancel()
		for i, n := range copies {
			if errs[i] == nil {
				err = errors.Join(err, m.Destroy(undo, n.ID))
			}
		}
		return nil, fmt.Errorf("fork: %w", err)
	}
	return infos, nil
}

// discard removes a fork's capture. Copies whose caller has left may still be linking
// its files: they find all of them or none, because the folder is renamed first.
func discard(capture string) error {
	gone := filepath.Join(filepath.Dir(capture), uuid.NewString())
	if err := os.Rename(capture, gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(gone)
}

// sharesMemory reports whether n copies that begin with c share the base of their original,
// each with its own changed pages. Otherwise they share a new base with everything. It
// chooses what takes less memory, but without tracking of writes, a machine with more changed
// than shared pages would pause slowly.
func (m *Manager) sharesMemory(c *image.Capture, under *base, n int) (bool, error) {
	all, err := memory.Open(c.Memory())
	if err != nil {
		return false, err
	}
	changed := all.BytesChangedFrom(under.image)
	if err := all.Close(); err != nil {
		return false, err
	}
	return int64(n-1)*changed <= under.bytes && (changed <= under.bytes || m.Driver.TracksMemory()), nil
}

// DeleteTemplate removes a template's files. Sandboxes that began with it have links to what
// they need. It is idempotent.
func (m *Manager) DeleteTemplate(team, template uuid.UUID) error {
	if template == uuid.Nil {
		return fail(ErrState, "a built-in template cannot be deleted")
	}
	begin := time.Now()
	t, err := image.Find(m.Dir, team, template)
	var captures []*image.Capture
	if err == nil {
		captures, err = t.Captures(m.Dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.Log.Warn("cannot read a template before its deletion", "template", template, "error", err)
	}
	err = image.Delete(m.Dir, team, template, m.Hook)
	m.warm.forget(template)
	for _, c := range captures {
		m.bases.forget(c.ID)
	}
	m.Observe("delete template", "", time.Since(begin), err)
	return err
}
