package envd

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
)

func TestProcessSignals(t *testing.T) {
	g := boot(t)
	for _, n := range []int{0, -1, 65, 1 << 20} {
		_, err := g.process.SendSignal(t.Context(), as("", &pb.SendSignalRequest{Process: byPID(1), Signal: pb.Signal(n)}))
		wantCode(t, fmt.Sprint("signal ", n), err, connect.CodeNotFound)
	}
	for _, n := range []int{1, 2, 10, 34, 64} {
		p := g.start("", &pb.StartRequest{Process: sh(fmt.Sprintf("trap 'echo caught; exit 3' %d; echo ready; while :; do sleep 0.02; done", n))})
		for !strings.Contains(p.stdout.String(), "ready") && p.next() {
		}
		for _, bad := range []int{0, -1, 65} {
			wantCode(t, fmt.Sprint("signal ", bad), p.signal(bad), connect.CodeInvalidArgument)
		}
		if err := p.signal(n); err != nil {
			t.Errorf("signal %d: %v", n, err)
		}
		if p.wait(); n != 34 && n != 64 && (p.end.GetExitCode() != 3 || !strings.Contains(p.stdout.String(), "caught")) {
			t.Errorf("signal %d: end %v, %q", n, p.end, &p.stdout)
		}
	}
	// The process's group gets the signal too.
	p := g.start("", &pb.StartRequest{Process: sh("sleep 60 & echo ready; wait; echo over")})
	for !strings.Contains(p.stdout.String(), "ready") && p.next() {
	}
	if err := p.signal(15); err != nil {
		t.Fatal(err)
	}
	p.wait()
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil && !zombie(pid) }

// zombie reports whether a process is a zombie: in a container without an init, nobody
// reaps orphans.
func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(rest, "Z")
}

// TestProcessKillDescendants checks that a kill reaches descendants that left the
// process's group and session.
func TestProcessKillDescendants(t *testing.T) {
	g := boot(t)
	if g.cgroup == "" {
		t.Skip("needs a cgroup2 mount")
	}
	script := `setsid sh -c 'echo $$ > ` + g.dir + `/pid; exec sleep 60' </dev/null >/dev/null 2>&1 & exec sleep 60`
	pid := func() int {
		b, _ := os.ReadFile(g.dir + "/pid")
		n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
		return n
	}
	for _, kill := range []func() *running{
		func() *running {
			p := g.start("", &pb.StartRequest{Process: sh(script)})
			await.Until(t, "descendant", func() bool { return pid() > 0 })
			if err := p.signal(9); err != nil {
				t.Fatal(err)
			}
			return p.wait()
		},
		func() *running {
			for timeout := 0.5; ; timeout *= 2 { // until the process has time to start
				p := g.start("", &pb.StartRequest{Process: sh(script)}, "Process-Timeout", fmt.Sprint(timeout)).wait()
				if p.end.GetError() != "timed out" || p.end.GetExited() {
					t.Errorf("end by timeout is %v", p.end)
				}
				if pid() > 0 {
					return p
				}
			}
		},
	} {
		_ = os.Remove(g.dir + "/pid")
		kill()
		await.Until(t, "the descendant ends", func() bool { return pid() > 0 && !alive(pid()) })
	}
	await.Until(t, "the cgroups are removed", func() bool {
		g.start("", &pb.StartRequest{Process: sh("true")}).wait()
		return children(t, g.cgroup) <= 1+prepared
	})
}

// TestProcessBackground checks that a descendant that keeps the output open does not
// delay the end event, and may continue to write.
func TestProcessBackground(t *testing.T) {
	g := boot(t)
	file, gate := g.dir+"/after", g.dir+"/gate"
	// real time: the descendant writes after the process has ended.
	script := `(sleep 0.03; echo late; while [ ! -e ` + gate + ` ]; do sleep 0.05; done; echo more; echo more >&2; echo x > ` + file + `; exec sleep 60) & echo early`
	// Output soon after the end still arrives, unless the machine is too busy to produce
	// it soon.
	await.Until(t, "output after the end arrives", func() bool {
		p := g.start("", &pb.StartRequest{Process: sh(script)}).wait()
		out := p.stdout.String()
		if out != "early\n" && out != "early\nlate\n" {
			t.Fatalf("stdout %q", out)
		}
		return out == "early\nlate\n"
	})
	_ = os.WriteFile(gate, nil, 0o644)
	await.Until(t, "the descendant survives its output", func() bool { _, err := os.Stat(file); return err == nil })
	// Nor does one that never stops writing.
	p := g.start("", &pb.StartRequest{Process: sh(`yes & echo early`)}).wait()
	if !strings.Contains(p.stdout.String(), "early\n") {
		t.Error("the process's own output is missing")
	}
}

// TestProcessDeadline checks that a request's deadline applies to its process unless
// another is given.
func TestProcessDeadline(t *testing.T) {
	g := boot(t)
	for limit, started := 500*time.Millisecond, false; !started; limit *= 2 { // until the process has time to start
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		s, err := g.process.Start(ctx, as("", &pb.StartRequest{Process: sh("exec sleep 600")}))
		if err == nil {
			for s.Receive() {
				started = true
			}
		}
		cancel()
	}
	await.Until(t, "the process ends", func() bool {
		res, err := g.process.List(t.Context(), as("", &pb.ListRequest{}))
		return err == nil && len(res.Msg.GetProcesses()) == 0
	})
}

// TestProcessGroupRemoved removes the prepared group, as root in the guest may do with
// any empty group.
func TestProcessGroupRemoved(t *testing.T) {
	g := boot(t)
	if g.cgroup == "" {
		t.Skip("needs a cgroup2 mount")
	}
	for range 3 {
		await.Until(t, "a cgroup is prepared", func() bool { return children(t, g.cgroup) == prepared })
		entries, err := os.ReadDir(g.cgroup)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.IsDir() {
				if err := os.Remove(filepath.Join(g.cgroup, e.Name())); err != nil {
					t.Fatal(err)
				}
			}
		}
		if p := g.start("", &pb.StartRequest{Process: sh("echo $(($$ > 0))")}).wait(); p.stdout.String() != "1\n" || p.end.GetExitCode() != 0 {
			t.Errorf("%q, %v", &p.stdout, p.end)
		}
	}
}
