// Package agenttest gives tests real host agents, with real virtual machines.
//
// The tests run in their own network and mount namespaces, which stand for a whole
// host, so that anything left in them is an agent's leftover. The test binary is the
// agent's program too, in a separate process that a test can kill. A test package's
// TestMain must call [Main].
//
// Most tests of a package use its [Shared] agent, at the same time. A test calls [New] if
// it has settings of its own, kills the agent, or counts what the host has. Only one agent
// runs at a time, because a leftover does not show which agent left it.
package agenttest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/caarlos0/env/v11"
	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent"
	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qemu"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/graceful"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// roleEnv names the variable that selects what a process of the test binary does.
const roleEnv = "WRENN_AGENT_TEST_ROLE"

// Main is the body of a package's TestMain. The package must have a test TestImages
// that calls [imagetest.Prepare]. Main runs it first, outside of the namespaces. Main
// does not return.
func Main(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "":
		os.Exit(outside(m))
	case "agent":
		if err := runAgent(); err != nil {
			fmt.Fprintln(os.Stderr, "agent:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case "inside":
		if err := prepareHost(); err != nil {
			fmt.Fprintln(os.Stderr, "prepare the test's host:", err)
			os.Exit(1)
		}
	}
	code := m.Run()
	if err := finishShared(code == 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// Inside reports whether this process runs the tests in the namespaces.
func Inside() bool { return os.Getenv(roleEnv) == "inside" }

// outside prepares the images, which may need a download, and then runs the tests in
// their namespaces, which have no network.
func outside(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // New skips
	}
	run := func(role string, stdout *os.File, flags uintptr, args ...string) int {
		cmd := exec.Command("/proc/self/exe", args...)
		cmd.Env = append(os.Environ(), roleEnv+"="+role)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread() // the kernel sends Pdeathsig when this thread ends
		defer runtime.UnlockOSThread()
		if err := cmd.Run(); err != nil {
			if cmd.ProcessState == nil {
				fmt.Fprintln(os.Stderr, err)
			}
			return 1
		}
		return 0
	}
	if code := run("prepare", os.Stderr, 0, "-test.run=^TestImages$"); code != 0 {
		return code
	}
	return run("inside", os.Stdout, syscall.CLONE_NEWNET|syscall.CLONE_NEWNS, os.Args[1:]...)
}

func prepareHost() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("run", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// Token is the agents' token.
const Token = "the-agents-token"

// runAgent does what "wrenn agent" does.
func runAgent() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	memory, err := strconv.Atoi(os.Getenv("WRENN_MEMORY_MIB"))
	if err != nil {
		return err
	}
	bounds, err := env.ParseAs[struct {
		NoSeccomp bool `env:"WRENN_NO_SECCOMP"`
		Rates     rates.Rates
	}]()
	if err != nil {
		return err
	}
	a, err := agent.New(ctx, agent.Config{
		BootTimeout: await.Scale(2 * time.Minute),
		NoSeccomp:   bounds.NoSeccomp, Rates: bounds.Rates,
		Dir: layout.Dir(os.Getenv("WRENN_DIR")), Token: Token, Accel: os.Getenv("WRENN_VMM_ACCEL"), Envd: os.Getenv("WRENN_ENVD"), Balloon: os.Getenv("WRENN_FREE_PAGE_REPORTING") == "true",
		DefaultVCPUs: number("WRENN_DEFAULT_VCPUS"), DefaultMemoryMiB: 256, Warm: number("WRENN_WARM"), Hook: hook(layout.Dir(os.Getenv("WRENN_DIR"))),
		DNS: []netip.Addr{netip.MustParseAddr("192.0.2.53")}, MemoryMiB: memory, LocalRegistries: os.Getenv("WRENN_LOCAL_REGISTRIES") != "", Version: "test",
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	l, err := netaddr.Listen(ctx, "unix:"+layout.Dir(os.Getenv("WRENN_DIR")).AgentSocket(), 0o600)
	if err != nil {
		return errors.Join(err, a.Close())
	}
	srv := netaddr.Server(a.Handler())
	netaddr.Separate(srv)
	plain := (&upstream.Server{Handler: a.Handler(), Takes: a.ToPort, HeaderTimeout: srv.ReadHeaderTimeout, IdleTimeout: srv.IdleTimeout}).Listen(l)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ran := make(chan error, 1)
	go func() { ran <- a.Run(ctx); cancel() }()
	err = graceful.Serve(ctx, srv, plain, nil, graceful.InFlight)
	cancel()
	return errors.Join(err, <-ran, a.Close())
}

func number(env string) int {
	n, _ := strconv.Atoi(os.Getenv(env))
	return n
}

// KillAt returns the path of a file that names the step at which the agent on dir kills
// itself.
func KillAt(dir layout.Dir) string { return filepath.Join(string(dir), "kill-at") }

// hook returns an [agent.Config] Hook that kills the agent at the step in [KillAt].
func hook(dir layout.Dir) func(string) {
	return func(step string) {
		if read(KillAt(dir)) == step {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
}

// Agent is an installation and the agent on it.
type Agent struct {
	hostagentv1connect.HostAgentClient

	Dir    layout.Dir
	Images imagetest.Images
	seeded []string // names of the captures that link gave it
	// MemoryMiB bounds the memory of all its sandboxes together.
	MemoryMiB int
	// Env is added to the test's environment for the agent.
	Env map[string]string
	// Base is the agent's URL. HTTP is a client for Connect, and Plain one for HTTP/1.1
	// that sends the token.
	Base  string
	HTTP  *http.Client
	Plain *http.Client
	// Cmd is the agent's process.
	Cmd *exec.Cmd
	// Ended is closed when Cmd has ended.
	Ended chan struct{}

	mounts   string
	groups   string
	finished bool
}

// mounts lists the mounts of the current thread, because /proc/self is the main thread,
// which may be in a jail's namespace.
const mounts = "/proc/thread-self/mounts"

// New calls prepare, unless it is nil, and starts an agent. When the test ends, New
// terminates the agent, and fails the test if the agent left anything behind. The test
// must not be parallel, because New would take what the shared agent has for a leftover.
func New(t testing.TB, prepare func(*Agent)) *Agent {
	t.Helper()
	// With -count, the parallel tests of the round before have used one.
	if err := finishShared(false); err != nil {
		t.Fatal(err)
	}
	a := newAgent(t)
	t.Cleanup(func() {
		if err := a.discard(); err != nil {
			t.Error(err)
		}
	})
	a.open(t, prepare)
	t.Cleanup(func() { a.Finish(t) })
	return a
}

// shared has the agent of the tests that call Shared, or nil.
var shared struct {
	sync.Mutex
	agent *Agent
}

// Shared makes t parallel, and returns the agent that all such tests of the package
// share. The first test calls prepare, unless it is nil, and starts the agent. After the
// last test, [Main] terminates the agent, and fails if the agent left anything behind.
//
// Parallel tests run after all others, and so after those that call [New].
func Shared(t *testing.T, prepare func(*Agent)) *Agent {
	t.Helper()
	t.Parallel()
	shared.Lock()
	defer shared.Unlock()
	if shared.agent == nil {
		a := newAgent(t)
		defer func() {
			if shared.agent == nil { // it did not start
				_ = a.discard()
			}
		}()
		a.open(t, prepare)
		shared.agent = a
	}
	a := shared.agent
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the shared agent's log:\n%s", a.Log())
		}
	})
	return a
}

// finishShared terminates the shared agent, if there is one, and returns an error if it
// left anything behind. passed says that all of its tests have passed.
func finishShared(passed bool) error {
	shared.Lock()
	defer shared.Unlock()
	a := shared.agent
	if a == nil {
		return nil
	}
	shared.agent = nil
	err := a.finish(passed)
	if err != nil {
		err = fmt.Errorf("the shared agent: %w\nits log:\n%s", err, a.Log())
	}
	return errors.Join(err, a.discard())
}

// newAgent returns an agent with a directory, which the caller must discard. It skips the
// test on machines that cannot run agents.
func newAgent(t testing.TB) *Agent {
	t.Helper()
	if !Inside() {
		t.Skip("needs root: makes namespaces and starts virtual machines")
	}
	if _, err := os.Stat("/usr/bin/qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
	a := &Agent{Images: imagetest.Prepare(t), MemoryMiB: 8192, Env: map[string]string{"WRENN_WARM": "0", "WRENN_DEFAULT_VCPUS": "0"}}
	// Beside the images, so that link works, and not t.TempDir, because a socket's path
	// must be short.
	dir, err := os.MkdirTemp(string(a.Images.Dir), "host-")
	if err != nil {
		t.Fatal(err)
	}
	a.Dir = layout.Dir(dir)
	return a
}

// open starts the agent on its directory, after prepare.
func (a *Agent) open(t testing.TB, prepare func(*Agent)) {
	t.Helper()
	a.link(t)
	if prepare != nil {
		prepare(a)
	}
	a.mounts, a.groups = read(mounts), Groups()
	addr := "unix:" + a.Dir.AgentSocket()
	a.HTTP, a.Base = netaddr.HTTPClient(addr)
	a.Plain = &http.Client{Transport: bearer{netaddr.Transport(addr, false)}}
	a.HostAgentClient = hostagentv1connect.NewHostAgentClient(&http.Client{Transport: bearer{a.HTTP.Transport}}, a.Base)
	a.Start(t)
}

// seed returns the directory of captures of minimal that earlier tests' agents made.
func (a *Agent) seed() string { return filepath.Join(string(a.Images.Dir), "captures") }

// link hard-links the images, which all tests share, into the agent's directory.
func (a *Agent) link(t testing.TB) {
	t.Helper()
	if err := os.Symlink(a.Images.Dir.Kernels(), a.Dir.Kernels()); err != nil {
		t.Fatal(err)
	}
	minimal := a.Dir.Template(uuid.Nil, uuid.Nil)
	if err := os.MkdirAll(a.Dir.Captures(uuid.Nil, uuid.Nil), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"template.json", "rootfs.ext4"} {
		if err := os.Link(filepath.Join(a.Images.Dir.Template(uuid.Nil, uuid.Nil), name), filepath.Join(minimal, name)); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if a.seeded, err = linkAll(a.seed(), a.Dir.Captures(uuid.Nil, uuid.Nil)); err != nil {
		t.Fatal(err)
	}
}

// removeStale deletes captures from the seed if the agent deleted its links to them. An
// older kernel, envd or driver made them, and each takes some 330 MiB.
func (a *Agent) removeStale() error {
	var errs []error
	for _, name := range a.seeded {
		if _, err := os.Stat(filepath.Join(a.Dir.Captures(uuid.Nil, uuid.Nil), name)); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		errs = append(errs, os.RemoveAll(filepath.Join(a.seed(), name)))
	}
	return errors.Join(errs...)
}

// linkAll links every folder of from into to, and returns the names of those that it
// linked. It skips folders that exist in to and those that another test is removing, and
// everything if to is on another file system. Agents make missing captures themselves.
func linkAll(from, to string) (linked []string, err error) {
	all, err := os.ReadDir(from)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, e := range all {
		dst := filepath.Join(to, e.Name())
		err := image.LinkTree(filepath.Join(from, e.Name()), dst)
		switch {
		case err == nil:
			linked = append(linked, e.Name())
		case errors.Is(err, os.ErrExist):
		case errors.Is(err, syscall.EXDEV), errors.Is(err, os.ErrNotExist):
			if err := os.RemoveAll(dst); err != nil {
				return linked, err
			}
		default:
			return linked, err
		}
	}
	return linked, nil
}

// bearer adds the agent's token to requests.
type bearer struct{ next http.RoundTripper }

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+Token)
	return b.next.RoundTrip(r)
}

func read(name string) string {
	b, _ := os.ReadFile(name)
	return string(b)
}

// Start starts the agent's process and waits until it answers.
func (a *Agent) Start(t testing.TB) {
	t.Helper()
	a.Cmd = exec.Command("/proc/self/exe")
	a.Cmd.Env = append(os.Environ(), roleEnv+"=agent", "WRENN_DIR="+string(a.Dir), "WRENN_ENVD="+a.Images.Envd, "WRENN_VMM_ACCEL="+vmmtest.Accelerator(), "WRENN_MEMORY_MIB="+strconv.Itoa(a.MemoryMiB))
	for k, v := range a.Env {
		a.Cmd.Env = append(a.Cmd.Env, k+"="+v)
	}
	out, err := os.OpenFile(a.LogFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	a.Cmd.Stdout, a.Cmd.Stderr = out, out
	if err := a.Cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	a.Ended = ended
	go func(cmd *exec.Cmd) {
		_ = cmd.Wait()
		close(ended)
	}(a.Cmd)
	if !await.Within(await.Scale(90*time.Second), func() bool {
		if _, err = a.Host(t.Context(), connect.NewRequest(&pb.HostRequest{})); err == nil {
			return true
		}
		select {
		case <-a.Ended:
			t.Fatalf("the agent ended: %s", a.Log())
		default:
		}
		return false
	}) {
		t.Fatalf("the agent did not answer: %v: %s", err, a.Log())
	}
}

// LogFile returns the path of the agents' log.
func (a *Agent) LogFile() string { return filepath.Join(string(a.Dir), "agent.log") }

// Log returns the last 20000 bytes of the agents' log.
func (a *Agent) Log() string {
	s := read(a.LogFile())
	return s[max(0, len(s)-20000):]
}

// Kill sends the agent's process a signal and waits until it has ended.
func (a *Agent) Kill(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := a.Cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a.Ended:
	case <-time.After(await.Scale(60 * time.Second)):
		t.Fatal("the agent did not end after the signal")
	}
	a.HTTP.CloseIdleConnections()
}

// Finish terminates the agent and checks that nothing is left on the host. Calling it
// again does nothing.
func (a *Agent) Finish(t testing.TB) {
	t.Helper()
	if a.finished {
		return
	}
	a.finished = true
	if err := a.finish(!t.Failed()); err != nil {
		t.Error(err)
	}
	if t.Failed() {
		t.Logf("the agent's log:\n%s", a.Log())
	}
	if got := Groups(); got != a.groups {
		t.Logf("control groups were %s and are %s (another test may run beside)", a.groups, got)
	}
}

// finish terminates the agent, and returns an error that names everything that is left on
// the host. If nothing is, and the tests have passed, it keeps the agent's captures for
// the next agents.
func (a *Agent) finish(passed bool) error {
	ns := openNamespaces() // now, because the agent removes their names
	defer ns.close()
	var errs []error
	fail := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	nothing := func(what string, left []string) {
		if len(left) > 0 {
			errs = append(errs, fmt.Errorf("%s left: %v", what, left))
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), await.Scale(120*time.Second))
	defer cancel()
	list, err := a.List(ctx, connect.NewRequest(&pb.ListRequest{}))
	fail("list", err)
	if err == nil {
		for _, s := range list.Msg.GetSandboxes() {
			_, err := a.Destroy(ctx, connect.NewRequest(&pb.DestroyRequest{SandboxId: s.GetSandboxId()}))
			fail("destroy", err)
		}
	}
	if _, err := a.Terminate(ctx, connect.NewRequest(&pb.TerminateRequest{})); err != nil {
		fail("terminate", err)
		_ = a.Cmd.Process.Signal(syscall.SIGTERM)
	}
	select {
	case <-a.Ended:
	case <-time.After(await.Scale(60 * time.Second)):
		_ = a.Cmd.Process.Kill()
		return errors.Join(append(errs, errors.New("the agent did not end after its termination"))...)
	}
	if code := a.Cmd.ProcessState.ExitCode(); code != 0 {
		errs = append(errs, fmt.Errorf("the agent exited with %d", code))
	}
	if strings.Contains(read(a.LogFile()), qemu.LostInterrupts) {
		errs = append(errs, errors.New("a saved sandbox lost an interrupt"))
	}
	names, _ := filepath.Glob("/run/wrenn/netns/wrenn-*")
	nothing("namespaces", names)
	var links []string
	all, err := netlink.LinkList()
	fail("list links", err)
	for _, l := range all {
		if l.Attrs().Name != "lo" {
			links = append(links, l.Attrs().Name)
		}
	}
	nothing("links", links)
	out, err := exec.Command("nft", "list", "tables").CombinedOutput()
	if err != nil || strings.Contains(string(out), "wrenn") {
		errs = append(errs, fmt.Errorf("tables left: %s %v", out, err))
	}
	folders, _ := filepath.Glob(filepath.Join(a.Dir.Sandboxes(), "*"))
	nothing("folders", folders)
	// Only new ones: mounts from outside of this namespace may disappear.
	for line := range strings.Lines(read(mounts)) {
		if !strings.Contains(a.mounts, line) {
			errs = append(errs, fmt.Errorf("a mount is left: %s", line))
		}
	}
	nothing("machines", ns.machines())
	for _, dir := range []string{a.Dir.Forks(), a.Dir.Images()} {
		hidden, _ := filepath.Glob(filepath.Join(dir, ".tmp-*"))
		nothing("unpublished", hidden)
	}
	if len(errs) > 0 || !passed {
		return errors.Join(errs...)
	}
	if err := os.MkdirAll(a.seed(), 0o700); err != nil {
		return err
	}
	_, err = linkAll(a.Dir.Captures(uuid.Nil, uuid.Nil), a.seed())
	return errors.Join(err, a.removeStale())
}

// discard removes the agent's directory, after it has killed the agent and the machines
// that a failed test leaves behind.
func (a *Agent) discard() error {
	defer os.RemoveAll(string(a.Dir))
	if a.Cmd != nil && a.Ended != nil {
		_ = a.Cmd.Process.Kill()
		<-a.Ended
	}
	var errs []error
	homes, _ := os.ReadDir(a.Dir.Sandboxes())
	for _, home := range homes {
		group := cgroup.Group{Name: home.Name()}
		if there, err := group.Populated(); err == nil && !there {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), await.Scale(60*time.Second))
		if err := group.Destroy(ctx); err != nil {
			errs = append(errs, fmt.Errorf("end the machine %s, which the test left: %w", home.Name(), err))
		}
		cancel()
	}
	return errors.Join(errs...)
}

// Groups returns the paths of the sandboxes' control groups.
func Groups() string {
	var all []string
	for _, pattern := range []string{"/sys/fs/cgroup/wrenn/*-*", "/sys/fs/cgroup/memory/wrenn/*-*"} {
		m, _ := filepath.Glob(pattern)
		all = append(all, m...)
	}
	return strings.Join(all, " ")
}

// Machines returns the pids of the virtual machines in the network namespaces of the
// host's slots.
func (a *Agent) Machines() (pids []string) {
	ns := openNamespaces()
	defer ns.close()
	return ns.machines()
}

// namespaces are the slots' network namespaces, by inode. It keeps them open, so that
// the kernel does not reuse the inodes for namespaces of other tests.
type namespaces map[uint64]*os.File

func openNamespaces() namespaces {
	ns := namespaces{}
	names, _ := filepath.Glob("/run/wrenn/netns/wrenn-*")
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		var st syscall.Stat_t
		if syscall.Fstat(int(f.Fd()), &st) != nil || ns[st.Ino] != nil {
			f.Close()
			continue
		}
		ns[st.Ino] = f
	}
	return ns
}

func (ns namespaces) close() {
	for _, f := range ns {
		f.Close()
	}
}

// machines returns the pids of the virtual machines in the namespaces.
func (ns namespaces) machines() (pids []string) {
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		var st syscall.Stat_t
		if strings.HasPrefix(read(p+"/cmdline"), "/usr/bin/qemu-system-x86_64\x00") && syscall.Stat(p+"/ns/net", &st) == nil && ns[st.Ino] != nil {
			pids = append(pids, filepath.Base(p))
		}
	}
	return pids
}

// QEMU returns the pid of the machine that was started for a sandbox, or 0 if there is
// none.
func QEMU(sandbox string) int {
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		return 0
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if strings.Contains(read(p), "\x00-name\x00wrenn-"+u.String()+"\x00") {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
			return pid
		}
	}
	return 0
}
