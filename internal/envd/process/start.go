package process

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/envd/cgroup"
	"github.com/wrenn-dev/wrenn/internal/envd/fault"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// defaultPath is the PATH of processes, unless the sandbox's or the request's environment
// has another.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games:/usr/local/games"

// start starts a process as who. It returns the process and a subscriber that gets all of
// its output.
func (s *Service) start(who *account.Account, req *pb.StartRequest, timeout time.Duration) (*process, *subscriber, error) {
	config := req.GetProcess()
	if config.GetCmd() == "" {
		return nil, nil, invalid("a command is needed")
	}
	defaults := s.cfg.Defaults()
	env, err := environment(who, defaults.Envs, config.GetEnvs(), req.Pty != nil)
	if err != nil {
		return nil, nil, err
	}
	for _, a := range append([]string{config.GetCmd()}, config.GetArgs()...) {
		if strings.ContainsRune(a, 0) {
			return nil, nil, invalid("the command has a NUL byte")
		}
	}
	var dir, path string
	if err := who.Do(func() error {
		if dir, err = workdir(who, config.GetCwd(), defaults.Workdir); err != nil {
			return err
		}
		if path, err = find(config.GetCmd(), dir, env["PATH"]); err != nil {
			return unfit(config.GetCmd(), err)
		}
		return nil
	}); err != nil {
		return nil, nil, err
	}

	p := &process{
		svc: s, config: config, tag: req.Tag, started: time.Now(),
		inputLock: make(chan struct{}, 1),
		subs:      map[*subscriber]struct{}{},
		reaped:    make(chan struct{}), ended: make(chan struct{}),
	}
	files, outputs, err := p.open(req)
	if err != nil {
		return nil, nil, err
	}
	started := false
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
		if started {
			return
		}
		for _, o := range outputs {
			_ = o.r.Close()
		}
		if p.stdin != nil {
			_ = p.stdin.Close()
		}
		if p.group != nil {
			p.group.Close()
		}
	}()
	if s.cfg.Tree != nil {
		if p.group, err = s.cfg.Tree.New(); err != nil {
			return nil, nil, err
		}
	}

	sys := &syscall.SysProcAttr{Setsid: true}
	if p.tty != nil {
		sys.Setctty, sys.Ctty = true, 0
	}
	if uint32(os.Geteuid()) != who.UID || os.Geteuid() == 0 {
		sys.Credential = &syscall.Credential{Uid: who.UID, Gid: who.GID, Groups: who.Groups}
	}
	argv := append([]string{config.GetCmd()}, config.GetArgs()...)
	attr := &os.ProcAttr{Dir: dir, Env: list(env), Files: files, Sys: sys}

	// Counted before the launch, so that Close waits for it.
	if !s.enter() {
		return nil, nil, connect.NewError(connect.CodeUnavailable, errors.New("the daemon is stopping"))
	}
	pidfd := -1
	sys.PidFD = &pidfd
	p.os, err = launch(path, argv, attr, p.group)
	if err != nil && p.group != nil && p.group.Gone() {
		// Root in the guest has removed the prepared group.
		p.group.Close()
		if p.group, err = s.cfg.Tree.New(); err == nil {
			p.os, err = launch(path, argv, attr, p.group)
		}
	}
	if err != nil {
		s.wg.Done()
		if errors.Is(err, unix.ENOENT) && who.Do(func() error { return executable(path) }) == nil {
			// The file's interpreter or loader is missing.
			return nil, nil, refusal(connect.CodeNotFound, hostwire.CommandNotFound, config.GetCmd(), "cannot execute: required file not found")
		}
		return nil, nil, unfit(config.GetCmd(), err)
	}
	started = true
	if pidfd >= 0 && setNonblock(pidfd) == nil {
		p.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
	}
	p.pid = uint32(p.os.Pid)
	resetOOM(p.os.Pid)
	sub := newSubscriber()
	p.subs[sub] = struct{}{}
	s.add(p)
	go p.run(timeout, outputs)
	return p, sub, nil
}

