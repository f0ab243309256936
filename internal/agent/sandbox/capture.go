package sandbox

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
)

// capturing is a capture that is being made.
type capturing struct {
	done    chan struct{}
	capture *image.Capture
	err     error
}

// capture returns the capture of a template with the given processors and memory,
// whose guest can run virtual machines if nested is set. If there is no such capture,
// capture boots the template, once for all callers that wait for it.
func (m *Manager) capture(ctx context.Context, t image.Template, vcpus, memoryMiB int, nested bool) (*image.Capture, error) {
	all, err := t.Captures(m.Dir)
	if err != nil {
		return nil, err
	}
	if t.VCPUs > 0 { // captured from a sandbox
		if len(all) == 0 {
			return nil, fmt.Errorf("template %s has lost its capture", t.ID)
		}
		return all[0], nil
	}
	inputs, kind := m.inputs(t), m.Driver.Kind(nested)
	for _, c := range all {
		if c.Kind == kind && c.Inputs == inputs && c.VCPUs == vcpus && c.MemoryMiB == memoryMiB {
			return c, nil
		}
	}
	name := fmt.Sprintf("%dx%d-%s", vcpus, memoryMiB, digest(kind, inputs)[:16])
	key := t.ID.String() + name
	m.mu.Lock()
	c := m.capturing[key]
	if c == nil {
		if m.refuse != nil {
			m.mu.Unlock()
			return nil, m.refuse
		}
		c = &capturing{done: make(chan struct{})}
		m.capturing[key] = c
		m.wg.Go(func() {
			c.capture, c.err = m.makeCapture(t, vcpus, memoryMiB, nested, inputs, name)
			m.mu.Lock()
			delete(m.capturing, key)
			m.mu.Unlock()
			close(c.done)
		})
	}
	m.mu.Unlock()
	select {
	case <-c.done:
		return c.capture, c.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Prepare captures a template for the given vCPUs and memory, if no capture exists yet.
func (m *Manager) Prepare(ctx context.Context, t image.Template, vcpus, memoryMiB int) error {
	spec := Spec{Team: t.Team, Template: t.ID, VCPUs: vcpus, MemoryMiB: memoryMiB, Token: "none"}
	if err := spec.check(t); err != nil {
		return err
	}
	place := newInstance(m, record{Spec: spec})
	if err := m.reserve(ctx, place); err != nil {
		return err
	}
	defer m.unreserve(place)
	_, err := m.capture(ctx, t, spec.VCPUs, spec.MemoryMiB, m.mayNest(spec.Team))
	return err
}

// inputs returns a digest of what a template's guests boot from.
func (m *Manager) inputs(t image.Template) string { return digest(t.Inputs, m.KernelInputs) }

func digest(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// makeCapture boots a template, warms up its guest daemon, starts the template's own
// command, and captures the machine before it runs anything of a sandbox.
func (m *Manager) makeCapture(t image.Template, vcpus, memoryMiB int, nested bool, inputs, name string) (*image.Capture, error) {
	release, err := m.room.Reserve(int64(memoryMiB) << 20)
	if err != nil {
		return nil, Full(err)
	}
	defer release()
	home := uuid.New()
	inst := newInstance(m, record{
		Version: format.Sandbox.Version, Home: home, State: Starting, CreatedAt: time.Now().UTC(),
		Spec: Spec{ID: home, Team: t.Team, Template: t.ID, VCPUs: vcpus, MemoryMiB: memoryMiB, DiskMiB: t.DiskMiB},
	})
	inst.begin.nested = nested
	// It needs no reservation: the waiting sandbox has reserved as much, and does not use it
	// yet.
	if err := m.register(inst); err != nil {
		return nil, err
	}
	inst.log = m.Log.With("template", t.Name, "vcpus", vcpus, "memory_mib", memoryMiB)
	inst.log.Info("capturing a template")
	begin := time.Now()
	ctx, done := inst.bounded()
	ctx, end := inst.operation(ctx, "capture template")
	c, err := inst.bootAndCapture(ctx, t, inputs, name)
	end(err)
	done()
	why := ending{Reason: "its template was captured", Time: time.Now().UTC()}
	if err != nil {
		why.Reason = "capture: " + err.Error()
	}
	tried := make(chan error, 1)
	m.wg.Go(func() { inst.clean(why, func(err error) { tried <- err }) })
	cleanErr := <-tried
	if err != nil {
		return nil, errors.Join(fmt.Errorf("capture the template: %w", err), cleanErr)
	}
	m.Log.Info("template captured", "template", t.Name, "took", time.Since(begin), "steps", stepsValue(inst.steps))
	m.removeStale(t, inputs)
	return c, nil
}

func (inst *instance) bootAndCapture(ctx context.Context, t image.Template, inputs, name string) (_ *image.Capture, err error) {
	dir, home := inst.m.Dir, inst.rec.Home
	leave, err := inst.queue(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	ctx, cancel := inst.m.inTime(ctx, "come up")
	defer cancel()
	into := &image.Capture{
		ID: uuid.New(), Kind: inst.m.Driver.Kind(inst.begin.nested), Inputs: inputs,
		VCPUs: inst.rec.Spec.VCPUs, MemoryMiB: inst.rec.Spec.MemoryMiB, DiskMiB: t.DiskMiB, Layers: 1, DiskFormat: inst.m.Driver.Disks().Name(),
		Defaults: t.Defaults, Runs: len(t.Start) > 0,
		Dir: filepath.Join(dir.Sandbox(home), "capture"),
	}
	if err := inst.step(ctx, "slot", func(ctx context.Context) error { return inst.acquire(ctx) }); err != nil {
		return nil, err
	}
	err = inst.step(ctx, "disk", func(ctx context.Context) error {
		if err := os.Mkdir(dir.Sandbox(home), 0o700); err != nil {
			return fmt.Errorf("make folder: %w", err)
		}
		if err := inst.rec.jot(dir); err != nil {
			return Full(err)
		}
		if err := os.MkdirAll(into.Memory(), 0o700); err != nil {
			return err
		}
		if err := os.Link(t.Rootfs, into.Rootfs()); err != nil {
			return err
		}
		return inst.firstDisk(int64(t.DiskMiB) << 20)
	})
	if err != nil {
		return nil, err
	}
	err = inst.step(ctx, "vm", func(ctx context.Context) error {
		return inst.boot(ctx, into, nil)
	})
	if err != nil {
		return nil, err
	}
	err = inst.step(ctx, "boot", func(ctx context.Context) error {
		return inst.guarded(ctx, func(ctx context.Context) error {
			g := guest.New(inst.slot.Address(), "")
			defer g.Close()
			return g.Wait(ctx)
		})
	})
	if err != nil {
		return nil, err
	}
	err = inst.step(ctx, "warm up", func(ctx context.Context) error {
		into.Token = rand.Text()
		if err := inst.warmUp(ctx, into, "", into.Token, warmUpCommand+"; sync"); err != nil {
			return err
		}
		if into.Runs {
			if err := inst.startOwn(ctx, into.Token, t.Start); err != nil {
				return err
			}
		}
		// Let the guest become idle, because every restored machine continues its work.
		t := time.NewTimer(inst.m.CaptureDelay)
		defer t.Stop()
		select {
		case <-t.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		return nil, err
	}
	err = inst.step(ctx, "save", func(ctx context.Context) error { return Full(inst.save(ctx, into)) })
	if err != nil {
		return nil, err
	}
	err = inst.step(ctx, "publish", func(ctx context.Context) error {
		if err := inst.killVM(ctx); err != nil {
			return err
		}
		if err := seal(inst.rec.disk(dir, 0)); err != nil {
			return err
		}
		if err := os.Rename(inst.rec.disk(dir, 0), into.Layer(0)); err != nil {
			return err
		}
		if err := errors.Join(into.LinkModules(inst.modules(into)), into.Write()); err != nil {
			return Full(err)
		}
		into, err = t.Publish(dir, into.Dir, name)
		return err
	})
	return into, err
}

// warmUp makes a guest do what it will do for a sandbox, so that the code is in its memory,
// and translated under emulation. shown is its present token, token the new one.
func (inst *instance) warmUp(ctx context.Context, c *image.Capture, shown, token, command string) error {
	return inst.guarded(ctx, func(ctx context.Context) error {
		g := guest.New(inst.slot.Address(), shown)
		defer g.Close()
		settings := defaults(c.Defaults)
		settings.Token, settings.Hostname, settings.Thaw = token, "sandbox", true
		if _, err := g.Init(ctx, settings); err != nil {
			return err
		}
		// Not an error: the template may lack a shell.
		cmd := guest.Command{Cmd: "/bin/sh", Args: []string{"-c", command}, Timeout: warmUpTimeout}
		if _, err := g.Exec(ctx, cmd, nil); err != nil {
			inst.log.Info("cannot run a warm-up command in the guest", "error", firstLine(err.Error()))
		}
		return nil
	})
}

// startOwn starts a template's own command. It is not an error if the command does not
// start, or ends at once like an interpreter without a terminal.
func (inst *instance) startOwn(ctx context.Context, token string, command []string) error {
	return inst.guarded(ctx, func(ctx context.Context) error {
		g := guest.New(inst.slot.Address(), token)
		defer g.Close()
		err := g.Launch(ctx, guest.Command{Cmd: command[0], Args: command[1:]})
		if err != nil && guest.Said(err) {
			inst.log.Warn("cannot start the template's own command", "error", firstLine(err.Error()))
			return nil
		}
		return err
	})
}

// warmUpCommand makes the guest load from its disk what most commands need.
const warmUpCommand = "ls -l / | cat; echo; id; python3 -c pass"

// warmUpTimeout bounds warmUpCommand.
const warmUpTimeout = 15 * time.Second

// save saves a booted machine's devices and memory.
func (inst *instance) save(ctx context.Context, into *image.Capture) error {
	// Freeze programs, so that they continue only after a restored guest has its settings
	// and the time.
	g := guest.New(inst.slot.Address(), into.Token)
	defer g.Close()
	if err := g.Freeze(ctx); err != nil {
		inst.log.Warn("the guest cannot freeze its programs", "error", err)
	}
	if err := inst.vm.Hold(ctx); err != nil {
		return err
	}
	if err := inst.saveDevices(ctx, into.Devices()); err != nil {
		return err
	}
	m, err := memory.Create(ctx, into.Memory(), int64(into.MemoryMiB)<<20, inst.vm.Pages())
	if err != nil {
		return err
	}
	return m.Close()
}

// seal makes a disk read-only, and root its owner.
func seal(name string) error {
	return errors.Join(os.Chown(name, 0, 0), os.Chmod(name, 0o400))
}

// removeStale removes captures of t that are of no use any more, because their inputs or
// their kind changed.
func (m *Manager) removeStale(t image.Template, inputs string) {
	all, err := t.Captures(m.Dir)
	for _, c := range all {
		if c.Kind != m.Driver.Kind(m.Driver.Nested(c.Kind)) || c.Inputs != inputs {
			err = errors.Join(err, os.RemoveAll(c.Dir))
		}
	}
	if err != nil {
		m.Log.Warn("cannot remove stale captures", "template", t.ID, "error", err)
	}
}
