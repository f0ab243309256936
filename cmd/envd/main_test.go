package main

import (
	"debug/elf"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// TestProgram checks the program as it is in guests: static, small, and leaving nothing
// behind.
func TestProgram(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes cgroups")
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "envd")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Error("the program is not static")
		}
	}
	if info, err := os.Stat(program); err != nil || info.Size() > 20<<20 {
		t.Errorf("the program has %d bytes, %v", info.Size(), err)
	}

	group := defaultCgroup()
	if group != "" {
		group = filepath.Join(filepath.Dir(group), fmt.Sprintf("wrenn-test-program-%d", os.Getpid()))
	}
	addr := "unix:" + filepath.Join(dir, "s")
	cmd := exec.Command(program, "-listen", addr, "-cgroup", group, "-user", "root", "-interface", "")
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()

	client, base := netaddr.HTTPClient(addr)
	await.Until(t, "/health", func() bool {
		res, err := client.Get(base + "/health")
		if err == nil {
			res.Body.Close()
		}
		return err == nil
	})
	res, err := client.Post(base+"/init", "application/json", strings.NewReader(`{"accessToken":"token","timestamp":1}`))
	if err != nil || res.StatusCode != http.StatusNoContent {
		t.Fatalf("/init: %v, %v", res, err)
	}
	res.Body.Close()
	ctx := await.Context(t)
	start := func(script string) *connect.ServerStreamForClient[pb.StartResponse] {
		t.Helper()
		req := connect.NewRequest(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "sh", Args: []string{"-c", script}}})
		req.Header().Set(hostwire.AccessToken, "token")
		s, err := processconnect.NewProcessClient(client, base).Start(ctx, req)
		if err != nil || !s.Receive() {
			t.Fatalf("start: %v, %v", err, s.Err())
		}
		return s
	}
	var out strings.Builder
	for s := start("cat /proc/self/oom_score_adj; umask; ls /proc/self/fd"); s.Receive(); {
		_, _ = out.Write(s.Msg().GetEvent().GetData().GetStdout())
	}
	if out.String() != "0\n0022\n0\n1\n2\n3\n" {
		t.Errorf("a process sees %q", &out)
	}
	req, _ := http.NewRequestWithContext(ctx, "GET", base+"/metrics", nil)
	req.Header.Set(hostwire.AccessToken, "token")
	if res, err = client.Do(req); err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if !strings.Contains(string(body), "mem_total") {
		t.Errorf("/metrics: %s", body)
	}

	// Users' processes end with it, even those that left their group.
	start("setsid sleep 300 & exec sleep 300")
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := await.Recv(t, "the end of the program", exited); err != nil {
		t.Errorf("the program ended with %v", err)
	}
	if _, err := os.Stat(group); group != "" && err == nil {
		t.Error("its cgroup still exists")
	}
}
