package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/room"
)

// Config configures a [Manager]. Fields must be set unless their comment allows zero.
type Config struct {
	Dir      layout.Dir
	Driver   vmm.Driver
	Networks Networks
	Journal  *journal.Journal
	// Kernel and Initrd are the files that guests boot. Modules is a file system with the
	// kernel's modules (empty: guests have none). KernelInputs is a digest of the inputs of
	// all three.
	Kernel, Initrd, Modules, KernelInputs string
	// Template finds a template, or returns [ErrNotFound].
	Template func(team, template uuid.UUID) (image.Template, error)
	// MemoryMiB bounds the memory of all sandboxes together (0: most of the host's).
	MemoryMiB int
	// Boots is the number of guests that may boot at once (0: one per processor).
	Boots int
	// BootTimeout bounds one boot, without the time in the queue (0: two minutes).
	BootTimeout time.Duration
	// CaptureDelay is the time between a guest's boot and its capture (0: a second).
	CaptureDelay time.Duration
	// DefaultVCPUs and DefaultMemoryMiB are the size for which the manager captures the
	// built-in template when it opens (0: it does not).
	DefaultVCPUs, DefaultMemoryMiB int
	// Warm is the number of warm machines for each template in use (0: none).
	Warm int
	// WarmMemoryMiB bounds the memory of all warm machines together (0: an eighth of
	// MemoryMiB).
	WarmMemoryMiB int
	// DiskReserveMiB is the free disk space below which only pauses of running sandboxes may
	// begin (0: no limit).
	DiskReserveMiB int
	// Rates limit each sandbox's use of the disk and network, unless TemplateRates
	// names its template. The slots of Networks start with Rates.
	Rates         rates.Rates
	TemplateRates rates.Templates
	// NestedTeams are the teams whose guests may run virtual machines themselves.
	NestedTeams []Team
	// Hook, if not nil, is called at each step after which a test may kill the agent.
	Hook func(step string)
	// Problems receives problems with sandboxes. It may be nil.
	Problems *problem.List
	// Observe, if not nil, is called after each step of an operation, and after the whole
	// operation with step "". Both names are from fixed sets.
	Observe func(operation, step string, took time.Duration, err error)
	Log     *slog.Logger
}

// Team is a team's id in a setting.
type Team uuid.UUID

// UnmarshalText reads an id of the form tm-….
func (t *Team) UnmarshalText(text []byte) error {
	u, err := id.Parse(id.Team, string(text))
	if err != nil {
		return err
	}
	*t = Team(u)
	return nil
}

const (
	defaultBootTimeout  = 2 * time.Minute
	defaultCaptureDelay = time.Second

	// overheadMiB is reserved for each sandbox besides its memory.
	overheadMiB = 64
	// slackMiB must be free on the host besides the memory of a new sandbox.
	slackMiB = 256

	// firstUID is the user of slot 0's virtual machine, and so on. No other process on the
	// host may run as one of these users.
	firstUID = 2_000_000
)

// Manager owns the sandboxes of one host.
type Manager struct {
	Config
	boots   chan struct{} // semaphore of boots
	closing chan struct{} // closed, under mu, by Close
	wg      sync.WaitGroup

	bases   bases
	warm    warm
	probing probing
	room    *room.Room // nil: no bounds

	flattening chan struct{} // semaphore of flattening

	// mu is locked before an instance's mu, which is locked before those of bases and trackers.
	// A holder of an instance's mu must not call anything that locks mu.
	mu          sync.Mutex
	sandboxes   map[uuid.UUID]*instance
	nameless    map[*instance]struct{} // machines that are not sandboxes: warm ones, and those for captures
	capturing   map[string]*capturing
	unread      map[uuid.UUID]*unreadRecord // sandboxes whose records could not be read yet, by home
	leaving     map[*instance]struct{}      // paused sandboxes whose machines are being ended
	fewer       chan struct{}               // closed and replaced when one leaves leaving
	refuse      error                       // the error for new sandboxes; nil: none
	starting    int                         // sandboxes that are being created
	reservedMiB int                         // memory of everything but warm machines
}

