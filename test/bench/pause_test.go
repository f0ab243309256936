package bench

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

const (
	// pauses and dumps are the repetitions for one row of the table; fewPauses is for
	// guests with manyMiB.
	pauses    = 5
	fewPauses = 3
	dumps     = 3
	manyMiB   = 4096
)

// dirtier is a program that holds a number of bytes of memory and fills all of them with
// random data on request. The data repeats every 64 KiB: to create as much as there is
// memory would take an emulated guest minutes, and neither side of the comparison looks
// for equal pages.
const dirtier = `
import http.server, os, sys
n, port = int(sys.argv[1]), int(sys.argv[2])
memory = memoryview(bytearray(n))
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/end": os._exit(0)
        data = os.urandom(1 << 16)
        for at in range(0, n, len(data)):
            memory[at:at + len(data)] = data[:n - at]
        self.send_response(204); self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer(("0.0.0.0", port), H).serve_forever()
`

// share is how much of a guest's memory changes between pauses.
type share struct {
	percent int
	// also describes other memory of the guest's programs, which does not change.
	also string
}

// row has the measurements of one guest and one share.
type row struct {
	memoryMiB                   int
	share                       share
	pause, resume, dump, reload sample
	pauseSteps, resumeSteps     [][]step
	written, kept, dumped       []int64
}

// TestPause measures a pause and a resume, beside QEMU's migration of the same guest to a
// file and back.
func TestPause(t *testing.T) {
	h := newHost(t, 16384, nil)
	var rows []row
	for _, memoryMiB := range []int{256, 1024, 4096} {
		t.Run(fmt.Sprintf("%d MiB", memoryMiB), func(t *testing.T) {
			// This includes the guest's memory, the template's, and that of the manual
			// restore.
			if need, have := int64(memoryMiB)*2<<20+1<<30, meminfo(t, "MemAvailable"); have < need {
				t.Skipf("needs %s of memory, and %s are available", mib(need), mib(have))
			}
			sandbox := h.create(t, memoryMiB)
			defer func() { h.destroy(t, sandbox) }()
			if _, err := h.WriteFile(t.Context(), connect.NewRequest(&pb.WriteFileRequest{File: &pb.FileRef{SandboxId: sandbox, Path: "/tmp/dirtier"}, Content: []byte(dirtier)})); err != nil {
				t.Fatal(err)
			}
			// The last one is a small change in a guest with much memory in use.
			for _, s := range []share{{1, ""}, {10, ""}, {50, ""}, {1, ", of 50 % in use"}} {
				rows = append(rows, h.measure(t, sandbox, memoryMiB, s))
			}
		})
	}
	var pauseRows, resumeRows [][]string
	for _, r := range rows {
		what := []string{strconv.Itoa(r.memoryMiB) + " MiB", fmt.Sprintf("%d %%%s", r.share.percent, r.share.also)}
		written, dumped := middle(r.written), middle(r.dumped)
		pauseRows = append(pauseRows, append(what[:2:2],
			r.pause.span(), fmt.Sprintf("%s (%s)", mib(written), mib(slices.Max(r.written))), strconv.FormatInt(written/memory.BlockSize, 10), mib(slices.Max(r.kept)), r.dump.span(), mib(dumped),
			times(r.dump.mid(), r.pause.mid()), times(dumped, written)))
		resumeRows = append(resumeRows, append(what[:2:2], r.resume.span(), r.reload.span(), times(r.reload.mid(), r.resume.mid())))
	}
	table("Pause, compared with QEMU's migration to a file", []string{"guest", "changed since the last pause", "pause", "written (most)", "in pages of 4 KiB", "kept on disk (most)", "migration to a file", "written", "time: migration ÷ pause", "bytes: migration ÷ pause"}, pauseRows)
	table("Resume, compared with QEMU's migration from that file", []string{"guest", "changed", "resume", "`-incoming` of the file", "time: `-incoming` ÷ resume"}, resumeRows)
	for _, r := range rows {
		if r.share.percent != 1 {
			continue
		}
		what := fmt.Sprintf("%d MiB, %d %% changed%s", r.memoryMiB, r.share.percent, r.share.also)
		d, at := r.pause.median()
		stepsTable("Steps of a pause, "+what, d, r.pauseSteps[at])
		d, at = r.resume.median()
		stepsTable("Steps of a resume, "+what, d, r.resumeSteps[at])
	}
}

