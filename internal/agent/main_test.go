package agent_test

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

func TestMain(m *testing.M) { agenttest.Main(m) }

// TestImages builds the kernel and the template for the other tests.
func TestImages(t *testing.T) {
	in := imagetest.Prepare(t)
	if err := fetchCron(t, debianCron(in)); err != nil {
		t.Log("fetch Debian's cron: ", err)
	}
	if os.Getenv("WRENN_SLOW") != "" {
		if err := fetchAlpine(t, realAlpine(in)); err != nil {
			t.Log("fetch Alpine: ", err)
		}
	}
}

const token = agenttest.Token

// host is an installation with an agent.
type host struct {
	*agenttest.Agent
	shared bool            // with other tests
	seen   map[uint64]bool // events that the method event has returned, by number
}

// newHost returns a host that other tests use at the same time. It may have sandboxes,
// templates and events that are not the test's.
func newHost(t *testing.T) *host {
	t.Helper()
	a := agenttest.Shared(t, func(a *agenttest.Agent) { a.Env["WRENN_LOCAL_REGISTRIES"] = "1" })
	return &host{Agent: a, shared: true, seen: map[uint64]bool{}}
}

// newOwnHost returns a host that only this test uses, with an agent that starts after
// prepare, unless that is nil.
func newOwnHost(t *testing.T, prepare func(h *host)) *host {
	t.Helper()
	a := agenttest.New(t, func(a *agenttest.Agent) {
		if prepare != nil {
			prepare(&host{Agent: a})
		}
	})
	return &host{Agent: a, seen: map[uint64]bool{}}
}

func read(name string) string {
	b, _ := os.ReadFile(name)
	return string(b)
}

func request() *pb.CreateRequest {
	return &pb.CreateRequest{
		SandboxId: id.Format(id.Sandbox, uuid.New()), TeamId: id.Format(id.Team, uuid.New()), TemplateId: id.Format(id.Template, uuid.Nil),
		Vcpus: 1, MemoryMib: 256, AccessToken: "a-sandboxs-token", Envs: map[string]string{"FROM": "sandbox"},
	}
}

// create creates a sandbox and returns its id. On a shared host, it ends with the test.
func (h *host) create(t *testing.T, r *pb.CreateRequest) string {
	t.Helper()
	if h.shared {
		t.Cleanup(func() { h.destroy(t, r.SandboxId) })
	}
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

// gone checks that nothing is left of a sandbox.
func (h *host) gone(t *testing.T, sandbox string) {
	t.Helper()
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(h.Dir.Sandbox(u)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its folder is left: %v", err)
	}
	if pid := agenttest.QEMU(sandbox); pid != 0 {
		t.Errorf("its machine is left: %d", pid)
	}
	// The kernel removes a group shortly after its last process ends.
	await.Until(t, "its control group goes", func() bool { return !strings.Contains(agenttest.Groups(), u.String()) })
	_, err = h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("it is still known: %v", err)
	}
}

// event waits for a sandbox's next event. Unless the host is shared, it acknowledges the
// event and those before it, which may be other tests'.
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
		if !h.shared {
			if _, err := h.AckEvents(ctx, connect.NewRequest(&pb.AckEventsRequest{Seq: e.GetSeq()})); err != nil {
				t.Fatal(err)
			}
		}
		if e.GetSandboxId() == sandbox && !h.seen[e.GetSeq()] {
			h.seen[e.GetSeq()] = true
			return e
		}
	}
	t.Fatalf("no event: %v", s.Err())
	return nil
}

// pattern is a reader of n bytes that differ from place to place.
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
