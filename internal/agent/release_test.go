package agent_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// TestOtherReleases starts an agent on the data of an earlier release, with one damaged
// record, and then on a record of a later release.
func TestOtherReleases(t *testing.T) {
	paused, torn := uuid.MustParse("00000000-0000-4000-8000-000000000001"), uuid.MustParse("00000000-0000-4000-8000-000000000002")
	template := uuid.MustParse("00000000-0000-4000-8000-000000000003")
	h := newOwnHost(t, func(h *host) {
		all := filepath.Join(string(h.Dir), "earlier")
		err := os.Mkdir(all, 0o700)
		if out, e := exec.Command("tar", "-C", all, "-xzf", "sandbox/testdata/data-1.tar.gz").CombinedOutput(); e != nil {
			t.Fatalf("%v: %s", e, out)
		}
		err = errors.Join(err,
			os.Rename(filepath.Join(all, "sandboxes"), h.Dir.Sandboxes()),
			os.Rename(filepath.Join(all, "events"), h.Dir.Events()),
			os.Rename(filepath.Join(all, "images", "teams", uuid.Nil.String(), template.String()), h.Dir.Template(uuid.Nil, template)),
			os.RemoveAll(all), // the data has its own base image
			os.Truncate(h.Dir.SandboxRecord(torn), 10))
		if err != nil {
			t.Fatal(err)
		}
	})
	state := func() pb.SandboxState {
		t.Helper()
		g, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: id.Format(id.Sandbox, paused)}))
		if err != nil {
			t.Fatal(err)
		}
		return g.Msg.GetSandbox().GetState()
	}
	if got := state(); got != pb.SandboxState_SANDBOX_STATE_PAUSED {
		t.Errorf("the paused sandbox is %v", got)
	}
	if e := h.event(t, id.Format(id.Sandbox, paused)); e.GetSeq() != 2 || e.GetKind() != pb.Event_KIND_PAUSED {
		t.Errorf("the event is %v", e)
	}
	if e := h.event(t, id.Format(id.Sandbox, torn)); e.GetKind() != pb.Event_KIND_EXITED {
		t.Errorf("the event of the damaged one is %v", e)
	}
	h.awaitGone(t, id.Format(id.Sandbox, torn))
	templates, err := h.Templates(t.Context(), connect.NewRequest(&pb.TemplatesRequest{}))
	if err != nil || len(templates.Msg.GetTemplates()) != 2 {
		t.Errorf("the templates are %v, %v", templates, err)
	}
	items, err := unreadable.List(h.Dir)
	if err != nil || len(items) != 1 || items[0].From != h.Dir.Sandbox(torn) {
		t.Errorf("set aside %+v, %v", items, err)
	}
	described, err := h.Host(t.Context(), connect.NewRequest(&pb.HostRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	reported := false
	for _, p := range described.Msg.GetProblems() {
		reported = reported || p.GetKind() == "unreadable" && p.GetObject() == "sandbox" && strings.Contains(p.GetMessage(), h.Dir.Unreadable())
	}
	if !reported {
		t.Errorf("the host's problems are %v", described.Msg.GetProblems())
	}

	h.Kill(t, syscall.SIGTERM)
	record := h.Dir.SandboxRecord(paused)
	was, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	put := func(text string) {
		t.Helper()
		if err := os.WriteFile(record, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	later := strings.Replace(string(was), `"version": 2`, `"version": 3`, 1)
	put(later)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = h.Cmd.Env
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), record+" has format version 3") || !strings.Contains(string(out), "versions up to 2") {
		t.Errorf("on a later release's record: %v %s", err, out)
	}
	if now, err := os.ReadFile(record); err != nil || string(now) != later {
		t.Errorf("the record has changed: %v", err)
	}
	put(string(was))
	h.Start(t)
	if got := state(); got != pb.SandboxState_SANDBOX_STATE_PAUSED {
		t.Errorf("afterwards the paused sandbox is %v", got)
	}
}
