package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// processes returns the installation's processes by pid: their command line or their
// environment has its directory.
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
		if strings.Contains(line, dir) || bytes.Contains(environ, []byte(dir)) || strings.HasPrefix(cwd, dir) || vmOf(e.Name(), line, dir) {
			found[pid] = line
		}
	}
	return found
}

// vmOf reports whether a process is a VM of the installation: it is named after a folder
// there, or has a file open there, even a removed one.
func vmOf(pid, line, dir string) bool {
	_, rest, ok := strings.Cut(line, "-name wrenn-")
	if !ok || len(rest) < 36 {
		return false
	}
	if _, err := os.Stat(filepath.Join(dir, "sandboxes", rest[:36])); err == nil {
		return true
	}
	files, _ := filepath.Glob(filepath.Join("/proc", pid, "fd", "*"))
	return slices.ContainsFunc(files, func(f string) bool {
		to, err := os.Readlink(f)
		return err == nil && strings.HasPrefix(to, dir+"/")
	})
}

// roles returns the installation's processes by role.
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

// leftovers is what an installation's sandboxes use of the machine. It counts nothing of
// other installations, which tests of other packages run at the same time.
type leftovers struct {
	folders, machines, groups int
	trace                     *trace // has followed the installation since the first count
}

func (i *installation) leftovers(t *testing.T) leftovers {
	t.Helper()
	tr := follow(t, i.dir)
	tr.note()
	return i.leftoversOf(t, tr)
}

func (i *installation) leftoversOf(t *testing.T, tr *trace) leftovers {
	t.Helper()
	folders, _ := filepath.Glob(filepath.Join(i.dir, "sandboxes", "*"))
	return leftovers{folders: len(folders), machines: len(i.roles(t)["qemu"]), groups: len(tr.groupsLeft()), trace: tr}
}

// same fails the test unless leftovers return to the earlier numbers. Sandboxes are
// cleaned up after the response.
func (i *installation) same(t *testing.T, before leftovers) {
	t.Helper()
	eventually(t, func() error {
		now := i.leftoversOf(t, before.trace)
		// Fewer is fine: sandboxes of earlier tests may have ended meanwhile.
		if now.folders > before.folders || now.machines > before.machines || now.groups > before.groups {
			return fmt.Errorf("left behind: %+v, before: %+v", now, before)
		}
		return nil
	})
}

// trace records what an installation creates on the machine, so that a test can look for
// it later, whatever other installations do at the same time.
type trace struct {
	dir layout.Dir

	mu     sync.Mutex
	groups map[string]bool // names of control groups
	blocks map[int]bool    // of network slots
}

// follow records what the installation in dir creates until the test ends. A machine has
// its folder, and an agent its block, for much longer than follow's interval.
func follow(t *testing.T, dir string) *trace {
	tr := &trace{dir: layout.Dir(dir), groups: map[string]bool{}, blocks: map[int]bool{}}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(10 * time.Millisecond) // real time: the interval of the notes
		defer tick.Stop()
		for {
			tr.note()
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-stopped })
	return tr
}

func (tr *trace) note() {
	entries, _ := os.ReadDir(tr.dir.Sandboxes())
	text, _ := os.ReadFile(tr.dir.NetworkBlock())
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for _, e := range entries {
		tr.groups[e.Name()] = true
	}
	if err == nil {
		tr.blocks[n] = true
	}
}

// left lists the remains of the installation, which has stopped.
func (tr *trace) left(t *testing.T) []string {
	t.Helper()
	tr.mu.Lock()
	groups, blocks := len(tr.groups), slices.Collect(maps.Keys(tr.blocks))
	tr.mu.Unlock()
	if groups == 0 || len(blocks) == 0 {
		t.Errorf("the installation had %d machines and %d blocks of network slots", groups, len(blocks))
	}
	var all []string
	for pid, line := range processes(string(tr.dir)) {
		all = append(all, fmt.Sprintf("process %d: %s", pid, line))
	}
	all = append(all, tr.groupsLeft()...)
	for _, text := range []string{printed(t, "cat", "/proc/thread-self/mounts"), printed(t, "losetup", "-a")} {
		for line := range strings.Lines(text) {
			if strings.Contains(line, string(tr.dir)) {
				all = append(all, strings.TrimSpace(line))
			}
		}
	}
	for _, n := range blocks {
		all = append(all, leftOfBlock(t, tr.dir, n)...)
	}
	return all
}

