// Package network prepares networks for guests: each slot is a namespace with
// a tap device for the guest, a veth to the host, and rules that let the guest
// reach the internet and nothing nearer.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/layout"
)

var (
	// ErrExhausted says that every slot of the agent is in use.
	ErrExhausted = errors.New("no network slot is free")
	// ErrGone says that a slot to take back is no longer whole.
	ErrGone = errors.New("the network slot is gone")
	// ErrClosed says that the pool was closed.
	ErrClosed = errors.New("the network pool is closed")
)

// Config is how a pool is opened.
type Config struct {
	// Dir is the installation whose agent owns the pool.
	Dir layout.Dir
	// Ready is the number of slots kept prepared; 4 when it is 0.
	Ready int
	// Upstreams are the IPv4 DNS resolvers for guests, usually [Upstreams]();
	// that is taken when there are none.
	Upstreams []netip.Addr
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
	forgetter

	mu     sync.Mutex
	closed bool
	free   []int         // indexes of slots that do not exist, longest unused first
	ready  []*Slot       // prepared, unused
	used   map[int]*Slot // acquired; nil for one kept and not yet reclaimed
}

// Share is which of the machine's blocks of slots is the pool's, and how many
// slots are in it.
func (p *Pool) Share() (block, slots int) { return p.block.number, blockSlots }

