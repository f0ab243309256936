package launcher

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// asking returns a filter that makes the kernel ask the launcher about a system call.
func asking(call uint32) []unix.SockFilter {
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // load the call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 0, Jf: 1, K: call},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
}

func newLauncher(t *testing.T, filters ...[]unix.SockFilter) *Launcher {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: installs filters")
	}
	l, err := New(filters)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// run launches a shell with a script and returns its output.
func (l *Launcher) run(limits Limits, script string, files ...*os.File) (string, error) {
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.ExtraFiles = files
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	l.Wrap(cmd, limits)
	err := cmd.Run()
	return strings.TrimSpace(out.String()), err
}

var testLimits = Limits{Files: 64, Tasks: 4096}

// TestPrivateProgram checks that a launcher that only root may execute can launch
// programs of other users.
func TestPrivateProgram(t *testing.T) {
	l := newLauncher(t)
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	l.self.Close()
	if l.self, err = Sealed("wrenn", b, unix.MFD_EXEC); err != nil {
		t.Fatal(err)
	}
	if out, err := l.run(testLimits, "echo begun"); err != nil || out != "begun" {
		t.Errorf("%q, %v", out, err)
	}
}

func TestExecutesOnce(t *testing.T) {
	const script = "echo begun; exec /bin/true"
	if out, err := newLauncher(t).run(testLimits, script); err != nil || out != "begun" {
		t.Errorf("without filters: %q, %v", out, err)
	}
	out, err := newLauncher(t, asking(unix.SYS_EXECVE)).run(testLimits, script)
	if !strings.Contains(out, "begun") || err == nil {
		t.Errorf("under a filter, the shell must start and its exec must fail: %q, %v", out, err)
	}
}

// TestAnotherListener checks that the program starts even if it inherits a filter that
// already has a listener.
func TestAnotherListener(t *testing.T) {
	l := newLauncher(t, asking(unix.SYS_EXECVE))
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with its filter
		fd, err := install(asking(unix.SYS_ACCT))
		if err != nil {
			done <- err
			return
		}
		defer unix.Close(fd)
		out, err := l.run(testLimits, "echo begun; exec /bin/true")
		if out != "begun" {
			err = errors.Join(fmt.Errorf("the program printed %q", out), err)
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestLimits checks that the program gets the limits and its files, and none of the
// launcher's files.
func TestLimits(t *testing.T) {
	l := newLauncher(t, asking(unix.SYS_ACCT))
	own, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	out, err := l.run(Limits{FileBytes: 4096, Files: 64, Tasks: 4096},
		`read line </proc/self/coredump_filter; echo $(ulimit -c) $(ulimit -n) $(ulimit -Hn) $line; ls -l /proc/$$/fd; echo $PATH >&3`, own)
	// The shell prints the limit of core dumps in blocks, so one byte becomes 0.
	rest, ok := strings.CutPrefix(out, "0 64 64 00000000\n")
	if err != nil || !ok || strings.Contains(rest, "memfd:") || strings.Contains(rest, filepath.Base(os.Args[0])) || !strings.Contains(rest, own.Name()) {
		t.Errorf("the program printed %q, %v", out, err)
	}
	if text, err := os.ReadFile(own.Name()); err != nil || strings.TrimSpace(string(text)) != os.Getenv("PATH") {
		t.Errorf("the program wrote %q, %v", text, err)
	}

	big := filepath.Join(t.TempDir(), "big")
	if out, err := l.run(Limits{FileBytes: 4096, Files: 64, Tasks: 4096}, `while :; do echo 0123456789abcdef || exit 1; done >`+big); err == nil {
		t.Errorf("the program exceeded the limit: %q", out)
	}
	if info, err := os.Stat(big); err != nil || info.Size() > 4096 {
		t.Errorf("the file is %v, %v", info, err)
	}
}

// TestSetFileBytes checks that the agent can raise and lower the limit of a program that runs.
func TestSetFileBytes(t *testing.T) {
	l := newLauncher(t)
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command("/bin/sh", "-c", "read line")
	cmd.Stdin = in
	l.Wrap(cmd, Limits{FileBytes: 4096, Files: 64, Tasks: 4096})
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	defer func() { out.Close(); _ = cmd.Wait() }()
	for _, bytes := range []int64{1 << 40, 8192} {
		if err := SetFileBytes(cmd.Process.Pid, bytes); err != nil {
			t.Fatal(err)
		}
		var limit unix.Rlimit
		if err := unix.Prlimit(cmd.Process.Pid, unix.RLIMIT_FSIZE, nil, &limit); err != nil {
			t.Fatal(err)
		}
		if limit.Cur != uint64(bytes) {
			t.Errorf("the limit is %d, not %d", limit.Cur, bytes)
		}
	}
	if err := SetFileBytes(1<<30, 1); err == nil {
		t.Error("set the limit of a process that does not exist")
	}
}

func TestChildRefuses(t *testing.T) {
	for _, args := range [][]string{
		{childName},
		{childName, "-1", "-1", "0", "0", "0", "/bin/true"},
		{childName, "x", "-1", "0", "0", "0", "/bin/true", "true"},
		{childName, "-1", "1073741824", "0", "0", "0", "/bin/true", "true"},
	} {
		if err := child(args); err == nil {
			t.Errorf("%q was accepted", args)
		}
	}
}
