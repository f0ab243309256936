package network

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// The tests run in their own network and mount namespaces, which stand for a whole host
// with its interfaces, rules, forwarding and /run.
const insideEnv = "WRENN_NETWORK_TEST_INSIDE"

func TestMain(m *testing.M) {
	if os.Getuid() != 0 || os.Getenv(insideEnv) != "" {
		if os.Getenv(insideEnv) != "" {
			if err := prepareTestHost(); err != nil {
				fmt.Fprintln(os.Stderr, "prepare test host:", err)
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig applies to the thread
	if err := cmd.Run(); err != nil {
		if cmd.ProcessState == nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
}

func prepareTestHost() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("run", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	// A new namespace inherits the machine's settings, where an agent of another test may
	// have turned on forwarding.
	if err := sysctl(ipForward, "0"); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to create network namespaces")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var (
	uplinkHost   = netip.MustParsePrefix("198.51.100.1/24")
	uplinkPeer   = netip.MustParsePrefix("198.51.100.2/24")
	internetAddr = netip.MustParseAddr("203.0.113.1")
	resolver1    = netip.MustParseAddr("10.99.0.53") // in a private network, like most resolvers
	resolver2    = netip.MustParseAddr("10.99.0.54")
	privateAddrs = []string{"10.99.0.1", "172.16.5.5", "192.168.7.7", "100.64.1.1", "192.0.0.192", "168.63.129.16"}
)

// testNamespaces are the names of the tests' own namespaces.
const (
	testNamespaces = "/run/test"
	internetNS     = testNamespaces + "/internet"
)

// newInternet creates a namespace that stands for everything beyond the host. On each of
// its addresses, every TCP and UDP service on ports 53, 80 and 7000 responds with the
// client's address.
func newInternet(t testing.TB) {
	t.Helper()
	path := internetNS
	must(t, os.MkdirAll(testNamespaces, 0o755))
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	must(t, err)
	t.Cleanup(h.Close)
	addrs := append([]string{internetAddr.String(), resolver1.String(), resolver2.String()}, privateAddrs...)
	var closers []func()
	err = createNamespace(path, func(ns *os.File) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "uplink"
		if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}); err != nil {
			return err
		}
		for _, name := range []string{"lo", "eth0"} {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(link); err != nil {
				return err
			}
			mine := []netip.Prefix{uplinkPeer}
			if name == "lo" {
				mine = nil
				for _, a := range addrs {
					mine = append(mine, host(netip.MustParseAddr(a)))
				}
			}
			for _, a := range mine {
				if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), 32)}}); err != nil {
					return err
				}
			}
		}
		for _, a := range addrs {
			for _, port := range []uint16{53, 80, 7000} {
				l, err := net.Listen("tcp4", netip.AddrPortFrom(netip.MustParseAddr(a), port).String())
				if err != nil {
					return err
				}
				c, err := net.ListenPacket("udp4", netip.AddrPortFrom(netip.MustParseAddr(a), port).String())
				if err != nil {
					return err
				}
				closers = append(closers, func() { l.Close(); c.Close() })
				go answerTCP(l)
				go answerUDP(c, a)
			}
		}
		return nil
	})
	must(t, err)
	t.Cleanup(func() {
		for _, c := range closers {
			c()
		}
		link, err := netlink.LinkByName("uplink")
		must(t, err)
		must(t, netlink.LinkDel(link))
		must(t, removeNamespace(path))
	})
	link, err := h.LinkByName("uplink")
	must(t, err)
	must(t, raise(h, link, uplinkHost))
	for _, a := range addrs {
		// Add single routes, because this host has no default route.
		must(t, h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: uplinkPeer.Addr().AsSlice(), Dst: &net.IPNet{IP: net.ParseIP(a).To4(), Mask: net.CIDRMask(32, 32)}}))
	}
}

func answerTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		ip, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		fmt.Fprintf(c, "%s", ip)
		c.Close()
	}
}

func answerUDP(c net.PacketConn, own string) {
	b := make([]byte, 2000)
	for {
		_, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		ip, _, _ := net.SplitHostPort(from.String())
		_, _ = c.WriteTo([]byte(own+" "+ip), from)
	}
}

// guest is a namespace behind a slot's tap, like a VM: its frames pass through the tap's
// file descriptor.
type guest struct {
	t    testing.TB
	path string
}

func newGuest(t testing.TB, s *Slot) *guest {
	t.Helper()
	g := &guest{t: t, path: filepath.Join(testNamespaces, fmt.Sprintf("guest-%d", s.Index))}
	must(t, os.MkdirAll(testNamespaces, 0o755))
	outer, err := s.OpenTap()
	must(t, err)
	var inner *os.File
	must(t, createNamespace(g.path, func(*os.File) (err error) {
		if inner, err = openTap("eth0", unix.IFF_VNET_HDR); err != nil {
			return err
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		link, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := h.LinkSetHardwareAddr(link, guestMAC); err != nil {
			return err
		}
		if err := raise(h, link, netip.PrefixFrom(guestAddr, 30)); err != nil {
			return err
		}
		return h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gatewayAddr.AsSlice(), Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}})
	}))
	var wires sync.WaitGroup
	wire := func(to, from *os.File) {
		b := make([]byte, 1<<16)
		for {
			n, err := from.Read(b)
			if err != nil {
				return
			}
			_, _ = to.Write(b[:n])
		}
	}
	wires.Go(func() { wire(outer, inner) })
	wires.Go(func() { wire(inner, outer) })
	t.Cleanup(func() {
		outer.Close()
		inner.Close()
		wires.Wait()
		must(t, removeNamespace(g.path))
	})
	return g
}

