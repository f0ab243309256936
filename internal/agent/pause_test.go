package agent_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
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

func (h *host) pause(t *testing.T, sandbox string) {
	t.Helper()
	begin := time.Now()
	res, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatalf("pause: %v", err)
	}
	if s := res.Msg.GetSandbox().GetState(); s != pb.SandboxState_SANDBOX_STATE_PAUSED {
		t.Fatalf("after a pause it is %v", s)
	}
	if at := res.Msg.GetSandbox().GetPausedAt().AsTime(); at.Before(begin) || at.After(time.Now()) {
		t.Errorf("paused_at is %v, but the pause began at %v", at, begin)
	}
	t.Logf("paused in %v", time.Since(begin).Round(time.Millisecond))
	await.Until(t, "the machine of a paused sandbox ends", func() bool { return agenttest.QEMU(sandbox) == 0 })
}

func (h *host) resume(t *testing.T, sandbox string) {
	t.Helper()
	begin := time.Now()
	res, err := h.Resume(t.Context(), connect.NewRequest(&pb.ResumeRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatalf("resume: %v", err)
	}
	if s := res.Msg.GetSandbox().GetState(); s != pb.SandboxState_SANDBOX_STATE_RUNNING {
		t.Fatalf("after a resume it is %v", s)
	}
	t.Logf("resumed in %v", time.Since(begin).Round(time.Millisecond))
}

func (h *host) snapshot(t *testing.T, sandbox, name string) *pb.Template {
	t.Helper()
	begin := time.Now()
	res, err := h.Snapshot(t.Context(), connect.NewRequest(&pb.SnapshotRequest{SandboxId: sandbox, TemplateId: id.Format(id.Template, uuid.New()), Name: name}))
	if err != nil {
		t.Fatalf("snapshot: %v", err)
	}
	t.Logf("captured in %v", time.Since(begin).Round(time.Millisecond))
	return res.Msg.GetTemplate()
}

// counter is a program that counts in memory and in a file that it holds open, checks
// part of its memory, and serves both over HTTP.
const counter = `
import hashlib, http.server, os, threading, time
block = bytearray(os.urandom(8 << 20))
want = hashlib.sha256(block).hexdigest()
log = open("/tmp/count.log", "w")
count, begun = 0, ""
def run():
    global count
    while True:
        count += 1
        block[count % len(block)] ^= 0
        log.write("%d\n" % count); log.flush()
        time.sleep(0.02)
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global begun
        if self.path.startswith("/slow/"):
            begun = self.path[6:]; time.sleep(int(begun)); self.send_response(200); self.end_headers(); self.wfile.write(b"slow"); return
        body = os.urandom(16).hex().encode() if self.path == "/random" else begun.encode() if self.path == "/begun" else ("%d %d %s" % (os.getpid(), count, hashlib.sha256(block).hexdigest() == want)).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *a): pass
threading.Thread(target=run, daemon=True).start()
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), H).serve_forever()
`

// count asks a sandbox's counter for its process and count.
func (h *host) count(t *testing.T, sandbox string) (pid, count int) {
	t.Helper()
	var body string
	await.Until(t, "the counter answers", func() bool {
		var code int
		code, body = h.get(t, h.url(sandbox, 8000, "/"), nil)
		return code == 200
	})
	var intact string
	if _, err := fmt.Sscan(body, &pid, &count, &intact); err != nil || intact != "True" {
		t.Fatalf("the counter says %q: %v", body, err)
	}
	return pid, count
}

func (h *host) startCounter(t *testing.T, sandbox string) {
	t.Helper()
	if _, err := h.WriteFile(t.Context(), connect.NewRequest(&pb.WriteFileRequest{File: ref(sandbox, "/tmp/counter.py"), Content: []byte(counter)})); err != nil {
		t.Fatal(err)
	}
	h.exec(t, sandbox, sh("setsid python3 /tmp/counter.py >/tmp/counter.err 2>&1 </dev/null &"), nil)
}

// TestManyPauses checks that a counter survives more pauses than a memory image keeps
// generations.
func TestManyPauses(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, request())
	h.startCounter(t, sandbox)
	pid, last := h.count(t, sandbox)
	for range memory.MaxGenerations + 4 {
		h.pause(t, sandbox)
		if code, body := h.get(t, h.url(sandbox, 8000, "/"), nil); code != 503 || !strings.Contains(body, `"paused"`) {
			t.Fatalf("a request to a paused sandbox: %d %s", code, body)
		}
		h.resume(t, sandbox)
		last = h.counts(t, sandbox, pid, last)
	}
	h.counted(t, sandbox, pid)
}

