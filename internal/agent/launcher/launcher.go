// Package launcher starts programs with limits that a process can only set for
// itself: resource limits and a seccomp filter. Go has no hook between fork and
// exec, so the child is this program again. Any program that imports the
// package can be that child: its init function recognizes it and never returns.
package launcher

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/thread"
)

// Limits are resource limits (setrlimit(2)) of a program. They only lower the limits of
// this process. Launched programs never dump core.
type Limits struct {
	// FileBytes is the size in bytes past which the program cannot write to any file
	// (EFBIG); 0 means no limit. It is a soft limit, which [SetFileBytes] can raise.
	FileBytes int64
	Files     uint64 // open descriptors
	Tasks     uint64 // processes and threads of the program's user
}

// Launcher makes commands start their programs under its seccomp filters. It is safe for
// concurrent use.
type Launcher struct {
	self   *os.File // this program, which has no path in a jail
	filter *os.File // the filters; nil: none
}

// New returns a launcher that starts programs under all of the seccomp filters.
func New(filters [][]unix.SockFilter) (_ *Launcher, err error) {
	l := &Launcher{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make launcher: %w", err), l.Close())
		}
	}()
	if l.self, err = openSelf(); err != nil {
		return nil, err
	}
	if len(filters) == 0 {
		return l, nil
	}
	var all []unix.SockFilter // an entry with its length before each
	for _, f := range filters {
		all = append(append(all, unix.SockFilter{K: uint32(len(f))}), f...)
	}
	l.filter, err = Sealed("filter", bytesOf(all), 0)
	return l, err
}

// bytesOf returns the bytes of f, which must not be empty.
func bytesOf(f []unix.SockFilter) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&f[0])), len(f)*int(unsafe.Sizeof(f[0])))
}

// openSelf opens this program, or a copy of it, so that any user can run it.
func openSelf() (*os.File, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	info, err := self.Stat()
	// Every user must be able to read it, too: otherwise the kernel denies the process
	// access to its /proc/self/coredump_filter.
	if err == nil && info.Mode()&0o005 == 0o005 {
		return self, nil
	}
	defer self.Close()
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	return Sealed("wrenn", b, unix.MFD_EXEC)
}

// Sealed returns an immutable file in memory that contains b. flags are further ones for
// memfd_create(2).
func Sealed(name string, b []byte, flags int) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|flags)
	if errors.Is(err, unix.EINVAL) { // kernels before 6.3 neither know nor need MFD_EXEC
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, err
	}
	w := os.NewFile(uintptr(fd), name)
	defer w.Close()
	if _, err := w.Write(b); err != nil {
		return nil, err
	}
	if err := w.Chmod(0o555); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, err
	}
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)) // a file open for writing cannot be executed
}

// Close closes the launcher. Programs that it launched keep running.
func (l *Launcher) Close() error {
	var errs []error
	for _, f := range []*os.File{l.self, l.filter} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// The child's arguments: its name, two descriptors (-1: none), the three limits,
// the path of the program, and the program's own arguments.
const (
	childName = "wrenn-launch"
	childArgs = 7
)

// Wrap makes cmd start its program with the limits and under the filters. cmd must run
// in a mount namespace with /proc. Call Wrap after setting cmd.ExtraFiles, to which it
// appends.
func (l *Launcher) Wrap(cmd *exec.Cmd, limits Limits) {
	add := func(f *os.File) int {
		if f == nil {
			return -1
		}
		cmd.ExtraFiles = append(cmd.ExtraFiles[:len(cmd.ExtraFiles):len(cmd.ExtraFiles)], f)
		return 2 + len(cmd.ExtraFiles)
	}
	self := add(l.self)
	args := []string{childName}
	for _, n := range []int64{int64(self), int64(add(l.filter)), limits.FileBytes, int64(limits.Files), int64(limits.Tasks)} {
		args = append(args, strconv.FormatInt(n, 10))
	}
	cmd.Args = append(append(args, cmd.Path), cmd.Args...)
	cmd.Path = fmt.Sprintf("/proc/self/fd/%d", self)
}

// SetFileBytes sets the FileBytes limit of a launched process. It acts as the process's
// user, who needs no CAP_SYS_RESOURCE.
func SetFileBytes(pid int, bytes int64) error {
	uid, gid, err := owner(pid)
	if err != nil {
		return fmt.Errorf("set the limit of files' size: %w", err)
	}
	err = thread.Own(func() error {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)); errno != 0 {
			return errno
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			return errno
		}
		var now unix.Rlimit
		if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, nil, &now); err != nil {
			return err
		}
		now.Cur = min(uint64(bytes), now.Max)
		return unix.Prlimit(pid, unix.RLIMIT_FSIZE, &now, nil)
	})
	if err != nil {
		return fmt.Errorf("set the limit of files' size: %w", err)
	}
	return nil
}

