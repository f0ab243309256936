package agent_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// TestSandbox does everything with a sandbox that a client can do.
func TestSandbox(t *testing.T) {
	h := newOwnHost(t, nil) // counts sandboxes and measures the agent's memory
	r := request()
	sandbox := h.create(t, r)

	t.Run("same id", func(t *testing.T) {
		res, err := h.Create(t.Context(), connect.NewRequest(r))
		if err != nil || res.Msg.GetSandbox().GetSandboxId() != sandbox {
			t.Errorf("a repeated create: %v %v", res, err)
		}
		list, err := h.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
		if err != nil || len(list.Msg.GetSandboxes()) != 1 {
			t.Errorf("%v %v", list, err)
		}
	})
	t.Run("exec", func(t *testing.T) { testExec(t, h, sandbox) })
	t.Run("stream", func(t *testing.T) { testStream(t, h, sandbox) })
	t.Run("files", func(t *testing.T) { testFiles(t, h, sandbox) })
	t.Run("big files", func(t *testing.T) { testBigFiles(t, h, sandbox) })
	t.Run("proxy", func(t *testing.T) { testProxy(t, h, sandbox) })
	t.Run("what it reports", func(t *testing.T) { testReports(t, h, sandbox) })
	t.Run("bad requests", func(t *testing.T) { testBadRequests(t, h, sandbox) })

	// A command in progress ends with the sandbox.
	long := make(chan error)
	go func() {
		_, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: sh("touch /tmp/begun; sleep 600")}))
		long <- err
	}()
	await.Until(t, "the command starts", func() bool { return h.exec(t, sandbox, sh("test -e /tmp/begun"), nil).GetExitCode() == 0 })
	begin := time.Now()
	h.destroy(t, sandbox)
	if err := <-long; connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("a command whose sandbox was destroyed: %v", err)
	}
	t.Logf("destroyed in %v", time.Since(begin))
	h.gone(t, sandbox)
	h.destroy(t, sandbox)
}

