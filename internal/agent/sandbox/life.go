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

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
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
	// consoleTail is the number of bytes of the guest's console in an error.
	consoleTail = 2 << 10
)

// box is a sandbox and the goroutine ([box.live]) that owns it. Only this goroutine changes
// the fields that mu guards, and it reads them without mu. All others read them with mu.
type box struct {
	m       *Manager
	log     *slog.Logger
	tracker *Tracker

	begin   start  // what it starts from
	doing   string // the operation of its steps
	base    *base  // the memory that its machine maps; nil: none or unknown
	maybeVM bool   // a machine may run although vm is nil
	// unreadable is the error of its record. The box keeps the files, and does not write rec
	// over the record.
	unreadable error

	booted chan struct{} // closed when its start has succeeded or failed
	taken  chan struct{} // closed when its adoption has succeeded or failed; nil: this agent made it
	over   chan struct{} // closed when it takes no more orders
	gone   chan struct{} // closed when nothing is left of it
	retry  chan struct{} // asks for a cleanup now
	orders chan *order

	mu        sync.Mutex // locked after the manager's, see [Manager]
	rec       record
	steps     []Step
	slot      Slot
	kept      bool // the pool keeps its slot, but the box has not reclaimed it
	vm        vmm.VM
	guest     *guest.Client
	transport *ports
	life      context.Context // of its uses; ends with a cause
	endLife   context.CancelCauseFunc
	silent    *condition.Condition // set while its guest is silent
	working   bool                 // an order runs, which may stop the guest
	bootErr   error                // set before booted is closed
	attempts  int                  // number of cleanups begun
	cleanErr  error
	tried     chan struct{} // closed and replaced after each failed cleanup

	// Requests to the goroutine, guarded by mu too.
	waiters int           // callers of Create
	stop    chan struct{} // closed: the sandbox must end
	why     ending        // set before stop is closed

	reservedMiB int // guarded by the manager's mu
}

// order is a function that the goroutine must run. It continues after its caller has given
// up.
type order struct {
	ctx  context.Context // the caller's request; nil: none
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

// set changes fields that mu guards.
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

// stopping reports whether somebody has asked for the sandbox's end.
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

// await waits for the sandbox's start, for a caller that waiters counts.
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

// destroy asks for the sandbox's end, and waits until it is gone or a cleanup fails.
func (b *box) destroy(ctx context.Context, event journal.Kind, why string) error {
	b.mu.Lock()
	b.end(event, why)
	before, tried := b.attempts, b.tried
	b.mu.Unlock()
	select {
	case b.retry <- struct{}{}:
	default: // a request is pending already
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
		if attempts > before { // the failed attempt began after this call
			return fmt.Errorf("remove sandbox: %w", err)
		}
	}
}

// order makes the goroutine call do, and waits for the result.
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

// obey runs an order.
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

// bounded returns a context that ends when somebody asks for the sandbox's end or the agent
// stops. The caller must call done.
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

// live creates the sandbox and runs it until its end. asked is the context of the request
// for its creation.
func (b *box) live(asked context.Context) {
	ctx, done := b.bounded()
	begin := time.Now()
	ctx, end := b.operation(carry(asked, ctx), "create")
	err := b.create(ctx)
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx) // it runs, but was cancelled
	}
	end(err)
	done()
	b.m.started(b, err)
	if err != nil {
		b.log.Error("sandbox did not start", "error", err, "took", time.Since(begin))
		why := ending{Reason: err.Error(), Time: time.Now().UTC()}
		b.refuse()
		// The caller gets the error after the first cleanup, successful or not.
		b.clean(why, func(cleanErr error) {
			b.set(func() { b.bootErr = startError(errors.Join(err, cleanErr)) })
			close(b.booted)
		})
		return
	}
	b.log.Info("sandbox runs", "took", time.Since(begin), "steps", stepsValue(b.steps))
	b.tracker.Touch() // its timeout begins now
	close(b.booted)
	b.serve()
}

