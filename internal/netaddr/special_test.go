package netaddr

import (
	"errors"
	"net"
	"net/netip"
	"testing"
)

func TestClassify(t *testing.T) {
	for text, want := range map[string]Class{
		"8.8.8.8": Public, "1.1.1.1": Public, "11.0.0.0": Public, "9.255.255.255": Public, "100.63.255.255": Public, "100.128.0.0": Public,
		"172.15.255.255": Public, "172.32.0.0": Public, "168.63.129.15": Public, "168.63.129.17": Public, "192.0.1.0": Public, "223.255.255.255": Public,
		"0.0.0.0": Forbidden, "0.1.2.3": Forbidden, "10.0.0.1": Private, "10.10.255.255": Private, "10.12.0.0": Private, "10.255.255.255": Private,
		"10.11.0.0": Forbidden, "10.11.0.7": Forbidden, "10.11.255.255": Forbidden, "100.64.0.1": Private, "100.100.100.200": Forbidden,
		"127.0.0.1": Loopback, "127.255.255.255": Loopback, "168.63.129.16": Forbidden, "169.254.169.254": Forbidden, "172.16.0.1": Private,
		"172.31.255.255": Private, "192.0.0.192": Forbidden, "192.0.2.1": Documentation, "192.88.99.1": Forbidden, "192.168.1.1": Private,
		"198.18.0.1": Private, "198.19.255.255": Private, "198.51.100.1": Documentation, "203.0.113.1": Documentation,
		"224.0.0.1": Forbidden, "240.0.0.1": Forbidden, "255.255.255.255": Forbidden,

		"2606:4700::1111": Public, "2a00:1450::1": Public, "3ffe::1": Public,
		"::": Forbidden, "::1": Loopback, "::2": Forbidden, "::10.0.0.1": Forbidden, "::8.8.8.8": Forbidden, "100::1": Forbidden,
		"2001::1": Forbidden, "2001:db8::1": Documentation, "2002:808:808::1": Forbidden, "2002:a0b:7::1": Forbidden, "3fff::1": Documentation,
		"4000::1": Forbidden, "5f00::1": Forbidden, "fc00::1": Private, "fd12::1": Private, "fd00:ec2::254": Forbidden, "fd20:ce::254": Forbidden,
		"fe80::1": Forbidden, "fe80::1%eth0": Forbidden, "fec0::1": Forbidden, "ff02::1": Forbidden,
		// Addresses that stand for an IPv4 address.
		"::ffff:8.8.8.8": Public, "::ffff:127.0.0.1": Loopback, "::ffff:10.11.0.7": Forbidden, "::ffff:169.254.169.254": Forbidden,
		"64:ff9b::8.8.8.8": Public, "64:ff9b::10.1.2.3": Private, "64:ff9b::10.11.0.7": Forbidden, "64:ff9b::169.254.169.254": Forbidden,
		"64:ff9b:1::8.8.8.8": Forbidden, "::ffff:0:8.8.8.8": Forbidden,
	} {
		if got := Classify(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s is %v, want %v", text, got, want)
		}
	}
	if got := Classify(netip.Addr{}); got != Forbidden {
		t.Errorf("no address is %v", got)
	}
}

func TestPolicy(t *testing.T) {
	allowed := func(c Class, p Policy) bool {
		return c == Public || c == Loopback && p.Loopback || c == Private && p.Private
	}
	for _, p := range []Policy{{}, {Loopback: true}, {Private: true}, {Loopback: true, Private: true}} {
		for _, text := range []string{"8.8.8.8", "127.0.0.1", "::1", "10.0.0.1", "10.11.0.7", "::ffff:10.11.0.7", "64:ff9b::a0b:7", "169.254.169.254", "192.0.2.1", "fd12::1", "0.0.0.0", "::"} {
			ip := netip.MustParseAddr(text)
			want := allowed(Classify(ip), p)
			if err := p.Check(ip); (err == nil) != want || err != nil && !errors.Is(err, ErrNotAllowed) {
				t.Errorf("%+v, %s: %v", p, text, err)
			}
			if err := p.Control("tcp", net.JoinHostPort(text, "443"), nil); (err == nil) != want {
				t.Errorf("%+v, dial %s: %v", p, text, err)
			}
		}
		for _, text := range []string{"", "localhost:80", "@socket"} {
			if p.Control("unix", text, nil) == nil {
				t.Errorf("%+v: dialled %q", p, text)
			}
		}
	}
}

// TestOwnAddresses checks that this machine's public addresses need the permission that
// loopback needs, however they are written.
func TestOwnAddresses(t *testing.T) {
	real := interfaceAddrs
	t.Cleanup(func() { interfaceAddrs = real })
	interfaceAddrs = func() ([]net.Addr, error) {
		return []net.Addr{
			&net.IPNet{IP: net.IPv4(8, 8, 4, 4), Mask: net.CIDRMask(24, 32)},
			&net.IPNet{IP: net.ParseIP("2606:4700::1"), Mask: net.CIDRMask(64, 128)},
			&net.IPNet{IP: net.IPv4(10, 1, 2, 3), Mask: net.CIDRMask(8, 32)},
		}, nil
	}
	for text, own := range map[string]bool{
		"8.8.4.4": true, "::ffff:8.8.4.4": true, "64:ff9b::8.8.4.4": true, "2606:4700::1": true, "8.8.4.5": false, "2606:4700::2": false,
	} {
		at := net.JoinHostPort(text, "443")
		if err := (Policy{}).Control("tcp", at, nil); errors.Is(err, ErrNotAllowed) != own {
			t.Errorf("%s: %v", text, err)
		}
		if err := (Policy{Private: true}).Control("tcp", at, nil); errors.Is(err, ErrNotAllowed) != own {
			t.Errorf("%s, where private addresses are allowed: %v", text, err)
		}
		if err := (Policy{Loopback: true}).Control("tcp", at, nil); err != nil {
			t.Errorf("%s, where loopback is allowed: %v", text, err)
		}
	}
	if err := (Policy{Private: true}).Control("tcp", "10.1.2.3:443", nil); err != nil {
		t.Errorf("a private address of this machine: %v", err)
	}
	interfaceAddrs = func() ([]net.Addr, error) { return nil, errors.New("no") }
	if (Policy{}).Control("tcp", "8.8.8.8:443", nil) == nil {
		t.Error("allowed without knowing this machine's addresses")
	}
}

func TestClosed(t *testing.T) {
	all := Closed()
	for i, p := range all {
		if !p.Addr().Is4() || p.Masked() != p || i > 0 && (all[i-1].Overlaps(p) || !all[i-1].Addr().Less(p.Addr())) {
			t.Errorf("%v after %v", p, all[:i])
		}
	}
	// Exactly the addresses in it are not public.
	for ip, left := netip.MustParseAddr("0.0.0.3"), 1<<16; left > 0 && ip.IsValid(); left-- {
		in := false
		for _, p := range all {
			in = in || p.Contains(ip)
		}
		if c := Classify(ip); in != (c != Public && c != Documentation) {
			t.Errorf("%v is %v, closed to guests: %v", ip, c, in)
		}
		b := ip.As4()
		n := uint64(b[0])<<24 | uint64(b[1])<<16 | uint64(b[2])<<8 | uint64(b[3])
		if n += 65519; n >= 1<<32 { // the step is a prime
			break
		}
		ip = netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
	}
}