func testReports(t *testing.T, h *host, sandbox string) {
	m, err := h.Metrics(t.Context(), connect.NewRequest(&pb.MetricsRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatal(err)
	}
	all, err := h.Samples(t.Context(), connect.NewRequest(&pb.SamplesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	sampled := false
	for _, r := range all.Msg.Samples {
		if r.SandboxId == sandbox {
			sampled = r.Vcpus == 1 && r.CpuUs > 0 && r.MemoryBytes > 50<<20 && r.DiskBytes > 0
		}
	}
	if !sampled {
		t.Errorf("samples: %v", all.Msg)
	}
	if r := m.Msg; r.GetCpuCount() != 1 || r.GetMemoryTotalBytes() < 150<<20 || r.GetMemoryTotalBytes() > 256<<20 || r.GetDiskTotalBytes() < 4<<30 || r.GetHostMemoryBytes() < 50<<20 {
		t.Errorf("metrics %v", r)
	}
	c, err := h.Console(t.Context(), connect.NewRequest(&pb.ConsoleRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("console: %d bytes", len(c.Msg.GetOutput()))
	hi, err := h.Host(t.Context(), connect.NewRequest(&pb.HostRequest{}))
	if r := hi.Msg; err != nil || r.GetVersion() != "test" || r.GetVmm() != "qemu" || r.GetAccelerator() != vmmtest.Accelerator() || r.GetSandboxes() != 1 || r.GetCpus() < 1 ||
		r.GetMemoryFreeBytes() >= 8192<<20 || r.GetDiskFreeBytes() == 0 || r.GetDiskFreeBytes() > r.GetDiskBytes() {
		t.Errorf("host %v %v", r, err)
	}
	ts, err := h.Templates(t.Context(), connect.NewRequest(&pb.TemplatesRequest{}))
	if err != nil || len(ts.Msg.GetTemplates()) == 0 || ts.Msg.GetTemplates()[0].GetName() != "minimal" {
		t.Errorf("templates %v %v", ts, err)
	}
	code, body := h.get(t, h.Base+"/metrics", nil)
	for _, want := range []string{`wrenn_agent_sandboxes{state="running"} 1`, `wrenn_agent_step_seconds_count{operation="create",step="restore"} 1`, `wrenn_agent_operation_seconds_count{operation="create"} 1`, `wrenn_agent_slots{state="used"} `, `wrenn_agent_slots{state="stuck"} 0`, "wrenn_agent_warm_machines ", "wrenn_agent_memory_reserved_bytes", `wrenn_agent_proxy_requests_total{result="forwarded"}`} {
		if code != 200 || !strings.Contains(body, want) {
			t.Errorf("%d: the metrics lack %s", code, want)
		}
	}
}

func testBadRequests(t *testing.T, h *host, sandbox string) {
	bad := func(name string, want connect.Code, err error) {
		t.Helper()
		if connect.CodeOf(err) != want || err == nil {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	creates := map[string]struct {
		change func(*pb.CreateRequest)
		want   connect.Code
	}{
		"id":             {func(r *pb.CreateRequest) { r.SandboxId = "../../etc" }, connect.CodeInvalidArgument},
		"team":           {func(r *pb.CreateRequest) { r.TeamId = "" }, connect.CodeInvalidArgument},
		"template id":    {func(r *pb.CreateRequest) { r.TemplateId = "minimal" }, connect.CodeInvalidArgument},
		"no template":    {func(r *pb.CreateRequest) { r.TemplateId = id.Format(id.Template, uuid.New()) }, connect.CodeNotFound},
		"no cpu":         {func(r *pb.CreateRequest) { r.Vcpus = 0 }, connect.CodeInvalidArgument},
		"many cpus":      {func(r *pb.CreateRequest) { r.Vcpus = 33 }, connect.CodeInvalidArgument},
		"no memory":      {func(r *pb.CreateRequest) { r.MemoryMib = 0 }, connect.CodeInvalidArgument},
		"much memory":    {func(r *pb.CreateRequest) { r.MemoryMib = 16385 }, connect.CodeInvalidArgument},
		"host's memory":  {func(r *pb.CreateRequest) { r.MemoryMib = 8192 }, connect.CodeResourceExhausted},
		"negative disk":  {func(r *pb.CreateRequest) { r.DiskMib = -1 }, connect.CodeInvalidArgument},
		"small disk":     {func(r *pb.CreateRequest) { r.DiskMib = 100 }, connect.CodeInvalidArgument},
		"time-out":       {func(r *pb.CreateRequest) { r.TimeoutSeconds = -1 }, connect.CodeInvalidArgument},
		"no token":       {func(r *pb.CreateRequest) { r.AccessToken = "" }, connect.CodeInvalidArgument},
		"header's token": {func(r *pb.CreateRequest) { r.AccessToken = "a\r\nb" }, connect.CodeInvalidArgument},
		"environment":    {func(r *pb.CreateRequest) { r.Envs = map[string]string{"A=B": "c"} }, connect.CodeInvalidArgument},
		"NUL":            {func(r *pb.CreateRequest) { r.Envs = map[string]string{"A": "c\x00"} }, connect.CodeInvalidArgument},
		"another's id":   {func(r *pb.CreateRequest) { r.SandboxId = sandbox }, connect.CodeAlreadyExists},
	}
	for name, test := range creates {
		r := request()
		test.change(r)
		_, err := h.Create(t.Context(), connect.NewRequest(r))
		bad("create: "+name, test.want, err)
	}
	for name, c := range map[string]*pb.Command{
		"nothing": {}, "NUL": {Cmd: "a\x00b"}, "NUL argument": {Cmd: "a", Args: []string{"\x00"}}, "user": {Cmd: "a", User: "root:x"}, "folder": {Cmd: "a", Cwd: "/\x00"}, "time-out": {Cmd: "a", TimeoutSeconds: -1}, "environment": {Cmd: "a", Envs: map[string]string{"": "x"}},
	} {
		_, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: c}))
		bad("exec: "+name, connect.CodeInvalidArgument, err)
	}
	for _, path := range []string{"", "a\x00b", "../etc/passwd", "/home/user/../../etc/passwd", strings.Repeat("x", 5000)} {
		_, err := h.ReadFile(t.Context(), connect.NewRequest(&pb.ReadFileRequest{File: ref(sandbox, path)}))
		bad(fmt.Sprintf("read %.20q", path), connect.CodeInvalidArgument, err)
		_, err = h.writeStream(t.Context(), &pb.WriteFileStreamRequest_Start{File: ref(sandbox, path)}, &pattern{n: 10})
		bad(fmt.Sprintf("write %.20q", path), connect.CodeInvalidArgument, err)
	}
	unknown := id.Format(id.Sandbox, uuid.New())
	_, err := h.Ping(t.Context(), connect.NewRequest(&pb.PingRequest{SandboxId: unknown}))
	bad("ping", connect.CodeNotFound, err)
	_, err = h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: unknown, Command: sh("true")}))
	bad("exec", connect.CodeNotFound, err)
	_, err = h.WriteFile(t.Context(), connect.NewRequest(&pb.WriteFileRequest{File: ref(sandbox, "x"), Content: make([]byte, 41<<20)}))
	bad("a message too big", connect.CodeResourceExhausted, err)

	// Without the token, or with a wrong one, the agent reveals nothing.
	for _, wrong := range []string{"", "Bearer ", "Bearer wrong", "Bearer " + token + "x", "Basic " + token} {
		c := hostagentv1connect.NewHostAgentClient(&http.Client{Transport: headers{h.HTTP.Transport, wrong}}, h.Base)
		_, err := c.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
		bad("token "+wrong, connect.CodeUnauthenticated, err)
		for _, path := range []string{"/metrics", "/proxy/" + sandbox + "/8000/"} {
			resp, err := (&http.Client{Transport: headers{h.HTTP.Transport, wrong}}).Get(h.Base + path)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s with %q: %s", path, wrong, resp.Status)
			}
		}
	}
}

