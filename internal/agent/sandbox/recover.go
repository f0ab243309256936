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
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Recovery is the result of [Recover]: the sandboxes that an earlier agent left running or
// paused, and those to remove.
type Recovery struct {
	found []found
}

type found struct {
	rec record
	vm  vmm.VM // nil: it is paused or, with rec.Ending, must be removed
	// leftover says that its machine may still run, because ending it failed.
	leftover bool
	// unreadable is the error of a damaged record, for which rec is a substitute. The files
	// are kept.
	unreadable error
	// untaken is the error of a failed adoption. The machine may run.
	untaken error
	// late says that reread found it, after Recover could not.
	late bool
	// unread says that the record could not be read, so that rec has only its home. damaged
	// says that reading again does not help, unless somebody repairs the record.
	unread, damaged bool
}

const (
	// recoverTimeout bounds Recover. The manager retries what takes longer.
	recoverTimeout = 20 * time.Second
	// takeTimeout bounds one such retry.
	takeTimeout = 45 * time.Second
)

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
		look(memory.Check(filepath.Join(dir.SandboxOrigin(home), "memory")))
		if rec.Saved != nil {
			look(memory.Check(filepath.Join(dir.SandboxSaved(home, *rec.Saved), "memory")))
		}
	}
	return all
}

// Recover finds the sandboxes of an earlier agent. It attaches to running machines, and ends
// those of sandboxes that were being created or removed. If it cannot attach to a machine,
// or the machine's record is unreadable or damaged, the machine keeps running and the
// manager retries. If a record is damaged and no machine runs, the files are set aside.
func Recover(ctx context.Context, dir layout.Dir, d vmm.Driver, log *slog.Logger) (*Recovery, error) {
	entries, err := os.ReadDir(dir.Sandboxes())
	if errors.Is(err, fs.ErrNotExist) {
		return &Recovery{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find sandboxes: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(8)
	bounded, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	all := make([]*found, len(entries))
	for i, e := range entries {
		id, err := uuid.Parse(e.Name())
		if err != nil || id.String() != e.Name() {
			log.Warn("not a sandbox's folder", "name", e.Name())
			continue
		}
		g.Go(func() error {
			f := find(bounded, dir, id, d, log, false)
			all[i] = &f
			return nil
		})
	}
	_ = g.Wait()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("find sandboxes: %w", err)
	}
	r := &Recovery{}
	for _, f := range all {
		if f != nil {
			r.found = append(r.found, *f)
		}
	}
	return r, nil
}

// Unknown reports whether machines may run in unknown network slots.
func (r *Recovery) Unknown() bool {
	return slices.ContainsFunc(r.found, func(f found) bool { return f.unread || f.leftover && f.rec.Slot == nil })
}

// Slots returns the known network slots of machines that run or may run.
func (r *Recovery) Slots() []int {
	var slots []int
	for _, f := range r.found {
		if f.vm != nil || f.untaken != nil && !f.unread || f.leftover && f.rec.Slot != nil {
			slots = append(slots, *f.rec.Slot)
		}
	}
	slices.Sort(slots)
	return slots
}

// find examines one sandbox. If end is set, it ends the machine of a damaged record, because
// somebody is deleting the sandbox.
func find(ctx context.Context, dir layout.Dir, home uuid.UUID, d vmm.Driver, log *slog.Logger, end bool) found {
	log = log.With("machine", home)
	now := time.Now().UTC()
	var lost error // the reason for keeping the files
	rec, err := load(dir, home)
	bare := false
	if errors.Is(err, fs.ErrNotExist) {
		var e error
		if bare, e = unused(dir, home); e != nil {
			err = e
		}
	}
	var newer *format.NewerError
	switch {
	case err != nil && (unreadable.Passing(err) || errors.As(err, &newer)):
		log.Error("cannot read the record of a sandbox now; its machine, if any, keeps running", "error", err)
		return found{rec: record{Home: home, Spec: Spec{ID: labelled(dir, home)}}, unread: true, untaken: err}
	case bare:
		log.Info("removing the empty folder of a sandbox")
		rec = record{Version: format.Sandbox.Version, Home: home, Spec: Spec{ID: home}, CreatedAt: now, Ending: &ending{Reason: "it has no record", Time: now}}
	case err != nil:
		if lives, e := d.Lives(home); !end && (lives || e != nil) {
			log.Error("the record of a sandbox is damaged; its machine keeps running", "error", errors.Join(err, e))
			return found{rec: record{Home: home, Spec: Spec{ID: labelled(dir, home)}}, unread: true, damaged: true, untaken: err}
		}
		log.Error("the record of a sandbox is damaged; its files are kept", "error", err)
		// Without a label, the home is the id unless the sandbox began as a warm machine. In
		// that case, the control plane notices that the host lacks the sandbox.
		sandbox := labelled(dir, home)
		if sandbox == uuid.Nil {
			sandbox = home
		}
		rec = record{
			Version: format.Sandbox.Version, Home: home, Spec: Spec{ID: sandbox}, CreatedAt: now,
			Ending: &ending{journal.Exited, "the host could not read the sandbox's record; it keeps the files", now},
		}
		lost = err
	case rec.Ending != nil:
		log.Info("continuing to remove a sandbox", "reason", firstLine(rec.Ending.Reason))
		if rec.Keep != "" {
			lost = errors.New(rec.Keep)
		}
	case rec.State == Paused:
		// It has a machine only if the agent was killed during a pause or a resume.
		if err := d.Reap(ctx, leftover(rec)); err != nil {
			log.Error("cannot end the machine of a paused sandbox", "error", err)
			return found{rec: rec, leftover: true}
		}
		return found{rec: rec}
	case rec.State == waiting:
		rec.Ending = &ending{Reason: "it was a warm machine", Time: now}
	case rec.State != Running:
		log.Info("removing an unfinished sandbox")
		rec.Ending = &ending{Reason: "the host agent ended during its creation", Time: now}
	default:
		vm, err := take(ctx, d, nil, *rec.VM)
		switch {
		case err == nil:
			return found{rec: rec, vm: vm}
		case !errors.Is(err, vmm.ErrGone):
			log.Error("cannot attach to a sandbox's machine yet, which keeps running", "error", err)
			return found{rec: rec, vm: vm, untaken: err}
		}
		log.Warn("a sandbox's machine has ended; its disk is kept", "error", err)
		next, err := rec.withoutMemory(dir, loss(condition.Killed, wasGone))
		next.Untold = pausedEvent("its memory is lost: " + wasGone)
		if err == nil {
			err = next.save(dir)
		}
		if err != nil {
			log.Error("cannot record that a sandbox has lost its memory", "error", err)
		}
		next.Slot = rec.Slot // the machine keeps it as long as it may run
		f := found{rec: next}
		if err := d.Reap(ctx, leftover(next)); err != nil {
			log.Error("cannot end a machine, which keeps its network slot", "error", err)
			f.leftover = true
		}
		return f
	}
	f := found{rec: rec, unreadable: lost}
	if err := d.Reap(ctx, leftover(rec)); err != nil {
		log.Error("cannot end a machine, which keeps its network slot", "error", err)
		f.leftover = true // the sandbox's removal retries
	}
	return f
}

// wasGone is the reason for an end that no agent observed.
const wasGone = "the virtual machine ended while no host agent ran"

// take attaches to a machine, unless vm is not nil, and runs it, because a killed agent may
// have left it held. After an error other than [vmm.ErrGone], the caller passes the result
// to the next attempt.
func take(ctx context.Context, d vmm.Driver, vm vmm.VM, st vmm.State) (vmm.VM, error) {
	if vm == nil {
		var err error
		if vm, err = d.Attach(ctx, st); err != nil {
			return nil, err
		}
	}
	err := vm.Run(ctx)
	if err == nil {
		return vm, nil
	}
	select {
	case <-vm.Done():
		return nil, errors.Join(vmm.ErrGone, err)
	default:
		return vm, err
	}
}

// unused reports whether the folder of a sandbox has only a label and temporary files.
func unused(dir layout.Dir, home uuid.UUID) (bool, error) {
	entries, err := os.ReadDir(dir.Sandbox(home))
	if err != nil {
		return false, err
	}
	return !slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
		return !atomicfile.IsTemporary(e.Name()) && !strings.HasPrefix(e.Name(), oldTemporary) && !strings.HasPrefix(e.Name(), layout.SandboxIDPrefix)
	}), nil
}

