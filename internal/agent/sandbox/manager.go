package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
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

// Config is what a Manager works with. Only the fields marked so may be zero.
type Config struct {
	Dir      layout.Dir
	Driver   vmm.Driver
	Networks Networks
	Journal  *journal.Journal
	// Kernel and Initrd are what guests boot, Modules is a file system with the
	// kernel's modules (empty: guests have none), KernelInputs names what all were
	// made from.
	Kernel, Initrd, Modules, KernelInputs string
	// Template finds what a sandbox starts from, or says [ErrNotFound].
	Template func(team, template uuid.UUID) (image.Template, error)
	// MemoryMiB is what all sandboxes may have together; 0: most of the host's.
	MemoryMiB int
	// Boots is how many guests may boot at once; 0: one a processor.
	Boots int
	// BootTimeout bounds one boot, counted from when it starts; 0: two minutes.
	BootTimeout time.Duration
	// Settle is how long a guest that has booted is left alone before it is
	// captured; 0: a second.
	Settle time.Duration
	// DefaultVCPUs and DefaultMemoryMiB are what of the built-in template is
	// captured at once; 0: nothing is.
	DefaultVCPUs, DefaultMemoryMiB int
	// Warm is how many machines of a template that is in use wait to become
	// sandboxes; 0: none.
	Warm int
	// WarmMemoryMiB is what all of them may have together; 0: an eighth of
	// MemoryMiB.
	WarmMemoryMiB int
	// DiskReserveMiB is what must stay free of the disk for anything but the pause
	// of a running sandbox to begin; 0: nothing.
	DiskReserveMiB int
	// Rates limit each sandbox's use of the disk and network, unless TemplateRates
	// names its template. The slots of Networks start with Rates.
	Rates         rates.Rates
	TemplateRates rates.Templates
	// NestedTeams are the teams whose guests may run virtual machines of their own.
	NestedTeams []Team
	// Hook, if not nil, is told each step between which an agent may be killed.
	Hook func(step string)
	// Problems gets what keeps sandboxes from being taken back; it may be nil.
	Problems *problem.List
	// Observe, if not nil, is told each step of an operation, and then the operation
	// as a whole, whose step is "". Both names are from fixed sets.
	Observe func(operation, step string, took time.Duration, err error)
	Log     *slog.Logger
}

// Team is a team's id, as settings have it.
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
	defaultBootTimeout = 2 * time.Minute
	defaultSettle      = time.Second

	// overheadMiB is counted for each sandbox beside its memory.
	overheadMiB = 64
	// slackMiB must be free on the host beside what a new sandbox may take.
	slackMiB = 256

	// firstUID is the user of slot 0's virtual machine; no other process of the
	// host's runs as one of these.
	firstUID = 2_000_000
)

// Manager owns the sandboxes of one host.
type Manager struct {
	Config
	boots   chan struct{} // one taken a boot
	closing chan struct{} // closed, under mu: sandboxes are let go of
	wg      sync.WaitGroup

	bases   bases
	warm    warm
	probing probing
	room    *room.Room // nil: no bounds

	flattening chan struct{} // one taken while a file system is flattened

	// mu is locked before a box's mu, which is locked before those of bases and
	// trackers. Who holds a box's mu calls nothing that locks this one.
	mu          sync.Mutex
	boxes       map[uuid.UUID]*box
	nameless    map[*box]struct{} // machines that are no sandbox: captured from, or waiting
	capturing   map[string]*capturing
	unread      map[uuid.UUID]*unreadRecord // homes of sandboxes whose records could not be read yet
	leaving     map[*box]struct{}           // paused sandboxes whose machines are being ended
	fewer       chan struct{}               // closed and replaced when leaving has one less
	refuse      error                       // why no sandbox is created any more
	starting    int                         // sandboxes that are being created
	reservedMiB int                         // for all but machines that wait
}