// Open makes a manager that adopts what r found.
func Open(ctx context.Context, c Config, r *Recovery) (*Manager, error) {
	for t := range c.TemplateRates {
		if err := c.TemplateRates.Of(t, c.Rates).Check(); err != nil {
			return nil, fmt.Errorf("rates of template %s: %w", id.Format(id.Template, t), err)
		}
	}
	if c.MemoryMiB == 0 {
		total, err := hostMemory()
		if err != nil {
			return nil, err
		}
		c.MemoryMiB = total - max(1024, total/10)
	}
	if c.Boots == 0 {
		c.Boots = runtime.NumCPU()
	}
	if c.BootTimeout == 0 {
		c.BootTimeout = defaultBootTimeout
	}
	if c.CaptureDelay == 0 {
		c.CaptureDelay = defaultCaptureDelay
	}
	if c.WarmMemoryMiB == 0 {
		c.WarmMemoryMiB = c.MemoryMiB / 8
	}
	if c.Hook == nil {
		c.Hook = func(string) {}
	}
	if c.Observe == nil {
		c.Observe = func(string, string, time.Duration, error) {}
	}
	if err := os.MkdirAll(c.Dir.Sandboxes(), 0o700); err != nil {
		return nil, fmt.Errorf("make folder of sandboxes: %w", err)
	}
	m := &Manager{
		Config: c, boots: make(chan struct{}, c.Boots), closing: make(chan struct{}),
		sandboxes: map[uuid.UUID]*instance{}, nameless: map[*instance]struct{}{}, capturing: map[string]*capturing{},
		unread: map[uuid.UUID]*unreadRecord{}, leaving: map[*instance]struct{}{}, fewer: make(chan struct{}), flattening: make(chan struct{}, 1),
		probing: defaultProbing,
	}
	if c.DiskReserveMiB > 0 {
		m.room = room.New(int64(c.DiskReserveMiB)<<20, room.Of(string(c.Dir)))
	}
	m.warm.init(m)
	m.sweep()
	for _, f := range r.found {
		m.adopt(ctx, f)
	}
	m.wg.Go(m.warm.keep)
	return m, nil
}

// Most returns the maximum number of sandboxes at once if they may have memoryMiB together
// (0: most of the host's).
func Most(memoryMiB int) (int, error) {
	if memoryMiB == 0 {
		var err error
		if memoryMiB, err = hostMemory(); err != nil {
			return 0, err
		}
	}
	return max(memoryMiB/(MinMemoryMiB+overheadMiB), 1), nil
}

func hostMemory() (mib int, err error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0, fmt.Errorf("measure memory: %w", err)
	}
	return int(uint64(si.Totalram) * uint64(si.Unit) >> 20), nil
}

// Create starts a sandbox and returns when its guest daemon responds. It is idempotent by
// the sandbox's id: a repeated call waits for the start or returns the existing sandbox. If
// all callers give up before it runs, it is destroyed.
func (m *Manager) Create(ctx context.Context, s Spec) (Info, error) {
	inst, err := m.enroll(ctx, s, start{})
	if err != nil {
		return Info{}, err
	}
	return inst.await(ctx)
}

// enroll finds or makes the sandbox for s, and counts the caller as a waiter.
func (m *Manager) enroll(ctx context.Context, s Spec, begin start) (*instance, error) {
	t := &begin.template
	if c := begin.capture; c == nil {
		var err error
		if *t, err = m.Template(s.Team, s.Template); err != nil {
			return nil, err
		}
	} else {
		*t = image.Template{ID: s.Template, Team: s.Team, DiskMiB: c.DiskMiB, VCPUs: c.VCPUs, MemoryMiB: c.MemoryMiB}
	}
	if err := s.check(*t); err != nil {
		return nil, err
	}
	var inst *instance
	err := m.whenFewer(ctx, func() (err error) {
		inst, err = m.join(ctx, s, begin)
		return err
	})
	return inst, err
}

