// Package jail runs programs that process guests' data in a jail without the host's
// files and without capabilities.
package jail

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Jail is a mount namespace that contains the distribution's programs and libraries,
// read-only, a few devices and /proc entries of a process's own user. A thread of this
// process lives in it. The processes that this thread starts have no capabilities and
// cannot get any. The namespace ends with the last of them.
type Jail struct {
	work  chan func()
	ended chan struct{}
	tid   int
}

// New makes a jail with the named devices of /dev, except those that the host lacks. It
// mounts the jail's root on the folder mountPoint, which does not change for others.
func New(mountPoint string, devices ...string) (*Jail, error) {
	j := &Jail{work: make(chan func()), ended: make(chan struct{})}
	ready := make(chan error)
	go func() {
		// Never unlocked, so that the thread ends with this goroutine.
		runtime.LockOSThread()
		defer close(j.ended)
		j.tid = unix.Gettid()
		err := build(mountPoint, devices)
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
		return nil, fmt.Errorf("make jail: %w", err)
	}
	return j, nil
}

// Close ends the jail's thread. Processes that it started keep running.
func (j *Jail) Close() {
	close(j.work)
	<-j.ended
}

// Thread returns the id of the jail's thread.
func (j *Jail) Thread() int { return j.tid }

// Do calls f on the jail's thread, where it may start processes.
func (j *Jail) Do(f func() error) error {
	result := make(chan error, 1)
	j.work <- func() { result <- f() }
	return <-result
}

// build makes a jail on mountPoint the calling thread's root.
func build(mountPoint string, names []string) error {
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
	// An empty mtab, because e2fsprogs check whether the file system is mounted.
	if err := os.WriteFile(filepath.Join(mountPoint, "etc", "mtab"), nil, 0o644); err != nil {
		return err
	}
	if err := devices(filepath.Join(mountPoint, "dev"), names); err != nil {
		return err
	}
	proc, old := filepath.Join(mountPoint, "proc"), filepath.Join(mountPoint, "old")
	for _, dir := range []string{proc, old} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	// hidepid: a process sees only processes of its own user.
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
	// Processes started here can never get a capability. EINVAL means that c is past the
	// kernel's last one.
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

// show mounts a folder of the host in the jail, read-only, or copies it if it is a
// symbolic link.
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

// devices makes the named devices that the host has.
func devices(dir string, names []string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Stat("/dev/"+name, &st); err != nil {
			continue // a host without KVM, for example
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
