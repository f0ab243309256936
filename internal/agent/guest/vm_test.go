package guest

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/network/ntp"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qemu"
)

// TestImages makes the kernel and the template that the tests with a machine start from.
func TestImages(t *testing.T) { imagetest.Prepare(t) }

// realGuest is a virtual machine on a network with the time that a test wants.
type realGuest struct {
	*Client
	vm     vmm.VM
	offset atomic.Int64 // nanoseconds that the network's time is ahead of the host's
}

// bootGuest boots a machine whose disk has so many MiB, which may be more than
// its file system has, and waits until its daemon answers.
func bootGuest(t *testing.T, more int64) *realGuest {
	t.Helper()
	if os.Getenv(roleEnv) != "inside" {
		t.Skip("needs root to start virtual machines")
	}
	if _, err := os.Stat(qemu.Binary); err != nil {
		t.Skip("needs QEMU")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
	if err := cgroup.Available(); err != nil {
		t.Skip(err)
	}
	in := imagetest.Prepare(t)
	d, err := qemu.Open(qemu.TCG, t.TempDir(), slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	g := &realGuest{}
	tap := g.network(t)
	dir, err := os.MkdirTemp("", "wrenn-guest-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	const uid = 1_999_997
	s := vmm.Spec{
		ID: uuid.New(), Dir: dir, Kernel: in.Kernel.Vmlinux, Initrd: in.Kernel.Initrd, Cmdline: Cmdline("captured"),
		VCPUs: 1, MemoryMiB: 256, Base: in.Minimal.Rootfs, UID: uid, Tap: tap, MAC: MAC,
		Overlay: filepath.Join(dir, "overlay.qcow2"),
	}
	if err := disk.CreateOverlay(s.Overlay, int64(in.Minimal.DiskMiB)<<20+more, uid); err != nil {
		t.Fatal(err)
	}
	if g.vm, err = d.Start(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.vm.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	g.Client = New(netip.MustParsePrefix(Address).Addr(), "")
	t.Cleanup(g.Close)
	if err := g.Wait(within(t, 90*time.Second)); err != nil {
		console, _ := g.vm.Console(context.Background())
		t.Fatalf("%v: %s", err, console)
	}
	return g
}

// network makes the guest's network, as a slot has it, with a time service.
func (g *realGuest) network(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	tap := os.NewFile(uintptr(fd), "tap")
	t.Cleanup(func() { tap.Close() })
	req, err := unix.NewIfreq("wrenn-tap")
	if err != nil {
		t.Fatal(err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("wrenn-tap")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(Gateway), Mask: net.CIDRMask(30, 32)}}); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	clock, err := net.ListenPacket("udp4", Gateway+":123")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	t.Cleanup(func() { clock.Close(); <-served })
	go func() {
		defer close(served)
		var b [512]byte
		for {
			n, from, err := clock.ReadFrom(b[:])
			if err != nil {
				return
			}
			if a, err := ntp.Answer(b[:n], time.Now().Add(time.Duration(g.offset.Load()))); err == nil {
				_, _ = clock.WriteTo(a[:], from)
			}
		}
	}()
	return tap
}

// run runs a script as root in the guest and returns what it prints.
func (g *realGuest) run(t *testing.T, script string) string {
	t.Helper()
	res, err := g.Exec(within(t, 60*time.Second), Command{Cmd: "/bin/sh", Args: []string{"-c", script}, User: "root"}, nil)
	if err != nil || res.Code != 0 {
		t.Fatalf("%s: %v, %d, %s", script, err, res.Code, res.Stderr)
	}
	return strings.TrimSpace(string(res.Stdout))
}

// ahead is how far the guest's clock is ahead of this machine's, within what
// the asking takes.
func (g *realGuest) ahead(t *testing.T) time.Duration {
	t.Helper()
	before := time.Now()
	seconds, err := strconv.ParseFloat(g.run(t, "date +%s.%N"), 64)
	if err != nil {
		t.Fatal(err)
	}
	shown := time.UnixMicro(int64(seconds * 1e6))
	if after := time.Now(); shown.After(after) {
		return shown.Sub(after)
	}
	return min(0, shown.Sub(before))
}

// A guest whose memory is of another time and another sandbox.
func TestRealGuestBecomesItsSandboxs(t *testing.T) {
	const more = 1 << 30
	g := bootGuest(t, more)
	begin := time.Now()
	if r, err := g.Init(within(t, 60*time.Second), Settings{Token: "first"}); err != nil || len(r.Warnings) > 0 {
		t.Fatal(r, err)
	}
	t.Logf("the first /init took %v", time.Since(begin))
	disk := func() int {
		n, err := strconv.Atoi(g.run(t, "df --output=size -B1 / | tail -1"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := disk()
	if got := g.run(t, "hostname; cat /etc/hostname; getent hosts captured"); got != "captured\ncaptured\n127.0.1.1       captured" {
		t.Errorf("it is named %q", got)
	}
	id := g.run(t, "echo 10.9.8.7 friend >>/etc/hosts; cat /etc/machine-id")

	// The time before the capture, which chronyd follows.
	for _, past := range []time.Duration{-5 * time.Second, -3 * time.Hour} {
		g.offset.Store(int64(past))
		for end := time.Now().Add(60 * time.Second); (g.ahead(t) - past).Abs() > 2*time.Second; time.Sleep(500 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("chronyd does not follow the network's time")
			}
		}
		p, err := g.Start(t.Context(), Command{Cmd: "/bin/sh", Args: []string{"-c", "i=0; while :; do i=$((i+1)); echo $i; date +%s >/tmp/now; sleep 0.1; done"}}, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := p.Next(); err != nil || len(out.Stdout) == 0 {
			t.Fatal(out, err)
		}
		if err := g.Freeze(within(t, 20*time.Second)); err != nil {
			t.Fatal(err)
		}

		g.offset.Store(0)
		begin := time.Now()
		s := Settings{Token: "clone" + past.String(), Envs: map[string]string{"WHOSE": "clone"}, Hostname: "clone", GrowDisk: int64(before) + more, Thaw: true}
		r, err := g.Init(within(t, 60*time.Second), s)
		if err != nil || len(r.Warnings) > 0 {
			t.Fatal(r, err)
		}
		t.Logf("/init with everything took %v", time.Since(begin))
		if d := g.ahead(t); d.Abs() > time.Second {
			t.Errorf("after /init the clock is off by %v", d)
		}
		// The stream of before has ended, the process goes on, in the right time.
		for err == nil {
			_, err = p.Next()
		}
		if !strings.Contains(g.run(t, "date; pgrep -f 'sleep 0.1; done'"), strconv.Itoa(int(p.PID))) {
			t.Error("the process does not go on")
		}
		p.Close()
		// chronyd does not take it back.
		for end := time.Now().Add(8 * time.Second); time.Now().Before(end); time.Sleep(time.Second) {
			if d := g.ahead(t); d.Abs() > time.Second {
				t.Fatalf("chronyd put the clock off by %v", d)
			}
		}
	}

	if got := g.run(t, "hostname; cat /etc/hostname; getent hosts clone friend; echo $WHOSE"); got != "clone\nclone\n127.0.1.1       clone\n10.9.8.7        friend\nclone" {
		t.Errorf("it is named %q", got)
	}
	if now := g.run(t, "cat /etc/machine-id"); now == id || len(now) != 32 {
		t.Errorf("its id was %s and is %s", id, now)
	}
	if after := disk(); after < before+more*9/10 {
		t.Errorf("the file system had %d bytes and has %d", before, after)
	}
	if r, err := g.Init(within(t, 60*time.Second), Settings{GrowDisk: 1 << 50}); err != nil || len(r.Warnings) != 1 || r.Disk != 0 {
		t.Errorf("growing to what the device does not have: %v, %v", r, err)
	}
}
