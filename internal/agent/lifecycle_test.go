package agent_test

import (
	"os"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qemu"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// TestWholeLife runs one sandbox through every operation of a host: commands, requests,
// pauses, a snapshot, a fork, and killed agents, once in each operation or, under
// WRENN_SLOW, at every step. WRENN_TEST_PAUSES is the number of pauses (3).
func TestWholeLife(t *testing.T) {
	slow := os.Getenv("WRENN_SLOW") != ""
	if !slow && vmmtest.Accelerator() != qemu.KVM {
		t.Skip("without KVM, other tests cover its parts; WRENN_SLOW=1 runs it")
	}
	pauses := vmmtest.Count(t, "WRENN_TEST_PAUSES", 3)
	h := newOwnHost(t, nil) // kills the agent
	s := h.newSurvivor(t)

	t.Run("exec", func(t *testing.T) {
		got := h.exec(t, s.sandbox, sh("cat; echo $FROM; exit 7"), []byte("input\n"))
		if string(got.GetStdout()) != "input\nsandbox\n" || got.GetExitCode() != 7 {
			t.Errorf("got %v", got)
		}
	})
	t.Run("pauses", func(t *testing.T) {
		most := 0
		for range pauses {
			h.pause(t, s.sandbox)
			most = max(most, h.generations(t, s.sandbox))
			h.resume(t, s.sandbox)
			s.goesOn(t)
		}
		t.Logf("%d generations at most after %d pauses", most, pauses)
		if most < 2 || most > 1+memory.MaxGenerations {
			t.Errorf("after %d pauses there were %d generations at most", pauses, most)
		}
	})
	t.Run("snapshot", func(t *testing.T) {
		tpl := h.snapshot(t, s.sandbox, "mine")
		s.goesOn(t)
		s.begins(t, tpl)
		if _, err := h.DeleteTemplate(t.Context(), connect.NewRequest(&pb.DeleteTemplateRequest{TeamId: tpl.GetTeamId(), TemplateId: tpl.GetTemplateId()})); err != nil {
			t.Error(err)
		}
	})
	t.Run("fork", func(t *testing.T) {
		c := id.Format(id.Sandbox, uuid.New())
		if _, err := h.Fork(t.Context(), connect.NewRequest(&pb.ForkRequest{SandboxId: s.sandbox, Copies: []*pb.ForkRequest_Copy{{SandboxId: c, AccessToken: "t"}}})); err != nil {
			t.Fatal(err)
		}
		h.counts(t, c, s.pid, s.last)
		h.isItself(t, c)
		s.goesOn(t)
		h.destroy(t, c)
		h.gone(t, c)
	})
	killed := map[string]bool{}
	for _, k := range killings {
		if killed[k.operation] && !slow {
			continue
		}
		killed[k.operation] = true
		t.Run("killed in "+k.operation+", "+k.at, func(t *testing.T) { s.killedAt(t, k.at, k.do) })
	}
	h.counted(t, s.sandbox, s.pid)
	h.destroy(t, s.sandbox)
	h.gone(t, s.sandbox)
}
