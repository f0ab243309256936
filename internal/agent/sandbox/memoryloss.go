package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/text"
)

// A sandbox whose machine ends without being saved keeps its disk: it is paused, and
// its record says that its memory is lost. It boots from its disk when it is resumed.

// maxDetail bounds a guest's text in a condition, in bytes.
const maxDetail = 512

// loss returns a condition that begins now.
func loss(why condition.Reason, detail string) condition.Condition {
	return condition.Condition{Reason: why, Detail: text.Clean(printable(detail), maxDetail), Since: time.Now().UTC()}
}

// withoutMemory returns the record of the sandbox after the loss of its memory. It writes a
// saved state for it, which has memory of zeros, like that of a booting machine, and no
// devices. A release that does not support lost memory cannot resume that state, and leaves
// the sandbox paused.
func (r record) withoutMemory(dir layout.Dir, why condition.Condition) (record, error) {
	r.State, r.Slot, r.Saved, r.Sealed, r.PausedAt, r.Lost = Paused, nil, nil, max(r.Disks-1, 0), &why.Since, &why
	saved, err := r.zeroState(dir)
	if err != nil {
		return r, fmt.Errorf("write a state without memory: %w", err)
	}
	r.Saved = &saved
	return r, nil
}

// zeroState writes the state of a machine that has not booted, and returns its name.
func (r *record) zeroState(dir layout.Dir) (uuid.UUID, error) {
	id := uuid.New()
	folder := dir.SandboxSaved(r.Home, id)
	err := os.Mkdir(folder, 0o700)
	if err == nil {
		err = os.Mkdir(filepath.Join(folder, "memory"), 0o700)
	}
	if err == nil {
		err = memory.CreateZero(filepath.Join(folder, "memory"), int64(r.Spec.MemoryMiB)<<20)
	}
	if err == nil {
		err = atomicfile.Sync(folder)
	}
	if err != nil {
		_ = os.RemoveAll(folder) // otherwise a sweep removes it
	}
	return id, err
}

// lose makes the sandbox paused without its memory. [instance.servePaused] ends its machine.
// After an error, nothing has changed.
func (inst *instance) lose(why condition.Condition, told *ending) error {
	next, err := inst.rec.withoutMemory(inst.m.Dir, why)
	next.Untold = told
	if err == nil {
		err = inst.commit(next)
	}
	if err != nil {
		return Full(err)
	}
	inst.forgetGuest()
	return nil
}

// loseDead is lose for a sandbox whose machine has ended. If it cannot write the record, the
// next agent finds that the machine has ended, and does the same.
func (inst *instance) loseDead(why condition.Condition) {
	inst.log.Warn("a sandbox has lost its memory and keeps its disk", "reason", string(why.Reason), "detail", why.Detail)
	told := pausedEvent("its memory is lost: " + why.Text())
	inst.tracker.Shut()
	if err := inst.lose(why, told); err != nil {
		inst.log.Error("cannot record that a sandbox has lost its memory", "error", err)
		next, _ := inst.rec.withoutMemory(inst.m.Dir, why)
		next.Untold = told
		inst.set(func() { inst.rec = next })
		inst.forgetGuest()
	}
}

// forgetGuest cancels all uses of a guest that has ended.
func (inst *instance) forgetGuest() {
	inst.endLife(&StateError{Paused})
	inst.disconnect()
	inst.m.leaves(inst)
}

// machineEnded ends the sandbox if its guest shut down. If its machine ended for another
// reason, the sandbox is paused with its disk. It reports whether the sandbox ended.
func (inst *instance) machineEnded() (end bool) {
	err := inst.vm.Err()
	var byGuest *vmm.GuestEnd
	if errors.As(err, &byGuest) && byGuest.Off {
		inst.clean(ending{journal.Exited, err.Error(), time.Now().UTC()}, nil)
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), consoleTimeout)
	defer cancel()
	console, _ := inst.vm.Console(ctx) // after an error, the end is missing
	inst.loseDead(whyLost(err, string(console)))
	return false
}

// settleTimeout bounds how long a reboot lets the guest write to its disk.
const settleTimeout = 10 * time.Second

// consoleTimeout bounds reading the console of a machine that has ended.
const consoleTimeout = 5 * time.Second

var (
	panicLine = regexp.MustCompile(`Kernel panic - not syncing: [^\r\n]*`)
	// daemonKilled is the kernel's line when memory runs out and it kills the guest's
	// first processes, which it does only if there is nothing else to kill.
	daemonKilled = regexp.MustCompile(`(?m)Out of memory: Killed process \d+ \((envd|tini|wrenn-init)\)`)
	noMemory     = regexp.MustCompile(`(?i)out of memory|deadlocked on memory|no killable process`)
)

