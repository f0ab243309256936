package boot

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ModuleOrder is the file of the initrd that lists the modules below /modules, one per
// line, in the order in which to load them.
const ModuleOrder = "/modules/order"

// deviceTimeout bounds the wait for the root device, which normally appears within
// milliseconds.
const deviceTimeout = 10 * time.Second

// switchRoot loads the modules that every guest needs, mounts the root file system and
// the disk with the other modules, and becomes /sbin/wrenn-init of the root file system.
func switchRoot() error {
	for _, m := range []mount{
		{"devtmpfs", "/dev", "devtmpfs", syscall.MS_NOSUID, ""},
		{"proc", "/proc", "proc", 0, ""},
	} {
		if err := m.do(); err != nil {
			return err
		}
	}
	opts, err := kernelOptions()
	if err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	device := opts["root"]
	if device == "" {
		return errors.New("the kernel command line names no root=")
	}
	if err := awaitFile(device, deviceTimeout); err != nil {
		return fmt.Errorf("wait for root device: %w", err)
	}
	if err := (mount{device, "/root", "ext4", syscall.MS_NOATIME, ""}).do(); err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/proc"} {
		if err := syscall.Mount(dir, "/root"+dir, "", syscall.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	// The initrd's files occupy memory as long as they exist.
	for _, name := range []string{"/init", "/modules"} {
		_ = os.RemoveAll(name)
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := syscall.Chroot("."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if device := opts["wrenn.modules"]; device != "" {
		if err := mountModules(device); err != nil {
			say("cannot mount the kernel's modules: %v", err)
		}
	}
	return fmt.Errorf("start /sbin/wrenn-init: %w", syscall.Exec("/sbin/wrenn-init", []string{"wrenn-init"}, os.Environ()))
}

// loadModules loads the modules in ModuleOrder. It skips modules for which the machine
// has no device. If one was needed, the root device does not appear.
func loadModules() error {
	f, err := os.Open(ModuleOrder)
	if err != nil {
		return fmt.Errorf("read order of modules: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if err := loadModule(filepath.Join("/modules", filepath.Base(s.Text()))); err != nil {
			say("%v", err)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if err == nil || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return fmt.Errorf("load %s: %w", filepath.Base(path), err)
}

// awaitFile returns when path exists. It watches the folder with inotify.
func awaitFile(path string, timeout time.Duration) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		return fmt.Errorf("watch %s: %w", filepath.Dir(path), err)
	}
	deadline := time.Now().Add(timeout)
	buf := make([]byte, 4096)
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("%s did not appear within %v", path, timeout)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			if _, err := unix.Read(fd, buf); err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	}
}
