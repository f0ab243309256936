package agent_test

import (
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// TestOtherProcessor moves a host's disk to a host with another processor: saved
// sandboxes are refused but kept, and resume when the disk is back.
func TestOtherProcessor(t *testing.T) {
	const file = "/proc/cpuinfo"
	model := regexp.MustCompile(`(?m)^(model name\t*: ).*$`)
	other := filepath.Join(t.TempDir(), "cpuinfo")
	here := read(file)
	if !model.MatchString(here) {
		t.Skip("needs " + file + " to name the model of the processor")
	}
	if err := os.WriteFile(other, model.ReplaceAll([]byte(here), []byte("${1}Another Processor")), 0o644); err != nil {
		t.Fatal(err)
	}
	h := newOwnHost(t, nil) // starts the agent on another processor
	r := request()
	sandbox := h.create(t, r)
	h.startCounter(t, sandbox)
	pid, last := h.count(t, sandbox)
	tpl := h.snapshot(t, sandbox, "mine")
	h.pause(t, sandbox)
	begin := func() error {
		r := request()
		r.TeamId, r.TemplateId, r.MemoryMib = tpl.GetTeamId(), tpl.GetTemplateId(), tpl.GetMemoryMib()
		_, err := h.Create(t.Context(), connect.NewRequest(r))
		if err == nil {
			h.destroy(t, r.GetSandboxId())
		}
		return err
	}

	h.Kill(t, syscall.SIGTERM)
	if err := syscall.Mount(other, file, "", syscall.MS_BIND, ""); err != nil { // in the tests' own mount namespace
		t.Fatal(err)
	}
	mounted := true
	unmount := func() {
		if mounted {
			mounted = false
			if err := syscall.Unmount(file, 0); err != nil {
				t.Error(err)
			}
		}
	}
	defer unmount()
	h.Start(t)
	_, err := h.Resume(t.Context(), connect.NewRequest(&pb.ResumeRequest{SandboxId: sandbox}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("resumed on another processor: %v", err)
	}
	t.Logf("a resume says: %v", err)
	if err = begin(); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a snapshot began on another processor: %v", err)
	}
	t.Logf("a create says: %v", err)
	got, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
	if err != nil || got.Msg.GetSandbox().GetState() != pb.SandboxState_SANDBOX_STATE_PAUSED {
		t.Errorf("the refused sandbox is %v, %v", got, err)
	}

	h.Kill(t, syscall.SIGTERM)
	unmount()
	h.Start(t)
	h.resume(t, sandbox)
	h.counts(t, sandbox, pid, last)
	if err := begin(); err != nil {
		t.Errorf("its snapshot, on its own processor: %v", err)
	}
}
