// Package network prepares networks for guests: each slot is a namespace with
// a tap device for the guest, a veth to the host, and rules that let the guest
// reach the internet and nothing nearer.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

var (
	// ErrExhausted says that every slot of the agent is in use.
	ErrExhausted = errors.New("no network slot is free")
	// ErrClosed says that the pool was closed.
	ErrClosed = errors.New("the network pool is closed")
)

// Config is how a pool is opened.
type Config struct {
	// Dir is the installation whose agent owns the pool.
	Dir layout.Dir
	// Ready is the number of slots kept prepared; 4 when it is 0.
	Ready int
	// Unknown says that VMs may run whose slots are not known: then a slot is not
	// removed while a process is in its namespace.
	Unknown bool
	// Upstreams are the IPv4 DNS resolvers for guests, usually [Upstreams]();
	// that is taken when there are none.
	Upstreams []netip.Addr
	// Guests is how many guests there can be at once, who share this agent's part of
	// half of the connections that the machine tracks; 0: one a slot.
	Guests int
	// Rates limit each guest's network, unless [Slot.Limit] sets others.
	Rates rates.Rates
	// Problems gets what is wrong with the machine's network and cannot be
	// repaired; it may be nil.
	Problems *problem.List
	// Log is slog's default when it is nil.
	Log *slog.Logger
}

// A Pool owns one block of slots and everything that belongs to them on this
// machine.
type Pool struct {
	config Config
	log    *slog.Logger
	block  *block
	host   *netlink.Handle // in the host's namespace, whoever calls

	wake   chan struct{} // the refiller may have something to do
	cancel context.CancelFunc
	refill sync.WaitGroup
	guard  *guard
	// connections is how many a guest may have tracked at once. The guard sets it.
	connections atomic.Uint32
	rules       string   // the fingerprint of the block's table on the host
	docker      bool     // rules for Docker were added; the guard's alone until it is closed
	wasOff      bool     // an agent turned IP forwarding on; the guard's alone
	before      []string // the links that were there then; the guard's alone
	probed      sync.Once
	forgetter

	// Where both are held, a slot's lock is taken before mu, but for that of a
	// slot that nobody else knows yet.
	mu     sync.Mutex
	closed bool
	free   []int             // indexes of slots that do not exist, longest unused first
	ready  []*Slot           // prepared, unused
	used   map[int]*Slot     // acquired; nil for one kept and not reclaimed
	aside  map[int]*attempts // indexes of slots that could not be removed
	linked map[int]*Slot     // slots that are whole, by their link's index on the host
}

// attempts are those to remove a slot.
type attempts struct {
	waits *backoff.Backoff
	next  time.Time
}

const (
	// firstAttempt and lastAttempt are how long a slot that could not be removed is
	// left alone after the first attempt, and after many.
	firstAttempt = time.Second
	lastAttempt  = time.Minute
)

// Share is which of the machine's blocks of slots is the pool's, and how many
// slots are in it.
func (p *Pool) Share() (block, slots int) { return p.block.number, blockSlots }

// Open takes a block of slots for c.Dir, removes what an earlier agent left of
// it except the slots in keep, whose VMs still run, and starts to prepare
// slots. A slot in keep that cannot be the pool's is for Reclaim to report.
func Open(ctx context.Context, c Config, keep []int) (*Pool, error) {
	if c.Ready == 0 {
		c.Ready = 4
	}
	if err := c.Rates.Check(); err != nil {
		return nil, fmt.Errorf("open network pool: %w", err)
	}
	if len(c.Upstreams) == 0 {
		c.Upstreams = Upstreams()
	}
	own := ownAddresses()
	for _, u := range c.Upstreams {
		if !usableUpstream(u) || slices.Contains(own, u) {
			return nil, fmt.Errorf("DNS resolver %s: guests need an IPv4 address that is not this machine's own", u)
		}
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}

	b, err := takeBlock(c.Dir, keep)
	if err != nil {
		return nil, fmt.Errorf("take a block of network slots: %w", err)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open netlink: %w", err), b.leave(len(keep) > 0))
	}
	p := &Pool{config: c, log: c.Log, block: b, host: h, wake: make(chan struct{}, 1), used: map[int]*Slot{}, aside: map[int]*attempts{}, linked: map[int]*Slot{}}
	kept := 0
	for i := range p.indexes() {
		if slices.Contains(keep, i) {
			p.used[i] = nil
			kept++
		} else {
			p.free = append(p.free, i)
		}
	}
	// A VM whose slot cannot be right may be in any.
	p.config.Unknown = c.Unknown || kept < len(keep)
	if err := p.setUp(ctx); err != nil {
		return nil, errors.Join(err, p.tearDown(keep))
	}

	ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	p.refill.Go(func() { p.keepReady(ctx) })
	p.wake <- struct{}{}
	return p, nil
}