// oldTemporary is the prefix of temporary records of earlier releases.
const oldTemporary = "record-"

// leftover returns the state of a sandbox's machine for Reap, even if it was never recorded.
func leftover(r record) vmm.State {
	if r.VM != nil {
		return *r.VM
	}
	return vmm.State{ID: r.Home}
}

// adopt takes over a sandbox of an earlier agent.
func (m *Manager) adopt(ctx context.Context, f found) {
	if f.unread {
		u := &unreadRecord{sandbox: f.rec.Spec.ID, damaged: f.damaged, end: make(chan struct{}, 1), known: make(chan struct{})}
		m.mu.Lock()
		m.unread[f.rec.Home] = u
		m.mu.Unlock()
		m.reportUnread(f)
		m.wg.Go(func() { m.reread(f, u) })
		return
	}
	inst := newInstance(m, f.rec)
	close(inst.booted)
	// Publish the instance only when it is complete.
	begin := func(live func()) {
		m.mu.Lock()
		m.sandboxes[f.rec.Spec.ID] = inst
		m.mu.Unlock()
		m.wg.Go(live)
	}
	if f.rec.Ending != nil {
		inst.maybeVM, inst.unreadable = true, f.unreadable
		// No other machine may get the slot, and so the user, of one that may run.
		inst.kept = (f.late || f.leftover) && f.rec.Slot != nil
		inst.refuse()
		begin(func() { inst.clean(*f.rec.Ending, nil) })
		return
	}
	// Earlier releases made no labels.
	if err := errors.Join(inst.rec.sweep(m.Dir), inst.rec.label(m.Dir)); err != nil {
		inst.log.Warn("cannot remove a killed agent's unfinished files", "error", err)
	}
	if f.rec.State == Paused {
		inst.maybeVM = f.leftover
		if inst.kept = (f.late || f.leftover) && f.rec.Slot != nil; !inst.kept {
			inst.rec.Slot = nil
		}
		inst.tracker.Shut()
		inst.log.Info("found a paused sandbox")
		begin(inst.serve)
		return
	}
	inst.maybeVM = true
	m.mu.Lock()
	inst.reservedMiB = inst.rec.Spec.MemoryMiB + overheadMiB
	m.reservedMiB += inst.reservedMiB
	m.mu.Unlock()
	inst.vm, inst.kept = f.vm, true
	err := f.untaken
	if err == nil {
		err = inst.reclaim(ctx)
	}
	if err != nil {
		inst.tracker.Shut()
		inst.set(func() { inst.rec.State = Resuming })
		inst.reportUntaken(err)
		begin(inst.regain)
		return
	}
	inst.taken = make(chan struct{})
	begin(func() {
		inst.greet()
		close(inst.taken)
		inst.serve()
	})
}

