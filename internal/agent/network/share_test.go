package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// These tests run other software of a host against the agent's part of the network while
// guests run.

// run runs a command, as other software on the host would.
func run(t testing.TB, args ...string) {
	t.Helper()
	feed(t, "", args...)
}

func feed(t testing.TB, stdin string, args ...string) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// eventually waits until cond returns nil. It logs the last error if that never happens.
func eventually(t testing.TB, what string, cond func() error) {
	t.Helper()
	var err error
	t.Cleanup(func() {
		if err != nil {
			t.Logf("%s: %v", what, err)
		}
	})
	await.Until(t, what, func() bool { err = cond(); return err == nil })
}

// online returns an error unless the guest reaches the internet and the host reaches the
// guest.
func (g *guest) online(s *Slot) error {
	if _, err := g.callWithin(time.Second, "tcp4", internetAddr.String()+":7000"); err != nil {
		return fmt.Errorf("guest to the internet: %w", err)
	}
	if _, err := call(time.Second, "tcp4", s.Address.String()+":7000"); err != nil {
		return fmt.Errorf("host to the guest: %w", err)
	}
	return nil
}

// serve makes the guest respond on port 7000.
func (g *guest) serve(t testing.TB) {
	t.Helper()
	must(t, g.do(func() error {
		l, err := net.Listen("tcp4", "0.0.0.0:7000")
		if err == nil {
			t.Cleanup(func() { l.Close() })
			go answerTCP(l)
		}
		return err
	}))
}

// problems returns an error that lists the pool's problems, or nil.
func problems(p *Pool) error {
	if all := p.config.Problems.All(); len(all) > 0 {
		return fmt.Errorf("problems: %+v", all)
	}
	return nil
}

func has(p *Pool, k problem.Kind, words string) error {
	for _, x := range p.config.Problems.All() {
		if x.Kind == k && strings.Contains(x.Message, words) {
			return nil
		}
	}
	return fmt.Errorf("no problem %s with %q among %+v", k, words, p.config.Problems.All())
}

// clearRules removes other software's rules at the end of a test.
func clearRules(t testing.TB) {
	t.Cleanup(func() { run(t, "nft", "flush", "ruleset") })
}

func TestIPNetns(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 1)
	s, kept := acquire(t, p), acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	run(t, "ip", "netns", "add", "x")
	t.Cleanup(func() { must(t, unmountAll(layout.OldNamespaces)); os.RemoveAll(layout.OldNamespaces) })
	must(t, g.online(s))
	run(t, "ip", "netns", "exec", "x", "true")
	run(t, "ip", "netns", "del", "x")
	must(t, g.online(s))
	must(t, p.Release(context.Background(), s))
	if _, err := os.Stat(s.NetNS()); !os.IsNotExist(err) {
		t.Errorf("the name still exists: %v", err)
	}
	must(t, problems(p))
	must(t, p.Close(context.Background(), []int{kept.Index}))
	// While no agent runs, an agent of the previous version finds the name where it
	// expects it.
	if err := inNamespace(oldNamespace(kept.Index), func() error { return nil }); err != nil {
		t.Errorf("an earlier version does not find the namespace: %v", err)
	}
	p = openPool(t, dir, 1, kept.Index)
	if _, err := os.Stat(oldNamespace(kept.Index)); !os.IsNotExist(err) {
		t.Errorf("the name for earlier versions still exists: %v", err)
	}
	if _, err := p.Reclaim(context.Background(), kept.Index, 0); err != nil {
		t.Error(err)
	}
	must(t, problems(p))
}

