// Package interpreter_test runs code in the template code-interpreter. It is a separate
// package because the packages that it installs take a while.
package interpreter_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"image/png"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
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
	"github.com/wrenn-dev/wrenn/templates"
)

func TestMain(m *testing.M) { agenttest.Main(m) }

// slow skips a test that takes longer than all other tests together, unless WRENN_SLOW is
// set.
func slow(t *testing.T) {
	t.Helper()
	if os.Getenv("WRENN_SLOW") == "" {
		t.Skip("installs Jupyter and starts it in an emulated guest, which takes 20 minutes: make test WRENN_SLOW=1")
	}
}

// TestImages builds the image for the other test if there is a network.
func TestImages(t *testing.T) {
	slow(t)
	imagetest.Interpreter(t, imagetest.Prepare(t))
}

// host is an installation with an agent.
type host struct{ *agenttest.Agent }

func (h *host) create(t *testing.T, r *pb.CreateRequest) string {
	t.Helper()
	begin := time.Now()
	r.SandboxId, r.AccessToken = id.Format(id.Sandbox, uuid.New()), "a-sandboxs-token"
	if _, err := h.Create(t.Context(), connect.NewRequest(r)); err != nil {
		t.Fatalf("create: %v", err)
	}
	t.Logf("created in %v", time.Since(begin).Round(time.Millisecond))
	return r.SandboxId
}

func (h *host) exec(t *testing.T, sandbox, script string) *pb.ExecResponse {
	t.Helper()
	res, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: &pb.Command{Cmd: "sh", Args: []string{"-c", script}}}))
	if err != nil {
		t.Fatalf("%s: %v", script, err)
	}
	return res.Msg
}

// codeLine is a line of a code interpreter's response.
type codeLine struct {
	Type, Text, HTML, PNG, Name, Value, Traceback string
}

// gateway calls a sandbox's code interpreter.
func (h *host) gateway(t *testing.T, sandbox, method, path string, body any) (int, string) {
	t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, h.Base+"/proxy/"+sandbox+"/49999"+path, bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := h.Plain.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(out)
}

// code runs code in a context, and returns the lines by type, with the texts of each type
// joined.
func (h *host) code(t *testing.T, sandbox, context, code string, timeout int) map[string]codeLine {
	t.Helper()
	begin := time.Now()
	status, out := h.gateway(t, sandbox, "POST", "/execute", map[string]any{"code": code, "context_id": context, "timeout": timeout})
	if status != 200 || !strings.HasSuffix(out, "{\"type\": \"end_of_execution\"}\n") {
		t.Fatalf("%s: %d %s", code, status, out)
	}
	t.Logf("%.40q ran in %v", code, time.Since(begin).Round(time.Millisecond))
	lines := map[string]codeLine{}
	for text := range strings.Lines(out) {
		var l codeLine
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		l.Text = lines[l.Type].Text + l.Text
		lines[l.Type] = l
	}
	return lines
}