func (p *Pool) slotConfig() slotConfig {
	return slotConfig{upstreams: p.config.Upstreams, connections: p.connections.Load(), rates: p.config.Rates}
}

// indexes are the slots of the pool's block.
func (p *Pool) indexes() func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for i := range blockSlots {
			if !yield(p.block.number*blockSlots + i) {
				return
			}
		}
	}
}

func (p *Pool) setUp(ctx context.Context) error {
	if err := noteForwarding(); err != nil {
		return err
	}
	// The rules first: no slot, not even a kept one, is ever without them.
	if err := p.writeRules(); err != nil {
		return err
	}
	// Not before: the rules make the kernel track, and only then it says how much.
	p.connections.Store(shareOfConnections(p.config.Guests, agents()))
	for i := range p.used {
		if err := adoptNamespace(i); err != nil {
			p.log.WarnContext(ctx, "a network namespace cannot be taken over from an earlier version", "slot", i, "error", err)
		}
	}
	p.judge(problem.Slot, "stale", p.removeStale(ctx))
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := enableForwarding(); err != nil {
		return err
	}
	_, off := os.Stat(layout.Forwarding())
	p.wasOff = off == nil
	var err error
	p.guard, err = newGuard(p)
	return err
}

// adoptNamespace moves the name that an earlier version gave to a slot's
// namespace to where names are now.
func adoptNamespace(i int) error {
	ns, err := openNamespace(oldNamespace(i))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := nameNamespace(ns, layout.Namespace(i)); err != nil {
		return err
	}
	return removeNamespace(oldNamespace(i))
}

// nameForEarlier gives a slot's namespace the name that an agent of the version
// before looks for, in case that is the next one. adoptNamespace takes it away.
func nameForEarlier(i int) error {
	ns, err := openNamespace(layout.Namespace(i))
	if err != nil {
		return ignore(err, os.ErrNotExist) // nothing of it is left
	}
	defer ns.Close()
	if err := os.MkdirAll(layout.OldNamespaces, 0o755); err != nil {
		return fmt.Errorf("make folder of namespaces: %w", err)
	}
	return nameNamespace(ns, oldNamespace(i))
}

// removeStale removes what there is of slots that are not in use.
func (p *Pool) removeStale(ctx context.Context) error {
	found := map[int]bool{}
	add := func(i int) {
		if _, kept := p.used[i]; i/blockSlots == p.block.number && !kept {
			found[i] = true
		}
	}
	links, err := linkNames(p.host)
	if err != nil {
		return fmt.Errorf("network slots that an earlier agent left cannot be looked for: %w", err)
	}
	for _, name := range links {
		if i, ok := linkSlot(name); ok {
			add(i)
		}
	}
	for _, dir := range []string{layout.Namespaces(), layout.OldNamespaces} {
		names, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("list namespaces: %w", err)
		}
		for _, n := range names {
			rest, ok := strings.CutPrefix(n.Name(), strings.TrimSuffix(filepath.Base(layout.Namespace(0)), "0"))
			if i, err := strconv.Atoi(rest); ok && err == nil {
				add(i)
			}
		}
	}
	if p.config.Unknown {
		if err := p.spare(found); err != nil {
			return err
		}
	}
	if len(found) == 0 {
		return nil
	}
	p.log.InfoContext(ctx, "removing network slots that an earlier agent left", "count", len(found))
	if len(p.used) == 0 {
		destroyGroup(p.block.number)
	}
	p.discard(slices.Collect(maps.Keys(found))...)
	return nil
}

