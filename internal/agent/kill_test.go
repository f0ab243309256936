package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// survivor is a sandbox that must survive every agent of its host.
type survivor struct {
	*host
	team, sandbox string
	pid, last     int // the counter's process and count

	// second and template are what the last operation creates: a sandbox that must not
	// stay, and a template that must be complete or absent.
	second, template string
}

// newSurvivor creates a sandbox that runs the counter.
func (h *host) newSurvivor(t *testing.T) *survivor {
	t.Helper()
	r := request()
	s := &survivor{host: h, team: r.GetTeamId(), sandbox: h.create(t, r)}
	h.startCounter(t, s.sandbox)
	s.pid, s.last = h.count(t, s.sandbox)
	return s
}

// killings are the steps at which a test kills the agent, each with the operation that
// has the step.
var killings = []struct {
	operation, at string
	do            func(*survivor, context.Context) error
}{
	{"pause", "pause: held", (*survivor).doPause},
	{"pause", "pause: saving", (*survivor).doPause},
	{"pause", "pause: saved", (*survivor).doPause},
	{"pause", "pause: committed", (*survivor).doPause},
	{"pause", "pause: vacated", (*survivor).doPauseAndEnd},
	{"resume", "resume: restored", (*survivor).doResume},
	{"resume", "resume: committed", (*survivor).doResume},
	{"resume", "resume: runs", (*survivor).doResume},
	{"snapshot", "snapshot: overlay", (*survivor).doSnapshot},
	{"snapshot", "snapshot: held", (*survivor).doSnapshot},
	{"snapshot", "snapshot: diverted", (*survivor).doSnapshot},
	{"snapshot", "snapshot: saved", (*survivor).doSnapshot},
	{"snapshot", "snapshot: captured", (*survivor).doSnapshot},
	{"snapshot", "snapshot: published", (*survivor).doSnapshot},
	{"fork", "snapshot: saved", (*survivor).doFork},
	{"delete", "delete: renamed", (*survivor).doDelete},
	{"destroy", "clean: recorded", (*survivor).doDestroy},
	{"destroy", "clean: vacated", (*survivor).doDestroy},
	{"destroy", "clean: told", (*survivor).doDestroy},
}

func (s *survivor) doPause(ctx context.Context) error {
	_, err := s.Pause(ctx, connect.NewRequest(&pb.PauseRequest{SandboxId: s.sandbox}))
	return err
}

// doPauseAndEnd waits after a pause until the agent is killed, since the agent kills the
// machine only after it has responded.
func (s *survivor) doPauseAndEnd(ctx context.Context) error {
	if err := s.doPause(ctx); err != nil {
		return err
	}
	select {
	case <-s.Ended:
		return errors.New("the agent has ended")
	case <-time.After(await.Hang):
		return nil
	}
}

func (s *survivor) doResume(ctx context.Context) error {
	if err := s.doPause(ctx); err != nil {
		return err
	}
	_, err := s.Resume(ctx, connect.NewRequest(&pb.ResumeRequest{SandboxId: s.sandbox}))
	return err
}

func (s *survivor) doSnapshot(ctx context.Context) error {
	s.template = id.Format(id.Template, uuid.New())
	_, err := s.Snapshot(ctx, connect.NewRequest(&pb.SnapshotRequest{SandboxId: s.sandbox, TemplateId: s.template, Name: "killed"}))
	return err
}

func (s *survivor) doDelete(ctx context.Context) error {
	if err := s.doSnapshot(ctx); err != nil {
		return err
	}
	_, err := s.DeleteTemplate(ctx, connect.NewRequest(&pb.DeleteTemplateRequest{TeamId: s.team, TemplateId: s.template}))
	return err
}

func (s *survivor) doFork(ctx context.Context) error {
	s.second = id.Format(id.Sandbox, uuid.New())
	_, err := s.Fork(ctx, connect.NewRequest(&pb.ForkRequest{SandboxId: s.sandbox, Copies: []*pb.ForkRequest_Copy{{SandboxId: s.second, AccessToken: "t"}}}))
	return err
}

func (s *survivor) doDestroy(ctx context.Context) error {
	r := request()
	s.second = r.GetSandboxId()
	if _, err := s.Create(ctx, connect.NewRequest(r)); err != nil {
		return err
	}
	_, err := s.Destroy(ctx, connect.NewRequest(&pb.DestroyRequest{SandboxId: s.second}))
	return err
}