// TestUpgradeOfNames starts on an earlier version's namespaces, whose names are in ip
// netns's folder and below mounts.
func TestUpgradeOfNames(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 2)
	kept, ended := acquire(t, p), acquire(t, p)
	g := newGuest(t, kept)
	g.serve(t)
	crash(t, p)
	must(t, os.MkdirAll(layout.OldNamespaces, 0o755))
	names, err := os.ReadDir(layout.Namespaces())
	must(t, err)
	for _, n := range names {
		at, old := filepath.Join(layout.Namespaces(), n.Name()), filepath.Join(layout.OldNamespaces, n.Name())
		must(t, os.WriteFile(old, nil, 0o444))
		must(t, unix.Mount(at, old, "", unix.MS_BIND, ""))
		must(t, removeNamespace(at))
	}
	must(t, unshareNamespaces())
	run(t, "ip", "netns", "add", "x")
	t.Cleanup(func() { must(t, unmountAll(layout.OldNamespaces)); os.RemoveAll(layout.OldNamespaces) })
	if os.Remove(oldNamespace(ended.Index)) == nil {
		t.Fatal("the name was removable, so the mount does not hide it")
	}

	p = openPool(t, dir, 1, kept.Index)
	must(t, problems(p))
	back, err := p.Reclaim(context.Background(), kept.Index, 0)
	must(t, err)
	must(t, g.online(back))
	run(t, "ip", "netns", "del", "x")
	if left, err := os.ReadDir(layout.OldNamespaces); err != nil || len(left) > 0 {
		t.Errorf("left in %s: %v, %v", layout.OldNamespaces, left, err)
	}
}

// TestHiddenNames mounts the folder of names over itself.
func TestHiddenNames(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	for range 2 {
		run(t, "mount", "--rbind", layout.Namespaces(), layout.Namespaces())
	}
	must(t, p.Release(context.Background(), s))
	if _, err := os.Stat(s.NetNS()); !os.IsNotExist(err) {
		t.Errorf("the name still exists: %v", err)
	}
	must(t, problems(p))
}

// TestHiddenNamesBelowRun has another agent's namespaces of the same names below the file
// system mounted on /run, as in a container or a test of the agent.
func TestHiddenNamesBelowRun(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	must(t, os.MkdirAll(layout.Namespaces(), 0o755))
	t.Cleanup(func() { must(t, os.RemoveAll(layout.Machine)) })
	var others []string
	for i := range 4 {
		path := layout.Namespace(i)
		must(t, createNamespace(path, func(*os.File) error { return nil }))
		t.Cleanup(func() { must(t, removeNamespace(path)) })
		others = append(others, path)
	}
	must(t, unix.Mount("run", "/run", "tmpfs", 0, ""))
	t.Cleanup(func() {
		must(t, unix.Unmount("/run", unix.MNT_DETACH))
		for _, path := range others {
			if err := inNamespace(path, func() error { return nil }); err != nil {
				t.Errorf("another agent's namespace was removed: %v", err)
			}
		}
	})
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	if s.Index >= len(others) {
		t.Fatalf("no other agent has the name of slot %d", s.Index)
	}
	must(t, nameForEarlier(s.Index)) // like an agent of an earlier version
	for _, dir := range []string{layout.OldNamespaces, layout.Namespaces()} {
		run(t, "mount", "--rbind", dir, dir)
	}
	t.Cleanup(func() { must(t, unmountAll(layout.OldNamespaces)) })
	must(t, p.Release(context.Background(), s))
	for _, name := range []string{oldNamespace(s.Index), s.NetNS()} {
		if _, err := os.Stat(name); !os.IsNotExist(err) {
			t.Errorf("the name still exists: %v", err)
		}
	}
	must(t, problems(p))
	must(t, p.Close(context.Background(), nil))
}

func TestRulesAreRestored(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	eventually(t, "at first", func() error { return g.online(s) })
	whole := func() error {
		have, err := fingerprint(hostTable(p.block.number))
		if err != nil {
			return err
		}
		want, err := wantedRules(p.block.number, p.config.Upstreams) // the guard owns p.rules
		if err == nil && have != want {
			err = fmt.Errorf("rules differ:\n%s\nwant:\n%s", have, want)
		}
		return err
	}
	must(t, whole())
	clearRules(t)
	restore := func(file string) func(t *testing.T) {
		return func(t *testing.T) { feed(t, file, "iptables-restore") }
	}
	nft := func(script string) func(t *testing.T) {
		return func(t *testing.T) { run(t, "nft", script) }
	}
	for name, change := range map[string]func(t *testing.T){
		"flush":              nft("flush ruleset"),
		"delete table":       nft("delete table inet wrenn"),
		"flush table":        nft("flush table inet wrenn"),
		"flush chain":        nft("flush chain inet wrenn forward"),
		"add rule":           nft("insert rule inet wrenn forward drop"),
		"policy":             nft("chain inet wrenn forward { policy drop; }"),
		"iptables-restore":   restore("*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n*nat\n:POSTROUTING ACCEPT [0:0]\nCOMMIT\n"),
		"a service's reload": nft("flush ruleset; add table inet filter; add chain inet filter input { type filter hook input priority 0; policy accept; }"),
	} {
		t.Run(name, func(t *testing.T) {
			change(t)
			eventually(t, "afterwards", whole)
			eventually(t, "afterwards", func() error { return g.online(s) })
			eventually(t, "afterwards", func() error { return problems(p) })
		})
	}
}

