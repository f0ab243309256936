package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/metadata"
	"github.com/wrenn-dev/wrenn/internal/agent/network/ntp"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

const (
	tapName  = "tap0"  // leads to the guest
	vethName = "veth0" // leads to the host

	linkPrefix = "wrenn-veth-"
)

// Every guest has the same address, so that a snapshot can be restored in any slot.
var (
	guestAddr    = netip.MustParseAddr("169.254.0.21")
	gatewayAddr  = netip.MustParseAddr("169.254.0.22")
	metadataAddr = netip.MustParseAddr("169.254.169.254")
	guestMAC     = net.HardwareAddr{0x02, 0x57, 0x52, 0x4e, 0x00, 0x01}
	gatewayMAC   = net.HardwareAddr{0x02, 0x57, 0x52, 0x4e, 0x00, 0x02}
)

// linkName returns the name of the host's end of slot i's veth. The kernel allows 15
// characters, so from 10000 on the last four are an "a" and the number in base 36.
func linkName(i int) string {
	if i < 10000 {
		return linkPrefix + strconv.Itoa(i)
	}
	return linkPrefix + "a" + strconv.FormatInt(int64(i), 36)
}

// linkSlot is the inverse of linkName. ok is false for names of other links.
func linkSlot(name string) (i int, ok bool) {
	rest, ok := strings.CutPrefix(name, linkPrefix)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseInt(rest, 10, 32)
	if far, ok := strings.CutPrefix(rest, "a"); ok {
		n, err = strconv.ParseInt(far, 36, 32)
	}
	return int(n), err == nil && n >= 0 && linkName(int(n)) == name
}

// oldNamespace returns the path of a slot's namespace in earlier releases.
func oldNamespace(i int) string {
	return filepath.Join(layout.OldNamespaces, filepath.Base(layout.Namespace(i)))
}

// hostAddr and outsideAddr return the addresses of the two ends of slot i's veth, a /31.
func hostAddr(i int) netip.Addr {
	all := netaddr.Slots.Addr().As4()
	return netip.AddrFrom4([4]byte{all[0], all[1], byte(i >> 7), byte(i << 1)})
}

func outsideAddr(i int) netip.Addr { return hostAddr(i).Next() }

// blockPrefix returns the prefix of all addresses of a block's slots.
func blockPrefix(block int) netip.Prefix {
	return netip.PrefixFrom(hostAddr(block*blockSlots), 22)
}

// linkGroup returns the interface group of a block's host links: "WR" and the block's
// number.
func linkGroup(block int) uint32 { return 'W'<<24 | 'R'<<16 | uint32(block) }

// A Slot is a network for one guest.
type Slot struct {
	// Index is the slot's number on this machine.
	Index int
	// Address is the address at which the host reaches all ports of the guest.
	Address netip.Addr
	// Metadata serves the guest at 169.254.169.254.
	Metadata *metadata.Server

	ns *os.File // its namespace, even if the name is lost

	config slotConfig // mu guards its rates and connections

	mu      sync.Mutex // held while the slot is made, repaired or taken down
	down    bool       // it is taken down
	link    int        // the index of the host's end of its veth
	inner   int        // the index of the other end, in its namespace
	closers []func()   // end its services
	serving sync.WaitGroup
}

func (p *Pool) newSlot(i int) *Slot {
	return &Slot{Index: i, Address: outsideAddr(i), Metadata: metadata.New(), config: p.slotConfig()}
}

