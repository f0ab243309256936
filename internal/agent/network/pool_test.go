package network

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/layout"
)

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
			t.Fatalf("%s was acquired twice", s.Address)
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

// TestFullDisk checks that an agent gets its old block again on a full disk, whether its
// predecessor was killed or ended cleanly.
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
		t.Fatal("both pools have one block")
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
	// The first pool closes; the second still works.
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
	// A new network namespace inherits the host's setting.
	was := forwarding()
	must(t, sysctl(ipForward, "0"))
	defer func() { must(t, sysctl(ipForward, was)) }()
	p, q := openPool(t, layout.Dir(t.TempDir()), 1), openPool(t, layout.Dir(t.TempDir()), 1)
	must(t, p.Close(context.Background(), nil))
	if forwarding() != "1" {
		t.Error("forwarding is off while another pool is open")
	}
	must(t, q.Close(context.Background(), nil))
	if forwarding() != "0" {
		t.Error("forwarding is still on")
	}
	// If it was on before, it stays on.
	must(t, sysctl(ipForward, "1"))
	r := openPool(t, layout.Dir(t.TempDir()), 1)
	must(t, r.Close(context.Background(), nil))
	if forwarding() != "1" {
		t.Error("forwarding was turned off although it was on before")
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
		// This connection attempt starts before the rules are back, and succeeds when
		// they are.
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
		t.Error("took the block of one of the host's own networks")
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
	// Obstruct the next slots.
	h := p.host
	next := s.Index + 40
	attrs := netlink.NewLinkAttrs()
	attrs.Name = linkName(next)
	must(t, h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "inway"}))
	if err := p.create(next); err == nil {
		t.Error("created a slot over another link")
	}
	if _, err := os.Stat(layout.Namespace(next)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace left: %v", err)
	}
	if err := p.create(next); err != nil {
		t.Errorf("the second attempt failed too: %v", err)
	}
	must(t, destroy(h, next))
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := p.Acquire(canceled); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
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
		if len(name) >= unix.IFNAMSIZ { // the last byte is a NUL
			t.Fatalf("%s is too long", name)
		}
		if back, ok := linkSlot(name); back != i || !ok {
			t.Fatalf("slot %d's link %s is mistaken for that of slot %d", i, name, back)
		}
	}
	for _, name := range []string{"wrenn-veth-", "wrenn-veth-01", "wrenn-veth--1", "wrenn-veth-aa", "wrenn-veth-10000", "wrenn-veth-1x", "eth0"} {
		if i, ok := linkSlot(name); ok {
			t.Errorf("%s is mistaken for the link of slot %d", name, i)
		}
	}
}

// TestLastSlot checks that the slot with the longest number works like the others.
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
