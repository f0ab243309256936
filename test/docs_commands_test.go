package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/client"
)

// commands returns the indented blocks of a docs page, below one heading or all of them.
func commands(t *testing.T, page, heading string) (blocks []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("../docs", page))
	if err != nil {
		t.Fatal(err)
	}
	inside, last := heading == "", ""
	for line := range strings.Lines(string(text)) {
		if h, is := strings.CutPrefix(line, "## "); is {
			inside = heading == "" || strings.TrimSpace(h) == heading
		}
		code, is := strings.CutPrefix(line, "    ")
		switch {
		case !is || !inside:
		case strings.HasPrefix(last, "    "):
			blocks[len(blocks)-1] += code
		default:
			blocks = append(blocks, code)
		}
		last = line
	}
	return blocks
}

// follow runs commands of the manual in an existing folder, with the installation's own
// directory instead of /var/lib/wrenn.
func (i *installation) follow(t *testing.T, dir, script string) {
	t.Helper()
	if _, err := i.try(t, "cd "+dir+"\n"+script); err != nil {
		t.Fatal(err)
	}
}

// of replaces /var/lib/wrenn in commands with an installation's own directory.
func of(dir, script string) string {
	parent := filepath.Dir(dir)
	return strings.NewReplacer("/var/lib/wrenn", dir, "/var/lib wrenn", parent+" "+filepath.Base(dir), "-C /var/lib\n", "-C "+parent+"\n").Replace(script)
}

// try runs commands like follow, and returns their output.
func (i *installation) try(t *testing.T, script string, env ...string) (string, error) {
	t.Helper()
	script = of(i.dir, script)
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
	cmd.Env = append(append(os.Environ(), "PATH="+filepath.Dir(i.wrenn)+":"+os.Getenv("PATH"), "WRENN_DIR="+i.dir, "WRENN_URL="+i.creds.URL, "WRENN_API_KEY="+i.creds.APIKey), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", script, err, out)
	}
	return string(out), nil
}

// TestTroubleshooting checks that the page's commands work and show what the page says.
func TestTroubleshooting(t *testing.T) {
	i := up(t)
	s := i.sandbox(t, client.CreateOptions{})
	var printed strings.Builder
	blocks := commands(t, "troubleshooting.md", "")
	for _, block := range blocks {
		// The log reaches the disk shortly after the response.
		eventually(t, func() error {
			out, err := i.try(t, block, "SANDBOX="+s.ID)
			printed.WriteString(out)
			return err
		})
	}
	if len(blocks) < 5 {
		t.Errorf("the page has %d blocks of commands", len(blocks))
	}
	for _, want := range []string{s.ID, "qemu-system-x86", "request_id=", "online", "createSandbox"} {
		if !strings.Contains(printed.String(), want) {
			t.Errorf("the commands do not print %q:\n%s", want, printed.String())
		}
	}
}

// TestBackup checks that data copied while `wrenn up` was stopped works after it is
// restored.
func TestBackup(t *testing.T) {
	if why := unable(); why != "" {
		t.Skip(why)
	}
	dir, err := newDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { discard(t, dir) })
	begin := func() *installation {
		listen, err := freeAddress()
		if err != nil {
			t.Fatal(err)
		}
		i, err := start(dir, listen)
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	i := begin()
	s, err := i.client(t).Create(t.Context(), client.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := i.client(t).WriteFile(t.Context(), s.ID, "/home/user/kept", "", strings.NewReader("kept")); err != nil {
		t.Fatal(err)
	}
	if err := i.stop(); err != nil {
		t.Fatal(err)
	}
	steps := commands(t, "backup.md", "One machine")
	if len(steps) != 2 {
		t.Fatalf("the page has %d blocks", len(steps))
	}
	copies := t.TempDir()
	i.follow(t, copies, steps[0])

	// The copy does not have later events.
	if err := os.RemoveAll(filepath.Join(dir, "sandboxes")); err != nil {
		t.Fatal(err)
	}
	i.follow(t, copies, steps[1])
	i = begin()
	defer func() {
		if err := i.stop(); err != nil {
			t.Error(err)
		}
	}()
	if _, err := i.client(t).Resume(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	got, err := i.client(t).Exec(t.Context(), s.ID, client.Command{Cmd: "cat", Args: []string{"kept"}}, nil)
	if err != nil || string(got.Stdout) != "kept" {
		t.Errorf("the sandbox has %+v, %v", got, err)
	}
}
