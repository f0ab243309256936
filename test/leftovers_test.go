package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
)

// processes are those whose command line or environment's directory is the
// installation's, by pid.
func processes(dir string) map[int]string {
	found := map[int]string{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		environ, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		line := string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))
		cwd, _ := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if strings.Contains(line, dir) || bytes.Contains(environ, []byte(dir)) || strings.HasPrefix(cwd, dir) || vmOf(line, dir) {
			found[pid] = line
		}
	}
	return found
}

// vmOf tells whether a command line is that of a virtual machine of the
// installation: it names the sandbox, whose folder is there.
func vmOf(line, dir string) bool {
	_, rest, ok := strings.Cut(line, "-name wrenn-")
	if !ok || len(rest) < 36 {
		return false
	}
	_, err := os.Stat(filepath.Join(dir, "sandboxes", rest[:36]))
	return err == nil
}

// roles are the installation's processes by what they are.
func (i *installation) roles(t testing.TB) map[string][]int {
	t.Helper()
	roles := map[string][]int{}
	for pid, line := range processes(i.dir) {
		role := ""
		switch {
		case strings.Contains(line, "wrenn server"):
			role = "server"
		case strings.Contains(line, "wrenn agent"):
			role = "agent"
		case strings.Contains(line, "wrenn up"):
			role = "up"
		case strings.Contains(line, "redis-server"):
			role = "redis"
		case strings.Contains(line, "caddy run"):
			role = "caddy"
		case strings.Contains(line, "bin/postgres -D"):
			role = "postgres"
		case strings.Contains(line, "qemu-system"):
			role = "qemu"
		}
		if role != "" {
			roles[role] = append(roles[role], pid)
		}
	}
	return roles
}

// leftovers count what sandboxes and services take of the machine.
func (i *installation) leftovers(t testing.TB) map[string]int {
	t.Helper()
	n := map[string]int{}
	count := func(pattern string) int {
		m, _ := filepath.Glob(pattern)
		return len(m)
	}
	n["sandbox folders"] = count(filepath.Join(i.dir, "sandboxes", "*"))
	n["qemu processes"] = len(i.roles(t)["qemu"])
	n["control groups"] = count("/sys/fs/cgroup/memory/wrenn/*-*") + count("/sys/fs/cgroup/wrenn/*-*")
	return n
}

// same fails the test unless leftovers become no more than they were: what a
// sandbox leaves is cleaned up beside the answer.
func (i *installation) same(t *testing.T, before map[string]int) {
	t.Helper()
	eventually(t, func() error {
		now := i.leftovers(t)
		for what, n := range now {
			// Fewer is well: what others on this machine had may be gone too.
			if n > before[what] {
				return fmt.Errorf("left behind: %v, before: %v", now, before)
			}
		}
		return nil
	})
}

// machine is what an installation may leave on the machine as a whole.
func machine(t testing.TB) map[string]string {
	t.Helper()
	state := map[string]string{}
	run := func(name string, args ...string) string {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		return string(out)
	}
	slots, _ := filepath.Glob("/run/wrenn/netns/wrenn-ns-*")
	state["namespaces"] = run("ip", "netns", "list") + strings.Join(slots, " ")
	var links []string
	for line := range strings.Lines(run("ip", "-brief", "link")) {
		links = append(links, strings.Fields(line)[0])
	}
	slices.Sort(links)
	state["links"] = strings.Join(links, " ")
	state["nft tables"] = run("nft", "list", "tables")
	state["routes"] = run("ip", "route")
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	state["mounts"] = string(mounts)
	state["loop devices"] = run("losetup", "-a")
	// Not the group that they all lie in: the last installation that closes
	// while none is left in it removes it, whoever made it.
	var groups []string
	for _, parent := range []string{"/sys/fs/cgroup/*/wrenn", "/sys/fs/cgroup/wrenn"} {
		below, _ := filepath.Glob(parent + "/*/")
		groups = append(groups, below...)
	}
	state["control groups"] = strings.Join(groups, " ")
	forward, _ := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	state["forwarding"] = string(forward)
	return state
}