// killedAt kills the agent at a step of an operation.
func (s *survivor) killedAt(t *testing.T, at string, do func(*survivor, context.Context) error) {
	t.Helper()
	if err := os.WriteFile(agenttest.KillAt(s.Dir), []byte(at), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := do(s, t.Context()); err == nil {
		t.Fatal("the agent was not killed")
	}
	s.survives(t)
}

// survives starts the next agent and checks what it finds.
func (s *survivor) survives(t *testing.T) {
	t.Helper()
	await.Recv(t, "the end of the agent", s.Ended)
	s.HTTP.CloseIdleConnections()
	if err := os.Remove(agenttest.KillAt(s.Dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	s.Start(t)
	if s.second != "" {
		s.awaitGone(t, s.second)
	}
	list, err := s.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if l := list.Msg.GetSandboxes(); len(l) != 1 || l[0].GetSandboxId() != s.sandbox {
		t.Fatalf("sandboxes %v", l)
	}
	if _, err := s.Resume(t.Context(), connect.NewRequest(&pb.ResumeRequest{SandboxId: s.sandbox})); err != nil {
		t.Fatalf("resume: %v", err)
	}
	s.goesOn(t)
	templates, err := s.Templates(t.Context(), connect.NewRequest(&pb.TemplatesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, tpl := range templates.Msg.GetTemplates() {
		if tpl.GetName() != "killed" {
			continue
		}
		if tpl.GetTemplateId() != s.template {
			t.Errorf("template %v", tpl)
			continue
		}
		s.begins(t, tpl)
		if _, err := s.DeleteTemplate(t.Context(), connect.NewRequest(&pb.DeleteTemplateRequest{TeamId: tpl.GetTeamId(), TemplateId: tpl.GetTemplateId()})); err != nil {
			t.Error(err)
		}
	}
	for _, dir := range []string{s.Dir.Forks(), s.Dir.Images()} {
		if hidden, _ := filepath.Glob(filepath.Join(dir, ".tmp-*")); len(hidden) > 0 {
			t.Errorf("left: %v", hidden)
		}
	}
	if folders, _ := filepath.Glob(filepath.Join(s.Dir.Sandboxes(), "*")); len(folders) != 1 {
		t.Errorf("folders %v", folders)
	}
	if m := s.Machines(); len(m) != 1 {
		t.Errorf("machines %v", m)
	}
	if forks, _ := filepath.Glob(filepath.Join(s.Dir.Forks(), "*")); len(forks) != 0 {
		t.Errorf("forks %v", forks)
	}
	u, _ := id.Parse(id.Sandbox, s.sandbox)
	if saved, _ := filepath.Glob(filepath.Join(s.Dir.Sandbox(u), "state-*")); len(saved) > 1 {
		t.Errorf("states %v", saved)
	}
	s.second, s.template = "", ""
}

// goesOn checks that the sandbox counts and has its identity.
func (s *survivor) goesOn(t *testing.T) {
	t.Helper()
	s.last = s.counts(t, s.sandbox, s.pid, s.last)
	s.isItself(t, s.sandbox)
}

// begins checks a sandbox that starts from the survivor's template, and destroys it.
func (s *survivor) begins(t *testing.T, tpl *pb.Template) {
	t.Helper()
	r := request()
	r.TeamId, r.TemplateId, r.MemoryMib = tpl.GetTeamId(), tpl.GetTemplateId(), tpl.GetMemoryMib()
	sandbox := s.create(t, r)
	s.counts(t, sandbox, s.pid, 0)
	s.destroy(t, sandbox)
}

// TestKilledAtEveryStep kills the agent at every step that involves captured state: the
// next agent has every sandbox, complete, and nothing else.
func TestKilledAtEveryStep(t *testing.T) {
	s := newOwnHost(t, nil).newSurvivor(t) // kills the agent
	for _, k := range killings {
		t.Run(k.operation+", "+k.at, func(t *testing.T) { s.killedAt(t, k.at, k.do) })
	}
	// Kill it at any moment of a pause that merges generations. If the kill comes before
	// the merge, the number of generations stays.
	for i := range 8 {
		t.Run(fmt.Sprintf("merge %d", i), func(t *testing.T) {
			for s.generations(t, s.sandbox) < 1+memory.MaxGenerations {
				if err := s.doResume(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			took := make(chan error, 1)
			go func() { took <- s.doPause(t.Context()) }()
			select {
			case <-time.After(time.Duration(10+25*i) * time.Millisecond): // real time: the kill comes at any moment
			case <-took:
			}
			_ = s.Cmd.Process.Kill()
			s.survives(t)
		})
	}
	s.counted(t, s.sandbox, s.pid)
}
