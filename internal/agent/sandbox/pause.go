package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

const (
	// inFlightTimeout bounds a pause's wait for uses in flight.
	inFlightTimeout = 2 * time.Second
	// freezeTimeout bounds the guest daemon's part in a pause or a snapshot, because the
	// daemon may be broken.
	freezeTimeout = 5 * time.Second
	// undoTimeout bounds the continuation of a machine after a failure.
	undoTimeout = 30 * time.Second
)

// Pause saves a running sandbox and ends its machine. If it fails, the sandbox runs as
// before. It does nothing if the sandbox is paused.
func (m *Manager) Pause(ctx context.Context, id uuid.UUID) (Info, error) {
	return m.PauseIdle(ctx, id, 0)
}

// PauseIdle is Pause if the last use of the sandbox was at least idle ago; otherwise it fails
// with [ErrInUse]. If idle is 0, it always pauses.
func (m *Manager) PauseIdle(ctx context.Context, id uuid.UUID, idle time.Duration) (Info, error) {
	inst, err := m.find(id)
	if err != nil {
		return Info{}, err
	}
	err = inst.order(ctx, func(ctx context.Context) error {
		if inst.rec.State == Running && idle > 0 {
			// expire refuses new uses from here on. A failed pause accepts them again.
			if unused, _, _ := inst.tracker.expire(idle); !unused {
				return ErrInUse
			}
		}
		return inst.pause(ctx, nil)
	})
	return inst.info(), err
}

// Resume continues a paused sandbox. If it fails, the sandbox stays paused. It does nothing
// if the sandbox runs.
func (m *Manager) Resume(ctx context.Context, id uuid.UUID) (Info, error) {
	return m.start(ctx, id, (*instance).resume)
}

// start orders f, which makes the sandbox run. It fails if the manager refuses new sandboxes.
func (m *Manager) start(ctx context.Context, id uuid.UUID, f func(*instance, context.Context) error) (Info, error) {
	m.mu.Lock()
	refuse := m.refuse
	m.mu.Unlock()
	if refuse != nil {
		return Info{}, refuse
	}
	inst, err := m.find(id)
	if err != nil {
		return Info{}, err
	}
	err = inst.order(ctx, func(ctx context.Context) error { return f(inst, ctx) })
	return inst.info(), err
}

// pause pauses the sandbox. why is the event for the journal (nil: none).
func (inst *instance) pause(ctx context.Context, why *ending) error {
	switch inst.rec.State {
	case Paused:
		return nil
	case Running:
	default:
		return &StateError{inst.rec.State}
	}
	begin := time.Now()
	ctx, end := inst.operation(ctx, "pause")
	inst.set(func() { inst.rec.State = Pausing })
	err := inst.step(ctx, "idle", func(ctx context.Context) error {
		wait, cancel := context.WithTimeout(ctx, inFlightTimeout)
		defer cancel()
		if inst.tracker.ShutAndWait(wait) != nil && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return nil // the pause cuts off what is still in flight
	})
	if err == nil {
		err = inst.savePaused(ctx, why)
	}
	end(err)
	if err != nil {
		inst.set(func() { inst.rec.State = Running })
		inst.tracker.Reopen()
		return fmt.Errorf("pause: %w", err)
	}
	inst.log.Info("sandbox is paused", "took", time.Since(begin), "steps", stepsValue(inst.steps))
	return nil
}