// spare keeps those of the stale slots in which processes are, and takes them out
// of stale.
func (p *Pool) spare(stale map[int]bool) error {
	inside, err := inhabited()
	if err != nil {
		return err
	}
	for i := range stale {
		if !inside.has(layout.Namespace(i)) {
			continue
		}
		p.log.Warn("a network slot that no known machine has is kept, because a process is in it", "slot", i)
		delete(stale, i)
		p.mu.Lock()
		p.used[i] = nil
		p.free = slices.DeleteFunc(p.free, func(f int) bool { return f == i })
		p.mu.Unlock()
	}
	return nil
}

func linkNames(h *netlink.Handle) ([]string, error) {
	// A dump during which others add and remove links is incomplete.
	for range 20 {
		links, err := h.LinkList()
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
		names := make([]string, len(links))
		for n, l := range links {
			names[n] = l.Attrs().Name
		}
		return names, nil
	}
	return nil, fmt.Errorf("list links: %w", netlink.ErrDumpInterrupted)
}

// destroyAll removes slots side by side, for most of each removal is waiting. It
// returns an error for each that is still there.
func (p *Pool) destroyAll(indexes []int) map[int]error {
	if len(indexes) == 0 {
		return nil
	}
	var g errgroup.Group
	g.SetLimit(16)
	errs := make([]error, len(indexes))
	for n, i := range indexes {
		g.Go(func() error {
			errs[n] = destroy(p.host, i)
			return nil
		})
	}
	_ = g.Wait()
	p.forget(p.host, indexes...)
	failed := map[int]error{}
	for n, i := range indexes {
		if errs[n] != nil {
			failed[i] = errs[n]
		}
	}
	return failed
}

// discard removes slots that nobody uses any more, and makes their indexes free.
// What cannot be removed is set aside and tried again.
func (p *Pool) discard(indexes ...int) {
	failed := p.destroyAll(indexes)
	for _, i := range indexes {
		err := failed[i]
		if err != nil {
			err = fmt.Errorf("network slot %d cannot be removed; it is set aside and tried again: %w", i, err)
		}
		p.judge(problem.Slot, "remove "+strconv.Itoa(i), err)
		p.mu.Lock()
		delete(p.used, i)
		p.free = slices.DeleteFunc(p.free, func(f int) bool { return f == i })
		if err != nil {
			a := p.aside[i]
			if a == nil {
				a = &attempts{waits: backoff.New(firstAttempt, lastAttempt)}
				p.aside[i] = a
			}
			a.next = time.Now().Add(a.waits.Next())
		} else {
			delete(p.aside, i)
			p.free = append(p.free, i)
		}
		p.mu.Unlock()
	}
	if len(failed) > 0 && p.guard != nil {
		p.guard.notice(func(*look) {}) // it waits for the next attempt
	}
}

// The states of a slot for [Pool.Count]: free ones do not exist yet, ready ones are
// prepared, used ones have a guest, and stuck ones could not be removed.
const (
	slotFree  = "free"
	slotReady = "ready"
	slotUsed  = "used"
	slotStuck = "stuck"
)

// SlotStates returns the states by which [Pool.Count] counts.
func SlotStates() []string { return []string{slotFree, slotReady, slotUsed, slotStuck} }

// Count counts the slots of the pool's block by state.
func (p *Pool) Count() map[string]int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return map[string]int64{slotFree: int64(len(p.free)), slotReady: int64(len(p.ready)), slotUsed: int64(len(p.used)), slotStuck: int64(len(p.aside))}
}

// Acquire hands out a slot that no guest has used; its services run.
func (p *Pool) Acquire(ctx context.Context) (*Slot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p.mu.Lock()
	var s *Slot
	prepared := len(p.ready) > 0
	switch {
	case p.closed:
		p.mu.Unlock()
		return nil, ErrClosed
	case prepared:
		s, p.ready = p.ready[0], p.ready[1:]
	case len(p.free) > 0:
		s, p.free = p.newSlot(p.free[0]), p.free[1:]
	default:
		p.mu.Unlock()
		return nil, ErrExhausted
	}
	p.used[s.Index] = s
	p.mu.Unlock()
	defer p.refillSoon()
	s.mu.Lock() // not to be taken down before it is up
	defer s.mu.Unlock()
	if s.down {
		return nil, ErrClosed
	}

	var err error
	if !prepared {
		err = p.prepare(s)
	}
	if err == nil {
		err = s.serve(ctx)
	}
	if err != nil {
		p.drop(s)
		return nil, err
	}
	return s, nil
}