// startError gives an error of a start its kind, unless it has one.
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
	if text, ok := clienterr.Text(err); ok {
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

// connect makes the clients of the guest. token is the guest's present access token.
func (b *box) connect(token string) {
	b.set(func() {
		b.guest = guest.New(b.slot.Address(), token)
		if b.life.Err() != nil {
			b.life, b.endLife = context.WithCancelCause(context.Background())
		}
		b.transport = newPorts(b.life, new(net.Dialer), portsGuest{
			host: b.slot.Address().String(), knock: b.guest.Knock, suspect: b.guest.Suspect,
			silent: func() bool { return b.silence() != nil }, late: lateAfter,
		})
		b.silent = nil
	})
	life, g := b.life, b.guest
	b.m.wg.Go(func() { b.probeGuest(life, g) })
}

// lastWords returns the end of the guest's console, for an error.
func (b *box) lastWords() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := b.vm.Console(ctx)
	if err != nil {
		return fmt.Sprintf("; cannot read its console: %v", err)
	}
	out = out[max(0, len(out)-consoleTail):]
	text := strings.TrimSpace(printable(string(out)))
	if text == "" {
		return "; its console is empty"
	}
	return "; its console ends with:\n" + text
}

// printable removes control characters and invalid UTF-8 from a guest's text.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || r != '\n' && unicode.IsControl(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(text, ""))
}

// serve runs a sandbox until it ends or the agent stops.
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
					b.log.Error("cannot pause an unused sandbox", "error", err, "again_in", b.rec.Spec.Timeout)
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

// nextExpiry shuts the tracker if the sandbox was not used for its timeout. Otherwise it
// returns what to wait for before the next check.
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

// refuse refuses new uses.
func (b *box) refuse() {
	b.tracker.Shut()
	b.set(func() { b.rec.State = Stopping })
}

// release disconnects from a sandbox, which keeps running without this agent.
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

// clean removes a sandbox, and retries until it succeeds or the agent stops. It calls done,
// unless that is nil, with the result of the first attempt.
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
		b.log.Error("cannot remove sandbox", "error", err, "again_in", pause)
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
			return // the next agent tries again
		}
		t.Stop()
	}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// tryClean tries to remove the sandbox. It continues where an earlier attempt failed.
func (b *box) tryClean(why ending) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	dir, home := b.m.Dir, b.rec.Home
	if b.unreadable != nil {
		return b.setAside(ctx, why)
	}
	if b.rec.Ending == nil {
		// Record it, so that the next agent knows why the machine ended if this one dies now.
		b.set(func() { b.rec.Ending = &why })
		if _, err := os.Stat(dir.SandboxRecord(home)); err == nil {
			if err := b.rec.save(dir); err != nil {
				b.log.Warn("cannot record a sandbox's end", "error", err) // a full disk must not keep it alive
			}
		}
	}
	b.m.Hook("clean: recorded")
	if err := b.vacate(ctx); err != nil {
		return err
	}
	b.m.Hook("clean: vacated")
	// Remove its files before the event is written, because the disk may be full.
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

// setAside is tryClean for a sandbox with an unreadable record, whose files it keeps.
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
	b.log.Error("set the files of a sandbox aside", "path", item.Path, "error", b.unreadable)
	return nil
}

// vacate ends the machine and releases its network slot and memory. It continues where an
// earlier attempt failed.
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

// killVM ends the machine, even one that this agent is not attached to.
func (b *box) killVM(ctx context.Context) error {
	switch {
	case b.vm != nil:
		if err := b.vm.Kill(ctx); err != nil {
			return fmt.Errorf("kill virtual machine: %w", err)
		}
	case b.maybeVM:
		if err := b.m.Driver.Reap(ctx, leftover(b.rec)); err != nil {
			return fmt.Errorf("reap virtual machine: %w", err)
		}
	}
	b.maybeVM = false
	b.set(func() { b.vm = nil })
	return nil
}

// tell appends an event to the journal, unless it is there already.
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

// because returns the cause of ctx's end, with err if that is another error.
func because(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if errors.Is(err, cause) {
		return err
	}
	return fmt.Errorf("%w (%w)", cause, err)
}
