// Package network prepares networks for guests. Each slot is a namespace with a tap device
// for the guest, a veth to the host, and rules that let the guest reach the internet, but no
// private network.
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
	// ErrExhausted means that all slots of the agent are in use.
	ErrExhausted = errors.New("no network slot is free")
	// ErrClosed means that the pool is closed.
	ErrClosed = errors.New("the network pool is closed")
)

// Config configures a [Pool].
type Config struct {
	// Dir is the data directory of the agent that owns the pool.
	Dir layout.Dir
	// Ready is the number of slots to keep prepared (0: 4).
	Ready int
	// Unknown says that VMs in unknown slots may run. The pool then removes no slot with a
	// process in its namespace.
	Unknown bool
	// Upstreams are the IPv4 DNS resolvers for guests (empty: those of [Upstreams]).
	Upstreams []netip.Addr
	// Guests is the maximum number of guests at once (0: one per slot). They share this
	// agent's part of half of the connections that the machine can track.
	Guests int
	// Rates limit each guest's network, unless [Slot.Limit] sets others.
	Rates rates.Rates
	// Problems receives problems of the machine's network that the pool cannot repair. It
	// may be nil.
	Problems *problem.List
	// Log is the logger (nil: slog's default).
	Log *slog.Logger
}

// A Pool owns one block of slots and everything that belongs to them on this
// machine.
type Pool struct {
	config Config
	log    *slog.Logger
	block  *block
	host   *netlink.Handle // in the host's namespace, whatever the caller's

	wake   chan struct{} // the refiller may have something to do
	cancel context.CancelFunc
	refill sync.WaitGroup
	guard  *guard
	// connections is the number of connections that a guest may have tracked at once.
	connections atomic.Uint32
	// Only the guard uses these while it runs.
	rules  string   // the fingerprint of the block's table on the host
	docker bool     // the guard added rules for Docker
	wasOff bool     // an agent turned IP forwarding on
	before []string // linksBefore
	probed sync.Once
	forgetter

	// A slot's lock is locked before mu, except that of a slot that nobody else knows yet.
	mu     sync.Mutex
	closed bool
	free   []int             // indexes of slots that do not exist, longest unused first
	ready  []*Slot           // prepared, unused
	used   map[int]*Slot     // acquired; nil for a kept slot that is not reclaimed yet
	aside  map[int]*attempts // slots that could not be removed, by index
	linked map[int]*Slot     // prepared and acquired slots, by the index of their host link
}

// attempts schedules attempts to remove a slot.
type attempts struct {
	waits *backoff.Backoff
	next  time.Time
}

const (
	// firstAttempt and lastAttempt are the bounds of the backoff between attempts to remove
	// a slot.
	firstAttempt = time.Second
	lastAttempt  = time.Minute
)

// Share returns the number of the pool's block, and the number of slots in it.
func (p *Pool) Share() (block, slots int) { return p.block.number, blockSlots }

// Open takes a block of slots for c.Dir, removes the slots that an earlier agent left in it,
// except those in keep, whose VMs still run, and starts to prepare slots. If a slot in keep
// is not of the block, Reclaim returns an error for it.
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
	// A VM whose record names a slot of another block may be in any slot.
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

