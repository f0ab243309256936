package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

// hostileUID is the fake QEMU's own user, so that no other process's threads count for
// it.
const hostileUID = 1_999_997

// The roles of this program as a QEMU that its guest has taken over: its last argument.
const (
	attacker  = "attacker"       // tries one of the attacks
	silent    = "silent"         // sends nothing
	garbage   = "garbage"        // sends something that is not JSON
	endless   = "endless"        // sends an endless message
	liar      = "liar"           // reports success, and much else
	forbidden = "forbidden call" // makes a forbidden call when asked for the console
)

// overlayFD is the file that the fake may write to.
const overlayFD = 3

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "-name" { // the driver's arguments for QEMU
		err := takenOver(os.Args)
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if len(os.Args) == 4 && os.Args[3] == attacker {
		for _, a := range attacks {
			if a.name == os.Args[1] {
				err := a.try(os.Args[2])
				fmt.Fprintf(os.Stderr, "answer: %v\n", err)
				os.Exit(0)
			}
		}
		os.Exit(99)
	}
	os.Exit(m.Run())
}

// attack is something that a hostile QEMU tries. target is a folder or a process id.
type attack struct {
	name string
	try  func(target string) error
	want any // the signal that ends it, or the error that it gets
}

// call returns an attack that makes a system call.
func call(number uintptr, args ...uintptr) func(string) error {
	return func(string) error {
		var a [6]uintptr
		copy(a[:], args)
		if _, _, errno := unix.RawSyscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
			return errno
		}
		return nil
	}
}

// opening returns an attack that opens its target, with suffix appended.
func opening(suffix string, flags int) func(string) error {
	return func(target string) error {
		fd, err := unix.Open(target+suffix, flags, 0o600)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
}

// path returns an attack that opens the file name, without regard to the target.
func path(name string, flags int) func(string) error {
	return func(string) error { return opening(name, flags)("") }
}

// text returns the address of a string for a system call.
func text(s string) uintptr {
	b, _ := unix.BytePtrFromString(s)
	return uintptr(unsafe.Pointer(b))
}

var attacks = []attack{
	{"ptrace", call(unix.SYS_PTRACE, unix.PTRACE_TRACEME), unix.SIGSYS},
	{"process_vm_readv", call(unix.SYS_PROCESS_VM_READV, 1), unix.SIGSYS},
	{"pidfd_open", call(unix.SYS_PIDFD_OPEN, 1), unix.SIGSYS},
	{"mount", call(unix.SYS_MOUNT, text("none"), text("/"), text("tmpfs")), unix.SIGSYS},
	{"pivot_root", call(unix.SYS_PIVOT_ROOT, text("/"), text("/")), unix.SIGSYS},
	{"chroot", call(unix.SYS_CHROOT, text("/")), unix.SIGSYS},
	{"unshare", call(unix.SYS_UNSHARE, unix.CLONE_NEWUSER), unix.SIGSYS},
	{"setns", call(unix.SYS_SETNS, overlayFD), unix.SIGSYS},
	{"bpf", call(unix.SYS_BPF), unix.SIGSYS},
	{"keyctl", call(unix.SYS_KEYCTL), unix.SIGSYS},
	{"add_key", call(unix.SYS_ADD_KEY), unix.SIGSYS},
	{"perf_event_open", call(unix.SYS_PERF_EVENT_OPEN), unix.SIGSYS},
	{"kexec_load", call(unix.SYS_KEXEC_LOAD), unix.SIGSYS},
	{"init_module", call(unix.SYS_INIT_MODULE), unix.SIGSYS},
	{"setuid", call(unix.SYS_SETUID), unix.SIGSYS},
	{"fork", call(unix.SYS_CLONE, uintptr(unix.SIGCHLD)), unix.SIGSYS},
	{"new namespace", call(unix.SYS_CLONE, uintptr(unix.SIGCHLD)|unix.CLONE_NEWUSER), unix.SIGSYS},
	{"execveat", call(unix.SYS_EXECVEAT, overlayFD, text(""), 0, 0, unix.AT_EMPTY_PATH), unix.SIGSYS},
	{"execve", call(unix.SYS_EXECVE, text("/bin/sh"), 0, 0), unix.ENOSYS},
	{"clone3", call(unix.SYS_CLONE3), unix.ENOSYS},
	{"io_uring", call(unix.SYS_IO_URING_SETUP, 1), unix.ENOSYS},
	{"userfaultfd", call(unix.SYS_USERFAULTFD, 1), unix.ENOSYS},
	{"memfd_create", call(unix.SYS_MEMFD_CREATE, text("x")), unix.ENOSYS},
	{"the x32 interface", call(0x40000000 | unix.SYS_GETPID), unix.ENOSYS},
	{"a future call", call(1000), unix.ENOSYS},
	{"netlink", call(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW), unix.EPERM},
	{"packets", call(unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW), unix.EPERM},
	{"vsock", call(unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM), unix.EPERM},
	{"kernel's ciphers", call(unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET), unix.EPERM},
	{"kill all", call(unix.SYS_KILL, ^uintptr(0), uintptr(unix.SIGTERM)), unix.EPERM},
	{"kill another", func(target string) error {
		pid, err := strconv.Atoi(filepath.Base(target))
		if err != nil {
			return err
		}
		return unix.Tgkill(pid, pid, unix.SIGKILL)
	}, unix.EPERM},
	{"an ioctl with the number of read", call(unix.SYS_IOCTL, overlayFD, unix.SYS_READ), unix.ENOTTY},
	{"terminal input", call(unix.SYS_IOCTL, 0, unix.TIOCSTI), unix.ENOTTY},
	{"raise limits", func(string) error {
		return unix.Prlimit(0, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}, nil)
	}, unix.EPERM},
	{"be dumped", call(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 1), unix.EPERM},
	{"the host's files", path("/etc/shadow", unix.O_RDONLY), unix.ENOENT},
	{"another machine's files", opening("/secret", unix.O_RDONLY), unix.ENOENT},
	{"another process", func(target string) error { return path("/proc/"+filepath.Base(target)+"/mem", unix.O_RDONLY)("") }, unix.ENOENT},
	{"write to a program", path("/usr/bin/qemu-system-x86_64", unix.O_WRONLY), unix.EACCES},
	{"make a file", path("/dev/made", unix.O_CREAT|unix.O_WRONLY), unix.EROFS},
	{"another machine's tap", path("/dev/net/tun", unix.O_RDWR), unix.ENOENT},
	{"a huge file", func(string) error {
		_, err := unix.Pwrite(overlayFD, []byte("x"), 1<<40)
		return err
	}, unix.EFBIG}, // the error if the program ignores SIGXFSZ
	{"a huge hole", func(string) error { return unix.Ftruncate(overlayFD, 1<<40) }, unix.EFBIG},
	{"core dump", func(string) error {
		var limit unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
			return err
		}
		filter, err := os.ReadFile("/proc/self/coredump_filter")
		return errors.Join(fmt.Errorf("at most %d of %d bytes, and of memory %s", limit.Cur, limit.Max, strings.TrimSpace(string(filter))), err)
	}, errors.New("at most 1 of 1 bytes, and of memory 00000000")},
	{"many descriptors", func(string) error {
		for {
			if _, err := unix.Dup(overlayFD); err != nil {
				return err
			}
		}
	}, unix.EMFILE},
	{"many threads", func(string) error {
		for range 1000 {
			go func() {
				runtime.LockOSThread()
				select {}
			}()
		}
		select {}
	}, "threads"},
	{"nothing", func(string) error { return nil }, nil},
}

