package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/thread"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// fingerprint describes the rules of a table in the calling thread's namespace, so that
// they can be compared. It is empty if there is no such table.
func fingerprint(name string) (string, error) {
	conn, err := nftables.New()
	if err != nil {
		return "", fmt.Errorf("open nftables: %w", err)
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return "", fmt.Errorf("list chains: %w", err)
	}
	var b strings.Builder
	for _, c := range chains {
		if c.Table.Name != name {
			continue
		}
		fmt.Fprintf(&b, "chain %s %s", c.Name, c.Type)
		if c.Hooknum != nil && c.Priority != nil && c.Policy != nil {
			fmt.Fprintf(&b, " %d %d %d", *c.Hooknum, *c.Priority, *c.Policy)
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return "", fmt.Errorf("list rules of %s: %w", c.Name, err)
		}
		for _, r := range rules {
			b.WriteString("\nrule")
			for _, e := range r.Exprs {
				if _, counts := e.(*expr.Counter); counts {
					e = &expr.Counter{}
				}
				fmt.Fprintf(&b, " %T%+v", e, reflect.Indirect(reflect.ValueOf(e)))
			}
		}
		b.WriteString("\n")
	}
	if b.Len() == 0 {
		return "", nil
	}
	sets, err := conn.GetSets(&nftables.Table{Name: name, Family: nftables.TableFamilyINet})
	if err != nil {
		return "", fmt.Errorf("list sets: %w", err)
	}
	for _, s := range sets {
		elements, err := conn.GetSetElements(s)
		if err != nil {
			return "", fmt.Errorf("list elements of %s: %w", s.Name, err)
		}
		if !s.Interval { // the kernel lists these in any order
			slices.SortFunc(elements, func(x, y nftables.SetElement) int { return bytes.Compare(x.Key, y.Key) })
		}
		fmt.Fprintf(&b, "set %s", s.Name)
		for _, e := range elements {
			fmt.Fprintf(&b, " %x %v", e.Key, e.IntervalEnd)
		}
	}
	return b.String(), nil
}

// wantedRules returns the fingerprint that a block's rules must have. To compute it, it
// writes the rules in a new network namespace.
func wantedRules(block int, upstreams []netip.Addr) (want string, err error) {
	err = thread.Own(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make namespace: %w", err)
		}
		if err := hostRules(block, upstreams); err != nil {
			return err
		}
		var err error
		want, err = fingerprint(hostTable(block))
		return err
	})
	return want, err
}

// mendRules writes the host's rules again if somebody changed them.
func (p *Pool) mendRules() error {
	table := hostTable(p.block.number)
	var have string
	var err error
	for range 10 { // it fails if others change the rules during the call
		if have, err = fingerprint(table); err == nil {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("cannot read the firewall's rules for guests: %w", err)
	}
	if have == p.rules {
		return nil
	}
	if err := p.writeRules(); err != nil {
		return fmt.Errorf("cannot restore the firewall's rules for guests, which have no internet: %w", err)
	}
	_, _ = p.host.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, bare(blockPrefix(p.block.number)))
	p.config.Problems.Repaired(problem.Firewall, "rules", "somebody removed or changed the firewall's table "+table)
	return nil
}

// bare matches connections that guests of a block opened while no rule translated their
// addresses. After their removal, the kernel tracks and translates them anew.
type bare netip.Prefix

// MatchConntrackFlow implements [netlink.CustomConntrackFilter].
func (b bare) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	src, _ := netip.AddrFromSlice(f.Forward.SrcIP)
	src = src.Unmap()
	// The even addresses are the host's ends.
	return netip.Prefix(b).Contains(src) && src.As4()[3]%2 == 1 && f.Forward.SrcIP.Equal(f.Reverse.DstIP)
}

// writeRules writes the block's table, and records its fingerprint for later checks.
func (p *Pool) writeRules() error {
	if err := hostRules(p.block.number, p.config.Upstreams); err != nil {
		return err
	}
	var err error
	if p.rules, err = wantedRules(p.block.number, p.config.Upstreams); err != nil {
		return fmt.Errorf("write rules for comparison: %w", err)
	}
	p.before, err = linksBefore()
	return err
}

