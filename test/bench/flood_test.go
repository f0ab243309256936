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
// get, without limits and with those that an agent has unless it is told others.
func TestFlood(t *testing.T) {
	var rows [][]string
	for _, limits := range []struct {
		name string
		env  map[string]string
	}{
		{"none", map[string]string{
			"WRENN_DISK_BYTES_PER_SECOND": "0", "WRENN_DISK_OPS_PER_SECOND": "0", "WRENN_NET_BYTES_PER_SECOND": "0", "WRENN_NET_PACKETS_PER_SECOND": "0",
		}},
		{"as they are", nil},
	} {
		h := newHost(t, 4*floodMemory, limits.env)
		neighbour, guest := h.create(t, floodMemory), h.create(t, floodMemory)
		h.serveSmall(t, neighbour)
		for _, f := range floods {
			stop := h.flood(t, guest, f.script)
			requests, writes := h.small(t, neighbour), h.writes(t, neighbour)
			stop()
			rows = append(rows, []string{limits.name, f.name, ms(requests.mid()), ms(requests.p99()), ms(writes.mid()), ms(writes.p99())})
		}
		h.destroy(t, guest)
		h.destroy(t, neighbour)
	}
	table(fmt.Sprintf("A guest's %d small requests and %d synced writes of 4 KiB while its neighbour floods the host", floodRequests, floodWrites),
		[]string{"limits", "the neighbour's flood", "requests, median", "p99", "writes, median", "p99"}, rows)
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