// savePaused saves the machine, which [instance.servePaused] ends afterwards. If it fails, the
// machine continues.
func (inst *instance) savePaused(ctx context.Context, why *ending) (err error) {
	dir := inst.m.Dir
	next := inst.rec
	next.State, next.Slot, next.Sealed, next.Untold = Paused, nil, next.Disks-1, why
	id := uuid.New()
	next.Saved = &id
	folder := dir.SandboxSaved(inst.rec.Home, id)
	// A pause may use the reserve, and others must leave it the room.
	defer inst.m.room.Take(int64(inst.rec.Spec.MemoryMiB) << 20)()
	defer func() {
		if err != nil {
			err = Full(err)
			inst.letGoOn(ctx)
			if e := os.RemoveAll(folder); e != nil {
				inst.log.Warn("cannot remove the files of a failed pause", "error", e)
			}
		}
	}()
	if err := inst.step(ctx, "hold", func(ctx context.Context) error { return inst.freezeAndHold(ctx) }); err != nil {
		return err
	}
	at := time.Now().UTC()
	next.PausedAt = &at
	inst.m.Hook("pause: held")
	if err := inst.step(ctx, "save", func(ctx context.Context) error { return inst.saveTo(ctx, folder) }); err != nil {
		return err
	}
	inst.m.Hook("pause: saved")
	if err := inst.step(ctx, "commit", func(ctx context.Context) error { return inst.commit(next) }); err != nil {
		return err
	}
	inst.m.Hook("pause: committed")
	inst.endLife(&StateError{Paused})
	inst.disconnect()
	inst.m.leaves(inst)
	return nil
}

// freezeAndHold freezes the guest's programs and then holds the machine.
func (inst *instance) freezeAndHold(ctx context.Context) error {
	freeze, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	if err := inst.guest.Freeze(freeze); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		// Not an error: root in the guest may have broken the daemon.
		inst.log.Info("the guest cannot freeze its programs", "error", err)
	}
	return inst.vm.Hold(ctx)
}

// saveTo saves a held machine to a new folder.
func (inst *instance) saveTo(ctx context.Context, folder string) error {
	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	// In parallel, because the devices' state is small but takes QEMU and the disk a while.
	var g errgroup.Group
	g.Go(func() error { return inst.saveDevices(ctx, filepath.Join(folder, "devices")) })
	inst.m.Hook("pause: saving")
	err := inst.saveMemory(ctx, filepath.Join(folder, "memory"), inst.vm.Pages())
	if err := errors.Join(err, g.Wait()); err != nil {
		return err
	}
	return atomicfile.Sync(folder)
}

// saveMemory writes a memory image to a new folder: the last saved image with the pages over
// it.
func (inst *instance) saveMemory(ctx context.Context, folder string, pages memory.Pages) (err error) {
	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	origin, err := image.OpenCapture(inst.m.Dir.SandboxOrigin(inst.rec.Home))
	if err != nil {
		return err
	}
	base, err := memory.Open(origin.Memory())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	last := base
	if inst.rec.Saved != nil {
		last, err = memory.Open(filepath.Join(inst.m.Dir.SandboxSaved(inst.rec.Home, *inst.rec.Saved), "memory"))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, last.Close()) }()
	}
	next, err := last.Append(ctx, folder, pages, base)
	if err != nil {
		return err
	}
	return next.Close()
}

// commit makes next the sandbox's record. If it fails, the old record stays valid.
func (inst *instance) commit(next record) error {
	if err := next.save(inst.m.Dir); err != nil {
		// The record may be written but not synced.
		if have, e := load(inst.m.Dir, next.Home); e != nil || have.State != next.State {
			return err
		}
		inst.log.Error("a record may not outlast a crash of the host", "error", err)
	}
	inst.set(func() { inst.rec = next })
	return nil
}

// letGoOn undoes freezeAndHold. [instance.serve] handles a machine that has ended.
func (inst *instance) letGoOn(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	err := inst.vm.Run(ctx)
	if err == nil {
		thaw, cancel := context.WithTimeout(ctx, freezeTimeout)
		defer cancel()
		if err = inst.guest.Thaw(thaw); err == nil {
			return
		}
	}
	inst.log.Error("cannot continue a sandbox", "error", err)
}

