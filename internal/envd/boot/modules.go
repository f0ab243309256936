package boot

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// allModules has a folder with the modules of each kernel, named after its release.
const allModules = "/lib/modules"

// mountModules mounts the kernel's modules on device where programs look for them. An
// overlay with the guest's own folder allows packages to add headers and modules. The
// device is the same for all guests, and read-only.
func mountModules(device string) error {
	if _, err := os.Stat(device); err != nil {
		return err
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return fmt.Errorf("read the kernel's release: %w", err)
	}
	own := filepath.Join(allModules, unix.ByteSliceToString(name.Release[:]))
	image, work := filepath.Join(allModules, ".wrenn/image"), filepath.Join(allModules, ".wrenn/work")
	for _, dir := range []string{own, work} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("create mount point: %w", err)
		}
	}
	const flags = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOATIME
	if err := (mount{device, image, "ext4", flags | syscall.MS_RDONLY, ""}).do(); err != nil {
		return err
	}
	if err := (mount{"overlay", own, "overlay", flags, "lowerdir=" + image + ",upperdir=" + own + ",workdir=" + work}).do(); err != nil {
		say("packages cannot add kernel modules: %v", err)
		if err := (mount{image, own, "", syscall.MS_BIND, ""}).do(); err != nil {
			return err
		}
	}
	if err := makeDevices(filepath.Join(own, "modules.devname"), "/dev"); err != nil {
		return fmt.Errorf("create devices of modules: %w", err)
	}
	return nil
}

// shared has the devices that every user may open, as with udev. Only root may open the
// others.
var shared = map[string]bool{"fuse": true, "net/tun": true}

// makeDevices creates the devices that modules.devname lists in dir. The kernel loads
// their modules when a program opens them.
func makeDevices(list, dir string) error {
	f, err := os.Open(list)
	if err != nil {
		return err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var module, name, number string
		if _, err := fmt.Sscan(s.Text(), &module, &name, &number); err != nil || module == "#" {
			continue
		}
		var kind byte
		var major, minor uint32
		if _, err := fmt.Sscanf(number, "%c%d:%d", &kind, &major, &minor); err != nil || kind != 'c' && kind != 'b' || !filepath.IsLocal(name) {
			continue
		}
		mode := uint32(syscall.S_IFCHR)
		if kind == 'b' {
			mode = syscall.S_IFBLK
		}
		path, rights := filepath.Join(dir, name), os.FileMode(0o600)
		if shared[name] {
			rights = 0o666
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		err := unix.Mknod(path, mode, int(unix.Mkdev(major, minor)))
		if errors.Is(err, fs.ErrExist) {
			err = nil
		}
		if err == nil {
			err = os.Chmod(path, rights) // whatever the umask
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// modprobe is the path of the program that the kernel starts to load a module.
const modprobe = "sbin/modprobe"

// provideModprobe links modprobe to this program if the image has none.
func provideModprobe(root string) error {
	for _, name := range []string{modprobe, "usr/" + modprobe} {
		if _, err := os.Lstat(filepath.Join(root, name)); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	path := filepath.Join(root, modprobe)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.Symlink(daemon, path)
}