// whyLost says why a machine ended whose guest did not shut down; err is [vmm.VM.Err].
func whyLost(err error, console string) condition.Condition {
	var byGuest *vmm.GuestEnd
	if !errors.As(err, &byGuest) {
		return loss(condition.Killed, err.Error())
	}
	panics := panicLine.FindAllStringIndex(console, -1)
	if len(panics) == 0 {
		return loss(condition.Restarted, "")
	}
	at := panics[len(panics)-1]
	line := strings.TrimSpace(console[at[0]:at[1]])
	// Only the lines before the panic, because the console may have hours of output.
	if noMemory.MatchString(line) || daemonKilled.MatchString(console[max(0, at[0]-consoleTail):at[0]]) {
		return loss(condition.OOM, line)
	}
	return loss(condition.Crashed, line)
}

// Reboot starts a running or paused sandbox from its disk, without its memory. The guest
// need not answer. When it fails the sandbox runs as before, or is paused without its
// memory; the disk is kept.
func (m *Manager) Reboot(ctx context.Context, id uuid.UUID) (Info, error) {
	return m.start(ctx, id, (*instance).reboot)
}

func (inst *instance) reboot(ctx context.Context) error {
	begin := time.Now()
	was := inst.rec.State
	if was != Running && was != Paused {
		return &StateError{was}
	}
	if err := inst.bootable(); err != nil {
		return err
	}
	answers := was == Running && inst.condition() == nil
	inst.tracker.Shut()
	ctx, end := inst.operation(ctx, "reboot")
	inst.set(func() { inst.rec.State = Resuming })
	if inst.rec.Lost == nil {
		// If the agent crashes from here on, the next one boots the sandbox from its disk.
		err := inst.step(ctx, "forget", func(ctx context.Context) error {
			next, err := inst.rec.withoutMemory(inst.m.Dir, loss(condition.Reboot, ""))
			if err != nil {
				return err
			}
			return inst.commit(next)
		})
		if err != nil {
			end(err)
			inst.set(func() { inst.rec.State = was })
			if was == Running {
				inst.tracker.Reopen()
			}
			return fmt.Errorf("reboot: %w", Full(err))
		}
		inst.set(func() { inst.rec.State = Resuming })
	}
	inst.m.Hook("reboot: forgotten")
	if answers {
		_ = inst.step(ctx, "settle", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, settleTimeout)
			defer cancel()
			return inst.guest.Settle(ctx) // if it fails, the disk is as after a power failure
		})
	}
	inst.endLife(&StateError{Resuming})
	inst.disconnect()
	// The memory stays reserved for the boot.
	err := inst.step(ctx, "vacate", func(ctx context.Context) error {
		if err := inst.vacate(ctx); err != nil {
			return err
		}
		return inst.rec.sweep(inst.m.Dir)
	})
	if err == nil {
		inst.m.Hook("reboot: vacated")
		err = inst.goOn(ctx)
	} else {
		inst.set(func() { inst.rec.State = Paused }) // servePaused vacates it
	}
	end(err)
	if err != nil {
		return fmt.Errorf("reboot: %w", err)
	}
	inst.log.Info("sandbox is rebooted", "took", time.Since(begin), "steps", stepsValue(inst.steps))
	inst.tracker.Touch()
	inst.tracker.Reopen()
	return nil
}

// bootable returns an error if the sandbox cannot boot from its disk on this host.
func (inst *instance) bootable() error {
	_, err := inst.format(inst.rec.DiskFormat)
	return err
}

// bootFromDisk starts a machine from the sandbox's disk and makes its guest the sandbox's own.
// Only then does it record that the sandbox runs, so that an agent that starts after a
// crash boots the sandbox again.
func (inst *instance) bootFromDisk(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			inst.endLife(&StateError{Paused})
			inst.disconnect()
		}
	}()
	err = inst.step(ctx, "boot", func(ctx context.Context) error { return Full(inst.start(ctx)) })
	if err != nil {
		return err
	}
	inst.m.Hook("reboot: booted")
	err = inst.step(ctx, "init", func(ctx context.Context) error {
		inst.connect("")
		err := inst.guarded(ctx, inst.guest.Wait)
		if err == nil {
			err = inst.init(ctx, false)
		}
		return err
	})
	if err != nil {
		return err
	}
	inst.m.Hook("reboot: answers")
	return inst.step(ctx, "commit", func(ctx context.Context) error {
		next := inst.rec
		// The next pause saves all that is not zero.
		saved, err := next.zeroState(inst.m.Dir)
		if err != nil {
			return Full(err)
		}
		next.State, next.Lost, next.Saved = Running, nil, &saved
		return Full(inst.commit(next))
	})
}

// start starts a machine from the sandbox's disk.
func (inst *instance) start(ctx context.Context) error {
	dir, home := inst.m.Dir, inst.rec.Home
	if err := inst.bootable(); err != nil {
		return err
	}
	origin, err := image.OpenCapture(dir.SandboxOrigin(home))
	if err != nil {
		return err
	}
	if err := os.Chown(inst.rec.disk(dir, inst.rec.Disks-1), inst.uid(), inst.uid()); err != nil {
		return err
	}
	if err := inst.slot.Describe(inst.rec.Spec.metadata()); err != nil {
		return fmt.Errorf("set metadata: %w", err)
	}
	inst.begin.nested = inst.m.mayNest(inst.rec.Spec.Team)
	return inst.boot(ctx, origin, originLayers(origin))
}
