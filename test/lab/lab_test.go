// Package lab runs the tests of VMs with KVM: this machine's own if that works, or that
// of a lab, a machine whose processor QEMU emulates with AMD's SVM, so that an ordinary
// Debian kernel in it has a real /dev/kvm.
package lab

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/drivers"
)

// job is one run of a test program.
type job struct {
	title string
	pkg   string // path in the repository
	run   string // tests, as for go test -run
	env   string // additional environment: NAME=VALUE
	slow  bool   // only with WRENN_SLOW, or chosen by its title
	built bool   // it runs the programs of `make build`
	shown bool   // its output is a result
}

var jobs = []job{
	{title: "control groups", pkg: "internal/agent/cgroup", run: "."},
	{title: "driver", pkg: "internal/agent/vmm/qemu", run: "^(TestProbe.*|TestTSC|TestGuestUnderKVM|TestModules|TestConformance)$/^(boot|end|console|failed-start|save)$"},
	{title: "pauses under load", pkg: "internal/agent/vmm/qemu", run: "^TestConformance$/^pauses$", env: "WRENN_TEST_PAUSES=5"},
	{title: "one life", pkg: "internal/agent", run: "^TestWholeLife$"},
	{title: "driver, the rest", pkg: "internal/agent/vmm/qemu", run: "^(TestTrackedPages|TestProcessors|TestEarlierModels|TestLibrary|TestConformance)$/^(failed-restore|pages|standstill|hostile|descriptors|rates|the_host.*|named.*|qemu-.*)$", slow: true},
	{title: "freed memory", pkg: "internal/agent/vmm/qemu", run: "^TestFreedMemoryReturns$", env: "WRENN_SLOW=1", slow: true, shown: true},
	{title: "agent", pkg: "internal/agent", run: "^TestSandbox$|^TestOtherProcessor$|^TestMachineIsKilled|^TestAgentRestarts|^TestSnapshot|^TestFailedCreates|^TestFork|^TestWarm|^TestKilledAtEveryStep", slow: true},
	{title: "one long life", pkg: "internal/agent", run: "^TestWholeLife$", env: "WRENN_SLOW=1 WRENN_TEST_PAUSES=25", slow: true},
	{title: "figures", pkg: "test/bench", run: "^TestImages$|^TestCreate$|^TestPause$/^256_MiB$|^TestIdle$", env: "WRENN_BENCH=1 WRENN_TEST_IDLE=20", slow: true, shown: true},
	{title: "command", pkg: "test/bench", run: "^TestImages$|^TestCommand$", env: "WRENN_BENCH=1", slow: true, built: true, shown: true},
	{title: "older machines", pkg: "internal/agent/vmm/qemu", run: "^TestOlderMachinesAreRepaired$", env: "WRENN_TEST_PAUSES=100", slow: true},
	{title: "many pauses under load", pkg: "internal/agent/vmm/qemu", run: "^TestConformance$/^pauses$", env: "WRENN_TEST_PAUSES=500", slow: true},
}

const (
	// labMemory is the lab's memory in MiB: what the agent's tests need.
	labMemory = 8 << 10
	// diskBytes is the size of the lab's disk, which is sparse.
	diskBytes = 16 << 30
	// labFactor is how much longer the lab takes than a real machine.
	labFactor = 8
)

