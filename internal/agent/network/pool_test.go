package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
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
		// Not the guest's, not the slot's address: the host's own.
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
		t.Errorf("not both resolvers were asked: %v", answered)
	}
}

func TestGuestIsShutIn(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 2)
	s, neighbour := acquire(t, p), acquire(t, p)
	g, other := newGuest(t, s), newGuest(t, neighbour)

	// Everything that could answer does: the host and the other guest on
	// every address they have, the namespaces on theirs.
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
		t.Fatalf("the test looks at too little: %v", shut)
	}

	// The listeners answer, so that silence below means a closed door.
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
					continue // that one is open; the guest's own loopback
				}
				wg.Go(func() {
					if got, err := g.callWithin(time.Second, network, net.JoinHostPort(a, port)); err == nil {
						t.Errorf("guest reached %s %s:%s: %q", network, a, port, got)
					}
				})
			}
		}
	}
	for _, r := range []netip.Addr{resolver1, resolver2} {
		wg.Go(func() {
			if got, err := g.callWithin(time.Second, "tcp4", r.String()+":7000"); err == nil {
				t.Errorf("guest reached a resolver's other port: %q", got)
			}
		})
	}
	wg.Wait()

	// Each of the two walls holds without the other. First the host's:
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
				continue // inside the namespace, which is open
			}
			for _, network := range []string{"tcp4", "udp4"} {
				wg.Go(func() {
					if got, err := g.callWithin(time.Second, network, a+":7000"); err == nil {
						t.Errorf("guest reached %s %s: %q", network, a, got)
					}
				})
			}
		}
		wg.Wait()
		if _, err := g.call("tcp4", "169.254.0.22:7000"); err != nil {
			t.Errorf("the namespace was not open: %v", err)
		}
	})

	// The same with the host's firewall flushed by someone.
	t.Run("host open", func(t *testing.T) {
		p.guard.close()
		must(t, removeHostRules(p.block.number))
		for _, a := range []string{neighbour.Address.String(), "10.99.0.1", hostAddr(s.Index).String(), "192.168.7.7"} {
			if got, err := g.callWithin(time.Second, "tcp4", a+":7000"); err == nil {
				t.Errorf("guest reached %s: %q", a, got)
			}
		}
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
		_, err = call(time.Second, "tcp4", s.Address.String()+":7000")
		return err
	})
	if err == nil {
		t.Error("a machine beyond the host reached the guest")
	}
}