// finishPause removes what a paused sandbox no longer needs: its machine, its network,
// earlier saved states and its reserved memory. The caller must retry it until it succeeds.
func (inst *instance) finishPause(ctx context.Context) error {
	defer inst.m.left(inst)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
	defer cancel()
	if err := inst.vacate(ctx); err != nil {
		return err
	}
	inst.m.Hook("pause: vacated")
	inst.m.unreserve(inst)
	if inst.rec.Lost != nil && inst.rec.Saved == nil { // loseDead could not write the state
		next, err := inst.rec.withoutMemory(inst.m.Dir, *inst.rec.Lost)
		if err == nil {
			err = inst.commit(next)
		}
		if err != nil {
			return err
		}
	}
	if err := inst.rec.sweep(inst.m.Dir); err != nil {
		return fmt.Errorf("remove earlier saved states: %w", err)
	}
	if inst.rec.Untold != nil {
		if err := inst.tell(*inst.rec.Untold); err != nil {
			return err
		}
		next := inst.rec
		next.Untold = nil
		return inst.commit(next)
	}
	return nil
}

// pauseFinished reports whether finishPause has nothing to do.
func (inst *instance) pauseFinished() bool {
	return !inst.maybeVM && inst.vm == nil && inst.slot == nil && inst.base == nil && inst.rec.Untold == nil && inst.rec.Saved != nil
}

// servePaused handles one order or event of a paused sandbox. end reports whether the
// sandbox ended or the agent stops.
func (inst *instance) servePaused() (end bool) {
	var again <-chan time.Time
	if !inst.pauseFinished() {
		begin := time.Now()
		err := inst.finishPause(context.Background())
		inst.m.Observe("vacate", "", time.Since(begin), err)
		if err != nil {
			inst.log.Error("cannot remove the machine of a paused sandbox", "error", err)
			t := time.NewTimer(lastRetry / 12)
			defer t.Stop()
			again = t.C
		}
	}
	select {
	case <-again:
	case o := <-inst.orders:
		inst.obey(o)
	case <-inst.stop:
		inst.clean(inst.why, nil)
		return true
	case <-inst.m.closing:
		inst.release()
		return true
	}
	return false
}

// resume continues a paused sandbox.
func (inst *instance) resume(ctx context.Context) error {
	switch inst.rec.State {
	case Running:
		return nil
	case Paused:
	default:
		return &StateError{inst.rec.State}
	}
	begin := time.Now()
	ctx, end := inst.operation(ctx, "resume")
	inst.set(func() { inst.rec.State = Resuming })
	err := inst.goOn(ctx)
	end(err)
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	inst.log.Info("sandbox is resumed", "took", time.Since(begin), "steps", stepsValue(inst.steps))
	inst.tracker.Touch()
	inst.tracker.Reopen()
	return nil
}

func (inst *instance) goOn(ctx context.Context) (err error) {
	paused := inst.rec
	paused.State, paused.Slot, paused.VM = Paused, nil, nil
	committed := false
	defer func() {
		if err == nil || committed {
			return
		}
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
		defer cancel()
		if e := inst.vacate(undo); e != nil {
			inst.log.Error("cannot remove the machine of a failed resume", "error", e) // servePaused retries
		}
		inst.m.unreserve(inst)
		inst.set(func() { inst.rec = paused })
	}()
	if !inst.pauseFinished() {
		if err := inst.finishPause(ctx); err != nil {
			return err
		}
	}
	if err := inst.m.reserve(ctx, inst); err != nil {
		return err
	}
	leave, err := inst.queue(ctx)
	if err != nil {
		return err
	}
	defer leave()
	ctx, cancel := inst.m.inTime(ctx, "answer")
	defer cancel()
	if err := inst.step(ctx, "slot", func(ctx context.Context) error { return inst.acquire(ctx) }); err != nil {
		return err
	}
	if inst.rec.Lost != nil {
		return inst.bootFromDisk(ctx)
	}
	if err := inst.step(ctx, "restore", func(ctx context.Context) error { return Full(inst.restoreSaved(ctx)) }); err != nil {
		return err
	}
	inst.m.Hook("resume: restored")
	// Before it runs, because then its disk changes and no longer matches the saved state.
	err = inst.step(ctx, "commit", func(ctx context.Context) error {
		next := inst.rec
		next.State = Running
		return Full(inst.commit(next))
	})
	if err != nil {
		return err
	}
	committed = true
	inst.m.Hook("resume: committed")
	inst.connect(inst.rec.Spec.Token)
	err = inst.step(ctx, "run", func(ctx context.Context) error {
		if err := inst.slot.Describe(inst.rec.Spec.metadata()); err != nil {
			return fmt.Errorf("set metadata: %w", err)
		}
		return inst.vm.Run(ctx)
	})
	inst.m.Hook("resume: runs")
	if err == nil {
		err = inst.step(ctx, "init", func(ctx context.Context) error { return inst.init(ctx, false) })
	}
	if err == nil {
		return nil
	}
	// It ran, so its present state must be saved.
	inst.log.Warn("a resumed sandbox does not respond; pausing it again", "error", err)
	if e := inst.savePaused(ctx, nil); e != nil {
		inst.log.Error("cannot pause a sandbox again, which keeps running", "error", e)
		inst.tracker.Reopen()
		return errors.Join(err, e)
	}
	return err
}

