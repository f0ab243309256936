package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// flattenUID is the user of the programs that flatten file systems, one at a time. No
// machine has this user.
const flattenUID = firstUID - 1

// flattenTimeout bounds the work on one file system, because others wait for it.
const flattenTimeout = 30 * time.Minute

// SnapshotDisk makes a template from a sandbox's disk without its memory. The template has a
// file system that does not depend on the sandbox's template. SnapshotDisk boots and
// captures it once. start is its start command (nil: none). Otherwise it is like Snapshot.
// Data that the guest has not synced may be missing; see [guest.Client.Settle].
func (m *Manager) SnapshotDisk(ctx context.Context, sandbox, template uuid.UUID, name string, defaults *image.Defaults, start []string) (image.Template, error) {
	if template == uuid.Nil {
		return image.Template{}, fail(ErrInvalid, "the built-in template is not to be replaced")
	}
	inst, err := m.find(sandbox)
	if err != nil {
		return image.Template{}, err
	}
	var t image.Template
	err = inst.order(ctx, func(ctx context.Context) (err error) {
		t, err = inst.snapshotDisk(ctx, template, name, defaults, start)
		return err
	})
	if err != nil { // the order may still run and write t
		return image.Template{}, err
	}
	vcpus, memoryMiB := inst.machineSize()
	err = m.Prepare(ctx, t, vcpus, memoryMiB)
	switch {
	case errors.Is(err, ErrExhausted):
		// The first sandbox that needs it captures it.
		m.Log.Warn("no room to capture a template now", "template", id.Format(id.Template, template), "error", err)
	case err != nil && ctx.Err() == nil:
		return image.Template{}, errors.Join(fmt.Errorf("boot the template: %w", err), m.DeleteTemplate(t.Team, t.ID))
	case err != nil:
		return image.Template{}, err
	}
	return image.Find(m.Dir, t.Team, t.ID)
}

// flatBytes returns the maximum size of the sandbox's flattened disk in bytes.
func (inst *instance) flatBytes() (int64, error) {
	origin, err := image.OpenCapture(inst.m.Dir.SandboxOrigin(inst.rec.Home))
	if err != nil {
		return 0, err
	}
	base, err := disk.Allocated(origin.Rootfs())
	if err != nil {
		return 0, err
	}
	layers, err := inst.layersTake(origin)
	return min(base+layers, int64(inst.rec.Spec.DiskMiB)<<20), err
}

func (inst *instance) machineSize() (vcpus, memoryMiB int) {
	inst.mu.Lock()
	defer inst.mu.Unlock()
	return inst.rec.Spec.VCPUs, inst.rec.Spec.MemoryMiB
}

func (inst *instance) snapshotDisk(ctx context.Context, template uuid.UUID, name string, defaults *image.Defaults, start []string) (_ image.Template, err error) {
	dir, spec := inst.m.Dir, &inst.rec.Spec
	if t, err := image.Find(dir, spec.Team, template); err == nil {
		return t, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return image.Template{}, err
	}
	flat, err := inst.flatBytes()
	if err != nil {
		return image.Template{}, err
	}
	release, err := inst.reserveForCapture(flat)
	if err != nil {
		return image.Template{}, err
	}
	defer release()
	begin := time.Now()
	ctx, end := inst.operation(ctx, "snapshot disk")
	defer func() { end(err) }()
	tmp, err := image.TempTemplate(dir)
	if err != nil {
		return image.Template{}, Full(err)
	}
	defer os.RemoveAll(tmp)
	// The memory is captured too, but not used.
	captured := filepath.Join(tmp, image.Captured)
	c, err := inst.capture(ctx, captured, defaults)
	if err != nil {
		return image.Template{}, fmt.Errorf("snapshot: %w", Full(err))
	}
	size := int64(c.DiskMiB) << 20
	format, err := inst.format(c.DiskFormat)
	if err != nil {
		return image.Template{}, err
	}
	chain := disk.Chain{Base: c.Rootfs(), Format: format, Size: size}
	for n := range c.Layers {
		chain.Layers = append(chain.Layers, c.Layer(n))
	}
	err = inst.step(ctx, "flatten", func(ctx context.Context) error {
		select {
		case inst.m.flattening <- struct{}{}:
			defer func() { <-inst.m.flattening }()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		ctx, cancel := context.WithTimeout(ctx, flattenTimeout)
		defer cancel()
		if err := disk.Flatten(ctx, image.TempRootfs(tmp), chain, flattenUID); err != nil {
			return err
		}
		return disk.Expand(ctx, image.TempRootfs(tmp), size, flattenUID)
	})
	if err == nil {
		err = os.RemoveAll(captured)
	}
	if err != nil {
		return image.Template{}, fmt.Errorf("snapshot: %w", Full(err))
	}
	t := image.Template{
		ID: template, Team: spec.Team, Name: name, DiskMiB: spec.DiskMiB, CreatedAt: time.Now().UTC().Truncate(time.Second),
		Inputs: digest("disk", template.String()), Defaults: c.Defaults, Start: start,
	}
	err = inst.step(ctx, "publish", func(ctx context.Context) error { return image.PublishRootfs(dir, tmp, t) })
	if err != nil {
		return image.Template{}, fmt.Errorf("snapshot: %w", Full(err))
	}
	inst.log.Info("sandbox's disk captured", "template", id.Format(id.Template, template), "took", time.Since(begin), "steps", stepsValue(inst.steps))
	return image.Find(dir, spec.Team, template)
}
