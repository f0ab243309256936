package agent_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

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
	if pid := qemu(sandbox); pid != 0 {
		t.Errorf("the machine of a paused sandbox is left: %d", pid)
	}
	t.Logf("paused in %v", time.Since(begin).Round(time.Millisecond))
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

// counter counts in memory and in a file that it holds open, checks a part of
// its memory, and serves both over HTTP.
const counter = `
import hashlib, http.server, os, threading, time
block = bytearray(os.urandom(8 << 20))
want = hashlib.sha256(block).hexdigest()
log = open("/tmp/count.log", "w")
count = 0
def run():
    global count
    while True:
        count += 1
        block[count % len(block)] ^= 0
        log.write("%d\n" % count); log.flush()
        time.sleep(0.02)
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = ("%d %d %s" % (os.getpid(), count, hashlib.sha256(block).hexdigest() == want)).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *a): pass
threading.Thread(target=run, daemon=True).start()
http.server.ThreadingHTTPServer(("0.0.0.0", 8000), H).serve_forever()
`

// start runs the counter in a sandbox and waits until it answers.
func (h *host) count(t *testing.T, sandbox string) (pid, count int) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		code, body := h.get(t, h.url(sandbox, 8000, "/"), nil)
		if code == 200 {
			var intact string
			if _, err := fmt.Sscan(body, &pid, &count, &intact); err != nil || intact != "True" {
				t.Fatalf("the counter says %q: %v", body, err)
			}
			return pid, count
		}
		if time.Now().After(deadline) {
			t.Fatalf("the counter does not answer: %d %s", code, body)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (h *host) startCounter(t *testing.T, sandbox string) {
	t.Helper()
	if _, err := h.WriteFile(t.Context(), connect.NewRequest(&pb.WriteFileRequest{File: ref(sandbox, "/tmp/counter.py"), Content: []byte(counter)})); err != nil {
		t.Fatal(err)
	}
	h.exec(t, sandbox, sh("setsid python3 /tmp/counter.py >/tmp/counter.err 2>&1 </dev/null &"), nil)
}

// TestManyPauses: a program that counts goes on through more pauses than an
// image keeps generations.
func TestManyPauses(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, request())
	h.startCounter(t, sandbox)
	pid, last := h.count(t, sandbox)
	for range 25 {
		h.pause(t, sandbox)
		if code, body := h.get(t, h.url(sandbox, 8000, "/"), nil); code != 503 || !strings.Contains(body, `"paused"`) {
			t.Fatalf("a request to a paused sandbox: %d %s", code, body)
		}
		h.resume(t, sandbox)
		p, n := h.count(t, sandbox)
		if p != pid || n < last {
			t.Fatalf("process %d counted to %d, after %d counted to %d", p, n, pid, last)
		}
		last = n
	}
	// Every number that it counted is in its file, once.
	got := h.exec(t, sandbox, sh(`kill -STOP $(cat /proc/[0-9]*/stat 2>/dev/null | grep -m1 '(python3)' | cut -d' ' -f1) 2>/dev/null; sync; awk '$1 != NR { print "line", NR, "is", $1; exit 1 }' /tmp/count.log`), nil)
	if got.GetExitCode() != 0 {
		t.Errorf("its file: %s %s", got.GetStdout(), got.GetStderr())
	}
}
