package doctor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/deploy/deploytest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/flock"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/settings"
)

func TestExamineThisMachine(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	in := imagetest.Prepare(t)
	deploytest.Caddy(t)
	for _, f := range Examine(t.Context(), in.Dir, in.Envd, false) {
		t.Logf("%+v", f)
		if f.Required && !f.OK {
			t.Errorf("%s: %s", f.Name, f.Detail) // `make test-deps` installs everything
		}
		if !f.OK && f.Fix == "" {
			t.Errorf("%s has no fix", f.Name)
		}
	}
}

// TestConfigured checks that doctor uses the agent's settings in the settings file, and
// lists what is wrong with the file.
func TestConfigured(t *testing.T) {
	file := filepath.Join(t.TempDir(), "wrenn.yaml")
	t.Setenv(settings.FileVariable, file)
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	data := t.TempDir()
	t.Setenv("WRENN_DIR", "")
	os.Unsetenv("WRENN_DIR")
	write("agent:\n  envd: /opt/envd\n  dir: " + data + "\n  wram: 2\nserver:\n  lsten: x\nsever:\n  listen: x\n")
	for _, agent := range []bool{true, false} {
		set, findings := configured(agent)
		if set["WRENN_ENVD"] != "/opt/envd" || set["WRENN_DIR"] != data {
			t.Errorf("it has %q, %q", set["WRENN_ENVD"], set["WRENN_DIR"])
		}
		var said strings.Builder
		for _, f := range findings {
			if f.OK || f.Required || f.Fix == "" {
				t.Errorf("%+v", f)
			}
			fmt.Fprintln(&said, f.Detail)
		}
		for want, has := range map[string]bool{"agent.wram is not a setting: did you mean warm?": true, "sever is not a section: did you mean server?": true, "server.lsten is not a setting": !agent} {
			if strings.Contains(said.String(), want) != has {
				t.Errorf("with --agent %v: %q: %v, in\n%s", agent, want, !has, said.String())
			}
		}
	}
	write("agent: [")
	if _, findings := configured(true); len(findings) != 1 || !findings[0].Required || !strings.Contains(findings[0].Detail, file) {
		t.Errorf("of a file with an error: %+v", findings)
	}
	var out bytes.Buffer
	write("agent:\n  dir: " + data + "/nothing\n")
	cmd := Command(&out)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs([]string{"--agent"})
	_ = cmd.ExecuteContext(t.Context()) // this machine may lack something
	if want := "free at " + data; !strings.Contains(out.String(), want) {
		t.Errorf("it does not look at the data directory %s:\n%s", data, out.String())
	}
}

func TestReport(t *testing.T) {
	findings := []Finding{
		{Name: "a", OK: true, Required: true, Detail: "there"},
		{Name: "b", Required: true, Detail: "gone", Fix: "get b", Package: "b-server"},
		{Name: "c", Detail: "gone", Fix: "get c"},
	}
	var table, js bytes.Buffer
	if err := errors.Join(report(&table, "table", findings), report(&js, "json", findings)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ok       a", "MISSING  b", "fix: get b", "note     c", "--no-install-recommends b-server\n"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("no %q in\n%s", want, table.String())
		}
	}
	var back []Finding
	if err := json.Unmarshal(js.Bytes(), &back); err != nil || len(back) != 3 || back[1] != findings[1] {
		t.Errorf("got %v, %v", back, err)
	}
}

// TestKept checks that doctor shows what the agent could not read, also while no agent
// runs.
func TestKept(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	if got := kept(dir); len(got) != 0 {
		t.Errorf("of an empty directory it reports %+v", got)
	}
	home := dir.Sandbox(uuid.New())
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	item, err := unreadable.Move(dir, unreadable.Sandbox, home, errors.New("torn record"))
	if err != nil {
		t.Fatal(err)
	}
	if got := kept(dir); len(got) != 1 || got[0].OK || got[0].Required || !strings.Contains(got[0].Detail, item.Path) ||
		!strings.Contains(got[0].Detail, "torn record") || !strings.Contains(got[0].Fix, home) {
		t.Errorf("it reports %+v", got)
	}
	if err := os.WriteFile(dir.Events(), []byte("wrnjrnl9"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := kept(dir); len(got) != 2 || !got[0].Required || !strings.Contains(got[0].Detail, "version 9") || got[0].Fix == "" {
		t.Errorf("it reports %+v", got)
	}
}

// TestReported checks that doctor shows a running agent's problems of the host.
func TestReported(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	if got := reported(dir); len(got) > 0 {
		t.Errorf("without an agent: %v", got)
	}
	if err := os.MkdirAll(dir.Run(), 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := flock.TryLock(dir.AgentLock())
	if err != nil {
		t.Fatal(err)
	}
	l := problem.Open(dir.Problems(), slog.New(slog.DiscardHandler))
	l.Report(problem.Firewall, "", "packets are dropped")
	got := reported(dir)
	if len(got) != 1 || got[0].OK || got[0].Required || got[0].Name != "firewall" || !strings.Contains(got[0].Detail, "packets are dropped") {
		t.Errorf("got %+v", got)
	}
	if _, err := noObstacles(t.Context(), dir); err != nil {
		t.Errorf("beside a running agent: %v", err)
	}
	// Kill the agent, and let an hour pass.
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	then := time.Now().Add(-time.Hour)
	if err := os.Chtimes(dir.Problems(), then, then); err != nil {
		t.Fatal(err)
	}
	got = reported(dir)
	if len(got) != 2 || got[0].Name != "agent" || !strings.Contains(got[0].Detail, "no agent runs") || !strings.Contains(got[0].Detail, "1h0m") ||
		strings.Contains(got[1].Detail, "the agent reports") || !strings.Contains(got[1].Detail, "packets are dropped") {
		t.Errorf("without its agent: %+v", got)
	}
}