// join is enroll for a valid s. The caller holds mu.
func (m *Manager) join(ctx context.Context, s Spec, begin start) (*instance, error) {
	if inst := m.sandboxes[s.ID]; inst != nil {
		inst.mu.Lock()
		defer inst.mu.Unlock()
		switch {
		case inst.rec.Spec.Team != s.Team || inst.rec.Spec.Template != s.Template:
			return nil, fail(ErrExists, "another sandbox has this id")
		case inst.rec.State == Stopping || inst.stopping():
			return nil, &StateError{Stopping}
		}
		inst.waiters++
		return inst, nil
	}
	if m.refuse != nil {
		return nil, m.refuse
	}
	inst := newInstance(m, record{Version: format.Sandbox.Version, Home: s.ID, Spec: s, State: Starting, CreatedAt: time.Now().UTC()})
	inst.begin = begin
	if inst.begin.capture == nil {
		inst.begin.ready = m.warm.take(s)
	}
	if err := m.admit(inst); err != nil {
		if w := inst.begin.ready; w != nil {
			m.warm.discard(w)
		}
		return nil, err
	}
	inst.waiters = 1
	m.sandboxes[s.ID] = inst
	m.starting++
	asked := carry(ctx, context.Background())
	m.wg.Go(func() { inst.live(asked) })
	return inst, nil
}

// register adds a machine that is not a sandbox, so that [Manager.Terminate] ends it.
func (m *Manager) register(inst *instance) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refuse != nil {
		return m.refuse
	}
	m.nameless[inst] = struct{}{}
	return nil
}

// started notes that the start of a sandbox has succeeded or failed.
func (m *Manager) started(inst *instance, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.starting--
	m.warm.lastStart = time.Now()
	if err == nil && inst.begin.capture != nil && !inst.begin.copied {
		m.warm.want(inst.rec.Spec, inst.begin.capture)
	}
	m.warm.look()
}

// admit reserves memory for a sandbox, or returns [ErrExhausted]. The caller holds mu.
func (m *Manager) admit(inst *instance) error {
	// Only check the reserve, because a new sandbox needs no disk space yet.
	if err := m.room.During(0, func() error { return nil }); err != nil {
		return Full(err)
	}
	s := &inst.rec.Spec
	if n := runtime.NumCPU(); s.VCPUs > n {
		return fail(ErrExhausted, "this host has %d processors, not %d", n, s.VCPUs)
	}
	need := s.MemoryMiB + overheadMiB
	if need > m.MemoryMiB {
		return fail(ErrExhausted, "this host has %d MiB of memory for sandboxes; %d with %d of overhead are more", m.MemoryMiB, s.MemoryMiB, overheadMiB)
	}
	free := m.MemoryMiB - m.reservedMiB - m.bases.mib()
	if need > free {
		m.bases.drop()
		free = m.MemoryMiB - m.reservedMiB - m.bases.mib()
	}
	if need > free {
		return fail(ErrExhausted, "%d MiB of memory are needed with overhead, %d of the %d for sandboxes are free", need, max(free, 0), m.MemoryMiB)
	}
	m.warm.shed(free - need)
	if available, err := availableMemory(); err == nil && available < s.MemoryMiB+slackMiB {
		m.bases.drop()
		m.warm.shed(0)
		return fail(ErrExhausted, "the host has %d MiB of memory available, too little for a sandbox with %d", available, s.MemoryMiB)
	}
	inst.reservedMiB = need
	m.reservedMiB += need
	return nil
}

// Room returns the room on the disk. Part of it is reserved for pauses of running sandboxes.
// All other writes for clients must hold room there.
func (m *Manager) Room() *room.Room { return m.room }