// mendForwarding turns IP forwarding on again.
func (p *Pool) mendForwarding() error {
	err := noteForwarding(p.host)
	changed := false
	if err == nil {
		changed, err = enableForwarding()
	}
	p.wasOff = p.wasOff || changed
	if err != nil {
		return fmt.Errorf("cannot turn IP forwarding on; guests have no internet: %w", err)
	}
	if links, err := linksBefore(); err == nil && !slices.Equal(links, p.before) {
		if err := p.writeRules(); err != nil {
			return fmt.Errorf("cannot update the firewall's rules; this machine may forward packets between its other links: %w", err)
		}
	}
	if changed {
		p.config.Problems.Repaired(problem.Forwarding, "", "somebody turned IP forwarding off (sysctl net.ipv4.ip_forward)")
	}
	return nil
}

// mendFiles restores files in /run that others may have removed: the folder of namespaces
// and the files of the block.
func (p *Pool) mendFiles() error {
	all, err := lockBlocks()
	if err != nil {
		return fmt.Errorf("cannot restore %s: %w", layout.NetworkBlocks(), err)
	}
	defer all.Close()
	if p.block.left {
		return nil
	}
	if !isMountPoint(layout.Namespaces()) {
		if err := shareNamespaces(); err != nil {
			return fmt.Errorf("cannot restore %s; a restart of the agent would lose running sandboxes: %w", layout.Namespaces(), err)
		}
		p.config.Problems.Repaired(problem.Files, "network", "somebody removed or unmounted "+layout.Namespaces())
	}
	if _, err := os.Stat(layout.Forwarding()); errors.Is(err, os.ErrNotExist) && p.wasOff {
		if err := writeLinksBefore(p.before); err != nil {
			return fmt.Errorf("cannot restore %s; IP forwarding will stay on after the agent: %w", layout.Forwarding(), err)
		}
	}
	lost, err := p.block.restore()
	if err != nil {
		return fmt.Errorf("cannot restore the files of network block %d, which another agent on this machine could take: %w", p.block.number, err)
	}
	if lost {
		p.config.Problems.Repaired(problem.Files, "network", fmt.Sprintf("somebody removed the files of network block %d", p.block.number))
	}
	return nil
}

// mendShares updates each guest's share of the machine's tracked connections, which depends
// on the number of agents.
func (p *Pool) mendShares() error {
	share := shareOfConnections(p.config.Guests, agents())
	p.connections.Store(share)
	p.mu.Lock()
	slots := slices.Collect(maps.Values(p.linked))
	p.mu.Unlock()
	var errs []error
	for _, s := range slots {
		s.mu.Lock()
		if next := s.config; !s.down {
			next.connections = share
			errs = append(errs, s.configure(next))
		}
		s.mu.Unlock()
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cannot update guests' shares of the machine's tracked connections to its number of agents: %w", err)
	}
	return nil
}

// slotOf returns the slot whose host link has the index, or nil.
func (p *Pool) slotOf(link int) *Slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.linked[link]
}

// mendSlots checks and repairs the names and links of slots that may have changed.
func (p *Pool) mendSlots(l look) {
	p.mu.Lock()
	slots := maps.Clone(p.linked)
	p.mu.Unlock()
	for _, index := range slices.Sorted(maps.Keys(slots)) {
		s := slots[index]
		var repaired []string
		var errs []error
		mend := func(f func(*Slot) ([]string, error)) {
			did, err := f(s)
			repaired = append(repaired, did...)
			errs = append(errs, err)
		}
		s.mu.Lock()
		if s.down {
			s.mu.Unlock()
			continue
		}
		looked := false
		if l.names {
			mend(p.mendName)
			looked = true
		}
		if l.allLinks || l.links[index] {
			mend(p.mendLink)
			looked = true
		}
		s.mu.Unlock()
		if !looked {
			continue
		}
		p.mended(s, repaired, errors.Join(errs...))
	}
}

// mended logs the repairs of a slot, and reports err as its problem.
func (p *Pool) mended(s *Slot, repaired []string, err error) {
	object := strconv.Itoa(s.Index)
	if len(repaired) > 0 {
		p.config.Problems.Repaired(problem.Slot, object, strings.Join(repaired, ", "))
	}
	if err != nil {
		err = fmt.Errorf("cannot repair network slot %d, whose sandbox has no network: %w", s.Index, err)
	}
	p.judge(problem.Slot, object, err)
}

// mendName restores the name of the slot's namespace.
func (p *Pool) mendName(s *Slot) ([]string, error) {
	if isNamespace(s.ns, s.NetNS()) {
		return nil, nil
	}
	if err := nameNamespace(s.ns, s.NetNS()); err != nil {
		return nil, err
	}
	return []string{"its namespace had no name"}, nil
}