// restoreSaved restores the machine that the pause saved, and leaves it held.
func (inst *instance) restoreSaved(ctx context.Context) (err error) {
	dir, home := inst.m.Dir, inst.rec.Home
	origin, err := image.OpenCapture(dir.SandboxOrigin(home))
	if err != nil {
		return err
	}
	if err := inst.m.Driver.Restores(inst.savedBy(origin)); err != nil {
		return failBecause(err, ErrState, "the paused sandbox cannot continue on this host, because another virtual machine monitor saved it")
	}
	if err := inst.checkNesting(inst.savedBy(origin), ErrState, "the paused sandbox"); err != nil {
		return err
	}
	saved := dir.SandboxSaved(home, *inst.rec.Saved)
	own, err := memory.Open(filepath.Join(saved, "memory"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, own.Close()) }()
	devices, err := os.ReadFile(filepath.Join(saved, "devices"))
	if err != nil {
		return fmt.Errorf("read the saved devices: %w", err)
	}
	if inst.base, err = inst.m.bases.acquire(ctx, origin); err != nil {
		return err
	}
	if err := os.Chown(inst.rec.disk(dir, inst.rec.Disks-1), inst.uid(), inst.uid()); err != nil {
		return err
	}
	from := vmm.Saved{Memory: inst.base.file, Changed: own.ChangedFrom(inst.base.image), Devices: devices, Kind: inst.savedBy(origin)}
	if inst.standsAlone(own) {
		alone, err := inst.m.bases.own(ctx, own)
		if err != nil {
			return err
		}
		inst.m.bases.release(inst.base)
		inst.base = alone
		from.Memory, from.Changed = alone.file, nil
	}
	return inst.restore(ctx, origin, from)
}

// savedBy returns the kind of the sandbox's present or last machine. origin is the capture
// from which it began.
func (inst *instance) savedBy(origin *image.Capture) string {
	if inst.rec.VM == nil {
		return origin.Kind
	}
	return cmp.Or(inst.rec.VM.Kind, origin.Kind)
}

// standsAlone reports whether the machine gets its own base instead of the shared one. If the
// kernel does not track writes, the next pause must compare all pages over a shared base, but
// none over an own one. An own base costs memory, so it is only for machines that share
// little.
func (inst *instance) standsAlone(own *memory.Image) bool {
	changed := own.BytesChangedFrom(inst.base.image)
	return !inst.m.Driver.TracksMemory() && changed > inst.base.bytes && inst.m.hasRoom(changed+inst.base.bytes)
}

// pausedEvent returns the event of a pause by the agent.
func pausedEvent(reason string) *ending {
	return &ending{journal.Paused, reason, time.Now().UTC()}
}
