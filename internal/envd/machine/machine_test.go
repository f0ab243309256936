package machine

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
)

func TestReseed(t *testing.T) {
	m := New()
	for _, n := range []int{0, maxEntropy + 1} {
		if err := m.Reseed(make([]byte, n)); err == nil {
			t.Errorf("%d bytes were accepted", n)
		}
	}
	err := m.Reseed(bytes.Repeat([]byte{7}, 64))
	if errors.Is(err, unix.EPERM) {
		t.Skip("needs CAP_SYS_ADMIN: ", err)
	}
	if err != nil {
		t.Error(err)
	}
}

// rename renames a machine that only this thread sees.
func rename(t *testing.T, etc, name string) (err error) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked, so the thread ends
		if err = unix.Unshare(unix.CLONE_NEWUTS); err != nil {
			return
		}
		if err = unix.Sethostname([]byte("captured")); err != nil {
			return
		}
		if err = (&Machine{etc: etc}).Rename(name); err != nil {
			return
		}
		var uts unix.Utsname
		_ = unix.Uname(&uts)
		if got := unix.ByteSliceToString(uts.Nodename[:]); got != name {
			t.Errorf("the kernel's name is %q", got)
		}
	}()
	<-done
	return err
}

func TestRename(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a UTS namespace")
	}
	etc := t.TempDir()
	file := func(name string) string {
		b, err := os.ReadFile(filepath.Join(etc, name))
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	if err := rename(t, etc, "one"); err != nil {
		t.Fatal(err)
	}
	id := file("machine-id")
	if file("hostname") != "one\n" || file("hosts") != "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 one\n" || len(id) != 33 {
		t.Errorf("files are %q %q %q", file("hostname"), file("hosts"), id)
	}
	// If the machine already has its name, nothing changes.
	if err := rename(t, etc, "captured"); err != nil || file("hostname") != "one\n" || file("machine-id") != id {
		t.Error(err, file("hostname"))
	}
	// A user's obstacles neither block the daemon nor redirect its writes.
	outside := filepath.Join(t.TempDir(), "outside")
	for _, f := range []string{"hosts", "hostname", "machine-id"} {
		if err := os.Remove(filepath.Join(etc, f)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(outside, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Mkfifo(filepath.Join(etc, "hosts"), 0o600), os.Symlink(outside, filepath.Join(etc, "hostname")),
		os.Symlink(outside, filepath.Join(etc, "machine-id")), os.Symlink(outside, filepath.Join(etc, ".wrenn-hostname"))); err != nil {
		t.Fatal(err)
	}
	if err := rename(t, etc, "two"); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(outside); string(b) != "mine" || file("hostname") != "two\n" || !strings.HasSuffix(file("hosts"), " two\n") || file("machine-id") == id {
		t.Errorf("files are %q %q, and outside %q", file("hostname"), file("hosts"), b)
	}
	entries, err := os.ReadDir(etc)
	if err != nil || len(entries) != 3 {
		t.Errorf("these are left: %v, %v", entries, err)
	}
	// If the files cannot be written, the kernel still gets the name.
	if err := rename(t, filepath.Join(etc, "nothing"), "three"); err == nil {
		t.Error("files in a missing folder were written")
	}
	for _, bad := range []string{"", "-a", ".a", "a b", "a\n127.0.0.1 x", "ü", strings.Repeat("a", 64)} {
		if err := rename(t, etc, bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestHosts(t *testing.T) {
	for _, c := range []struct{ old, want string }{
		{"", "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 n\n"},
		{"127.0.0.1 localhost\n127.0.1.1 old older\n10.0.0.1 db", "127.0.0.1 localhost\n10.0.0.1 db\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 n\n"},
		{"# mine\n\n127.0.0.1\tlocalhost\n::1\tlocalhost\n", "# mine\n\n127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1 n\n"},
	} {
		if got := string(hosts([]byte(c.old), "n")); got != c.want {
			t.Errorf("%q becomes %q, not %q", c.old, got, c.want)
		}
	}
}

func FuzzHosts(f *testing.F) {
	f.Add([]byte("127.0.1.1 a\n\n#\n127.0.0.1 b"))
	f.Fuzz(func(t *testing.T, old []byte) {
		once := hosts(old, "first")
		again := hosts(once, "second")
		if n := bytes.Count(again, []byte("127.0.1.1 second\n")); n < 1 || !bytes.HasSuffix(again, []byte("127.0.1.1 second\n")) {
			t.Errorf("%q becomes %q", old, again)
		}
		if len(again) > len(once)+1 {
			t.Errorf("%q grows to %q", once, again)
		}
	})
}

func TestWrong(t *testing.T) {
	host := time.Now()
	for ahead, want := range map[time.Duration]bool{
		-3 * time.Hour: true, -time.Millisecond: true, 0: false, 300 * time.Millisecond: false, time.Second: false,
		1100 * time.Millisecond: true, time.Hour: true,
	} {
		if got := wrong(host.Round(0).Add(ahead), host); got != want {
			t.Errorf("a clock that is %v ahead is wrong: %v", ahead, got)
		}
	}
}

// listensForDevices reports whether this process has a socket for the kernel's events of
// devices.
func listensForDevices() bool {
	all, _ := os.ReadFile("/proc/self/net/netlink")
	for line := range strings.Lines(string(all)) {
		if f := strings.Fields(line); len(f) > 2 && f[1] == strconv.Itoa(unix.NETLINK_KOBJECT_UEVENT) && f[2] == strconv.Itoa(os.Getpid()) {
			return true
		}
	}
	return false
}

func TestGrow(t *testing.T) {
	for _, tool := range []string{"losetup", "mke2fs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("needs ", tool)
		}
	}
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Skipf("needs loop devices: %s: %v: %s", name, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	run("truncate", "-s", "64M", image)
	run("mke2fs", "-q", "-t", "ext4", image)
	loop := run("losetup", "-f", "--show", image)
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", loop).Run() })
	mounted := filepath.Join(dir, "mounted")
	if err := os.Mkdir(mounted, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(loop, mounted, "ext4", 0, ""); err != nil {
		t.Skip("needs to mount: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(mounted, unix.MNT_DETACH) })

	got, err := grow(t.Context(), mounted, 64<<20)
	allowed := !errors.Is(err, unix.EPERM)
	if allowed && (err != nil || got != 64<<20) {
		t.Errorf("no growth: %d, %v", got, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := grow(ctx, mounted, 256<<20); err == nil {
		t.Error("grown beyond the device")
	}
	// The device grows while grow waits for it.
	grown := make(chan struct{})
	go func() {
		defer close(grown)
		if !await.Within(await.Hang, listensForDevices) {
			t.Error("grow does not wait for the device")
		}
		_ = exec.Command("truncate", "-s", "256M", image).Run()
		_ = exec.Command("losetup", "-c", loop).Run()
	}()
	got, err = grow(t.Context(), mounted, 256<<20)
	<-grown
	if !allowed && errors.Is(err, unix.EPERM) {
		t.Skip("the file system itself was not grown: needs CAP_SYS_RESOURCE")
	}
	var st syscall.Statfs_t
	_ = syscall.Statfs(mounted, &st)
	if err != nil || got != 256<<20 || int64(st.Blocks)*st.Bsize < 200<<20 {
		t.Errorf("grown to %d (%d), %v", got, int64(st.Blocks)*st.Bsize, err)
	}
	if _, err := grow(t.Context(), "/proc", 1); err == nil {
		t.Error("it grew a file system other than ext4")
	}
}