// TestCode starts a code interpreter in a sandbox, as its recipe does, and captures it.
// Its sandboxes remember, draw, fail, can be interrupted, and continue after a pause.
func TestCode(t *testing.T) {
	slow(t)
	const team = "code's team"
	owner, base := uuid.NewSHA1(uuid.Nil, []byte(team)), uuid.New()
	h := &host{agenttest.New(t, func(a *agenttest.Agent) {
		made := imagetest.Interpreter(t, a.Images)
		home := a.Dir.Template(owner, base)
		if err := os.MkdirAll(home, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"template.json", "rootfs.ext4"} {
			if err := os.Link(filepath.Join(filepath.Dir(made.Rootfs), name), filepath.Join(home, name)); err != nil {
				t.Fatal(err)
			}
		}
	})}
	folder, err := templates.Folder("code-interpreter")
	if err != nil {
		t.Fatal(err)
	}
	gateway, err := fs.ReadFile(folder, "gateway.py")
	if err != nil {
		t.Fatal(err)
	}
	r := &pb.CreateRequest{TeamId: id.Format(id.Team, owner), TemplateId: id.Format(id.Template, base), Vcpus: 1, MemoryMib: 512}
	builder := h.create(t, r)
	if _, err := h.WriteFile(t.Context(), connect.NewRequest(&pb.WriteFileRequest{File: &pb.FileRef{SandboxId: builder, Path: "/home/user/gateway.py"}, Content: gateway})); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	h.exec(t, builder, "setsid python3 gateway.py >gateway.log 2>&1 </dev/null &")
	if got := h.exec(t, builder, "for i in $(seq 600); do curl -fs http://localhost:49999/health && exit; sleep 1; done; cat gateway.log; exit 1"); got.GetExitCode() != 0 {
		t.Fatalf("the gateway does not answer: %s %s", got.GetStdout(), got.GetStderr())
	}
	t.Logf("the gateway was there after %v", time.Since(begin).Round(time.Millisecond))
	const random = "import random; random.random()"
	h.code(t, builder, "", random, 60)
	tpl, err := h.Snapshot(t.Context(), connect.NewRequest(&pb.SnapshotRequest{SandboxId: builder, TemplateId: id.Format(id.Template, uuid.New()), Name: "code-interpreter"}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Destroy(t.Context(), connect.NewRequest(&pb.DestroyRequest{SandboxId: builder})); err != nil {
		t.Fatal(err)
	}

	r = &pb.CreateRequest{TeamId: id.Format(id.Team, owner), TemplateId: tpl.Msg.GetTemplate().GetTemplateId(), Envs: map[string]string{"FROM": "sandbox"}}
	sandbox := h.create(t, r)
	first := h.code(t, sandbox, "", random, 60)["result"].Text
	if got := h.code(t, sandbox, "", "x = 41", 60); got["error"].Name != "" {
		t.Errorf("%v", got)
	}
	if got := h.code(t, sandbox, "", "x + 1", 60)["result"].Text; got != "42" {
		t.Errorf("x + 1 is %q", got)
	}
	if got := h.code(t, sandbox, "", "import os; os.environ['FROM']", 60)["result"].Text; got != "'sandbox'" {
		t.Errorf("the sandbox's environment: %q", got)
	}
	drawn := h.code(t, sandbox, "", "import matplotlib.pyplot as plt; _ = plt.plot([3, 1, 2]); plt.show()", 120)["result"]
	picture, err := base64.StdEncoding.DecodeString(strings.TrimSpace(drawn.PNG))
	if err != nil {
		t.Fatal(err)
	}
	if img, err := png.Decode(bytes.NewReader(picture)); err != nil || img.Bounds().Dx() < 200 {
		t.Errorf("the chart: %v", err)
	}
	if got := h.code(t, sandbox, "", "import pandas; pandas.DataFrame({'a': [1]})", 120)["result"].HTML; !strings.Contains(got, "<table") {
		t.Errorf("a data frame: %q", got)
	}
	failed := h.code(t, sandbox, "", "print('before')\ndef f(): return 1 / 0\nf()", 60)
	if e := failed["error"]; e.Name != "ZeroDivisionError" || e.Value != "division by zero" || !strings.Contains(e.Traceback, "in f()") || failed["stdout"].Text != "before\n" {
		t.Errorf("an exception: %+v", failed)
	}

	// An endless loop ends at its timeout, or when it is interrupted.
	if got := h.code(t, sandbox, "", "while True: pass", 2)["error"].Name; got != "KeyboardInterrupt" {
		t.Errorf("an endless loop: %q", got)
	}
	ended := make(chan map[string]codeLine, 1)
	go func() {
		ended <- h.code(t, sandbox, "", "open('/tmp/begun', 'w')\nwhile True: pass", 600)
	}()
	await.Until(t, "the loop starts", func() bool { return h.exec(t, sandbox, "test -e /tmp/begun").GetExitCode() == 0 })
	if status, out := h.gateway(t, sandbox, "POST", "/contexts/default/interrupt", nil); status != 204 {
		t.Errorf("interrupt: %d %s", status, out)
	}
	if got := (<-ended)["error"].Name; got != "KeyboardInterrupt" {
		t.Errorf("an interrupted loop: %q", got)
	}

	// Contexts are isolated from each other.
	status, out := h.gateway(t, sandbox, "POST", "/contexts", map[string]any{})
	var other struct{ ID string }
	if err := json.Unmarshal([]byte(out), &other); err != nil || status != 201 {
		t.Fatalf("a context: %d %s", status, out)
	}
	if got := h.code(t, sandbox, other.ID, "x", 60)["error"].Name; got != "NameError" {
		t.Errorf("another context's x: %q", got)
	}
	h.code(t, sandbox, other.ID, "x = 'other'", 60)

	if _, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: sandbox})); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Resume(t.Context(), connect.NewRequest(&pb.ResumeRequest{SandboxId: sandbox})); err != nil {
		t.Fatal(err)
	}
	for context, want := range map[string]string{"": "42", other.ID: "'otherother'"} {
		code := "x + 1"
		if context != "" {
			code = "x * 2"
		}
		if got := h.code(t, sandbox, context, code, 60)["result"].Text; got != want {
			t.Errorf("after a pause: %q, not %s", got, want)
		}
	}
	if status, out := h.gateway(t, sandbox, "DELETE", "/contexts/"+other.ID, nil); status != 204 {
		t.Errorf("remove a context: %d %s", status, out)
	}
	if status, out := h.gateway(t, sandbox, "POST", "/execute", map[string]any{"code": "1", "context_id": other.ID}); status != 404 {
		t.Errorf("a removed context: %d %s", status, out)
	}
	// Two sandboxes of one capture draw different random numbers.
	second := h.create(t, r)
	if got := h.code(t, second, "", random, 60)["result"].Text; got == first {
		t.Errorf("both draw %s", first)
	}
	if got := h.code(t, second, "", "x", 60)["error"].Name; got != "NameError" {
		t.Errorf("another sandbox's x: %q", got)
	}
}