// counts checks that a counter has continued, and returns its count.
func (h *host) counts(t *testing.T, sandbox string, pid, last int) int {
	t.Helper()
	p, n := h.count(t, sandbox)
	if p != pid || n < last {
		t.Fatalf("process %d counted to %d, before that process %d counted to %d", p, n, pid, last)
	}
	return n
}

// counted checks that a counter's file has each of its numbers once.
func (h *host) counted(t *testing.T, sandbox string, pid int) {
	t.Helper()
	cmd := sh(fmt.Sprintf(`kill -STOP %d; sync; awk '$1 != NR { print "line", NR, "is", $1; exit 1 } END { print NR }' /tmp/count.log; s=$?; kill -CONT %d; exit $s`, pid, pid))
	got := h.exec(t, sandbox, cmd, nil)
	if got.GetExitCode() != 0 || string(got.GetStdout()) == "0\n" {
		t.Errorf("its file: %s %s", got.GetStdout(), got.GetStderr())
	}
}

// random returns numbers from the random pool of a program that ran before the capture,
// and a fresh key.
func (h *host) random(t *testing.T, sandbox string) (numbers, key string) {
	t.Helper()
	code, numbers := h.get(t, h.url(sandbox, 8000, "/random"), nil)
	got := h.exec(t, sandbox, sh("openssl ecparam -name prime256v1 -genkey -noout"), nil)
	if key = string(got.GetStdout()); code != 200 || len(numbers) != 32 || !strings.Contains(key, "PRIVATE KEY") {
		t.Fatalf("random numbers %d %q, key %q: %s", code, numbers, key, got.GetStderr())
	}
	return numbers, key
}

// clockTolerance is how far a sandbox's clock may be off.
const clockTolerance = time.Second

// isItself checks that a sandbox has its own name, metadata and clock.
func (h *host) isItself(t *testing.T, sandbox string) {
	t.Helper()
	begin := time.Now()
	got := h.exec(t, sandbox, sh(`hostname; t=$(curl -s -X PUT -H 'X-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token); curl -s -H "X-metadata-token: $t" http://169.254.169.254/sandbox_id; echo; date +%s.%N`), nil)
	f := strings.Fields(string(got.GetStdout()))
	if len(f) != 3 || f[0] != sandbox || f[1] != sandbox {
		t.Fatalf("%s reports: %s %s", sandbox, got.GetStdout(), got.GetStderr())
	}
	s, err := strconv.ParseFloat(f[2], 64)
	if err != nil {
		t.Fatal(err)
	}
	// The guest read its clock between these two times.
	told, end := time.UnixMicro(int64(s*1e6)), time.Now()
	if told.Before(begin.Add(-clockTolerance)) || told.After(end.Add(clockTolerance)) {
		t.Errorf("its clock showed %v between %v and %v", told, begin, end)
	}
}

// TestClockStands checks that freezing users' processes freezes chronyd. It must not
// measure a restored clock before the guest daemon has set it, or it would correct the
// jump twice.
func TestClockStands(t *testing.T) {
	h := newHost(t)
	r := request()
	sandbox := h.create(t, r)
	group := func() string {
		t.Helper()
		code, events := h.get(t, h.url(sandbox, 49983, "/files?username=root&path=/sys/fs/cgroup/wrenn-clock/cgroup.events"), http.Header{"X-Access-Token": {r.GetAccessToken()}})
		if code != 200 {
			t.Fatalf("the clock's group: %d %s", code, events)
		}
		return events
	}
	if got := h.exec(t, sandbox, sh("cat /proc/$(cat /run/chronyd.pid)/comm"), nil); string(got.GetStdout()) != "chronyd\n" {
		t.Fatalf("chronyd does not run: %s %s", got.GetStdout(), got.GetStderr())
	}
	if events := group(); !strings.Contains(events, "populated 1") || !strings.Contains(events, "frozen 0") {
		t.Errorf("the clock's group has %q", events)
	}
	// From outside, only the agent may freeze. A process in the guest that asks is frozen
	// too.
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		cmd := sh("curl -s -X POST -H 'X-Access-Token: " + r.GetAccessToken() + "' http://127.0.0.1:49983/freeze")
		_, _ = h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: cmd}))
	}()
	await.Until(t, "chronyd stands still", func() bool { return strings.Contains(group(), "frozen 1") })
	h.destroy(t, sandbox)
	<-asked
}

