package network

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// neighbour is a machine on its own link to the host, which is its default route.
func neighbour(t *testing.T, name string, host, own netip.Prefix) (do func(func() error) error) {
	t.Helper()
	path := filepath.Join(testNamespaces, name)
	must(t, os.MkdirAll(testNamespaces, 0o755))
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	must(t, err)
	t.Cleanup(h.Close)
	address := func(p netip.Prefix) *netlink.Addr {
		return &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}}
	}
	var l net.Listener
	must(t, createNamespace(path, func(ns *os.File) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		must(t, h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}))
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		must(t, netlink.AddrAdd(link, address(own)))
		must(t, netlink.LinkSetUp(link))
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: host.Addr().AsSlice()}))
		l, err = net.Listen("tcp4", netip.AddrPortFrom(own.Addr(), 7000).String())
		return err
	}))
	go answerTCP(l)
	link, err := h.LinkByName(name)
	must(t, err)
	must(t, h.AddrAdd(link, address(host)))
	must(t, h.LinkSetUp(link))
	t.Cleanup(func() {
		l.Close()
		must(t, h.LinkDel(link))
		must(t, removeNamespace(path))
	})
	return func(f func() error) error { return inNamespace(path, f) }
}

// TestIsNoRouter checks that a machine that forwarded for nobody forwards only for guests
// while an agent runs, also to a VPN that appears later. Later links of software that
// forwards, such as a container engine's veths, are not the agent's concern.
func TestIsNoRouter(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	left := neighbour(t, "left", netip.MustParsePrefix("192.0.2.1/30"), netip.MustParsePrefix("192.0.2.2/30"))
	neighbour(t, "right", netip.MustParsePrefix("192.0.2.5/30"), netip.MustParsePrefix("192.0.2.6/30"))
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	g := newGuest(t, acquire(t, p))
	reaches := func(d time.Duration) error {
		return left(func() error { _, err := call(d, "tcp4", "192.0.2.6:7000"); return err })
	}
	if reaches(2*time.Second) == nil {
		t.Error("the machine routes between its neighbours")
	}
	if _, err := g.call("tcp4", internetAddr.String()+":7000"); err != nil {
		t.Error("guest to the internet:", err)
	}
	// That stays so after somebody has turned off forwarding and flushed the rules.
	must(t, sysctl(ipForward, "0"))
	run(t, "nft", "flush", "ruleset")
	if _, err := g.callWithin(hang, "tcp4", internetAddr.String()+":7000"); err != nil {
		t.Error("guest to the internet after a repair:", err)
	}
	if reaches(2*time.Second) == nil {
		t.Error("after a repair the machine routes between its neighbours")
	}
	neighbour(t, "later", netip.MustParsePrefix("192.0.2.9/30"), netip.MustParsePrefix("192.0.2.10/30"))
	err := left(func() error { _, err := call(hang, "tcp4", "192.0.2.10:7000"); return err })
	if err != nil {
		t.Error("to a link that appeared later:", err)
	}

	vpn := newTun(t, "vpn", netip.MustParsePrefix("192.0.2.13/30"))
	await.Until(t, "the rules know the VPN", func() bool {
		rules, err := fingerprint(hostTable(p.block.number))
		return err == nil && strings.Contains(rules, fmt.Sprintf(" %x00", "vpn"))
	})
	far := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.14:7000"))
	send := func() error {
		c, err := net.DialUDP("udp4", nil, far)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
		return err
	}
	must(t, left(send))
	must(t, left(func() error { _, err := call(hang, "tcp4", "192.0.2.10:7000"); return err })) // on the same way
	must(t, send())
	b := make([]byte, 1<<10)
	for {
		n, err := vpn.Read(b)
		must(t, err)
		if n < 20 || b[0]>>4 != 4 {
			continue
		}
		if from := netip.AddrFrom4([4]byte(b[12:])); from == netip.MustParseAddr("192.0.2.13") {
			break
		} else {
			t.Error("the machine routes into the VPN from", from)
		}
	}
}

// newTun makes a link like a VPN's, whose packets are what the file has.
func newTun(t *testing.T, name string, host netip.Prefix) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	r, err := unix.NewIfreq(name)
	must(t, err)
	r.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	must(t, unix.IoctlIfreq(fd, unix.TUNSETIFF, r))
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	must(t, err)
	defer h.Close()
	link, err := h.LinkByName(name)
	must(t, err)
	must(t, h.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: host.Addr().AsSlice(), Mask: net.CIDRMask(host.Bits(), 32)}}))
	must(t, h.LinkSetUp(link))
	return f
}