// TestHostileQEMU checks that a program in QEMU's place can do nothing that QEMU does not
// need.
func TestHostileQEMU(t *testing.T) {
	d := subject.Open(t).(*Driver)
	s := vmmtest.NewSpec(t, d)
	d.standIn = attacker
	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(other, "secret"), []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	// The jail, and not the mode of the test's folders, must protect the files.
	for dir := other; dir != "/" && dir != "."; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err != nil || info.Mode()&0o001 == 0 {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, a := range attacks {
		t.Run(strings.ReplaceAll(a.name, " ", "-"), func(t *testing.T) {
			target := other
			if strings.Contains(a.name, "another process") || a.name == "kill another" {
				target = strconv.Itoa(os.Getpid())
			}
			status, said := d.attack(t, s.Overlay, a.name, target)
			switch want := a.want.(type) {
			case unix.Signal:
				if !status.Signaled() || status.Signal() != want {
					t.Errorf("the fake ended with %#x, not by %v: %s", status, want, said)
				}
			case string: // one of the Go runtime's messages
				if !strings.Contains(said, "failed to create new OS thread") && !strings.Contains(said, "pthread_create failed") {
					t.Errorf("the fake ended with %#x and printed %q, not %q", status, said, want)
				}
			default:
				if status != 0 || said != fmt.Sprintf("answer: %v\n", want) {
					t.Errorf("the fake ended with %#x and printed %q, not %v", status, said, want)
				}
			}
		})
	}
}

// TestWithoutSeccomp checks that the same call succeeds without the filter.
func TestWithoutSeccomp(t *testing.T) {
	s := vmmtest.NewSpec(t, subject.Open(t)) // skips where virtual machines cannot run
	d, err := Open(vmmtest.Accelerator(), vmm.Config{Dir: t.TempDir(), Unfiltered: true, Log: vmmtest.Log(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	d.standIn = attacker
	if status, said := d.attack(t, s.Overlay, "ptrace", ""); status != 0 || said != "answer: <nil>\n" {
		t.Errorf("the fake ended with %#x and printed %q", status, said)
	}
}

// attack runs an attack of the fake QEMU in a jail.
func (d *Driver) attack(t *testing.T, overlay, name, target string) (syscall.WaitStatus, string) {
	t.Helper()
	file, err := os.OpenFile(overlay, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	stderr, err := memfd("stderr")
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	s := vmm.Spec{ID: uuid.New(), VCPUs: 1, MemoryMiB: 256, DiskBytes: 1 << 30, UID: hostileUID}
	group, err := cgroup.Create(s.ID.String(), d.limits(s))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := group.Destroy(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	cmd, err := d.exec(s, group, []string{name, target}, nil, []*os.File{file}, stderr)
	if err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if _, err := stderr.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(io.LimitReader(stderr, 500))
	if err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return cmd.ProcessState.Sys().(syscall.WaitStatus), string(said)
}

// takenOver plays a QEMU that its guest has taken over. The last argument is its role.
func takenOver(args []string) error {
	var fd uintptr
	for _, a := range args {
		_, _ = fmt.Sscanf(a, "socket,id=control,fd=%d,", &fd)
	}
	l, err := net.FileListener(os.NewFile(fd, "control"))
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go speak(c.(*net.UnixConn), args[len(args)-1])
	}
}

// speak talks to the driver until the driver disconnects.
func speak(c *net.UnixConn, as string) {
	defer c.Close()
	switch as {
	case silent:
		_, _ = io.Copy(io.Discard, c)
		return
	case garbage:
		fmt.Fprintln(c, "garbage")
		return
	}
	fmt.Fprintln(c, `{"QMP":{}}`)
	var devices *os.File // the file that the driver passed last
	text, rights := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4))
	for {
		n, r, _, _, err := c.ReadMsgUnix(text, rights)
		if err != nil {
			return
		}
		var command struct {
			Execute string
			ID      int
		}
		if json.Unmarshal(text[:n], &command) != nil {
			return
		}
		if messages, err := unix.ParseSocketControlMessage(rights[:r]); err == nil && len(messages) == 1 {
			if fds, err := unix.ParseUnixRights(&messages[0]); err == nil {
				devices = os.NewFile(uintptr(fds[0]), "passed")
			}
		}
		answer := `{"status":"paused","fdset-id":0,"fd":0}`
		switch {
		case as == endless:
			for x := strings.Repeat("x", len(text)); err == nil; {
				_, err = io.WriteString(c, x)
			}
			return
		case as == forbidden && command.Execute == "ringbuf-read":
			_ = call(unix.SYS_PTRACE)("")
		case as == forbidden:
			answer = `{"status":"running"}`
		case command.Execute == "ringbuf-read":
			answer = `"` + strings.Repeat("x", 3<<20) + `"`
		case command.Execute == "xen-save-devices-state" && devices != nil:
			for i := range int64(maxDevices>>20 + 2) {
				_, _ = devices.WriteAt(make([]byte, 1<<20), i<<20)
			}
		case command.Execute == "query-block":
			answer = `[{"qdev":"x","inserted":{"node-name":"overlay--1","image":{"virtual-size":-1}}}]`
		case command.Execute == "query-fdsets":
			answer = `[{"fdset-id":-1,"fds":[{"fd":-1}]}]`
		}
		for i := range 200 { // events, and responses to requests that nobody made
			fmt.Fprintf(c, `{"event":"BLOCK_IO_ERROR"}`+"\n"+`{"return":{},"id":%d}`+"\n", command.ID+1+i)
		}
		fmt.Fprintf(c, `{"return":%s,"id":%d}`+"\n", answer, command.ID)
	}
}

// TestForbiddenCallIsReported checks that a machine's error says that QEMU made a forbidden
// call. On kernels that support it, an agent that attached to the machine must say so too.
func TestForbiddenCallIsReported(t *testing.T) {
	d := subject.Open(t).(*Driver)
	s := vmmtest.NewSpec(t, d)
	d.standIn = forbidden
	s.UID = hostileUID
	vm, err := d.Start(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := vm.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	attached, err := d.Attach(t.Context(), vm.State())
	if err != nil {
		t.Fatal(err)
	}
	if text, err := attached.Console(t.Context()); err == nil && len(text) > 0 {
		t.Errorf("the fake has a console: %q", text)
	}
	<-vm.Done()
	<-attached.Done()
	if err := vm.Err(); !errors.Is(err, errForbidden) {
		t.Errorf("the machine ended because %v", err)
	}
	if err := attached.Err(); !errors.Is(err, errForbidden) && kernelTellsStatus(t) {
		t.Errorf("the attached machine ended because %v", err)
	}
}

// kernelTellsStatus reports whether a pidfd yields an ended process's status, which needs
// Linux 6.15.
func kernelTellsStatus(t *testing.T) bool {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 15
}
