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

// Recovery is what an earlier agent left: the sandboxes that run, and those to
// remove.
type Recovery struct {
	found []found
}

type found struct {
	rec record
	vm  vmm.VM // nil: the sandbox is to be removed, as rec.Ending says
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
func find(ctx context.Context, dir layout.Dir, id uuid.UUID, d vmm.Driver, log *slog.Logger) found {
	log = log.With("sandbox", id)
	now := time.Now().UTC()
	rec, err := load(dir, id)
	switch {
	case err != nil:
		log.Warn("removing a sandbox without a readable record", "error", err)
		rec = record{Version: recordVersion, Spec: Spec{ID: id}, CreatedAt: now, Ending: &ending{Reason: "it has no record", Time: now}}
	case rec.Ending != nil:
		log.Info("removing a sandbox that was half-removed", "reason", firstLine(rec.Ending.Reason))
	case rec.State != Running:
		log.Info("removing a sandbox that was half-made")
		rec.Ending = &ending{Reason: "the host agent ended while it was created", Time: now}
	default:
		vm, err := d.Attach(ctx, *rec.VM)
		if err == nil {
			return found{rec, vm}
		}
		log.Warn("a sandbox's machine is not to be taken back", "error", err)
		rec.Ending = &ending{journal.Exited, "the virtual machine ended while no host agent ran", now}
		if !errors.Is(err, vmm.ErrGone) {
			rec.Ending.Reason = "the virtual machine could not be taken back: " + err.Error()
		}
	}
	if err := d.Reap(ctx, leftover(dir, rec)); err != nil {
		log.Error("a machine cannot be ended", "error", err) // tried again when the sandbox is removed
	}
	return found{rec: rec}
}

// leftover names the machine of a sandbox whose machine may never have been
// recorded.
func leftover(dir layout.Dir, r record) vmm.State {
	if r.VM != nil {
		return *r.VM
	}
	return vmm.State{ID: r.Spec.ID}
}

// adopt goes on with a sandbox of an earlier agent.
func (m *Manager) adopt(ctx context.Context, f found) {
	b := newBox(m, f.rec)
	close(b.booted)
	b.maybeVM = true
	m.add(b)
	if f.vm == nil {
		b.refuse()
		m.wg.Go(func() { b.clean(*f.rec.Ending, nil) })
		return
	}
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
	b.connect()
	b.log.Info("sandbox taken back", "slot", slot.Index(), "pid", b.vm.PID())
	m.wg.Go(b.serve)
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