// docker is what Docker's daemon loads for its default bridge.
const docker = `*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
COMMIT
`

// firewalld is firewalld's table with only the zone public.
const firewalld = `table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state { invalid } drop
		jump filter_IN_public
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state { invalid } drop
		jump filter_FWD_public
		reject with icmpx admin-prohibited
	}
	chain filter_IN_public { tcp dport 22 accept; meta l4proto { icmp, ipv6-icmp } accept; }
	chain filter_FWD_public { meta l4proto { icmp, ipv6-icmp } accept; }
	chain nat_POSTROUTING { type nat hook postrouting priority srcnat + 10; policy accept; }
}
`

func TestOtherFirewalls(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	eventually(t, "at first", func() error { return g.online(s) })
	clearRules(t)

	// Docker has a chain for other software's rules, so the agent can repair this.
	feed(t, docker, "iptables-restore")
	eventually(t, "with Docker's rules", func() error { return g.online(s) })
	eventually(t, "with Docker's rules", func() error { return problems(p) })
	run(t, "iptables", "-n", "-L") // iptables can still read its table
	// The daemon restarts and rewrites its rules.
	feed(t, docker, "iptables-restore")
	eventually(t, "with Docker's rules written anew", func() error { return g.online(s) })
	run(t, "nft", "flush", "ruleset")
	eventually(t, "without Docker's rules", func() error { return g.online(s) })

	for _, other := range []struct{ name, rules, undo, words string }{
		{"firewalld", firewalld, "delete table inet firewalld", "inet firewalld filter_FORWARD"},
		{"policy drop", "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }", "delete table ip filter", "ip filter FORWARD"},
		{"deep", "table ip other { chain a { ip saddr 10.0.0.0/8 drop; }; chain f { type filter hook forward priority 5; policy accept; jump a; }; }", "delete table ip other", "find the rule"},
	} {
		t.Run(other.name, func(t *testing.T) {
			feed(t, other.rules, "nft", "-f", "-")
			eventually(t, "with the rules", func() error { return has(p, problem.Firewall, other.words) })
			if _, err := call(hang, "tcp4", s.Address.String()+":7000"); err != nil {
				t.Errorf("host to guest: %v", err)
			}
			run(t, "nft", other.undo)
			eventually(t, "without the rules", func() error { return problems(p) })
			eventually(t, "without the rules", func() error { return g.online(s) })
		})
	}
	t.Run("accepted by the admin", func(t *testing.T) {
		feed(t, `table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; iifname "wrenn-veth-*" accept; ct state established,related accept; }; }`, "nft", "-f", "-")
		eventually(t, "with the rules", func() error { return g.online(s) })
		p.mend(look{rules: true})
		must(t, problems(p))
	})
}

// TestFirewallOfTheHost adds a firewall that drops the host's own packets, as one does
// that closes private networks to local programs.
func TestFirewallOfTheHost(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	eventually(t, "at first", func() error { return errors.Join(problems(p), g.online(s)) })
	clearRules(t)
	for _, verdict := range []string{"drop", "reject"} {
		feed(t, "table ip egress { chain out { type filter hook output priority 0; ip daddr 10.0.0.0/8 "+verdict+"; }; }", "nft", "-f", "-")
		eventually(t, verdict, func() error { return has(p, problem.Firewall, "drops the host's packets") })
		run(t, "nft", "delete table ip egress")
		eventually(t, "without the rules", func() error { return errors.Join(problems(p), g.online(s)) })
	}
}

