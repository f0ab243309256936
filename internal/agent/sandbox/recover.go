package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Recovery is what an earlier agent left: the sandboxes that run, those that
// are paused, and those to remove.
type Recovery struct {
	found []found
}

type found struct {
	rec      record
	vm       vmm.VM // nil: it is paused, or to be removed, as rec.Ending says
	leftover bool   // there may be a machine all the same
}

// recoverTimeout bounds what is done for one sandbox.
const recoverTimeout = 45 * time.Second

// Recover looks through the folders of sandboxes. It takes back the machines
// that run and ends those of sandboxes that were half-made or half-removed,
// so that nothing but what [Recovery.Slots] names is in use afterwards.
func Recover(ctx context.Context, dir layout.Dir, d vmm.Driver, log *slog.Logger) (*Recovery, error) {
	entries, err := os.ReadDir(dir.Sandboxes())
	if errors.Is(err, fs.ErrNotExist) {
		return &Recovery{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for sandboxes: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(8)
	all := make([]*found, len(entries))
	for i, e := range entries {
		id, err := uuid.Parse(e.Name())
		if err != nil || id.String() != e.Name() {
			log.Warn("not a sandbox's folder", "name", e.Name())
			continue
		}
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
			defer cancel()
			f := find(ctx, dir, id, d, log)
			all[i] = &f
			return nil
		})
	}
	_ = g.Wait()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("look for sandboxes: %w", err)
	}
	r := &Recovery{}
	for _, f := range all {
		if f != nil {
			r.found = append(r.found, *f)
		}
	}
	return r, nil
}

// Slots are the network slots of the machines that run.
func (r *Recovery) Slots() []int {
	var slots []int
	for _, f := range r.found {
		if f.vm != nil {
			slots = append(slots, *f.rec.Slot)
		}
	}
	slices.Sort(slots)
	return slots
}

// find decides about one sandbox.
func find(ctx context.Context, dir layout.Dir, home uuid.UUID, d vmm.Driver, log *slog.Logger) found {
	log = log.With("machine", home)
	now := time.Now().UTC()
	rec, err := load(dir, home)
	switch {
	case err != nil:
		log.Warn("removing a sandbox without a readable record", "error", err)
		rec = record{Version: recordVersion, Home: home, Spec: Spec{ID: home}, CreatedAt: now, Ending: &ending{Reason: "it has no record", Time: now}}
	case rec.Ending != nil:
		log.Info("removing a sandbox that was half-removed", "reason", firstLine(rec.Ending.Reason))
	case rec.State == Paused:
		// What it ran on is left only where an agent was killed during a pause
		// or a resume.
		if err := d.Reap(ctx, leftover(rec)); err != nil {
			log.Error("the machine of a paused sandbox cannot be ended", "error", err)
			return found{rec: rec, leftover: true}
		}
		return found{rec: rec}
	case rec.State == waiting:
		rec.Ending = &ending{Reason: "it was no sandbox yet", Time: now}
	case rec.State != Running:
		log.Info("removing a sandbox that was half-made")
		rec.Ending = &ending{Reason: "the host agent ended while it was created", Time: now}
	default:
		vm, err := d.Attach(ctx, *rec.VM)
		if err == nil {
			// It is held if an agent was killed during a pause or a snapshot.
			if err = vm.Run(ctx); err == nil {
				return found{rec: rec, vm: vm}
			}
		}
		log.Warn("a sandbox's machine is not to be taken back", "error", err)
		rec.Ending = &ending{journal.Exited, "the virtual machine ended while no host agent ran", now}
		if !errors.Is(err, vmm.ErrGone) {
			rec.Ending.Reason = "the virtual machine could not be taken back: " + err.Error()
		}
	}
	if err := d.Reap(ctx, leftover(rec)); err != nil {
		log.Error("a machine cannot be ended", "error", err) // tried again when the sandbox is removed
	}
	return found{rec: rec}
}

// leftover names the machine of a sandbox whose machine may never have been
// recorded.
func leftover(r record) vmm.State {
	if r.VM != nil {
		return *r.VM
	}
	return vmm.State{ID: r.Home}
}

// adopt goes on with a sandbox of an earlier agent.
func (m *Manager) adopt(ctx context.Context, f found) {
	b := newBox(m, f.rec)
	close(b.booted)
	m.mu.Lock() // of those adopted before, some may be on their way out
	m.boxes[f.rec.Spec.ID] = b
	m.mu.Unlock()
	if f.rec.Ending != nil {
		b.maybeVM = true
		b.refuse()
		m.wg.Go(func() { b.clean(*f.rec.Ending, nil) })
		return
	}
	if err := b.rec.sweep(m.Dir); err != nil {
		b.log.Warn("what a killed agent was making is left", "error", err)
	}
	if f.rec.State == Paused {
		b.maybeVM = f.leftover
		b.tracker.Shut()
		b.log.Info("paused sandbox found")
		m.wg.Go(b.serve)
		return
	}
	b.maybeVM = true
	m.mu.Lock()
	b.reservedMiB = b.rec.Spec.MemoryMiB + overheadMiB
	m.reservedMiB += b.reservedMiB
	m.mu.Unlock()
	b.vm = f.vm
	slot, err := m.Networks.Reclaim(ctx, *f.rec.Slot)
	if err == nil {
		b.slot = slot
		err = slot.Describe(f.rec.Spec.metadata())
	}
	if err != nil {
		b.log.Error("a sandbox's network cannot be taken back", "error", err)
		b.refuse()
		m.wg.Go(func() {
			b.clean(ending{journal.Exited, "its network was lost: " + err.Error(), time.Now().UTC()}, nil)
		})
		return
	}
	b.connect(b.rec.Spec.Token)
	b.taken = make(chan struct{})
	b.log.Info("sandbox taken back", "slot", slot.Index(), "pid", b.vm.PID())
	m.wg.Go(func() {
		// What a killed agent may have left undone: nothing of this harms one
		// that has just gone on.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), freezeTimeout)
		defer cancel()
		if err := b.init(ctx, false); err != nil {
			b.log.Warn("a sandbox that was taken back does not answer", "error", firstLine(err.Error()))
		}
		close(b.taken)
		b.serve()
	})
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
