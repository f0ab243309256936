// Package lab runs the tests of virtual machines with KVM: this machine's own
// where that works, else that of a lab, a machine whose processor QEMU emulates
// with AMD's SVM, so that an ordinary Debian kernel in it has a real /dev/kvm.
package lab

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qemu"
)

// job is one run of a test program.
type job struct {
	pkg string // below the repository
	run string // tests, as for go test -run
	env string // more of the environment: NAME=VALUE
	// slow: only under WRENN_SLOW.
	slow bool
}

var jobs = []job{
	{pkg: "internal/agent/vmm/qemu", run: "^TestProbe|^TestBootBounds|^TestKilledQEMU|^TestGuestThatEnds|^TestFailedStart|^TestTSC$|^TestSaveRestoreDivert$"},
	{pkg: "internal/agent/vmm/qemu", run: "^TestPausesUnderLoad$", env: "WRENN_TEST_PAUSES=20"},
	{pkg: "internal/agent", run: "^TestSandbox$"},
	{pkg: "internal/agent/vmm/qemu", run: "^TestRestoreRefuses|^TestTrackedPages", slow: true},
	{pkg: "internal/agent", run: "^TestMachineIsKilled|^TestAgentRestarts|^TestSnapshot|^TestFailedCreates|^TestFork|^TestWarm|^TestManyPauses|^TestKilledAtEveryStep", slow: true},
	{pkg: "internal/agent/vmm/qemu", run: "^TestPausesUnderLoad$", env: "WRENN_TEST_PAUSES=500", slow: true},
}

const (
	// labMemory is the lab's memory in MiB: what the agent's tests need.
	labMemory = 8 << 10
	// diskBytes is the size of the lab's disk, which is sparse.
	diskBytes = 16 << 30
	// labFactor is how much longer the lab takes than a machine of its own.
	labFactor = 8
)

// TestKVM runs the jobs, each test of theirs as a test of its own here.
func TestKVM(t *testing.T) {
	slow := os.Getenv("WRENN_SLOW") != ""
	if !slow && os.Getenv("WRENN_TEST_KVM") == "" {
		t.Skip("takes minutes: make test-kvm, or WRENN_SLOW=1")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to start virtual machines")
	}
	in := imagetest.Prepare(t)
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	home := filepath.Join(dir, "job")
	if err := os.Mkdir(home, 0o755); err != nil {
		t.Fatal(err)
	}
	copyFile(t, in.Envd, filepath.Join(home, "envd"))
	var todo []job
	for _, j := range jobs {
		if j.slow && !slow {
			t.Run(j.name(), func(t *testing.T) { t.Skip("takes long: WRENN_SLOW=1") })
			continue
		}
		todo = append(todo, j)
		if _, err := os.Stat(filepath.Join(home, j.program())); err != nil {
			command(t, root, "go", "test", "-c", "-o", filepath.Join(home, j.program()), "./"+j.pkg)
		}
	}
	reason := qemu.KVMWorks(t.Context(), in.Kernel.Vmlinux, in.Kernel.Initrd, dir, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if reason == nil {
		t.Log("with this machine's own KVM")
		for i, j := range todo {
			here(t, home, root, i, j)
		}
	} else {
		t.Logf("in a lab, because this machine's own KVM does not work: %v", reason)
		boot(t, dir, home, root, string(in.Dir), todo)
	}
	for i, j := range todo {
		t.Run(j.name(), func(t *testing.T) { report(t, filepath.Join(home, fmt.Sprintf("out.%d", i+1))) })
	}
}

func (j job) program() string { return strings.ReplaceAll(j.pkg, "/", "-") + ".test" }

func (j job) name() string { return strings.TrimSpace(j.pkg + " " + j.run + " " + j.env) }

// line is the job for a shell.
func (j job) line(home string) string {
	return fmt.Sprintf("%s '%s/%s' -test.v -test.timeout=3h -test.run='%s'", j.env, home, j.program(), j.run)
}

// here runs a job on this machine.
func here(t *testing.T, home, root string, i int, j job) {
	out, err := os.Create(filepath.Join(home, fmt.Sprintf("out.%d", i+1)))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.CommandContext(t.Context(), "sh", "-c", j.line(home))
	cmd.Dir = filepath.Join(root, j.pkg)
	cmd.Env = append(os.Environ(), "WRENN_TEST_ACCEL=kvm")
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		t.Logf("%s: %v", j.name(), err) // the report says which test failed
	}
}

