// Package machine makes the machine that the guest daemon runs on its
// sandbox's own: its random pool, its name, its clock and its disk. A machine
// that goes on from captured memory has all of these from another time, and
// often from another sandbox.
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
	etc string // the folder of the files that name the machine
}

// New returns the machine that this process runs on.
func New() *Machine { return &Machine{etc: "/etc"} }

// The kernel's requests on /dev/urandom (include/uapi/linux/random.h).
const (
	rndAddEntropy = 0x40085203 // _IOW('R', 3, int[2])
	rndReseedCRNG = 0x5207     // _IO('R', 7)
)

// maxEntropy is how many bytes Reseed takes.
const maxEntropy = 1024

// Reseed mixes secret bytes into the kernel's random pool, counts them as such,
// and makes every generator of the kernel begin anew from the pool: what is
// drawn from now on has nothing in common with what another machine with the
// same memory draws. It takes 1 to 1024 bytes.
//
// Generators that processes keep for themselves do not learn of it.
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

// ValidName says whether a host name is one that [Machine.Rename] takes: up to 63
// letters, digits, hyphens and dots, a letter or digit first.
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

// Rename gives the machine its host name: the kernel's, and that of
// /etc/hostname and /etc/hosts, whose other lines stay. A machine whose name
// changes is another one, so it also gets a new /etc/machine-id. A machine that
// has the name is left alone.
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
	// Last, so that whoever is interrupted begins again. The kernel's name does
	// not depend on a disk that may be full.
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	return err
}

// hosts is the text of /etc/hosts with this machine's name in it.
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

// maxText is the size in bytes of a file that replace still reads.
const maxText = 1 << 20

// replace writes a file of m.etc anew, if its text changes. What is there and
// is no file (a user of the guest can put anything there) is replaced too. It
// is not synced: it must outlive the machine's memory no more than anything
// else does.
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

// overwrite writes over a file that has one name. Users' processes stand still
// meanwhile, so that nobody sees half of it; and making a file anew is a good
// part of what a guest does before it answers for the first time. done tells
// whether it was such a file.
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

// readText reads a plain file; what is none counts as missing: nil.
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

// lead is how far the clock may be ahead of the host's time as it was told:
// the telling takes time.
const lead = time.Second

// SetClock puts the clock right when the host has told its time. The host's
// time is later than that by now, never earlier; so a clock that is behind is
// wrong, and one that is ahead may be right.
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

// wrong says whether a clock that shows now cannot be that of a host that has
// just told its time. Both are wall clocks.
func wrong(now, host time.Time) bool {
	ahead := now.Round(0).Sub(host)
	return ahead < 0 || ahead > lead
}

const (
	resizeFS = 0x40086610 // EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64)
	// growWait bounds the wait for the kernel to take note of a larger device.
	growWait = 2 * time.Second
)

// Grow makes the root file system as large as its device, online, and returns
// its new size in bytes. The device has, or is about to have, so many bytes:
// the kernel may still be busy noticing.
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
	// The kernel does nothing when it has so many blocks already.
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

// awaitSize returns when the device whose number of sectors is in file has so
// many bytes. The kernel announces a device's new size to whoever listens for
// its events.
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
			// Whatever the event says, and even when some were lost, the size is read again.
			if _, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT); err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EAGAIN) {
				return err
			}
		}
	}
}
