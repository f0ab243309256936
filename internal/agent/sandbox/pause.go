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
	b, err := m.find(id)
	if err != nil {
		return Info{}, err
	}
	err = b.order(ctx, func(ctx context.Context) error {
		if b.rec.State == Running && idle > 0 {
			// expire refuses new uses from here on. A failed pause accepts them again.
			if unused, _, _ := b.tracker.expire(idle); !unused {
				return ErrInUse
			}
		}
		return b.pause(ctx, nil)
	})
	return b.info(), err
}

// Resume continues a paused sandbox. If it fails, the sandbox stays paused. It does nothing
// if the sandbox runs.
func (m *Manager) Resume(ctx context.Context, id uuid.UUID) (Info, error) {
	return m.start(ctx, id, (*box).resume)
}

// start orders f, which makes the sandbox run. It fails if the manager refuses new sandboxes.
func (m *Manager) start(ctx context.Context, id uuid.UUID, f func(*box, context.Context) error) (Info, error) {
	m.mu.Lock()
	refuse := m.refuse
	m.mu.Unlock()
	if refuse != nil {
		return Info{}, refuse
	}
	b, err := m.find(id)
	if err != nil {
		return Info{}, err
	}
	err = b.order(ctx, func(ctx context.Context) error { return f(b, ctx) })
	return b.info(), err
}

// pause pauses the sandbox. why is the event for the journal (nil: none).
func (b *box) pause(ctx context.Context, why *ending) error {
	switch b.rec.State {
	case Paused:
		return nil
	case Running:
	default:
		return &StateError{b.rec.State}
	}
	begin := time.Now()
	ctx, end := b.operation(ctx, "pause")
	b.set(func() { b.rec.State = Pausing })
	err := b.step(ctx, "idle", func(ctx context.Context) error {
		wait, cancel := context.WithTimeout(ctx, inFlightTimeout)
		defer cancel()
		if b.tracker.ShutAndWait(wait) != nil && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return nil // the pause cuts off what is still in flight
	})
	if err == nil {
		err = b.savePaused(ctx, why)
	}
	end(err)
	if err != nil {
		b.set(func() { b.rec.State = Running })
		b.tracker.Reopen()
		return fmt.Errorf("pause: %w", err)
	}
	b.log.Info("sandbox is paused", "took", time.Since(begin), "steps", stepsValue(b.steps))
	return nil
}

// savePaused saves the machine, which [box.servePaused] ends afterwards. If it fails, the
// machine continues.
func (b *box) savePaused(ctx context.Context, why *ending) (err error) {
	dir := b.m.Dir
	next := b.rec
	next.State, next.Slot, next.Sealed, next.Untold = Paused, nil, next.Disks-1, why
	id := uuid.New()
	next.Saved = &id
	folder := dir.SandboxSaved(b.rec.Home, id)
	// A pause may use the reserve, and others must leave it the room.
	defer b.m.room.Take(int64(b.rec.Spec.MemoryMiB) << 20)()
	defer func() {
		if err != nil {
			err = Full(err)
			b.letGoOn(ctx)
			if e := os.RemoveAll(folder); e != nil {
				b.log.Warn("cannot remove the files of a failed pause", "error", e)
			}
		}
	}()
	if err := b.step(ctx, "hold", func(ctx context.Context) error { return b.freezeAndHold(ctx) }); err != nil {
		return err
	}
	at := time.Now().UTC()
	next.PausedAt = &at
	b.m.Hook("pause: held")
	if err := b.step(ctx, "save", func(ctx context.Context) error { return b.saveTo(ctx, folder) }); err != nil {
		return err
	}
	b.m.Hook("pause: saved")
	if err := b.step(ctx, "commit", func(ctx context.Context) error { return b.commit(next) }); err != nil {
		return err
	}
	b.m.Hook("pause: committed")
	b.endLife(&StateError{Paused})
	b.disconnect()
	b.m.leaves(b)
	return nil
}

// freezeAndHold freezes the guest's programs and then holds the machine.
func (b *box) freezeAndHold(ctx context.Context) error {
	freeze, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	if err := b.guest.Freeze(freeze); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		// Not an error: root in the guest may have broken the daemon.
		b.log.Info("the guest cannot freeze its programs", "error", err)
	}
	return b.vm.Hold(ctx)
}

// saveTo saves a held machine to a new folder.
func (b *box) saveTo(ctx context.Context, folder string) error {
	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	// In parallel, because the devices' state is small but takes QEMU and the disk a while.
	var g errgroup.Group
	g.Go(func() error { return b.saveDevices(ctx, filepath.Join(folder, "devices")) })
	b.m.Hook("pause: saving")
	err := b.saveMemory(ctx, filepath.Join(folder, "memory"), b.vm.Pages())
	if err := errors.Join(err, g.Wait()); err != nil {
		return err
	}
	return atomicfile.Sync(folder)
}