// boot runs the jobs in the lab.
func boot(t *testing.T, dir, home, root, cache string, todo []job) {
	for _, tool := range []string{"qemu-system-x86_64", "busybox", "modprobe", "dpkg-deb", "apt-get", "mke2fs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s to make the lab", tool)
		}
	}
	user, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	// The kernel is kept for the next time.
	lab := filepath.Join(user, "wrenn-lab")
	command(t, root, "test/lab/prepare.sh", lab)
	for _, name := range []string{"kernel", "initrd.cpio"} {
		if err := os.Symlink(filepath.Join(lab, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	copyFile(t, filepath.Join(root, "test/lab/init.sh"), filepath.Join(home, "init"))
	var lines strings.Builder
	for _, j := range todo {
		fmt.Fprintln(&lines, j.line("/job"))
	}
	write(t, filepath.Join(home, "run"), lines.String())
	write(t, filepath.Join(home, "env"), fmt.Sprintf("WRENN_TEST_ACCEL=kvm\nWRENN_TEST_TIMEOUT_FACTOR=%d\nWRENN_TEST_ENVD=/job/envd\n", labFactor))

	disk := filepath.Join(dir, "disk.img")
	write(t, disk, "")
	if err := os.Truncate(disk, diskBytes); err != nil {
		t.Fatal(err)
	}
	command(t, root, "mke2fs", "-q", "-t", "ext4", "-d", cache, disk)

	begun := time.Now()
	cmd := exec.CommandContext(t.Context(), filepath.Join(root, ".ci/newer-qemu"), filepath.Join(root, "test/lab/boot.sh"), dir, fmt.Sprint(labMemory))
	cmd.Dir = root
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	console, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 75 {
		t.Skipf("needs QEMU 10: with an older SVM one guest in thirty hangs: %s", console)
	}
	for line := range strings.Lines(string(console)) {
		if strings.HasPrefix(line, "lab: ") {
			t.Log(strings.TrimSpace(line))
		}
	}
	t.Logf("the lab was up for %v", time.Since(begun).Round(time.Second))
	if _, done := os.Stat(filepath.Join(home, "done")); err != nil || done != nil {
		t.Errorf("the lab did not come to its end: %v\n%s", err, console[max(0, len(console)-6000):])
	}
}

var result = regexp.MustCompile(`^--- (PASS|FAIL|SKIP): (\S+) (\(.*\))`)

// report makes a test of each test in the output of a job.
func report(t *testing.T, name string) {
	out, err := os.ReadFile(name)
	if err != nil {
		t.Fatalf("the job did not begin: %v", err)
	}
	found := 0
	s := bufio.NewScanner(strings.NewReader(string(out)))
	s.Buffer(nil, 1<<20)
	var before []string
	for s.Scan() {
		m := result.FindStringSubmatch(s.Text())
		if m == nil {
			before = append(before, s.Text())
			continue
		}
		found++
		text := strings.Join(before[max(0, len(before)-100):], "\n")
		before = nil
		t.Run(m[2], func(t *testing.T) {
			switch t.Log(m[3]); m[1] {
			case "FAIL":
				t.Error(text)
			case "SKIP":
				t.Skip(text)
			}
		})
	}
	if found == 0 || !strings.Contains("\n"+string(out), "\nPASS\n") {
		t.Errorf("the job did not pass:\n%s", out[max(0, len(out)-6000):])
	}
}

func command(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	if !filepath.IsAbs(name) && strings.Contains(name, "/") {
		name = filepath.Join(dir, name)
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