// owner returns the user and the group that a process runs as.
func owner(pid int) (uid, gid int, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	uid, gid = -1, -1
	for line := range strings.Lines(string(b)) {
		_, _ = fmt.Sscanf(line, "Uid:\t%d", &uid)
		_, _ = fmt.Sscanf(line, "Gid:\t%d", &gid)
	}
	if uid < 0 || gid < 0 {
		return 0, 0, fmt.Errorf("process %d has no owner", pid)
	}
	return uid, gid, nil
}

// init runs the child. The package imports little, so that this runs before most other
// init functions of the program.
func init() {
	if len(os.Args) == 0 || os.Args[0] != childName {
		return
	}
	err := child(os.Args)
	fmt.Fprintln(os.Stderr, "launch:", err)
	os.Exit(127)
}

// child executes the program. It returns only if that fails.
func child(args []string) error {
	if len(args) <= childArgs {
		return errors.New("too few arguments")
	}
	var n [5]int64
	for i := range n {
		var err error
		if n[i], err = strconv.ParseInt(args[1+i], 10, 64); err != nil {
			return err
		}
	}
	filters, err := readFilters(int(n[1]))
	if err != nil {
		return fmt.Errorf("read filters: %w", err)
	}
	for _, fd := range n[:2] {
		if fd >= 0 {
			unix.CloseOnExec(int(fd))
		}
	}
	if err := limit(Limits{FileBytes: n[2], Files: uint64(n[3]), Tasks: uint64(n[4])}); err != nil {
		return err
	}
	return become(args[childArgs-1], args[childArgs:], filters)
}