// TestLocalUsersDoNotReachTheGuest: of the processes on the host only root's, which the
// agent is, reach a guest's ports.
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
	// In order, through one path: when the last has come, the others will not.
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
	select {
	case got := <-seen:
		if got != "169.254.0.21" {
			t.Errorf("a spoofed packet passed: %s", got)
		}
	case <-time.After(hang):
		t.Error("the honest packet did not pass")
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
			t.Errorf("NTP answer: % x", answer[:n])
		}
		return nil
	}))

	must(t, s.Metadata.Set(map[string]any{"sandbox_id": "cl-1", "env": map[string]string{"A": "b"}}))
	must(t, g.do(func() error {
		// One connection made here; the client's goroutines use no other.
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

func TestReleaseAndRefill(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	p := openPool(t, layout.Dir(t.TempDir()), 3)
	var slots []*Slot
	for range 64 {
		slots = append(slots, acquire(t, p))
	}
	seen := map[netip.Addr]bool{}
	for _, s := range slots {
		if seen[s.Address] {
			t.Fatalf("%s was given twice", s.Address)
		}
		seen[s.Address] = true
	}
	var wg sync.WaitGroup
	for _, s := range slots {
		wg.Go(func() {
			if err := p.Release(context.Background(), s); err != nil {
				t.Error(err)
			}
			if err := p.Release(context.Background(), s); err != nil {
				t.Error("released twice:", err)
			}
		})
	}
	wg.Wait()
	p.mu.Lock()
	if len(p.used) != 0 {
		t.Errorf("still used: %v", p.used)
	}
	p.mu.Unlock()
}

func TestSixtyFourAtOnce(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	p := openPool(t, layout.Dir(t.TempDir()), 4)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			s, err := p.Acquire(context.Background())
			if err != nil {
				t.Error(err)
				return
			}
			if err := p.Release(context.Background(), s); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestRestartTakesBack(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 2)
	s, dropped := acquire(t, p), acquire(t, p)
	g := newGuest(t, s)

	// A connection of the guest's that lives through the restart.
	var conn net.Conn
	accepted := make(chan net.Conn, 1)
	must(t, inNamespace(internetNS, func() error {
		l, err := net.Listen("tcp4", "203.0.113.1:8888")
		must(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
			b := make([]byte, 1)
			for {
				if _, err := c.Read(b); err != nil {
					return
				}
				_, _ = c.Write(b)
			}
		}()
		return nil
	}))
	must(t, g.do(func() (err error) {
		conn, err = net.DialTimeout("tcp4", "203.0.113.1:8888", hang)
		return err
	}))
	defer conn.Close()
	echo := func() {
		t.Helper()
		_ = conn.SetDeadline(time.Now().Add(hang))
		_, err := conn.Write([]byte("x"))
		must(t, err)
		_, err = conn.Read(make([]byte, 1))
		must(t, err)
	}
	echo()
	far := <-accepted
	defer far.Close() // the guest's own end may go without a word

	must(t, p.Close(context.Background(), []int{s.Index}))
	echo()
	if _, err := os.Stat(dropped.NetNS()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a slot that was not to be kept is there: %v", err)
	}

	// Meanwhile another installation comes, and gets another block.
	q := openPool(t, layout.Dir(t.TempDir()), 1)
	if q.block.number == p.block.number {
		t.Fatal("a block with living VMs was given to another installation")
	}

	p = openPool(t, dir, 2, s.Index)
	back, err := p.Reclaim(context.Background(), s.Index, 0)
	must(t, err)
	if back.Address != s.Address {
		t.Errorf("came back at %s", back.Address)
	}
	if _, err := p.Reclaim(context.Background(), s.Index, 0); err == nil {
		t.Error("reclaimed twice")
	}
	echo()
	if _, err := g.call("tcp4", internetAddr.String()+":7000"); err != nil {
		t.Error("guest to the internet after the restart:", err)
	}
	must(t, g.do(func() error {
		c, err := net.DialTimeout("tcp4", "169.254.169.254:80", hang)
		if err == nil {
			c.Close()
		}
		return err
	}))
	for range 5 {
		if n := acquire(t, p); n.Index == s.Index {
			t.Fatal("a kept slot was handed out")
		}
	}
}

func TestReclaimOfBrokenSlot(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 1)
	var keep []int
	for range 3 {
		keep = append(keep, acquire(t, p).Index)
	}
	must(t, p.Close(context.Background(), keep))

	must(t, removeNamespace(layout.Namespace(keep[0])))
	must(t, removeNamespace(oldNamespace(keep[0])))
	link, err := netlink.LinkByName(linkName(keep[1]))
	must(t, err)
	must(t, netlink.LinkDel(link))
	must(t, inNamespace(layout.Namespace(keep[2]), func() error {
		f, err := openTap(tapName, unix.IFF_VNET_HDR)
		must(t, err)
		defer f.Close()
		return unix.IoctlSetInt(int(f.Fd()), unix.TUNSETPERSIST, 0)
	}))

	p = openPool(t, dir, 1, keep...)
	for range 2 { // each stays kept, for its machine runs
		for _, i := range []int{keep[0], keep[2]} {
			if _, err := p.Reclaim(context.Background(), i, 0); err == nil || strings.Contains(err.Error(), "keeps") {
				t.Errorf("slot %d: %v", i, err)
			}
		}
	}
	if err := inNamespace(layout.Namespace(keep[2]), func() error { return nil }); err != nil {
		t.Errorf("a slot without its tap is gone: %v", err)
	}
	for range 5 {
		if s := acquire(t, p); slices.Contains(keep, s.Index) {
			t.Errorf("slot %d was handed out, and its machine runs", s.Index)
		}
	}
	if _, err := p.Reclaim(context.Background(), keep[1], 0); err != nil {
		t.Errorf("a slot without its veth: %v", err)
	}
	if _, err := netlink.LinkByName(linkName(keep[1])); err != nil {
		t.Errorf("the veth was not made again: %v", err)
	}
	// Once the machine has ended, nothing of it is left.
	p.Forget(keep[2])
	if _, err := os.Stat(layout.Namespace(keep[2])); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a slot that nobody needs is left: %v", err)
	}
	p.Forget(keep[1]) // reclaimed
	if _, err := netlink.LinkByName(linkName(keep[1])); err != nil {
		t.Errorf("a slot in use was removed: %v", err)
	}
}

// TestForeignSlots has records name slots that cannot be this agent's: it starts
// all the same, and touches nothing of others.
func TestForeignSlots(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 1)
	s := acquire(t, p)
	must(t, p.Close(context.Background(), []int{s.Index}))
	foreign := []int{-5, blocks*blockSlots + 7, s.Index + blockSlots}

	p = openPool(t, dir, 1, append(foreign, s.Index)...)
	for _, i := range foreign {
		if _, err := p.Reclaim(context.Background(), i, 0); err == nil {
			t.Errorf("slot %d was taken back", i)
		}
		p.Forget(i)
	}
	_, err := p.Reclaim(context.Background(), s.Index, 0)
	must(t, err)
	must(t, problems(p))
	must(t, p.Close(context.Background(), []int{s.Index}))

	// Another agent takes the block.
	elsewhere := layout.Dir(t.TempDir())
	must(t, os.MkdirAll(elsewhere.Run(), 0o755))
	must(t, os.WriteFile(elsewhere.NetworkBlock(), []byte(fmt.Sprintln(p.block.number)), 0o644))
	must(t, os.WriteFile(blockFile(p.block.number), []byte(string(elsewhere)+"\n"), 0o644))
	q := openPool(t, elsewhere, 1, s.Index)
	if q.block.number != p.block.number {
		t.Fatalf("the other agent has block %d", q.block.number)
	}
	for _, running := range []bool{true, false} {
		p = openPool(t, dir, 1, s.Index)
		if p.block.number == q.block.number {
			t.Fatal("one block for two")
		}
		if _, err := p.Reclaim(context.Background(), s.Index, 0); err == nil {
			t.Error("another agent's slot was taken back")
		}
		must(t, problems(p))
		must(t, p.Close(context.Background(), []int{s.Index}))
		if _, err := os.Stat(s.NetNS()); err != nil {
			t.Errorf("another agent's slot is gone: %v", err)
		}
		if running {
			must(t, q.Close(context.Background(), []int{s.Index}))
		}
	}
	openPool(t, elsewhere, 1) // removes what is left
}