// TestSnapshot checks that a captured sandbox continues, and that sandboxes of the
// snapshot start from there with their own identity and outlive the template.
func TestSnapshot(t *testing.T) {
	h := newOwnHost(t, nil) // no other test may have deleted files open
	r := request()
	sandbox := h.create(t, r)
	h.startCounter(t, sandbox)
	pid, last := h.count(t, sandbox)
	tpl := h.snapshot(t, sandbox, "mine")
	captured := time.Now()
	if tpl.GetMemoryMib() != r.GetMemoryMib() || tpl.GetVcpus() != r.GetVcpus() || tpl.GetSizeBytes() == 0 {
		t.Errorf("template %v", tpl)
	}
	next := h.counts(t, sandbox, pid, last)
	// The guests' clocks need real time to become wrong.
	await.Until(t, "the captured clock is wrong by more than the tolerance", func() bool { return time.Since(captured) > 2*clockTolerance })
	begin := func() string {
		r := request()
		r.TeamId, r.TemplateId, r.MemoryMib = tpl.GetTeamId(), tpl.GetTemplateId(), tpl.GetMemoryMib()
		return h.create(t, r)
	}
	one, two := begin(), begin()
	seen := map[string]string{}
	for _, s := range []string{sandbox, one, two} {
		h.counts(t, s, pid, last)
		h.isItself(t, s)
		numbers, key := h.random(t, s)
		for _, v := range []string{numbers, key} {
			if other, ok := seen[v]; ok {
				t.Errorf("%s and %s have the same random numbers", s, other)
			}
			seen[v] = s
		}
	}
	h.counts(t, sandbox, pid, next)
	other := &pb.CreateRequest{SandboxId: id.Format(id.Sandbox, uuid.New()), TeamId: id.Format(id.Team, uuid.New()), TemplateId: tpl.GetTemplateId(), Vcpus: 1, MemoryMib: 256}
	if _, err := h.Create(t.Context(), connect.NewRequest(other)); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("another team's template: %v", err)
	}
	team, template := h.home(t, tpl)
	capture := filepath.Join(h.Dir.Captures(team, template), "captured", "capture.json")
	if n := links(t, capture); n != 3 {
		t.Errorf("the capture's files have %d links", n)
	}
	del := connect.NewRequest(&pb.DeleteTemplateRequest{TeamId: tpl.GetTeamId(), TemplateId: tpl.GetTemplateId()})
	for range 2 {
		if _, err := h.DeleteTemplate(t.Context(), del); err != nil {
			t.Fatal(err)
		}
	}
	h.pause(t, one)
	h.resume(t, one)
	for _, s := range []string{sandbox, one, two} {
		h.counts(t, s, pid, last)
		h.counted(t, s, pid)
	}
	h.destroy(t, one)
	h.destroy(t, two)
	h.gone(t, one)
	if open := deleted(t, h.Cmd.Process.Pid, string(h.Dir)); len(open) > 0 {
		t.Errorf("deleted files are still open: %v", open)
	}
	if _, err := h.DeleteTemplate(t.Context(), connect.NewRequest(&pb.DeleteTemplateRequest{TeamId: id.Format(id.Team, uuid.Nil), TemplateId: id.Format(id.Template, uuid.Nil)})); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("delete the built-in template: %v", err)
	}
}

func (h *host) home(t *testing.T, tpl *pb.Template) (team, template uuid.UUID) {
	t.Helper()
	team, err := id.Parse(id.Team, tpl.GetTeamId())
	if err == nil {
		template, err = id.Parse(id.Template, tpl.GetTemplateId())
	}
	if err != nil {
		t.Fatal(err)
	}
	return team, template
}

func links(t *testing.T, name string) int {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return int(st.Nlink)
}

// deleted returns the deleted files below dir that a process has open.
func deleted(t *testing.T, pid int, dir string) (names []string) {
	t.Helper()
	all, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range all {
		if to, _ := os.Readlink(fd); strings.HasPrefix(to, dir) && strings.HasSuffix(to, "(deleted)") {
			names = append(names, to)
		}
	}
	return names
}

