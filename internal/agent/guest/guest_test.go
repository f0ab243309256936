package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"connectrpc.com/connect"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// binDir is the folder of the guest daemon's program. Each test runs the daemon at its own
// loopback address.
var binDir string

var daemon = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(binDir, "envd")
	out, err := exec.Command("go", "build", "-o", bin, "github.com/wrenn-dev/wrenn/cmd/envd").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build envd: %w: %s", err, out)
	}
	return bin, nil
})

// roleEnv is set in the process that runs the tests, in namespaces of its own.
const roleEnv = "WRENN_GUEST_TEST_ROLE"

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 && os.Getenv(roleEnv) == "" {
		os.Exit(outside())
	}
	if os.Getenv(roleEnv) == "inside" {
		if err := prepareHost(); err != nil {
			fmt.Fprintln(os.Stderr, "prepare the test's host:", err)
			os.Exit(1)
		}
	}
	var err error
	if binDir, err = os.MkdirTemp("", "wrenn-envd-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(binDir)
	os.Exit(code)
}

// outside starts the tests in network and mount namespaces of their own.
func outside() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), roleEnv+"=inside")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig applies to the thread
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		if cmd.ProcessState == nil {
			fmt.Fprintln(os.Stderr, err)
		}
		return 1
	}
	return 0
}

func prepareHost() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

var lastAddr atomic.Uint32

// start starts a guest daemon with flags and returns a client that has initialised it.
func start(t *testing.T, flags ...string) *Client {
	t.Helper()
	bin, err := daemon()
	if err != nil {
		t.Fatal(err)
	}
	pid := os.Getpid()
	addr := netip.AddrFrom4([4]byte{127, byte(100 + pid>>8&63), byte(pid), byte(lastAddr.Add(1))})
	flags = append([]string{"-listen", netip.AddrPortFrom(addr, hostwire.GuestPort).String(), "-cgroup", "", "-interface", "", "-user", "root"}, flags...)
	cmd := exec.Command(bin, flags...)
	cmd.Stderr = t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	c := New(addr, "the-token")
	t.Cleanup(c.Close)
	ctx := await.Context(t)
	if err := c.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Init(ctx, Settings{Envs: map[string]string{"FROM": "sandbox"}}); err != nil {
		t.Fatal(err)
	}
	return c
}

func sh(script string) Command { return Command{Cmd: "/bin/sh", Args: []string{"-c", script}} }

func TestExec(t *testing.T) {
	c := start(t)
	binary := make([]byte, 3<<20)
	for i := range binary {
		binary[i] = byte(i * i >> 3)
	}
	for name, test := range map[string]struct {
		cmd       Command
		stdin     []byte
		want      Result
		wantError connect.Code
		// wantReason is the reason in the error.
		wantReason string
	}{
		"output and code": {cmd: sh("echo out; echo err >&2; exit 7"), want: Result{Exit: Exit{Code: 7}, Stdout: []byte("out\n"), Stderr: []byte("err\n")}},
		"binary":          {cmd: Command{Cmd: "cat"}, stdin: binary, want: Result{Stdout: binary}},
		"no input":        {cmd: Command{Cmd: "cat"}},
		"environment":     {cmd: Command{Cmd: "sh", Args: []string{"-c", "echo $FROM $OWN; pwd"}, Envs: map[string]string{"OWN": "mine"}, Dir: "/usr"}, want: Result{Stdout: []byte("sandbox mine\n/usr\n")}},
		"signal":          {cmd: sh("kill -9 $$"), want: Result{Exit: Exit{Code: 137, Error: "signal: killed"}}},
		// real time: the daemon finds the input closed while the command runs.
		"input not read":    {cmd: sh("exec <&-; sleep 0.3; echo done"), stdin: binary, want: Result{Stdout: []byte("done\n")}},
		"input partly read": {cmd: sh("head -c 1 >/dev/null; exit 3"), stdin: binary, want: Result{Exit: Exit{Code: 3}}},
		"no such command":   {cmd: Command{Cmd: "no-such-command"}, wantError: connect.CodeNotFound, wantReason: hostwire.CommandNotFound},
		"no program":        {cmd: Command{Cmd: "/etc"}, wantError: connect.CodePermissionDenied, wantReason: hostwire.CommandNotExecutable},
		"no such user":      {cmd: Command{Cmd: "true", User: "nobody-here"}, wantError: connect.CodeInvalidArgument},
		"no such folder":    {cmd: Command{Cmd: "true", Dir: "/no/such"}, wantError: connect.CodeInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := c.Exec(t.Context(), test.cmd, test.stdin)
			if test.wantError != 0 {
				var ce *connect.Error
				if !errors.As(err, &ce) || ce.Code() != test.wantError || ce.Meta().Get(SourceHeader) != SourceGuest || ce.Meta().Get(hostwire.ErrorReason) != test.wantReason {
					t.Fatalf("error %v, want %v from the guest", err, test.wantError)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.Exit != test.want.Exit || !bytes.Equal(got.Stdout, test.want.Stdout) || !bytes.Equal(got.Stderr, test.want.Stderr) || got.Truncated {
				t.Errorf("got %v %.100q %.100q", got.Exit, got.Stdout, got.Stderr)
			}
		})
	}
}

// TestExecReusesConnection checks that commands reuse a connection, because a new one costs
// the guest more than the request.
func TestExecReusesConnection(t *testing.T) {
	c := start(t)
	var dials atomic.Int32
	dial := c.transport.Dial
	c.transport.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
		dials.Add(1)
		return dial(ctx, addr)
	}
	for range 5 {
		if r, err := c.Exec(await.Context(t), sh("echo out; exit 3"), nil); err != nil || r.Code != 3 || string(r.Stdout) != "out\n" {
			t.Fatalf("%v, %+v", err, r)
		}
		p, err := c.Start(await.Context(t), sh("exit 4"), nil, false)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := p.Next(); err != nil || out.Exit == nil || out.Exit.Code != 4 || p.PID == 0 {
			t.Fatalf("%v, %+v, pid %d", err, out, p.PID)
		}
		p.Close()
	}
	if n := dials.Load(); n > 1 {
		t.Errorf("10 commands made %d connections", n)
	}
}

