package sandbox

import (
	"context"
	"crypto/rand"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
)

const (
	// maxWarm is the maximum number of captures with warm machines: the last used ones.
	maxWarm = 16
	// maxRest bounds the time after a start in which keep makes no warm machine.
	maxRest = time.Second
)

// warm are restored machines that wait to become sandboxes. One goroutine makes them while no
// sandbox is being started and there is spare memory. The manager's mu guards the fields.
type warm struct {
	m    *Manager
	wake chan struct{} // wakes keep

	wanted      []wanted // last used first
	ready       []*instance
	reservedMiB int
	lastStart   time.Time // end of the last start of a sandbox

	took time.Duration // duration of the last make; only keep uses it
}

// wanted is a capture that needs warm machines.
type wanted struct {
	template uuid.UUID
	capture  *image.Capture
}

func (w *warm) init(m *Manager) {
	w.m, w.wake = m, make(chan struct{}, 1)
}

// look wakes keep.
func (w *warm) look() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// want notes that a sandbox was made from a capture, which then gets warm machines.
func (w *warm) want(s Spec, c *image.Capture) {
	if w.m.Warm == 0 || w.m.Driver.Nested(c.Kind) { // few sandboxes could use a nested one
		return
	}
	w.wanted = slices.DeleteFunc(w.wanted, func(have wanted) bool { return have.capture.ID == c.ID })
	w.wanted = slices.Insert(w.wanted, 0, wanted{s.Template, c})
	w.wanted = w.wanted[:min(len(w.wanted), maxWarm)]
	w.look()
}

// take returns a warm machine for the sandbox s, or nil.
func (w *warm) take(s Spec) *instance {
	if w.m.mayNest(s.Team) {
		return nil // no warm machine is nested
	}
	for i := 0; i < len(w.ready); i++ {
		inst := w.ready[i]
		have := &inst.rec.Spec
		if have.Template != s.Template || have.VCPUs != s.VCPUs || have.MemoryMiB != s.MemoryMiB {
			continue
		}
		w.remove(i)
		i--
		select {
		case <-inst.vm.Done():
			w.discard(inst)
		default:
			delete(w.m.nameless, inst)
			return inst
		}
	}
	return nil
}

// remove removes machine i from ready.
func (w *warm) remove(i int) {
	inst := w.ready[i]
	w.ready = slices.Delete(w.ready, i, i+1)
	w.reservedMiB -= need(inst)
	w.look()
}

func need(inst *instance) int { return inst.rec.Spec.MemoryMiB + overheadMiB }

// discard ends a machine that was removed from ready. The caller holds the manager's mu.
func (w *warm) discard(inst *instance) {
	w.m.nameless[inst] = struct{}{}
	w.m.wg.Go(func() { inst.clean(ending{Reason: "nobody needs it", Time: time.Now().UTC()}, nil) })
}

// shed ends warm machines, newest first, until they reserve at most freeMiB.
func (w *warm) shed(freeMiB int) {
	for len(w.ready) > 0 && w.reservedMiB > freeMiB {
		last := len(w.ready) - 1
		inst := w.ready[last]
		w.remove(last)
		w.discard(inst)
	}
}

// forget ends the warm machines of a deleted template.
func (w *warm) forget(template uuid.UUID) {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	w.wanted = slices.DeleteFunc(w.wanted, func(have wanted) bool { return have.template == template })
	for i := len(w.ready) - 1; i >= 0; i-- {
		if inst := w.ready[i]; inst.rec.Spec.Template == template {
			w.remove(i)
			w.discard(inst)
		}
	}
}

// keep makes warm machines until the manager closes.
func (w *warm) keep() {
	if w.m.DefaultVCPUs > 0 {
		w.m.wg.Go(w.captureDefault)
	}
	for {
		select {
		case <-w.wake:
		case <-w.m.closing:
			w.m.mu.Lock()
			defer w.m.mu.Unlock()
			w.shed(0)
			return
		}
		if !w.rest() {
			continue // the manager closes
		}
		for next := w.next(); next != nil; next = w.next() {
			begin := time.Now()
			w.make(*next)
			w.took = time.Since(begin)
		}
	}
}

