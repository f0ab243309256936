package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

const (
	floodMemory   = 512
	floodRequests = 300 // per phase, as many writes
	floodWrites   = 300
	floodPace     = 25 * time.Millisecond // between the beginnings of two requests
	floodPort     = 9000
)

// floodRounds returns the number of rounds of all phases.
func floodRounds() int {
	if testing.Short() {
		return 1
	}
	return 5
}

// floods are what one guest does to its host, endlessly. The first two are for
// comparison: a guest that does nothing, and one that only uses its processor.
var floods = []struct{ name, script string }{
	{"nothing (quiet)", ""},
	{"a busy processor", "while :; do :; done"},
	{"bytes to the disk", "while :; do dd if=/dev/zero of=/root/flood bs=1M count=512 oflag=direct conv=notrunc 2>/dev/null; done"},
	{"operations of the disk", `exec python3 -c '
import mmap, os
f = os.open("/root/operations", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
page, i = mmap.mmap(-1, 4096), 0
while True:
    os.pwritev(f, [page], 4096 * (i * 7919 % 65536))
    i += 1
'`},
	{"bytes to the network", sends(1400)},
	{"packets to the network", sends(16)},
}

// sends returns a script that sends UDP packets of the given size to nobody.
func sends(bytes int) string {
	return fmt.Sprintf(`exec python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
b = bytes(%d)
while True:
    try: s.sendto(b, ("203.0.113.9", 9))
    except OSError: pass
'`, bytes)
}

// writer is a script that repeatedly writes 4 KiB to the disk, and prints how long each
// write took.
var writer = fmt.Sprintf(`exec python3 -c '
import json, os, time
f = os.open("small", os.O_RDWR | os.O_CREAT | os.O_DSYNC)
all = []
for i in range(%d):
    begin = time.monotonic()
    os.pwrite(f, bytes(4096), 4096 * (i %% 64))
    all.append(int((time.monotonic() - begin) * 1e9))
    time.sleep(0.005)
print(json.dumps(all))
'`, floodWrites)

// TestFlood measures how a guest that takes everything it can get affects a neighbour,
// with the agent's default limits. The goal is a p99 of at most 1.5 times the quiet one.
// Each round has all phases, so that other work on the machine affects them alike. It
// takes some six minutes on a quiet machine; -short has one round.
func TestFlood(t *testing.T) {
	asked(t)
	floodTable(flooded(t, "default", nil))
}

// TestFloodLimits is TestFlood without limits, and with stricter ones.
func TestFloodLimits(t *testing.T) {
	asked(t)
	strict := map[string]string{
		"WRENN_DISK_BYTES_PER_SECOND": "33554432", "WRENN_DISK_OPS_PER_SECOND": "500", "WRENN_NET_BYTES_PER_SECOND": "8388608", "WRENN_NET_PACKETS_PER_SECOND": "1000",
	}
	none := map[string]string{}
	for name := range strict {
		none[name] = "0"
	}
	var rows [][]string
	for _, limits := range []struct {
		name string
		env  map[string]string
	}{
		{"none", none},
		{"32 MiB, 500 operations, 1000 packets", strict},
	} {
		t.Run(limits.name, func(t *testing.T) { rows = append(rows, flooded(t, limits.name, limits.env)...) })
	}
	floodTable(rows)
}

func floodTable(rows [][]string) {
	table(fmt.Sprintf("A guest's %d small requests and %d synced writes of 4 KiB during each flood of its neighbour", floodRounds()*floodRequests, floodRounds()*floodWrites),
		[]string{
			"limits per second", "the neighbour's flood", "processors that the flood uses",
			"requests p50", "p99", "p99 ÷ quiet", "p99 ÷ a busy processor's", "writes p50", "p99", "p99 ÷ quiet", "p99 ÷ a busy processor's",
		}, rows)
}

// phase has one guest's measurements, of all rounds together, during one of its
// neighbour's floods.
type phase struct {
	requests, writes sample
	used, took       time.Duration // used: processor time of the neighbour's QEMU
}