// prepare makes all there is of a slot, or nothing. The caller holds the slot's
// lock, or is the only one that knows it.
func (p *Pool) prepare(s *Slot) error {
	err := p.create(s.Index)
	if err == nil {
		err = p.adopt(s)
	}
	if err != nil {
		return fmt.Errorf("prepare slot %d: %w", s.Index, err)
	}
	return nil
}

// adopt takes a slot that there is into the pool's care. The caller holds the
// slot's lock, or is the only one that knows it.
func (p *Pool) adopt(s *Slot) (err error) {
	if s.ns, err = openNamespace(s.NetNS()); err != nil {
		return err
	}
	// Its name may have been changed, its index never is.
	err = s.within(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		if _, err := h.LinkByName(tapName); err != nil {
			return fmt.Errorf("find %s: %w", tapName, err)
		}
		veth, err := h.LinkByName(vethName)
		if isMissing(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find %s: %w", vethName, err)
		}
		s.link, s.inner = veth.Attrs().ParentIndex, veth.Attrs().Index
		return nil
	})
	if err != nil {
		return err
	}
	if s.link == 0 {
		return p.rebuild(s) // somebody deleted its veth
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.linked[s.link] = s
	return nil
}

func (p *Pool) create(i int) error {
	if err := create(p.host, i, p.slotConfig()); err != nil {
		return err
	}
	if err := raiseHostLink(p.host, i); err != nil {
		return errors.Join(err, destroy(p.host, i))
	}
	return nil
}

// drop ends a slot and removes it. The caller holds the slot's lock.
func (p *Pool) drop(s *Slot) {
	p.silence(s)
	p.discard(s.Index)
}

// silence ends what the agent does in a slot. The caller holds the slot's lock.
func (p *Pool) silence(s *Slot) {
	s.down = true
	s.silence()
	p.mu.Lock()
	delete(p.linked, s.link)
	p.mu.Unlock()
	if s.ns != nil {
		s.ns.Close()
	}
}

// Reclaim takes back a slot that was given to [Open] to keep, with its
// services. Its name is made again from the network namespace of the process
// pid, its VM's, if it was lost. After an error the slot stays kept, and Reclaim
// can be called again. A veth that cannot be repaired is a problem and no error.
func (p *Pool) Reclaim(ctx context.Context, index, pid int) (*Slot, error) {
	p.mu.Lock()
	held, kept := p.used[index]
	if p.closed || !kept || held != nil {
		p.mu.Unlock()
		if p.closed {
			return nil, ErrClosed
		}
		return nil, fmt.Errorf("slot %d is not one that this agent keeps", index)
	}
	s := p.newSlot(index)
	p.used[index] = s
	p.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return nil, ErrClosed
	}

	err := p.rename(s, pid)
	if err == nil {
		err = p.adopt(s)
	}
	if err == nil {
		err = s.within(func() error { return slotRules(s.Address, s.config, false) })
	}
	if err == nil {
		// A VM without a way out still has its memory, and the guard tries again.
		repaired, broken := p.mendLink(s)
		p.mended(s, repaired, broken)
		err = s.serve(ctx)
	}
	if err != nil {
		p.silence(s)
		p.mu.Lock()
		p.used[index] = nil
		p.mu.Unlock()
		return nil, fmt.Errorf("take back slot %d: %w", index, err)
	}
	return s, nil
}

// Forget removes a slot that was given to [Open] to keep and that nobody has
// reclaimed. Its VM has ended. A slot that the pool does not keep is no error.
func (p *Pool) Forget(index int) {
	p.mu.Lock()
	held, kept := p.used[index]
	p.mu.Unlock()
	if kept && held == nil {
		p.discard(index)
		p.refillSoon()
	}
}