// mendLink restores the host's end of the slot's veth. The caller holds the slot's lock.
func (p *Pool) mendLink(s *Slot) (repaired []string, err error) {
	did := func(what string) { repaired = append(repaired, what) }
	name, h := linkName(s.Index), p.host
	link, err := h.LinkByIndex(s.link)
	if isMissing(err) || err == nil && (link.Type() != "veth" || link.Attrs().ParentIndex != s.inner) {
		// Somebody deleted it or moved it to another network namespace.
		if err := p.rebuild(s); err != nil {
			return nil, fmt.Errorf("make a new veth: %w", err)
		}
		return []string{"its veth was gone"}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find veth: %w", err)
	}
	attrs := link.Attrs()
	if attrs.Name != name {
		// Older kernels cannot rename a link that is up.
		err := h.LinkSetDown(link)
		if err == nil {
			err = h.LinkSetName(link, name)
		}
		if err != nil {
			return repaired, fmt.Errorf("rename %s to %s: %w", attrs.Name, name, err)
		}
		did("its veth was renamed to " + attrs.Name)
		attrs.Flags &^= net.FlagUp
	}
	if group := linkGroup(s.Index / blockSlots); attrs.Group != group {
		if err := h.LinkSetGroup(link, int(group)); err != nil {
			return repaired, fmt.Errorf("set group: %w", err)
		}
		did("its veth was in another group")
	}
	if attrs.MasterIndex != 0 {
		if err := h.LinkSetNoMaster(link); err != nil {
			return repaired, fmt.Errorf("take out of bridge: %w", err)
		}
		did("its veth was in a bridge")
	}
	addrs, err := h.AddrList(link, unix.AF_INET)
	if err != nil {
		return repaired, fmt.Errorf("list addresses: %w", err)
	}
	own := netip.PrefixFrom(hostAddr(s.Index), 31)
	if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IPNet.String() == own.String() }) {
		if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipNet(own)}); err != nil {
			return repaired, fmt.Errorf("add address %s: %w", own, err)
		}
		did("its veth had no address")
	}
	for _, set := range linkSettings(name) {
		now, err := os.ReadFile("/proc/sys/" + set[0])
		if errors.Is(err, os.ErrNotExist) || err == nil && strings.TrimSpace(string(now)) == set[1] {
			continue
		}
		if err := sysctl(set[0], set[1]); err != nil {
			return repaired, err
		}
		if !strings.HasSuffix(set[0], "/forwarding") { // mendForwarding reports it
			did(set[0] + " was " + strings.TrimSpace(string(now)))
		}
	}
	if attrs.Flags&net.FlagUp == 0 {
		if err := h.LinkSetUp(link); err != nil {
			return repaired, fmt.Errorf("raise: %w", err)
		}
		did("its veth was down")
	}
	routes, err := h.RouteListFiltered(unix.AF_INET, &netlink.Route{LinkIndex: s.link, Dst: ipNet(own.Masked())}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_DST)
	if err != nil {
		return repaired, fmt.Errorf("list routes: %w", err)
	}
	if len(routes) == 0 {
		err := h.RouteReplace(&netlink.Route{LinkIndex: s.link, Dst: ipNet(own.Masked()), Src: own.Addr().AsSlice(), Scope: netlink.SCOPE_LINK})
		if err != nil {
			return repaired, fmt.Errorf("add route: %w", err)
		}
		did("its route was gone")
	}
	return repaired, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func isMissing(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing) || errors.Is(err, unix.ENODEV)
}