func readFilters(fd int) ([][]unix.SockFilter, error) {
	if fd < 0 {
		return nil, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	all := make([]unix.SockFilter, st.Size/int64(unsafe.Sizeof(unix.SockFilter{})))
	if len(all) == 0 {
		return nil, errors.New("the file is empty")
	}
	b := bytesOf(all)
	if n, err := unix.Pread(fd, b, 0); err != nil || n != len(b) {
		return nil, fmt.Errorf("%d bytes of %d: %w", n, len(b), err)
	}
	var filters [][]unix.SockFilter
	for len(all) > 0 {
		end := 1 + int(all[0].K)
		if end < 2 || end > len(all) {
			return nil, errors.New("the file is torn")
		}
		filters, all = append(filters, all[1:end]), all[end:]
	}
	return filters, nil
}

// limit lowers the limits of this process.
func limit(l Limits) error {
	set := func(name string, resource int, soft, hard uint64) error {
		var now unix.Rlimit
		if err := unix.Getrlimit(resource, &now); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		now.Max = min(now.Max, hard)
		now.Cur = min(soft, now.Max)
		if err := unix.Setrlimit(resource, &now); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
		return nil
	}
	errs := []error{
		// With 0, the kernel still pipes a core dump to a handler; with 1 it does not.
		set("RLIMIT_CORE", unix.RLIMIT_CORE, 1, 1),
		set("RLIMIT_NOFILE", unix.RLIMIT_NOFILE, l.Files, l.Files),
		set("RLIMIT_NPROC", unix.RLIMIT_NPROC, l.Tasks, l.Tasks),
	}
	if l.FileBytes > 0 {
		errs = append(errs, set("RLIMIT_FSIZE", unix.RLIMIT_FSIZE, uint64(l.FileBytes), unix.RLIM_INFINITY))
	}
	// No dump contains any memory. Unlike PR_SET_DUMPABLE, this survives execve.
	if err := os.WriteFile("/proc/self/coredump_filter", []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// become executes the program under the filters.
//
// The filters make the kernel ask for permission for every execve. A thread without the
// filters permits this one, which ends that thread. Later ones fail with ENOSYS, because
// nobody is left to ask.
func become(path string, args []string, filters [][]unix.SockFilter) error {
	listener, failed := make(chan int, 1), make(chan error, 1)
	ready := make(chan struct{})
	go func() {
		runtime.LockOSThread() // this thread exists before the filters, so they do not apply to it
		close(ready)
		failed <- answer(<-listener)
	}()
	<-ready
	env := os.Environ()
	runtime.LockOSThread()
	for _, f := range filters {
		fd, err := install(f)
		if err != nil {
			return fmt.Errorf("install filter: %w", err)
		}
		if fd >= 0 {
			listener <- fd
		}
	}
	// Not unix.Exec, which keeps the scheduler from running the other thread.
	err := execve(path, args, env)
	select {
	case why := <-failed:
		err = errors.Join(err, why)
	default:
	}
	return fmt.Errorf("execute %s: %w", path, err)
}

// execve is like unix.Exec, but other goroutines can run during it.
func execve(path string, args, env []string) error {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return err
	}
	argv, err := syscall.SlicePtrFromStrings(args)
	if err != nil {
		return err
	}
	envv, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])))
	return errno
}

// install puts the calling thread under a filter. It returns the descriptor on which the
// kernel asks for permission, or -1 if it will not ask.
func install(filter []unix.SockFilter) (int, error) {
	const ask, allow = unix.SECCOMP_RET_USER_NOTIF, unix.SECCOMP_RET_ALLOW
	load := func(flags uintptr) (int, error) {
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&program)))
		if errno != 0 {
			return -1, errno
		}
		return int(fd), nil
	}
	asks := func(f unix.SockFilter) bool { return f.Code == unix.BPF_RET|unix.BPF_K && f.K == ask }
	if slices.ContainsFunc(filter, asks) {
		fd, err := load(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
		if !errors.Is(err, unix.EBUSY) {
			return fd, err
		}
		// The kernel can ask only one listener, and another one, such as a container
		// runtime, listens to this process already. Do without.
		for i := range filter {
			if asks(filter[i]) {
				filter[i].K = allow
			}
		}
	}
	_, err := load(0)
	return -1, err
}

// The kernel's request for permission and the response (seccomp_unotify(2)).
type (
	question struct {
		id    uint64
		pid   uint32
		flags uint32
		call  int32
		arch  uint32
		ip    uint64
		args  [6]uint64
	}
	reply struct {
		id    uint64
		value int64
		errno int32
		flags uint32
	}
)

// answer receives one request for permission and grants it.
func answer(fd int) error {
	var q question
	ask := func(request uint, at unsafe.Pointer) error {
		for {
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(at))
			if errno == 0 {
				return nil
			}
			if errno != unix.EINTR {
				return errno
			}
		}
	}
	if err := ask(unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&q)); err != nil {
		return fmt.Errorf("receive request for execve: %w", err)
	}
	a := reply{id: q.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	if err := ask(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&a)); err != nil {
		return fmt.Errorf("permit execve: %w", err)
	}
	return nil
}

// Forbidden reports whether a launched program ended because it made a system call that
// its filters forbid.
func Forbidden(s syscall.WaitStatus) bool { return s.Signaled() && s.Signal() == unix.SIGSYS }