// do runs f as if it were a process of the guest.
func (g *guest) do(f func() error) error { return inNamespace(g.path, f) }

// hang bounds what must work; only something that hangs takes that long.
const hang = 2 * time.Minute

// silence is how long a guest waits for a response that must not come. It is real time,
// because a packet that the firewall drops causes no event.
const silence = time.Second

// call sends something over a new connection and returns the response.
func (g *guest) call(network, address string) (string, error) {
	return g.callWithin(hang, network, address)
}

func (g *guest) callWithin(d time.Duration, network, address string) (answer string, err error) {
	err = g.do(func() (err error) { answer, err = call(d, network, address); return err })
	return answer, err
}

func call(d time.Duration, network, address string) (string, error) {
	c, err := net.DialTimeout(network, address, d)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(d))
	if _, err := c.Write([]byte("hello")); err != nil {
		return "", err
	}
	if strings.HasPrefix(network, "udp") {
		b := make([]byte, 2000)
		n, err := c.Read(b)
		return string(b[:n]), err
	}
	b, err := io.ReadAll(c)
	if len(b) > 0 {
		return string(b), nil // a reset after the response does not matter
	}
	return "", err
}

// sameAfter checks that the host's network state after the test is as before.
func sameAfter(t testing.TB) {
	t.Helper()
	before := hostState(t)
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		// Ended goroutines and closed namespaces take a moment to disappear.
		var after map[string][]string
		await.Within(hang, func() bool {
			after = hostState(t)
			return len(after["goroutines"]) <= len(before["goroutines"])
		})
		for what := range before {
			if what == "goroutines" {
				if len(after[what]) > len(before[what]) {
					t.Errorf("goroutines left: %d before, %d after\n%s", len(before[what]), len(after[what]), strings.Join(after[what], "\n\n"))
				}
				continue
			}
			if what == "mounts" {
				// Mounts from before the test may disappear: other processes use the
				// machine.
				after[what] = slices.DeleteFunc(after[what], func(m string) bool { return slices.Contains(before[what], m) })
				before[what] = nil
			}
			if len(before[what])+len(after[what]) > 0 && !slices.Equal(before[what], after[what]) {
				t.Errorf("%s differ\nbefore: %v\nafter:  %v", what, before[what], after[what])
			}
		}
	})
}

func hostState(t testing.TB) map[string][]string {
	t.Helper()
	s := map[string][]string{}
	list := func(name string, args ...string) {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		for line := range strings.Lines(string(out)) {
			s[name] = append(s[name], strings.TrimSpace(line))
		}
	}
	list("namespaces", "ip", "netns")
	list("links", "ip", "-br", "link")
	list("routes", "ip", "route", "show", "table", "all")
	list("tables", "nft", "list", "ruleset")
	list("run", "find", "/run", "-type", "f")
	list("forwarding", "cat", "/proc/sys/net/ipv4/ip_forward")
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(mounts)) {
		s["mounts"] = append(s["mounts"], strings.Fields(line)[4])
	}
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, fd := range fds {
		target, _ := os.Readlink("/proc/self/fd/" + fd.Name())
		if strings.HasPrefix(target, "/proc/") || strings.Contains(target, "/fd") {
			continue // the listing's own process
		}
		kind, _, _ := strings.Cut(target, ":[")
		s["fds"] = append(s["fds"], kind)
	}
	slices.Sort(s["fds"])
	b := make([]byte, 1<<20)
	s["goroutines"] = strings.Split(string(b[:runtime.Stack(b, true)]), "\n\n")
	return s
}

func openPool(t testing.TB, dir layout.Dir, ready int, keep ...int) *Pool {
	t.Helper()
	return openPoolWith(t, Config{Dir: dir, Ready: ready}, keep...)
}

func openPoolWith(t testing.TB, c Config, keep ...int) *Pool {
	t.Helper()
	c.Log = slog.New(slog.NewTextHandler(testWriter{t}, nil))
	c.Problems = problem.Open(filepath.Join(t.TempDir(), "problems.json"), c.Log)
	c.Upstreams = []netip.Addr{resolver1, resolver2}
	p, err := Open(context.Background(), c, keep)
	must(t, err)
	t.Cleanup(func() {
		if err := p.Close(context.Background(), nil); err != nil {
			t.Error("close pool:", err)
		}
	})
	return p
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func acquire(t testing.TB, p *Pool) *Slot {
	t.Helper()
	s, err := p.Acquire(context.Background())
	must(t, err)
	return s
}
