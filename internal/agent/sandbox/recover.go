package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
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
	// unreadable is why the record cannot be read, so that rec stands for it, or
	// why its machine cannot be taken back; the files are kept.
	unreadable error
}

// recoverTimeout bounds what is done for one sandbox.
const recoverTimeout = 45 * time.Second

// Newer returns an error for each record that a later release wrote. It changes
// nothing.
func Newer(dir layout.Dir) []*format.NewerError {
	var all []*format.NewerError
	look := func(err error) {
		var newer *format.NewerError
		if errors.As(err, &newer) {
			all = append(all, newer)
		}
	}
	entries, _ := os.ReadDir(dir.Sandboxes()) // Recover reports the error
	for _, e := range entries {
		home, err := uuid.Parse(e.Name())
		if err != nil {
			continue
		}
		rec, err := load(dir, home)
		look(err)
		_, err = image.OpenCapture(dir.SandboxOrigin(home))
		look(err)
		if rec.Saved != nil {
			look(memory.Check(filepath.Join(dir.SandboxSaved(home, *rec.Saved), "memory")))
		}
	}
	return all
}

// Recover looks through the folders of sandboxes. It takes back the machines
// that run and ends those of sandboxes that were half-made or half-removed,
// so that nothing but what [Recovery.Slots] names is in use afterwards. It
// ends a machine whose record it cannot read or that it cannot take back,
// because nothing can confine or stop it any more; the files are kept.
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
	var lost error // why the files are kept
	rec, err := load(dir, home)
	switch {
	case errors.Is(err, fs.ErrNotExist) && unused(dir, home):
		log.Info("removing a folder in which nothing was made yet")
		rec = record{Version: format.Sandbox.Version, Home: home, Spec: Spec{ID: home}, CreatedAt: now, Ending: &ending{Reason: "it has no record", Time: now}}
	case err != nil:
		log.Error("the record of a sandbox cannot be read; its machine ends, and its files are kept", "error", err)
		// Its home is its id, unless it began as a machine that waited. For the
		// others the control plane notices that the host lacks them.
		rec = record{
			Version: format.Sandbox.Version, Home: home, Spec: Spec{ID: home}, CreatedAt: now,
			Ending: &ending{journal.Exited, "the host could not read the sandbox's record; it keeps the files", now},
		}
		lost = err
	case rec.Ending != nil:
		log.Info("removing a sandbox that was half-removed", "reason", firstLine(rec.Ending.Reason))
		if rec.Keep != "" {
			lost = errors.New(rec.Keep)
		}
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
		if ctx.Err() == context.Canceled {
			return found{rec: rec} // the agent stops, and has learned nothing about the machine
		}
		log.Warn("a sandbox's machine is not to be taken back", "error", err)
		rec.Ending = &ending{journal.Exited, "the virtual machine ended while no host agent ran", now}
		if !errors.Is(err, vmm.ErrGone) {
			lost = err
			rec.forsake(dir, "the host could not take the virtual machine back; it keeps the files", err, log)
		}
	}
	if err := d.Reap(ctx, leftover(rec)); err != nil {
		log.Error("a machine cannot be ended", "error", err) // tried again when the sandbox is removed
	}
	return found{rec: rec, unreadable: lost}
}

// forsake records that a sandbox ends because of err, and that its files are
// kept: an agent after this one would only find that the machine is gone.
func (r *record) forsake(dir layout.Dir, why string, err error, log *slog.Logger) {
	r.Ending = &ending{journal.Exited, why, time.Now().UTC()}
	r.Keep = err.Error()
	if err := r.save(dir); err != nil {
		log.Error("cannot record that a sandbox's files are kept", "error", err)
	}
}

// unused reports whether the folder of a sandbox has nothing but files that an
// agent was killed while writing.
func unused(dir layout.Dir, home uuid.UUID) bool {
	entries, err := os.ReadDir(dir.Sandbox(home))
	return err == nil && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
		return !atomicfile.IsTemporary(e.Name()) && !strings.HasPrefix(e.Name(), oldTemporary)
	})
}

// oldTemporary begins the names of records that earlier agents were writing.
const oldTemporary = "record-"

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
		b.maybeVM, b.unreadable = true, f.unreadable
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
	slot, err := m.Networks.Reclaim(ctx, *f.rec.Slot, f.vm.PID())
	if err == nil {
		b.slot = slot
		err = slot.Describe(f.rec.Spec.metadata())
	}
	if err != nil {
		b.log.Error("a sandbox's network cannot be taken back; its machine ends, and its files are kept", "error", err)
		b.refuse()
		next := b.rec
		next.forsake(m.Dir, "the host could not take the sandbox's network back; it keeps the files", err, b.log)
		b.set(func() { b.rec, b.unreadable = next, err })
		m.wg.Go(func() { b.clean(*next.Ending, nil) })
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
