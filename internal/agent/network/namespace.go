package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/thread"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// createNamespace makes a network namespace, names it by a bind mount on
// path, and runs setup on a thread inside it. When anything fails nothing of
// it stays.
func createNamespace(path string, setup func(ns *os.File) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make folder of namespaces: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return fmt.Errorf("name namespace: %w", err)
	}
	f.Close()
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make namespace: %w", err)
		}
		if err := unix.Mount(threadNamespace, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount namespace on %s: %w", path, err)
		}
		ns, err := os.Open(threadNamespace)
		if err != nil {
			return fmt.Errorf("open new namespace: %w", err)
		}
		defer ns.Close()
		return setup(ns)
	})
	if err != nil {
		return errors.Join(err, removeNamespace(path))
	}
	return nil
}

// shareNamespaces makes the folder of namespaces' names a shared mount of its
// own, as iproute2 does with its own: then names come and go in every mount
// namespace alike. The caller holds lockBlocks, and there is no name yet.
func shareNamespaces() error {
	dir := layout.Namespaces()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make folder of namespaces: %w", err)
	}
	share := func() error { return unix.Mount("", dir, "", unix.MS_SHARED, "") }
	err := share()
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		if err = unix.Mount(dir, dir, "", unix.MS_BIND, ""); err == nil {
			err = share()
		}
	}
	if err != nil {
		return fmt.Errorf("share folder of namespaces: %w", err)
	}
	return nil
}

func isMountPoint(path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// unshareNamespaces undoes shareNamespaces.
func unshareNamespaces() error {
	dir := layout.Namespaces()
	if err := unmountAll(dir); err != nil {
		return err
	}
	return ignore(os.Remove(dir), os.ErrNotExist)
}

// nameNamespace gives a namespace a name that may have been lost.
func nameNamespace(ns *os.File, path string) error {
	if isNamespace(ns, path) {
		return nil
	}
	if err := removeNamespace(path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return fmt.Errorf("name namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), path, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("mount namespace on %s: %w", path, err), removeNamespace(path))
	}
	return nil
}

// isNamespace tells whether path is the name of ns.
func isNamespace(ns *os.File, path string) bool {
	var own, there unix.Stat_t
	return unix.Fstat(int(ns.Fd()), &own) == nil && unix.Stat(path, &there) == nil && own.Dev == there.Dev && own.Ino == there.Ino
}

// openNamespace opens the namespace that path names.
func openNamespace(path string) (*os.File, error) {
	ns, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open namespace: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(ns.Fd()), &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		ns.Close()
		return nil, fmt.Errorf("open namespace: %s is not mounted: %w", path, errors.Join(err, os.ErrNotExist))
	}
	return ns, nil
}

// namespaces is a set of network namespaces. The device and the inode of its file
// identify a namespace.
type namespaces map[[2]uint64]bool

// inhabited returns the network namespaces in which processes are.
func inhabited() (namespaces, error) {
	processes, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	if len(processes) == 0 {
		return nil, errors.New("list processes: there are none in /proc")
	}
	all := namespaces{}
	for _, path := range processes {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil { // else it has ended
			all[[2]uint64{st.Dev, st.Ino}] = true
		}
	}
	return all, nil
}

// has tells whether path names one of them.
func (n namespaces) has(path string) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && n[[2]uint64{st.Dev, st.Ino}]
}

func unmountAll(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil // not, or no longer, a mount point
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// removeNamespace removes a namespace's name, however far its making got. The
// namespace itself ends with the last process in it.
func removeNamespace(path string) error {
	if err := unmountAll(path); err != nil {
		return err
	}
	err := ignore(os.Remove(path), os.ErrNotExist)
	if errors.Is(err, unix.EBUSY) {
		err = removeHidden(path)
	}
	if err != nil {
		return fmt.Errorf("remove namespace's name: %w", err)
	}
	return nil
}

// removeHidden removes a name that is still mounted where nobody sees it:
// somebody has mounted the folder, or one above, over itself. Whoever removes a
// file removes its mounts in all other mount namespaces, so the thread does it in
// one of its own from which it has removed every mount. The folder is opened
// before, because its path leads elsewhere then: to another agent's /run, perhaps.
func removeHidden(path string) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return thread.Own(func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare mounts: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		points, err := mountPoints()
		if err != nil {
			return fmt.Errorf("list mounts: %v", err) // what is missing is not the name
		}
		slices.Reverse(points) // what was mounted last covers the others
		for {
			less := false
			for _, at := range points {
				// One that is covered is tried again once what covers it is gone.
				less = unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil || less
			}
			err := unix.Unlinkat(int(dir.Fd()), filepath.Base(path), 0)
			switch {
			case err == nil, errors.Is(err, unix.ENOENT):
				return nil
			case !errors.Is(err, unix.EBUSY) || !less:
				return &os.PathError{Op: "unlinkat", Path: path, Err: err}
			}
		}
	})
}

// mountPoints returns those of the calling thread's mount namespace, in the order
// in which they were mounted.
func mountPoints() ([]string, error) {
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	plain := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var points []string
	for line := range strings.Lines(string(b)) {
		// 36 35 98:0 /root /mount/point options - type source options
		if fields := strings.Fields(line); len(fields) > 4 {
			points = append(points, plain.Replace(fields[4]))
		}
	}
	return points, nil
}

// inNamespace runs f on a thread inside the namespace at path. Only what f
// does itself, not goroutines that it starts, happens there.
func inNamespace(path string, f func() error) error {
	ns, err := openNamespace(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return inside(ns, f)
}

// inside is [inNamespace] for an open namespace.
func inside(ns *os.File, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace: %w", err)
		}
		return f()
	})
}

const threadNamespace = "/proc/thread-self/ns/net"

// onThread runs f on a thread that f may move to another network namespace.
// The thread goes back afterwards; one that cannot ends with its goroutine,
// so that no other goroutine ever runs in the wrong namespace.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("ended early") // f called runtime.Goexit
		defer func() { done <- err }()
		runtime.LockOSThread()
		home, openErr := os.Open(threadNamespace)
		if openErr != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("open own namespace: %w", openErr)
			return
		}
		defer func() {
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			home.Close()
		}()
		err = f()
	}()
	return <-done
}
