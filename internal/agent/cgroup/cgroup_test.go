package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// start starts a program in the group, as a VMM driver does.
func start(t *testing.T, g Group, cmd *exec.Cmd) {
	t.Helper()
	f, err := g.Open()
	if err != nil {
		t.Fatal(err)
	}
	if f != nil {
		defer f.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(f.Fd())}
	}
	errs := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid := syscall.Gettid()
		errs <- errors.Join(g.AddThread(tid), cmd.Start(), LeaveThread(tid))
	}()
	if err := <-errs; err != nil {
		t.Fatal(err)
	}
}

func TestLimitsAndDestroy(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	g, err := Create(fmt.Sprintf("test-%d", os.Getpid()), Limits{MemoryBytes: 64 << 20, CPUs: 0.5, PIDs: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Destroy(t.Context()); err != nil {
			t.Log(err)
		}
	})
	if _, err := Create(g.Name, Limits{}); err == nil {
		t.Error("a group was created twice")
	}
	for _, dir := range g.dirs() {
		if _, err := os.Stat(dir); err != nil {
			t.Fatalf("a refused Create removed the existing group: %v", err)
		}
	}

	cmd := exec.Command("sh", "-c", "sleep 1000 & sleep 1000")
	start(t, g, cmd)
	if m, err := g.Memory(); err != nil || m <= 0 {
		t.Errorf("the group uses %d bytes of memory, %v", m, err)
	}
	bomb := exec.Command("sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; wait")
	start(t, g, bomb)
	ended := make(chan error, 2)
	for _, c := range []*exec.Cmd{cmd, bomb} {
		go func() { ended <- c.Wait() }()
	}
	if err := g.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-ended; err == nil {
			t.Error("a process in the group exited successfully") // the limit or the kill ends the fork bomb
		}
	}
	for _, dir := range g.dirs() {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
	if err := g.Destroy(t.Context()); err != nil {
		t.Errorf("destroy a removed group: %v", err)
	}
}

func TestMemoryLimitKillsProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	g, err := Create(fmt.Sprintf("test-memory-%d", os.Getpid()), Limits{MemoryBytes: 32 << 20})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "head -c 300000000 /dev/zero | tail")
	start(t, g, cmd)
	if err := cmd.Wait(); err == nil {
		t.Error("a process used 300 MB in a group of 32 MiB")
	}
	if err := g.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestBadNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "a\x00"} {
		if _, err := Create(name, Limits{}); err == nil {
			t.Errorf("%q was accepted", name)
		}
	}
}