// indexes yields the slots of the pool's block.
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
	if err := noteForwarding(p.host); err != nil {
		return err
	}
	// The rules first, so that no slot is without them.
	if err := p.writeRules(); err != nil {
		return err
	}
	// After the rules, because they make the kernel track connections, and only then it has
	// a maximum.
	p.connections.Store(shareOfConnections(p.config.Guests, agents()))
	for i := range p.used {
		if err := adoptNamespace(i); err != nil {
			p.log.WarnContext(ctx, "cannot adopt a network namespace of an earlier release", "slot", i, "error", err)
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

// adoptNamespace moves the name that an earlier release gave to a slot's namespace to the
// present folder.
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

// nameForEarlier gives a slot's namespace a name in the earlier release's folder, in case
// the next agent is of that release. adoptNamespace removes it.
func nameForEarlier(i int) error {
	ns, err := openNamespace(layout.Namespace(i))
	if err != nil {
		return ignore(err, os.ErrNotExist)
	}
	defer ns.Close()
	if err := os.MkdirAll(layout.OldNamespaces, 0o755); err != nil {
		return fmt.Errorf("make folder of namespaces: %w", err)
	}
	return nameNamespace(ns, oldNamespace(i))
}

// removeStale removes slots of the pool's block that an earlier agent left and that are not
// in use.
func (p *Pool) removeStale(ctx context.Context) error {
	found := map[int]bool{}
	add := func(i int) {
		if _, kept := p.used[i]; i/blockSlots == p.block.number && !kept {
			found[i] = true
		}
	}
	links, err := listLinks(p.host)
	if err != nil {
		return fmt.Errorf("cannot find the network slots that an earlier agent left: %w", err)
	}
	for _, l := range links {
		if i, ok := linkSlot(l.Attrs().Name); ok {
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

// spare removes slots that have processes from stale, and keeps them as used.
func (p *Pool) spare(stale map[int]bool) error {
	inside, err := inhabited()
	if err != nil {
		return err
	}
	for i := range stale {
		if !inside.has(layout.Namespace(i)) {
			continue
		}
		p.log.Warn("keeping a network slot that no known machine uses, because it has a process", "slot", i)
		delete(stale, i)
		p.mu.Lock()
		p.used[i] = nil
		p.free = slices.DeleteFunc(p.free, func(f int) bool { return f == i })
		p.mu.Unlock()
	}
	return nil
}

// listLinks returns the links in the namespace of h.
func listLinks(h *netlink.Handle) ([]netlink.Link, error) {
	// The kernel interrupts the dump if others add or remove links.
	for range 20 {
		links, err := h.LinkList()
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
		return links, nil
	}
	return nil, fmt.Errorf("list links: %w", netlink.ErrDumpInterrupted)
}

// destroyAll removes slots in parallel, because a removal mostly waits. It returns the
// errors by slot.
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

// discard removes unused slots and frees their indexes. It sets aside those that it cannot
// remove, and retry tries them again.
func (p *Pool) discard(indexes ...int) {
	failed := p.destroyAll(indexes)
	for _, i := range indexes {
		err := failed[i]
		if err != nil {
			err = fmt.Errorf("cannot remove network slot %d; the agent retries: %w", i, err)
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
		p.guard.notice(func(*look) {}) // so that it waits for the next attempt
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

// Acquire returns a fresh slot with running services. The caller must Release it.
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
	s.mu.Lock() // so that tearDown waits until the slot is prepared
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

// prepare makes a slot. After an error, nothing of it is left. The caller holds the slot's
// lock, or nobody else knows the slot.
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

// adopt opens an existing slot's namespace, finds its links, and adds it to linked. The
// caller holds the slot's lock, or nobody else knows the slot.
func (p *Pool) adopt(s *Slot) (err error) {
	if s.ns, err = openNamespace(s.NetNS()); err != nil {
		return err
	}
	// By index, because somebody may have renamed the host's end.
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

// drop ends a slot's services and removes it. The caller holds the slot's lock.
func (p *Pool) drop(s *Slot) {
	p.silence(s)
	p.discard(s.Index)
}

// silence ends a slot's services, but leaves it to its VM. The caller holds the slot's lock.
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

// Reclaim adopts a slot that [Open] kept, and starts its services. If the namespace's name
// is lost, Reclaim restores it from the process pid of the VM. After an error, the slot
// stays kept, and the caller can try again. A broken veth is a problem, but not an error.
func (p *Pool) Reclaim(ctx context.Context, index, pid int) (*Slot, error) {
	p.mu.Lock()
	held, kept := p.used[index]
	if p.closed || !kept || held != nil {
		p.mu.Unlock()
		if p.closed {
			return nil, ErrClosed
		}
		return nil, fmt.Errorf("slot %d is not a slot that this agent keeps", index)
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
		// Not an error: without network, the VM still has its memory, and the guard retries.
		repaired, broken := p.mendLink(s)
		p.mended(s, repaired, broken)
		err = s.serve(ctx)
	}
	if err != nil {
		p.silence(s)
		p.mu.Lock()
		p.used[index] = nil
		p.mu.Unlock()
		return nil, fmt.Errorf("reclaim slot %d: %w", index, err)
	}
	return s, nil
}

// Forget removes a slot that [Open] kept and nobody reclaimed. Its VM must have ended. It
// does nothing for other slots.
func (p *Pool) Forget(index int) {
	p.mu.Lock()
	held, kept := p.used[index]
	p.mu.Unlock()
	if kept && held == nil {
		p.discard(index)
		p.refillSoon()
	}
}

// rename restores the name of a slot's namespace, if pid is a process in it.
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
	p.config.Problems.Repaired(problem.Slot, strconv.Itoa(s.Index), "its namespace had no name")
	return nil
}

// Release removes a slot, whose VM must have ended, and prepares a fresh one in its place.
// If it cannot remove the slot, it sets it aside and retries later. It is idempotent.
func (p *Pool) Release(_ context.Context, s *Slot) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.mu.Lock()
	mine := p.used[s.Index] == s
	p.mu.Unlock()
	if mine && !s.down { // otherwise it was released before
		p.drop(s)
		p.refillSoon()
	}
	return nil
}

// Close ends all services and removes all slots except those in keep, whose VMs keep
// running. If it keeps none, it removes the rules and the block too.
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
		p.guard.close() // first, because it would repair what tearDown removes
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
			p.log.Warn("cannot find processes; network slots of unknown machines may be removed", "error", err)
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
	// The block's next agent removes what is left.
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
	default: // a refill is pending already
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

// prepareOne prepares a slot, if there are too few, and reports whether to continue.
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
		// No retry: the next Acquire without a prepared slot tries again.
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
