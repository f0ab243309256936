package network

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/thread"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

func TestGuestReachesTheInternet(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	g := newGuest(t, acquire(t, p))

	for _, network := range []string{"tcp4", "udp4"} {
		got, err := g.call(network, internetAddr.String()+":7000")
		if err != nil {
			t.Fatalf("%s to the internet: %v", network, err)
		}
		// The source must be the host's own address, not the guest's or the slot's.
		if fields := strings.Fields(got); fields[len(fields)-1] != uplinkHost.Addr().String() {
			t.Errorf("%s to the internet came from %q", network, got)
		}
	}
}

func TestGuestResolves(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	g := newGuest(t, acquire(t, p))

	answered := map[string]int{}
	for range 6 {
		got, err := g.call("udp4", "169.254.0.22:53")
		if err != nil {
			t.Fatal("query:", err)
		}
		answered[strings.Fields(got)[0]]++
		if _, err := g.call("tcp4", "169.254.0.22:53"); err != nil {
			t.Fatal("query by TCP:", err)
		}
	}
	if answered[resolver1.String()] == 0 || answered[resolver2.String()] == 0 {
		t.Errorf("not both resolvers were queried: %v", answered)
	}
}

func TestGuestIsShutIn(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 2)
	s, neighbour := acquire(t, p), acquire(t, p)
	g, other := newGuest(t, s), newGuest(t, neighbour)

	// Everything that could respond does: the host, the other guest and the namespaces,
	// on each of their addresses.
	serveAll := func(listen func(network, address string) (any, error)) {
		t.Helper()
		for _, port := range []string{"22", "53", "80", "7000", "49983"} {
			l, err := listen("tcp4", "0.0.0.0:"+port)
			must(t, err)
			go answerTCP(l.(net.Listener))
			t.Cleanup(func() { l.(net.Listener).Close() })
			c, err := listen("udp4", "0.0.0.0:"+port)
			must(t, err)
			go answerUDP(c.(net.PacketConn), "self")
			t.Cleanup(func() { c.(net.PacketConn).Close() })
		}
	}
	plain := func(network, address string) (any, error) {
		if strings.HasPrefix(network, "tcp") {
			return net.Listen(network, address)
		}
		return net.ListenPacket(network, address)
	}
	serveAll(plain)
	must(t, other.do(func() error { serveAll(plain); return nil }))
	gateway, err := s.Listen(context.Background(), "tcp4", "169.254.0.22:7000")
	must(t, err)
	defer gateway.Close()
	go answerTCP(gateway)

	var shut []string
	addrs, err := net.InterfaceAddrs()
	must(t, err)
	for _, a := range addrs {
		if ip := a.(*net.IPNet).IP.To4(); ip != nil {
			shut = append(shut, ip.String())
		}
	}
	shut = append(shut, s.Address.String(), hostAddr(s.Index).String())
	shut = append(shut, neighbour.Address.String(), hostAddr(neighbour.Index).String())
	shut = append(shut, privateAddrs...)
	shut = append(shut, "127.0.0.1", "169.254.0.22", "169.254.0.23", "169.254.1.1", "255.255.255.255", "224.0.0.1", "240.0.0.1")
	if len(shut) < 15 || !slices.Contains(shut, uplinkHost.Addr().String()) {
		t.Fatalf("the test tries too few addresses: %v", shut)
	}

	// The listeners respond, so silence below means that the firewall works.
	for _, a := range []string{uplinkHost.Addr().String(), "10.99.0.1", neighbour.Address.String()} {
		if _, err := call(hang, "tcp4", a+":7000"); err != nil {
			t.Fatalf("host to %s: %v", a, err)
		}
	}

	var wg sync.WaitGroup
	for _, a := range shut {
		for _, port := range []string{"22", "53", "80", "7000", "49983"} {
			for _, network := range []string{"tcp4", "udp4"} {
				if a == "169.254.0.22" && port == "53" || strings.HasPrefix(a, "127.") && port != "80" {
					continue // the host's open port; the guest's own loopback
				}
				wg.Go(func() {
					if got, err := g.callWithin(silence, network, net.JoinHostPort(a, port)); err == nil {
						t.Errorf("guest reached %s %s:%s: %q", network, a, port, got)
					}
				})
			}
		}
	}
	for _, r := range []netip.Addr{resolver1, resolver2} {
		wg.Go(func() {
			if got, err := g.callWithin(silence, "tcp4", r.String()+":7000"); err == nil {
				t.Errorf("guest reached a resolver's other port: %q", got)
			}
		})
	}
	wg.Wait()

	// Each of the two firewalls works without the other. First the host's:
	t.Run("namespace open", func(t *testing.T) {
		must(t, inNamespace(s.NetNS(), func() error {
			for _, c := range []string{"forward", "input"} {
				out, err := exec.Command("nft", fmt.Sprintf("flush chain inet wrenn %s; add chain inet wrenn %s { policy accept; }", c, c)).CombinedOutput()
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
			}
			return nil
		}))
		defer func() {
			must(t, inNamespace(s.NetNS(), func() error { return slotRules(s.Address, s.config, false) }))
		}()
		var wg sync.WaitGroup
		for _, a := range shut {
			if a == s.Address.String() || strings.HasPrefix(a, "127.") || strings.HasPrefix(a, "169.254.0.2") {
				continue // inside the namespace, whose firewall is off
			}
			for _, network := range []string{"tcp4", "udp4"} {
				wg.Go(func() {
					if got, err := g.callWithin(silence, network, a+":7000"); err == nil {
						t.Errorf("guest reached %s %s: %q", network, a, got)
					}
				})
			}
		}
		wg.Wait()
		if _, err := g.call("tcp4", "169.254.0.22:7000"); err != nil {
			t.Errorf("the namespace's firewall was not off: %v", err)
		}
	})

	// The same with the host's firewall flushed by other software.
	t.Run("host open", func(t *testing.T) {
		p.guard.close()
		must(t, removeHostRules(p.block.number))
		var wg sync.WaitGroup
		for _, a := range []string{neighbour.Address.String(), "10.99.0.1", hostAddr(s.Index).String(), "192.168.7.7"} {
			wg.Go(func() {
				if got, err := g.callWithin(silence, "tcp4", a+":7000"); err == nil {
					t.Errorf("guest reached %s: %q", a, got)
				}
			})
		}
		wg.Wait()
	})
}

