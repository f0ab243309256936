package network

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 looks for named network namespaces.
const netnsDir = "/run/netns"

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

// removeNamespace removes a namespace's name, however far its making got. The
// namespace itself ends with the last process in it.
func removeNamespace(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break // not, or no longer, a mount point
		}
		if err != nil {
			return fmt.Errorf("unmount namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove namespace's name: %w", err)
	}
	return nil
}

// inNamespace runs f on a thread inside the namespace at path. Only what f
// does itself, not goroutines that it starts, happens there.
func inNamespace(path string, f func() error) error {
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer ns.Close()
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", path, err)
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