// TestDiscard ends processes that know an installation in each way.
func TestDiscard(t *testing.T) {
	dir := t.TempDir()
	var all []*exec.Cmd
	for _, change := range []func(*exec.Cmd){
		func(c *exec.Cmd) { c.Env = append(os.Environ(), "WRENN_DIR="+dir) },
		func(c *exec.Cmd) { c.Dir = dir },
		func(c *exec.Cmd) { c.Args = append(c.Args, dir) },
	} {
		cmd := exec.Command("sh", "-c", "while :; do sleep 1; done", "sh")
		change(cmd)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		all = append(all, cmd)
	}
	discard(t, dir)
	for n, cmd := range all {
		if err := cmd.Wait(); err == nil || cmd.ProcessState.Success() {
			t.Errorf("process %d ended by itself", n)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is there: %v", err)
	}
}

func TestOnceLeavesNothing(t *testing.T) {
	if why := unable(); why != "" {
		t.Skip(why)
	}
	i := up(t) // has made the images
	dir, err := newDir()
	if err != nil {
		t.Fatal(err)
	}
	defer discard(t, dir)
	listen, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	before := machine(t)
	// Beside the one that runs: two installations share a machine.
	cmd := exec.Command(i.wrenn, "up", "--dir", dir, "--listen", listen, "--once")
	cmd.Env = append(os.Environ(), "WRENN_WARM=2") // machines that wait go too
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "42") {
		t.Fatalf("%v: %s", err, out)
	}
	for what, was := range before {
		if now := machine(t)[what]; now != was {
			t.Errorf("%s were\n%s\nand are\n%s", what, was, now)
		}
	}
	if left := processes(dir); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
	began := time.Now()
	if out, err := exec.Command(i.wrenn, "up", "--dir", dir, "--listen", listen, "--once").CombinedOutput(); err != nil {
		t.Fatalf("the second start: %v: %s", err, out)
	}
	t.Logf("the second start, self-check and stop took %v", time.Since(began).Round(time.Millisecond))
	if out, err := exec.Command(i.wrenn, "up", "--dir", i.dir, "--listen", listen).CombinedOutput(); err == nil || !strings.Contains(string(out), "--dir") {
		t.Errorf("a second up on one directory: %v: %s", err, out)
	}
}