// Limit sets the guest's rates in place of those in the pool's [Config]. After an error, the
// earlier rates stay in force.
func (s *Slot) Limit(r rates.Rates) error {
	if err := r.Check(); err != nil {
		return fmt.Errorf("limit slot %d: %w", s.Index, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return fmt.Errorf("limit slot %d: %w", s.Index, ErrClosed)
	}
	next := s.config
	next.rates = r
	return s.configure(next)
}

// configure writes the slot's rules again if next differs. The caller holds the slot's lock.
func (s *Slot) configure(next slotConfig) error {
	if reflect.DeepEqual(next, s.config) {
		return nil
	}
	if err := s.within(func() error { return slotRules(s.Address, next, false) }); err != nil {
		return fmt.Errorf("limit slot %d: %w", s.Index, err)
	}
	s.config = next
	return nil
}

// NetNS returns the path of the slot's network namespace.
func (s *Slot) NetNS() string { return layout.Namespace(s.Index) }

// within runs f on a thread in the slot's namespace.
func (s *Slot) within(f func() error) error { return inside(s.ns, f) }

// OpenTap opens the guest's network device, with virtio headers. The caller must close it.
// Only one can be open at a time.
func (s *Slot) OpenTap() (*os.File, error) {
	var tap *os.File
	err := s.within(func() (err error) {
		changes, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
		if err != nil {
			return fmt.Errorf("watch links: %w", err)
		}
		defer changes.Close()
		if tap, err = openTap(tapName, unix.IFF_VNET_HDR); err != nil {
			return err
		}
		if err = awaitCarrier(changes, tapName, vethName); err != nil {
			tap.Close()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open tap of slot %d: %w", s.Index, err)
	}
	return tap, nil
}

// carrierTimeout bounds the wait for the kernel to notice that a link is up, which takes
// some milliseconds on a busy machine.
const carrierTimeout = time.Second

// awaitCarrier waits until links of the calling thread's namespace carry packets. After
// somebody attaches to a tap, the kernel drops packets until one of its workers has noticed.
func awaitCarrier(changes *nl.NetlinkSocket, names ...string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	for deadline := time.Now().Add(carrierTimeout); ; {
		up := 0
		for _, name := range names {
			link, err := h.LinkByName(name)
			if err != nil {
				return fmt.Errorf("find %s: %w", name, err)
			}
			if link.Attrs().OperState == netlink.OperUp {
				up++
			}
		}
		left := time.Until(deadline)
		if up == len(names) || left <= 0 {
			return nil // after the timeout, packets may get lost for a while
		}
		timeout := unix.NsecToTimeval(left.Nanoseconds())
		if err := changes.SetReceiveTimeout(&timeout); err != nil {
			return fmt.Errorf("watch links: %w", err)
		}
		_, _, _ = changes.Receive() // any change, or the timeout
	}
}

func openTap(name string, flags uint16) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("attach to %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Listen listens on a numeric address in the slot's namespace.
func (s *Slot) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	var l net.Listener
	err := s.within(func() (err error) {
		l, err = new(net.ListenConfig).Listen(ctx, network, address)
		return err
	})
	return l, err
}

// ListenPacket is [Slot.Listen] for datagrams.
func (s *Slot) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	var c net.PacketConn
	err := s.within(func() (err error) {
		c, err = new(net.ListenConfig).ListenPacket(ctx, network, address)
		return err
	})
	return c, err
}

// serve starts the slot's services for the guest: NTP and metadata.
func (s *Slot) serve(ctx context.Context) error {
	var clock net.PacketConn
	var docs net.Listener
	err := s.within(func() (err error) {
		var lc net.ListenConfig
		if clock, err = lc.ListenPacket(ctx, "udp4", netip.AddrPortFrom(gatewayAddr, 123).String()); err != nil {
			return err
		}
		if docs, err = lc.Listen(ctx, "tcp4", netip.AddrPortFrom(metadataAddr, 80).String()); err != nil {
			clock.Close()
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("listen in slot %d: %w", s.Index, err)
	}
	s.closers = []func(){func() { clock.Close() }, func() { s.Metadata.Close() }}
	// Both end without an error when their sockets close.
	s.serving.Go(func() { _ = ntp.Serve(clock) })
	s.serving.Go(func() { _ = s.Metadata.Serve(docs) })
	return nil
}

// silence ends the slot's services and waits for them.
func (s *Slot) silence() {
	for _, stop := range s.closers {
		stop()
	}
	s.closers = nil
	s.serving.Wait()
}

// create makes slot i's namespace, links and rules. After an error, nothing of it is left.
func create(h *netlink.Handle, i int, c slotConfig) error {
	err := createNamespace(layout.Namespace(i), func(ns *os.File) error {
		// Before there is any link, so that none ever has an IPv6 address or accepts a
		// redirect.
		for _, set := range [][2]string{
			{"net/ipv6/conf/all/disable_ipv6", "1"},
			{"net/ipv6/conf/default/disable_ipv6", "1"},
			{"net/ipv4/conf/all/accept_redirects", "0"},
			{"net/ipv4/conf/all/send_redirects", "0"},
			{"net/ipv4/conf/default/accept_redirects", "0"},
			{"net/ipv4/conf/default/send_redirects", "0"},
			{"net/ipv4/conf/default/rp_filter", "1"},
			{"net/ipv4/conf/default/arp_ignore", "1"},
			{ipForward, "1"},
		} {
			if err := ignore(sysctl(set[0], set[1]), os.ErrNotExist); err != nil {
				return err
			}
		}
		if err := slotRules(outsideAddr(i), c, true); err != nil {
			return err
		}
		if err := createHostLink(h, i, ns); err != nil {
			return err
		}
		inside, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open netlink: %w", err)
		}
		defer inside.Close()
		return createLinks(inside, i)
	})
	if err != nil {
		return errors.Join(fmt.Errorf("prepare slot %d: %w", i, err), destroy(h, i))
	}
	return nil
}

// createHostLink makes slot i's veth, with its other end in ns.
func createHostLink(h *netlink.Handle, i int, ns *os.File) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = linkName(i)
	attrs.Group = linkGroup(i / blockSlots)
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: vethName, PeerNamespace: netlink.NsFd(ns.Fd())}
	if err := h.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	return nil
}

// linkSettings returns the kernel's settings for a host link, in the order to write them.
func linkSettings(name string) [][2]string {
	return [][2]string{
		{"net/ipv6/conf/" + name + "/disable_ipv6", "1"},
		{"net/ipv4/conf/" + name + "/accept_redirects", "0"},
		{"net/ipv4/conf/" + name + "/send_redirects", "0"},
		{"net/ipv4/conf/" + name + "/rp_filter", "1"},
		{"net/ipv4/conf/" + name + "/forwarding", "1"},
	}
}

// raiseHostLink configures the host's end of slot i's veth and turns it on. It must run in
// the host's namespace.
func raiseHostLink(h *netlink.Handle, i int) error {
	link, err := h.LinkByName(linkName(i))
	if err != nil {
		return fmt.Errorf("find veth: %w", err)
	}
	for _, set := range linkSettings(linkName(i)) {
		if err := ignore(sysctl(set[0], set[1]), os.ErrNotExist); err != nil {
			return err
		}
	}
	return raise(h, link, netip.PrefixFrom(hostAddr(i), 31))
}

// createLinks sets up the links in slot i's namespace, which is the calling thread's.
func createLinks(h *netlink.Handle, i int) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("raise lo: %w", err)
	}

	f, err := openTap(tapName, unix.IFF_VNET_HDR)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make %s persistent: %w", tapName, err)
	}
	tap, err := h.LinkByName(tapName)
	if err != nil {
		return fmt.Errorf("find %s: %w", tapName, err)
	}
	// The same in every slot, because a restored guest remembers its gateway's address.
	if err := h.LinkSetHardwareAddr(tap, gatewayMAC); err != nil {
		return fmt.Errorf("set hardware address of %s: %w", tapName, err)
	}
	if err := raise(h, tap, netip.PrefixFrom(gatewayAddr, 30), host(metadataAddr)); err != nil {
		return err
	}
	err = h.NeighSet(&netlink.Neigh{
		LinkIndex: tap.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
		IP: guestAddr.AsSlice(), HardwareAddr: guestMAC,
	})
	if err != nil {
		return fmt.Errorf("set guest's hardware address: %w", err)
	}

	return createWayOut(h, i)
}