// Open makes a manager that goes on with what r found.
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
	if c.Settle == 0 {
		c.Settle = defaultSettle
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
		boxes: map[uuid.UUID]*box{}, nameless: map[*box]struct{}{}, capturing: map[string]*capturing{},
		unread: map[uuid.UUID]*unreadRecord{}, leaving: map[*box]struct{}{}, fewer: make(chan struct{}), flattening: make(chan struct{}, 1),
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

// Most returns how many sandboxes there can be at once where they may have so
// much memory together; 0: most of the host's.
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

// Create starts a sandbox and returns when its guest daemon answers. It is
// idempotent by the sandbox's id: a repeated call waits for the sandbox that is
// under way or returns the one that there is. When all callers have gone before
// it runs, it is given up.
func (m *Manager) Create(ctx context.Context, s Spec) (Info, error) {
	b, err := m.enroll(ctx, s, start{})
	if err != nil {
		return Info{}, err
	}
	return b.await(ctx)
}

// enroll finds or makes the sandbox that s speaks of, and counts the caller
// as one who waits for it.
func (m *Manager) enroll(ctx context.Context, s Spec, begin start) (*box, error) {
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
	var b *box
	err := m.whenFewer(ctx, func() (err error) {
		b, err = m.join(ctx, s, begin)
		return err
	})
	return b, err
}

// join is enroll when s is known to be right. The caller holds the lock.
func (m *Manager) join(ctx context.Context, s Spec, begin start) (*box, error) {
	if b := m.boxes[s.ID]; b != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch {
		case b.rec.Spec.Team != s.Team || b.rec.Spec.Template != s.Template:
			return nil, fail(ErrExists, "another sandbox has this id")
		case b.rec.State == Stopping || b.stopping():
			return nil, &StateError{Stopping}
		}
		b.waiters++
		return b, nil
	}
	if m.refuse != nil {
		return nil, m.refuse
	}
	b := newBox(m, record{Version: format.Sandbox.Version, Home: s.ID, Spec: s, State: Starting, CreatedAt: time.Now().UTC()})
	b.begin = begin
	if b.begin.capture == nil {
		b.begin.ready = m.warm.take(s)
	}
	if err := m.admit(b); err != nil {
		if w := b.begin.ready; w != nil {
			m.warm.discard(w)
		}
		return nil, err
	}
	b.waiters = 1
	m.boxes[s.ID] = b
	m.starting++
	asked := carry(ctx, context.Background())
	m.wg.Go(func() { b.live(asked) })
	return b, nil
}

// register makes a machine that is no sandbox known to [Manager.Terminate].
func (m *Manager) register(b *box) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refuse != nil {
		return m.refuse
	}
	m.nameless[b] = struct{}{}
	return nil
}

// started notes that the start of a sandbox has ended, well or not.
func (m *Manager) started(b *box, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.starting--
	m.warm.lastStart = time.Now()
	if err == nil && b.begin.capture != nil && !b.begin.copied {
		m.warm.want(b.rec.Spec, b.begin.capture)
	}
	m.warm.look()
}

// admit reserves the memory that a sandbox takes, or says that the host has no
// room. The caller holds the lock.
func (m *Manager) admit(b *box) error {
	// A sandbox takes disk space only as it writes, so it needs none but the reserve.
	if err := m.room.During(0, func() error { return nil }); err != nil {
		return Full(err)
	}
	s := &b.rec.Spec
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
	b.reservedMiB = need
	m.reservedMiB += need
	return nil
}

// Room returns the room on the disk. Part of it is reserved for pauses of running
// sandboxes; all other writes for clients hold room there.
func (m *Manager) Room() *room.Room { return m.room }

// leastRoom is how much of the file system's space, in bytes, is as good as none.
const leastRoom = 16 << 20

// DiskFull reports whether the agent's file system is full. Guests that write to their
// disks then stop until there is space again.
func (m *Manager) DiskFull() bool {
	var fs unix.Statfs_t
	return unix.Statfs(string(m.Dir), &fs) == nil && fs.Bavail*uint64(fs.Bsize) < leastRoom
}

// hasRoom tells whether nobody would miss so many bytes of memory.
func (m *Manager) hasRoom(bytes int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	mib := int(bytes>>20) + 1
	available, err := availableMemory()
	return err == nil && mib+slackMiB <= available &&
		m.reservedMiB+m.bases.mib()+m.warm.reservedMiB+mib <= m.MemoryMiB
}

// reserve reserves the memory that a sandbox takes.
func (m *Manager) reserve(ctx context.Context, b *box) error {
	return m.whenFewer(ctx, func() error {
		if b.reservedMiB > 0 {
			return nil
		}
		return m.admit(b)
	})
}

// leaves notes that a sandbox is paused, and that what its machine has will be
// free in a moment.
func (m *Manager) leaves(b *box) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leaving[b] = struct{}{}
}

// left notes that it is free, or that it cannot be had so soon.
func (m *Manager) left(b *box) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.leaving[b]; ok {
		delete(m.leaving, b)
		close(m.fewer)
		m.fewer = make(chan struct{})
	}
}