// TestRemoveParentDuringCreate plays two agents on one machine: one removes the empty parent
// as it closes, while the other creates groups in it.
func TestRemoveParentDuringCreate(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	stop, removed := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(removed)
		for {
			select {
			case <-stop:
				return
			default:
				if err := RemoveParent(); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	for i := range 200 {
		g, err := Create(fmt.Sprintf("test-race-%d-%d", os.Getpid(), i), Limits{PIDs: 10})
		if err != nil {
			t.Errorf("group %d: %v", i, err)
			break
		}
		if err := g.Destroy(t.Context()); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	<-removed
}

// TestSetWeight changes a group's weight, beyond what the kernel accepts too.
func TestSetWeight(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	g, err := Create(fmt.Sprintf("test-set-weight-%d", os.Getpid()), Limits{Weight: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	path, unit := filepath.Join(root, parent, g.Name, "cpu.weight"), weightUnit
	if !v2() {
		path, unit = filepath.Join(root, "cpu", parent, g.Name, "cpu.shares"), sharesUnit
	}
	has := func(when string, want int) {
		t.Helper()
		b, err := os.ReadFile(path)
		if got, e := strconv.Atoi(strings.TrimSpace(string(b))); err != nil || e != nil || got != want {
			t.Errorf("%s: the kernel has %d, not %d: %v", when, got, want, errors.Join(err, e))
		}
	}
	has("created", 2*unit)
	for _, c := range []struct {
		weight float64
		want   int
	}{{0.25, unit / 4}, {0, unit}, {1e-9, 2}, {1e9, maxWeight * unit}} {
		if err := g.SetWeight(c.weight); err != nil {
			t.Error(err)
		}
		has(fmt.Sprint(c.weight), c.want)
	}
	if err := (Group{Name: "no-such-group"}).SetWeight(1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a group that does not exist: %v", err)
	}
}

// TestConfine checks that Confine puts a process back into its group after other software
// moved it out, even if that software also removed the group.
func TestConfine(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	limits := Limits{MemoryBytes: 64 << 20, PIDs: 8}
	g, err := Create(fmt.Sprintf("test-confine-%d", os.Getpid()), limits)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	start(t, g, cmd)
	t.Cleanup(func() {
		if err := g.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	pid := cmd.Process.Pid
	confine := func(want bool) {
		t.Helper()
		repaired, err := g.Confine(pid, limits)
		if err != nil || repaired != want {
			t.Errorf("repaired: %v, want %v; %v", repaired, want, err)
		}
		if in, err := g.has(pid); err != nil || !in {
			t.Errorf("in the group: %v, %v", in, err)
		}
	}
	confine(false)
	moveOut := func() {
		for _, dir := range g.dirs() {
			out := filepath.Dir(filepath.Dir(dir))
			if err := os.WriteFile(filepath.Join(out, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	moveOut()
	confine(true)
	confine(false)
	moveOut()
	if err := g.removeDirs(); err != nil {
		t.Fatal(err)
	}
	confine(true)
	name := filepath.Join(g.dirs()[0], "memory.max")
	if !v2() {
		name = filepath.Join(g.dirs()[0], "memory.limit_in_bytes")
	}
	if b, err := os.ReadFile(name); err != nil || strings.TrimSpace(string(b)) != strconv.FormatInt(limits.MemoryBytes, 10) {
		t.Errorf("the new group allows %s bytes, %v", b, err)
	}
}

// TestConfineEndedProcess checks that Confine leaves no group for a process that has ended,
// because a process can end just before the agent confines it.
func TestConfineEndedProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	g := Group{Name: fmt.Sprintf("test-ended-%d", os.Getpid())}
	t.Cleanup(func() { _ = g.removeDirs() })
	if _, err := g.Confine(cmd.Process.Pid, Limits{MemoryBytes: 64 << 20}); err == nil {
		t.Error("an ended process was confined")
	}
	for _, dir := range g.dirs() {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}

// TestWeight runs busy loops in two groups on one processor, and checks that the heavier
// group gets more of it. All groups together must weigh less than one service of the host.
func TestWeight(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(0, &cpus); err != nil {
		t.Fatal(err)
	}
	var one unix.CPUSet
	for cpu := 0; one.Count() == 0; cpu++ {
		if cpus.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	const light, heavy = 1, 8
	var pids []int
	for _, weight := range []int{light, heavy} {
		g, err := Create(fmt.Sprintf("test-weight-%d-%d", os.Getpid(), weight), Limits{Weight: weight})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := g.Destroy(context.Background()); err != nil {
				t.Error(err)
			}
		})
		in, begin, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close(); begin.Close() })
		cmd := exec.Command("sh", "-c", "read begin; while :; do :; done")
		cmd.Stdin = in
		start(t, g, cmd)
		go func() { _ = cmd.Wait() }() // ends with the group
		if err := unix.SchedSetaffinity(cmd.Process.Pid, &one); err != nil {
			t.Fatal(err)
		}
		if _, err := begin.WriteString("go\n"); err != nil {
			t.Fatal(err)
		}
		pids = append(pids, cmd.Process.Pid)
	}
	// From here on, measure the processor time that each group uses.
	used := func(pid int) int {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')'):]))
		n, err := strconv.Atoi(fields[12]) // user time, in hundredths of a second
		system, e := strconv.Atoi(fields[13])
		if err != nil || e != nil {
			t.Fatal(err, e)
		}
		return n + system
	}
	await.Until(t, "both use the processor", func() bool { return used(pids[0]) > 0 && used(pids[1]) > 0 })
	before := []int{used(pids[0]), used(pids[1])}
	await.Until(t, "the heavier group uses two seconds", func() bool { return used(pids[1])-before[1] >= 200 })
	if l, h := used(pids[0])-before[0], used(pids[1])-before[1]; h < 3*l {
		t.Errorf("weights of %d and %d got %d and %d hundredths of a second", light, heavy, l, h)
	}
	if v2() {
		b, err := os.ReadFile(filepath.Join(root, parent, "cpu.weight"))
		if n, e := strconv.Atoi(strings.TrimSpace(string(b))); err != nil || e != nil || n >= weightUnit {
			t.Errorf("all groups together weigh %d, %v", n, errors.Join(err, e))
		}
	}
}
