package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
)

// operator follows the manual on a control plane and its only host.
type operator struct {
	*control
	host     string
	hostEnv  []string
	agent    *role
	etc      string // instead of /etc/wrenn
	copies   string // the folder in which the commands run
	drained  func() // waits until the drain has paused what it pauses
	token    string // the last one that a command printed
	packages int    // how many the manual installs
}

// hostToken matches what a host registers with.
var hostToken = regexp.MustCompile(`wrnh_[[:alnum:]]+`)

// follow runs the commands of a block. It does not install packages, because the test must
// not change this machine.
func (o *operator) follow(t *testing.T, block string) {
	t.Helper()
	for line := range strings.Lines(block) {
		line, _, _ = strings.Cut(line, "  #")
		line = strings.TrimSpace(line)
		verb, rest, _ := strings.Cut(line, " ")
		switch verb {
		case "apt-get":
			o.packages++
			if strings.Contains(rest, "--allow-downgrades") {
				continue // The manual has stopped the service before, and starts it.
			}
			for _, service := range []string{"wrenn-server", "wrenn-agent"} { // as deploy/deb/postinst does
				o.systemctl(t, "restart", service)
			}
		case "systemctl":
			do, service, _ := strings.Cut(rest, " ")
			o.systemctl(t, do, service)
		default:
			o.run(t, line)
		}
	}
}

// run runs one command, with the test's folders instead of the system's.
func (o *operator) run(t *testing.T, line string) {
	t.Helper()
	script := strings.NewReplacer("/etc/wrenn", o.etc, "wrnh_…", o.token).Replace(of(o.dirs[o.host], line+"\n"))
	if strings.HasPrefix(line, "wrenn key rotate-secret") {
		script = strings.TrimSpace(script) + " --file " + filepath.Join(o.etc, "server.env")
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = o.copies
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(o.wrenn)+":"+os.Getenv("PATH"), "WRENN_URL="+o.url, "WRENN_API_KEY="+o.key, "DATABASE_URL="+o.database)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	switch {
	case strings.HasPrefix(line, "wrenn host drain "):
		o.drained()
	case strings.HasPrefix(line, "wrenn host token "):
		if o.token = hostToken.FindString(string(out)); o.token == "" {
			t.Fatalf("%s prints %s", line, out)
		}
	}
}

// settings returns the lines of a file in the operator's /etc/wrenn.
func (o *operator) settings(t *testing.T, name string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(o.etc, name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(text))
}

func (o *operator) systemctl(t *testing.T, do, service string) {
	t.Helper()
	of := map[string]**role{"wrenn-server": &o.server, "wrenn-agent": &o.agent}[service]
	if of == nil || do != "start" && do != "stop" && do != "restart" {
		t.Fatalf("the manual runs systemctl %s %s", do, service)
	}
	if do != "start" {
		(*of).signal(syscall.SIGTERM)
	}
	if do == "stop" {
		return
	}
	if service == "wrenn-server" {
		o.env = append(o.env, o.settings(t, "server.env")...)
		o.server = o.startServer(o.listen)
		within(t, 5*time.Minute, "the server answers", func() bool { status, _ := o.call("GET", "/health", nil); return status == 200 })
		return
	}
	o.agent = launch(o.T, "agent", append(o.hostEnv, o.settings(t, "agent.env")...), o.wrenn, "agent")
	within(t, 5*time.Minute, "the host is there", func() bool { s := o.status(o.host); return s == "online" || s == "draining" })
}

