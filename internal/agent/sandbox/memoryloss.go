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

// lose makes the sandbox paused without its memory. [box.servePaused] ends its machine.
// After an error, nothing has changed.
func (b *box) lose(why condition.Condition, told *ending) error {
	next, err := b.rec.withoutMemory(b.m.Dir, why)
	next.Untold = told
	if err == nil {
		err = b.commit(next)
	}
	if err != nil {
		return Full(err)
	}
	b.forgetGuest()
	return nil
}

// loseDead is lose for a sandbox whose machine has ended. If it cannot write the record, the
// next agent finds that the machine has ended, and does the same.
func (b *box) loseDead(why condition.Condition) {
	b.log.Warn("a sandbox has lost its memory and keeps its disk", "reason", string(why.Reason), "detail", why.Detail)
	told := pausedEvent("its memory is lost: " + why.Text())
	b.tracker.Shut()
	if err := b.lose(why, told); err != nil {
		b.log.Error("cannot record that a sandbox has lost its memory", "error", err)
		next, _ := b.rec.withoutMemory(b.m.Dir, why)
		next.Untold = told
		b.set(func() { b.rec = next })
		b.forgetGuest()
	}
}

// forgetGuest cancels all uses of a guest that has ended.
func (b *box) forgetGuest() {
	b.endLife(&StateError{Paused})
	b.disconnect()
	b.m.leaves(b)
}

// machineEnded ends the sandbox if its guest shut down. If its machine ended for another
// reason, the sandbox is paused with its disk. It reports whether the sandbox ended.
func (b *box) machineEnded() (end bool) {
	err := b.vm.Err()
	var byGuest *vmm.GuestEnd
	if errors.As(err, &byGuest) && byGuest.Off {
		b.clean(ending{journal.Exited, err.Error(), time.Now().UTC()}, nil)
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), consoleTimeout)
	defer cancel()
	console, _ := b.vm.Console(ctx) // after an error, the end is missing
	b.loseDead(whyLost(err, string(console)))
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
	return m.start(ctx, id, (*box).reboot)
}

func (b *box) reboot(ctx context.Context) error {
	begin := time.Now()
	was := b.rec.State
	if was != Running && was != Paused {
		return &StateError{was}
	}
	if err := b.bootable(); err != nil {
		return err
	}
	answers := was == Running && b.condition() == nil
	b.tracker.Shut()
	ctx, end := b.operation(ctx, "reboot")
	b.set(func() { b.rec.State = Resuming })
	if b.rec.Lost == nil {
		// If the agent crashes from here on, the next one boots the sandbox from its disk.
		err := b.step(ctx, "forget", func(ctx context.Context) error {
			next, err := b.rec.withoutMemory(b.m.Dir, loss(condition.Reboot, ""))
			if err != nil {
				return err
			}
			return b.commit(next)
		})
		if err != nil {
			end(err)
			b.set(func() { b.rec.State = was })
			if was == Running {
				b.tracker.Reopen()
			}
			return fmt.Errorf("reboot: %w", Full(err))
		}
		b.set(func() { b.rec.State = Resuming })
	}
	b.m.Hook("reboot: forgotten")
	if answers {
		_ = b.step(ctx, "settle", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, settleTimeout)
			defer cancel()
			return b.guest.Settle(ctx) // if it fails, the disk is as after a power failure
		})
	}
	b.endLife(&StateError{Resuming})
	b.disconnect()
	// The memory stays reserved for the boot.
	err := b.step(ctx, "vacate", func(ctx context.Context) error {
		if err := b.vacate(ctx); err != nil {
			return err
		}
		return b.rec.sweep(b.m.Dir)
	})
	if err == nil {
		b.m.Hook("reboot: vacated")
		err = b.goOn(ctx)
	} else {
		b.set(func() { b.rec.State = Paused }) // servePaused vacates it
	}
	end(err)
	if err != nil {
		return fmt.Errorf("reboot: %w", err)
	}
	b.log.Info("sandbox is rebooted", "took", time.Since(begin), "steps", stepsValue(b.steps))
	b.tracker.Touch()
	b.tracker.Reopen()
	return nil
}

// bootable returns an error if the sandbox cannot boot from its disk on this host.
func (b *box) bootable() error {
	_, err := b.format(b.rec.DiskFormat)
	return err
}

// bootFromDisk starts a machine from the sandbox's disk and makes its guest the sandbox's own.
// Only then does it record that the sandbox runs, so that an agent that starts after a
// crash boots the sandbox again.
func (b *box) bootFromDisk(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			b.endLife(&StateError{Paused})
			b.disconnect()
		}
	}()
	err = b.step(ctx, "boot", func(ctx context.Context) error { return Full(b.start(ctx)) })
	if err != nil {
		return err
	}
	b.m.Hook("reboot: booted")
	err = b.step(ctx, "init", func(ctx context.Context) error {
		b.connect("")
		err := b.guarded(ctx, b.guest.Wait)
		if err == nil {
			err = b.init(ctx, false)
		}
		return err
	})
	if err != nil {
		return err
	}
	b.m.Hook("reboot: answers")
	return b.step(ctx, "commit", func(ctx context.Context) error {
		next := b.rec
		// The next pause saves all that is not zero.
		saved, err := next.zeroState(b.m.Dir)
		if err != nil {
			return Full(err)
		}
		next.State, next.Lost, next.Saved = Running, nil, &saved
		return Full(b.commit(next))
	})
}

// start starts a machine from the sandbox's disk.
func (b *box) start(ctx context.Context) error {
	dir, home := b.m.Dir, b.rec.Home
	if err := b.bootable(); err != nil {
		return err
	}
	origin, err := image.OpenCapture(dir.SandboxOrigin(home))
	if err != nil {
		return err
	}
	if err := os.Chown(b.rec.disk(dir, b.rec.Disks-1), b.uid(), b.uid()); err != nil {
		return err
	}
	if err := b.slot.Describe(b.rec.Spec.metadata()); err != nil {
		return fmt.Errorf("set metadata: %w", err)
	}
	b.begin.nested = b.m.mayNest(b.rec.Spec.Team)
	return b.boot(ctx, origin, originLayers(origin))
}