// leastRoom is the free space, in bytes, below which a file system counts as full.
const leastRoom = 16 << 20

// DiskFull reports whether the agent's file system is full. Guests that write to their
// disks then stop until there is space again.
func (m *Manager) DiskFull() bool {
	var fs unix.Statfs_t
	return unix.Statfs(string(m.Dir), &fs) == nil && fs.Bavail*uint64(fs.Bsize) < leastRoom
}

// hasRoom reports whether so many bytes of memory are free and not reserved.
func (m *Manager) hasRoom(bytes int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	mib := int(bytes>>20) + 1
	available, err := availableMemory()
	return err == nil && mib+slackMiB <= available &&
		m.reservedMiB+m.bases.mib()+m.warm.reservedMiB+mib <= m.MemoryMiB
}

// reserve reserves memory for a sandbox, unless it has some.
func (m *Manager) reserve(ctx context.Context, inst *instance) error {
	return m.whenFewer(ctx, func() error {
		if inst.reservedMiB > 0 {
			return nil
		}
		return m.admit(inst)
	})
}

// leaves notes that the memory of a paused sandbox will be free soon.
func (m *Manager) leaves(inst *instance) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leaving[inst] = struct{}{}
}

// left notes that this memory is free, or that freeing it failed.
func (m *Manager) left(inst *instance) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.leaving[inst]; ok {
		delete(m.leaving, inst)
		close(m.fewer)
		m.fewer = make(chan struct{})
	}
}

// whenFewer calls f with mu held. While f returns [ErrExhausted] and paused sandboxes are
// about to free their memory, it waits for one and calls f again.
func (m *Manager) whenFewer(ctx context.Context, f func() error) error {
	for {
		m.mu.Lock()
		err := f()
		fewer, some := m.fewer, len(m.leaving) > 0
		m.mu.Unlock()
		if !some || !errors.Is(err, ErrExhausted) {
			return err
		}
		select {
		case <-fewer:
		case <-m.closing:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// unreserve releases a sandbox's memory.
func (m *Manager) unreserve(inst *instance) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reservedMiB -= inst.reservedMiB
	inst.reservedMiB = 0
	m.warm.look()
}

// remove forgets a sandbox that is gone.
func (m *Manager) remove(inst *instance) {
	m.unreserve(inst)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.nameless, inst)
	if m.sandboxes[inst.rec.Spec.ID] == inst {
		delete(m.sandboxes, inst.rec.Spec.ID)
	}
}

// isClosed reports whether Close was called. It locks nothing, so a holder of an instance's
// mu may call it.
func (m *Manager) isClosed() bool {
	select {
	case <-m.closing:
		return true
	default:
		return false
	}
}

func (m *Manager) find(id uuid.UUID) (*instance, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if inst := m.sandboxes[id]; inst != nil {
		return inst, nil
	}
	for _, u := range m.unread {
		if u.sandbox == id || u.sandbox == uuid.Nil {
			return nil, fail(ErrUnread, "this host cannot read all of its sandboxes' records now")
		}
	}
	return nil, fail(ErrNotFound, "no such sandbox on this host")
}

// Incomplete reports whether List leaves out sandboxes whose records cannot be read now.
// which has their ids, or is nil if these are unknown.
func (m *Manager) Incomplete() (incomplete bool, which []uuid.UUID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, u := range m.unread {
		if u.sandbox == uuid.Nil {
			return true, nil
		}
		which = append(which, u.sandbox)
	}
	return len(which) > 0, which
}

// Get describes a sandbox.
func (m *Manager) Get(id uuid.UUID) (Info, error) {
	inst, err := m.find(id)
	if err != nil {
		return Info{}, err
	}
	return inst.info(), nil
}

// all returns the sandboxes that exist now.
func (m *Manager) all() []*instance {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.sandboxes))
}

