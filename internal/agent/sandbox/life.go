package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/told"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/id"
)

const (
	// cleanTimeout bounds one attempt to remove a sandbox.
	cleanTimeout = time.Minute
	// The pauses between attempts.
	firstRetry = time.Second
	lastRetry  = time.Minute
	// consoleTail is how much of the guest's console an error shows, in bytes.
	consoleTail = 2 << 10
)

// box is a sandbox and the goroutine ([box.live]) that owns its life. The
// goroutine alone changes what mu guards, and reads it without; all others
// read it with mu held.
type box struct {
	m       *Manager
	log     *slog.Logger
	tracker *Tracker

	begin   start  // what it begins with
	doing   string // the operation of its steps
	base    *base  // the memory that its machine maps; nil: not known, or none
	maybeVM bool   // there may be a machine that vm does not show
	// unreadable is why its record cannot be read: its files are kept, and rec is
	// not written over the record.
	unreadable error

	booted chan struct{} // closed when its start has ended, well or not
	taken  chan struct{} // closed when it was taken back, well or not; nil: it was made by this agent
	over   chan struct{} // closed when it takes no orders any more
	gone   chan struct{} // closed when nothing is left of it
	retry  chan struct{} // somebody wants it cleaned now
	orders chan *order

	mu        sync.Mutex // locked after the manager's, see [Manager]
	rec       record
	steps     []Step
	slot      Slot
	kept      bool // its slot is kept for it on the host, but was not taken back
	vm        vmm.VM
	guest     *guest.Client
	transport *ports
	life      context.Context // of its uses; ends with a cause
	endLife   context.CancelCauseFunc
	silent    *condition.Condition // that its guest does not answer; nil: it does
	working   bool                 // an order is being obeyed, for which the guest may stand still
	bootErr   error                // set before booted is closed
	attempts  int                  // to clean that have begun
	cleanErr  error
	tried     chan struct{} // closed and replaced after each attempt to clean that failed

	// What others ask of the goroutine, under mu too.
	waiters int           // callers of Create
	stop    chan struct{} // closed: end
	why     ending        // set before stop is closed

	reservedMiB int // under the manager's mu
}

// order is something that the goroutine is to do. It goes on when whoever gave
// it leaves.
type order struct {
	ctx  context.Context // whose request it is; nil: nobody's
	do   func(context.Context) error
	err  error
	done chan struct{} // closed once err is set
}

func newBox(m *Manager, r record) *box {
	b := &box{
		m: m, rec: r, tracker: NewTracker(),
		log:    m.Log.With("sandbox", id.Format(id.Sandbox, r.Spec.ID)),
		booted: make(chan struct{}), over: make(chan struct{}), gone: make(chan struct{}), retry: make(chan struct{}, 1),
		orders: make(chan *order), tried: make(chan struct{}), stop: make(chan struct{}),
	}
	b.life, b.endLife = context.WithCancelCause(context.Background())
	return b
}

// set changes what others read.
func (b *box) set(f func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f()
}

func (b *box) info() Info {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.infoLocked()
}

func (b *box) infoLocked() Info {
	s := &b.rec.Spec
	i := Info{
		ID: s.ID, Team: s.Team, Template: s.Template, State: b.rec.State,
		VCPUs: s.VCPUs, MemoryMiB: s.MemoryMiB, DiskMiB: s.DiskMiB, CreatedAt: b.rec.CreatedAt, PauseOnTimeout: s.PauseOnTimeout,
		InFlight: b.tracker.InFlight(), Idle: b.tracker.Idle(), Steps: append([]Step(nil), b.steps...),
	}
	if b.stopping() {
		i.State = Stopping
	}
	if i.State == Paused && b.rec.PausedAt != nil {
		i.PausedAt = *b.rec.PausedAt
	}
	switch i.State {
	case Running:
		i.Condition = b.silent
	case Paused:
		i.Condition = b.rec.Lost
	case Starting, Pausing, Resuming, Stopping, waiting:
	}
	if s.Timeout > 0 && i.State != Paused && i.State != Resuming {
		i.ExpiresAt = b.tracker.LastUse().Add(s.Timeout)
	}
	return i
}

// stopping tells whether its end was asked for.
func (b *box) stopping() bool {
	select {
	case <-b.stop:
		return true
	default:
		return false
	}
}

