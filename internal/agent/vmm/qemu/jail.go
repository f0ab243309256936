package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
)

// jail is a mount namespace that shows the distribution's programs and
// libraries, read-only, a few devices and a process's own /proc entries. It
// has no place in the file system: a thread of this process is in it, and
// the processes which that thread starts. It ends with the last of them.
type jail struct {
	mu    sync.Mutex // one start at a time: it changes what the thread is in
	work  chan func()
	ended chan struct{}
	tid   int
	hostN *os.File // the agent's own network namespace
}

// newJail makes a jail. mountPoint is an empty folder that it is built on; to
// all others the folder stays empty.
func newJail(mountPoint string) (*jail, error) {
	if err := os.MkdirAll(mountPoint, 0o700); err != nil {
		return nil, fmt.Errorf("make jail: %w", err)
	}
	ns, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("make jail: %w", err)
	}
	j := &jail{work: make(chan func()), ended: make(chan struct{}), hostN: ns}
	ready := make(chan error)
	go func() {
		// Never unlocked: the thread, with all that was done to it, ends with
		// this goroutine.
		runtime.LockOSThread()
		defer close(j.ended)
		j.tid = unix.Gettid()
		err := build(mountPoint)
		ready <- err
		if err != nil {
			return
		}
		for f := range j.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		<-j.ended
		return nil, errors.Join(fmt.Errorf("make jail: %w", err), ns.Close())
	}
	return j, nil
}

func (j *jail) close() error {
	close(j.work)
	<-j.ended
	return j.hostN.Close()
}

// do runs start on the jail's thread, in the given network namespace and
// control group.
func (j *jail) do(netNS string, g cgroup.Group, start func() error) (err error) {
	var ns *os.File
	if netNS != "" {
		if ns, err = os.Open(netNS); err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		defer ns.Close()
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	// The thread itself cannot: it does not see the control groups' files.
	if err := g.AddThread(j.tid); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cgroup.LeaveThread(j.tid)) }()
	result := make(chan error, 1)
	j.work <- func() {
		result <- func() (err error) {
			if ns != nil {
				if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
					return fmt.Errorf("enter network namespace: %w", err)
				}
				defer func() { err = errors.Join(err, unix.Setns(int(j.hostN.Fd()), unix.CLONE_NEWNET)) }()
			}
			return start()
		}()
	}
	return <-result
}

// build makes the calling thread's root a jail built on mountPoint.
func build(mountPoint string) error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", mountPoint, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=1m"); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	for _, dir := range []string{"usr", "lib", "lib64", "lib32", "libx32", "bin", "sbin"} {
		if err := show("/"+dir, filepath.Join(mountPoint, dir)); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(mountPoint, "etc"), 0o755); err != nil {
		return err
	}
	if b, err := os.ReadFile("/etc/ld.so.cache"); err == nil {
		if err := os.WriteFile(filepath.Join(mountPoint, "etc", "ld.so.cache"), b, 0o644); err != nil {
			return err
		}
	}
	if err := devices(filepath.Join(mountPoint, "dev")); err != nil {
		return err
	}
	proc, old := filepath.Join(mountPoint, "proc"), filepath.Join(mountPoint, "old")
	for _, dir := range []string{proc, old} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	// A process sees itself alone: every machine has a user of its own.
	if err := unix.Mount("proc", proc, "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "hidepid=2,subset=pid"); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	if err := unix.PivotRoot(mountPoint, old); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the host's files: %w", err)
	}
	if err := os.Remove("/old"); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("make root read-only: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid new privileges: %w", err)
	}
	// What is started from here can never have a capability. (EINVAL: past the
	// last that the kernel knows.)
	for c := uintptr(0); c < 64; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			if errors.Is(err, unix.EINVAL) {
				break
			}
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// show makes a folder of the host's, or the link that stands for one, appear
// in the jail, read-only.
func show(source, target string) error {
	info, err := os.Lstat(source)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeSymlink != 0 {
		to, err := os.Readlink(source)
		if err != nil {
			return err
		}
		return os.Symlink(to, target)
	}
	if err := os.Mkdir(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s: %w", source, err)
	}
	if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("show %s read-only: %w", source, err)
	}
	return nil
}

// devices makes the few that QEMU opens by name. All else it is handed.
func devices(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "urandom", "kvm"} {
		var st unix.Stat_t
		if err := unix.Stat("/dev/"+name, &st); err != nil {
			continue // a host without KVM
		}
		path := filepath.Join(dir, name)
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(st.Rdev)); err != nil {
			return fmt.Errorf("make device %s: %w", name, err)
		}
		if err := os.Chmod(path, 0o666); err != nil { // whatever the umask
			return err
		}
	}
	return nil
}
