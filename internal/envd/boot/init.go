package boot

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"

	"github.com/vishvananda/netlink"

	"github.com/wrenn-dev/wrenn/internal/envd/cgroup"
	"github.com/wrenn-dev/wrenn/internal/envd/machine"

	"golang.org/x/sys/unix"
)

// Where the guest daemon and the reaper of orphans are.
const (
	daemon = "/usr/local/bin/envd"
	reaper = "/usr/bin/tini"
)

// ClockCgroup is the cgroup2 directory below which chronyd runs.
const ClockCgroup = "/sys/fs/cgroup/wrenn-clock"

// path is that of every process that names none.
const path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/games:/usr/games"

// bringUp makes a running system of the root file system and becomes the
// guest daemon, under tini where the image has it and else under itself.
func bringUp() error {
	for _, m := range []mount{
		{"sysfs", "/sys", "sysfs", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
		{"devpts", "/dev/pts", "devpts", syscall.MS_NOSUID | syscall.MS_NOEXEC, "mode=620,gid=5,ptmxmode=666"},
		{"tmpfs", "/dev/shm", "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=1777," + shmSize},
		{"tmpfs", "/run", "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=755," + runSize},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
	} {
		if err := m.do(); err != nil {
			return err
		}
	}
	if err := syscall.Mount("", "/dev", "", syscall.MS_REMOUNT|syscall.MS_NOSUID, devSize); err != nil {
		say("bound /dev: %v", err)
	}
	setLimits()
	if err := shareTemporary("/"); err != nil {
		say("%v", err)
	}
	if err := provideModprobe("/"); err != nil {
		say("the kernel loads no modules on demand: %v", err)
	}
	for name, target := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2", "/etc/mtab": "../proc/self/mounts"} {
		_ = os.Symlink(target, name) // there already: fine
	}
	opts, err := kernelOptions()
	if err != nil {
		return err
	}
	if err := machine.New().Rename(cmp.Or(opts["wrenn.hostname"], "wrenn")); err != nil {
		return err
	}
	if err := connect(opts); err != nil {
		return fmt.Errorf("set up network: %w", err)
	}
	if err := startClock(opts["wrenn.ntp"]); err != nil {
		say("the clock is not kept: %v", err) // a guest with a drifting clock is better than none
	}
	env := []string{path, "HOME=/root", "LANG=C.UTF-8"}
	if _, err := os.Stat(reaper); err != nil {
		return reap([]string{daemon, "-guest"}, env)
	}
	return fmt.Errorf("start %s: %w", reaper, syscall.Exec(reaper, []string{reaper, "--", daemon, "-guest"}, env))
}

// reap runs a program and collects every orphan's end until the program's
// own, which is an error: the first process must not end, and with its daemon
// a guest is of no use.
func reap(argv, env []string) error {
	proc, err := os.StartProcess(argv[0], argv, &os.ProcAttr{Env: env, Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		return fmt.Errorf("start %s: %w", argv[0], err)
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return fmt.Errorf("wait for %s: %w", argv[0], err)
		case pid == proc.Pid && (status.Exited() || status.Signaled()):
			return fmt.Errorf("%s ended with status %#x", argv[0], uint32(status))
		}
	}
}

// connect sets up loopback, eth0 and the resolver. A guest without a network
// card has loopback alone.
func connect(opts map[string]string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	if opts["wrenn.ip"] == "" {
		return nil
	}
	eth, err := netlink.LinkByName("eth0")
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		say("no network card")
		return nil
	}
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(opts["wrenn.ip"])
	if err != nil {
		return fmt.Errorf("read wrenn.ip: %w", err)
	}
	if err := netlink.AddrAdd(eth, addr); err != nil && !errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("give eth0 its address: %w", err)
	}
	if err := netlink.LinkSetUp(eth); err != nil {
		return fmt.Errorf("bring up eth0: %w", err)
	}
	if gw := net.ParseIP(opts["wrenn.gw"]); gw != nil {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: gw}); err != nil && !errors.Is(err, syscall.EEXIST) {
			return fmt.Errorf("add default route: %w", err)
		}
	}
	if dns := net.ParseIP(opts["wrenn.dns"]); dns != nil {
		_ = os.Remove("/etc/resolv.conf") // an image may bring a link to nowhere
		if err := os.WriteFile("/etc/resolv.conf", []byte("nameserver "+dns.String()+"\n"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// startClock starts chronyd, which follows the host's clock through the PTP
// device where the machine has one, else the agent's NTP service.
func startClock(ntp string) error {
	const chronyd = "/usr/sbin/chronyd"
	if _, err := os.Stat(chronyd); err != nil {
		return err
	}
	config := "makestep 1.0 -1\nrtcsync\ncmdport 0\npidfile /run/chronyd.pid\n"
	if _, err := os.Stat("/dev/ptp0"); err == nil {
		config += "refclock PHC /dev/ptp0 poll 0 dpoll -2 offset 0\n"
	} else if ip := net.ParseIP(ntp); ip != nil {
		config += "server " + ip.String() + " iburst minpoll 0 maxpoll 2\n"
	} else {
		return errors.New("no PTP device and no wrenn.ntp")
	}
	const file = "/run/chrony.conf"
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return err
	}
	cmd := exec.Command(chronyd, "-n", "-u", "root", "-f", file)
	cmd.Env = []string{path}
	group, err := clockGroup()
	if err != nil {
		say("the clock's program cannot be frozen: %v", err)
	} else {
		defer group.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: group.FD()}
	}
	if err := cmd.Start(); err != nil { // becomes tini's to reap
		return err
	}
	// A clock that was put right gives it much to do, just when a guest that was
	// restored is waited for.
	return unix.Setpriority(unix.PRIO_PROCESS, cmd.Process.Pid, 19)
}

// clockGroup makes the group for chronyd, which the guest daemon takes over.
func clockGroup() (*cgroup.Group, error) {
	tree, err := cgroup.Open(ClockCgroup)
	if err != nil {
		return nil, err
	}
	return tree.New()
}