// end asks for the sandbox's end. The caller holds mu.
func (b *box) end(event journal.Kind, why string) {
	if !b.stopping() {
		b.why = ending{Event: event, Reason: why, Time: time.Now().UTC()}
		close(b.stop)
	}
}

// await waits for the sandbox's start on behalf of a caller that is counted.
func (b *box) await(ctx context.Context) (Info, error) {
	select {
	case <-b.booted:
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiters--
	select {
	case <-b.booted:
		if b.bootErr != nil {
			return Info{}, b.bootErr
		}
		return b.infoLocked(), nil
	default:
	}
	if b.waiters == 0 {
		b.end("", "nobody waits for it any more")
	}
	return Info{}, ctx.Err()
}

// destroy asks for the sandbox's end and waits for it, or for an attempt that fails.
func (b *box) destroy(ctx context.Context, event journal.Kind, why string) error {
	b.mu.Lock()
	b.end(event, why)
	before, tried := b.attempts, b.tried
	b.mu.Unlock()
	select {
	case b.retry <- struct{}{}:
	default: // somebody has asked
	}
	for {
		select {
		case <-b.gone:
			return nil
		case <-tried:
		case <-ctx.Done():
			return ctx.Err()
		}
		b.mu.Lock()
		attempts, err := b.attempts, b.cleanErr
		tried = b.tried
		b.mu.Unlock()
		if attempts > before { // one that began after this was called
			return fmt.Errorf("remove sandbox: %w", err)
		}
	}
}

// order has the goroutine do something and waits for that.
func (b *box) order(ctx context.Context, do func(context.Context) error) error {
	o := &order{ctx: carry(ctx, context.Background()), do: do, done: make(chan struct{})}
	select {
	case b.orders <- o:
	case <-b.over:
		if b.m.isClosed() {
			return ErrClosing
		}
		return &StateError{Stopping}
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-o.done:
		return o.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// obey does what an order says.
func (b *box) obey(o *order) {
	ctx, done := b.bounded()
	if o.ctx != nil {
		ctx = carry(o.ctx, ctx)
	}
	b.set(func() { b.working = true })
	o.err = o.do(ctx)
	b.set(func() { b.working = false })
	done()
	close(o.done)
}

// bounded returns a context that ends when somebody asks for the sandbox's end,
// or when the agent ends. The caller calls done.
func (b *box) bounded() (ctx context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	unhook := make(chan struct{})
	hooked := make(chan struct{})
	go func() {
		defer close(hooked)
		select {
		case <-b.stop:
			b.mu.Lock()
			why := b.why.Reason
			b.mu.Unlock()
			cancel(fail(ErrState, "the sandbox was given up: %s", why))
		case <-b.m.closing:
			cancel(ErrClosing)
		case <-unhook:
		}
	}()
	return ctx, func() {
		close(unhook)
		<-hooked
		cancel(nil)
	}
}

// live is the sandbox's life from its creation on, which asked is the request for.
func (b *box) live(asked context.Context) {
	// Whoever asks for the end ends the start; so does the agent's own end.
	ctx, done := b.bounded()
	begin := time.Now()
	ctx, end := b.operation(carry(asked, ctx), "create")
	err := b.create(ctx)
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx) // it runs, but too late
	}
	end(err)
	done()
	b.m.started(b, err)
	if err != nil {
		b.log.Error("sandbox did not start", "error", err, "took", time.Since(begin))
		why := ending{Reason: err.Error(), Time: time.Now().UTC()}
		b.refuse()
		// The caller hears of it when nothing is left, or as soon as something
		// refuses to go.
		b.clean(why, func(cleanErr error) {
			b.set(func() { b.bootErr = startError(errors.Join(err, cleanErr)) })
			close(b.booted)
		})
		return
	}
	b.log.Info("sandbox runs", "took", time.Since(begin), "steps", stepsValue(b.steps))
	b.tracker.Touch() // its time begins now
	close(b.booted)
	b.serve()
}

// startError makes sure that an error says of what kind it is.
func startError(err error) error {
	for _, kind := range []error{ErrInvalid, ErrState, ErrExhausted, ErrClosing} {
		if errors.Is(err, kind) {
			return err
		}
	}
	kind := ErrStart
	switch {
	case errors.Is(err, errBoot):
		kind = ErrGuest
	case errors.Is(err, ErrSlow):
		kind = ErrSlow
	}
	if text, ok := told.Text(err); ok {
		return failBecause(err, kind, "the sandbox did not start: %s", text)
	}
	return failBecause(err, kind, "the sandbox did not start")
}

type stepsValue []Step

func (s stepsValue) LogValue() slog.Value {
	attrs := make([]slog.Attr, len(s))
	for i, step := range s {
		attrs[i] = slog.Duration(step.Name, step.Took)
	}
	return slog.GroupValue(attrs...)
}

// connect makes what talks to the guest, which wants to be shown token.
func (b *box) connect(token string) {
	b.set(func() {
		b.guest = guest.New(b.slot.Address(), token)
		if b.life.Err() != nil {
			b.life, b.endLife = context.WithCancelCause(context.Background())
		}
		b.transport = newPorts(b.life, &net.Dialer{Timeout: connectTimeout}, b.slot.Address().String(), b.guest.Knock, b.guest.Suspect)
		b.silent = nil
	})
	life, g := b.life, b.guest
	b.m.wg.Go(func() { b.watchGuest(life, g) })
}

// lastWords is the end of the guest's console, for an error.
func (b *box) lastWords() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := b.vm.Console(ctx)
	if err != nil {
		return fmt.Sprintf("; its console cannot be read: %v", err)
	}
	out = out[max(0, len(out)-consoleTail):]
	text := strings.TrimSpace(printable(string(out)))
	if text == "" {
		return "; its console is empty"
	}
	return "; its console ends with:\n" + text
}

