package netaddr

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
)

// Slots is the network of all guests' addresses on their host. Nothing but the
// agent calls them.
var Slots = netip.MustParsePrefix("10.11.0.0/16")

// Class says what an address is for.
type Class int

// The classes of addresses.
const (
	// Public addresses are of the public internet.
	Public Class = iota
	// Documentation addresses are for examples and lead nowhere.
	Documentation
	// Loopback addresses are this machine's own.
	Loopback
	// Private addresses are of a private network, or of a carrier's.
	Private
	// Forbidden addresses are called for nobody, whatever is set: guests' own,
	// cloud metadata services, link-local, multicast, reserved, and those that
	// stand for another address that cannot be told.
	Forbidden
)

func (c Class) String() string {
	return [...]string{"public", "for documentation", "of this machine", "private", "reserved"}[c]
}

// special are the addresses that are not public, and the public ones within
// them (RFC 6890 and its registries). The longest prefix counts.
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

	// Of IPv6 one eighth is global unicast.
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

// nat64 addresses reach the IPv4 address in their last four bytes. The prefixes
// that operators choose for themselves (64:ff9b:1::/48) are forbidden.
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// Classify returns the class of an address. An IPv6 address that stands for an
// IPv4 address is of that one's class.
func Classify(ip netip.Addr) Class {
	ip = ip.Unmap().WithZone("")
	if !ip.IsValid() {
		return Forbidden
	}
	if nat64.Contains(ip) {
		b := ip.As16()
		ip = netip.AddrFrom4([4]byte(b[12:]))
	}
	class, bits := Public, -1
	for _, s := range special {
		if s.prefix.Contains(ip) && s.prefix.Bits() > bits {
			class, bits = s.class, s.prefix.Bits()
		}
	}
	return class
}

// Closed returns the IPv4 networks that a guest cannot reach, in ascending
// order and apart. They are all that are not public, but for those for
// documentation: nothing is near them, and test networks use them.
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

// Policy says which addresses are called for somebody who is not trusted, beside
// the public ones: a webhook's, a registry's.
type Policy struct {
	Loopback bool
	Private  bool
}

// ErrNotAllowed is why a [Policy] does not allow an address.
var ErrNotAllowed = errors.New("addresses that are not public are not called, unless the platform's admin allows it")

// Check returns an error that wraps [ErrNotAllowed] unless the policy allows ip.
func (p Policy) Check(ip netip.Addr) error {
	switch c := Classify(ip); {
	case c == Public, c == Loopback && p.Loopback, c == Private && p.Private:
		return nil
	default:
		return fmt.Errorf("%v is %v: %w", ip, c, ErrNotAllowed)
	}
}

// Control checks an address that is being dialled; it is for
// [net.Dialer.Control]. At that moment a name has been resolved, so neither a
// name that resolves to something else later nor a redirect gets around it.
func (p Policy) Control(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%s: %w", address, ErrNotAllowed)
	}
	return p.Check(at.Addr())
}
