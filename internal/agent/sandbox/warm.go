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
	// maxWarm is of how many captures machines wait: those used last.
	maxWarm = 16
	// maxRest bounds how long after a start nothing is made.
	maxRest = time.Second
)

// warm are machines that were restored and wait to become sandboxes. One
// goroutine makes them, when nothing else is being started and there is memory
// to spare. What is here is under the manager's mu.
type warm struct {
	m    *Manager
	wake chan struct{} // there may be something to do

	wanted      []wanted // used last first
	ready       []*box
	reservedMiB int
	lastStart   time.Time // when the start of a sandbox has ended last

	took time.Duration // to make the last one; keep's own
}

// wanted is a capture of which machines wait.
type wanted struct {
	template uuid.UUID
	capture  *image.Capture
}

func (w *warm) init(m *Manager) {
	w.m, w.wake = m, make(chan struct{}, 1)
}

// look has the goroutine look for something to do.
func (w *warm) look() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// want notes that a sandbox was made from a capture.
func (w *warm) want(s Spec, c *image.Capture) {
	if w.m.Warm == 0 || w.m.Driver.Nested(c.Kind) { // few sandboxes could take it
		return
	}
	w.wanted = slices.DeleteFunc(w.wanted, func(have wanted) bool { return have.capture.ID == c.ID })
	w.wanted = slices.Insert(w.wanted, 0, wanted{s.Template, c})
	w.wanted = w.wanted[:min(len(w.wanted), maxWarm)]
	w.look()
}

// take returns a machine that can become the sandbox s, or nil.
func (w *warm) take(s Spec) *box {
	if w.m.mayNest(s.Team) {
		return nil // none that waits is nested
	}
	for i := 0; i < len(w.ready); i++ {
		b := w.ready[i]
		have := &b.rec.Spec
		if have.Template != s.Template || have.VCPUs != s.VCPUs || have.MemoryMiB != s.MemoryMiB {
			continue
		}
		w.remove(i)
		i--
		select {
		case <-b.vm.Done():
			w.discard(b)
		default:
			delete(w.m.nameless, b)
			return b
		}
	}
	return nil
}

// remove takes the i-th machine out.
func (w *warm) remove(i int) {
	b := w.ready[i]
	w.ready = slices.Delete(w.ready, i, i+1)
	w.reservedMiB -= need(b)
	w.look()
}

func need(b *box) int { return b.rec.Spec.MemoryMiB + overheadMiB }

// discard ends a machine that was taken out. The caller holds the lock.
func (w *warm) discard(b *box) {
	w.m.nameless[b] = struct{}{}
	w.m.wg.Go(func() { b.clean(ending{Reason: "nobody needs it", Time: time.Now().UTC()}, nil) })
}

// shed ends machines, those of what was used longest ago first, until they
// take no more than what is free.
func (w *warm) shed(freeMiB int) {
	for len(w.ready) > 0 && w.reservedMiB > freeMiB {
		last := len(w.ready) - 1
		b := w.ready[last]
		w.remove(last)
		w.discard(b)
	}
}

// forget ends the machines of a template that was deleted.
func (w *warm) forget(template uuid.UUID) {
	w.m.mu.Lock()
	defer w.m.mu.Unlock()
	w.wanted = slices.DeleteFunc(w.wanted, func(have wanted) bool { return have.template == template })
	for i := len(w.ready) - 1; i >= 0; i-- {
		if b := w.ready[i]; b.rec.Spec.Template == template {
			w.remove(i)
			w.discard(b)
		}
	}
}

// keep makes machines until the agent ends.
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
			continue // the agent ends
		}
		for next := w.next(); next != nil; next = w.next() {
			begin := time.Now()
			w.make(*next)
			w.took = time.Since(begin)
		}
	}
}

// rest leaves a sandbox that has just been started the processors for what it
// was started for, once, for as long as it takes to make a machine.
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

// captureDefault captures what most sandboxes will begin with. A capture ends
// when the agent does.
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
		w.m.Log.Error("the built-in template is not captured", "error", err)
	}
}

// next says of what a machine is to be made, if any.
func (w *warm) next() *wanted {
	m := w.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refuse != nil || m.starting > 0 {
		return nil // the end of a start wakes
	}
	for i := range w.wanted {
		c := w.wanted[i].capture
		n := 0
		for _, b := range w.ready {
			if b.rec.Spec.Template == w.wanted[i].template && b.rec.Spec.VCPUs == c.VCPUs && b.rec.Spec.MemoryMiB == c.MemoryMiB {
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

// make makes a machine that waits.
func (w *warm) make(of wanted) {
	m, home := w.m, uuid.New()
	b := newBox(m, record{
		Version: format.Sandbox.Version, Home: home, State: waiting, CreatedAt: time.Now().UTC(),
		Spec: Spec{ID: home, Template: of.template, VCPUs: of.capture.VCPUs, MemoryMiB: of.capture.MemoryMiB, DiskMiB: of.capture.DiskMiB},
	})
	b.log = m.Log.With("machine", home)
	if m.register(b) != nil {
		return
	}
	ctx, done := b.bounded()
	begin := time.Now()
	ctx, end := b.operation(ctx, "warm")
	err := b.wait(ctx, of.capture)
	end(err)
	done()
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil || m.refuse != nil {
		if ctx.Err() == nil {
			m.Log.Warn("no machine waits for a template's next sandbox", "template", of.template, "error", err)
		}
		// Until the next sandbox is made from it.
		w.wanted = slices.DeleteFunc(w.wanted, func(have wanted) bool { return have.capture.ID == of.capture.ID })
		w.discard(b)
		return
	}
	b.log.Info("a machine waits", "template", of.template, "took", time.Since(begin), "steps", stepsValue(b.steps))
	w.ready = append(w.ready, b)
	w.reservedMiB += need(b)
}

// wait makes a machine that is held.
func (b *box) wait(ctx context.Context, c *image.Capture) error {
	ctx, cancel := context.WithTimeout(ctx, b.m.BootTimeout)
	defer cancel()
	leave, err := b.queue(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if err := b.prepare(ctx, c); err != nil {
		return err
	}
	b.rec.Spec.Token = c.Token
	if c.Inputs == "" || c.Runs { // what runs in it is to know at once that it is another's
		return nil
	}
	return b.step(ctx, "warm up", func(ctx context.Context) error {
		if err := b.vm.Run(ctx); err != nil {
			return err
		}
		b.rec.Spec.Token = rand.Text()
		if err := b.warmUp(ctx, c, c.Token, b.rec.Spec.Token, warmUpCommand); err != nil {
			return err
		}
		return b.vm.Hold(ctx)
	})
}