// TestKVM runs the jobs, with a subtest for each of their tests, and lists the results.
// WRENN_TEST_KVM_JOBS, a regular expression of their titles, selects jobs.
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
	chosen, err := regexp.Compile(os.Getenv("WRENN_TEST_KVM_JOBS"))
	if err != nil {
		t.Fatalf("WRENN_TEST_KVM_JOBS: %v", err)
	}
	// left returns why a job is left out.
	left := func(j job) string {
		switch byName := chosen.String() != ""; {
		case !chosen.MatchString(j.title):
			return "WRENN_TEST_KVM_JOBS leaves it out"
		case j.slow && !slow && !byName:
			return "takes long: WRENN_SLOW=1"
		}
		return ""
	}
	var todo []job
	for _, j := range jobs {
		if left(j) != "" {
			continue
		}
		todo = append(todo, j)
		if _, err := os.Stat(filepath.Join(home, j.program())); err != nil {
			command(t, root, "go", "test", "-c", "-o", filepath.Join(home, j.program()), "./"+j.pkg)
		}
	}
	_, reason := drivers.Probe(t.Context(), vmm.KVM, vmm.Config{Dir: dir, Kernel: in.Kernel.Vmlinux, Initrd: in.Kernel.Initrd, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	var skip string // why no job can run
	if reason == nil {
		t.Log("with this machine's own KVM")
		for i, j := range todo {
			here(t, home, root, i, j)
		}
	} else {
		t.Logf("in a lab, because this machine's own KVM does not work: %v", reason)
		skip = boot(t, dir, home, root, string(in.Dir), todo)
	}
	var all []outcome
	done := 0
	for _, j := range jobs {
		t.Run(strings.ReplaceAll(j.title, " ", "-"), func(t *testing.T) {
			if why := cmp.Or(left(j), skip); why != "" {
				all = append(all, outcome{result: skipped, name: j.title, why: why})
				t.Skip(why)
			}
			done++
			all = append(all, report(t, j, home, done)...)
		})
	}
	t.Log("what ran, and what was skipped and why:")
	for _, o := range all {
		t.Log(o)
	}
}

// outcome is the result of a test, or of a job that ran no test.
type outcome struct{ result, name, took, why, text string }

// Results, as the testing package prints them.
const (
	failed  = "FAIL"
	skipped = "SKIP"
)

func (o outcome) String() string {
	s := strings.TrimSpace(o.result + "  " + o.name + " " + o.took)
	if o.why != "" {
		s += ": " + o.why
	}
	return s
}

func (j job) program() string { return strings.ReplaceAll(j.pkg, "/", "-") + ".test" }

// line returns a job's shell command.
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
	_ = cmd.Run() // the report has the failures
	write(t, filepath.Join(home, fmt.Sprintf("code.%d", i+1)), fmt.Sprint(cmd.ProcessState.ExitCode()))
}

