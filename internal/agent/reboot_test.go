package agent_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

func (h *host) state(t *testing.T, sandbox string) *pb.Sandbox {
	t.Helper()
	g, err := h.Get(t.Context(), connect.NewRequest(&pb.GetRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatal(err)
	}
	return g.Msg.GetSandbox()
}

func (h *host) reboot(t *testing.T, sandbox string) {
	t.Helper()
	begin := time.Now()
	r, err := h.Reboot(t.Context(), connect.NewRequest(&pb.RebootRequest{SandboxId: sandbox}))
	if err != nil {
		t.Fatalf("reboot: %v", err)
	}
	if s := r.Msg.GetSandbox(); s.GetState() != pb.SandboxState_SANDBOX_STATE_RUNNING || s.GetCondition() != nil {
		t.Errorf("rebooted %v", s)
	}
	t.Logf("rebooted in %v", time.Since(begin).Round(time.Millisecond))
}

// loses waits until a sandbox is paused without its memory.
func (h *host) loses(t *testing.T, sandbox, why string) {
	t.Helper()
	var s *pb.Sandbox
	await.Until(t, "the sandbox is paused without memory", func() bool {
		s = h.state(t, sandbox)
		return s.GetState() == pb.SandboxState_SANDBOX_STATE_PAUSED && s.GetCondition() != nil
	})
	if got := s.GetCondition().GetReason(); got != why {
		t.Errorf("it lost its memory because of %q, not %q: %v", got, why, s.GetCondition())
	}
	t.Logf("the condition: %v", s.GetCondition())
	if e := h.event(t, sandbox); e.GetKind() != pb.Event_KIND_PAUSED {
		t.Errorf("event %v", e)
	}
}

// remembers checks that a rebooted sandbox kept its disk, name and environment, and
// nothing in memory.
func (h *host) remembers(t *testing.T, sandbox string) {
	t.Helper()
	got := h.exec(t, sandbox, sh("cat note; hostname; echo $FROM; ls /dev/shm; pgrep -x sleep; sudo -n true && echo root"), nil)
	if want := "remembered\n" + sandbox + "\nsandbox\nroot\n"; string(got.GetStdout()) != want {
		t.Errorf("it has %q %q", got.GetStdout(), got.GetStderr())
	}
}

const takeNote = "echo remembered >note; sync; echo x >/dev/shm/x; setsid sleep 600 >/dev/null 2>&1 &"

// TestReboot reboots a sandbox after everything that can happen to it: each time it keeps
// its disk, and can be paused and forked.
func TestReboot(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, request())
	prepare := func() {
		h.exec(t, sandbox, sh("echo remembered >note; echo x >/dev/shm/x; setsid sleep 600 >/dev/null 2>&1 &"), nil)
	}
	root := func(script string) {
		ctx, cancel := context.WithTimeout(t.Context(), await.Hang)
		defer cancel()
		_, _ = h.Exec(ctx, connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: sh("sync; sudo sh -c '" + script + "'")}))
	}
	t.Run("running", func(t *testing.T) {
		prepare() // A guest that responds syncs its files to the disk.
		h.reboot(t, sandbox)
		h.remembers(t, sandbox)
		h.reboot(t, sandbox)
		h.remembers(t, sandbox)
	})
	t.Run("pause, resume, fork", func(t *testing.T) {
		h.exec(t, sandbox, sh("echo y >/dev/shm/y"), nil)
		for range 2 {
			if _, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: sandbox})); err != nil {
				t.Fatal(err)
			}
			if _, err := h.Resume(t.Context(), connect.NewRequest(&pb.ResumeRequest{SandboxId: sandbox})); err != nil {
				t.Fatal(err)
			}
			if got := h.exec(t, sandbox, sh("cat note /dev/shm/y"), nil); string(got.GetStdout()) != "remembered\ny\n" {
				t.Errorf("after a pause it has %q %q", got.GetStdout(), got.GetStderr())
			}
		}
		copied := request().GetSandboxId()
		if _, err := h.Fork(t.Context(), connect.NewRequest(&pb.ForkRequest{SandboxId: sandbox, Copies: []*pb.ForkRequest_Copy{{SandboxId: copied, AccessToken: "t"}}})); err != nil {
			t.Fatal(err)
		}
		if got := h.exec(t, copied, sh("cat note /dev/shm/y"), nil); string(got.GetStdout()) != "remembered\ny\n" {
			t.Errorf("a fork has %q %q", got.GetStdout(), got.GetStderr())
		}
		h.destroy(t, copied)
	})
	t.Run("paused", func(t *testing.T) {
		h.exec(t, sandbox, sh(takeNote), nil)
		if _, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: sandbox})); err != nil {
			t.Fatal(err)
		}
		h.reboot(t, sandbox)
		h.remembers(t, sandbox)
	})
	for _, end := range []struct{ name, script, why string }{
		{"its kernel crashes", "echo c >/proc/sysrq-trigger", "crashed"},
		{"its daemon is killed", "kill -9 $(pidof envd)", "crashed"},
		{"it restarts itself", "echo b >/proc/sysrq-trigger", "restarted"},
		{"it runs out of memory", "echo -1000 >/proc/self/oom_score_adj; mkdir -p /mnt/m; mount -t tmpfs -o size=100% none /mnt/m; for i in 1 2 3 4; do head -c 300m /dev/zero >/mnt/m/$i & done; wait", "oom"},
		{"its machine is killed", "", "killed"},
	} {
		t.Run(end.name, func(t *testing.T) {
			h.exec(t, sandbox, sh(takeNote), nil)
			if end.script == "" {
				if err := syscall.Kill(agenttest.QEMU(sandbox), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			} else {
				root(end.script)
			}
			h.loses(t, sandbox, end.why)
			h.reboot(t, sandbox)
			h.remembers(t, sandbox)
		})
	}
	t.Run("it hangs", func(t *testing.T) {
		h.exec(t, sandbox, sh(takeNote), nil)
		if err := syscall.Kill(agenttest.QEMU(sandbox), syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		h.reboot(t, sandbox)
		h.remembers(t, sandbox)
	})
	h.destroy(t, sandbox)
	h.gone(t, sandbox)
}

// TestRebootKilled kills the agent at every step of a reboot of a running and of a paused
// sandbox: the next agent has the sandbox with its disk, and reboots it.
func TestRebootKilled(t *testing.T) {
	h := newOwnHost(t, nil) // kills the agent
	sandbox := h.create(t, request())
	for _, at := range []string{"reboot: forgotten", "reboot: vacated", "reboot: booted", "reboot: answers", "clean"} {
		for _, from := range []string{"running", "paused"} {
			t.Run(at+", "+from, func(t *testing.T) {
				h.exec(t, sandbox, sh(takeNote), nil)
				if from == "paused" {
					if _, err := h.Pause(t.Context(), connect.NewRequest(&pb.PauseRequest{SandboxId: sandbox})); err != nil {
						t.Fatal(err)
					}
				}
				if at == "clean" { // The VM ends while no agent runs.
					h.Kill(t, syscall.SIGKILL)
					if pid := agenttest.QEMU(sandbox); pid != 0 {
						if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
							t.Fatal(err)
						}
					}
				} else {
					if err := os.WriteFile(agenttest.KillAt(h.Dir), []byte(at), 0o600); err != nil {
						t.Fatal(err)
					}
					if _, err := h.Reboot(t.Context(), connect.NewRequest(&pb.RebootRequest{SandboxId: sandbox})); err == nil {
						t.Fatal("the agent was not killed")
					}
					await.Recv(t, "the end of the agent", h.Ended)
					h.HTTP.CloseIdleConnections()
					_ = os.Remove(agenttest.KillAt(h.Dir))
				}
				h.Start(t)
				s := h.state(t, sandbox)
				if lost := from == "running" || at != "clean"; s.GetState() != pb.SandboxState_SANDBOX_STATE_PAUSED || (s.GetCondition() != nil) != lost {
					t.Errorf("it is %v", s)
				}
				h.reboot(t, sandbox)
				h.remembers(t, sandbox)
				if m := h.Machines(); len(m) != 1 {
					t.Errorf("machines %v", m)
				}
			})
		}
	}
	u, _ := id.Parse(id.Sandbox, sandbox)
	if saved, _ := filepath.Glob(filepath.Join(h.Dir.Sandbox(u), "state-*")); len(saved) > 2 {
		t.Errorf("states %v", saved)
	}
	h.destroy(t, sandbox)
	h.gone(t, sandbox)
}

