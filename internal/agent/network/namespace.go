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

// createNamespace makes a network namespace, mounts it on path, and runs setup on a thread
// in it. If a step fails, it undoes the steps before.
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

// shareNamespaces makes the folder of namespaces a shared mount, as iproute2 does with its
// folder, so that every mount namespace sees new names. The caller holds lockBlocks, and
// the folder must be empty.
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

// nameNamespace mounts a namespace on path, unless it is mounted there.
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

// isNamespace reports whether path names ns.
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

// namespaces is a set of network namespaces, identified by device and inode of their files.
type namespaces map[[2]uint64]bool

// inhabited returns the network namespaces that have processes.
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
		if unix.Stat(path, &st) == nil { // otherwise the process has ended
			all[[2]uint64{st.Dev, st.Ino}] = true
		}
	}
	return all, nil
}

// has reports whether path names one of the namespaces.
func (n namespaces) has(path string) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && n[[2]uint64{st.Dev, st.Ino}]
}

func unmountAll(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil // not a mount point
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// removeNamespace removes a namespace's name, even an unfinished one. The namespace itself
// ends with its last process.
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

// removeHidden removes a name whose mount is hidden, because somebody mounted the folder, or
// one above it, over itself. Unlinking a file removes its mounts in all other mount
// namespaces, so a thread does that in a new one without mounts. It opens the folder first,
// because without mounts the path may lead to another folder.
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
			return fmt.Errorf("list mounts: %v", err) // %v: ErrNotExist would mean that the name is gone
		}
		slices.Reverse(points) // later mounts cover earlier ones
		for {
			less := false
			for _, at := range points {
				// If another mount covers this one, the next round tries it again.
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

// mountPoints returns the mount points in the calling thread's mount namespace, oldest
// first.
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

// inNamespace runs f on a thread in the namespace at path. Goroutines that f starts run
// outside of it.
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

// onThread runs f on a thread that f may move to another network namespace. Afterwards the
// thread returns to its old namespace. If that fails, the thread ends with its goroutine, so
// no other goroutine can run in the wrong namespace.
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