// TestExpiryAndUse checks what counts as a use of a sandbox, and that one that is not used
// expires. A use delays the expiry, which package sandbox tests.
func TestExpiryAndUse(t *testing.T) {
	h := newHost(t)
	r := request()
	r.TimeoutSeconds = 3600
	sandbox := h.create(t, r)
	idle := func() time.Duration {
		t.Helper()
		got, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
		if err != nil {
			t.Fatal(err)
		}
		if got.Msg.GetSandbox().GetIdle() == nil {
			t.Fatalf("the sandbox does not report whether it is in use: %v", got.Msg)
		}
		return got.Msg.GetSandbox().GetIdle().AsDuration()
	}

	// A command.
	ended := make(chan *connect.Response[pb.ExecResponse], 1)
	go func() {
		res, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: sh("touch /tmp/begun; until [ -e /tmp/end ]; do sleep 0.1; done; echo done")}))
		if err != nil {
			t.Error(err)
		}
		ended <- res
	}()
	await.Until(t, "the command starts", func() bool { return h.exec(t, sandbox, sh("test -e /tmp/begun"), nil).GetExitCode() == 0 })
	if d := idle(); d != 0 {
		t.Errorf("while a command runs, the sandbox is idle for %v", d)
	}
	h.exec(t, sandbox, sh("touch /tmp/end"), nil)
	if res := await.Recv(t, "the command ends", ended); res == nil || string(res.Msg.GetStdout()) != "done\n" {
		t.Fatalf("%v", res)
	}
	await.Until(t, "the sandbox is idle after the command", func() bool { return idle() > 0 })

	// A ping.
	begun := time.Now()
	p, err := h.Ping(t.Context(), connect.NewRequest(&pb.PingRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatal(err)
	}
	if at := p.Msg.GetSandbox().GetExpiresAt().AsTime(); at.Before(begun.Add(time.Hour)) || at.After(time.Now().Add(time.Hour)) {
		t.Errorf("after a ping at %v it expires at %v", begun, at)
	}

	// A connection through the proxy, on which nothing is sent.
	h.exec(t, sandbox, sh("setsid python3 -c 'import socket;s=socket.create_server((\"0.0.0.0\",7000));c=s.accept();import time;time.sleep(600)' >/dev/null 2>&1 </dev/null & until ss -ltn | grep -q :7000; do sleep 0.1; done"), nil)
	await.Until(t, "the sandbox is idle after a command", func() bool { return idle() > 0 })
	// Not earlier, because the agent closes connections that are idle for long.
	conn, err := net.Dial("unix", h.Dir.AgentSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET /proxy/%s/7000/ HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", sandbox, token); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "the sandbox is in use by the connection", func() bool { return idle() == 0 })
	conn.Close()
	await.Until(t, "the sandbox is idle after the connection", func() bool { return idle() > 0 })
	h.destroy(t, sandbox)

	// No use.
	r = request()
	r.TimeoutSeconds = 1
	sandbox = h.create(t, r)
	if e := h.event(t, sandbox); e.GetKind() != pb.Event_KIND_EXPIRED || !strings.Contains(e.GetReason(), "1s") {
		t.Errorf("event %v", e)
	}
	h.awaitGone(t, sandbox)
	h.gone(t, sandbox)
}

// awaitGone waits until the agent no longer knows a sandbox.
func (h *host) awaitGone(t *testing.T, sandbox string) {
	t.Helper()
	await.Until(t, "the agent no longer knows the sandbox", func() bool {
		_, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
		return connect.CodeOf(err) == connect.CodeNotFound
	})
}

func TestMachineIsKilled(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, request())
	if err := syscall.Kill(agenttest.QEMU(sandbox), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.loses(t, sandbox, "killed") // see [TestReboot] for what follows
	h.destroy(t, sandbox)
	h.gone(t, sandbox)
}

// TestFailedCreates checks that a creation that fails at any step leaves nothing, and at
// once returns an error that says why.
func TestFailedCreates(t *testing.T) {
	h := newOwnHost(t, nil) // takes the tap from every slot
	// booting starts a creation and returns the machine that boots for it.
	booting := func(r *pb.CreateRequest) (pid int, created chan error) {
		created = make(chan error, 1)
		go func() {
			_, err := h.Create(t.Context(), connect.NewRequest(r))
			created <- err
		}()
		await.Until(t, "a machine starts", func() bool {
			pid = agenttest.QEMU(r.SandboxId)
			return pid != 0
		})
		return pid, created
	}
	// A machine may finish booting before the test breaks it; try again with another.
	early := func(t *testing.T, try func() bool) {
		t.Helper()
		await.Until(t, "the test breaks a machine that boots", try)
	}
	t.Run("the machine is killed", func(t *testing.T) {
		early(t, func() bool {
			r := request()
			pid, created := booting(r)
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			err := <-created
			if err == nil {
				h.awaitGone(t, r.SandboxId)
				return false
			}
			if connect.CodeOf(err) != connect.CodeUnavailable {
				t.Error(err)
			}
			t.Log(err)
			h.gone(t, r.SandboxId)
			return true
		})
	})
	t.Run("it is destroyed", func(t *testing.T) {
		early(t, func() bool {
			r := request()
			_, created := booting(r)
			h.destroy(t, r.SandboxId)
			err := <-created
			if err != nil && (connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "destroyed")) {
				t.Errorf("create ended with %v", err)
			}
			h.gone(t, r.SandboxId)
			return err != nil
		})
	})
	t.Run("the caller disconnects", func(t *testing.T) {
		early(t, func() bool {
			r := request()
			ctx, cancel := context.WithCancel(t.Context())
			created := make(chan error, 1)
			go func() {
				_, err := h.Create(ctx, connect.NewRequest(r))
				created <- err
			}()
			await.Until(t, "a machine starts", func() bool { return agenttest.QEMU(r.SandboxId) != 0 })
			cancel()
			err := <-created
			if err == nil {
				h.destroy(t, r.SandboxId)
				return false
			}
			h.awaitGone(t, r.SandboxId)
			h.gone(t, r.SandboxId)
			return true
		})
	})
	t.Run("the tap is gone", func(t *testing.T) {
		// Take the taps away from the prepared slots.
		names, err := filepath.Glob("/run/wrenn/netns/wrenn-ns-*")
		if err != nil || len(names) == 0 {
			t.Fatal(names, err)
		}
		for _, n := range names {
			if out, err := exec.Command("nsenter", "--net="+n, "ip", "link", "del", "tap0").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		r := request()
		_, err = h.Create(t.Context(), connect.NewRequest(r))
		if err == nil {
			t.Fatal("created without a network")
		}
		t.Log(err)
		h.gone(t, r.SandboxId)
		// Each failure uses up a broken slot; then creations succeed again.
		for range len(names) + 1 {
			r := request()
			if _, err = h.Create(t.Context(), connect.NewRequest(r)); err == nil {
				h.destroy(t, r.SandboxId)
				break
			}
		}
		if err != nil {
			t.Errorf("it does not recover: %v", err)
		}
	})
}

func TestAgentRestarts(t *testing.T) {
	h := newOwnHost(t, nil) // kills the agent
	r := request()
	r.TimeoutSeconds = 3600
	kept := h.create(t, r)
	lost := h.create(t, request())
	h.exec(t, kept, sh("echo remembered > note"), nil)
	pid := agenttest.QEMU(kept)

	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		h.Kill(t, sig)
		if agenttest.QEMU(kept) != pid {
			t.Fatal("the machine did not outlive its agent")
		}
		if sig == syscall.SIGKILL {
			if err := syscall.Kill(agenttest.QEMU(lost), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		h.Start(t)
		if got := h.exec(t, kept, &pb.Command{Cmd: "cat", Args: []string{"note"}}, nil); string(got.GetStdout()) != "remembered\n" || agenttest.QEMU(kept) != pid {
			t.Errorf("after %v: %v", sig, got)
		}
		g, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: kept}))
		if err != nil || g.Msg.GetSandbox().GetTeamId() != r.TeamId || g.Msg.GetSandbox().GetExpiresAt() == nil {
			t.Errorf("taken back as %v, %v", g, err)
		}
		if sig == syscall.SIGKILL {
			h.loses(t, lost, "killed")
			h.destroy(t, lost)
			h.gone(t, lost)
		}
	}

	// Kill the agent during a creation: the next one removes the unfinished sandbox.
	await.Until(t, "the agent is killed while it creates a sandbox", func() bool {
		half := request()
		go func() { _, _ = h.Create(context.Background(), connect.NewRequest(half)) }()
		await.Until(t, "a machine starts", func() bool { return agenttest.QEMU(half.SandboxId) != 0 })
		h.Kill(t, syscall.SIGKILL)
		h.Start(t)
		got, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: half.SandboxId}))
		if err == nil && got.Msg.GetSandbox().GetState() == pb.SandboxState_SANDBOX_STATE_RUNNING {
			h.destroy(t, half.SandboxId) // It was complete already.
			return false
		}
		h.awaitGone(t, half.SandboxId)
		h.gone(t, half.SandboxId)
		return true
	})
	// A second agent on the same data must refuse to start.
	second := exec.Command("/proc/self/exe")
	second.Env = h.Cmd.Env
	if out, err := second.CombinedOutput(); err == nil || !strings.Contains(string(out), "another host agent") {
		t.Errorf("a second agent: %v %s", err, out)
	}
	if got := h.exec(t, kept, sh("echo still"), nil); string(got.GetStdout()) != "still\n" {
		t.Errorf("%v", got)
	}
}