// rest waits after the start of a sandbox for as long as making a machine takes, to leave the
// processors to that sandbox. It returns false if the manager closes.
func (w *warm) rest() bool {
	w.m.mu.Lock()
	left := min(w.took, maxRest) - time.Since(w.lastStart)
	w.m.mu.Unlock()
	if left <= 0 {
		return true
	}
	t := time.NewTimer(left)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-w.m.closing:
		return false
	}
}

// captureDefault captures the built-in template for the default size.
func (w *warm) captureDefault() {
	t, err := w.m.Template(uuid.Nil, uuid.Nil)
	if err == nil {
		var c *image.Capture
		if c, err = w.m.capture(context.Background(), t, w.m.DefaultVCPUs, w.m.DefaultMemoryMiB, false); err == nil {
			w.m.mu.Lock()
			w.want(Spec{}, c)
			w.m.mu.Unlock()
		}
	}
	if err != nil && !w.m.isClosed() {
		w.m.Log.Error("cannot capture the built-in template", "error", err)
	}
}

// next returns the capture for the next warm machine, or nil.
func (w *warm) next() *wanted {
	m := w.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refuse != nil || m.starting > 0 {
		return nil // started wakes keep
	}
	for i := range w.wanted {
		c := w.wanted[i].capture
		n := 0
		for _, inst := range w.ready {
			if inst.rec.Spec.Template == w.wanted[i].template && inst.rec.Spec.VCPUs == c.VCPUs && inst.rec.Spec.MemoryMiB == c.MemoryMiB {
				n++
			}
		}
		need := c.MemoryMiB + overheadMiB
		if n < m.Warm && w.reservedMiB+need <= m.WarmMemoryMiB && m.reservedMiB+m.bases.mib()+w.reservedMiB+need <= m.MemoryMiB {
			next := w.wanted[i]
			return &next
		}
	}
	return nil
}

// make makes a warm machine.
func (w *warm) make(of wanted) {
	m, home := w.m, uuid.New()
	inst := newInstance(m, record{
		Version: format.Sandbox.Version, Home: home, State: waiting, CreatedAt: time.Now().UTC(),
		Spec: Spec{ID: home, Template: of.template, VCPUs: of.capture.VCPUs, MemoryMiB: of.capture.MemoryMiB, DiskMiB: of.capture.DiskMiB},
	})
	inst.log = m.Log.With("machine", home)
	if m.register(inst) != nil {
		return
	}
	ctx, done := inst.bounded()
	begin := time.Now()
	ctx, end := inst.operation(ctx, "warm")
	err := inst.wait(ctx, of.capture)
	end(err)
	done()
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil || m.refuse != nil {
		if ctx.Err() == nil {
			m.Log.Warn("cannot make a warm machine", "template", of.template, "error", err)
		}
		// No retry until the next sandbox is made from this capture.
		w.wanted = slices.DeleteFunc(w.wanted, func(have wanted) bool { return have.capture.ID == of.capture.ID })
		w.discard(inst)
		return
	}
	inst.log.Info("made a warm machine", "template", of.template, "took", time.Since(begin), "steps", stepsValue(inst.steps))
	w.ready = append(w.ready, inst)
	w.reservedMiB += need(inst)
}

// wait prepares and warms up a machine, and leaves it held.
func (inst *instance) wait(ctx context.Context, c *image.Capture) error {
	ctx, cancel := context.WithTimeout(ctx, inst.m.BootTimeout)
	defer cancel()
	leave, err := inst.queue(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if err := inst.prepare(ctx, c); err != nil {
		return err
	}
	inst.rec.Spec.Token = c.Token
	if c.Inputs == "" || c.Runs { // programs of the capture must not run before they belong to a sandbox
		return nil
	}
	return inst.step(ctx, "warm up", func(ctx context.Context) error {
		if err := inst.vm.Run(ctx); err != nil {
			return err
		}
		inst.rec.Spec.Token = rand.Text()
		if err := inst.warmUp(ctx, c, c.Token, inst.rec.Spec.Token, warmUpCommand); err != nil {
			return err
		}
		return inst.vm.Hold(ctx)
	})
}