// TestFork checks that a sandbox and its forks continue independently.
func TestFork(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, request())
	h.startCounter(t, sandbox)
	pid, last := h.count(t, sandbox)
	req := &pb.ForkRequest{SandboxId: sandbox}
	for i := range 3 {
		req.Copies = append(req.Copies, &pb.ForkRequest_Copy{SandboxId: id.Format(id.Sandbox, uuid.New()), AccessToken: fmt.Sprintf("token-%d", i)})
	}
	t.Cleanup(func() {
		for _, c := range req.GetCopies() {
			h.destroy(t, c.GetSandboxId())
		}
	})
	begin := time.Now()
	res, err := h.Fork(t.Context(), connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("three forks in %v", time.Since(begin))
	numbers, _ := h.random(t, sandbox)
	seen := map[string]bool{numbers: true}
	h.counts(t, sandbox, pid, last)
	under := mapsMemory(t, sandbox)
	for i, c := range res.Msg.GetSandboxes() {
		if got := mapsMemory(t, c.GetSandboxId()); got != under {
			t.Errorf("a fork maps %s, and its origin %s", got, under)
		}
		if c.GetSandboxId() != req.GetCopies()[i].GetSandboxId() || c.GetState() != pb.SandboxState_SANDBOX_STATE_RUNNING {
			t.Errorf("a fork is %v", c)
		}
		h.counts(t, c.GetSandboxId(), pid, last)
		h.isItself(t, c.GetSandboxId())
		numbers, _ := h.random(t, c.GetSandboxId())
		if seen[numbers] {
			t.Error("two have the same random numbers")
		}
		seen[numbers] = true
	}
	for i, want := range []int{200, 401, 401} {
		token := fmt.Sprintf("token-%d", i)
		if code, body := h.get(t, h.url(req.GetCopies()[0].GetSandboxId(), 49983, "/envs"), http.Header{"X-Access-Token": {token}}); code != want {
			t.Errorf("the first fork's daemon gets %s: %d %s", token, code, body)
		}
	}
	// They share no disk.
	h.exec(t, sandbox, sh("echo parent > /tmp/who"), nil)
	child := res.Msg.GetSandboxes()[0].GetSandboxId()
	if got := h.exec(t, child, sh("cat /tmp/who"), nil); got.GetExitCode() == 0 {
		t.Errorf("a fork sees what its origin wrote: %s", got.GetStdout())
	}
	h.destroy(t, sandbox)
	h.counts(t, child, pid, last)
	h.counted(t, child, pid)
}

// mapsMemory returns the file, by device, inode and name, from which a VM maps memory
// shared with others.
func mapsMemory(t *testing.T, sandbox string) string {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", agenttest.QEMU(sandbox)))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if f := strings.Fields(line); len(f) > 5 && strings.HasPrefix(f[5], "/memfd:wrenn-") {
			return strings.Join(f[3:6], " ")
		}
	}
	t.Fatalf("the VM of %s shares no memory", sandbox)
	return ""
}

// TestPauseDrains checks that requests in flight get two seconds to end, that the proxy
// refuses new ones, and that it aborts those that take longer.
func TestPauseDrains(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, request())
	h.startCounter(t, sandbox)
	pid, last := h.count(t, sandbox)
	for _, test := range []struct {
		takes string
		ends  bool
	}{{"1", true}, {"60", false}} {
		await.Until(t, "a request of "+test.takes+" s ends as it should", func() bool {
			type answer struct {
				code int
				body string
				err  error
			}
			answered := make(chan answer, 1)
			go func() {
				resp, err := h.Plain.Get(h.url(sandbox, 8000, "/slow/"+test.takes))
				if err != nil {
					answered <- answer{err: err}
					return
				}
				defer resp.Body.Close()
				b, err := io.ReadAll(resp.Body)
				answered <- answer{resp.StatusCode, string(b), err}
			}()
			for begun := ""; begun != test.takes; {
				_, begun = h.get(t, h.url(sandbox, 8000, "/begun"), nil)
			}
			paused := make(chan error, 1)
			begin := time.Now()
			go func() {
				_, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: sandbox}))
				paused <- err
			}()
			for {
				got, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
				if err != nil {
					t.Fatal(err)
				}
				if got.Msg.GetSandbox().GetState() != pb.SandboxState_SANDBOX_STATE_RUNNING {
					break
				}
			}
			if code, body := h.get(t, h.url(sandbox, 8000, "/"), nil); code != 503 {
				t.Errorf("a request during a pause: %d %s", code, body)
			}
			a := <-answered
			// On a busy machine the response may take longer than the two seconds.
			ended := a.code == 200 && a.body == "slow" && a.err == nil
			if !test.ends && a.err == nil && a.code == 200 {
				t.Errorf("a request that takes a minute: %+v", a)
			}
			if err := <-paused; err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begin); !test.ends && took < 2*time.Second {
				t.Errorf("a pause with a request in flight took %v", took)
			}
			h.resume(t, sandbox)
			last = h.counts(t, sandbox, pid, last)
			return ended || !test.ends
		})
	}
}