// launch starts a process in group, from its first instruction if the kernel supports that.
func launch(path string, argv []string, attr *os.ProcAttr, group *cgroup.Group) (*os.Process, error) {
	if group == nil {
		return os.StartProcess(path, argv, attr)
	}
	attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, group.FD()
	proc, err := os.StartProcess(path, argv, attr)
	if err == nil || !(errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)) {
		return proc, err
	}
	attr.Sys.UseCgroupFD = false
	if proc, err = os.StartProcess(path, argv, attr); err != nil {
		return nil, err
	}
	// Best effort, because the process may have ended.
	_ = group.Add(proc.Pid)
	return proc, nil
}

// errNotFound means that no folder in PATH has the command.
var errNotFound = errors.New("command not found")

// unfit returns the error for a command that cannot be started. If the command itself is
// the reason, it has the text of a shell.
func unfit(cmd string, err error) error {
	if errors.Is(err, errNotFound) {
		return refusal(connect.CodeNotFound, hostwire.CommandNotFound, cmd, errNotFound.Error())
	}
	var errno unix.Errno
	errors.As(err, &errno) // stays 0 if err has none
	switch errno {
	case unix.ENOENT:
		return refusal(connect.CodeNotFound, hostwire.CommandNotFound, cmd, "No such file or directory")
	case unix.ENOEXEC:
		return refusal(connect.CodeInvalidArgument, hostwire.CommandNotExecutable, cmd, "cannot execute binary file: Exec format error")
	case unix.EACCES, unix.EISDIR, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG, unix.E2BIG, unix.ETXTBSY, unix.ELIBBAD:
		why := errno.Error()
		code := fault.Code(errno)
		if errno == unix.EISDIR {
			code = connect.CodePermissionDenied
		}
		return refusal(code, hostwire.CommandNotExecutable, cmd, strings.ToUpper(why[:1])+why[1:])
	default: // the command itself is not the reason
	}
	return fmt.Errorf("start %s: %w", cmd, err)
}

func refusal(code connect.Code, reason, cmd, why string) error {
	err := connect.NewError(code, fmt.Errorf("%s: %s", cmd, why))
	err.Meta().Set(hostwire.ErrorReason, reason)
	return err
}

// open opens the process's standard files, and the daemon's ends of them.
func (p *process) open(req *pb.StartRequest) (files []*os.File, outputs []output, err error) {
	if req.Pty != nil {
		size, err := winsize(req.Pty)
		if err != nil {
			return nil, nil, err
		}
		master, slave, err := pty.Open()
		if err != nil {
			return nil, nil, fmt.Errorf("open terminal: %w", err)
		}
		if err := pty.Setsize(slave, size); err != nil {
			_, _ = master.Close(), slave.Close()
			return nil, nil, fmt.Errorf("set terminal's size: %w", err)
		}
		p.tty = master
		return []*os.File{slave, slave, slave}, []output{{master, func(b []byte) *pb.ProcessEvent_DataEvent {
			return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Pty{Pty: b}}
		}}}, nil
	}

	var opened []*os.File
	defer func() {
		if err != nil {
			for _, f := range opened {
				_ = f.Close()
			}
		}
	}()
	// os.Pipe would make the process's end nonblocking, too.
	pipe := func(own int) (r, w *os.File, err error) {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			return nil, nil, fmt.Errorf("create pipe: %w", err)
		}
		if err := setNonblock(fds[own]); err != nil {
			_, _ = unix.Close(fds[0]), unix.Close(fds[1])
			return nil, nil, fmt.Errorf("create pipe: %w", err)
		}
		r, w = os.NewFile(uintptr(fds[0]), "|0"), os.NewFile(uintptr(fds[1]), "|1")
		opened = append(opened, r, w)
		return r, w, nil
	}
	const reader, writer = 0, 1
	var in *os.File
	if req.Stdin == nil || *req.Stdin {
		var w *os.File
		if in, w, err = pipe(writer); err != nil {
			return nil, nil, err
		}
		p.stdin = w
	} else {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, nil, fmt.Errorf("open %s: %w", os.DevNull, err)
		}
		in = os.NewFile(uintptr(fd), os.DevNull)
		opened = append(opened, in)
	}
	outR, outW, err := pipe(reader)
	if err != nil {
		return nil, nil, err
	}
	errR, errW, err := pipe(reader)
	if err != nil {
		return nil, nil, err
	}
	return []*os.File{in, outW, errW}, []output{
		{outR, func(b []byte) *pb.ProcessEvent_DataEvent {
			return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stdout{Stdout: b}}
		}},
		{errR, func(b []byte) *pb.ProcessEvent_DataEvent {
			return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stderr{Stderr: b}}
		}},
	}, nil
}