// boot runs the jobs in the lab, or returns the reason why it cannot.
func boot(t *testing.T, dir, home, root, cache string, todo []job) (skip string) {
	for _, tool := range []string{"qemu-system-x86_64", "busybox", "modprobe", "dpkg-deb", "apt-get", "mke2fs"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Sprintf("needs %s to make the lab", tool)
		}
	}
	user, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	// The kernel is kept for later runs.
	lab := filepath.Join(user, "wrenn-lab")
	command(t, root, "test/lab/prepare.sh", lab)
	for _, name := range []string{"kernel", "initrd.cpio"} {
		if err := os.Symlink(filepath.Join(lab, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	copyFile(t, filepath.Join(root, "test/lab/init.sh"), filepath.Join(home, "init"))
	golang, err := exec.LookPath("go")
	if err != nil {
		t.Fatal(err)
	}
	var lines strings.Builder
	for _, j := range todo {
		if j.built {
			command(t, root, "make", "-s", "build")
		}
		fmt.Fprintf(&lines, "cd '%s' && %s\n", filepath.Join(root, j.pkg), j.line("/job"))
	}
	write(t, filepath.Join(home, "run"), lines.String())
	write(t, filepath.Join(home, "env"), fmt.Sprintf("WRENN_TEST_ACCEL=kvm\nWRENN_TEST_TIMEOUT_FACTOR=%d\nWRENN_TEST_ENVD=/job/envd\nWRENN_TEST_BUILT=1\nPATH=%s:$PATH\n", labFactor, filepath.Dir(golang)))

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
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var console strings.Builder
	s := bufio.NewScanner(out)
	for s.Scan() {
		fmt.Fprintln(&console, s.Text())
		if strings.HasPrefix(s.Text(), "lab: ") {
			t.Log(strings.TrimSpace(s.Text()))
		}
	}
	_, _ = io.Copy(&console, out) // drain it if a line was too long
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 75 {
		return "needs QEMU 10, because with the SVM of QEMU 7.2 one guest in thirty hangs: " + strings.TrimSpace(console.String())
	}
	t.Logf("the lab was up for %v", time.Since(begun).Round(time.Second))
	if _, done := os.Stat(filepath.Join(home, "done")); err != nil || done != nil {
		text := console.String()
		t.Errorf("the lab did not finish: %v\n%s", err, text[max(0, len(text)-6000):])
	}
	return ""
}

var (
	begins = regexp.MustCompile(`^=== RUN   (Test[^/]+)$`)
	result = regexp.MustCompile(`^--- (PASS|FAIL|SKIP): (\S+) (\(.*\))`)
)

// parse finds the tests in the output of a job.
func parse(out string) (all []outcome) {
	running, before := "", []string(nil) // the running test, and its output
	add := func(o outcome) {
		o.text = strings.Join(before[max(0, len(before)-100):], "\n")
		all = append(all, o)
		running, before = "", nil
	}
	for line := range strings.Lines(out) {
		line = strings.TrimSuffix(line, "\n")
		if m := begins.FindStringSubmatch(line); m != nil {
			running, before = m[1], nil
			continue
		}
		m := result.FindStringSubmatch(line)
		if m == nil {
			before = append(before, line)
			continue
		}
		o := outcome{result: m[1], name: m[2], took: m[3]}
		if o.result == skipped && len(before) > 0 {
			o.why = strings.TrimSpace(before[len(before)-1])
		}
		add(o)
	}
	if running != "" {
		add(outcome{result: failed, name: running, why: "did not end"})
	}
	return all
}

// report makes a subtest of each test in the output of the n-th job that ran.
func report(t *testing.T, j job, home string, n int) []outcome {
	out, err := os.ReadFile(filepath.Join(home, fmt.Sprintf("out.%d", n)))
	if err != nil {
		t.Errorf("the job did not start: %v", err)
		return []outcome{{result: failed, name: j.title, why: "did not begin"}}
	}
	if j.shown {
		t.Logf("%s", out)
	}
	all := parse(string(out))
	for _, o := range all {
		t.Run(o.name, func(t *testing.T) {
			switch t.Log(o.took); o.result {
			case failed:
				t.Errorf("%s\n%s", o.why, o.text)
			case skipped:
				t.Skip(o.text)
			}
		})
	}
	code, err := os.ReadFile(filepath.Join(home, fmt.Sprintf("code.%d", n)))
	if strings.TrimSpace(string(code)) != "0" || len(all) == 0 {
		t.Errorf("the job ended with code %q (%v):\n%s", code, err, out[max(0, len(out)-6000):])
	}
	return all
}

// TestParse parses outputs of jobs that end in every possible way.
func TestParse(t *testing.T) {
	const out = `=== RUN   TestImages
--- PASS: TestImages (0.10s)
PASS
=== RUN   TestOne
    one_test.go:7: a word
=== RUN   TestOne/part
--- PASS: TestOne (1.50s)
    --- PASS: TestOne/part (1.00s)
=== RUN   TestTwo
    two_test.go:9: needs what is not here
--- SKIP: TestTwo (0.00s)
=== RUN   TestThree
    three_test.go:8: wrong
--- FAIL: TestThree (2.00s)
=== RUN   TestFour
    four_test.go:3: its last word
panic: it fell over
`
	var got []string
	for _, o := range parse(out) {
		got = append(got, o.String())
	}
	want := []string{
		"PASS  TestImages (0.10s)", "PASS  TestOne (1.50s)", "SKIP  TestTwo (0.00s): two_test.go:9: needs what is not here",
		"FAIL  TestThree (2.00s)", "FAIL  TestFour: did not end",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
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