// measure measures one guest in which one share of the memory changes.
func (h *host) measure(t *testing.T, sandbox string, memoryMiB int, s share) row {
	t.Helper()
	r := row{memoryMiB: memoryMiB, share: s}
	if s.also == "" { // end the program of the previous share
		_, _ = h.ask(t, sandbox, "/end")
	}
	h.port++
	h.exec(t, sandbox, fmt.Sprintf("setsid python3 /tmp/dirtier %d %d >/dev/null 2>&1 </dev/null &", int64(memoryMiB)<<20/100*int64(s.percent), h.port))
	dirty := func() {
		for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			if status, err := h.ask(t, sandbox, "/"); status == http.StatusNoContent {
				return
			} else if time.Now().After(deadline) {
				t.Fatalf("the program that changes memory does not answer: %d %v", status, err)
			}
		}
	}
	dirty()
	h.pause(t, sandbox)
	line := h.resume(t, sandbox)
	n := pauses
	if memoryMiB >= manyMiB {
		n = fewPauses
	}
	for range n {
		dirty()
		before := h.saved(t, sandbox)
		begin := time.Now()
		h.pause(t, sandbox)
		r.pause = append(r.pause, time.Since(begin))
		h.awaitPauseFinished(t, sandbox)
		var written, kept int64
		for inode, bytes := range h.saved(t, sandbox) {
			if _, ok := before[inode]; !ok {
				written += bytes
			}
			kept += bytes
		}
		r.written, r.kept = append(r.written, written), append(r.kept, kept)
		r.pauseSteps = append(r.pauseSteps, h.steps(t, "sandbox is paused", sandbox))
		t.Logf("%d %% changed%s: paused in %v: %v", s.percent, s.also, r.pause[len(r.pause)-1], r.pauseSteps[len(r.pause)-1])
		if len(r.pause) == n {
			h.dumps(t, sandbox, line, &r) // during the pause
		}
		begin = time.Now()
		h.resume(t, sandbox)
		r.resume = append(r.resume, time.Since(begin))
		r.resumeSteps = append(r.resumeSteps, h.steps(t, "sandbox is resumed", sandbox))
	}
	return r
}

// ask calls the program in a sandbox that changes memory.
func (h *host) ask(t *testing.T, sandbox, path string) (status int, err error) {
	t.Helper()
	resp, err := h.Plain.Get(fmt.Sprintf("%s/proxy/%s/%d%s", h.Base, sandbox, h.port, path))
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}

func (h *host) pause(t *testing.T, sandbox string) {
	t.Helper()
	if _, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: sandbox})); err != nil {
		t.Fatalf("pause: %v", err)
	}
}

// awaitPauseFinished waits until a paused sandbox's machine and its previous saved state are gone.
func (h *host) awaitPauseFinished(t *testing.T, sandbox string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		states, err := filepath.Glob(filepath.Join(h.folder(t, sandbox), "state-*"))
		if err != nil {
			t.Fatal(err)
		}
		if agenttest.QEMU(sandbox) == 0 && len(states) == 1 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a paused sandbox has %v", states)
		}
	}
}

// resume resumes a sandbox and returns its machine's command line.
func (h *host) resume(t *testing.T, sandbox string) []string {
	t.Helper()
	if _, err := h.Resume(t.Context(), connect.NewRequest(&pb.ResumeRequest{SandboxId: sandbox})); err != nil {
		t.Fatalf("resume: %v", err)
	}
	return cmdline(t, sandbox)
}