// List describes all sandboxes, oldest first.
func (m *Manager) List() []Info {
	all := m.all()
	list := make([]Info, len(all))
	for i, inst := range all {
		list[i] = inst.info()
	}
	slices.SortFunc(list, func(a, b Info) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), slices.Compare(a.ID[:], b.ID[:]))
	})
	return list
}

// Memory returns how much of the memory for sandboxes is reserved, including that of bases,
// and the total, in MiB.
func (m *Manager) Memory() (reserved, total int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reservedMiB + m.bases.mib(), m.MemoryMiB
}

// Waiting returns the number of warm machines.
func (m *Manager) Waiting() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.warm.ready)
}

// Destroy ends a sandbox, even one that is being created, and returns when nothing of it is
// left. It is idempotent.
func (m *Manager) Destroy(ctx context.Context, id uuid.UUID) error {
	inst, err := m.find(id)
	if errors.Is(err, ErrUnread) {
		damaged, e := m.endDamaged(ctx, id)
		if e != nil {
			return e
		}
		if damaged {
			inst, err = m.find(id)
		}
	}
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return inst.destroy(ctx, "", "it was destroyed")
}

// Terminate pauses all running sandboxes, and refuses to create or resume any. It appends an
// event for each pause. A sandbox that cannot be paused loses its memory and keeps its disk.
// A machine that the agent could not adopt yet keeps running, which is an error.
func (m *Manager) Terminate(ctx context.Context) error {
	m.mu.Lock()
	if m.refuse == nil {
		m.refuse = ErrClosing
	}
	all := slices.Collect(maps.Values(m.sandboxes))
	sandboxes := len(all)
	m.warm.shed(0)
	all = slices.AppendSeq(all, maps.Keys(m.nameless))
	unread := len(m.unread)
	m.mu.Unlock()
	const reason = "the host was shut down"
	errs := make([]error, len(all))
	var g errgroup.Group
	g.SetLimit(2 * runtime.NumCPU())
	for i, inst := range all {
		g.Go(func() error {
			if i >= sandboxes {
				errs[i] = inst.destroy(ctx, "", reason)
			} else {
				errs[i] = inst.shutDown(ctx, reason)
			}
			return nil
		})
	}
	_ = g.Wait()
	if unread > 0 {
		errs = append(errs, fmt.Errorf("%d sandboxes are not paused: their records cannot be read, and their machines keep running", unread))
	}
	return errors.Join(errs...)
}

// shutDown pauses the sandbox and ends its machine. One that cannot be paused loses its
// memory, and one that is ending ends.
func (inst *instance) shutDown(ctx context.Context, reason string) error {
	if inst.info().State == Starting {
		return inst.destroy(ctx, journal.Exited, reason)
	}
	var unfinished error // the sandbox is paused, but finishPause failed
	err := inst.order(ctx, func(ctx context.Context) error {
		if err := inst.pause(ctx, pausedEvent(reason)); err != nil {
			return err
		}
		if !inst.pauseFinished() {
			unfinished = inst.finishPause(ctx)
		}
		return nil
	})
	var state *StateError
	if err != nil && !errors.As(err, &state) {
		inst.log.Error("cannot pause a sandbox, which loses its memory", "error", err)
		err = inst.order(ctx, func(ctx context.Context) error {
			inst.tracker.Shut()
			if err := inst.lose(loss(condition.Killed, reason+", and it could not be paused"), pausedEvent(reason+"; its memory is lost, because it could not be paused")); err != nil {
				inst.tracker.Reopen()
				return err
			}
			unfinished = inst.finishPause(ctx)
			return nil
		})
	}
	switch {
	case err == nil:
		return unfinished
	case errors.As(err, &state) && state.State == Stopping:
		return inst.destroy(ctx, "", reason) // its cleanup may wait for a retry
	case errors.As(err, &state) && state.State == Resuming:
		// An order sees this state only if the agent has not adopted the machine yet.
		return fmt.Errorf("sandbox %s is not paused: the agent could not adopt its machine, which keeps running", id.Format(id.Sandbox, inst.info().ID))
	}
	return err
}

