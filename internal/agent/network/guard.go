package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mdnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/hostwatch"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

const (
	// pace is the shortest time between two repairs, because another program may undo each
	// at once.
	pace = 250 * time.Millisecond
	// lookAnyway is the time between two checks of everything.
	lookAnyway = 30 * time.Second
)

// A guard notices changes that other software makes to the pool's part of the machine, and
// makes the pool repair them.
type guard struct {
	pool   *Pool
	log    *slog.Logger
	rules  *mdnetlink.Conn // changes of nftables
	routes *mdnetlink.Conn // changes of links, addresses, routes and their settings
	files  *hostwatch.Watch
	blind  sync.Once // logs that folders are not watched

	closing  atomic.Bool
	quit     chan struct{}
	wake     chan struct{}
	watching sync.WaitGroup

	mu   sync.Mutex
	look look
}

// look says what may have changed and needs a check.
type look struct {
	rules, names, settings, allLinks bool
	others                           bool         // links of other software
	links                            map[int]bool // by index
}

func newGuard(p *Pool) (_ *guard, err error) {
	g := &guard{pool: p, log: p.log, quit: make(chan struct{}), wake: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.closeConns())
		}
	}()
	group := func(n uint) uint32 { return 1 << (n - 1) }
	if g.rules, err = mdnetlink.Dial(unix.NETLINK_NETFILTER, &mdnetlink.Config{Groups: group(unix.NFNLGRP_NFTABLES)}); err != nil {
		return nil, fmt.Errorf("watch the host's rules: %w", err)
	}
	g.routes, err = mdnetlink.Dial(unix.NETLINK_ROUTE, &mdnetlink.Config{
		Groups: group(unix.RTNLGRP_LINK) | group(unix.RTNLGRP_IPV4_IFADDR) | group(unix.RTNLGRP_IPV4_ROUTE) | group(unix.RTNLGRP_IPV4_NETCONF),
	})
	if err != nil {
		return nil, fmt.Errorf("watch the host's links: %w", err)
	}
	if g.files, err = hostwatch.Open(true, func() { g.notice(func(l *look) { l.names = true }) }); err != nil {
		return nil, err
	}
	g.watchFolders()
	g.watching.Go(func() { g.receive(g.rules, g.hearRules) })
	g.watching.Go(func() { g.receive(g.routes, g.hearRoutes) })
	g.watching.Go(g.run)
	return g, nil
}

// watchFolders watches the folders, which mend has made again if somebody removed them.
func (g *guard) watchFolders() {
	for _, dir := range []string{layout.Machine, layout.NetworkBlocks(), layout.Namespaces(), g.pool.config.Dir.Run()} {
		err := g.files.Add(dir)
		if errors.Is(err, hostwatch.ErrExhausted) {
			g.blind.Do(func() { g.log.Warn("cannot watch folders; checking them twice a minute", "error", err) })
			return
		}
		if err != nil {
			g.log.Warn("cannot watch a folder; the regular check covers it", "folder", dir, "error", err)
		}
	}
}

// close ends the guard, which would otherwise repair what the pool removes.
func (g *guard) close() {
	if g.closing.Swap(true) {
		return
	}
	close(g.quit)
	err := g.closeConns()
	g.watching.Wait()
	// Last, because run adds folders to it, and its descriptor could be reused.
	if err := errors.Join(err, g.files.Close()); err != nil {
		g.log.Warn("cannot close the watch of the network", "error", err)
	}
}

