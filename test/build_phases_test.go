package e2e

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// disk mounts a file system of the given size for a test.
func disk(t *testing.T, bytes int64) string {
	t.Helper()
	file, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, bytes); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-m", "0", file).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", file, dir).CombinedOutput(); err != nil {
		t.Skipf("needs a loop device for a disk to fill: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	// The agent's users must be able to traverse it.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestBuildPhases interrupts builds in each phase: they are cancelled, their server is
// killed, a step fails or takes too long, or the host's disk is full. The reported reason
// is true, and nothing of them is left on the host, in the database or among the
// machines.
func TestBuildPhases(t *testing.T) {
	if why := unable(); why != "" {
		t.Skip(why)
	}
	if os.Getenv("WRENN_SLOW") == "" {
		t.Skip("interrupts a build fifteen times, which takes minutes; other tests do it with a fake host: make test WRENN_SLOW=1")
	}
	room := disk(t, 4<<30)
	c := newControl(t, "WRENN_BUILD_LEASE=3s")
	t.Setenv("TMPDIR", room)
	host, env := c.host("builds", "127.0.0.5:7070")
	launch(t, "agent", env, c.wrenn, "agent")
	within(t, 5*time.Minute, "the host is online", func() bool { return c.status(host) == "online" })
	conn, err := pgx.Connect(t.Context(), c.database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())

	start := func(o client.BuildOptions) string {
		t.Helper()
		o.Name, o.NoCache = "phases", true
		b, err := c.Build(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		return b.ID
	}
	show := func(build string) *client.Build {
		b, err := c.GetBuild(t.Context(), build)
		if err != nil {
			return &client.Build{}
		}
		return b
	}
	endedWhile := func(build string, doing func()) *client.Build {
		t.Helper()
		var b *client.Build
		within(t, 3*time.Minute, "the build has ended", func() bool {
			doing()
			b = show(build)
			return b.State != "" && b.State != "queued" && b.State != "running"
		})
		return b
	}
	ended := func(build string) *client.Build {
		t.Helper()
		return endedWhile(build, func() {})
	}
	count := func(query string) (n int) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), query).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	files := func(pattern string) int {
		t.Helper()
		found, err := filepath.Glob(filepath.Join(c.dirs[host], pattern))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	// nothing waits until no sandbox, machine, folder or row of a build is left.
	nothing := func(after string) {
		t.Helper()
		within(t, 2*time.Minute, "nothing is left after "+after, func() bool {
			return count(`SELECT (SELECT count(*) FROM sandboxes WHERE state NOT IN ('stopped', 'error'))
				+ (SELECT count(*) FROM templates WHERE state <> 'ready')
				+ (SELECT count(*) FROM builds WHERE worker IS NOT NULL OR lease_until IS NOT NULL OR registry IS NOT NULL)
				+ (SELECT count(*) FROM build_steps WHERE log->>'state' IN ('pending', 'running'))`) == 0 &&
				files("sandboxes/*") == 0 && files("images/teams/*/.tmp-*")+files("images/.tmp-*") == 0 &&
				files("images/teams/*/*/template.json") == count("SELECT count(*) FROM templates")
		})
		rows, err := conn.Query(t.Context(), "SELECT id FROM sandboxes")
		if err != nil {
			t.Fatal(err)
		}
		ids, err := pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range ids {
			if pid := agenttest.QEMU(id.Format(id.Sandbox, u)); pid != 0 {
				t.Errorf("after %s a build's machine still runs", after)
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}

	// apt takes a while, but needs no server here. real time: a server that starts again must
	// find each step running, and the step must then end.
	base, err := c.Build(t.Context(), client.BuildOptions{Name: "base", SkipPrePost: true, NoCache: true, Recipe: `FROM minimal
RUN rm -rf /etc/apt/sources.list*; printf '#!/bin/sh\nsleep 1.5\nexec /usr/bin/apt-get "$@"\n' > /usr/local/bin/apt-get; chmod +x /usr/local/bin/apt-get
HEALTHCHECK CMD true
`})
	if err != nil {
		t.Fatal(err)
	}
	if b := ended(base.ID); b.State != "succeeded" {
		t.Fatalf("%s: %s", b.State, b.Error)
	}
	nothing("the base")
	// real time: as above.
	const text = "FROM base\nRUN echo so far; sleep 2\nSTART sleep 1000\nHEALTHCHECK CMD sleep 2\n"
	phases := map[string]int{"pre": 1, "recipe": 2, "post": 3, "start": 6, "check": 7, "capture": 8}
	// reach waits until a step runs.
	reach := func(build string, number int) {
		t.Helper()
		within(t, 2*time.Minute, "the step runs", func() bool {
			b := show(build)
			if b.State != "queued" && b.State != "running" && b.State != "" {
				t.Fatalf("%s before step %d: %s", b.State, number, b.Error)
			}
			return len(b.Steps) >= number && b.Steps[number-1].State == "running"
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		for phase, number := range phases {
			build := start(client.BuildOptions{Recipe: text})
			reach(build, number)
			was, err := c.CancelBuild(t.Context(), build)
			if err != nil {
				t.Fatal(err)
			}
			b := ended(build)
			if was.State == "succeeded" { // the build was faster
				t.Logf("%s: had succeeded", phase)
				nothing(phase + ", too late")
				continue
			}
			if b.State != "cancelled" || b.TemplateID != "" {
				t.Errorf("cancelled in %s: %s %s", phase, b.State, b.Error)
			}
			for _, s := range b.Steps {
				want := map[bool]string{true: "succeeded", false: "skipped"}[s.Number < number]
				// The start command and its health check run at the same time.
				both := number == phases["start"] || number == phases["check"]
				if both && (s.Number == phases["start"] || s.Number == phases["check"]) {
					want = "cancelled"
				} else if s.Number == number {
					want = s.State
				}
				if s.State != want && !(both && s.State == "skipped") {
					t.Errorf("cancelled in %s: step %d is %s, not %s", phase, s.Number, s.State, want)
				}
				if s.Number == 2 && number > 2 && !strings.Contains(s.Output, "so far\n") {
					t.Errorf("cancelled in %s: step %d printed %q", phase, s.Number, s.Output)
				}
			}
			nothing("a build cancelled in " + phase)
		}
	})
	t.Run("killed", func(t *testing.T) {
		for phase, number := range phases {
			build := start(client.BuildOptions{Recipe: text})
			reach(build, number)
			c.server.signal(syscall.SIGKILL)
			c.server = c.startServer(c.listen)
			within(t, 2*time.Minute, "the server answers", func() bool { return show(build).State != "" })
			if b := ended(build); b.State != "succeeded" || b.DoneSteps != b.TotalSteps {
				t.Errorf("killed in %s: %s %s %d of %d", phase, b.State, b.Error, b.DoneSteps, b.TotalSteps)
			}
			nothing("its server was killed in " + phase)
		}
	})
	t.Run("failing", func(t *testing.T) {
		for what, o := range map[string]client.BuildOptions{
			"step 1 (RUN echo so far; exit 3) ended with exit code 3":    {Recipe: "FROM base\nRUN echo so far; exit 3\nRUN never\n", SkipPrePost: true},
			"step 1 (RUN echo so far; sleep 100) did not end within 2s":  {Recipe: "FROM base\nRUN echo so far; sleep 100\nRUN never\n", SkipPrePost: true, StepTimeoutSeconds: 2},
			"step 1 (apt-get update) did not end within 1s":              {Recipe: "FROM base\nRUN never\n", PhaseTimeoutSeconds: 1},
			"START ended with exit code 4 before the template was ready": {Recipe: "FROM base\nSTART exit 4\nHEALTHCHECK --interval=1s CMD exit 1\n", SkipPrePost: true},
			"the health check failed 2 times, with exit code 5 at last":  {Recipe: "FROM base\nHEALTHCHECK --interval=1s --retries=2 CMD exit 5\n", SkipPrePost: true},
		} {
			b := ended(start(o))
			if b.State != "failed" || b.Error != what {
				t.Errorf("%q: %s %q", what, b.State, b.Error)
			}
			if s := b.Steps[0]; strings.Contains(o.Recipe, "so far") && (s.State != "failed" || s.Output != "so far\n") {
				t.Errorf("%q: the step is %s and printed %q", what, s.State, s.Output)
			}
			nothing(what)
		}
	})
	t.Run("full disk", func(t *testing.T) {
		// The host's disk is full when the build writes to it.
		build := start(client.BuildOptions{Recipe: text, SkipPrePost: true})
		reach(build, 1)
		filler, err := os.Create(filepath.Join(room, "filler"))
		if err != nil {
			t.Fatal(err)
		}
		defer filler.Close()
		// It stays full, although templates of earlier builds are removed during this
		// build.
		b := endedWhile(build, func() { fill(t, filler) })
		t.Logf("on a full disk: %s %s", b.State, b.Error)
		if b.State != "failed" || b.Error != "this host has no disk space left" {
			t.Errorf("on a full disk: %s %s", b.State, b.Error)
		}
		if err := filler.Truncate(0); err != nil {
			t.Fatal(err)
		}
		nothing("a full disk")
		if b := ended(start(client.BuildOptions{Recipe: text, SkipPrePost: true})); b.State != "succeeded" {
			t.Errorf("with free space again: %s %s", b.State, b.Error)
		}
		nothing("with room again")
	})
}

// fill grows a file until it takes all the space of its file system.
func fill(t *testing.T, f *os.File) {
	t.Helper()
	var fs syscall.Statfs_t
	if err := syscall.Fstatfs(int(f.Fd()), &fs); err != nil {
		t.Fatal(err)
	}
	at, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	for size := int64(fs.Bavail) * fs.Bsize; size >= fs.Bsize; {
		if syscall.Fallocate(int(f.Fd()), 0, at, size) != nil {
			size /= 2
			continue
		}
		at += size
	}
}