// folder returns the folder of a sandbox's files.
func (h *host) folder(t *testing.T, sandbox string) string {
	t.Helper()
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	return h.Dir.Sandbox(u)
}

// saved returns the size on disk, in bytes and by inode, of the files that pauses have
// saved of a sandbox, without those of its template.
func (h *host) saved(t *testing.T, sandbox string) map[uint64]int64 {
	t.Helper()
	all := map[uint64]int64{}
	folder := h.folder(t, sandbox)
	origin := filepath.Join(folder, "origin", "memory")
	states, err := filepath.Glob(filepath.Join(folder, "state-*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range states {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			var st syscall.Stat_t
			if err := syscall.Stat(path, &st); err != nil {
				return err
			}
			if _, err := os.Stat(filepath.Join(origin, d.Name())); err != nil || d.Name() == "header" || d.Name() == "devices" {
				all[st.Ino] = st.Blocks * 512
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// dumps makes QEMU write a paused sandbox's whole machine to a file, and continue from
// that.
func (h *host) dumps(t *testing.T, sandbox string, line []string, r *row) {
	t.Helper()
	folder := h.folder(t, sandbox)
	states, err := filepath.Glob(filepath.Join(folder, "state-*"))
	if err != nil || len(states) != 1 {
		t.Fatal(states, err)
	}
	m, err := memory.Open(filepath.Join(states[0], "memory"))
	if err != nil {
		t.Fatal(err)
	}
	ram, err := m.Materialize(t.Context(), "bench")
	if err != nil {
		t.Fatal(err)
	}
	devices, err := os.ReadFile(filepath.Join(states[0], "devices"))
	if err != nil {
		t.Fatal(err)
	}
	origin, err := image.OpenCapture(filepath.Join(folder, "origin"))
	if err != nil {
		t.Fatal(err)
	}
	overlay := filepath.Join(h.dir, "overlay.qcow2")
	files := append(under(origin), overlay)
	own, err := filepath.Glob(filepath.Join(folder, "disk-*.qcow2"))
	if err != nil || len(own) != 1 {
		t.Fatal(own, err)
	}
	renew := func() {
		t.Helper()
		if err := errors.Join(os.RemoveAll(overlay), disk.Copy(t.Context(), overlay, own[0])); err != nil {
			t.Fatal(err)
		}
	}
	// As after a pause, the previous file stays until the next is complete.
	dumped := 0
	dumpTo := func(p *process) (name string, took time.Duration, bytes int64) {
		dumped++
		name = filepath.Join(h.dir, "dump-"+strconv.Itoa(dumped))
		took, bytes = p.dump(t, name)
		return name, took, bytes
	}

	// The first machine is restored from the paused sandbox, with memory mapped like the
	// agent's. From then on QEMU allocates memory itself, so that the agent's mapping
	// does not slow it down.
	renew()
	incoming := pipe(t, devices)
	p := bare{cmdline: line, ram: ram, disk: files}.prepare(t, h, incoming, false)()
	p.receive(t)
	dump, _, _ := dumpTo(p)
	p.end()
	if err := errors.Join(incoming.Close(), ram.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
	for i := range 1 + dumps {
		renew()
		in, err := os.Open(dump)
		if err != nil {
			t.Fatal(err)
		}
		launch := bare{cmdline: line, disk: files}.prepare(t, h, in, false)
		begin := time.Now()
		p := launch()
		p.receive(t)
		p.do(t, "cont", nil)
		p.answers(t)
		reload := time.Since(begin)
		next, took, bytes := dumpTo(p)
		if i > 0 { // the first continues from the agent's state
			r.reload, r.dump, r.dumped = append(r.reload, reload), append(r.dump, took), append(r.dumped, bytes)
		}
		p.end()
		if err := errors.Join(in.Close(), os.Remove(dump)); err != nil {
			t.Fatal(err)
		}
		dump = next
	}
	if err := errors.Join(os.Remove(dump), os.Remove(overlay)); err != nil {
		t.Fatal(err)
	}
}
