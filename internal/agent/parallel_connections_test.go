package agent_test

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// backlogServer serves one request at a time, and responds with the number of requests so
// far. Its arguments are address, port, backlog, and milliseconds of work per request.
const backlogServer = `
import socket, sys, time
address, port, backlog, work = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]) / 1000
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((address, port))
s.listen(backlog)
posts = 0
open("/tmp/listens-%d" % port, "w").close()
while True:
    c, _ = s.accept()
    data = b""
    while b"\r\n\r\n" not in data:
        more = c.recv(65536)
        if not more: break
        data += more
    if not data: # An attempt to connect that was given up too late.
        c.close()
        continue
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    while len(body) < length:
        more = c.recv(65536)
        if not more: break
        body += more
    time.sleep(work)
    posts += 1
    out = str(posts).encode()
    c.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(out), out))
    c.close()
`

// serveBacklog starts a backlogServer, and returns when it listens.
func (h *host) serveBacklog(t *testing.T, sandbox, address string, port, backlog, workMS int) {
	t.Helper()
	if _, err := h.WriteFile(t.Context(), connect.NewRequest(&pb.WriteFileRequest{File: ref(sandbox, "/tmp/backlog.py"), Content: []byte(backlogServer)})); err != nil {
		t.Fatal(err)
	}
	h.exec(t, sandbox, sh(fmt.Sprintf("setsid python3 /tmp/backlog.py %s %d %d %d >/tmp/backlog.log 2>&1 </dev/null & while ! test -e /tmp/listens-%d; do sleep 0.1; done", address, port, backlog, workMS, port)), nil)
}

// posts sends n POSTs to a port, atOnce of them concurrently, and returns the errors of those
// that failed. It checks that the server got each of the others once.
func (h *host) posts(t *testing.T, sandbox string, port, n, atOnce int) (failed []string, slowest time.Duration) {
	t.Helper()
	var mu sync.Mutex
	var wg sync.WaitGroup
	room := make(chan struct{}, atOnce)
	seen := map[int]bool{}
	for range n {
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
			begun := time.Now()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, h.url(sandbox, port, "/"), strings.NewReader("hello"))
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := h.Plain.Do(req)
			var body []byte
			if err == nil {
				body, err = io.ReadAll(resp.Body)
				resp.Body.Close()
			}
			mu.Lock()
			defer mu.Unlock()
			slowest = max(slowest, time.Since(begun))
			if err != nil {
				failed = append(failed, err.Error())
				return
			}
			number, _ := strconv.Atoi(string(body))
			if resp.StatusCode != http.StatusOK || number == 0 || seen[number] {
				failed = append(failed, fmt.Sprintf("%d %s", resp.StatusCode, body))
			}
			seen[number] = true
		})
	}
	wg.Wait()
	for number := range seen {
		if number > n {
			t.Errorf("the server had POST %d of %d", number, n)
		}
	}
	return failed, slowest
}

// TestParallelConnections checks that concurrent requests are not lost, whatever the server's
// backlog and address. A full backlog only delays them.
func TestParallelConnections(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, request())
	for i, test := range []struct {
		address                 string
		backlog, work           int
		n, atOnce, afterResumes int
	}{
		{address: "127.0.0.1", backlog: 5, n: 120, atOnce: 40},
		{address: "0.0.0.0", backlog: 5, n: 120, atOnce: 40},
		{address: "0.0.0.0", backlog: 5, n: 60, atOnce: 20},
		{address: "::1", backlog: 5, n: 60, atOnce: 20},
		{address: "0.0.0.0", backlog: 1, work: 20, n: 60, atOnce: 60},
		{address: "127.0.0.1", backlog: 1, work: 20, n: 60, atOnce: 60},
		{address: "0.0.0.0", backlog: 5, n: 25, atOnce: 25, afterResumes: 1},
		{address: "127.0.0.1", backlog: 5, n: 25, atOnce: 25, afterResumes: 1},
	} {
		name := fmt.Sprintf("%s, backlog %d, %d of %d at a time, %d ms, %d resumes", test.address, test.backlog, test.atOnce, test.n, test.work, test.afterResumes)
		t.Run(name, func(t *testing.T) {
			port := 8100 + i
			h.serveBacklog(t, sandbox, test.address, port, test.backlog, test.work)
			for range test.afterResumes {
				if _, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: sandbox})); err != nil {
					t.Fatal(err)
				}
				if _, err := h.Resume(t.Context(), connect.NewRequest(&pb.ResumeRequest{SandboxId: sandbox})); err != nil {
					t.Fatal(err)
				}
			}
			begun := time.Now()
			failed, slowest := h.posts(t, sandbox, port, test.n, test.atOnce)
			t.Logf("%d of %d lost in %v, the slowest took %v", len(failed), test.n, time.Since(begun).Round(time.Millisecond), slowest.Round(time.Millisecond))
			if len(failed) > 0 {
				t.Errorf("lost, for example: %s", failed[0])
			}
		})
	}
}