// TestGuestShutsDown checks that a sandbox ends when its guest shuts down.
func TestGuestShutsDown(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, request())
	_, _ = h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: &pb.Command{Cmd: "sudo", Args: []string{"sh", "-c", "echo o > /proc/sysrq-trigger; sleep 60"}}}))
	if e := h.event(t, sandbox); e.GetKind() != pb.Event_KIND_EXITED {
		t.Errorf("event %v", e)
	}
	h.awaitGone(t, sandbox)
	h.gone(t, sandbox)
}

// TestSilentGuest checks that while a guest's daemon is stopped, the agent reports that
// it does not respond, also to clients of the sandbox's ports.
func TestSilentGuest(t *testing.T) {
	h := newHost(t)
	sandbox, other := h.create(t, request()), h.create(t, request())
	signal := h.signaller(t, sandbox)
	await.Until(t, "it does not answer", func() bool {
		signal("STOP")
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		_, err := h.Exec(ctx, connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: sh("true")}))
		return err != nil
	})
	begun := time.Now()
	await.Until(t, "the agent notices", func() bool { return h.state(t, sandbox).GetCondition().GetReason() == "no_answer" })
	t.Logf("noticed after %v", time.Since(begun).Round(time.Second))
	if s := h.state(t, sandbox); s.GetState() != pb.SandboxState_SANDBOX_STATE_RUNNING {
		t.Errorf("it is %v", s)
	}
	if code, body := h.get(t, h.url(sandbox, 8000, "/"), nil); code != http.StatusGatewayTimeout || !strings.Contains(body, "reboot it") {
		t.Errorf("a request to a port: %d %s", code, body)
	}
	if s := h.state(t, other); s.GetCondition() != nil {
		t.Errorf("the other is %v", s)
	}
	h.exec(t, other, sh("true"), nil)
	signal("CONT")
	await.Until(t, "it responds again", func() bool { return h.state(t, sandbox).GetCondition() == nil })
}