func TestExecTruncates(t *testing.T) {
	c := start(t)
	got, err := c.Exec(t.Context(), sh("head -c 20000000 /dev/zero; echo end >&2"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Stdout) != MaxOutput || !got.Truncated || string(got.Stderr) != "end\n" {
		t.Errorf("kept %d bytes, truncated %v, stderr %q", len(got.Stdout), got.Truncated, got.Stderr)
	}
}

// pidIn waits until a process has started and written its pid to file.
func pidIn(t *testing.T, file string) (pid int) {
	t.Helper()
	await.Until(t, "the process starts", func() bool {
		b, err := os.ReadFile(file)
		if err != nil || !strings.HasSuffix(string(b), "\n") {
			return false
		}
		if pid, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			t.Fatal(err)
		}
		return true
	})
	return pid
}

// gone waits until a process has ended or is a zombie.
func gone(t *testing.T, pid int) {
	t.Helper()
	await.Until(t, fmt.Sprintf("process %d ends", pid), func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
}

func TestExecTimeoutKillsDescendants(t *testing.T) {
	c := start(t)
	file := filepath.Join(t.TempDir(), "pid")
	cmd := sh("sleep 600 & echo $! > " + file + "; wait")
	for cmd.Timeout = time.Second; ; cmd.Timeout *= 2 { // until the command has time to start
		got, err := c.Exec(t.Context(), cmd, nil)
		if err != nil {
			t.Fatal(err)
		}
		if !got.TimedOut || got.Exit.Error == "" {
			t.Errorf("got %+v", got.Exit)
		}
		if _, err := os.Stat(file); err == nil {
			break
		}
	}
	gone(t, pidIn(t, file))
}

func TestCancelKillsDescendants(t *testing.T) {
	c := start(t)
	file := filepath.Join(t.TempDir(), "pid")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error)
	go func() {
		_, err := c.Exec(ctx, sh("sleep 600 & echo $! > "+file+"; wait"), nil)
		done <- err
	}()
	pid := pidIn(t, file)
	cancel()
	if err := <-done; connect.CodeOf(err) != connect.CodeCanceled {
		t.Error(err)
	}
	gone(t, pid)
}