// groupsLeft returns the folders of the installation's control groups that exist.
func (tr *trace) groupsLeft() (all []string) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for name := range tr.groups {
		for _, pattern := range []string{"/sys/fs/cgroup/*/wrenn/", "/sys/fs/cgroup/wrenn/"} {
			groups, _ := filepath.Glob(pattern + name)
			all = append(all, groups...)
		}
	}
	return all
}

// blockSlots is how many network slots a block has.
const blockSlots = 512

// leftOfBlock lists the remains of a block of network slots, unless another installation
// has taken the block and so removed or taken over what was there.
func leftOfBlock(t *testing.T, dir layout.Dir, n int) (left []string) {
	t.Helper()
	file := filepath.Join(layout.NetworkBlocks(), strconv.Itoa(n))
	defer func() {
		owner, err := os.ReadFile(file)
		switch {
		case err != nil: // No installation has it.
		case strings.TrimSpace(string(owner)) == string(dir):
			left = append(left, file)
		default:
			t.Logf("block %d now belongs to %s", n, owner)
			left = nil
		}
	}()
	ours := regexp.MustCompile(`\bwrenn-(?:ns|veth)-(\d+)\b`)
	names, _ := filepath.Glob(filepath.Join(layout.Namespaces(), "*"))
	for _, text := range []string{
		strings.Join(names, "\n"), printed(t, "cat", "/proc/thread-self/mounts"),
		printed(t, "ip", "-brief", "link"), printed(t, "ip", "route"),
	} {
		for line := range strings.Lines(text) {
			found := ours.FindStringSubmatch(line)
			if found == nil {
				continue
			}
			if slot, err := strconv.Atoi(found[1]); err == nil && slot/blockSlots == n {
				left = append(left, strings.TrimSpace(line))
			}
		}
	}
	table := "wrenn"
	if n > 0 {
		table = fmt.Sprintf("wrenn-%d", n)
	}
	for line := range strings.Lines(printed(t, "nft", "list", "tables")) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == table {
			left = append(left, strings.TrimSpace(line))
		}
	}
	return left
}

// printed returns a command's output.
func printed(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
	return string(out)
}