func TestNobodyOutsideReachesTheGuest(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	got, err := call(hang, "tcp4", s.Address.String()+":7000")
	if err != nil || got != gatewayAddr.String() {
		t.Errorf("host to guest: %q, %v", got, err)
	}
	err = inNamespace(internetNS, func() error {
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: uplinkHost.Addr().AsSlice(), Dst: &net.IPNet{IP: net.IPv4(10, 11, 0, 0).To4(), Mask: net.CIDRMask(16, 32)}}))
		_, err = call(silence, "tcp4", s.Address.String()+":7000")
		return err
	})
	if err == nil {
		t.Error("a machine beyond the host reached the guest")
	}
}

// TestLocalUsersDoNotReachTheGuest checks that on the host only root's processes, like
// the agent, reach a guest's ports.
func TestLocalUsersDoNotReachTheGuest(t *testing.T) {
	needRoot(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	must(t, g.do(func() error {
		c, err := net.ListenPacket("udp4", "0.0.0.0:7000")
		if err == nil {
			t.Cleanup(func() { c.Close() })
			go answerUDP(c, "self")
		}
		return err
	}))
	at := net.JoinHostPort(s.Address.String(), "7000")
	for _, network := range []string{"tcp4", "udp4"} {
		if _, err := call(hang, network, at); err != nil {
			t.Errorf("root over %s: %v", network, err)
		}
		var got string
		err := thread.Own(func() (err error) {
			const user = 65534
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, user, user, user); errno != 0 {
				t.Error(errno)
			}
			got, err = call(hang, network, at)
			return err
		})
		if err == nil {
			t.Errorf("another user over %s: %q", network, got)
		}
	}
}

func TestSpoofedPacketsAreDropped(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	must(t, g.do(func() error {
		link, err := netlink.LinkByName("eth0")
		must(t, err)
		for _, a := range []string{"203.0.113.77/32", "10.11.0.200/32", "169.254.0.21/30"} {
			addr, err := netlink.ParseAddr(a)
			must(t, err)
			if a != "169.254.0.21/30" {
				must(t, netlink.AddrAdd(link, addr))
			}
		}
		return nil
	}))
	seen := make(chan string, 10)
	must(t, inNamespace(internetNS, func() error {
		c, err := net.ListenPacket("udp4", "203.0.113.1:9999")
		must(t, err)
		t.Cleanup(func() { c.Close() })
		go func() {
			b := make([]byte, 100)
			for {
				n, _, err := c.ReadFrom(b)
				if err != nil {
					return
				}
				seen <- string(b[:n])
			}
		}()
		return nil
	}))
	// All packets take one path in order: when the last has arrived, the others will not.
	must(t, g.do(func() error {
		for _, from := range []string{"203.0.113.77", "10.11.0.200", "169.254.0.21"} {
			c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(from)}, net.UDPAddrFromAddrPort(netip.AddrPortFrom(internetAddr, 9999)))
			must(t, err)
			_, err = c.Write([]byte(from))
			must(t, err)
			c.Close()
		}
		return nil
	}))
	if got := await.Recv(t, "the genuine packet passes", seen); got != "169.254.0.21" {
		t.Errorf("a spoofed packet passed: %s", got)
	}
}

