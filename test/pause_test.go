package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// counter is a process with data in memory, an open file and a listening socket. It
// counts, and reports its state on port 8000.
const counter = `import hashlib,http.server,json,os,threading,time
heap,file,count=bytearray(os.urandom(4<<20)),open("/tmp/count","w"),0
def run():
    global count
    while True:
        count+=1; time.sleep(.02)
        file.seek(0); file.write(str(count)); file.flush()
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        b=json.dumps({"count":count,"pid":os.getpid(),"heap":hashlib.sha256(heap).hexdigest()}).encode()
        self.send_response(200); self.send_header("Content-Length",str(len(b))); self.end_headers(); self.wfile.write(b)
    def log_message(self,*a): pass
threading.Thread(target=run,daemon=True).start()
http.server.ThreadingHTTPServer(("0.0.0.0",8000),H).serve_forever()
`

// counted is the counter's report.
type counted struct {
	Count int
	PID   int
	Heap  string
}

// startCounter starts the counter in a sandbox, and returns its first report.
func (i *installation) startCounter(t *testing.T, sandbox string) counted {
	t.Helper()
	c := i.client(t)
	if _, err := c.WriteFile(t.Context(), sandbox, "/home/user/counter.py", "", strings.NewReader(counter)); err != nil {
		t.Fatal(err)
	}
	serve(t, c, sandbox, "python3 counter.py")
	var is counted
	eventually(t, func() (err error) {
		is, err = i.count(t, sandbox)
		return err
	})
	return is
}

// count asks a sandbox's counter for a report, through its port's name.
func (i *installation) count(t *testing.T, sandbox string) (is counted, err error) {
	t.Helper()
	resp := i.request(t, http.MethodGet, "8000-"+sandbox+".localhost", "/", http.Header{"X-Api-Key": {i.creds.APIKey}}, nil)
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	if err != nil {
		return is, fmt.Errorf("the counter: %w: %s", err, b)
	}
	return is, json.Unmarshal(b, &is)
}

// goesOn fails the test unless a counter has continued from its earlier report.
func (i *installation) goesOn(t *testing.T, sandbox string, was counted) counted {
	t.Helper()
	is, err := i.count(t, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	if is.Count < was.Count || is.PID != was.PID || is.Heap != was.Heap {
		t.Errorf("the counter reports %+v, before %+v", was, is)
	}
	return is
}

func (i *installation) state(t *testing.T, sandbox string) string {
	t.Helper()
	s, err := i.client(t).Get(t.Context(), sandbox)
	if err != nil {
		t.Fatal(err)
	}
	return s.State
}

// machines returns how many VMs a sandbox has. They are named after the sandbox's folder,
// which may be older than the sandbox.
func (i *installation) machines(t *testing.T, sandbox string) (n int) {
	t.Helper()
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	records, _ := filepath.Glob(filepath.Join(i.dir, "sandboxes", "*", "sandbox.json"))
	for _, file := range records {
		b, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(b), u.String()) {
			continue
		}
		for _, line := range processes(i.dir) {
			if strings.Contains(line, "qemu-system") && strings.Contains(line, "wrenn-"+filepath.Base(filepath.Dir(file))) {
				n++
			}
		}
	}
	return n
}

// ok runs a client command that must succeed, and returns the lines of its output.
func (i *installation) ok(t *testing.T, args ...string) []string {
	t.Helper()
	out, errs, code := i.cli(t, "", args...)
	if code != 0 {
		t.Fatalf("wrenn %s: exit code %d, %s", strings.Join(args, " "), code, errs)
	}
	return strings.Fields(out)
}

