package netaddr

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
)

// Slots is the network of guests' addresses on their host. Only the agent may connect to
// them.
var Slots = netip.MustParsePrefix("10.11.0.0/16")

// Class is the class of an address.
type Class int

// The classes of addresses.
const (
	// Public addresses belong to the public internet.
	Public Class = iota
	// Documentation addresses are for examples and lead nowhere.
	Documentation
	// Loopback addresses belong to this machine.
	Loopback
	// Private addresses belong to private networks, or to carriers' networks.
	Private
	// Forbidden addresses are never connected to, whatever the settings: guests' own,
	// cloud metadata services, link-local, multicast and reserved ones, and those that
	// stand for an unknown other address.
	Forbidden
)

func (c Class) String() string {
	return [...]string{"public", "for documentation", "of this machine", "private", "reserved"}[c]
}

// special has the networks that are not public, and public ones within them (RFC 6890 and
// its registries). The longest prefix wins.
var special = []struct {
	prefix netip.Prefix
	class  Class
}{
	{netip.MustParsePrefix("0.0.0.0/8"), Forbidden},
	{netip.MustParsePrefix("10.0.0.0/8"), Private},
	{Slots, Forbidden},
	{netip.MustParsePrefix("100.64.0.0/10"), Private},        // carrier-grade NAT
	{netip.MustParsePrefix("100.100.100.200/32"), Forbidden}, // Alibaba's metadata
	{netip.MustParsePrefix("127.0.0.0/8"), Loopback},
	{netip.MustParsePrefix("168.63.129.16/32"), Forbidden}, // Azure's host agent
	{netip.MustParsePrefix("169.254.0.0/16"), Forbidden},   // link-local, where most clouds' metadata is
	{netip.MustParsePrefix("172.16.0.0/12"), Private},
	{netip.MustParsePrefix("192.0.0.0/24"), Forbidden}, // IETF assignments; Oracle's metadata
	{netip.MustParsePrefix("192.0.2.0/24"), Documentation},
	{netip.MustParsePrefix("192.88.99.0/24"), Forbidden}, // relays of 6to4
	{netip.MustParsePrefix("192.168.0.0/16"), Private},
	{netip.MustParsePrefix("198.18.0.0/15"), Private}, // benchmarks
	{netip.MustParsePrefix("198.51.100.0/24"), Documentation},
	{netip.MustParsePrefix("203.0.113.0/24"), Documentation},
	{netip.MustParsePrefix("224.0.0.0/3"), Forbidden}, // multicast, reserved, broadcast

	// One eighth of IPv6 is global unicast.
	{netip.MustParsePrefix("::/0"), Forbidden},
	{netip.MustParsePrefix("2000::/3"), Public},
	{netip.MustParsePrefix("::1/128"), Loopback},
	{netip.MustParsePrefix("2001::/23"), Forbidden}, // IETF assignments; Teredo
	{netip.MustParsePrefix("2001:db8::/32"), Documentation},
	{netip.MustParsePrefix("2002::/16"), Forbidden}, // 6to4
	{netip.MustParsePrefix("3fff::/20"), Documentation},
	{netip.MustParsePrefix("fc00::/7"), Private},
	{netip.MustParsePrefix("fd00:ec2::/32"), Forbidden},    // Amazon's metadata
	{netip.MustParsePrefix("fd20:ce::254/128"), Forbidden}, // Google's metadata
}

// nat64 addresses reach the IPv4 address in their last four bytes. Prefixes that
// operators choose (64:ff9b:1::/48) are forbidden.
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// meant returns the IPv4 address that an IPv6 address stands for, or ip itself.
func meant(ip netip.Addr) netip.Addr {
	ip = ip.Unmap().WithZone("")
	if nat64.Contains(ip) {
		b := ip.As16()
		ip = netip.AddrFrom4([4]byte(b[12:]))
	}
	return ip
}

// Classify returns the class of an address. An IPv6 address that stands for an IPv4
// address has the class of that one.
func Classify(ip netip.Addr) Class {
	ip = meant(ip)
	if !ip.IsValid() {
		return Forbidden
	}
	class, bits := Public, -1
	for _, s := range special {
		if s.prefix.Contains(ip) && s.prefix.Bits() > bits {
			class, bits = s.class, s.prefix.Bits()
		}
	}
	return class
}

// Closed returns the IPv4 networks that a guest cannot reach, in ascending order and
// without overlaps: all that are not public, except those for documentation, which lead
// nowhere and which test networks use.
func Closed() []netip.Prefix {
	var all []netip.Prefix
	for _, s := range special {
		if s.prefix.Addr().Is4() && s.class != Documentation {
			all = append(all, s.prefix)
		}
	}
	// A network sorts before those within it.
	slices.SortFunc(all, netip.Prefix.Compare)
	apart := all[:0]
	for _, p := range all {
		if n := len(apart); n == 0 || !apart[n-1].Overlaps(p) {
			apart = append(apart, p)
		}
	}
	return apart
}

// Policy says which addresses, besides public ones, Wrenn connects to on behalf of
// untrusted users, such as those of webhooks and registries.
type Policy struct {
	Loopback bool
	Private  bool
}

// ErrNotAllowed means that a [Policy] does not allow an address.
var ErrNotAllowed = errors.New("only public addresses are allowed, unless the platform's admin allows others")

// Check returns nil if the policy allows ip, and otherwise an error that wraps
// [ErrNotAllowed]. A public address of this machine counts as loopback, because firewalls
// rarely filter what a machine sends to itself.
func (p Policy) Check(ip netip.Addr) error {
	c := Classify(ip)
	if c == Public && !p.Loopback {
		own, err := isOwn(ip)
		if err != nil {
			return err
		}
		if own {
			c = Loopback
		}
	}
	switch {
	case c == Public, c == Loopback && p.Loopback, c == Private && p.Private:
		return nil
	default:
		return fmt.Errorf("%v is %v: %w", ip, c, ErrNotAllowed)
	}
}

// interfaceAddrs returns this machine's addresses. Tests replace it.
var interfaceAddrs = net.InterfaceAddrs

// isOwn reports whether ip, or the IPv4 address that it stands for, is one of this
// machine's.
func isOwn(ip netip.Addr) (bool, error) {
	addrs, err := interfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("list this machine's addresses: %w", err)
	}
	ip = meant(ip)
	return slices.ContainsFunc(addrs, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && p.Addr().Unmap() == ip
	}), nil
}

// Control is a [net.Dialer.Control] that checks the address being dialled. Names are
// resolved by then, so neither DNS rebinding nor a redirect gets around it.
func (p Policy) Control(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%s: %w", address, ErrNotAllowed)
	}
	return p.Check(at.Addr())
}