func TestNoIPv6(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	for _, where := range []func(func() error) error{
		func(f func() error) error { return inNamespace(s.NetNS(), f) },
		func(f func() error) error { return f() },
	} {
		must(t, where(func() error {
			links, err := netlink.LinkList()
			must(t, err)
			for _, l := range links {
				if l.Attrs().Name == "lo" {
					continue
				}
				addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
				must(t, err)
				if len(addrs) > 0 {
					t.Errorf("%s has %v", l.Attrs().Name, addrs)
				}
			}
			return nil
		}))
	}
}

func TestGatewayServices(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	g := newGuest(t, s)

	must(t, g.do(func() error {
		c, err := net.Dial("udp4", "169.254.0.22:123")
		must(t, err)
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(hang))
		request := make([]byte, 48)
		request[0] = 4<<3 | 3
		copy(request[40:], "whenIsIt")
		_, err = c.Write(request)
		must(t, err)
		answer := make([]byte, 100)
		n, err := c.Read(answer)
		must(t, err)
		if n != 48 || answer[0] != 4<<3|4 || string(answer[24:32]) != "whenIsIt" {
			t.Errorf("NTP response: % x", answer[:n])
		}
		return nil
	}))

	must(t, s.Metadata.Set(map[string]any{"sandbox_id": "cl-1", "env": map[string]string{"A": "b"}}))
	must(t, g.do(func() error {
		// Use one connection made here for all of the client's goroutines.
		c, err := net.Dial("tcp4", "169.254.169.254:80")
		must(t, err)
		client := &http.Client{Transport: &http.Transport{
			DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil },
		}}
		defer client.CloseIdleConnections()
		ask := func(method, path string, header map[string]string) (int, string) {
			req, err := http.NewRequest(method, "http://169.254.169.254"+path, nil)
			must(t, err)
			for k, v := range header {
				req.Header.Set(k, v)
			}
			res, err := client.Do(req)
			must(t, err)
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			must(t, err)
			return res.StatusCode, string(body)
		}
		_, token := ask("PUT", "/latest/api/token", map[string]string{"X-metadata-token-ttl-seconds": "60"})
		if code, got := ask("GET", "/sandbox_id", map[string]string{"X-metadata-token": token}); code != 200 || got != "cl-1" {
			t.Errorf("metadata: %d %q", code, got)
		}
		return nil
	}))
}

func TestConnectionsAreBounded(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s, other := acquire(t, p), acquire(t, p)
	g, neighbour := newGuest(t, s), newGuest(t, other)
	n := 0
	// On a busy machine, most packets of a burst are lost.
	await.Until(t, "some connections are tracked", func() bool {
		must(t, g.do(func() error {
			c, err := net.ListenPacket("udp4", ":5000")
			must(t, err)
			defer c.Close()
			for port := range int(p.connections.Load()) + 1000 {
				_, err := c.WriteTo([]byte("x"), &net.UDPAddr{IP: internetAddr.AsSlice(), Port: 10000 + port})
				must(t, err)
			}
			return nil
		}))
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		must(t, err)
		n = 0
		for _, f := range flows {
			if (connectionsOf{s.Address: true}).MatchConntrackFlow(f) {
				n++
			}
		}
		return n >= 100
	})
	if n > int(p.connections.Load())+10 {
		t.Errorf("the host tracks %d connections of one guest", n)
	}
	if _, err := neighbour.call("udp4", internetAddr.String()+":7000"); err != nil {
		t.Error("another guest to the internet:", err)
	}
}

func TestConnectionsAreForgotten(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	_, err := g.call("udp4", internetAddr.String()+":7000")
	must(t, err)
	mine := connectionsOf{s.Address: true}
	of := func() (n int) {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		must(t, err)
		for _, f := range flows {
			if mine.MatchConntrackFlow(f) {
				n++
			}
		}
		return n
	}
	if of() == 0 {
		t.Fatal("no connection was tracked")
	}
	must(t, p.Release(context.Background(), s))
	if n := of(); n > 0 {
		t.Errorf("%d connections are still tracked", n)
	}
}
