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

// instance is a sandbox, a warm machine, or the VM that a capture is made of, with everything
// that belongs to it. Its owner changes the fields that mu guards, and reads them without mu;
// all others read them with mu. A sandbox's owner is a goroutine ([instance.live]).
type instance struct {
	m       *Manager
	log     *slog.Logger
	tracker *Tracker

	begin   start  // what it starts from
	doing   string // the operation of its steps
	base    *base  // the memory that its machine maps; nil: none or unknown
	maybeVM bool   // a machine may run although vm is nil
	// unreadable is the error of its record. The instance keeps the files, and does not write
	// rec over the record.
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
	kept      bool // the pool keeps its slot, but the instance has not reclaimed it
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

func newInstance(m *Manager, r record) *instance {
	inst := &instance{
		m: m, rec: r, tracker: NewTracker(),
		log:    m.Log.With("sandbox", id.Format(id.Sandbox, r.Spec.ID)),
		booted: make(chan struct{}), over: make(chan struct{}), gone: make(chan struct{}), retry: make(chan struct{}, 1),
		orders: make(chan *order), tried: make(chan struct{}), stop: make(chan struct{}),
	}
	inst.life, inst.endLife = context.WithCancelCause(context.Background())
	return inst
}

// set changes fields that mu guards.
func (inst *instance) set(f func()) {
	inst.mu.Lock()
	defer inst.mu.Unlock()
	f()
}

func (inst *instance) info() Info {
	inst.mu.Lock()
	defer inst.mu.Unlock()
	return inst.infoLocked()
}

func (inst *instance) infoLocked() Info {
	s := &inst.rec.Spec
	i := Info{
		ID: s.ID, Team: s.Team, Template: s.Template, State: inst.rec.State,
		VCPUs: s.VCPUs, MemoryMiB: s.MemoryMiB, DiskMiB: s.DiskMiB, CreatedAt: inst.rec.CreatedAt, PauseOnTimeout: s.PauseOnTimeout,
		InFlight: inst.tracker.InFlight(), Idle: inst.tracker.Idle(), Steps: append([]Step(nil), inst.steps...),
	}
	if inst.stopping() {
		i.State = Stopping
	}
	if i.State == Paused && inst.rec.PausedAt != nil {
		i.PausedAt = *inst.rec.PausedAt
	}
	switch i.State {
	case Running:
		i.Condition = inst.silent
	case Paused:
		i.Condition = inst.rec.Lost
	case Starting, Pausing, Resuming, Stopping, waiting:
	}
	if s.Timeout > 0 && i.State != Paused && i.State != Resuming {
		i.ExpiresAt = inst.tracker.LastUse().Add(s.Timeout)
	}
	return i
}

// stopping reports whether somebody has asked for the sandbox's end.
func (inst *instance) stopping() bool {
	select {
	case <-inst.stop:
		return true
	default:
		return false
	}
}

// end asks for the sandbox's end. The caller holds mu.
func (inst *instance) end(event journal.Kind, why string) {
	if !inst.stopping() {
		inst.why = ending{Event: event, Reason: why, Time: time.Now().UTC()}
		close(inst.stop)
	}
}

// await waits for the sandbox's start, for a caller that waiters counts.
func (inst *instance) await(ctx context.Context) (Info, error) {
	select {
	case <-inst.booted:
	case <-ctx.Done():
	}
	inst.mu.Lock()
	defer inst.mu.Unlock()
	inst.waiters--
	select {
	case <-inst.booted:
		if inst.bootErr != nil {
			return Info{}, inst.bootErr
		}
		return inst.infoLocked(), nil
	default:
	}
	if inst.waiters == 0 {
		inst.end("", "nobody waits for it any more")
	}
	return Info{}, ctx.Err()
}

// destroy asks for the sandbox's end, and waits until it is gone or a cleanup fails.
func (inst *instance) destroy(ctx context.Context, event journal.Kind, why string) error {
	inst.mu.Lock()
	inst.end(event, why)
	before, tried := inst.attempts, inst.tried
	inst.mu.Unlock()
	select {
	case inst.retry <- struct{}{}:
	default: // a request is pending already
	}
	for {
		select {
		case <-inst.gone:
			return nil
		case <-tried:
		case <-ctx.Done():
			return ctx.Err()
		}
		inst.mu.Lock()
		attempts, err := inst.attempts, inst.cleanErr
		tried = inst.tried
		inst.mu.Unlock()
		if attempts > before { // the failed attempt began after this call
			return fmt.Errorf("remove sandbox: %w", err)
		}
	}
}

// order makes the goroutine call do, and waits for the result.
func (inst *instance) order(ctx context.Context, do func(context.Context) error) error {
	o := &order{ctx: carry(ctx, context.Background()), do: do, done: make(chan struct{})}
	select {
	case inst.orders <- o:
	case <-inst.over:
		if inst.m.isClosed() {
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
func (inst *instance) obey(o *order) {
	ctx, done := inst.bounded()
	if o.ctx != nil {
		ctx = carry(o.ctx, ctx)
	}
	inst.set(func() { inst.working = true })
	o.err = o.do(ctx)
	inst.set(func() { inst.working = false })
	done()
	close(o.done)
}

// bounded returns a context that ends when somebody asks for the sandbox's end or the agent
// stops. The caller must call done.
func (inst *instance) bounded() (ctx context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	unhook := make(chan struct{})
	hooked := make(chan struct{})
	go func() {
		defer close(hooked)
		select {
		case <-inst.stop:
			inst.mu.Lock()
			why := inst.why.Reason
			inst.mu.Unlock()
			cancel(fail(ErrState, "the sandbox was given up: %s", why))
		case <-inst.m.closing:
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
func (inst *instance) live(asked context.Context) {
	ctx, done := inst.bounded()
	begin := time.Now()
	ctx, end := inst.operation(carry(asked, ctx), "create")
	err := inst.create(ctx)
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx) // it runs, but was cancelled
	}
	end(err)
	done()
	inst.m.started(inst, err)
	if err != nil {
		inst.log.Error("sandbox did not start", "error", err, "took", time.Since(begin))
		why := ending{Reason: err.Error(), Time: time.Now().UTC()}
		inst.refuse()
		// The caller gets the error after the first cleanup, successful or not.
		inst.clean(why, func(cleanErr error) {
			inst.set(func() { inst.bootErr = startError(errors.Join(err, cleanErr)) })
			close(inst.booted)
		})
		return
	}
	inst.log.Info("sandbox runs", "took", time.Since(begin), "steps", stepsValue(inst.steps))
	inst.tracker.Touch() // its timeout begins now
	close(inst.booted)
	inst.serve()
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
func (inst *instance) connect(token string) {
	inst.set(func() {
		inst.guest = guest.New(inst.slot.Address(), token)
		if inst.life.Err() != nil {
			inst.life, inst.endLife = context.WithCancelCause(context.Background())
		}
		inst.transport = newPorts(inst.life, new(net.Dialer), portsGuest{
			host: inst.slot.Address().String(), knock: inst.guest.Knock, suspect: inst.guest.Suspect,
			silent: func() bool { return inst.silence() != nil }, late: lateAfter,
		})
		inst.silent = nil
	})
	life, g := inst.life, inst.guest
	inst.m.wg.Go(func() { inst.probeGuest(life, g) })
}

// lastWords returns the end of the guest's console, for an error.
func (inst *instance) lastWords() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := inst.vm.Console(ctx)
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
func (inst *instance) serve() {
	for {
		if inst.rec.State == Paused {
			if inst.servePaused() {
				return
			}
			continue
		}
		timer, busy, expired := inst.nextExpiry()
		if expired {
			why := ending{journal.Expired, fmt.Sprintf("it was not used for %v", inst.rec.Spec.Timeout), time.Now().UTC()}
			if !inst.rec.Spec.PauseOnTimeout {
				inst.clean(why, nil)
				return
			}
			why.Event = journal.Paused
			inst.obey(&order{done: make(chan struct{}), do: func(ctx context.Context) error {
				err := inst.pause(ctx, &why)
				if err != nil {
					inst.log.Error("cannot pause an unused sandbox", "error", err, "again_in", inst.rec.Spec.Timeout)
					inst.tracker.Touch()
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
		case o := <-inst.orders:
			inst.obey(o)
		case <-inst.stop:
			inst.clean(inst.why, nil)
			return
		case <-inst.vm.Done():
			if inst.stopping() {
				inst.clean(inst.why, nil)
				return
			}
			if inst.machineEnded() {
				return
			}
		case <-inst.m.closing:
			inst.release()
			return
		}
		if timer != nil {
			timer.Stop()
		}
	}
}

// nextExpiry shuts the tracker if the sandbox was not used for its timeout. Otherwise it
// returns what to wait for before the next check.
func (inst *instance) nextExpiry() (timer *time.Timer, busy <-chan struct{}, expired bool) {
	if inst.rec.Spec.Timeout == 0 {
		return nil, nil, false
	}
	expired, left, busy := inst.tracker.expire(inst.rec.Spec.Timeout)
	if expired || busy != nil {
		return nil, busy, expired
	}
	return time.NewTimer(left), nil, false
}

// refuse refuses new uses.
func (inst *instance) refuse() {
	inst.tracker.Shut()
	inst.set(func() { inst.rec.State = Stopping })
}

// release disconnects from a sandbox, which keeps running without this agent.
func (inst *instance) release() {
	inst.tracker.Shut()
	close(inst.over)
	inst.endLife(ended("the host agent is stopping"))
	inst.disconnect()
}

func (inst *instance) disconnect() {
	if inst.guest != nil {
		inst.guest.Close()
		inst.transport.close()
	}
}

// clean removes a sandbox, and retries until it succeeds or the agent stops. It calls done,
// unless that is nil, with the result of the first attempt.
func (inst *instance) clean(why ending, done func(error)) {
	begin := time.Now()
	inst.refuse()
	close(inst.over)
	inst.endLife(ended(why.Reason))
	inst.disconnect()
	inst.log.Info("sandbox ends", "reason", firstLine(why.Reason), "event", string(why.Event))
	retries := backoff.New(firstRetry, lastRetry)
	for {
		inst.set(func() { inst.attempts++ })
		err := inst.tryClean(why)
		inst.m.left(inst)
		inst.m.Observe("remove", "", time.Since(begin), err)
		if err == nil {
			inst.m.remove(inst)
			inst.log.Info("sandbox is gone", "took", time.Since(begin))
		}
		if done != nil {
			done(err)
			done = nil
		}
		if err == nil {
			close(inst.gone)
			return
		}
		pause := retries.Next()
		inst.log.Error("cannot remove sandbox", "error", err, "again_in", pause)
		inst.set(func() {
			inst.cleanErr = err
			close(inst.tried)
			inst.tried = make(chan struct{})
		})
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-inst.retry:
		case <-inst.m.closing:
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
func (inst *instance) tryClean(why ending) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	dir, home := inst.m.Dir, inst.rec.Home
	if inst.unreadable != nil {
		return inst.setAside(ctx, why)
	}
	if inst.rec.Ending == nil {
		// Record it, so that the next agent knows why the machine ended if this one dies now.
		inst.set(func() { inst.rec.Ending = &why })
		if _, err := os.Stat(dir.SandboxRecord(home)); err == nil {
			if err := inst.rec.save(dir); err != nil {
				inst.log.Warn("cannot record a sandbox's end", "error", err) // a full disk must not keep it alive
			}
		}
	}
	inst.m.Hook("clean: recorded")
	if err := inst.vacate(ctx); err != nil {
		return err
	}
	inst.m.Hook("clean: vacated")
	// Remove its files before the event is written, because the disk may be full.
	if err := inst.rec.empty(dir); err != nil {
		return err
	}
	if why.Event != "" {
		if err := inst.tell(why); err != nil {
			return err
		}
	}
	inst.m.Hook("clean: told")
	if err := os.RemoveAll(dir.Sandbox(home)); err != nil {
		return fmt.Errorf("remove folder: %w", err)
	}
	return nil
}

// setAside is tryClean for a sandbox with an unreadable record, whose files it keeps.
func (inst *instance) setAside(ctx context.Context, why ending) error {
	if err := inst.vacate(ctx); err != nil {
		return err
	}
	if err := inst.tell(why); err != nil {
		return err
	}
	item, err := unreadable.Move(inst.m.Dir, unreadable.Sandbox, inst.m.Dir.Sandbox(inst.rec.Home), inst.unreadable)
	if err != nil {
		return err
	}
	inst.log.Error("set the files of a sandbox aside", "path", item.Path, "error", inst.unreadable)
	return nil
}

// vacate ends the machine and releases its network slot and memory. It continues where an
// earlier attempt failed.
func (inst *instance) vacate(ctx context.Context) error {
	if err := inst.killVM(ctx); err != nil {
		return err
	}
	if inst.slot != nil {
		if err := inst.m.Networks.Release(ctx, inst.slot); err != nil {
			return fmt.Errorf("release network slot: %w", err)
		}
		inst.set(func() { inst.slot = nil })
	}
	inst.dropKept()
	if inst.base != nil {
		inst.m.bases.release(inst.base)
		inst.base = nil
	}
	return nil
}

// killVM ends the machine, even one that this agent is not attached to.
func (inst *instance) killVM(ctx context.Context) error {
	switch {
	case inst.vm != nil:
		if err := inst.vm.Kill(ctx); err != nil {
			return fmt.Errorf("kill virtual machine: %w", err)
		}
	case inst.maybeVM:
		if err := inst.m.Driver.Reap(ctx, leftover(inst.rec)); err != nil {
			return fmt.Errorf("reap virtual machine: %w", err)
		}
	}
	inst.maybeVM = false
	inst.set(func() { inst.vm = nil })
	return nil
}

// tell appends an event to the journal, unless it is there already.
func (inst *instance) tell(why ending) error {
	for _, e := range inst.m.Journal.Pending() {
		if e.Sandbox == inst.rec.Spec.ID && e.Kind == why.Event && e.Time.Equal(why.Time) {
			return nil
		}
	}
	if len(why.Reason) > 4<<10 {
		why.Reason = why.Reason[:4<<10]
	}
	_, err := inst.m.Journal.Append(journal.Event{Kind: why.Event, Sandbox: inst.rec.Spec.ID, Time: why.Time, Reason: strings.ToValidUTF8(why.Reason, "")})
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