// reclaim adopts the network of an adopted machine, and connects to its guest.
func (inst *instance) reclaim(ctx context.Context) error {
	if inst.slot == nil {
		slot, err := inst.m.Networks.Reclaim(ctx, *inst.rec.Slot, inst.vm.PID())
		if err != nil {
			return fmt.Errorf("reclaim network slot: %w", err)
		}
		inst.set(func() { inst.slot, inst.kept = slot, false })
	}
	if err := inst.slot.Limit(inst.rates()); err != nil {
		return fmt.Errorf("limit the network: %w", err)
	}
	if err := inst.slot.Describe(inst.rec.Spec.metadata()); err != nil {
		return fmt.Errorf("set metadata: %w", err)
	}
	inst.connect(inst.rec.Spec.Token)
	inst.log.Info("adopted a running sandbox", "slot", inst.slot.Index(), "pid", inst.vm.PID())
	return nil
}

// greet initializes the guest again, because a killed agent may not have done so. A guest
// that kept running tolerates it.
func (inst *instance) greet() {
	ctx, cancel := context.WithTimeout(context.Background(), freezeTimeout)
	defer cancel()
	if err := inst.init(ctx, false); err != nil {
		inst.log.Warn("an adopted sandbox does not respond", "error", firstLine(err.Error()))
	}
}

// regain retries to adopt a sandbox whose machine runs, until it succeeds or the sandbox
// ends. The sandbox is resuming until then.
func (inst *instance) regain() {
	name := id.Format(id.Sandbox, inst.rec.Spec.ID)
	defer inst.m.Problems.Clear(problem.Sandbox, name)
	waits := backoff.New(firstRetry, lastRetry)
	for {
		var died <-chan struct{}
		if inst.vm != nil {
			died = inst.vm.Done()
		}
		t := time.NewTimer(waits.Next())
		select {
		case <-t.C:
			err := inst.takeBack()
			if err == nil {
				inst.tracker.Touch()
				inst.tracker.Reopen()
				inst.set(func() { inst.rec.State = Running })
				inst.m.Problems.Clear(problem.Sandbox, name)
				inst.serve()
				return
			}
			if errors.Is(err, vmm.ErrGone) {
				inst.m.Problems.Clear(problem.Sandbox, name)
				inst.dropKept()
				inst.loseDead(loss(condition.Killed, wasGone))
				inst.serve()
				return
			}
			inst.reportUntaken(err)
		case <-died:
			inst.m.Problems.Clear(problem.Sandbox, name)
			inst.dropKept()
			if !inst.machineEnded() {
				inst.serve()
			}
			return
		case o := <-inst.orders:
			inst.obey(o)
		case <-inst.stop:
			inst.clean(inst.why, nil)
			return
		case <-inst.m.closing:
			inst.release()
			return
		}
		t.Stop()
	}
}

// dropKept releases the slot that was kept for a machine that has ended before its adoption.
func (inst *instance) dropKept() {
	if !inst.kept {
		return
	}
	if !inst.m.shares(inst) {
		inst.m.Networks.Forget(*inst.rec.Slot)
	}
	inst.set(func() { inst.kept = false })
}