// TestLargerDisk checks that a sandbox gets the disk size that it asked for.
func TestLargerDisk(t *testing.T) {
	h := newHost(t)
	r := request()
	r.DiskMib = 8192
	sandbox := h.create(t, r)
	size := func() int {
		got := h.exec(t, sandbox, sh("df -BM --output=size / | tail -1 | tr -d ' M'"), nil)
		n, err := strconv.Atoi(strings.TrimSpace(string(got.GetStdout())))
		if err != nil {
			t.Fatalf("%v: %s", err, got.GetStderr())
		}
		return n
	}
	if n := size(); n < 7600 || n > 8192 {
		t.Errorf("its file system has %d MiB", n)
	}
	h.exec(t, sandbox, sh("head -c 20000000 /dev/urandom > /tmp/f; sha256sum /tmp/f > /tmp/sum"), nil)
	h.pause(t, sandbox)
	h.resume(t, sandbox)
	if got := h.exec(t, sandbox, sh("echo 3 | sudo tee /proc/sys/vm/drop_caches >/dev/null; sha256sum -c /tmp/sum"), nil); got.GetExitCode() != 0 {
		t.Errorf("%s %s", got.GetStdout(), got.GetStderr())
	}
	if n := size(); n < 7600 {
		t.Errorf("after a pause its file system has %d MiB", n)
	}
}

// TestFullDisk checks that a pause without room on the host changes nothing.
func TestFullDisk(t *testing.T) {
	h := newOwnHost(t, func(h *host) { h.ownDisk(t) })
	sandbox := h.create(t, request())
	h.startCounter(t, sandbox)
	pid, last := h.count(t, sandbox)
	h.pause(t, sandbox)
	h.resume(t, sandbox)
	// Use more memory than there will be room for.
	h.exec(t, sandbox, sh("setsid python3 -c 'import os,time;b=os.urandom(60<<20);open(\"/tmp/have\",\"w\");time.sleep(600)' >/dev/null 2>&1 </dev/null & until [ -e /tmp/have ]; do sleep 0.1; done"), nil)
	before := h.tree(t)
	fill := h.fill(t, 20<<20)
	_, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: sandbox}))
	if connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "disk space") {
		t.Fatalf("a pause on a full disk: %v", err)
	}
	t.Logf("the error: %v", err)
	last = h.counts(t, sandbox, pid, last)
	if after := h.tree(t); after != before {
		t.Errorf("files before:\n%s\nafter:\n%s", before, after)
	}
	_, err = h.Snapshot(t.Context(), connect.NewRequest(&pb.SnapshotRequest{SandboxId: sandbox, TemplateId: id.Format(id.Template, uuid.New()), Name: "full"}))
	if connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("a snapshot on a full disk: %v", err)
	}
	last = h.counts(t, sandbox, pid, last)
	// A guest that writes to the full disk waits for space, and sees no error.
	h.exec(t, sandbox, sh("(head -c 30M /dev/urandom > /tmp/more; sync; sha256sum /tmp/more > /tmp/more.sum) >/dev/null 2>&1 </dev/null &"), nil)
	h.await(t, func() bool { return strings.Contains(h.Log(), "the guest waits for space") })
	// The guest retries briefly, so the command may still succeed.
	ask := sh("python3 -c pass")
	ask.TimeoutSeconds = 1
	_, err = h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: ask}))
	if err != nil && (connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "disk space")) {
		t.Errorf("a guest that writes to a full disk: %v", err)
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	last = h.counts(t, sandbox, pid, last)
	if got := h.exec(t, sandbox, sh("until [ -s /tmp/more.sum ]; do sleep 0.1; done; sha256sum -c /tmp/more.sum"), nil); got.GetExitCode() != 0 {
		t.Errorf("the file that it wrote: %s %s", got.GetStdout(), got.GetStderr())
	}
	h.pause(t, sandbox)
	h.resume(t, sandbox)
	h.counts(t, sandbox, pid, last)
	h.counted(t, sandbox, pid)
}

