package network

import (
	"bufio"
	"bytes"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// maxUpstreams bounds the resolvers taken from a file; resolv.conf(5) itself
// takes three.
const maxUpstreams = 3

// Upstreams are the DNS resolvers that this machine uses and that a guest can
// reach through it: those of /etc/resolv.conf, or, where that names only
// systemd-resolved's stub, those behind it; public ones when there are none.
func Upstreams() []netip.Addr {
	own := ownAddresses()
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if found := parseResolvers(text, own); len(found) > 0 {
			return found
		}
	}
	return []netip.Addr{netip.AddrFrom4([4]byte{1, 1, 1, 1}), netip.AddrFrom4([4]byte{8, 8, 8, 8})}
}

// parseResolvers finds the IPv4 name servers in a resolv.conf, without this
// machine's own addresses, which are closed to guests.
func parseResolvers(text []byte, own []netip.Addr) []netip.Addr {
	var found []netip.Addr
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan() && len(found) < maxUpstreams; {
		words := strings.Fields(s.Text())
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(words[1])
		if err != nil || !usableUpstream(a.Unmap()) || slices.Contains(own, a.Unmap()) || slices.Contains(found, a.Unmap()) {
			continue
		}
		found = append(found, a.Unmap())
	}
	return found
}

func usableUpstream(a netip.Addr) bool {
	return a.Is4() && !a.IsLoopback() && !a.IsUnspecified() && !a.IsMulticast()
}

func ownAddresses() []netip.Addr {
	nets, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var own []netip.Addr
	for _, n := range nets {
		if n, ok := n.(*net.IPNet); ok {
			if a, ok := netip.AddrFromSlice(n.IP); ok {
				own = append(own, a.Unmap())
			}
		}
	}
	return own
}