// setNonblock lets the runtime poll a descriptor that has no other flags.
func setNonblock(fd int) error {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_NONBLOCK)
	return err
}

// environment merges the variables of the user, the sandbox and the request. Later ones
// win.
func environment(who *account.Account, sandbox, request map[string]string, terminal bool) (map[string]string, error) {
	env := map[string]string{
		"PATH": defaultPath, "HOME": who.Home, "USER": who.Name, "LOGNAME": who.Name, "LANG": "C.UTF-8",
	}
	if who.Shell != "" {
		env["SHELL"] = who.Shell
	}
	if terminal {
		env["TERM"] = "xterm-256color"
	}
	maps.Copy(env, sandbox)
	maps.Copy(env, request)
	for k, v := range env {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) {
			return nil, invalid("environment variable %q cannot be set", k)
		}
	}
	return env, nil
}

func list(env map[string]string) []string {
	var l []string
	for _, k := range slices.Sorted(maps.Keys(env)) {
		l = append(l, k+"="+env[k])
	}
	return l
}

// workdir returns the working directory of the process: the request's, otherwise the
// sandbox's, otherwise the user's home, otherwise (if there is none) the root.
func workdir(who *account.Account, request, sandbox string) (string, error) {
	asked := request
	if asked == "" {
		asked = sandbox
	}
	dir, err := who.Resolve(asked)
	if err != nil {
		return "", fmt.Errorf("working directory: %w", err)
	}
	err = who.Do(func() error {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return &fs.PathError{Op: "chdir", Path: dir, Err: unix.ENOTDIR}
		}
		return unix.Faccessat(unix.AT_FDCWD, dir, unix.X_OK, unix.AT_EACCESS)
	})
	switch {
	case err == nil:
		return dir, nil
	case asked == "":
		return "/", nil
	case errors.Is(err, fs.ErrNotExist):
		return "", invalid("working directory %s does not exist", dir)
	case errors.Is(err, unix.ENOTDIR):
		return "", invalid("working directory %s is not a directory", dir)
	}
	return "", fmt.Errorf("working directory %s: %w", dir, err)
}

// find looks up a command as execvp does, with the rights of the calling thread. A command
// with a slash is a path relative to dir.
func find(cmd, dir, path string) (string, error) {
	if strings.Contains(cmd, "/") {
		if !filepath.IsAbs(cmd) {
			cmd = filepath.Join(dir, cmd)
		}
		if err := executable(cmd); err != nil {
			return "", &fs.PathError{Op: "exec", Path: cmd, Err: err}
		}
		return cmd, nil
	}
	var denied error
	for _, d := range filepath.SplitList(path) {
		if !filepath.IsAbs(d) {
			d = filepath.Join(dir, d) // "" is the working directory too
		}
		file := filepath.Join(d, cmd)
		err := executable(file)
		if err == nil {
			return file, nil
		}
		if errors.Is(err, fs.ErrPermission) && denied == nil {
			denied = &fs.PathError{Op: "exec", Path: file, Err: err}
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", errNotFound
}

func executable(file string) error {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.EISDIR
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.EACCES
	}
	return unix.Faccessat(unix.AT_FDCWD, file, unix.X_OK, unix.AT_EACCESS)
}
