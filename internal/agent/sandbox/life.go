package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/network"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
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
	base    string // its template's disk
	tracker *Tracker

	life    context.Context // of its uses; ends with a cause
	endLife context.CancelCauseFunc

	booted chan struct{} // closed when its start has ended, well or not
	gone   chan struct{} // closed when nothing is left of it
	retry  chan struct{} // somebody wants it cleaned now

	mu        sync.Mutex
	rec       record
	steps     []Step
	slot      Slot
	vm        vmm.VM
	maybeVM   bool // there may be a machine that vm does not show
	guest     *guest.Client
	transport *http.Transport
	bootErr   error // set before booted is closed
	cleanErr  error
	tried     chan struct{} // closed and replaced after each attempt to clean that failed

	// What others ask of the goroutine, under mu too.
	waiters int           // callers of Create
	stop    chan struct{} // closed: end
	why     ending        // set before stop is closed
}

func newBox(m *Manager, r record) *box {
	b := &box{
		m: m, rec: r, tracker: NewTracker(),
		log:    m.Log.With("sandbox", id.Format(id.Sandbox, r.Spec.ID)),
		booted: make(chan struct{}), gone: make(chan struct{}), retry: make(chan struct{}, 1),
		tried: make(chan struct{}), stop: make(chan struct{}),
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
		VCPUs: s.VCPUs, MemoryMiB: s.MemoryMiB, DiskMiB: s.DiskMiB, CreatedAt: b.rec.CreatedAt,
		InFlight: b.tracker.InFlight(), Steps: append([]Step(nil), b.steps...),
	}
	if b.stopping() {
		i.State = Stopping
	}
	if s.Timeout > 0 {
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
	tried := b.tried
	b.mu.Unlock()
	select {
	case b.retry <- struct{}{}:
	default: // somebody has asked
	}
	select {
	case <-b.gone:
		return nil
	case <-tried:
		b.mu.Lock()
		defer b.mu.Unlock()
		return fmt.Errorf("remove sandbox: %w", b.cleanErr)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// live is the sandbox's life from its creation on.
func (b *box) live() {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	// Whoever asks for the end ends the start; so does the agent's own end.
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
	begin := time.Now()
	err := b.create(ctx)
	close(unhook)
	<-hooked
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx) // it runs, but too late
	}
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
	return fmt.Errorf("%w: %w", ErrStart, err)
}

type stepsValue []Step

func (s stepsValue) LogValue() slog.Value {
	attrs := make([]slog.Attr, len(s))
	for i, step := range s {
		attrs[i] = slog.Duration(step.Name, step.Took)
	}
	return slog.GroupValue(attrs...)
}

// step does one step and tells how long it took.
func (b *box) step(name string, f func() error) error {
	begin := time.Now()
	err := f()
	took := time.Since(begin)
	b.set(func() { b.steps = append(b.steps, Step{name, took}) })
	b.m.Observe(name, took, err)
	if err != nil {
		b.log.Debug("step failed", "step", name, "took", took, "error", err)
		return err
	}
	b.log.Debug("step", "step", name, "took", took)
	return nil
}

// create makes all of a sandbox's parts. After an error [box.clean] removes
// those that there are.
func (b *box) create(ctx context.Context) error {
	dir, spec := b.m.Dir, &b.rec.Spec
	err := b.step("slot", func() error {
		s, err := b.m.Networks.Acquire(ctx)
		if errors.Is(err, network.ErrExhausted) {
			return fail(ErrExhausted, "this host has no network slot left")
		}
		if err != nil {
			return fmt.Errorf("get a network slot: %w", err)
		}
		i := s.Index()
		b.set(func() { b.slot, b.rec.Slot = s, &i })
		if err := s.Describe(spec.metadata()); err != nil {
			return fmt.Errorf("set metadata: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = b.step("record", func() error {
		if err := os.Mkdir(dir.Sandbox(spec.ID), 0o700); err != nil {
			return fmt.Errorf("make folder: %w", err)
		}
		return full(b.rec.save(dir))
	})
	if err != nil {
		return err
	}
	err = b.step("wait", func() error {
		select {
		case b.m.boots <- struct{}{}:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		return err
	}
	defer func() { <-b.m.boots }()

	late := fmt.Errorf("the guest did not come up within %v", b.m.BootTimeout)
	ctx, cancel := context.WithTimeoutCause(ctx, b.m.BootTimeout, late)
	defer cancel()
	uid := firstUID + b.slot.Index()
	err = b.step("disk", func() error {
		err := disk.CreateOverlay(dir.SandboxDisk(spec.ID), int64(spec.DiskMiB)<<20, uid)
		return full(err)
	})
	if err != nil {
		return err
	}
	if err := b.step("vm", func() error { return b.start(ctx, uid) }); err != nil {
		return err
	}
	if err := b.boot(ctx); err != nil {
		return err
	}
	return b.step("commit", func() error {
		b.set(func() {
			st := b.vm.State()
			b.rec.State, b.rec.VM = Running, &st
		})
		return full(b.rec.save(dir))
	})
}

// full makes clear that a disk is.
func full(err error) error {
	if errors.Is(err, disk.ErrNoSpace) || isFull(err) {
		return fail(ErrExhausted, "this host has no disk space for a sandbox: %v", err)
	}
	return err
}

// start starts the virtual machine.
func (b *box) start(ctx context.Context, uid int) error {
	spec := &b.rec.Spec
	tap, err := b.slot.OpenTap()
	if err != nil {
		return fmt.Errorf("open the guest's network card: %w", err)
	}
	defer tap.Close()
	b.maybeVM = true
	vm, err := b.m.Driver.Start(ctx, vmm.Spec{
		ID: spec.ID, Dir: b.m.Dir.Sandbox(spec.ID),
		Kernel: b.m.Kernel, Initrd: b.m.Initrd, Cmdline: guest.Cmdline(id.Format(id.Sandbox, spec.ID)),
		VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB,
		Overlay: b.m.Dir.SandboxDisk(spec.ID), Base: b.base,
		NetNS: b.slot.NetNS(), Tap: tap, MAC: guest.MAC, UID: uid,
	})
	if ctx.Err() != nil && err != nil {
		return because(ctx, err)
	}
	if err != nil {
		return fmt.Errorf("start the virtual machine: %w", err)
	}
	b.set(func() { b.vm = vm })
	b.connect()
	return nil
}

// connect makes what talks to the guest.
func (b *box) connect() {
	d := net.Dialer{Timeout: 10 * time.Second}
	host := b.slot.Address().String()
	b.set(func() {
		b.guest = guest.New(b.slot.Address(), b.rec.Spec.Token)
		b.transport = &http.Transport{
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				_, port, err := net.SplitHostPort(addr)
				if err != nil {
					return nil, err
				}
				return d.DialContext(ctx, network, net.JoinHostPort(host, port))
			},
			DisableCompression:     true,
			MaxIdleConns:           64,
			MaxIdleConnsPerHost:    16,
			IdleConnTimeout:        60 * time.Second,
			ExpectContinueTimeout:  time.Second,
			MaxResponseHeaderBytes: 1 << 20,
		}
	})
}

// boot waits until the guest daemon answers and tells it what it must know.
// When the machine ends or time is up the error has the console's end.
func (b *box) boot(ctx context.Context) error {
	died := errors.New("the virtual machine ended while it booted")
	guarded, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-b.vm.Done():
			cancel(died)
		case <-guarded.Done():
		}
	}()
	defer func() { cancel(nil); <-watched }()
	err := b.step("boot", func() error { return b.guest.Wait(guarded) })
	if err == nil {
		err = b.step("init", func() error {
			_, err := b.guest.Init(guarded, guest.Settings{Envs: b.rec.Spec.Envs})
			return err
		})
	}
	if err == nil {
		return nil
	}
	if cause := context.Cause(guarded); cause != nil {
		err = cause
	}
	if errors.Is(err, died) {
		err = fmt.Errorf("%w: %w", died, b.vm.Err())
	}
	if errors.Is(err, ErrState) || errors.Is(err, ErrClosing) {
		return err // the guest is not to blame
	}
	return fmt.Errorf("boot: %w%s", err, b.lastWords())
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
	text := strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || r != '\n' && unicode.IsControl(r) {
			return -1
		}
		return r
	}, strings.ToValidUTF8(string(out), ""))
	if text = strings.TrimSpace(text); text == "" {
		return "; its console is empty"
	}
	return "; its console ends with:\n" + text
}