// whenFewer calls f with the lock held; again, when the host had no room, each
// time that a machine has ended which was about to.
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

// unreserve gives back what was reserved.
func (m *Manager) unreserve(b *box) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reservedMiB -= b.reservedMiB
	b.reservedMiB = 0
	m.warm.look()
}

// remove forgets a sandbox of which nothing is left.
func (m *Manager) remove(b *box) {
	m.unreserve(b)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.nameless, b)
	if m.boxes[b.rec.Spec.ID] == b {
		delete(m.boxes, b.rec.Spec.ID)
	}
}

// isClosed takes no lock, so that it can be called under a box's.
func (m *Manager) isClosed() bool {
	select {
	case <-m.closing:
		return true
	default:
		return false
	}
}

func (m *Manager) find(id uuid.UUID) (*box, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b := m.boxes[id]; b != nil {
		return b, nil
	}
	for _, u := range m.unread {
		if u.sandbox == id || u.sandbox == uuid.Nil {
			return nil, fail(ErrUnread, "this host cannot read all of its sandboxes' records now")
		}
	}
	return nil, fail(ErrNotFound, "no such sandbox on this host")
}

// Incomplete reports whether the host may have sandboxes that List leaves out because
// it cannot read their records now, and returns which. If it cannot tell which, they
// may be any, and which is nil.
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
	b, err := m.find(id)
	if err != nil {
		return Info{}, err
	}
	return b.info(), nil
}

// List describes every sandbox, the oldest first.
func (m *Manager) List() []Info {
	m.mu.Lock()
	boxes := make([]*box, 0, len(m.boxes))
	for _, b := range m.boxes {
		boxes = append(boxes, b)
	}
	m.mu.Unlock()
	list := make([]Info, len(boxes))
	for i, b := range boxes {
		list[i] = b.info()
	}
	slices.SortFunc(list, func(a, b Info) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), slices.Compare(a.ID[:], b.ID[:]))
	})
	return list
}

// Memory is how much of the memory for sandboxes is promised, and how much
// there is, in MiB.
func (m *Manager) Memory() (reserved, total int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reservedMiB + m.bases.mib(), m.MemoryMiB
}

// Waiting returns how many restored machines wait for the next sandboxes.
func (m *Manager) Waiting() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.warm.ready)
}

// Destroy ends a sandbox, also one that is being created, and returns when
// nothing of it is left. That there is none is no error.
func (m *Manager) Destroy(ctx context.Context, id uuid.UUID) error {
	b, err := m.find(id)
	if errors.Is(err, ErrUnread) {
		damaged, e := m.endDamaged(ctx, id)
		if e != nil {
			return e
		}
		if damaged {
			b, err = m.find(id)
		}
	}
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return b.destroy(ctx, "", "it was destroyed")
}

// Terminate pauses every sandbox that runs, and creates and resumes none any
// more. The control plane did not ask for these pauses one by one, so they are
// events. A sandbox that cannot be paused loses its memory and keeps its disk. A machine
// that could not be taken back yet goes on, which is an error.
func (m *Manager) Terminate(ctx context.Context) error {
	m.mu.Lock()
	if m.refuse == nil {
		m.refuse = ErrClosing
	}
	boxes := make([]*box, 0, len(m.boxes))
	for _, b := range m.boxes {
		boxes = append(boxes, b)
	}
	m.warm.shed(0)
	sandboxes := len(boxes)
	for b := range m.nameless {
		boxes = append(boxes, b)
	}
	unread := len(m.unread)
	m.mu.Unlock()
	const reason = "the host was shut down"
	errs := make([]error, len(boxes))
	var g errgroup.Group
	g.SetLimit(2 * runtime.NumCPU())
	for i, b := range boxes {
		g.Go(func() error {
			if i >= sandboxes {
				errs[i] = b.destroy(ctx, "", reason)
			} else {
				errs[i] = b.shutDown(ctx, reason)
			}
			return nil
		})
	}
	_ = g.Wait()
	if unread > 0 {
		errs = append(errs, fmt.Errorf("%d sandboxes are not paused: their records cannot be read, and their machines go on", unread))
	}
	return errors.Join(errs...)
}