func TestLinksAreRepaired(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s, other := acquire(t, p), acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	eventually(t, "at first", func() error { return g.online(s) })
	name := linkName(s.Index)
	link := func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if a := l.Attrs(); a.Group != linkGroup(p.block.number) || a.MasterIndex != 0 || a.Flags&net.FlagUp == 0 {
			return fmt.Errorf("link is %+v", a)
		}
		return nil
	}
	sysctlIs := func(path, want string) error {
		b, err := os.ReadFile("/proc/sys/" + path)
		if err == nil && strings.TrimSpace(string(b)) != want {
			err = fmt.Errorf("%s is %s", path, b)
		}
		return err
	}
	run(t, "ip", "netns", "add", "elsewhere")
	t.Cleanup(func() { must(t, unmountAll(layout.OldNamespaces)); os.RemoveAll(layout.OldNamespaces) })
	t.Cleanup(func() { run(t, "ip", "netns", "del", "elsewhere") })
	for _, c := range []struct {
		what   string
		change func()
		also   func() error
	}{
		{"down", func() { run(t, "ip", "link", "set", name, "down") }, nil},
		{"addresses flushed", func() { run(t, "ip", "addr", "flush", "dev", name) }, nil},
		{"renamed", func() {
			// The agent may set the link up before the rename, which older kernels then
			// refuse.
			await.Until(t, "it is renamed", func() bool {
				return exec.Command("ip", "link", "set", name, "down").Run() == nil &&
					exec.Command("ip", "link", "set", name, "name", "eth7").Run() == nil
			})
		}, nil},
		{"another group", func() { run(t, "ip", "link", "set", name, "group", "0") }, nil},
		{"in a bridge", func() {
			run(t, "ip", "link", "add", "cni0", "type", "bridge")
			t.Cleanup(func() { run(t, "ip", "link", "del", "cni0") })
			run(t, "ip", "link", "set", name, "master", "cni0")
		}, nil},
		{"deleted", func() { run(t, "ip", "link", "del", name) }, nil},
		{"moved", func() { run(t, "ip", "link", "set", name, "netns", "elsewhere") }, nil},
		{"routes flushed", func() { run(t, "ip", "route", "flush", "dev", name) }, nil},
		{"a setting", func() { must(t, sysctl("net/ipv4/conf/"+name+"/rp_filter", "2")) }, func() error { return sysctlIs("net/ipv4/conf/"+name+"/rp_filter", "1") }},
		{"forwarding off", func() { must(t, sysctl(ipForward, "0")) }, func() error { return sysctlIs(ipForward, "1") }},
		{"forwarding of the link off", func() { must(t, sysctl("net/ipv4/conf/"+name+"/forwarding", "0")) }, nil},
	} {
		t.Run(c.what, func(t *testing.T) {
			c.change()
			eventually(t, "afterwards", func() error {
				if err := link(); err != nil {
					return err
				}
				if c.also != nil {
					if err := c.also(); err != nil {
						return err
					}
				}
				return g.online(s)
			})
			eventually(t, "afterwards", func() error { return problems(p) })
		})
	}
	// Another guest on the machine is unaffected, and everything can be removed.
	h := newGuest(t, other)
	h.serve(t)
	must(t, h.online(other))
	must(t, p.Release(context.Background(), s))
}