// saveMemory writes a memory image to a new folder: the last saved image with the pages over
// it.
func (b *box) saveMemory(ctx context.Context, folder string, pages memory.Pages) (err error) {
	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	origin, err := image.OpenCapture(b.m.Dir.SandboxOrigin(b.rec.Home))
	if err != nil {
		return err
	}
	base, err := memory.Open(origin.Memory())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	last := base
	if b.rec.Saved != nil {
		last, err = memory.Open(filepath.Join(b.m.Dir.SandboxSaved(b.rec.Home, *b.rec.Saved), "memory"))
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
func (b *box) commit(next record) error {
	if err := next.save(b.m.Dir); err != nil {
		// The record may be written but not synced.
		if have, e := load(b.m.Dir, next.Home); e != nil || have.State != next.State {
			return err
		}
		b.log.Error("a record may not outlast a crash of the host", "error", err)
	}
	b.set(func() { b.rec = next })
	return nil
}

// letGoOn undoes freezeAndHold. [box.serve] handles a machine that has ended.
func (b *box) letGoOn(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	err := b.vm.Run(ctx)
	if err == nil {
		thaw, cancel := context.WithTimeout(ctx, freezeTimeout)
		defer cancel()
		if err = b.guest.Thaw(thaw); err == nil {
			return
		}
	}
	b.log.Error("cannot continue a sandbox", "error", err)
}

// finishPause removes what a paused sandbox no longer needs: its machine, its network,
// earlier saved states and its reserved memory. The caller must retry it until it succeeds.
func (b *box) finishPause(ctx context.Context) error {
	defer b.m.left(b)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
	defer cancel()
	if err := b.vacate(ctx); err != nil {
		return err
	}
	b.m.Hook("pause: vacated")
	b.m.unreserve(b)
	if b.rec.Lost != nil && b.rec.Saved == nil { // loseDead could not write the state
		next, err := b.rec.withoutMemory(b.m.Dir, *b.rec.Lost)
		if err == nil {
			err = b.commit(next)
		}
		if err != nil {
			return err
		}
	}
	if err := b.rec.sweep(b.m.Dir); err != nil {
		return fmt.Errorf("remove earlier saved states: %w", err)
	}
	if b.rec.Untold != nil {
		if err := b.tell(*b.rec.Untold); err != nil {
			return err
		}
		next := b.rec
		next.Untold = nil
		return b.commit(next)
	}
	return nil
}

// pauseFinished reports whether finishPause has nothing to do.
func (b *box) pauseFinished() bool {
	return !b.maybeVM && b.vm == nil && b.slot == nil && b.base == nil && b.rec.Untold == nil && b.rec.Saved != nil
}

// servePaused handles one order or event of a paused sandbox. end reports whether the
// sandbox ended or the agent stops.
func (b *box) servePaused() (end bool) {
	var again <-chan time.Time
	if !b.pauseFinished() {
		begin := time.Now()
		err := b.finishPause(context.Background())
		b.m.Observe("vacate", "", time.Since(begin), err)
		if err != nil {
			b.log.Error("cannot remove the machine of a paused sandbox", "error", err)
			t := time.NewTimer(lastRetry / 12)
			defer t.Stop()
			again = t.C
		}
	}
	select {
	case <-again:
	case o := <-b.orders:
		b.obey(o)
	case <-b.stop:
		b.clean(b.why, nil)
		return true
	case <-b.m.closing:
		b.release()
		return true
	}
	return false
}

// resume continues a paused sandbox.
func (b *box) resume(ctx context.Context) error {
	switch b.rec.State {
	case Running:
		return nil
	case Paused:
	default:
		return &StateError{b.rec.State}
	}
	begin := time.Now()
	ctx, end := b.operation(ctx, "resume")
	b.set(func() { b.rec.State = Resuming })
	err := b.goOn(ctx)
	end(err)
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	b.log.Info("sandbox is resumed", "took", time.Since(begin), "steps", stepsValue(b.steps))
	b.tracker.Touch()
	b.tracker.Reopen()
	return nil
}

func (b *box) goOn(ctx context.Context) (err error) {
	paused := b.rec
	paused.State, paused.Slot, paused.VM = Paused, nil, nil
	committed := false
	defer func() {
		if err == nil || committed {
			return
		}
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
		defer cancel()
		if e := b.vacate(undo); e != nil {
			b.log.Error("cannot remove the machine of a failed resume", "error", e) // servePaused retries
		}
		b.m.unreserve(b)
		b.set(func() { b.rec = paused })
	}()
	if !b.pauseFinished() {
		if err := b.finishPause(ctx); err != nil {
			return err
		}
	}
	if err := b.m.reserve(ctx, b); err != nil {
		return err
	}
	leave, err := b.queue(ctx)
	if err != nil {
		return err
	}
	defer leave()
	ctx, cancel := b.m.inTime(ctx, "answer")
	defer cancel()
	if err := b.step(ctx, "slot", func(ctx context.Context) error { return b.acquire(ctx) }); err != nil {
		return err
	}
	if b.rec.Lost != nil {
		return b.bootFromDisk(ctx)
	}
	if err := b.step(ctx, "restore", func(ctx context.Context) error { return Full(b.restoreSaved(ctx)) }); err != nil {
		return err
	}
	b.m.Hook("resume: restored")
	// Before it runs, because then its disk changes and no longer matches the saved state.
	err = b.step(ctx, "commit", func(ctx context.Context) error {
		next := b.rec
		next.State = Running
		return Full(b.commit(next))
	})
	if err != nil {
		return err
	}
	committed = true
	b.m.Hook("resume: committed")
	b.connect(b.rec.Spec.Token)
	err = b.step(ctx, "run", func(ctx context.Context) error {
		if err := b.slot.Describe(b.rec.Spec.metadata()); err != nil {
			return fmt.Errorf("set metadata: %w", err)
		}
		return b.vm.Run(ctx)
	})
	b.m.Hook("resume: runs")
	if err == nil {
		err = b.step(ctx, "init", func(ctx context.Context) error { return b.init(ctx, false) })
	}
	if err == nil {
		return nil
	}
	// It ran, so its present state must be saved.
	b.log.Warn("a resumed sandbox does not respond; pausing it again", "error", err)
	if e := b.savePaused(ctx, nil); e != nil {
		b.log.Error("cannot pause a sandbox again, which keeps running", "error", e)
		b.tracker.Reopen()
		return errors.Join(err, e)
	}
	return err
}

// restoreSaved restores the machine that the pause saved, and leaves it held.
func (b *box) restoreSaved(ctx context.Context) (err error) {
	dir, home := b.m.Dir, b.rec.Home
	origin, err := image.OpenCapture(dir.SandboxOrigin(home))
	if err != nil {
		return err
	}
	if err := b.m.Driver.Restores(b.savedBy(origin)); err != nil {
		return failBecause(err, ErrState, "the paused sandbox cannot continue on this host, because another virtual machine monitor saved it")
	}
	if err := b.checkNesting(b.savedBy(origin), ErrState, "the paused sandbox"); err != nil {
		return err
	}
	saved := dir.SandboxSaved(home, *b.rec.Saved)
	own, err := memory.Open(filepath.Join(saved, "memory"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, own.Close()) }()
	devices, err := os.ReadFile(filepath.Join(saved, "devices"))
	if err != nil {
		return fmt.Errorf("read the saved devices: %w", err)
	}
	if b.base, err = b.m.bases.acquire(ctx, origin); err != nil {
		return err
	}
	if err := os.Chown(b.rec.disk(dir, b.rec.Disks-1), b.uid(), b.uid()); err != nil {
		return err
	}
	from := vmm.Saved{Memory: b.base.file, Changed: own.ChangedFrom(b.base.image), Devices: devices, Kind: b.savedBy(origin)}
	if b.standsAlone(own) {
		alone, err := b.m.bases.own(ctx, own)
		if err != nil {
			return err
		}
		b.m.bases.release(b.base)
		b.base = alone
		from.Memory, from.Changed = alone.file, nil
	}
	return b.restore(ctx, origin, from)
}

// savedBy returns the kind of the sandbox's present or last machine. origin is the capture
// from which it began.
func (b *box) savedBy(origin *image.Capture) string {
	if b.rec.VM == nil {
		return origin.Kind
	}
	return cmp.Or(b.rec.VM.Kind, origin.Kind)
}

// standsAlone reports whether the machine gets its own base instead of the shared one. If the
// kernel does not track writes, the next pause must compare all pages over a shared base, but
// none over an own one. An own base costs memory, so it is only for machines that share
// little.
func (b *box) standsAlone(own *memory.Image) bool {
	changed := own.BytesChangedFrom(b.base.image)
	return !b.m.Driver.TracksMemory() && changed > b.base.bytes && b.m.hasRoom(changed+b.base.bytes)
}

// pausedEvent returns the event of a pause by the agent.
func pausedEvent(reason string) *ending {
	return &ending{journal.Paused, reason, time.Now().UTC()}
}