// TestSlowMachine starts an agent while one machine does not respond and another's record
// names a slot that does not exist: both machines survive.
func TestSlowMachine(t *testing.T) {
	h := newOwnHost(t, nil) // kills the agent
	slow, damaged, other := h.create(t, request()), h.create(t, request()), h.create(t, request())
	h.exec(t, slow, sh("echo remembered > note"), nil)
	pid, pidDamaged := agenttest.QEMU(slow), agenttest.QEMU(damaged)
	signal := func(sig syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	state := func(sandbox string) pb.SandboxState {
		t.Helper()
		g, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
		if err != nil {
			t.Fatal(err)
		}
		return g.Msg.GetSandbox().GetState()
	}
	problems := func() map[string]string {
		t.Helper()
		d, err := h.Host(t.Context(), connect.NewRequest(&pb.HostRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]string{}
		for _, p := range d.Msg.GetProblems() {
			all[p.GetObject()] = p.GetKind() + ": " + p.GetMessage()
		}
		return all
	}
	h.Kill(t, syscall.SIGKILL)
	signal(syscall.SIGSTOP)
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	records, err := filepath.Glob(filepath.Join(h.Dir.Sandboxes(), "*", "sandbox.json"))
	if err != nil {
		t.Fatal(err)
	}
	var record, was, wrong string
	for _, path := range records {
		text := read(path)
		if i := strings.Index(text, `"slot": `); strings.Contains(text, fmt.Sprintf(`"pid": %d,`, pidDamaged)) && i >= 0 {
			record, was = path, text
			wrong = text[:i] + `"slot": 99999` + text[i+len(`"slot": `):]
		}
	}
	if record == "" {
		t.Fatalf("no record of the machine %d", pidDamaged)
	}
	if err := os.WriteFile(record, []byte(wrong), 0o600); err != nil {
		t.Fatal(err)
	}
	h.Start(t)
	for _, sandbox := range []string{slow, damaged} {
		if got := state(sandbox); got != pb.SandboxState_SANDBOX_STATE_RESUMING {
			t.Errorf("a sandbox that was set aside is %v", got)
		}
		if p := problems()[sandbox]; !strings.HasPrefix(p, "sandbox: ") {
			t.Errorf("the problem is %q", p)
		}
	}
	if got := h.exec(t, other, sh("echo works"), nil); string(got.GetStdout()) != "works\n" {
		t.Errorf("another sandbox: %v", got)
	}
	signal(syscall.SIGCONT)
	await.Until(t, "the machine is taken back", func() bool { return state(slow) == pb.SandboxState_SANDBOX_STATE_RUNNING })
	if got := h.exec(t, slow, sh("cat note"), nil); string(got.GetStdout()) != "remembered\n" || agenttest.QEMU(slow) != pid {
		t.Errorf("after it was taken back: %v", got)
	}
	if p := problems(); p[slow] != "" || p[damaged] == "" || len(p) != 1 {
		t.Errorf("the problems are %v", p)
	}

	// Repair the record.
	h.Kill(t, syscall.SIGTERM)
	if err := os.WriteFile(record, []byte(was), 0o600); err != nil {
		t.Fatal(err)
	}
	h.Start(t)
	await.Until(t, "the machine is taken back", func() bool { return state(damaged) == pb.SandboxState_SANDBOX_STATE_RUNNING })
	if got := h.exec(t, damaged, sh("echo works"), nil); string(got.GetStdout()) != "works\n" || agenttest.QEMU(damaged) != pidDamaged {
		t.Errorf("after its record was repaired: %v", got)
	}
	if p := problems(); len(p) != 0 {
		t.Errorf("the problems are %v", p)
	}
}

func TestTwentyAtOnce(t *testing.T) {
	h := newOwnHost(t, nil) // counts sandboxes and terminates the agent
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range 20 {
		wg.Go(func() {
			r := request()
			if _, err := h.Create(t.Context(), connect.NewRequest(r)); err != nil {
				t.Errorf("create %d: %v", i, err)
				return
			}
			res, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: r.SandboxId, Command: sh("echo $((6*7))")}))
			if err != nil || string(res.Msg.GetStdout()) != "42\n" {
				t.Errorf("exec %d: %v %v", i, res, err)
			}
		})
	}
	wg.Wait()
	t.Logf("20 created in %v", time.Since(begin))
	list, err := h.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	if err != nil || len(list.Msg.GetSandboxes()) != 20 {
		t.Fatalf("%d sandboxes, %v", len(list.Msg.GetSandboxes()), err)
	}
	begin = time.Now()
	for i, s := range list.Msg.GetSandboxes() {
		if i%2 == 0 { // the agent's end ends the others
			wg.Go(func() { h.destroy(t, s.GetSandboxId()) })
		}
	}
	wg.Wait()
	t.Logf("10 destroyed in %v", time.Since(begin))
	h.Finish(t)
	if _, err := os.Stat(h.Dir.AgentSocket()); err == nil {
		t.Error("the socket still exists")
	}
}