// TestCNI uses a container engine's plugins to set up a container beside a guest, first
// with its own bridge and then with the guest's link.
func TestCNI(t *testing.T) {
	needRoot(t)
	const plugins = "/usr/lib/cni"
	if _, err := os.Stat(plugins); err != nil {
		t.Skipf("needs the package containernetworking-plugins: %v", err)
	}
	sameAfter(t)
	newInternet(t)
	p := openPool(t, layout.Dir(t.TempDir()), 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	eventually(t, "at first", func() error { return g.online(s) })
	clearRules(t)
	run(t, "ip", "netns", "add", "container")
	t.Cleanup(func() { must(t, unmountAll(layout.OldNamespaces)); os.RemoveAll(layout.OldNamespaces) })
	t.Cleanup(func() { run(t, "ip", "netns", "del", "container") })
	plugin := func(command, name, config string) {
		t.Helper()
		cmd := exec.Command(filepath.Join(plugins, name))
		cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID=c", "CNI_IFNAME="+name+"0",
			"CNI_NETNS="+filepath.Join(layout.OldNamespaces, "container"), "CNI_PATH="+plugins)
		cmd.Stdin = strings.NewReader(config)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s of %s: %v\n%s", command, name, err, out)
		}
	}
	for _, c := range []struct{ plugin, config string }{
		{"bridge", fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "n", "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
			"ipam": {"type": "host-local", "subnet": "10.88.0.0/16", "dataDir": %q}}`, t.TempDir())},
		{"host-device", fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "n", "type": "host-device", "device": %q}`, linkName(s.Index))},
	} {
		t.Run(c.plugin, func(t *testing.T) {
			plugin("ADD", c.plugin, c.config)
			eventually(t, "with a container", func() error { return errors.Join(problems(p), g.online(s)) })
			if c.plugin == "bridge" {
				plugin("DEL", c.plugin, c.config)
				run(t, "ip", "link", "del", "cni0")
			}
			eventually(t, "afterwards", func() error { return errors.Join(problems(p), g.online(s)) })
		})
	}
}

// TestRunIsCleaned empties the folder of the machine's state.
func TestRunIsCleaned(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	for _, clean := range []func(){
		func() { must(t, os.Remove(blockFile(p.block.number))) },
		func() { must(t, os.RemoveAll(layout.NetworkBlocks())) },
		func() { must(t, unix.Unmount(s.NetNS(), unix.MNT_DETACH)) },
		func() { must(t, removeNamespace(s.NetNS())) },
		func() { must(t, os.RemoveAll(dir.Run())) },
		func() { run(t, "umount", "-l", layout.Namespaces()); must(t, os.RemoveAll(layout.Machine)) },
	} {
		clean()
		eventually(t, "afterwards", func() error {
			if !isNamespace(s.ns, s.NetNS()) {
				return fmt.Errorf("%s is not the slot's namespace", s.NetNS())
			}
			if n, ok := remembered(dir); !ok || n != p.block.number {
				return fmt.Errorf("the folder remembers block %d, %v", n, ok)
			}
			b, owner, err := lockBlock("/elsewhere", p.block.number)
			if err == nil {
				b.lock.Close()
				return fmt.Errorf("block %d of %q can be locked", p.block.number, owner)
			}
			if owner != dir {
				return fmt.Errorf("the block is of %q", owner)
			}
			return nil
		})
		must(t, g.online(s))
		eventually(t, "afterwards", func() error { return problems(p) })
	}
	// The next agent takes everything back.
	must(t, p.Close(context.Background(), []int{s.Index}))
	p = openPool(t, dir, 1, s.Index)
	back, err := p.Reclaim(context.Background(), s.Index, 0)
	must(t, err)
	must(t, g.online(back))
}

// TestNameIsLostWithoutAgent removes a namespace's name while no agent runs.
func TestNameIsLostWithoutAgent(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	vm := exec.Command("nsenter", "--net="+s.NetNS(), "sleep", "600")
	must(t, vm.Start())
	defer func() { _ = vm.Process.Kill(); _ = vm.Wait() }()
	eventually(t, "the process", func() error {
		a, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", vm.Process.Pid))
		if own, _ := os.Readlink("/proc/self/ns/net"); err == nil && a == own {
			err = fmt.Errorf("it is still in the host's namespace")
		}
		return err
	})
	must(t, p.Close(context.Background(), []int{s.Index}))
	must(t, removeNamespace(s.NetNS()))
	must(t, removeNamespace(oldNamespace(s.Index)))
	run(t, "ip", "link", "set", linkName(s.Index), "down")
	run(t, "ip", "link", "set", linkName(s.Index), "name", "eth7")

	p = openPool(t, dir, 1, s.Index)
	back, err := p.Reclaim(context.Background(), s.Index, vm.Process.Pid)
	must(t, err)
	eventually(t, "afterwards", func() error { return g.online(back) })
	if !isNamespace(back.ns, back.NetNS()) {
		t.Error("its name is not back")
	}
}