// TestUpgrade follows docs/backup.md and docs/upgrade.md. It copies a host and restores
// it, upgrades server and agent, rolls both back, and replaces the secret key. Both
// releases are the same program: other tests check that each release can read the other's
// data. A migration that this program does not know stands for the later release's schema.
func TestUpgrade(t *testing.T) {
	if os.Getenv("WRENN_SLOW") == "" {
		t.Skip("restarts server and agent ten times, which takes minutes: make test WRENN_SLOW=1")
	}
	if why := unable(); why != "" {
		t.Skip(why)
	}
	o := &operator{control: newControl(t, "WRENN_DRAIN_IDLE=1s"), copies: t.TempDir(), etc: t.TempDir()}
	for name, text := range map[string]string{"server.env": "WRENN_SECRET_KEY=" + strings.Repeat("ab", 32) + "\n", "agent.env": ""} {
		if err := os.WriteFile(filepath.Join(o.etc, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	o.host, o.hostEnv = o.control.host("rack-1", "127.0.0.2:7070")
	o.systemctl(t, "start", "wrenn-agent")
	never := 0
	create := func() string {
		t.Helper()
		s, err := o.Create(t.Context(), client.CreateOptions{MemoryMiB: 128, TimeoutSeconds: &never})
		if err != nil {
			t.Fatal(err)
		}
		return s.ID
	}
	kept := create()
	defer func() { o.destroy([]string{kept}) }()
	begun := time.Now()
	// A file of a tmpfs is in the guest's memory.
	remembers := func(after, cmd string) {
		t.Helper()
		var got *client.Result
		var err error
		within(t, 5*time.Minute, "a command runs after "+after, func() bool {
			got, err = o.Exec(t.Context(), kept, client.Command{Cmd: cmd, Shell: true, TimeoutSeconds: 120}, nil)
			return err == nil
		})
		t.Logf("%v: after %s", time.Since(begun).Round(time.Second), after)
		if string(got.Stdout) != "kept\n" {
			t.Errorf("after %s: %+v", after, got)
		}
	}
	remembers("the creation", "echo kept > /dev/shm/mine; cat /dev/shm/mine")

	o.drained = func() {
		within(t, 5*time.Minute, "the sandbox is paused", func() bool { return o.state(kept) == "paused" })
	}
	steps := commands(t, "backup.md", "A host")
	if len(steps) != 4 {
		t.Fatalf("the page has %d blocks for a host", len(steps))
	}
	for _, step := range steps {
		o.follow(t, step)
	}
	remembers("a restore of its host", "cat /dev/shm/mine")

	upgrade, back := commands(t, "upgrade.md", "Upgrade"), commands(t, "upgrade.md", "Roll back")
	if len(upgrade) != 2 || len(back) != 2 {
		t.Fatalf("the page has %d and %d blocks", len(upgrade), len(back))
	}
	machine := agenttest.QEMU(kept)
	o.follow(t, upgrade[0])
	o.follow(t, upgrade[1])
	remembers("an upgrade", "cat /dev/shm/mine")
	o.run(t, `psql "$DATABASE_URL" --command='CREATE TABLE later (sandbox_id uuid REFERENCES sandboxes)' --command='INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, true)'`)
	since := create()
	o.follow(t, back[0])
	remembers("a rollback of the agent", "cat /dev/shm/mine")

	// The server of before does not start on the later schema, and its exit status tells
	// systemd not to try again.
	o.server.signal(syscall.SIGTERM)
	refused := o.startServer(o.listen)
	select {
	case <-refused.ended:
	case <-time.After(5 * time.Minute):
		t.Fatal("a server runs on a later schema")
	}
	if code := refused.cmd.ProcessState.ExitCode(); code != 78 {
		t.Errorf("a server on a later schema ends with status %d", code)
	}
	o.follow(t, back[1])
	within(t, 5*time.Minute, "the server refuses credentials that the database does not know", func() bool { return o.status(o.host) == "unreachable" })
	credentials := commands(t, "backup.md", "New credentials for a host")
	if len(credentials) != 2 {
		t.Fatalf("the page has %d blocks for a host's credentials", len(credentials))
	}
	for _, step := range credentials {
		o.follow(t, step)
	}
	remembers("a rollback of the server", "cat /dev/shm/mine")
	if _, err := o.Get(t.Context(), since); !client.IsNotFound(err) {
		t.Errorf("a sandbox that was created after the backup: %v", err)
	}
	within(t, 5*time.Minute, "the host has destroyed what the database does not have", func() bool { return agenttest.QEMU(since) == 0 })

	for _, step := range commands(t, "upgrade.md", "The secret key") {
		o.follow(t, step)
	}
	if ring := o.settings(t, "server.env"); len(ring) != 1 || strings.ContainsAny(ring[0], ",") || strings.Contains(ring[0], strings.Repeat("ab", 32)) {
		t.Error("the secret key was not replaced")
	}
	remembers("a new secret key", "cat /dev/shm/mine")
	if now := agenttest.QEMU(kept); now != machine || machine == 0 {
		t.Errorf("the sandbox's machine was %d, and is %d", machine, now)
	}
	if o.packages != 3 {
		t.Errorf("the page installs %d packages", o.packages)
	}
}