// TestOutward checks which links of other software must not be forwarded between.
func TestOutward(t *testing.T) {
	for _, tt := range []struct {
		link netlink.Link
		want bool
	}{
		{&netlink.Device{}, true},
		{&netlink.Vlan{}, true},
		{&netlink.Bond{}, true},
		{&netlink.Wireguard{}, true},
		{&netlink.Tuntap{Mode: netlink.TUNTAP_MODE_TUN}, true},
		{&netlink.GenericLink{LinkType: "ppp"}, true},
		{&netlink.Tuntap{Mode: netlink.TUNTAP_MODE_TAP}, false},
		{&netlink.Bridge{}, false},
		{&netlink.Veth{}, false},
		{&netlink.Vxlan{}, false},
		{&netlink.Dummy{}, false},
		{&netlink.GenericLink{LinkType: "tomorrow"}, false},
	} {
		if got := outward(tt.link); got != tt.want {
			t.Errorf("%s: %v", tt.link.Type(), got)
		}
	}
}

// TestWasRouter checks that a machine that forwarded before still does.
func TestWasRouter(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	left := neighbour(t, "left", netip.MustParsePrefix("192.0.2.1/30"), netip.MustParsePrefix("192.0.2.2/30"))
	neighbour(t, "right", netip.MustParsePrefix("192.0.2.5/30"), netip.MustParsePrefix("192.0.2.6/30"))
	must(t, sysctl(ipForward, "1"))
	t.Cleanup(func() { must(t, sysctl(ipForward, "0")) })
	openPool(t, layout.Dir(t.TempDir()), 1)
	err := left(func() error { _, err := call(hang, "tcp4", "192.0.2.6:7000"); return err })
	if err != nil {
		t.Error("the machine no longer forwards for its neighbours:", err)
	}
}

// TestShareOfConnections checks that all guests together leave half of the machine's
// tracked connections to the machine, whatever their number.
func TestShareOfConnections(t *testing.T) {
	needRoot(t)
	newInternet(t) // its rules make the kernel track connections
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	acquire(t, p)
	for _, guests := range []int{16, 100, blockSlots} {
		if each := shareOfConnections(guests, 1); each < minConnections || each > maxConnections || uint64(each)*uint64(guests) > tracked(t)/2 {
			t.Errorf("%d guests have %d connections each of %d", guests, each, tracked(t))
		}
	}
	if got := p.connections.Load(); got != shareOfConnections(blockSlots, agents()) {
		t.Errorf("a guest has %d connections", got)
	}
}

// TestAgentsShareConnections checks that the guests of all agents together leave half of
// the machine's tracked connections to it, including guests that ran before another agent
// came.
func TestAgentsShareConnections(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	const guests, most = 10, 8 * 8000
	real := trackedAtMost
	t.Cleanup(func() { trackedAtMost = real })
	trackedAtMost = func() (uint64, error) { return most, nil }
	others := agents()
	first := openPoolWith(t, Config{Dir: layout.Dir(t.TempDir()), Ready: 1, Guests: guests})
	slot := acquire(t, first)
	has := func(s *Slot) int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return int(s.config.connections)
	}
	allowed := func(s *Slot) (n int) {
		t.Helper()
		must(t, s.within(func() error {
			text, err := fingerprint("wrenn")
			for _, m := range regexp.MustCompile(`Connlimit\{?Count:(\d+)`).FindAllStringSubmatch(text, -1) {
				n, _ = strconv.Atoi(m[1])
			}
			return err
		}))
		return n
	}
	share := func(agents int) int { return most / 2 / (others + agents) / guests }
	if has(slot) != share(1) || allowed(slot) != share(1) {
		t.Fatalf("the guest of the only agent has %d connections, its rules allow %d, want %d", has(slot), allowed(slot), share(1))
	}
	second, err := Open(t.Context(), Config{
		Dir: layout.Dir(t.TempDir()), Ready: 1, Guests: guests, Upstreams: first.config.Upstreams, Log: first.log, Problems: first.config.Problems,
	}, nil)
	must(t, err)
	after := acquire(t, second)
	if has(after) != share(2) {
		t.Errorf("the second agent's guest has %d connections, want %d", has(after), share(2))
	}
	await.Until(t, "the first agent's guest has half of what it had", func() bool { return has(slot) == share(2) })
	if allowed(slot) != share(2) {
		t.Errorf("its rules allow %d", allowed(slot))
	}
	must(t, second.Close(t.Context(), nil))
	await.Until(t, "its guest has the whole share again", func() bool { return has(slot) == share(1) && allowed(slot) == share(1) })
}

// TestShareOfFreshMachine checks that the guests' share is computed from the machine's
// limit even if nothing made the kernel track connections before the agent's rules did.
func TestShareOfFreshMachine(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	const most = blockSlots * 2 * 1000
	real := trackedAtMost
	t.Cleanup(func() { trackedAtMost = real })
	trackedAtMost = func() (uint64, error) {
		conn, err := nftables.New()
		must(t, err)
		tables, err := conn.ListTables()
		must(t, err)
		if len(tables) == 0 {
			return 0, os.ErrNotExist
		}
		return most, nil
	}
	if p := openPool(t, layout.Dir(t.TempDir()), 1); p.connections.Load() != uint32(1000/max(1, agents())) {
		t.Errorf("a guest has %d connections, want 1000", p.connections.Load())
	}
}

// tracked returns how many connections the machine tracks.
func tracked(t *testing.T) (n uint64) {
	t.Helper()
	n, err := trackedAtMost()
	must(t, err)
	return n
}
