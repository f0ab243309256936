package boot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The largest shares of the memory for the guest's own tmpfs mounts, half of it together,
// because their files belong to no process that the kernel could kill.
const (
	devSize = "size=1%"
	runSize = "size=15%"
	shmSize = "size=30%"
)

// files is the soft and the hard limit for open descriptors of a process.
var files = syscall.Rlimit{Cur: 1024, Max: 1 << 20}

// setting is a value below /proc/sys.
type setting struct{ name, value string }

// settings returns the settings that servers expect and that differ from the kernel's
// defaults. memory is the size of the guest's memory in bytes.
func settings(memory uint64) []setting {
	// A watch takes about 1 KiB of kernel memory. All of them may take a quarter of the
	// guest's memory.
	watches := min(512<<10, memory/4>>10)
	return []setting{
		{"net/ipv4/ip_unprivileged_port_start", "0"},
		{"net/ipv4/ping_group_range", "0\t2147483647"},
		// With a full backlog, the client retries instead of losing the connection.
		{"net/ipv4/tcp_syncookies", "0"},
		{"fs/inotify/max_user_watches", strconv.FormatUint(watches, 10)},
		{"kernel/pid_max", "4194304"},
		{"vm/max_map_count", "262144"},
		// System V shared memory belongs to no process either.
		{"kernel/shmall", strconv.FormatUint(memory/10/uint64(os.Getpagesize()), 10)},
		// There is no IPv6 to the internet; loopback and other devices have it.
		{"net/ipv6/conf/eth0/disable_ipv6", "1"},
	}
}

// setLimits applies settings and files. It only logs failures, because the kernel may
// lack some settings.
func setLimits() {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		say("read size of memory: %v", err)
		return
	}
	for _, s := range settings(uint64(info.Totalram) * uint64(info.Unit)) {
		if err := os.WriteFile(filepath.Join("/proc/sys", s.name), []byte(s.value), 0); err != nil {
			say("set %s: %v", strings.ReplaceAll(s.name, "/", "."), err)
		}
	}
	// With package syscall, which then does not reset the limit when it starts programs.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		say("set the limit of open files: %v", err)
	}
}

// shareTemporary sets the usual mode of the image's folders for temporary files, so that
// every user can create files there, and only their owners can remove them. It leaves
// links alone.
func shareTemporary(root string) error {
	for _, name := range []string{"tmp", "var/tmp"} {
		dir := filepath.Join(root, name)
		info, err := os.Lstat(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		const mode = os.ModeSticky | 0o777
		if !info.IsDir() || info.Mode()&(os.ModeSticky|os.ModePerm) == mode {
			continue
		}
		if err := os.Chmod(dir, mode); err != nil {
			return err
		}
	}
	return nil
}
