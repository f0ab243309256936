// Package machine gives the guest the identity of its sandbox: it reseeds the random pool,
// and sets the host name, the clock and the size of the disk. After a restore, all of
// these come from an earlier time, and often from another sandbox.
package machine

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Machine is the machine that this process runs on.
type Machine struct {
	etc string // /etc, or a test's folder
}

// New returns the machine that this process runs on.
func New() *Machine { return &Machine{etc: "/etc"} }

// The kernel's requests on /dev/urandom (include/uapi/linux/random.h).
const (
	rndAddEntropy = 0x40085203 // _IOW('R', 3, int[2])
	rndReseedCRNG = 0x5207     // _IO('R', 7)
)

// maxEntropy is the most bytes that Reseed accepts.
const maxEntropy = 1024

// Reseed mixes 1 to 1024 secret bytes into the kernel's random pool, credits them, and
// makes the kernel reseed all its generators. Random numbers are then independent of those
// of other machines with the same memory.
//
// It does not reseed generators in processes.
func (*Machine) Reseed(secret []byte) error {
	if len(secret) == 0 || len(secret) > maxEntropy {
		return fmt.Errorf("reseed: %d bytes of entropy", len(secret))
	}
	fd, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/urandom: %w", err)
	}
	defer unix.Close(fd)
	// struct rand_pool_info: bits to count, bytes that follow, the bytes.
	var info struct {
		bits, size int32
		buf        [maxEntropy]byte
	}
	info.bits, info.size = int32(len(secret)*8), int32(len(secret))
	copy(info.buf[:], secret)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndAddEntropy, uintptr(unsafe.Pointer(&info)))
	runtime.KeepAlive(&info)
	clear(info.buf[:])
	if errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed the kernel's generators: %w", errno)
	}
	return nil
}

// ValidName reports whether [Machine.Rename] accepts a host name: up to 63 letters, digits,
// hyphens and dots, beginning with a letter or digit.
func ValidName(name string) bool {
	if name == "" || len(name) > 63 {
		return false
	}
	for i, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case (c == '-' || c == '.') && i > 0:
		default:
			return false
		}
	}
	return true
}

// Rename sets the host name in the kernel, in /etc/hostname and in /etc/hosts, whose other
// lines it keeps. A new name means a new machine, so Rename also replaces
// /etc/machine-id. It does nothing if the machine already has the name.
func (m *Machine) Rename(name string) error {
	if !ValidName(name) {
		return fmt.Errorf("%q is not a host name", name)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return fmt.Errorf("read host name: %w", err)
	}
	if unix.ByteSliceToString(uts.Nodename[:]) == name {
		return nil
	}
	fresh := make([]byte, 16)
	_, _ = rand.Read(fresh) // never fails
	err := errors.Join(
		m.replace("machine-id", 0o444, func([]byte) []byte { return []byte(hex.EncodeToString(fresh) + "\n") }),
		m.replace("hostname", 0o644, func([]byte) []byte { return []byte(name + "\n") }),
		m.replace("hosts", 0o644, func(old []byte) []byte { return hosts(old, name) }),
	)
	// Last, so that an interrupted call is repeated. This also works if the disk is full.
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	return err
}

// hosts returns the text of /etc/hosts with this machine's name in it.
func hosts(old []byte, name string) []byte {
	const own = "127.0.1.1"
	var b bytes.Buffer
	loopback, loopback6 := false, false
	for line := range bytes.Lines(old) {
		f := bytes.Fields(line)
		if len(f) > 0 && string(f[0]) == own {
			continue
		}
		loopback = loopback || len(f) > 1 && string(f[0]) == "127.0.0.1"
		loopback6 = loopback6 || len(f) > 1 && string(f[0]) == "::1"
		b.Write(bytes.TrimRight(line, "\n"))
		b.WriteByte('\n')
	}
	if !loopback {
		b.WriteString("127.0.0.1 localhost\n")
	}
	if !loopback6 {
		b.WriteString("::1 localhost ip6-localhost ip6-loopback\n")
	}
	b.WriteString(own + " " + name + "\n")
	return b.Bytes()
}

// maxText is the size in bytes of the largest file that replace reads.
const maxText = 1 << 20