func (g *guard) closeConns() error {
	var errs []error
	for _, c := range []*mdnetlink.Conn{g.rules, g.routes} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// notice makes the guard check what change sets.
func (g *guard) notice(change func(*look)) {
	g.mu.Lock()
	change(&g.look)
	g.mu.Unlock()
	select {
	case g.wake <- struct{}{}:
	default: // a check is pending already
	}
}

// receive passes the messages of a connection to hear. It passes nil after an overflow, when
// anything may have changed.
func (g *guard) receive(c *mdnetlink.Conn, hear func([]mdnetlink.Message)) {
	for {
		messages, err := c.Receive()
		switch {
		case g.closing.Load():
			return
		case errors.Is(err, unix.ENOBUFS):
			hear(nil)
		case err != nil:
			g.log.Error("cannot watch the host's network; the regular check covers it", "error", err)
			return
		default:
			hear(messages)
		}
	}
}

func (g *guard) hearRules([]mdnetlink.Message) { g.notice(func(l *look) { l.rules = true }) }

// hearRoutes notices changes of the pool's links and of settings for all links, and that
// there may be new other links.
func (g *guard) hearRoutes(messages []mdnetlink.Message) {
	if messages == nil {
		g.notice(func(l *look) { l.allLinks, l.settings, l.others = true, true, true })
	}
	for _, m := range messages {
		index, ok := subject(m)
		switch {
		case !ok:
		case index < 0:
			g.notice(func(l *look) { l.settings = true })
		case g.pool.slotOf(index) != nil:
			g.notice(func(l *look) {
				if l.links == nil {
					l.links = map[int]bool{}
				}
				l.links[index] = true
			})
		case m.Header.Type == unix.RTM_NEWLINK && !strings.HasPrefix(nameOf(m), linkPrefix):
			g.notice(func(l *look) { l.others = true })
		}
	}
}

// subject returns the index of the link that a route netlink message concerns. The index is
// negative for settings of all links.
func subject(m mdnetlink.Message) (index int, ok bool) {
	var header, attribute int
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK, unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(m.Data) < 8 {
			return 0, false
		}
		return int(int32(binary.NativeEndian.Uint32(m.Data[4:]))), true
	case unix.RTM_DELROUTE:
		header, attribute = unix.SizeofRtMsg, unix.RTA_OIF
	case unix.RTM_NEWNETCONF:
		header, attribute = 4, 1 // NETCONFA_IFINDEX
	default:
		return 0, false
	}
	if len(m.Data) < header {
		return 0, false
	}
	d, err := mdnetlink.NewAttributeDecoder(m.Data[header:])
	if err != nil {
		return 0, false
	}
	for d.Next() {
		if d.Type() == uint16(attribute) {
			index, ok = int(int32(d.Uint32())), true
		}
	}
	return index, ok && d.Err() == nil
}

// nameOf returns the name in a message about a link.
func nameOf(m mdnetlink.Message) string {
	if len(m.Data) < unix.SizeofIfInfomsg {
		return ""
	}
	d, err := mdnetlink.NewAttributeDecoder(m.Data[unix.SizeofIfInfomsg:])
	if err != nil {
		return ""
	}
	for d.Next() {
		if d.Type() == unix.IFLA_IFNAME {
			return d.String()
		}
	}
	return ""
}

// run makes the pool check and repair whenever something was noticed.
func (g *guard) run() {
	tick := time.NewTicker(lookAnyway)
	defer tick.Stop()
	all := look{rules: true, names: true, settings: true, allLinks: true, others: true}
	next := all
	for {
		g.pool.mend(next)
		if next.names {
			g.watchFolders()
		}
		select {
		case <-g.quit:
			return
		case <-time.After(pace):
		}
		var again <-chan time.Time
		if at := g.pool.nextAttempt(); !at.IsZero() {
			again = time.After(time.Until(at))
		}
		select {
		case <-g.quit:
			return
		case <-again:
			next = look{}
		case <-tick.C:
			next = all
		case <-g.wake:
			g.mu.Lock()
			next, g.look = g.look, look{}
			g.mu.Unlock()
		}
	}
}

// mend checks what may have changed, and repairs it. It reports what it cannot repair as a
// problem, until a later check succeeds.
func (p *Pool) mend(l look) {
	if l.rules {
		p.judge(problem.Firewall, "rules", p.mendRules())
	}
	if l.settings || l.others {
		p.judge(problem.Forwarding, "", p.mendForwarding())
	}
	if l.names {
		p.judge(problem.Files, "network", p.mendFiles())
		p.judge(problem.Firewall, "share", p.mendShares())
	}
	p.mendSlots(l)
	if l.rules || l.settings || l.allLinks {
		p.judge(problem.Firewall, "", p.mendPassage())
		p.judge(problem.Firewall, "host", p.probeInside())
	}
	p.retry()
}

// judge reports err as a problem, or clears the problem if err is nil.
func (p *Pool) judge(k problem.Kind, object string, err error) {
	if err != nil {
		p.config.Problems.Report(k, object, err.Error())
		return
	}
	p.config.Problems.Clear(k, object)
}

// nextAttempt returns the time of the next attempt to remove a slot that was set aside, or
// zero if there is none.
func (p *Pool) nextAttempt() (at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.aside {
		if at.IsZero() || a.next.Before(at) {
			at = a.next
		}
	}
	return at
}

// retry tries again to remove the slots that were set aside, if their next attempt is due.
func (p *Pool) retry() {
	p.mu.Lock()
	var aside []int
	for i, a := range p.aside {
		if !a.next.After(time.Now()) {
			aside = append(aside, i)
		}
	}
	p.mu.Unlock()
	if len(aside) > 0 {
		p.discard(aside...)
		p.refillSoon()
	}
}