func TestPauseAndResume(t *testing.T) {
	i := up(t)
	c := i.client(t)
	sandbox := i.ok(t, "create", "--memory", "256", "--auto-resume")[0]
	defer i.cli(t, "", "rm", sandbox)
	was := i.startCounter(t, sandbox)

	if got := i.ok(t, "pause", sandbox); !slices.Equal(got, []string{sandbox}) {
		t.Errorf("pause printed %q", got)
	}
	s, err := c.Get(t.Context(), sandbox)
	if err != nil || s.State != "paused" || s.PausedAt == nil || s.ExpiresAt != nil {
		t.Fatalf("paused: %+v, %v", s, err)
	}
	if n := i.machines(t, sandbox); n != 0 {
		t.Errorf("a paused sandbox has %d virtual machines", n)
	}
	// Reading its description does not resume it.
	var e *client.Error
	if _, err := c.Metrics(t.Context(), sandbox); !errors.As(err, &e) || e.Code != "sandbox_paused" {
		t.Errorf("metrics of a paused sandbox: %v", err)
	}
	// The first request does.
	was = i.goesOn(t, sandbox, was)
	if s := i.state(t, sandbox); s != "running" {
		t.Errorf("after a request it is %s", s)
	}

	// Pause and resume by command.
	i.ok(t, "pause", sandbox)
	if got := i.ok(t, "resume", sandbox); !slices.Equal(got, []string{sandbox}) || i.state(t, sandbox) != "running" {
		t.Errorf("resume printed %q, and it is %s", got, i.state(t, sandbox))
	}
	i.goesOn(t, sandbox, was)
}

// TestPauseAtTimeout checks that a sandbox is paused at its timeout, and that a command or a
// request resumes it.
func TestPauseAtTimeout(t *testing.T) {
	i := up(t)
	c := i.client(t)
	sandbox := i.ok(t, "create", "--memory", "256", "--timeout", "1s", "--on-timeout", "pause")[0]
	defer i.cli(t, "", "rm", sandbox)
	was := i.startCounter(t, sandbox) // whose calls resume the sandbox if a busy machine makes them late
	eventually(t, func() error {
		if s := i.state(t, sandbox); s != "paused" {
			return errors.New("unused it is " + s)
		}
		return nil
	})
	r, err := c.Exec(t.Context(), sandbox, client.Command{Cmd: `hostname; date +%s; cat /tmp/count`, Shell: true}, nil)
	if err != nil || r.ExitCode != 0 {
		t.Fatalf("a command for a paused sandbox: %+v, %v", r, err)
	}
	var name string
	var clock int64
	var count int
	if _, err := fmt.Sscan(string(r.Stdout), &name, &clock, &count); err != nil || name != sandbox || count < was.Count {
		t.Errorf("after that: %q, %v", r.Stdout, err)
	}
	if d := time.Now().Unix() - clock; d < -5 || d > 5 {
		t.Errorf("its clock is off by %d s", d)
	}
	i.goesOn(t, sandbox, was)
}