// replace rewrites a file in m.etc if edit changes its text. It also replaces anything
// that is not a regular file, because users can put anything there. It does not sync: the
// file need not outlive the machine's memory.
func (m *Machine) replace(name string, mode fs.FileMode, edit func(old []byte) []byte) error {
	path := filepath.Join(m.etc, name)
	old, err := readText(path)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	text := edit(old)
	if old != nil && bytes.Equal(text, old) {
		return nil
	}
	if old != nil {
		if done, err := overwrite(path, text); done || err != nil {
			return err
		}
	}
	temp := filepath.Join(filepath.Dir(path), ".wrenn-"+filepath.Base(path))
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp)
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// overwrite overwrites a regular file that has one name, and reports with done whether it
// was such a file. Users' processes are frozen then, so nobody sees a partial file. Creating
// a new file would take a large part of the time until a guest's first response.
func overwrite(path string, text []byte) (done bool, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, nil
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		return false, nil
	}
	if _, err := f.WriteAt(text, 0); err != nil {
		return true, fmt.Errorf("write %s: %w", path, err)
	}
	if st.Size <= int64(len(text)) {
		return true, nil
	}
	return true, f.Truncate(int64(len(text)))
}

// readText reads a regular file. It returns nil for anything else.
func readText(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(f, maxText))
}

// lead is how far the clock may be ahead of the time in the host's request, because the
// request takes time.
const lead = time.Second

// SetClock steps the clock to the time that the host has sent, unless it may be right. The
// host's time is later by now, so a clock that is behind is wrong, and one that is ahead
// may be right.
func (*Machine) SetClock(host time.Time) error {
	if !wrong(time.Now(), host) {
		return nil
	}
	ts := unix.NsecToTimespec(host.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	return nil
}

// wrong reports whether a clock that shows now is wrong, given the time that the host has
// just sent. Both are wall clocks.
func wrong(now, host time.Time) bool {
	ahead := now.Round(0).Sub(host)
	return ahead < 0 || ahead > lead
}

const (
	resizeFS = 0x40086610 // EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64)
	// growWait bounds the wait until the kernel notices that a device grew.
	growWait = 2 * time.Second
)

// Grow grows the root file system online to the size of its device, and returns its new
// size in bytes. size is the size of the device, which the kernel may not have noticed yet.
func (m *Machine) Grow(ctx context.Context, size int64) (int64, error) {
	got, err := grow(ctx, "/", size)
	if err != nil {
		return 0, fmt.Errorf("grow the root file system: %w", err)
	}
	return got, nil
}

func grow(ctx context.Context, mountpoint string, size int64) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(mountpoint, &st); err != nil {
		return 0, err
	}
	var vfs unix.Statfs_t
	if err := unix.Statfs(mountpoint, &vfs); err != nil {
		return 0, err
	}
	if vfs.Type != unix.EXT4_SUPER_MAGIC {
		return 0, errors.New("it is not ext4")
	}
	ctx, cancel := context.WithTimeout(ctx, growWait)
	defer cancel()
	device := fmt.Sprintf("/sys/dev/block/%d:%d/size", unix.Major(st.Dev), unix.Minor(st.Dev))
	if err := awaitSize(ctx, device, size); err != nil {
		return 0, err
	}
	sectors, err := readSectors(device)
	if err != nil {
		return 0, err
	}
	fd, err := unix.Open(mountpoint, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	// The kernel does nothing if the file system already has that many blocks.
	blocks := uint64(sectors) * 512 / uint64(vfs.Bsize)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), resizeFS, uintptr(unsafe.Pointer(&blocks)))
	runtime.KeepAlive(&blocks)
	if errno != 0 {
		return 0, fmt.Errorf("resize to %d blocks: %w", blocks, errno)
	}
	return int64(blocks) * vfs.Bsize, nil
}

func readSectors(file string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

// awaitSize returns when the device whose number of sectors is in file has size bytes. It
// waits for the kernel's events.
func awaitSize(ctx context.Context, file string, size int64) error {
	enough := func() (bool, error) {
		sectors, err := readSectors(file)
		return sectors >= size/512, err
	}
	if ok, err := enough(); ok || err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("listen for the device: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("listen for the device: %w", err)
	}
	deadline, _ := ctx.Deadline()
	buf := make([]byte, 8<<10)
	for {
		if ok, err := enough(); ok || err != nil {
			return err
		}
		left := time.Until(deadline)
		if left <= 0 || ctx.Err() != nil {
			return fmt.Errorf("the device does not have %d bytes", size)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			// After any event, and after a loss of events, read the size again.
			if _, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT); err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EAGAIN) {
				return err
			}
		}
	}
}
