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

// The largest shares of the memory that the guest's own tmpfs mounts may hold: half
// of it together, because no process that the kernel could kill owns it.
const (
	devSize = "size=1%"
	runSize = "size=15%"
	shmSize = "size=30%"
)

// files is how many descriptors a process may have open: as usual, and at most.
var files = syscall.Rlimit{Cur: 1024, Max: 1 << 20}

// setting is a value below /proc/sys.
type setting struct{ name, value string }

// settings are what servers expect of a machine and the kernel does not begin with.
// memory is the guest's, in bytes.
func settings(memory uint64) []setting {
	// A watch takes about 1 KiB of the kernel's memory; all of them take a quarter
	// of the guest's at most.
	watches := min(512<<10, memory/4>>10)
	return []setting{
		{"net/ipv4/ip_unprivileged_port_start", "0"},
		{"net/ipv4/ping_group_range", "0\t2147483647"},
		// A connection that finds a full backlog is tried again, and not lost.
		{"net/ipv4/tcp_syncookies", "0"},
		{"fs/inotify/max_user_watches", strconv.FormatUint(watches, 10)},
		{"kernel/pid_max", "4194304"},
		{"vm/max_map_count", "262144"},
		// System V's shared memory belongs to no process either.
		{"kernel/shmall", strconv.FormatUint(memory/10/uint64(os.Getpagesize()), 10)},
		// Towards the internet there is no IPv6; loopback and other devices have it.
		{"net/ipv6/conf/eth0/disable_ipv6", "1"},
	}
}

// setLimits sets what settings and files say. A kernel without one of them is no
// reason not to start.
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
	// Of package syscall, which then leaves the limit alone when it starts programs.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		say("set the limit of open files: %v", err)
	}
}

// shareTemporary lets every user make files in the image's folders for them, and
// only their owners remove them. A link stays one.
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