// shutDown pauses the sandbox and ends its machine. One that cannot be paused loses its
// memory, and one that is ending ends.
func (b *box) shutDown(ctx context.Context, reason string) error {
	if b.info().State == Starting {
		return b.destroy(ctx, journal.Exited, reason)
	}
	var unsettled error // the sandbox is paused, and something of it refuses to go
	err := b.order(ctx, func(ctx context.Context) error {
		if err := b.pause(ctx, pausedEvent(reason)); err != nil {
			return err
		}
		if !b.settled() { // something of it refused to go before
			unsettled = b.settle(ctx)
		}
		return nil
	})
	var state *StateError
	if err != nil && !errors.As(err, &state) {
		b.log.Error("a sandbox cannot be paused and loses its memory", "error", err)
		err = b.order(ctx, func(ctx context.Context) error {
			b.tracker.Shut()
			if err := b.lose(loss(condition.Killed, reason+", and it could not be paused"), pausedEvent(reason+"; its memory is lost, because it could not be paused")); err != nil {
				b.tracker.Reopen()
				return err
			}
			unsettled = b.settle(ctx)
			return nil
		})
	}
	switch {
	case err == nil:
		return unsettled
	case errors.As(err, &state) && state.State == Stopping:
		return b.destroy(ctx, "", reason) // it may be waiting to be tried again
	case errors.As(err, &state) && state.State == Resuming:
		// An order finds a sandbox so only where the next agent may take it back.
		return fmt.Errorf("sandbox %s is not paused: its machine could not be taken back, and goes on", id.Format(id.Sandbox, b.info().ID))
	}
	return err
}

// Close lets go of sandboxes: those that run go on and are found by the next
// [Recover]; those being created are removed. It returns the network slots
// that are in use.
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
		err = fmt.Errorf("let go of sandboxes: %w", ctx.Err())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.boxes {
		b.mu.Lock()
		switch {
		case b.slot != nil:
			slots = append(slots, b.slot.Index())
		case b.kept:
			slots = append(slots, *b.rec.Slot)
		}
		b.mu.Unlock()
	}
	slices.Sort(slots)
	return slots, err
}

// Use is one use of a running sandbox. While there is one the sandbox does not
// expire.
type Use struct {
	Info
	// Context ends with the caller's, or when the sandbox ends; its cause says why.
	Context context.Context
	// Guest talks to the guest daemon.
	Guest *guest.Client
	// Address is where the host reaches the guest.
	Address netip.Addr
	// Transport carries HTTP to the guest and nowhere else.
	Transport http.RoundTripper
	// VM is the sandbox's machine.
	VM vmm.VM
	// Silent is what Silence calls; nil: the guest answers.
	Silent func() error
	// Leave is what End calls.
	Leave func()
}

// End ends the use. It can be called again.
func (u *Use) End() { u.Leave() }

// Silence says to clients that the sandbox's guest does not answer; nil: it does, as far
// as is known.
func (u *Use) Silence() error {
	if u.Silent == nil {
		return nil
	}
	return u.Silent()
}

// Use begins a use of a sandbox; the caller calls End.
func (m *Manager) Use(ctx context.Context, id uuid.UUID) (*Use, error) {
	b, err := m.find(id)
	if err != nil {
		return nil, err
	}
	// Its guest closes all connections when it is taken back.
	if b.taken != nil {
		select {
		case <-b.taken:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	leave, ok := b.tracker.Enter()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !ok || b.rec.State != Running {
		if ok {
			leave()
		}
		switch {
		case b.stopping():
			return nil, &StateError{Stopping}
		case b.rec.State != Running:
			return nil, &StateError{b.rec.State}
		case m.isClosed():
			return nil, ErrClosing
		}
		return nil, &StateError{Stopping} // it expires
	}
	ctx, cancel := context.WithCancelCause(ctx)
	life := b.life
	stop := context.AfterFunc(life, func() { cancel(context.Cause(life)) })
	return &Use{
		Info: b.infoLocked(), Context: ctx, Guest: b.guest, Address: b.slot.Address(), Transport: b.transport, VM: b.vm, Silent: b.silence,
		Leave: sync.OnceFunc(func() {
			stop()
			cancel(context.Canceled)
			leave()
		}),
	}, nil
}

// Console is the end of what a sandbox's guest printed on its serial console,
// also while it starts.
func (m *Manager) Console(ctx context.Context, id uuid.UUID) ([]byte, error) {
	b, err := m.find(id)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	vm := b.vm
	b.mu.Unlock()
	if vm == nil {
		return nil, &StateError{b.info().State}
	}
	return vm.Console(ctx)
}

// ended is the cause with which uses of a sandbox that ends are cancelled.
func ended(why string) error { return fail(ErrState, "the sandbox has ended: %s", why) }
