package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/layout"
)

func TestRestartTakesBack(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 2)
	s, dropped := acquire(t, p), acquire(t, p)
	g := newGuest(t, s)

	// This connection of the guest survives the restart.
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
	defer far.Close() // the guest's end may vanish silently

	must(t, p.Close(context.Background(), []int{s.Index}))
	echo()
	if _, err := os.Stat(dropped.NetNS()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a slot that was not kept still exists: %v", err)
	}

	// Another installation starts now, and gets another block.
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
	for range 2 { // each stays, because its machine runs
		for _, i := range []int{keep[0], keep[2]} {
			if _, err := p.Reclaim(context.Background(), i, 0); err == nil || strings.Contains(err.Error(), "keeps") {
				t.Errorf("slot %d: %v", i, err)
			}
		}
	}
	if err := inNamespace(layout.Namespace(keep[2]), func() error { return nil }); err != nil {
		t.Errorf("a slot without its tap was removed: %v", err)
	}
	for range 5 {
		if s := acquire(t, p); slices.Contains(keep, s.Index) {
			t.Errorf("slot %d was handed out while its machine runs", s.Index)
		}
	}
	if _, err := p.Reclaim(context.Background(), keep[1], 0); err != nil {
		t.Errorf("a slot without its veth: %v", err)
	}
	if _, err := netlink.LinkByName(linkName(keep[1])); err != nil {
		t.Errorf("the veth was not recreated: %v", err)
	}
	// Once the machine has ended, the slot is removed.
	p.Forget(keep[2])
	if _, err := os.Stat(layout.Namespace(keep[2])); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an unused slot still exists: %v", err)
	}
	p.Forget(keep[1]) // reclaimed
	if _, err := netlink.LinkByName(linkName(keep[1])); err != nil {
		t.Errorf("a slot in use was removed: %v", err)
	}
}

// TestForeignSlots starts an agent whose records name slots that cannot be its own: it
// starts anyway, and touches nothing of others.
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
			t.Fatal("both pools have one block")
		}
		if _, err := p.Reclaim(context.Background(), s.Index, 0); err == nil {
			t.Error("another agent's slot was taken back")
		}
		must(t, problems(p))
		must(t, p.Close(context.Background(), []int{s.Index}))
		if _, err := os.Stat(s.NetNS()); err != nil {
			t.Errorf("another agent's slot was removed: %v", err)
		}
		if running {
			must(t, q.Close(context.Background(), []int{s.Index}))
		}
	}
	openPool(t, elsewhere, 1) // removes the leftovers
}

// TestUnknownMachines starts an agent that cannot read all its records: it keeps the
// slots that have processes.
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
			t.Errorf("an empty slot still exists: %v", err)
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

// crash leaves a pool like a killed agent: nothing undone, the lock released.
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
	// Unfinished slots too.
	first := p.block.number * blockSlots
	must(t, os.WriteFile(layout.Namespace(first+300), nil, 0o444))
	attrs := netlink.NewLinkAttrs()
	attrs.Name = linkName(first + 301)
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "half"}))

	// An installation in another folder does not touch them.
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
	if len(names) > 4 { // kept ones, and one that each pool prepares
		t.Errorf("stale namespaces: %v", names)
	}
	if _, err := os.Stat(kept.NetNS()); err != nil {
		t.Errorf("the kept one was removed: %v", err)
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