// flooded measures a neighbour of each flood on a new host.
func flooded(t *testing.T, limits string, env map[string]string) (rows [][]string) {
	h := newHost(t, 4*floodMemory, env)
	neighbour, guest := h.create(t, floodMemory), h.create(t, floodMemory)
	defer h.destroy(t, neighbour)
	defer h.destroy(t, guest)
	h.serveSmall(t, neighbour)
	vmm := agenttest.QEMU(guest)
	phases := make([]phase, len(floods))
	for range floodRounds() {
		for i, f := range floods {
			p, stop := &phases[i], func() {}
			if f.script != "" {
				stop = h.flood(t, guest, f.script)
			}
			before, begin := processTime(t, vmm), time.Now()
			p.requests, p.writes = append(p.requests, h.small(t, neighbour)...), append(p.writes, h.writes(t, neighbour)...)
			p.used, p.took = p.used+processTime(t, vmm)-before, p.took+time.Since(begin)
			stop()
		}
	}
	const quiet, busy = 0, 1 // indices of floods
	compare := func(i int, of func(phase) sample) []string {
		p99 := func(i int) float64 { return float64(of(phases[i]).percentile(99)) }
		return []string{ms(of(phases[i]).percentile(50)), ms(of(phases[i]).percentile(99)), fmt.Sprintf("%.2f", p99(i)/p99(quiet)), fmt.Sprintf("%.2f", p99(i)/p99(busy))}
	}
	for i, f := range floods {
		row := []string{limits, f.name, fmt.Sprintf("%.2f", phases[i].used.Seconds()/phases[i].took.Seconds())}
		row = append(row, compare(i, func(p phase) sample { return p.requests })...)
		rows = append(rows, append(row, compare(i, func(p phase) sample { return p.writes })...))
	}
	return rows
}

// percentile returns the time that n percent of the sample take at most.
func (s sample) percentile(n int) time.Duration {
	sorted := slices.Sorted(slices.Values(s))
	return sorted[len(sorted)*n/100]
}

// flood runs a script in a sandbox until stop is called.
func (h *host) flood(t *testing.T, sandbox, script string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, err := h.Exec(ctx, connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: &pb.Command{Cmd: "sh", Args: []string{"-c", script}, User: "root"}}))
		if ctx.Err() == nil {
			t.Errorf("the flood ended: %v", err)
		}
	}()
	time.Sleep(2500 * time.Millisecond) // until its burst is used up, and the agent has seen what it uses
	return func() { cancel(); <-ended }
}

// serveSmall starts a server of small responses in a sandbox, and waits until it
// responds.
func (h *host) serveSmall(t *testing.T, sandbox string) {
	t.Helper()
	h.exec(t, sandbox, fmt.Sprintf("mkdir -p /tmp/w && cd /tmp/w && echo hello >index.html && { setsid python3 -m http.server %[1]d >/dev/null 2>&1 & } && until curl -fs localhost:%[1]d; do sleep 0.1; done", floodPort))
}

// small requests small responses, at a pace that leaves the sandbox idle about half of the
// time, so that it does not compete with itself.
func (h *host) small(t *testing.T, sandbox string) sample {
	t.Helper()
	url := fmt.Sprintf("%s/proxy/%s/%d/", h.Base, sandbox, floodPort)
	all := make(sample, floodRequests)
	pace := time.NewTicker(floodPace)
	defer pace.Stop()
	for i := range all {
		<-pace.C
		begin := time.Now()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := h.Plain.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if err != nil || res.StatusCode != http.StatusOK {
			t.Fatalf("%s: %v", res.Status, err)
		}
		all[i] = time.Since(begin)
	}
	return all
}

// writes lets a sandbox write to its disk.
func (h *host) writes(t *testing.T, sandbox string) sample {
	t.Helper()
	var all sample
	if err := json.Unmarshal([]byte(strings.TrimSpace(h.exec(t, sandbox, writer))), &all); err != nil || len(all) != floodWrites {
		t.Fatalf("%d writes: %v", len(all), err)
	}
	return all
}