// Open takes a block of slots for c.Dir, removes what an earlier agent left of
// it except the slots in keep, whose VMs still run, and starts to prepare
// slots.
func Open(ctx context.Context, c Config, keep []int) (*Pool, error) {
	if c.Ready == 0 {
		c.Ready = 4
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
	p := &Pool{config: c, log: c.Log, block: b, host: h, wake: make(chan struct{}, 1), used: map[int]*Slot{}}
	for _, i := range keep {
		p.used[i] = nil
	}
	for i := range p.indexes() {
		if _, kept := p.used[i]; !kept {
			p.free = append(p.free, i)
		}
	}
	if err := p.setUp(ctx); err != nil {
		return nil, errors.Join(err, p.tearDown(keep))
	}

	ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	p.refill.Go(func() { p.keepReady(ctx) })
	p.wake <- struct{}{}
	return p, nil
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
	// The rules first: no slot, not even a kept one, is ever without them.
	if err := hostRules(p.block.number, p.config.Upstreams); err != nil {
		return err
	}
	if err := p.removeStale(ctx); err != nil {
		return fmt.Errorf("remove stale slots: %w", err)
	}
	if err := enableForwarding(); err != nil {
		return err
	}
	for _, o := range Obstacles() {
		p.log.WarnContext(ctx, "guests may not reach the internet", "reason", o)
	}
	var err error
	p.guard, err = newGuard(p.host, p.block.number, p.config.Upstreams, p.log)
	return err
}

// removeStale removes what there is of slots that are not in use.
func (p *Pool) removeStale(ctx context.Context) error {
	found := map[int]bool{}
	add := func(name, prefix string) {
		rest, ok := strings.CutPrefix(name, prefix)
		i, err := strconv.Atoi(rest)
		if _, kept := p.used[i]; ok && err == nil && i/blockSlots == p.block.number && !kept {
			found[i] = true
		}
	}
	links, err := linkNames(p.host)
	if err != nil {
		return err
	}
	for _, name := range links {
		add(name, linkPrefix)
	}
	names, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("list namespaces: %w", err)
	}
	for _, n := range names {
		add(n.Name(), namespacePrefix)
	}
	if len(found) == 0 {
		return ctx.Err()
	}
	p.log.InfoContext(ctx, "removing network slots that an earlier agent left", "count", len(found))
	stale := make([]int, 0, len(found))
	for i := range found {
		stale = append(stale, i)
	}
	return p.destroyAll(stale)
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

// destroyAll removes slots side by side: most of each removal is waiting.
func (p *Pool) destroyAll(indexes []int) error {
	if len(indexes) == 0 {
		return nil
	}
	if len(p.used) == 0 {
		destroyGroup(p.block.number)
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
	return errors.Join(errs...)
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
		s, p.free = newSlot(p.free[0]), p.free[1:]
	default:
		p.mu.Unlock()
		return nil, ErrExhausted
	}
	p.used[s.Index] = s
	s.mu.Lock() // not to be taken down before it is up
	p.mu.Unlock()
	defer s.mu.Unlock()
	defer p.refillSoon()

	var err error
	if !prepared {
		err = p.create(s.Index)
	}
	if err == nil {
		if err = s.serve(ctx); err != nil {
			err = errors.Join(err, destroy(p.host, s.Index))
		}
	}
	if err != nil {
		p.giveBack(s)
		return nil, err
	}
	return s, nil
}

func (p *Pool) create(i int) error {
	if err := create(p.host, i, p.config.Upstreams); err != nil {
		return err
	}
	if err := raiseHostLink(p.host, i); err != nil {
		return errors.Join(fmt.Errorf("prepare slot %d: %w", i, err), destroy(p.host, i))
	}
	return nil
}

// giveBack makes a slot that no longer exists free.
func (p *Pool) giveBack(s *Slot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.used[s.Index]; ok {
		delete(p.used, s.Index)
		p.free = append(p.free, s.Index)
	}
}

// Reclaim takes back a slot that was given to [Open] to keep, with its
// services. A slot that is not whole any more is removed: [ErrGone].
func (p *Pool) Reclaim(ctx context.Context, index int) (*Slot, error) {
	p.mu.Lock()
	held, kept := p.used[index]
	if p.closed || !kept || held != nil {
		p.mu.Unlock()
		if p.closed {
			return nil, ErrClosed
		}
		return nil, fmt.Errorf("slot %d is not one to take back", index)
	}
	s := newSlot(index)
	p.used[index] = s
	s.mu.Lock()
	p.mu.Unlock()
	defer s.mu.Unlock()

	err := inNamespace(s.NetNS(), func() error {
		inside, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer inside.Close()
		for _, name := range []string{tapName, vethName} {
			if _, err := inside.LinkByName(name); err != nil {
				return fmt.Errorf("find %s: %w", name, err)
			}
		}
		return slotRules(s.Address, p.config.Upstreams, false)
	})
	if err == nil {
		_, err = p.host.LinkByName(linkName(index))
	}
	if err == nil {
		err = s.serve(ctx)
	}
	if err != nil {
		err = fmt.Errorf("take back slot %d: %w", index, errors.Join(ErrGone, err, destroy(p.host, index)))
		p.giveBack(s)
		p.refillSoon()
		return nil, err
	}
	return s, nil
}

// Release removes a slot with all that its guest left in it; a fresh one is
// prepared in its place. The guest's VM has ended. After an error the slot is
// still taken and Release can be called again.
func (p *Pool) Release(_ context.Context, s *Slot) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.mu.Lock()
	mine := p.used[s.Index] == s
	p.mu.Unlock()
	if !mine {
		return nil // released before
	}
	s.silence()
	if err := destroy(p.host, s.Index); err != nil {
		return fmt.Errorf("release slot %d: %w", s.Index, err)
	}
	p.forget(p.host, s.Index)
	p.giveBack(s)
	p.refillSoon()
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
	p.mu.Lock()
	p.closed = true
	var gone []int
	var silent []*Slot
	for _, s := range p.ready {
		gone = append(gone, s.Index)
	}
	for i, s := range p.used {
		if s != nil {
			silent = append(silent, s)
		}
		if !slices.Contains(keep, i) {
			gone = append(gone, i)
			delete(p.used, i)
		}
	}
	p.ready = nil
	p.mu.Unlock()

	for _, s := range silent {
		s.mu.Lock()
		s.silence()
		s.mu.Unlock()
	}
	err := p.destroyAll(gone)
	kept := len(p.used) > 0
	if p.guard != nil {
		p.guard.close()
	}
	if !kept {
		err = errors.Join(err, removeHostRules(p.block.number))
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

	err := p.create(i)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		// No retry by itself: whoever needs a slot meets the error.
		p.log.ErrorContext(ctx, "cannot prepare a network slot", "slot", i, "error", err)
		p.free = append(p.free, i)
		return false
	}
	p.ready = append(p.ready, newSlot(i))
	return true
}