// createWayOut sets up the namespace's end of slot i's veth.
func createWayOut(h *netlink.Handle, i int) error {
	veth, err := h.LinkByName(vethName)
	if err != nil {
		return fmt.Errorf("find %s: %w", vethName, err)
	}
	if err := raise(h, veth, netip.PrefixFrom(outsideAddr(i), 31)); err != nil {
		return err
	}
	err = h.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Gw: hostAddr(i).AsSlice(), Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}})
	if err != nil {
		return fmt.Errorf("add default route: %w", err)
	}
	return nil
}

// raise adds addresses to a link and turns it on.
func raise(h *netlink.Handle, link netlink.Link, addrs ...netip.Prefix) error {
	for _, a := range addrs {
		n := &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), 32)}
		if err := h.AddrAdd(link, &netlink.Addr{IPNet: n}); err != nil {
			return fmt.Errorf("add address %s to %s: %w", a, link.Attrs().Name, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("raise %s: %w", link.Attrs().Name, err)
	}
	return nil
}

// destroy removes slot i's link and namespace. It leaves tracked connections to forget.
func destroy(h *netlink.Handle, i int) error {
	var missing netlink.LinkNotFoundError
	link, err := h.LinkByName(linkName(i))
	if err == nil {
		err = h.LinkDel(link)
	}
	if errors.As(err, &missing) || errors.Is(err, unix.ENODEV) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("remove %s: %w", linkName(i), err)
	}
	return errors.Join(err, removeNamespace(layout.Namespace(i)), removeNamespace(oldNamespace(i)))
}

// destroyGroup removes all host links of a block at once, which takes as long as removing
// one. It ignores errors, because [destroy] removes what is left.
func destroyGroup(block int) {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(linkGroup(block))))
	_, _ = req.Execute(unix.NETLINK_ROUTE, 0)
}

// A forgetter deletes the tracked connections of removed slots. Each pass reads the whole
// machine's table, so slots that end at the same time share one.
type forgetter struct {
	pass sync.Mutex // held during a pass

	mu    sync.Mutex
	ended map[netip.Addr]bool // addresses of slots for the next pass
}

// forget deletes the tracked connections of slots. It ignores errors: without it, the
// connections time out, and a slot's next namespace does not know them.
func (f *forgetter) forget(h *netlink.Handle, slots ...int) {
	f.mu.Lock()
	if f.ended == nil {
		f.ended = map[netip.Addr]bool{}
	}
	for _, i := range slots {
		f.ended[outsideAddr(i)] = true
	}
	f.mu.Unlock()

	f.pass.Lock()
	defer f.pass.Unlock()
	f.mu.Lock()
	ended := f.ended
	f.ended = nil
	f.mu.Unlock()
	if len(ended) > 0 { // otherwise another caller's pass has done it
		_, _ = h.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, connectionsOf(ended))
	}
}

// connectionsOf matches tracked connections from and to slots with these addresses.
type connectionsOf map[netip.Addr]bool

// MatchConntrackFlow implements [netlink.CustomConntrackFilter].
func (c connectionsOf) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	src, _ := netip.AddrFromSlice(f.Forward.SrcIP)
	dst, _ := netip.AddrFromSlice(f.Forward.DstIP)
	return c[src.Unmap()] || c[dst.Unmap()]
}