// TestLinkIsTakenWithoutAgent gives the name of a kept slot's link to another program's
// link while no agent runs. The next agent still takes the slot back, because its VM
// runs, and repairs it once the name is free.
func TestLinkIsTakenWithoutAgent(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	newInternet(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 1)
	s := acquire(t, p)
	g := newGuest(t, s)
	g.serve(t)
	must(t, p.Close(context.Background(), []int{s.Index}))
	name := linkName(s.Index)
	run(t, "ip", "link", "set", name, "down")
	run(t, "ip", "link", "set", name, "name", "eth7")
	run(t, "ip", "tuntap", "add", name, "mode", "tap")

	p = openPool(t, dir, 1, s.Index)
	back, err := p.Reclaim(context.Background(), s.Index, 0)
	must(t, err)
	must(t, has(p, problem.Slot, "cannot repair network slot"))
	run(t, "ip", "link", "del", name)
	p.guard.notice(func(l *look) { l.allLinks = true })
	eventually(t, "afterwards", func() error { return errors.Join(problems(p), g.online(back)) })
}

// TestSetAside has slots that cannot be removed: an agent starts anyway, and removes them
// when it can.
func TestSetAside(t *testing.T) {
	needRoot(t)
	sameAfter(t)
	dir := layout.Dir(t.TempDir())
	p := openPool(t, dir, 1)
	first := p.block.number * blockSlots
	crash(t, p)
	obstacle := func(i int) string {
		path := filepath.Join(layout.Namespace(i), "x")
		must(t, os.MkdirAll(path, 0o755))
		return path
	}
	stale := obstacle(first + 300)
	p = openPool(t, dir, 1)
	must(t, has(p, problem.Slot, "cannot remove network slot 300"))
	// The guard retries by itself.
	must(t, os.Remove(stale))
	eventually(t, "the obstacle has been removed", func() error { return problems(p) })
	stale = obstacle(first + 300)
	p.discard(first + 300)
	must(t, has(p, problem.Slot, "cannot remove network slot 300"))

	s := acquire(t, p)
	p.guard.close() // it would restore the namespace's name
	must(t, removeNamespace(s.NetNS()))
	released := obstacle(s.Index)
	must(t, p.Release(context.Background(), s))
	must(t, has(p, problem.Slot, fmt.Sprintf("cannot remove network slot %d", s.Index)))
	for range 3 {
		if next := acquire(t, p); next.Index == s.Index || next.Index == first+300 {
			t.Errorf("slot %d is used though it was not removed", next.Index)
		}
	}
	// The pool retries with growing delays, however many changes the guard notices.
	due := func(i int) time.Time {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.aside[i].next
	}
	last := due(s.Index)
	if wait := time.Until(last); wait > 2*firstAttempt {
		t.Errorf("the next attempt is only in %v", wait)
	}
	attempt := func() (wait time.Duration) {
		p.mend(look{})
		if now := due(s.Index); !now.Equal(last) {
			t.Errorf("it retried too early")
		}
		p.mu.Lock()
		p.aside[s.Index].next = time.Now()
		p.mu.Unlock()
		before := time.Now()
		p.mend(look{})
		last = due(s.Index)
		return last.Sub(before)
	}
	for range 8 {
		attempt()
	}
	if wait := attempt(); wait < lastAttempt/2 {
		t.Errorf("after ten attempts the wait is %v", wait)
	}
	retry := func() {
		p.mu.Lock()
		for _, a := range p.aside {
			a.next = time.Now()
		}
		p.mu.Unlock()
		p.mend(look{})
	}
	must(t, os.Remove(stale))
	retry()
	must(t, has(p, problem.Slot, fmt.Sprintf("cannot remove network slot %d", s.Index)))
	must(t, os.Remove(released))
	retry()
	must(t, problems(p))
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.aside) > 0 {
		t.Errorf("still set aside: %v", p.aside)
	}
}