// serve watches over a running sandbox until it ends or the agent lets go of it.
func (b *box) serve() {
	for {
		timer, busy, expired := b.nextExpiry()
		if expired {
			why := ending{journal.Expired, fmt.Sprintf("it was not used for %v", b.rec.Spec.Timeout), time.Now().UTC()}
			b.clean(why, nil)
			return
		}
		var tick <-chan time.Time
		if timer != nil {
			tick = timer.C
		}
		select {
		case <-tick:
		case <-busy:
		case <-b.stop:
			b.clean(b.why, nil)
			return
		case <-b.vm.Done():
			if b.stopping() {
				b.clean(b.why, nil)
				return
			}
			b.clean(ending{journal.Exited, b.vm.Err().Error(), time.Now().UTC()}, nil)
			return
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
	b.endLife(ended("the host agent is stopping"))
	b.disconnect()
}

func (b *box) disconnect() {
	if b.guest != nil {
		b.guest.Close()
		b.transport.CloseIdleConnections()
	}
}

// clean removes all there is of a sandbox, trying again until that is done or
// the agent ends. done, if not nil, is told how the first attempt went.
func (b *box) clean(why ending, done func(error)) {
	begin := time.Now()
	b.refuse()
	b.endLife(ended(why.Reason))
	b.disconnect()
	b.log.Info("sandbox ends", "reason", firstLine(why.Reason), "event", string(why.Event))
	for pause := firstRetry; ; pause = min(2*pause, lastRetry) {
		err := b.tryClean(why)
		b.m.Observe("remove", time.Since(begin), err)
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
	dir, spec := b.m.Dir, &b.rec.Spec
	if b.rec.Ending == nil {
		// So that the next agent, if this one dies now, does not take the end of
		// the machine for its own doing.
		b.set(func() { b.rec.Ending = &why })
		if _, err := os.Stat(dir.SandboxRecord(spec.ID)); err == nil {
			if err := b.rec.save(dir); err != nil {
				b.log.Warn("a sandbox's end is not recorded", "error", err) // a full disk must not keep it alive
			}
		}
	}
	if err := b.killVM(ctx); err != nil {
		return err
	}
	if b.slot != nil {
		if err := b.m.Networks.Release(ctx, b.slot); err != nil {
			return fmt.Errorf("release network slot: %w", err)
		}
		b.set(func() { b.slot = nil })
	}
	// First what takes space, so that there is some for the event.
	if err := empty(dir, spec.ID); err != nil {
		return err
	}
	if why.Event != "" {
		if err := b.tell(why); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(dir.Sandbox(spec.ID)); err != nil {
		return fmt.Errorf("remove folder: %w", err)
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
		if err := b.m.Driver.Reap(ctx, leftover(b.m.Dir, b.rec)); err != nil {
			return fmt.Errorf("end the virtual machine: %w", err)
		}
	}
	b.maybeVM = false
	b.set(func() { b.vm = nil })
	return nil
}

// tell puts the sandbox's end into the journal, once.
func (b *box) tell(why ending) error {
	for _, e := range b.m.Journal.Pending() {
		if e.Sandbox == b.rec.Spec.ID {
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