// rename gives the namespace of a slot its name again, if a process in it is
// known.
func (p *Pool) rename(s *Slot, pid int) error {
	ns, err := openNamespace(s.NetNS())
	if err == nil {
		return ns.Close()
	}
	if pid <= 0 {
		return err
	}
	if ns, err = openNamespace(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil {
		return err
	}
	defer ns.Close()
	var own, its unix.Stat_t
	if err := errors.Join(unix.Stat(threadNamespace, &own), unix.Fstat(int(ns.Fd()), &its)); err != nil {
		return err
	}
	if own.Ino == its.Ino {
		return fmt.Errorf("process %d is in the host's network namespace", pid)
	}
	if err := nameNamespace(ns, s.NetNS()); err != nil {
		return err
	}
	p.config.Problems.Repaired(problem.Slot, strconv.Itoa(s.Index), "its namespace had lost its name")
	return nil
}

// Release removes a slot with all that its guest left in it; a fresh one is
// prepared in its place. The guest's VM has ended. What cannot be removed is
// set aside, so that its index is not used, and tried again.
func (p *Pool) Release(_ context.Context, s *Slot) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.mu.Lock()
	mine := p.used[s.Index] == s
	p.mu.Unlock()
	if mine && !s.down { // else it was released before
		p.drop(s)
		p.refillSoon()
	}
	return nil
}

// Close ends all services and removes every slot but those in keep, whose VMs
// go on without the agent. When none is kept nothing of the pool is left.
func (p *Pool) Close(_ context.Context, keep []int) error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	p.refill.Wait()
	return p.tearDown(keep)
}

func (p *Pool) tearDown(keep []int) error {
	if p.guard != nil {
		p.guard.close() // it would repair what is removed
	}
	p.mu.Lock()
	p.closed = true
	var gone []int
	open := p.ready
	for _, s := range p.ready {
		gone = append(gone, s.Index)
	}
	var inside namespaces
	if p.config.Unknown {
		var err error
		if inside, err = inhabited(); err != nil {
			p.log.Warn("network slots of machines that are not known may be removed", "error", err)
		}
	}
	for i, s := range p.used {
		if s != nil {
			open = append(open, s)
		}
		if !slices.Contains(keep, i) && (s != nil || !inside.has(layout.Namespace(i))) {
			gone = append(gone, i)
			delete(p.used, i)
		}
	}
	for i := range p.aside {
		gone = append(gone, i)
	}
	p.ready = nil
	p.mu.Unlock()

	var err error
	for _, s := range open {
		s.mu.Lock()
		if !s.down {
			p.silence(s)
		}
		s.mu.Unlock()
	}
	for i := range p.used {
		err = errors.Join(err, nameForEarlier(i))
	}
	if len(p.used) == 0 && len(gone) > 0 {
		destroyGroup(p.block.number)
	}
	failed := p.destroyAll(gone)
	for _, f := range failed {
		err = errors.Join(err, f)
	}
	// Whoever has the block next removes what is left of it.
	kept := len(p.used)+len(failed) > 0
	if !kept {
		err = errors.Join(err, removeHostRules(p.block.number))
	}
	if p.docker && !kept {
		leaveDocker(context.Background())
	}
	p.host.Close()
	return errors.Join(err, p.block.leave(kept))
}

func (p *Pool) refillSoon() {
	select {
	case p.wake <- struct{}{}:
	default: // it knows
	}
}

// keepReady prepares slots whenever there are too few.
func (p *Pool) keepReady(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		}
		for p.prepareOne(ctx) {
		}
	}
}

// prepareOne prepares a slot and says whether to go on with another.
func (p *Pool) prepareOne(ctx context.Context) bool {
	p.mu.Lock()
	if ctx.Err() != nil || len(p.ready) >= p.config.Ready || len(p.free) == 0 {
		p.mu.Unlock()
		return false
	}
	i := p.free[0]
	p.free = p.free[1:]
	p.mu.Unlock()

	slot := p.newSlot(i)
	if err := p.prepare(slot); err != nil {
		// No retry by itself: whoever needs a slot meets the error.
		p.log.ErrorContext(ctx, "cannot prepare a network slot", "slot", i, "error", err)
		p.drop(slot)
		return false
	}
	p.mu.Lock()
	p.ready = append(p.ready, slot)
	p.mu.Unlock()
	p.probed.Do(func() { p.guard.notice(func(l *look) { l.rules = true }) })
	return true
}
