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

// maxUpstreams bounds the resolvers taken from a file, like resolv.conf(5) does.
const maxUpstreams = 3

// Upstreams returns this machine's DNS resolvers that guests can reach: those in
// /etc/resolv.conf, or those of systemd-resolved if that names only its stub. If there are
// none, it returns public ones.
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

// parseResolvers returns the IPv4 name servers in a resolv.conf, without this machine's own
// addresses, which guests cannot reach.
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