func TestKilledVMIsCleanedUp(t *testing.T) {
	i := up(t)
	before := i.leftovers(t)
	c := i.client(t)
	s, err := c.Create(t.Context(), client.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range i.roles(t)["qemu"] {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() error {
		got, err := c.Get(t.Context(), s.ID)
		if err != nil {
			return err
		}
		if got.State != "stopped" || got.EndReason != "exited" {
			return fmt.Errorf("it is %s (%s)", got.State, got.EndReason)
		}
		return nil
	})
	i.same(t, before)
}

// TestVMKilledWhileItStarts kills the VM of a creation that is under way. A kill
// that comes only when the sandbox runs is no such test, and is tried again.
func TestVMKilledWhileItStarts(t *testing.T) {
	i := up(t)
	// Without retries, by which the client would get another.
	c, err := client.New("http://"+i.listen, i.creds.APIKey, client.WithRetries(0))
	if err != nil {
		t.Fatal(err)
	}
	// The first sandbox of its size is captured, in a VM that is not this one's.
	first, err := c.Create(t.Context(), client.CreateOptions{})
	if err == nil {
		err = c.Delete(t.Context(), first.ID)
	}
	if err != nil {
		t.Fatal(err)
	}
	before := i.leftovers(t)
	mark := map[string]string{"killed": "yes"}
	// kill kills the VM of the sandbox that starts, once there is one.
	kill := func() bool {
		for s, err := range c.List(t.Context(), client.ListOptions{Metadata: mark, States: []string{"starting"}}) {
			if err != nil {
				t.Fatal(err)
			}
			if pid := agenttest.QEMU(s.ID); pid != 0 {
				return syscall.Kill(pid, syscall.SIGKILL) == nil
			}
		}
		return false
	}
	for begun := time.Now(); ; {
		var box *client.Sandbox
		var err error
		done := make(chan struct{})
		go func() {
			defer close(done)
			box, err = c.Create(t.Context(), client.CreateOptions{Metadata: mark})
		}()
		killed := false
		for wait := true; wait && !killed; {
			select {
			case <-done:
				wait = false
			case <-time.After(5 * time.Millisecond):
				killed = kill()
			}
		}
		<-done
		if killed && err != nil {
			t.Log(err)
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if time.Since(begun) > 2*time.Minute {
			t.Fatal("every sandbox whose machine was killed while it started is said to run")
		}
		if err := c.Delete(t.Context(), box.ID); err != nil {
			t.Fatal(err)
		}
	}
	i.same(t, before)
}

// TestKillEach kills every program once, and then all of them by killing up.
func TestKillEach(t *testing.T) {
	i := up(t)
	c := i.client(t)
	kept := i.sandbox(t, client.CreateOptions{})
	works := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		r, err := c.Exec(ctx, kept.ID, client.Command{Cmd: "echo", Args: []string{"still here"}}, nil)
		if err != nil {
			return err
		}
		if string(r.Stdout) != "still here\n" {
			return fmt.Errorf("got %+v", r)
		}
		return nil
	}
	for _, role := range []string{"postgres", "redis", "caddy", "server", "agent"} {
		pids := i.roles(t)[role]
		if len(pids) == 0 {
			t.Fatalf("no %s runs", role)
		}
		slices.Sort(pids)
		if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			now := i.roles(t)[role]
			if len(now) == 0 || slices.Contains(now, pids[0]) {
				return fmt.Errorf("%s is not back", role)
			}
			return works()
		})
		t.Logf("%s is back, and the sandbox with it", role)
	}
}

func TestKillUp(t *testing.T) {
	if why := unable(); why != "" {
		t.Skip(why)
	}
	up(t) // has made the images
	dir, err := newDir()
	if err != nil {
		t.Fatal(err)
	}
	defer discard(t, dir)
	listen, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	before := machine(t)
	i, err := start(dir, listen)
	if err != nil {
		t.Fatal(err)
	}
	s, err := i.client(t).Create(t.Context(), client.CreateOptions{Metadata: map[string]string{"kept": "yes"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := i.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-i.ended
	eventually(t, func() error {
		roles := i.roles(t)
		delete(roles, "qemu") // outlives them
		if len(roles) > 0 {
			return fmt.Errorf("still there: %v", roles)
		}
		return nil
	})
	again, err := start(dir, listen)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := again.client(t).Exec(t.Context(), s.ID, client.Command{Cmd: "hostname"}, nil); err != nil || strings.TrimSpace(string(r.Stdout)) != s.ID {
		t.Errorf("the sandbox was not taken back: %+v, %v", r, err)
	}
	if err := again.stop(); err != nil {
		t.Error(err)
	}
	// Stopped for good, it has paused what ran.
	last, err := start(dir, listen)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		got, err := last.client(t).Get(t.Context(), s.ID)
		if err == nil && got.State != "paused" {
			err = fmt.Errorf("after a stop it is %s", got.State)
		}
		return err
	})
	last.ok(t, "resume", s.ID)
	if r, err := last.client(t).Exec(t.Context(), s.ID, client.Command{Cmd: "hostname"}, nil); err != nil || strings.TrimSpace(string(r.Stdout)) != s.ID {
		t.Errorf("the sandbox does not go on after a stop: %+v, %v", r, err)
	}
	if err := last.stop(); err != nil {
		t.Error(err)
	}
	for what, was := range before {
		if now := machine(t)[what]; now != was {
			t.Errorf("%s were\n%s\nand are\n%s", what, was, now)
		}
	}
	if left := processes(dir); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}
