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

// The paths of the guest daemon and of tini, which reaps orphans.
const (
	daemon = "/usr/local/bin/envd"
	reaper = "/usr/bin/tini"
)

// ClockCgroup is the cgroup2 directory below which chronyd runs.
const ClockCgroup = "/sys/fs/cgroup/wrenn-clock"

// Tracefs is where the kernel shows the events that it can report.
const Tracefs = "/sys/kernel/tracing"

// path is the default PATH of processes.
const path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/games:/usr/games"

// bringUp sets up the system and becomes the guest daemon, under tini if the image has
// it, otherwise under this process.
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
	if err := (mount{"tracefs", Tracefs, "tracefs", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""}).do(); err != nil {
		say("the kernel reports no events: %v", err)
	}
	setLimits()
	if err := shareTemporary("/"); err != nil {
		say("%v", err)
	}
	if err := provideModprobe("/"); err != nil {
		say("cannot load modules on demand: %v", err)
	}
	for name, target := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2", "/etc/mtab": "../proc/self/mounts"} {
		_ = os.Symlink(target, name) // may exist already
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
		say("cannot keep the clock: %v", err) // a guest with a drifting clock is better than none
	}
	env := []string{path, "HOME=/root", "LANG=C.UTF-8"}
	if _, err := os.Stat(reaper); err != nil {
		return reap([]string{daemon, "-guest"}, env)
	}
	return fmt.Errorf("start %s: %w", reaper, syscall.Exec(reaper, []string{reaper, "--", daemon, "-guest"}, env))
}

// reap runs the guest daemon and reaps orphans until the daemon exits. That is an error,
// because the first process must not exit, and a guest is useless without its daemon.
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

// connect sets up loopback, eth0 and the resolver. Without a network card, a guest has
// only loopback.
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
		_ = os.Remove("/etc/resolv.conf") // it can be a dangling link in the image
		if err := os.WriteFile("/etc/resolv.conf", []byte("nameserver "+dns.String()+"\n"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// startClock starts chronyd, which follows the host's clock through the PTP device if
// there is one, otherwise through the agent's NTP service.
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
		say("cannot freeze chronyd: %v", err)
	} else {
		defer group.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: group.FD()}
	}
	if err := cmd.Start(); err != nil { // tini reaps it
		return err
	}
	// After a correction of the clock chronyd is busy, just when a restored guest must
	// answer quickly.
	return unix.Setpriority(unix.PRIO_PROCESS, cmd.Process.Pid, 19)
}

// clockGroup creates the cgroup for chronyd, which the guest daemon takes over.
func clockGroup() (*cgroup.Group, error) {
	tree, err := cgroup.Open(ClockCgroup)
	if err != nil {
		return nil, err
	}
	return tree.New()
}