// TestUnknownMachines has an agent start that cannot read all its records: it
// keeps the slots in which somebody is.
func TestUnknownMachines(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 1)
	s, empty := acquire(t, p), acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	vm := exec.Command("nsenter", "--net="+s.NetNS(), "sleep", "600")
	must(t, vm.Start())
	defer func() { _ = vm.Process.Kill(); _ = vm.Wait() }()
	eventually(t, "the process", func() error {
		all, err := inhabited()
		if err == nil && !all.has(s.NetNS()) {
			err = errors.New("it is not in the slot")
		}
		return err
	})
	crash(t, p)
	for range 2 {
		p = openUnknown(t, dir)
		if _, err := os.Stat(empty.NetNS()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a slot in which nobody is stays: %v", err)
		}
		must(t, p.Close(context.Background(), nil))
	}
	p = openUnknown(t, dir)
	back, err := p.Reclaim(context.Background(), s.Index, vm.Process.Pid)
	must(t, err)
	must(t, g.online(back))
}

func openUnknown(t testing.TB, dir layout.Dir) *Pool {
	t.Helper()
	return openPoolWith(t, Config{Dir: dir, Ready: 1, Unknown: true})
}

// crash leaves a pool as a killed agent would: nothing undone, the lock gone.
func crash(t *testing.T, p *Pool) {
	t.Helper()
	p.cancel()
	p.refill.Wait()
	p.guard.close()
	p.mu.Lock()
	p.closed = true
	for _, s := range p.linked {
		s.silence()
		s.ns.Close()
	}
	p.mu.Unlock()
	p.host.Close()
	must(t, p.block.lock.Close())
}

func TestCrashLeavesNothingForLong(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 2)
	for range 3 {
		acquire(t, p)
	}
	kept := acquire(t, p)
	crash(t, p)
	// Half-made ones too.
	first := p.block.number * blockSlots
	must(t, os.WriteFile(layout.Namespace(first+300), nil, 0o444))
	attrs := netlink.NewLinkAttrs()
	attrs.Name = linkName(first + 301)
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "half"}))

	// An installation elsewhere does not touch them.
	q := openPool(t, layout.Dir(t.TempDir()), 1)
	if q.block.number == p.block.number {
		t.Fatal("a crashed installation's block was taken")
	}

	again := openPool(t, dir, 1, kept.Index)
	if again.block.number != p.block.number {
		t.Errorf("came back with block %d after %d", again.block.number, p.block.number)
	}
	names, err := filepath.Glob(filepath.Join(layout.Namespaces(), "*"))
	must(t, err)
	if len(names) > 4 { // kept, and each pool's own being prepared
		t.Errorf("stale namespaces: %v", names)
	}
	if _, err := os.Stat(kept.NetNS()); err != nil {
		t.Errorf("the kept one is gone: %v", err)
	}
	if _, err := again.Reclaim(context.Background(), kept.Index, 0); err != nil {
		t.Error(err)
	}
}