func (inst *instance) reportUntaken(err error) {
	name := id.Format(id.Sandbox, inst.rec.Spec.ID)
	inst.m.Problems.Report(problem.Sandbox, name, "sandbox "+name+" cannot be used: its machine runs, but the agent cannot adopt it, and retries: "+err.Error())
}

// shares reports whether another sandbox has the slot that is kept for b, which can only be
// due to a damaged or old record.
func (m *Manager) shares(inst *instance) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, other := range m.sandboxes {
		if other == inst {
			continue
		}
		other.mu.Lock()
		same := other.rec.Slot != nil && *other.rec.Slot == *inst.rec.Slot && (other.kept || other.slot != nil)
		other.mu.Unlock()
		if same {
			return true
		}
	}
	return false
}

// takeBack tries to adopt a sandbox whose machine runs.
func (inst *instance) takeBack() error {
	ctx, done := inst.bounded()
	defer done()
	ctx, cancel := context.WithTimeout(ctx, takeTimeout)
	defer cancel()
	vm, err := take(ctx, inst.m.Driver, inst.vm, *inst.rec.VM)
	inst.set(func() { inst.vm = vm })
	if err == nil {
		err = inst.reclaim(ctx)
	}
	if err == nil {
		inst.greet()
	}
	return err
}

// unreadRecord is a record that could not be read. Its machine may run.
type unreadRecord struct {
	sandbox uuid.UUID     // uuid.Nil: unknown
	damaged bool          // guarded by the manager's lock
	end     chan struct{} // asks reread to end the machine; holds one request
	known   chan struct{} // closed when the record was read, or the agent stops
}

// look is find with a context that ends when the manager closes.
func (m *Manager) look(home uuid.UUID, end bool) found {
	ctx, cancel := context.WithTimeout(context.Background(), takeTimeout)
	defer cancel()
	var ending sync.WaitGroup
	defer ending.Wait()
	looked := make(chan struct{})
	defer close(looked)
	ending.Go(func() {
		select {
		case <-m.closing:
			cancel()
		case <-looked:
		}
	})
	return find(ctx, m.Dir, home, m.Driver, m.Log, end)
}

func (m *Manager) reportUnread(f found) {
	path := m.Dir.SandboxRecord(f.rec.Home)
	if f.damaged {
		which := "sandbox " + id.Format(id.Sandbox, f.rec.Spec.ID)
		if f.rec.Spec.ID == uuid.Nil {
			which = fmt.Sprintf("sandbox %s, or, if it started from a warm machine and so has another id, kill the processes of control group %s", id.Format(id.Sandbox, f.rec.Home), f.rec.Home)
		}
		m.Problems.Report(problem.Sandbox, path, fmt.Sprintf("the record of a sandbox is damaged, but its machine keeps running; repair the record or delete %s: %v", which, f.untaken))
		return
	}
	m.Problems.Report(problem.Sandbox, path, fmt.Sprintf("the agent cannot read the record of a sandbox, whose machine may run, and retries: %v", f.untaken))
}

// reread retries to read a record until it succeeds or the agent stops. If the record is
// damaged, it also stops when the machine ends or somebody deletes the sandbox.
func (m *Manager) reread(f found, u *unreadRecord) {
	home := f.rec.Home
	path := m.Dir.SandboxRecord(home)
	defer m.Problems.Clear(problem.Sandbox, path)
	defer close(u.known)
	waits := backoff.New(firstRetry, lastRetry)
	end := false
	for f.unread {
		t := time.NewTimer(waits.Next())
		select {
		case <-t.C:
		case <-u.end:
			end = true
		case <-m.closing:
			t.Stop()
			return
		}
		t.Stop()
		if f = m.look(home, end); f.unread {
			m.mu.Lock()
			u.damaged = f.damaged
			m.mu.Unlock()
			m.reportUnread(f)
		}
	}
	f.late = true
	m.adopt(context.Background(), f)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.unread, home)
}

// endDamaged ends the machine of a sandbox with a damaged record, and waits until reread has
// handled it. A folder without a label counts as that of the sandbox whose id is its name.
func (m *Manager) endDamaged(ctx context.Context, id uuid.UUID) (found bool, err error) {
	m.mu.Lock()
	u := m.unread[id]
	for _, other := range m.unread {
		if other.sandbox == id {
			u = other
		}
	}
	if u == nil || !u.damaged {
		m.mu.Unlock()
		return false, nil
	}
	m.mu.Unlock()
	select {
	case u.end <- struct{}{}:
	default: // a request is pending already
	}
	select {
	case <-u.known:
		return true, nil
	case <-ctx.Done():
		return true, ctx.Err()
	}
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
