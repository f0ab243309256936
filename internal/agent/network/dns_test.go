package network

import (
	"net/netip"
	"slices"
	"testing"
)

func TestParseResolvers(t *testing.T) {
	own := []netip.Addr{netip.MustParseAddr("192.168.1.2")}
	for text, want := range map[string][]string{
		"nameserver 10.0.0.1\nnameserver 8.8.8.8\n":                                      {"10.0.0.1", "8.8.8.8"},
		"# c\nsearch x\nnameserver 127.0.0.53\noptions edns0":                            nil,
		"nameserver ::1\nnameserver fe80::1%eth0\nnameserver 9.9.9.9 x":                  {"9.9.9.9"},
		"nameserver 192.168.1.2\nnameserver 192.168.1.1":                                 {"192.168.1.1"},
		"nameserver 1.1.1.1\nnameserver 1.1.1.1":                                         {"1.1.1.1"},
		"nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4": {"1.1.1.1", "1.1.1.2", "1.1.1.3"},
		"nameserver\nnameserver bad\nnameserver 0.0.0.0":                                 nil,
	} {
		var got []string
		for _, a := range parseResolvers([]byte(text), own) {
			got = append(got, a.String())
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: %v, not %v", text, got, want)
		}
	}
	if len(Upstreams()) == 0 {
		t.Error("no resolver")
	}
}