// signaller starts a program in a sandbox and returns a function that makes it signal the
// guest's daemon. A packet tells the program, because a stopped daemon runs no command.
func (h *host) signaller(t *testing.T, sandbox string) func(signal string) {
	t.Helper()
	const program = `
import socket, subprocess
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("", 7001))
open("/tmp/listens", "w")
while True:
    subprocess.run(["sh", "-c", "kill -%s $(pidof envd)" % s.recv(100).decode()])`
	h.exec(t, sandbox, sh("sudo setsid python3 -c '"+strings.ReplaceAll(program, "'", `'\''`)+"' </dev/null >/dev/null 2>&1 & until [ -e /tmp/listens ]; do sleep 0.1; done"), nil)
	conn, err := net.Dial("udp", net.JoinHostPort(h.address(t, sandbox), "7001"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return func(signal string) {
		t.Helper()
		if _, err := conn.Write([]byte(signal)); err != nil {
			t.Fatal(err)
		}
	}
}

// address returns the address at which the host reaches a sandbox: that of the end of its
// slot's link.
func (h *host) address(t *testing.T, sandbox string) string {
	t.Helper()
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	var record struct{ Slot int }
	if err := json.Unmarshal([]byte(read(h.Dir.SandboxRecord(u))), &record); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("ip", "-4", "-json", "address", "show", "dev", fmt.Sprintf("wrenn-veth-%d", record.Slot)).Output()
	if err != nil {
		t.Fatal(err)
	}
	var links []struct {
		AddrInfo []struct{ Local netip.Addr } `json:"addr_info"`
	}
	if err := json.Unmarshal(out, &links); err != nil || len(links) != 1 || len(links[0].AddrInfo) != 1 {
		t.Fatalf("the link of slot %d: %s %v", record.Slot, out, err)
	}
	return links[0].AddrInfo[0].Local.Next().String()
}