func TestBlockOfAVanishedInstallationIsTaken(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	dir := filepath.Join(t.TempDir(), "gone")
	p := openPool(t, layout.Dir(dir), 1)
	acquire(t, p)
	crash(t, p)
	must(t, os.RemoveAll(dir))
	q := openPool(t, layout.Dir(t.TempDir()), 1)
	if q.block.number != p.block.number {
		t.Errorf("took block %d, not %d", q.block.number, p.block.number)
	}
}

// TestFullDisk: an agent that ran before, and was killed or ended well, gets its block
// again on a full disk.
func TestFullDisk(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	dir := layout.Dir(t.TempDir())
	must(t, unix.Mount("tmpfs", string(dir), "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { must(t, unix.Unmount(string(dir), unix.MNT_DETACH)) })
	p := openPool(t, dir, 1)
	want := p.block.number
	if err := os.WriteFile(filepath.Join(string(dir), "filler"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	crash(t, p)
	for range 2 {
		p = openPool(t, dir, 1)
		if p.block.number != want {
			t.Errorf("took block %d, not %d", p.block.number, want)
		}
		must(t, p.Close(context.Background(), nil))
	}
}

func TestOneAgentPerInstallation(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	dir := layout.Dir(t.TempDir())
	openPool(t, dir, 1)
	if _, err := Open(context.Background(), Config{Dir: dir}, nil); err == nil {
		t.Error("two pools on one folder")
	}
}

func TestTwoPoolsAtOnce(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p, q := openPool(t, layout.Dir(t.TempDir()), 1), openPool(t, layout.Dir(t.TempDir()), 1)
	a, b := acquire(t, p), acquire(t, q)
	if p.block.number == q.block.number {
		t.Fatal("one block for two")
	}
	g, h := newGuest(t, a), newGuest(t, b)
	for _, x := range []*guest{g, h} {
		x.serve(t)
		if _, err := x.call("tcp4", internetAddr.String()+":7000"); err != nil {
			t.Error("to the internet:", err)
		}
	}
	if _, err := g.callWithin(time.Second, "tcp4", b.Address.String()+":7000"); err == nil {
		t.Error("one pool's guest reached the other's")
	}
	// The first goes; the second still works.
	must(t, p.Close(context.Background(), nil))
	if _, err := h.call("tcp4", internetAddr.String()+":7000"); err != nil {
		t.Error("to the internet after the other pool closed:", err)
	}
	if _, err := call(hang, "tcp4", b.Address.String()+":7000"); err != nil {
		t.Error("host to guest:", err)
	}
}

func TestForwardingIsRestored(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	forwarding := func() string {
		b, err := os.ReadFile("/proc/sys/" + ipForward)
		must(t, err)
		return strings.TrimSpace(string(b))
	}
	// A new network namespace begins with what the host has.
	was := forwarding()
	must(t, sysctl(ipForward, "0"))
	defer func() { must(t, sysctl(ipForward, was)) }()
	p, q := openPool(t, layout.Dir(t.TempDir()), 1), openPool(t, layout.Dir(t.TempDir()), 1)
	must(t, p.Close(context.Background(), nil))
	if forwarding() != "1" {
		t.Error("off while another pool is open")
	}
	must(t, q.Close(context.Background(), nil))
	if forwarding() != "0" {
		t.Error("still on")
	}
	// Where it was on it stays on.
	must(t, sysctl(ipForward, "1"))
	r := openPool(t, layout.Dir(t.TempDir()), 1)
	must(t, r.Close(context.Background(), nil))
	if forwarding() != "1" {
		t.Error("turned off though it was on before")
	}
}

func TestOtherTablesStay(t *testing.T) {
	needRoot(t)
	out, err := exec.Command("nft", "add table inet filter; add chain inet filter input { type filter hook input priority 0; policy accept; }; add rule inet filter input tcp dport 9 drop").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { must(t, exec.Command("nft", "delete table inet filter").Run()) })
	sameAfter(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	acquire(t, p)
}

func TestRulesComeBack(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	g := newGuest(t, acquire(t, p))
	for range 3 {
		out, err := exec.Command("nft", "flush ruleset").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		// Begun before the rules are back, it goes through when they are.
		if _, err := g.callWithin(hang, "tcp4", internetAddr.String()+":7000"); err != nil {
			t.Error("to the internet after the host's firewall was flushed:", err)
		}
	}
}

func TestObstacles(t *testing.T) {
	needRoot(t)
	if got := Obstacles(); got != nil {
		t.Fatalf("on an empty host: %q", got)
	}
	out, err := exec.Command("nft", "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { must(t, exec.Command("nft", "delete table ip filter").Run()) })
	if got := Obstacles(); len(got) != 1 || !strings.Contains(got[0], "ip filter FORWARD") {
		t.Errorf("%q", got)
	}
}

func TestBlockAvoidsTakenAddresses(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	lan, err := netlink.ParseAddr("10.11.1.7/24")
	must(t, err)
	must(t, netlink.AddrAdd(lo, lan))
	t.Cleanup(func() { must(t, netlink.AddrDel(lo, lan)) })
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	if p.block.number == 0 {
		t.Error("took the block of a network that the host is in")
	}
}

func TestUnusableResolvers(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	for _, a := range []string{"127.0.0.53", "::1", "2001:db8::1", "0.0.0.0", "224.0.0.1"} {
		_, err := Open(context.Background(), Config{Dir: layout.Dir(t.TempDir()), Upstreams: []netip.Addr{netip.MustParseAddr(a)}}, nil)
		if err == nil || !strings.Contains(err.Error(), a) {
			t.Errorf("%s: %v", a, err)
		}
	}
}

func TestAcquireFailureLeavesNothing(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 1)
	s := acquire(t, p)
	// Something is in the way of the next slots.
	h := p.host
	next := s.Index + 40
	attrs := netlink.NewLinkAttrs()
	attrs.Name = linkName(next)
	must(t, h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "inway"}))
	if err := p.create(next); err == nil {
		t.Error("made a slot over another link")
	}
	if _, err := os.Stat(layout.Namespace(next)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace left: %v", err)
	}
	if err := p.create(next); err != nil {
		t.Errorf("not even the second time: %v", err)
	}
	must(t, destroy(h, next))
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := p.Acquire(canceled); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s, other := acquire(t, p), acquire(t, p)
	g, neighbour := newGuest(t, s), newGuest(t, other)
	n := 0
	// On a busy machine most packets of a burst are lost on the wire.
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
		t.Errorf("%d connections remembered", n)
	}
}

func TestAddressPlan(t *testing.T) {
	last := blocks*blockSlots - 1
	if got := outsideAddr(last).String(); got != "10.11.255.255" {
		t.Errorf("last slot at %s", got)
	}
	for _, i := range []int{0, 1, 511, 512, 1023, last} {
		block := blockPrefix(i / blockSlots)
		if !block.Contains(hostAddr(i)) || !block.Contains(outsideAddr(i)) || hostAddr(i).As4()[3]%2 != 0 {
			t.Errorf("slot %d: %s and %s are not both in %s", i, hostAddr(i), outsideAddr(i), block)
		}
	}
	for i := range last + 1 {
		name := linkName(i)
		if len(name) >= unix.IFNAMSIZ { // a NUL ends it
			t.Fatalf("%s is too long", name)
		}
		if back, ok := linkSlot(name); back != i || !ok {
			t.Fatalf("slot %d's link %s is taken for that of slot %d", i, name, back)
		}
	}
	for _, name := range []string{"wrenn-veth-", "wrenn-veth-01", "wrenn-veth--1", "wrenn-veth-aa", "wrenn-veth-10000", "wrenn-veth-1x", "eth0"} {
		if i, ok := linkSlot(name); ok {
			t.Errorf("%s is taken for the link of slot %d", name, i)
		}
	}
}

// TestLastSlot: the slot with the longest number works as the others do.
func TestLastSlot(t *testing.T) {
	needRoot(t)
	p := openPool(t, layout.Dir(t.TempDir()), 0)
	last := blocks*blockSlots - 1
	must(t, p.create(last))
	if _, err := netlink.LinkByName(linkName(last)); err != nil {
		t.Error(err)
	}
	must(t, destroy(p.host, last))
	if _, err := netlink.LinkByName(linkName(last)); err == nil {
		t.Error("its link is left")
	}
}

func BenchmarkSlot(b *testing.B) {
	needRoot(b)
	p := openPool(b, layout.Dir(b.TempDir()), 1)
	first := p.block.number*blockSlots + 400
	b.Run("create", func(b *testing.B) {
		for b.Loop() {
			must(b, p.create(first))
			b.StopTimer()
			must(b, destroy(p.host, first))
			b.StartTimer()
		}
	})
	b.Run("destroy", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			must(b, p.create(first))
			b.StartTimer()
			must(b, destroy(p.host, first))
		}
	})
}
