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

	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

const (
	floodMemory   = 512
	floodRequests = 400
	floodWrites   = 200
	floodRounds   = 3
	floodPort     = 9000
)

// floods are what one guest does to its host, without an end.
var floods = []struct{ name, script string }{
	{"nothing", "sleep 100000"},
	{"writes to the disk", "while :; do dd if=/dev/zero of=/root/flood bs=1M count=512 oflag=direct conv=notrunc 2>/dev/null; done"},
	{"UDP packets", `exec python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
b = bytes(64)
while True:
    try: s.sendto(b, ("203.0.113.9", 9))
    except OSError: pass
'`},
}

// writer writes 4 KiB to the disk again and again, and prints how long each took.
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

// TestFlood measures what a neighbour notices of a guest that takes all it can
// get: without limits, with those that an agent has unless it is told others, and
// with stricter ones. Of several rounds, those count in which the rest of the
// machine disturbed least.
func TestFlood(t *testing.T) {
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
		{"as they are", nil},
		{"32 MiB, 500 operations, 1000 packets", strict},
	} {
		t.Run(limits.name, func(t *testing.T) { rows = append(rows, flooded(t, limits.name, limits.env)...) })
	}
	table(fmt.Sprintf("A guest's %d small requests and %d synced writes of 4 KiB while its neighbour floods the host", floodRequests, floodWrites),
		[]string{"limits each second", "the neighbour's flood", "requests, median", "p99", "beside none", "writes, median", "p99", "beside none"}, rows)
}

// flooded measures a neighbour of each flood on a host of its own.
func flooded(t *testing.T, limits string, env map[string]string) (rows [][]string) {
	h := newHost(t, 4*floodMemory, env)
	neighbour, guest := h.create(t, floodMemory), h.create(t, floodMemory)
	defer h.destroy(t, neighbour)
	defer h.destroy(t, guest)
	h.serveSmall(t, neighbour)
	requests, writes := make([]sample, len(floods)), make([]sample, len(floods))
	for range floodRounds {
		for i, f := range floods {
			stop := h.flood(t, guest, f.script)
			requests[i], writes[i] = calmer(requests[i], h.small(t, neighbour)), calmer(writes[i], h.writes(t, neighbour))
			stop()
		}
	}
	for i, f := range floods {
		rows = append(rows, []string{
			limits, f.name,
			ms(requests[i].mid()), ms(requests[i].p99()), times(requests[i].p99(), requests[0].p99()),
			ms(writes[i].mid()), ms(writes[i].p99()), times(writes[i].p99(), writes[0].p99()),
		})
	}
	return rows
}

// calmer returns the sample with the lower p99.
func calmer(a, b sample) sample {
	if a == nil || b.p99() < a.p99() {
		return b
	}
	return a
}

// p99 is the time that one in a hundred takes longer than.
func (s sample) p99() time.Duration {
	sorted := slices.Sorted(slices.Values(s))
	return sorted[len(sorted)*99/100]
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
	time.Sleep(3 * time.Second) // beyond its burst
	return func() { cancel(); <-ended }
}

// serveSmall starts a server of small answers in a sandbox.
func (h *host) serveSmall(t *testing.T, sandbox string) {
	t.Helper()
	h.exec(t, sandbox, fmt.Sprintf("mkdir -p /tmp/w && cd /tmp/w && echo hello >index.html && { setsid python3 -m http.server %d >/dev/null 2>&1 & }", floodPort))
}

// small asks for small answers.
func (h *host) small(t *testing.T, sandbox string) sample {
	t.Helper()
	url := fmt.Sprintf("%s/proxy/%s/%d/", h.Base, sandbox, floodPort)
	all := make(sample, floodRequests)
	for i := range all {
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

// writes has a sandbox write to its disk.
func (h *host) writes(t *testing.T, sandbox string) sample {
	t.Helper()
	var all sample
	if err := json.Unmarshal([]byte(strings.TrimSpace(h.exec(t, sandbox, writer))), &all); err != nil || len(all) != floodWrites {
		t.Fatalf("%d writes: %v", len(all), err)
	}
	return all
}
