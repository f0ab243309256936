package agent_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// groupOf returns the name of a machine's cgroup.
func groupOf(t *testing.T, pid int) string {
	t.Helper()
	_, name, ok := strings.Cut(read(fmt.Sprintf("/proc/%d/cgroup", pid)), "/wrenn/")
	if !ok {
		t.Fatalf("process %d is in no cgroup", pid)
	}
	name, _, _ = strings.Cut(name, "\n")
	return name
}

// TestSharedHost does to a host with a real machine what other software does to it, and
// what breaks most. internal/agent/network tests more ways to break the network.
func TestSharedHost(t *testing.T) {
	h := newOwnHost(t, nil) // breaks the host and kills the agent
	sandbox := h.create(t, request())
	works := func(when string) {
		t.Helper()
		if got := h.exec(t, sandbox, sh("echo works"), nil); string(got.GetStdout()) != "works\n" {
			t.Errorf("%s: %v", when, got)
		}
	}
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	eventually := func(what string, cond func() error) {
		t.Helper()
		var err error
		t.Cleanup(func() {
			if err != nil {
				t.Logf("%s: %v", what, err)
			}
		})
		await.Until(t, what, func() bool { err = cond(); return err == nil })
	}

	run("ip", "netns", "add", "x")
	t.Cleanup(func() {
		_ = unix.Unmount(layout.OldNamespaces, unix.MNT_DETACH)
		_ = os.RemoveAll(layout.OldNamespaces)
	})
	run("ip", "netns", "exec", "x", "true")
	works("with a named namespace of somebody else's")
	run("nft", "flush", "ruleset")
	eventually("the firewall's rules", func() error {
		out, err := exec.Command("nft", "list", "table", "inet", "wrenn").CombinedOutput()
		if err == nil && !strings.Contains(string(out), "masquerade") {
			err = errors.New(string(out))
		}
		return err
	})
	works("after the firewall was flushed")

	// Detaching all loop devices (losetup -D) does no harm: Wrenn uses none.
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Error(err)
	}
	for _, f := range files {
		if strings.HasPrefix(read(f), string(h.Dir)) {
			t.Errorf("a loop device has %s", read(f))
		}
	}

	pid := agenttest.QEMU(sandbox)
	inGroup := func() error {
		if b := read(fmt.Sprintf("/proc/%d/cgroup", pid)); strings.Count(b, "/wrenn/") < len(cgroup.Folders()) {
			return fmt.Errorf("it is in %s", b)
		}
		return nil
	}
	if err := inGroup(); err != nil {
		t.Fatal(err)
	}
	group := groupOf(t, pid)
	moveOut := func() {
		for _, dir := range cgroup.Folders() {
			if err := os.WriteFile(dir+"/../cgroup.procs", []byte(strconv.Itoa(pid)), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	moveOut()
	eventually("the cgroup", inGroup)
	works("after its machine was moved out of its control group")
	for _, dir := range cgroup.Folders() {
		// The agent may have moved the machine back already.
		eventually("its group is removed", func() error {
			moveOut()
			return syscall.Rmdir(filepath.Join(dir, group))
		})
	}
	eventually("the cgroup after its removal", inGroup)
	eventually("the limit of the new cgroup", func() error {
		limit := filepath.Join(cgroup.Folders()[0], group, "memory.max")
		if _, err := os.Stat(limit); err != nil {
			limit = filepath.Join(cgroup.Folders()[0], group, "memory.limit_in_bytes")
		}
		n, err := strconv.ParseInt(strings.TrimSpace(read(limit)), 10, 64)
		if err == nil && n > 8<<30 {
			err = fmt.Errorf("it allows %d bytes", n)
		}
		return err
	})
	works("after its control group was removed")

	for _, name := range []string{h.Dir.AgentLock(), h.Dir.Problems()} {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	eventually("the list of problems", func() error {
		_, err := os.Stat(h.Dir.Problems())
		return err
	})
	eventually("the agent's lock", func() error {
		second := exec.Command("/proc/self/exe")
		second.Env = h.Cmd.Env
		if _, err := os.Stat(h.Dir.AgentLock()); err != nil {
			return err
		}
		if out, err := second.CombinedOutput(); err == nil || !strings.Contains(string(out), "another host agent") {
			return fmt.Errorf("a second agent: %v %s", err, out)
		}
		return nil
	})

	// As if the agent were killed while the machine yields to others.
	weight := filepath.Join("/sys/fs/cgroup/wrenn", group, "cpu.weight")
	if _, err := os.Stat(weight); err != nil {
		weight = filepath.Join("/sys/fs/cgroup/cpu/wrenn", group, "cpu.shares")
	}
	normal := read(weight)
	if err := os.WriteFile(weight, []byte("13"), 0); err != nil {
		t.Fatal(err)
	}
	// No agent runs while /run is emptied.
	h.Kill(t, syscall.SIGKILL)
	run("umount", "-l", layout.Namespaces())
	if err := os.RemoveAll(layout.Machine); err != nil {
		t.Fatal(err)
	}
	h.Start(t)
	works("after /run was cleaned while no agent ran")
	if agenttest.QEMU(sandbox) != pid {
		t.Error("it has another machine")
	}
	eventually("the machine's share of the processors", func() error {
		if now := read(weight); now != normal {
			return fmt.Errorf("its weight is %s, not %s", now, normal)
		}
		return nil
	})
	run("ip", "netns", "del", "x")
	eventually("no problem is left", func() error {
		m, err := h.Host(t.Context(), connect.NewRequest(&pb.HostRequest{}))
		if err == nil && len(m.Msg.GetProblems()) > 0 {
			err = fmt.Errorf("%v", m.Msg.GetProblems())
		}
		return err
	})
	h.destroy(t, sandbox)
	h.gone(t, sandbox)
}
