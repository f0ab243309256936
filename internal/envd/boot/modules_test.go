package boot

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMakeDevices(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make devices")
	}
	dir := t.TempDir()
	list := filepath.Join(dir, "list")
	text := "# Device nodes to trigger on-demand module loading.\nfuse fuse c10:229\ntun net/tun c10:200\nloop loop-control c10:237\n" +
		"x disk b7:1\nevil ../../evil c1:3\nevil sock x1:3\nshort\n"
	if err := os.WriteFile(list, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	dev := filepath.Join(dir, "a", "dev")
	for range 2 { // a device may exist already
		if err := makeDevices(list, dev); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]struct {
		mode         uint32
		major, minor uint32
	}{
		"fuse": {unix.S_IFCHR | 0o666, 10, 229}, "net/tun": {unix.S_IFCHR | 0o666, 10, 200},
		"loop-control": {unix.S_IFCHR | 0o600, 10, 237}, "disk": {unix.S_IFBLK | 0o600, 7, 1},
	} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dev, name), &st); err != nil {
			t.Error(err)
		} else if st.Mode != want.mode || unix.Major(st.Rdev) != want.major || unix.Minor(st.Rdev) != want.minor {
			t.Errorf("%s: mode %o, %d:%d", name, st.Mode, unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("beside the devices: %v, %v", entries, err)
	}
}

func TestProvideModprobe(t *testing.T) {
	for _, there := range []string{"", "sbin/modprobe", "usr/sbin/modprobe"} {
		root := t.TempDir()
		if there != "" {
			path := filepath.Join(root, there)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("../bin/kmod", path); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if err := provideModprobe(root); err != nil {
				t.Fatal(err)
			}
		}
		path, want := filepath.Join(root, "sbin/modprobe"), daemon
		if there != "" {
			path, want = filepath.Join(root, there), "../bin/kmod"
		}
		if got, err := os.Readlink(path); err != nil || got != want {
			t.Errorf("with %q: %q, %v", there, got, err)
		}
	}
}