// rebuild makes a new veth for a slot whose veth is gone. The caller holds the slot's lock.
func (p *Pool) rebuild(s *Slot) error {
	err := s.within(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		old, err := h.LinkByName(vethName)
		if err == nil {
			err = h.LinkDel(old) // its other end is in another namespace
		}
		if err != nil && !isMissing(err) {
			return fmt.Errorf("remove %s: %w", vethName, err)
		}
		if err := createHostLink(p.host, s.Index, s.ns); err != nil {
			return err
		}
		if err := createWayOut(h, s.Index); err != nil {
			return err
		}
		inner, err := h.LinkByName(vethName)
		if err == nil {
			s.inner = inner.Attrs().Index
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := raiseHostLink(p.host, s.Index); err != nil {
		return err
	}
	link, err := p.host.LinkByName(linkName(s.Index))
	if err != nil {
		return fmt.Errorf("find veth: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.linked, s.link)
	s.link = link.Attrs().Index
	p.linked[s.link] = s
	return nil
}

// probeWait bounds the time that a probe needs to pass the host's network stack. It needs
// microseconds unless the machine is very busy.
const probeWait = 5 * time.Second

// mendPassage checks that other firewalls on the host let guests' packets pass, and adds
// rules to Docker's if they do not.
func (p *Pool) mendPassage() error {
	err := p.probe()
	if err == nil {
		return nil
	}
	if have, err := fingerprint(hostTable(p.block.number)); err != nil || have != p.rules {
		return nil // somebody has just changed the rules; mendRules will repair them
	}
	added, dockerErr := passDocker(context.Background())
	if !added {
		return errors.Join(err, dockerErr)
	}
	if err := p.probe(); err != nil {
		return err
	}
	p.docker = true
	p.config.Problems.Repaired(problem.Firewall, "", "Docker's rules dropped guests' packets; added rules to its chain DOCKER-USER that accept them")
	return nil
}

// probe sends a packet from a slot to the guests' first resolver, and returns an error if
// one of the host's firewalls drops it. A rule of ours drops it before it leaves the host.
// probe also returns nil if it cannot tell.
func (p *Pool) probe() error {
	s := p.anySlot()
	if s == nil {
		return nil
	}
	to := p.config.Upstreams[0]
	if routes, err := p.host.RouteGet(to.AsSlice()); err != nil || len(routes) == 0 {
		return nil // the host has no route
	}
	before, err := p.probes()
	if err != nil {
		return nil // mendRules reports it
	}
	s.mu.Lock()
	if s.down {
		s.mu.Unlock()
		return nil
	}
	err = s.within(func() error {
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: outsideAddr(s.Index).AsSlice(), Port: probePort}}
		c, err := d.DialContext(context.Background(), "udp4", netip.AddrPortFrom(to, 53).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("probe"))
		return err
	})
	s.mu.Unlock()
	if err != nil {
		return nil // the slot is broken, which mendSlots reports
	}
	for deadline := time.Now().Add(probeWait); ; time.Sleep(time.Millisecond) {
		now, err := p.probes()
		if err != nil || now != before {
			return nil
		}
		if time.Now().After(deadline) {
			break
		}
	}
	why := "find the rule that drops packets from " + linkPrefix + "*, and accept them and the replies to them"
	if o := Obstacles(); len(o) > 0 {
		why = strings.Join(o, "; ")
	}
	return fmt.Errorf("another program's firewall drops guests' packets to the internet: %s", why)
}

// probeInside sends a packet from the host to a slot, and returns an error if a firewall of
// the host drops it, which the kernel tells the sender. The slot's router drops the packet.
func (p *Pool) probeInside() error {
	s := p.anySlot()
	if s == nil {
		return nil
	}
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, 1) }), err)
	}}
	c, err := d.DialContext(context.Background(), "udp4", netip.AddrPortFrom(s.Address, probePort).String())
	if err != nil {
		return nil // the slot is broken, which mendSlots reports
	}
	defer c.Close()
	if _, err := c.Write([]byte("probe")); errors.Is(err, unix.EPERM) {
		return errors.New("another program's firewall drops the host's packets to sandboxes, so nobody can use them: find the rule, and accept packets to " + linkPrefix + "* and the replies to them")
	}
	return nil
}

// anySlot returns a prepared slot, preferably an unused one, or nil.
func (p *Pool) anySlot() *Slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ready) > 0 {
		return p.ready[0]
	}
	for _, s := range p.linked {
		return s
	}
	return nil
}

// probes returns the number of probes that passed the host's firewalls.
func (p *Pool) probes() (uint64, error) {
	conn, err := nftables.New()
	if err != nil {
		return 0, fmt.Errorf("open nftables: %w", err)
	}
	t := &nftables.Table{Name: hostTable(p.block.number), Family: nftables.TableFamilyINet}
	rules, err := conn.GetRules(t, &nftables.Chain{Name: probeChain, Table: t})
	if err != nil {
		return 0, fmt.Errorf("read rules: %w", err)
	}
	for _, r := range rules {
		for _, e := range r.Exprs {
			if c, ok := e.(*expr.Counter); ok {
				return c.Packets, nil
			}
		}
	}
	return 0, errors.New("no rule counts probes")
}