// TestTrace checks that trace finds everything that an installation may leave, and
// nothing of another installation. It has its own network and mounts.
func TestTrace(t *testing.T) {
	if why := unable(); why != "" {
		t.Skip(why)
	}
	runtime.LockOSThread() // never unlocked, so the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		t.Fatal(err)
	}
	dir := layout.Dir(t.TempDir())
	mount := func(target, fstype string, flags uintptr) {
		t.Helper()
		if err := unix.Mount("trace", target, fstype, flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	mount("/", "", unix.MS_REC|unix.MS_PRIVATE)
	mount("/run", "tmpfs", 0)
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const block, slot, other = 18, 18*blockSlots + 7, 17*blockSlots + 7
	machine := uuid.New()
	write(dir.NetworkBlock(), strconv.Itoa(block)+"\n")
	write(dir.SandboxRecord(machine), "{}")
	tr := &trace{dir: dir, groups: map[string]bool{}, blocks: map[int]bool{}}
	tr.note()
	things := map[string]func(slot int){
		"namespace": func(slot int) { write(layout.Namespace(slot), "") },
		"link": func(slot int) {
			printed(t, "ip", "tuntap", "add", "dev", fmt.Sprintf("wrenn-veth-%d", slot), "mode", "tap")
		},
		"table": func(slot int) { printed(t, "nft", "add", "table", "inet", fmt.Sprintf("wrenn-%d", slot/blockSlots)) },
	}
	for _, create := range things {
		create(other)
	}
	if left := tr.left(t); len(left) > 0 {
		t.Errorf("trace found another installation's: %v", left)
	}
	found := 0
	finds := func(what string) {
		t.Helper()
		left := tr.left(t)
		if len(left) <= found {
			t.Errorf("trace did not find the %s: %v", what, left)
		}
		found = len(left)
	}
	for what, create := range things {
		create(slot)
		finds(what)
	}
	mount(dir.Sandboxes(), "tmpfs", 0)
	defer func() { _ = unix.Unmount(dir.Sandboxes(), unix.MNT_DETACH) }()
	finds("mount")
	cmd := exec.Command("sleep", "600")
	cmd.Dir = string(dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	finds("process")
	group, err := cgroup.Create(machine.String(), cgroup.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := group.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	finds("control group")
	owner := filepath.Join(layout.NetworkBlocks(), strconv.Itoa(block))
	write(owner, string(dir)+"\n")
	finds("block")
	write(owner, "/elsewhere\n")
	if now := tr.left(t); len(now) != found-len(things)-1 {
		t.Errorf("trace found another installation's block: %v", now)
	}
}

// TestDiscard checks that discard ends processes that refer to an installation in each
// way.
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
		t.Errorf("the folder still exists: %v", err)
	}
}

func TestOnceLeavesNothing(t *testing.T) {
	if why := unable(); why != "" {
		t.Skip(why)
	}
	i := up(t) // builds the images
	dir, err := newDir()
	if err != nil {
		t.Fatal(err)
	}
	defer discard(t, dir)
	listen, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	tr := follow(t, dir)
	// It runs beside another one: two installations can share a machine.
	cmd := exec.Command(i.wrenn, "up", "--dir", dir, "--listen", listen, "--once")
	cmd.Env = append(os.Environ(), "WRENN_WARM=2") // warm machines end too
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "42") {
		t.Fatalf("%v: %s", err, out)
	}
	if left := tr.left(t); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
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
		if got.State != "paused" || got.Condition == nil || got.Condition.Reason != "killed" {
			return fmt.Errorf("it is %s (%v)", got.State, got.Condition)
		}
		return nil
	})
	if err := c.Delete(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	i.same(t, before)
}

// TestVMKilledWhileItStarts kills a creation's VM. If the kill comes only when the
// sandbox runs, the test tries again.
func TestVMKilledWhileItStarts(t *testing.T) {
	i := up(t)
	// Without retries, because a retry would create another sandbox.
	c, err := client.New("http://"+i.listen, i.creds.APIKey, client.WithRetries(0))
	if err != nil {
		t.Fatal(err)
	}
	// The first sandbox of its size needs a capture, in another VM.
	first, err := c.Create(t.Context(), client.CreateOptions{})
	if err == nil {
		err = c.Delete(t.Context(), first.ID)
	}
	if err != nil {
		t.Fatal(err)
	}
	before := i.leftovers(t)
	mark := map[string]string{"killed": "yes"}
	// kill kills the VM of the starting sandbox, once there is one.
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
		await.Within(await.Hang, func() bool {
			select {
			case <-done:
				return true
			default:
				killed = kill()
				return killed
			}
		})
		<-done
		if killed && err != nil {
			t.Log(err)
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if time.Since(begun) > 2*time.Minute {
			t.Fatal("every sandbox whose machine was killed during its start is reported as running")
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
	up(t) // builds the images
	dir, err := newDir()
	if err != nil {
		t.Fatal(err)
	}
	defer discard(t, dir)
	listen, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	tr := follow(t, dir)
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
		delete(roles, "qemu") // VMs survive them
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
	// A proper stop pauses the running sandboxes.
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
		t.Errorf("the sandbox does not continue after a stop: %+v, %v", r, err)
	}
	if err := last.stop(); err != nil {
		t.Error(err)
	}
	if left := tr.left(t); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}
