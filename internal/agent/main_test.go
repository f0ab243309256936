package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// The tests run real agents with real machines. They do so in a network and a
// mount namespace of their own, which stand for a whole host: what is left in
// them, an agent has left. The agent is a process of its own, so that it can
// be killed; it is this program too.
const roleEnv = "WRENN_AGENT_TEST_ROLE"

func TestMain(m *testing.M) {
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
	os.Exit(m.Run())
}

// outside starts the tests in their namespaces. Images may have to be
// downloaded, which is possible only before that.
func outside(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // they skip
	}
	run := func(role string, flags uintptr, args ...string) int {
		cmd := exec.Command("/proc/self/exe", args...)
		cmd.Env = append(os.Environ(), roleEnv+"="+role)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread() // Pdeathsig follows the thread
		defer runtime.UnlockOSThread()
		if err := cmd.Run(); err != nil {
			if cmd.ProcessState == nil {
				fmt.Fprintln(os.Stderr, err)
			}
			return 1
		}
		return 0
	}
	if code := run("prepare", 0, "-test.run=^TestImages$"); code != 0 {
		return code
	}
	return run("inside", syscall.CLONE_NEWNET|syscall.CLONE_NEWNS, os.Args[1:]...)
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

// TestImages makes the kernel and the template that other tests start from.
func TestImages(t *testing.T) { imagetest.Prepare(t) }

const token = "the-agents-token"