// printable returns what of a guest's text is UTF-8 and no control character.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || r != '\n' && unicode.IsControl(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(text, ""))
}

// serve watches over a sandbox until it ends or the agent lets go of it.
func (b *box) serve() {
	for {
		if b.rec.State == Paused {
			if b.servePaused() {
				return
			}
			continue
		}
		timer, busy, expired := b.nextExpiry()
		if expired {
			why := ending{journal.Expired, fmt.Sprintf("it was not used for %v", b.rec.Spec.Timeout), time.Now().UTC()}
			if !b.rec.Spec.PauseOnTimeout {
				b.clean(why, nil)
				return
			}
			why.Event = journal.Paused
			b.obey(&order{done: make(chan struct{}), do: func(ctx context.Context) error {
				err := b.pause(ctx, &why)
				if err != nil {
					b.log.Error("an unused sandbox cannot be paused", "error", err, "again_in", b.rec.Spec.Timeout)
					b.tracker.Touch()
				}
				return err
			}})
			continue
		}
		var tick <-chan time.Time
		if timer != nil {
			tick = timer.C
		}
		select {
		case <-tick:
		case <-busy:
		case o := <-b.orders:
			b.obey(o)
		case <-b.stop:
			b.clean(b.why, nil)
			return
		case <-b.vm.Done():
			if b.stopping() {
				b.clean(b.why, nil)
				return
			}
			if b.machineEnded() {
				return
			}
		case <-b.m.closing:
			b.release()
			return
		}
		if timer != nil {
			timer.Stop()
		}
	}
}

// nextExpiry shuts the sandbox if it has not been used for its timeout. Else it
// returns what to wait for before looking again.
func (b *box) nextExpiry() (timer *time.Timer, busy <-chan struct{}, expired bool) {
	if b.rec.Spec.Timeout == 0 {
		return nil, nil, false
	}
	expired, left, busy := b.tracker.expire(b.rec.Spec.Timeout)
	if expired || busy != nil {
		return nil, busy, expired
	}
	return time.NewTimer(left), nil, false
}

// refuse takes no uses any more.
func (b *box) refuse() {
	b.tracker.Shut()
	b.set(func() { b.rec.State = Stopping })
}

// release lets go of a sandbox that goes on without this agent.
func (b *box) release() {
	b.tracker.Shut()
	close(b.over)
	b.endLife(ended("the host agent is stopping"))
	b.disconnect()
}

func (b *box) disconnect() {
	if b.guest != nil {
		b.guest.Close()
		b.transport.close()
	}
}