// ownDisk moves the host to its own file system with 2500 MiB free. That is in memory,
// because a concurrent test may count loop devices.
func (h *host) ownDisk(t *testing.T) {
	t.Helper()
	used, err := exec.Command("du", "-sm", string(h.Dir)).Output()
	if err != nil {
		t.Fatal(err)
	}
	var mib int
	if _, err := fmt.Sscan(string(used), &mib); err != nil {
		t.Fatal(err)
	}
	own := string(h.Dir) + ".own"
	if err := os.Mkdir(own, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%dm,mode=755", mib+2500), "tmpfs", own},
		{"cp", "-a", "--sparse=always", string(h.Dir) + "/.", own},
		{"mount", "--move", own, string(h.Dir)},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		_ = exec.Command("umount", string(h.Dir)).Run()
		_ = os.Remove(own)
	})
}

// fill fills the host's disk up to a number of free bytes.
func (h *host) fill(t *testing.T, left int64) (name string) {
	t.Helper()
	var fs syscall.Statfs_t
	if err := syscall.Statfs(string(h.Dir), &fs); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(string(h.Dir), "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Fallocate(int(f.Fd()), 0, 0, int64(fs.Bavail)*fs.Bsize-left); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// tree lists all files of sandboxes and templates.
func (h *host) tree(t *testing.T) string {
	t.Helper()
	var all []string
	for _, dir := range []string{h.Dir.Sandboxes(), h.Dir.Images(), h.Dir.Forks()} {
		err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			all = append(all, path)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return strings.Join(all, "\n")
}

// TestWarm checks that a sandbox starts from a warm machine, with its own identity.
func TestWarm(t *testing.T) {
	h := newOwnHost(t, func(h *host) { h.Env["WRENN_WARM"] = "1" })
	h.create(t, request())
	await.Until(t, "a warm machine is ready", func() bool { return strings.Contains(h.Log(), "made a warm machine") })
	r := request()
	sandbox := h.create(t, r)
	first := time.Now()
	h.exec(t, sandbox, &pb.Command{Cmd: "echo"}, nil)
	t.Logf("its first command took %v", time.Since(first))
	h.isItself(t, sandbox)
	if !strings.Contains(h.Log(), "steps.take=") {
		t.Error("it did not start from a warm machine")
	}
	h.startCounter(t, sandbox)
	pid, last := h.count(t, sandbox)
	h.pause(t, sandbox)
	h.resume(t, sandbox)
	h.counts(t, sandbox, pid, last)
	h.counted(t, sandbox, pid)
}

// generations counts the layers of a sandbox's saved memory.
func (h *host) generations(t *testing.T, sandbox string) int {
	t.Helper()
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	layers, _ := filepath.Glob(filepath.Join(h.Dir.Sandbox(u), "state-*", "memory", "*.mem"))
	return len(layers)
}

// TestTrackedPagesOnDebiansKernel runs the driver's test of that name in a sandbox: its
// kernel tracks written pages, which this machine's may not.
func TestTrackedPagesOnDebiansKernel(t *testing.T) {
	h := newHost(t)
	binary := filepath.Join(t.TempDir(), "qemu.test")
	build := exec.Command("go", "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", binary, "./vmm/qemu")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	f, err := os.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sandbox := h.create(t, request())
	if _, err := h.writeStream(t.Context(), &pb.WriteFileStreamRequest_Start{File: ref(sandbox, "/tmp/qemu.test")}, f); err != nil {
		t.Fatal(err)
	}
	cmd := &pb.Command{Cmd: "/bin/sh", Args: []string{"-c", "chmod 755 /tmp/qemu.test && cd /tmp && ./qemu.test -test.v -test.run '^TestTrackedPages$'"}, User: "root"}
	got := h.exec(t, sandbox, cmd, nil)
	if got.GetExitCode() != 0 || !strings.Contains(string(got.GetStdout()), "--- PASS: TestTrackedPages") {
		t.Errorf("%s%s", got.GetStdout(), got.GetStderr())
	}
}