func TestSnapshotOfRunningSandbox(t *testing.T) {
	i := up(t)
	c := i.client(t)
	sandbox := i.sandbox(t, client.CreateOptions{MemoryMiB: 256}).ID
	was := i.startCounter(t, sandbox)
	name := fmt.Sprintf("snap-%d", time.Now().UnixNano())
	i.ok(t, "snapshot", "create", sandbox, name)
	if s := i.state(t, sandbox); s != "running" {
		t.Errorf("the captured sandbox is %s", s)
	}
	is := i.goesOn(t, sandbox, was)
	if got := i.ok(t, "snapshot", "ls"); !slices.Contains(got, name) {
		t.Errorf("snapshot ls: %q", got)
	}
	if _, errs, code := i.cli(t, "", "snapshot", "create", sandbox, name); code == 0 || !strings.Contains(errs, name) {
		t.Errorf("a name in use was accepted: %s", errs)
	}

	made := i.sandbox(t, client.CreateOptions{Template: name})
	if made.MemoryMiB != 256 || made.Template != name {
		t.Errorf("made from the snapshot: %+v", made)
	}
	theirs := i.goesOn(t, made.ID, was)
	r, err := c.Exec(t.Context(), made.ID, client.Command{Cmd: "hostname"}, nil)
	if err != nil || strings.TrimSpace(string(r.Stdout)) != made.ID {
		t.Errorf("its host name: %+v, %v", r, err)
	}

	// Delete the template while the sandbox uses it.
	i.ok(t, "snapshot", "rm", name)
	if got := i.ok(t, "template", "ls"); slices.Contains(got, name) {
		t.Errorf("a deleted template is listed: %q", got)
	}
	if _, err := c.Create(t.Context(), client.CreateOptions{Template: name}); !client.IsNotFound(err) {
		t.Errorf("a sandbox of a deleted template: %v", err)
	}
	i.goesOn(t, made.ID, theirs)
	i.ok(t, "pause", made.ID)
	i.ok(t, "resume", made.ID)
	i.goesOn(t, made.ID, theirs)
	i.goesOn(t, sandbox, is)
	// Its files go with the last sandbox that needs them.
	template, err := id.Parse(id.Template, made.TemplateID)
	if err != nil {
		t.Fatal(err)
	}
	i.ok(t, "rm", made.ID)
	eventually(t, func() error {
		if left, _ := filepath.Glob(filepath.Join(i.dir, "*", "*", "*", template.String())); len(left) > 0 {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})

	for _, builtin := range []string{"minimal", id.Format(id.Template, [16]byte{})} {
		if _, errs, code := i.cli(t, "", "snapshot", "rm", builtin); code == 0 || errs == "" {
			t.Errorf("%s was deleted: %s", builtin, errs)
		}
	}
	if got := i.ok(t, "template", "ls"); !slices.Contains(got, "minimal") {
		t.Errorf("template ls: %q", got)
	}
}

func TestFork(t *testing.T) {
	i := up(t)
	c := i.client(t)
	sandbox := i.sandbox(t, client.CreateOptions{MemoryMiB: 256, Metadata: map[string]string{"job": "fork"}}).ID
	was := i.startCounter(t, sandbox)
	copies := i.ok(t, "fork", "-n", "2", sandbox)
	defer i.cli(t, "", append([]string{"rm"}, copies...)...)
	if len(copies) != 2 {
		t.Fatalf("fork printed %q", copies)
	}
	seen := map[string]string{}
	for _, id := range append(copies, sandbox) {
		s, err := c.Get(t.Context(), id)
		if err != nil || s.State != "running" || s.Metadata["job"] != "fork" || (id != sandbox && s.ForkedFrom != sandbox) {
			t.Fatalf("%s: %+v, %v", id, s, err)
		}
		i.goesOn(t, id, was)
		r, err := c.Exec(t.Context(), id, client.Command{Cmd: `hostname; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n'`, Shell: true}, nil)
		if err != nil {
			t.Fatal(err)
		}
		var name, random string
		if _, err := fmt.Sscan(string(r.Stdout), &name, &random); err != nil || name != id {
			t.Errorf("%s says %q, %v", id, r.Stdout, err)
		}
		for _, secret := range []string{random, s.AccessToken, s.TrafficToken} {
			if other := seen[secret]; other != "" {
				t.Errorf("%s and %s have the same %q", other, id, secret)
			}
			seen[secret] = id
		}
		// The guest daemon accepts its own token only.
		resp := i.request(t, http.MethodGet, "49983-"+id+".localhost", "/envs", http.Header{"X-Access-Token": {s.AccessToken}}, nil)
		if resp.StatusCode != http.StatusOK {
			t.Errorf("%s does not accept its token: %s", id, resp.Status)
		}
	}
	// The sandboxes share no files.
	if _, err := c.WriteFile(t.Context(), copies[0], "/home/user/mine", "", strings.NewReader("x")); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{copies[1], sandbox} {
		if _, err := c.ReadFile(t.Context(), id, "/home/user/mine", ""); !client.IsNotFound(err) {
			t.Errorf("%s has another's file: %v", id, err)
		}
	}
}

// TestKilledUnderWay kills the control plane, or the host agent, while a sandbox is
// paused, resumed, captured and forked: the next one finds out how that ended.
func TestKilledUnderWay(t *testing.T) {
	i := up(t)
	c := i.client(t)
	// Without retries, the client's result is one server's.
	once, err := client.New("http://"+i.listen, i.creds.APIKey, client.WithRetries(0))
	if err != nil {
		t.Fatal(err)
	}
	job := map[string]string{"job": fmt.Sprint(time.Now().UnixNano())}
	sandbox := i.sandbox(t, client.CreateOptions{MemoryMiB: 256, Metadata: job}).ID
	was := i.startCounter(t, sandbox)
	// This gives the pause something to write.
	serve(t, c, sandbox, `python3 -c 'import os,time; x=os.urandom(64<<20); open("/tmp/full","w"); time.sleep(9999)'`)
	eventually(t, func() error {
		r, err := c.Exec(t.Context(), sandbox, client.Command{Cmd: "test", Args: []string{"-e", "/tmp/full"}}, nil)
		if err == nil && r.ExitCode != 0 {
			err = errors.New("memory is not full yet")
		}
		return err
	})
	name := fmt.Sprintf("killed-%d", time.Now().UnixNano())
	defer i.cli(t, "", "snapshot", "rm", name)
	// mine returns the sandbox and its forks that are in one of the states.
	mine := func(states ...string) (ids []string) {
		for s, err := range c.List(t.Context(), client.ListOptions{Metadata: job, States: states}) {
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, s.ID)
		}
		return ids
	}
	defer func() { i.cli(t, "", append([]string{"rm"}, mine()...)...) }()
	// captured removes the snapshot, and returns the error code, which is "conflict"
	// during the capture.
	captured := func() string {
		var e *client.Error
		if err := once.DeleteSnapshot(t.Context(), name); errors.As(err, &e) {
			return e.Code
		} else if err != nil {
			return err.Error()
		}
		return "deleted"
	}
	type call struct {
		do    func(context.Context) error
		begun func() bool // the database says that it has begun
	}
	calls := map[string]call{
		"pause": {
			func(ctx context.Context) error { _, err := once.Pause(ctx, sandbox); return err },
			func() bool { return i.state(t, sandbox) == "pausing" },
		},
		"resume": {
			func(ctx context.Context) error { _, err := once.Resume(ctx, sandbox); return err },
			func() bool { return i.state(t, sandbox) == "resuming" },
		},
		"capture": {
			func(ctx context.Context) error { _, err := once.Snapshot(ctx, sandbox, name); return err },
			func() bool { return captured() == "conflict" },
		},
		"fork": {
			func(ctx context.Context) error { _, err := once.Fork(ctx, sandbox, 2); return err },
			func() bool { return len(mine("starting")) > 0 },
		},
	}
	for _, kill := range []struct{ what, victim string }{
		{"pause", "server"}, {"resume", "server"}, {"capture", "server"}, {"fork", "server"}, {"pause", "agent"}, {"fork", "agent"},
	} {
		i.ok(t, map[bool]string{true: "pause", false: "resume"}[kill.what == "resume"], sandbox)
		pids := i.roles(t)[kill.victim]
		if len(pids) != 1 {
			t.Fatalf("%s: %v", kill.victim, pids)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		answer := make(chan error, 1)
		go func() { answer <- calls[kill.what].do(ctx) }()
		// Poll without a pause, because it does not take long.
		for len(answer) == 0 && !calls[kill.what].begun() {
		}
		under := len(answer) == 0
		if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		told := <-answer
		eventually(t, func() error {
			if now := i.roles(t)[kill.victim]; len(now) != 1 || now[0] == pids[0] {
				return fmt.Errorf("the %s is not back", kill.victim)
			}
			s, err := once.Get(t.Context(), sandbox)
			if err != nil {
				return err
			}
			if n := i.machines(t, sandbox); !(s.State == "paused" && n == 0 || s.State == "running" && n == 1) {
				return fmt.Errorf("after %s it is %s and has %d virtual machines", kill.what, s.State, n)
			}
			if s.State == "running" { // it can be used once its host is back
				if _, err := once.Ping(t.Context(), sandbox); err != nil {
					return err
				}
			}
			if left := mine("pending", "starting", "stopping"); len(left) > 0 {
				return fmt.Errorf("in progress: %v", left)
			}
			return nil
		})
		t.Logf("%s, %s killed under way: %v; the client was told %v; the sandbox is %s", kill.what, kill.victim, under, told, i.state(t, sandbox))
	}
	i.ok(t, "resume", sandbox)
	i.goesOn(t, sandbox, was)
	for _, id := range mine() {
		if n := i.machines(t, id); n != 1 {
			t.Errorf("%s has %d virtual machines", id, n)
		}
		i.goesOn(t, id, was)
	}
	ended := mine("stopped", "error")
	t.Logf("the sandbox and its copies: %v; ended: %v", mine(), ended)
	eventually(t, func() error {
		for _, id := range ended {
			if n := i.machines(t, id); n != 0 {
				return fmt.Errorf("%s has ended and has %d virtual machines", id, n)
			}
		}
		return nil
	})
	// Either the snapshot exists, or its name is free.
	eventually(t, func() error {
		if got := captured(); got != "deleted" && got != "not_found" {
			return errors.New("the snapshot: " + got)
		}
		return nil
	})
}