// clean removes all there is of a sandbox, trying again until that is done or
// the agent ends. done, if not nil, is told how the first attempt went.
func (b *box) clean(why ending, done func(error)) {
	begin := time.Now()
	b.refuse()
	close(b.over)
	b.endLife(ended(why.Reason))
	b.disconnect()
	b.log.Info("sandbox ends", "reason", firstLine(why.Reason), "event", string(why.Event))
	retries := backoff.New(firstRetry, lastRetry)
	for {
		b.set(func() { b.attempts++ })
		err := b.tryClean(why)
		b.m.left(b)
		b.m.Observe("remove", "", time.Since(begin), err)
		if err == nil {
			b.m.remove(b)
			b.log.Info("sandbox is gone", "took", time.Since(begin))
		}
		if done != nil {
			done(err)
			done = nil
		}
		if err == nil {
			close(b.gone)
			return
		}
		pause := retries.Next()
		b.log.Error("sandbox cannot be removed", "error", err, "again_in", pause)
		b.set(func() {
			b.cleanErr = err
			close(b.tried)
			b.tried = make(chan struct{})
		})
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-b.retry:
		case <-b.m.closing:
			t.Stop()
			return // the next agent goes on
		}
		t.Stop()
	}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// tryClean is one attempt. It goes on where the last one failed.
func (b *box) tryClean(why ending) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	dir, home := b.m.Dir, b.rec.Home
	if b.unreadable != nil {
		return b.setAside(ctx, why)
	}
	if b.rec.Ending == nil {
		// So that the next agent, if this one dies now, does not take the end of
		// the machine for its own doing.
		b.set(func() { b.rec.Ending = &why })
		if _, err := os.Stat(dir.SandboxRecord(home)); err == nil {
			if err := b.rec.save(dir); err != nil {
				b.log.Warn("a sandbox's end is not recorded", "error", err) // a full disk must not keep it alive
			}
		}
	}
	b.m.Hook("clean: recorded")
	if err := b.vacate(ctx); err != nil {
		return err
	}
	b.m.Hook("clean: vacated")
	// First what takes space, so that there is some for the event.
	if err := b.rec.empty(dir); err != nil {
		return err
	}
	if why.Event != "" {
		if err := b.tell(why); err != nil {
			return err
		}
	}
	b.m.Hook("clean: told")
	if err := os.RemoveAll(dir.Sandbox(home)); err != nil {
		return fmt.Errorf("remove folder: %w", err)
	}
	return nil
}

// setAside is tryClean of a sandbox whose files are kept.
func (b *box) setAside(ctx context.Context, why ending) error {
	if err := b.vacate(ctx); err != nil {
		return err
	}
	if err := b.tell(why); err != nil {
		return err
	}
	item, err := unreadable.Move(b.m.Dir, unreadable.Sandbox, b.m.Dir.Sandbox(b.rec.Home), b.unreadable)
	if err != nil {
		return err
	}
	b.log.Error("the files of a sandbox were set aside", "path", item.Path, "error", b.unreadable)
	return nil
}

// vacate ends the machine and gives back what it held of the host. It goes on
// where an attempt that failed has ended.
func (b *box) vacate(ctx context.Context) error {
	if err := b.killVM(ctx); err != nil {
		return err
	}
	if b.slot != nil {
		if err := b.m.Networks.Release(ctx, b.slot); err != nil {
			return fmt.Errorf("release network slot: %w", err)
		}
		b.set(func() { b.slot = nil })
	}
	b.dropKept()
	if b.base != nil {
		b.m.bases.release(b.base)
		b.base = nil
	}
	return nil
}

// killVM ends the machine, also one that only an earlier agent knew.
func (b *box) killVM(ctx context.Context) error {
	switch {
	case b.vm != nil:
		if err := b.vm.Kill(ctx); err != nil {
			return fmt.Errorf("end the virtual machine: %w", err)
		}
	case b.maybeVM:
		if err := b.m.Driver.Reap(ctx, leftover(b.rec)); err != nil {
			return fmt.Errorf("end the virtual machine: %w", err)
		}
	}
	b.maybeVM = false
	b.set(func() { b.vm = nil })
	return nil
}

// tell puts what the agent did on its own into the journal, once.
func (b *box) tell(why ending) error {
	for _, e := range b.m.Journal.Pending() {
		if e.Sandbox == b.rec.Spec.ID && e.Kind == why.Event && e.Time.Equal(why.Time) {
			return nil
		}
	}
	if len(why.Reason) > 4<<10 {
		why.Reason = why.Reason[:4<<10]
	}
	_, err := b.m.Journal.Append(journal.Event{Kind: why.Event, Sandbox: b.rec.Spec.ID, Time: why.Time, Reason: strings.ToValidUTF8(why.Reason, "")})
	return err
}

// because is the reason for which ctx ended, with what came of it.
func because(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if errors.Is(err, cause) {
		return err
	}
	return fmt.Errorf("%w (%w)", cause, err)
}