// runAgent is the agent's process, as "wrenn agent" is.
func runAgent() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	memory, err := strconv.Atoi(os.Getenv("WRENN_MEMORY_MIB"))
	if err != nil {
		return err
	}
	a, err := agent.New(ctx, agent.Config{
		Dir: layout.Dir(os.Getenv("WRENN_DIR")), Token: token, Accel: os.Getenv("WRENN_VMM_ACCEL"), Envd: os.Getenv("WRENN_ENVD"),
		DefaultVCPUs: number("WRENN_DEFAULT_VCPUS"), DefaultMemoryMiB: 256, Warm: number("WRENN_WARM"), Hook: hook(layout.Dir(os.Getenv("WRENN_DIR"))),
		DNS: []netip.Addr{netip.MustParseAddr("192.0.2.53")}, MemoryMiB: memory, Version: "test",
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
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	err = a.Run(ctx)
	drain, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if srv.Shutdown(drain) != nil {
		_ = srv.Close()
	}
	<-served
	return errors.Join(err, a.Close())
}

func number(env string) int {
	n, _ := strconv.Atoi(os.Getenv(env))
	return n
}

// killAt names a file that says at which step the agent kills itself.
func killAt(dir layout.Dir) string { return filepath.Join(string(dir), "kill-at") }

// hook has the agent die at a step, as if it was killed there.
func hook(dir layout.Dir) func(string) {
	return func(step string) {
		if read(killAt(dir)) == step {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
}

// host is an installation with an agent on it.
type host struct {
	hostagentv1connect.HostAgentClient

	dir      layout.Dir
	images   imagetest.Images
	memory   int
	env      map[string]string
	base     string
	client   *http.Client // HTTP/2, for Connect
	plain    *http.Client // HTTP/1.1, for the proxy
	cmd      *exec.Cmd
	ended    chan struct{} // closed when the agent's process has ended
	mounts   string
	groups   string
	finished bool

	namespaces map[uint64]bool // inodes of those that its agents made
}

func newHost(t *testing.T) *host {
	t.Helper()
	return newHostWith(t, nil)
}

// newHostWith makes a host whose agent is started after prepare.
func newHostWith(t *testing.T, prepare func(h *host)) *host {
	t.Helper()
	if os.Getenv(roleEnv) != "inside" {
		t.Skip("needs root: makes namespaces and starts virtual machines")
	}
	if _, err := os.Stat("/usr/bin/qemu-system-x86_64"); err != nil {
		t.Skip("needs QEMU")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
	h := &host{images: imagetest.Prepare(t), memory: 8192, env: map[string]string{"WRENN_WARM": "0", "WRENN_DEFAULT_VCPUS": "0"}}
	// Beside the images, so that there can be links to them, and not t.TempDir:
	// a socket's path must be short.
	dir, err := os.MkdirTemp(string(h.images.Dir), "host-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h.dir = layout.Dir(dir)
	h.link(t)
	if prepare != nil {
		prepare(h)
	}
	h.mounts, h.groups = read("/proc/self/mounts"), groups()
	addr := "unix:" + h.dir.AgentSocket()
	h.client, h.base = netaddr.HTTPClient(addr)
	h.plain = &http.Client{Transport: bearer{netaddr.Transport(addr, false)}}
	h.HostAgentClient = hostagentv1connect.NewHostAgentClient(&http.Client{Transport: bearer{h.client.Transport}}, h.base)
	h.start(t)
	t.Cleanup(func() { h.finish(t) })
	return h
}

// seed is where the captures of minimal lie that an earlier test's agent has made.
func (h *host) seed() string { return filepath.Join(string(h.images.Dir), "captures") }

// link gives the host its images: links to those that are made once for all
// tests.
func (h *host) link(t *testing.T) {
	t.Helper()
	if err := os.Symlink(h.images.Dir.Kernels(), h.dir.Kernels()); err != nil {
		t.Fatal(err)
	}
	minimal := h.dir.Template(uuid.Nil, uuid.Nil)
	if err := os.MkdirAll(h.dir.Captures(uuid.Nil, uuid.Nil), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"template.json", "rootfs.ext4"} {
		if err := os.Link(filepath.Join(h.images.Dir.Template(uuid.Nil, uuid.Nil), name), filepath.Join(minimal, name)); err != nil {
			t.Fatal(err)
		}
	}
	linkAll(t, h.seed(), h.dir.Captures(uuid.Nil, uuid.Nil))
}

// linkAll links the folders in one to another, which may have them.
func linkAll(t *testing.T, from, to string) {
	t.Helper()
	all, err := os.ReadDir(from)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range all {
		if err := image.LinkTree(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
	}
}

// bearer shows the agent's token.
type bearer struct{ next http.RoundTripper }

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+token)
	return b.next.RoundTrip(r)
}

func read(name string) string {
	b, _ := os.ReadFile(name)
	return string(b)
}

// start starts the agent's process and waits until it answers.
func (h *host) start(t *testing.T) {
	t.Helper()
	h.cmd = exec.Command("/proc/self/exe")
	h.cmd.Env = append(os.Environ(), roleEnv+"=agent", "WRENN_DIR="+string(h.dir), "WRENN_ENVD="+h.images.Envd, "WRENN_VMM_ACCEL=tcg", "WRENN_MEMORY_MIB="+strconv.Itoa(h.memory))
	for k, v := range h.env {
		h.cmd.Env = append(h.cmd.Env, k+"="+v)
	}
	out, err := os.OpenFile(filepath.Join(string(h.dir), "agent.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	h.cmd.Stdout, h.cmd.Stderr = out, out
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	h.ended = ended
	go func(cmd *exec.Cmd) {
		_ = cmd.Wait()
		close(ended)
	}(h.cmd)
	deadline := time.Now().Add(90 * time.Second)
	for {
		_, err := h.Host(t.Context(), connect.NewRequest(&pb.HostRequest{}))
		if err == nil {
			return
		}
		select {
		case <-h.ended:
			t.Fatalf("the agent ended: %s", h.log())
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not answer: %v: %s", err, h.log())
		}
	}
}

func (h *host) log() string {
	s := read(filepath.Join(string(h.dir), "agent.log"))
	return s[max(0, len(s)-20000):]
}

// kill ends the agent's process with a signal.
func (h *host) kill(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := h.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	select {
	case <-h.ended:
	case <-time.After(60 * time.Second):
		t.Fatal("the agent does not end")
	}
	h.client.CloseIdleConnections()
}

// finish terminates the agent and checks that nothing is left on the host.
func (h *host) finish(t *testing.T) {
	t.Helper()
	if h.finished {
		return
	}
	h.finished = true
	h.noteNamespaces()
	if t.Failed() {
		defer func() { t.Logf("the agent's log:\n%s", h.log()) }()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 120*time.Second)
	defer cancel()
	list, err := h.List(ctx, connect.NewRequest(&pb.ListRequest{}))
	if err != nil {
		t.Errorf("list: %v", err)
	} else {
		for _, s := range list.Msg.GetSandboxes() {
			h.destroy(t, s.GetSandboxId())
		}
	}
	if _, err := h.Terminate(ctx, connect.NewRequest(&pb.TerminateRequest{})); err != nil {
		t.Errorf("terminate: %v", err)
		_ = h.cmd.Process.Signal(syscall.SIGTERM)
	}
	select {
	case <-h.ended:
	case <-time.After(60 * time.Second):
		_ = h.cmd.Process.Kill()
		t.Error("the agent did not end after its termination")
		return
	}
	if code := h.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("the agent exited with %d", code)
	}
	nothing := func(what string, left []string) {
		if len(left) > 0 {
			t.Errorf("%s left: %v", what, left)
		}
	}
	names, _ := filepath.Glob("/run/netns/wrenn-*")
	nothing("namespaces", names)
	var links []string
	all, err := netlink.LinkList()
	if err != nil {
		t.Error(err)
	}
	for _, l := range all {
		if l.Attrs().Name != "lo" {
			links = append(links, l.Attrs().Name)
		}
	}
	nothing("links", links)
	out, err := exec.Command("nft", "list", "tables").CombinedOutput()
	if err != nil || strings.Contains(string(out), "wrenn") {
		t.Errorf("tables left: %s %v", out, err)
	}
	folders, _ := filepath.Glob(filepath.Join(h.dir.Sandboxes(), "*"))
	nothing("folders", folders)
	// Those below this namespace's own, of others on the machine, may go.
	for line := range strings.Lines(read("/proc/self/mounts")) {
		if !strings.Contains(h.mounts, line) {
			t.Errorf("a mount is left: %s", line)
		}
	}
	nothing("machines", h.machines())
	for _, dir := range []string{h.dir.Forks(), h.dir.Images()} {
		hidden, _ := filepath.Glob(filepath.Join(dir, ".tmp-*"))
		nothing("unpublished", hidden)
	}
	if !t.Failed() {
		if err := os.MkdirAll(h.seed(), 0o700); err != nil {
			t.Error(err)
		}
		linkAll(t, h.dir.Captures(uuid.Nil, uuid.Nil), h.seed())
	}
	if got := groups(); got != h.groups {
		t.Logf("control groups were %s and are %s (another test may run beside)", h.groups, got)
	}
}

// groups are the control groups of sandboxes.
func groups() string {
	var all []string
	for _, pattern := range []string{"/sys/fs/cgroup/wrenn/*-*", "/sys/fs/cgroup/memory/wrenn/*-*"} {
		m, _ := filepath.Glob(pattern)
		all = append(all, m...)
	}
	return strings.Join(all, " ")
}

// machines are the pids of the virtual machines in namespaces that the host's
// agents have made.
func (h *host) machines() (pids []string) {
	h.noteNamespaces()
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		var st syscall.Stat_t
		if strings.HasPrefix(read(p+"/cmdline"), "/usr/bin/qemu-system-x86_64\x00") && syscall.Stat(p+"/ns/net", &st) == nil && h.namespaces[st.Ino] {
			pids = append(pids, filepath.Base(p))
		}
	}
	return pids
}

// noteNamespaces notes which namespaces there are, to know them when they
// have no name any more.
func (h *host) noteNamespaces() {
	if h.namespaces == nil {
		h.namespaces = map[uint64]bool{}
	}
	names, _ := filepath.Glob("/run/netns/wrenn-*")
	for _, name := range names {
		var st syscall.Stat_t
		if syscall.Stat(name, &st) == nil {
			h.namespaces[st.Ino] = true
		}
	}
}

// qemu is the pid of a sandbox's machine; 0: there is none.
func qemu(sandbox string) int {
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

func request() *pb.CreateRequest {
	return &pb.CreateRequest{
		SandboxId: id.Format(id.Sandbox, uuid.New()), TeamId: id.Format(id.Team, uuid.New()), TemplateId: id.Format(id.Template, uuid.Nil),
		Vcpus: 1, MemoryMib: 256, AccessToken: "a-sandboxs-token", Envs: map[string]string{"FROM": "sandbox"},
	}
}

// create creates a sandbox and returns its id.
func (h *host) create(t *testing.T, r *pb.CreateRequest) string {
	t.Helper()
	begin := time.Now()
	res, err := h.Create(t.Context(), connect.NewRequest(r))
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	t.Logf("created in %v", time.Since(begin).Round(time.Millisecond))
	if s := res.Msg.GetSandbox(); s.GetState() != pb.SandboxState_SANDBOX_STATE_RUNNING || s.GetSandboxId() != r.SandboxId {
		t.Fatalf("created %v", s)
	}
	return r.SandboxId
}

func (h *host) destroy(t *testing.T, sandbox string) {
	t.Helper()
	if _, err := h.Destroy(context.WithoutCancel(t.Context()), connect.NewRequest(&pb.DestroyRequest{SandboxId: sandbox})); err != nil {
		t.Errorf("destroy: %v", err)
	}
}

func (h *host) exec(t *testing.T, sandbox string, c *pb.Command, stdin []byte) *pb.ExecResponse {
	t.Helper()
	res, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: c, Stdin: stdin}))
	if err != nil {
		t.Fatalf("exec %s: %v", c.GetCmd(), err)
	}
	return res.Msg
}

func sh(script string) *pb.Command { return &pb.Command{Cmd: "sh", Args: []string{"-c", script}} }

// gone checks that nothing of one sandbox is left.
func (h *host) gone(t *testing.T, sandbox string) {
	t.Helper()
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(h.dir.Sandbox(u)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its folder is left: %v", err)
	}
	if pid := qemu(sandbox); pid != 0 {
		t.Errorf("its machine is left: %d", pid)
	}
	if strings.Contains(groups(), u.String()) {
		t.Error("its control group is left")
	}
	_, err = h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("it is still known: %v", err)
	}
}

// event waits for the event of a sandbox, and acknowledges it.
func (h *host) event(t *testing.T, sandbox string) *pb.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	s, err := h.Events(ctx, connect.NewRequest(&pb.EventsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for s.Receive() {
		e := s.Msg().GetEvent()
		if _, err := h.AckEvents(ctx, connect.NewRequest(&pb.AckEventsRequest{Seq: e.GetSeq()})); err != nil {
			t.Fatal(err)
		}
		if e.GetSandboxId() == sandbox {
			return e
		}
	}
	t.Fatalf("no event: %v", s.Err())
	return nil
}

// pattern is n bytes that differ from place to place.
type pattern struct{ at, n int64 }

func (p *pattern) Read(b []byte) (int, error) {
	if p.at >= p.n {
		return 0, io.EOF
	}
	m := min(int64(len(b)), p.n-p.at)
	for i := range m {
		b[i] = byte((p.at + i) * 2654435761 >> 13)
	}
	p.at += m
	return int(m), nil
}