func TestTerminal(t *testing.T) {
	c := start(t)
	p, err := c.Start(t.Context(), sh("stty size; read x; stty size; echo got $x; read y; kill -TERM $$"), &Terminal{Cols: 90, Rows: 30}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var seen strings.Builder
	await := func(text string) {
		t.Helper()
		for !strings.Contains(seen.String(), text) {
			out, err := p.Next()
			if err != nil || out.Exit != nil {
				t.Fatalf("%v %v after %q, want %q", out.Exit, err, seen.String(), text)
			}
			seen.Write(out.Terminal)
		}
	}
	await("30 90")
	if err := p.Resize(Terminal{Cols: 100, Rows: 40}); err != nil {
		t.Fatal(err)
	}
	if err := p.Write([]byte("hello\n")); err != nil {
		t.Fatal(err)
	}
	await("40 100")
	await("got hello")
	if err := p.Signal(15); err != nil {
		t.Fatal(err)
	}
	for {
		out, err := p.Next()
		if err != nil {
			t.Fatal(err)
		}
		if out.Exit != nil {
			if out.Exit.Error == "" {
				t.Errorf("exit %+v", out.Exit)
			}
			break
		}
	}
	if _, err := p.Next(); err != io.EOF {
		t.Errorf("after the exit: %v", err)
	}
	if err := p.Write([]byte("late")); err != nil {
		t.Errorf("input after the end: %v", err)
	}
}

func TestFiles(t *testing.T) {
	c := start(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "deep/er", "file")
	content := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	info, err := c.Write(t.Context(), "", path, iotest.HalfReader(bytes.NewReader(content)), -1)
	if err != nil || info != (FileInfo{path, "file", int64(len(content))}) {
		t.Fatal(info, err)
	}
	for _, r := range []struct{ offset, length int64 }{{0, 0}, {5, 0}, {5, 10}, {0, 1}, {1<<20 - 3, 100}, {1 << 20, 0}} {
		body, size, err := c.Read(t.Context(), "", path, r.offset, r.length)
		if err != nil {
			t.Fatal(r, err)
		}
		got, err := io.ReadAll(body)
		body.Close()
		want := content[r.offset:]
		if r.length > 0 {
			want = want[:min(int64(len(want)), r.length)]
		}
		wantSize := int64(len(content))
		if r.offset == 0 && r.length == 0 {
			wantSize = -1 // A large file may shrink while it is read.
		}
		if err != nil || !bytes.Equal(got, want) || size != wantSize {
			t.Errorf("%v: %d bytes of %d, %v", r, len(got), size, err)
		}
	}
	if _, _, err := c.Read(t.Context(), "", path, 1<<20+1, 0); connect.CodeOf(err) != connect.CodeOutOfRange {
		t.Errorf("beyond the end: %v", err)
	}
	if body, _, err := c.Read(t.Context(), "", "/proc/self/status", 6, 4); err != nil {
		t.Error(err)
	} else if got, err := io.ReadAll(body); err != nil || string(got) != "envd" {
		t.Errorf("part of a file in /proc is %q, %v", got, err)
	}
	if _, _, err := c.Read(t.Context(), "", dir, 0, 0); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a directory: %v", err)
	}
	if _, _, err := c.Read(t.Context(), "", filepath.Join(dir, "no"), 0, 0); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("a missing file: %v", err)
	}
	if _, err := c.Write(t.Context(), "", filepath.Join(dir, "broken"), iotest.ErrReader(errors.New("gone")), -1); err == nil {
		t.Error("a truncated upload succeeded")
	}
	if _, err := os.Stat(filepath.Join(dir, "broken")); err == nil {
		t.Error("a truncated upload left a file")
	}
	if info, err := c.Write(t.Context(), "", filepath.Join(dir, "empty"), strings.NewReader(""), 0); err != nil || info.Size != 0 {
		t.Error(info, err)
	}
	if body, size, err := c.Read(t.Context(), "", filepath.Join(dir, "empty"), 0, 10); err != nil {
		t.Error(err)
	} else if got, _ := io.ReadAll(body); len(got) != 0 || size != 0 {
		t.Errorf("an empty file has the content %q and the size %d", got, size)
	}

	// Download a tree and upload it again.
	archive, err := c.Pack(t.Context(), "", filepath.Join(dir, "deep"))
	if err != nil {
		t.Fatal(err)
	}
	packed, err := io.ReadAll(archive)
	if err != nil {
		t.Fatal(err)
	}
	first, err := tar.NewReader(bytes.NewReader(packed)).Next()
	if err != nil || first.Name != "deep/" {
		t.Fatal(first, err)
	}
	if err := c.Unpack(t.Context(), "", filepath.Join(dir, "copy"), "", bytes.NewReader(packed)); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "copy/deep/er/file"))
	if err != nil || sha256.Sum256(got) != sha256.Sum256(content) {
		t.Error("the copy differs", err)
	}
}

func TestMetricsAndTokens(t *testing.T) {
	c := start(t)
	m, err := c.Metrics(t.Context())
	if err != nil || m.CPUs < 1 || m.MemoryTotal <= m.MemoryUsed || m.DiskTotal < m.DiskUsed || m.DiskTotal == 0 {
		t.Error(m, err)
	}
	target, err := netip.ParseAddrPort(strings.TrimPrefix(c.base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	stranger := New(target.Addr(), "guess")
	defer stranger.Close()
	if _, err := stranger.Exec(t.Context(), sh("true"), nil); err == nil {
		t.Error("a stranger ran a command")
	}
	if _, err := stranger.Init(t.Context(), Settings{}); err == nil {
		t.Error("a stranger initialised the guest")
	}
}

func TestWaitReturnsCause(t *testing.T) {
	c := New(netip.MustParseAddr("127.99.99.99"), "x")
	defer c.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the machine ended")
	connect := c.transport.Dial
	c.transport.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := connect(ctx, address)
		cancel(reason) // after the first attempt
		return conn, err
	}
	if err := c.Wait(ctx); !errors.Is(err, reason) {
		t.Error(err)
	}
}