// Close disconnects from sandboxes. Running ones keep running, and the next [Recover] finds
// them; those being created are removed. Close returns the network slots in use.
func (m *Manager) Close(ctx context.Context) (slots []int, err error) {
	m.mu.Lock()
	m.refuse = ErrClosing
	if !m.isClosed() {
		close(m.closing)
	}
	m.mu.Unlock()
	done := make(chan struct{})
	go func() { // ends when the sandboxes' goroutines do
		m.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		err = fmt.Errorf("disconnect from sandboxes: %w", ctx.Err())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, inst := range m.sandboxes {
		inst.mu.Lock()
		switch {
		case inst.slot != nil:
			slots = append(slots, inst.slot.Index())
		case inst.kept:
			slots = append(slots, *inst.rec.Slot)
		}
		inst.mu.Unlock()
	}
	slices.Sort(slots)
	return slots, err
}

// Use is a use of a running sandbox, which does not expire during it.
type Use struct {
	Info
	// Context ends with the caller's, or when the sandbox ends or is paused. Its cause says
	// why.
	Context context.Context
	// Guest is the client of the guest daemon.
	Guest *guest.Client
	// Address is the address at which the host reaches the guest.
	Address netip.Addr
	// Transport sends HTTP requests to the guest and nowhere else.
	Transport http.RoundTripper
	// VM is the sandbox's machine.
	VM vmm.VM
	// Silent implements Silence (nil: the guest is not silent).
	Silent func() error
	// Leave implements End.
	Leave func()
}

// End ends the use. It is idempotent.
func (u *Use) End() { u.Leave() }

// Silence returns an error for clients if the sandbox's guest is known to be silent.
func (u *Use) Silence() error {
	if u.Silent == nil {
		return nil
	}
	return u.Silent()
}

// Use begins a use of a sandbox. The caller must call End.
func (m *Manager) Use(ctx context.Context, id uuid.UUID) (*Use, error) {
	inst, err := m.find(id)
	if err != nil {
		return nil, err
	}
	// Wait for the end of its adoption, in which its guest closes all connections.
	if inst.taken != nil {
		select {
		case <-inst.taken:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	leave, ok := inst.tracker.Enter()
	inst.mu.Lock()
	defer inst.mu.Unlock()
	if !ok || inst.rec.State != Running {
		if ok {
			leave()
		}
		switch {
		case inst.stopping():
			return nil, &StateError{Stopping}
		case inst.rec.State != Running:
			return nil, &StateError{inst.rec.State}
		case m.isClosed():
			return nil, ErrClosing
		}
		return nil, &StateError{Stopping} // it expires
	}
	ctx, cancel := context.WithCancelCause(ctx)
	life := inst.life
	stop := context.AfterFunc(life, func() { cancel(context.Cause(life)) })
	return &Use{
		Info: inst.infoLocked(), Context: ctx, Guest: inst.guest, Address: inst.slot.Address(), Transport: inst.transport, VM: inst.vm, Silent: inst.silence,
		Leave: sync.OnceFunc(func() {
			stop()
			cancel(context.Canceled)
			leave()
		}),
	}, nil
}

// Console returns the end of the output on the serial console of a sandbox's guest, even
// during its start.
func (m *Manager) Console(ctx context.Context, id uuid.UUID) ([]byte, error) {
	inst, err := m.find(id)
	if err != nil {
		return nil, err
	}
	inst.mu.Lock()
	vm := inst.vm
	inst.mu.Unlock()
	if vm == nil {
		return nil, &StateError{inst.info().State}
	}
	return vm.Console(ctx)
}

// ended returns the cause with which uses of an ending sandbox are cancelled.
func ended(why string) error { return fail(ErrState, "the sandbox has ended: %s", why) }
