// Package bench measures what Wrenn is for: how soon a sandbox responds, what a pause
// costs, and how much memory a sandbox takes, each beside the alternative that a user
// has, in the same run. It prints Markdown tables, and nothing else, on its standard
// output. docs/benchmarks.md explains them.
//
// Real agents start real VMs. Everything is skipped unless WRENN_BENCH is set, as "make
// bench" does.
package bench

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/agent/image/imagetest"
	"github.com/wrenn-dev/wrenn/internal/agent/network"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// tables receives the tables; the testing package's output goes elsewhere.
var tables io.Writer

func TestMain(m *testing.M) {
	if os.Getenv("WRENN_BENCH") == "" {
		os.Exit(m.Run()) // every benchmark is skipped
	}
	if spec := os.Getenv(clientsEnv); spec != "" {
		if err := beClients(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if agenttest.Inside() {
		tables, os.Stdout = os.Stdout, os.Stderr
	}
	agenttest.Main(m)
}

// TestImages builds the kernel and the template that sandboxes start from.
func TestImages(t *testing.T) {
	asked(t)
	imagetest.Prepare(t)
}

func asked(t *testing.T) {
	t.Helper()
	if os.Getenv("WRENN_BENCH") == "" {
		t.Skip("WRENN_BENCH is not set (make bench)")
	}
}

// host is an agent, and networks for machines that it does not own.
type host struct {
	*agenttest.Agent
	accel string
	dir   string
	pool  *network.Pool
	port  int // of the last program started in a guest
}

func newHost(t *testing.T, memoryMiB int, env map[string]string) *host {
	t.Helper()
	asked(t)
	h := &host{port: 8000, Agent: agenttest.New(t, func(a *agenttest.Agent) {
		a.MemoryMiB = memoryMiB
		a.Env["WRENN_VMM_ACCEL"] = cmp.Or(os.Getenv("WRENN_TEST_ACCEL"), "auto")
		for k, v := range env {
			a.Env[k] = v
		}
	})}
	r, err := h.Host(t.Context(), connect.NewRequest(&pb.HostRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	h.accel = r.Msg.GetAccelerator()
	h.dir = filepath.Join(string(h.Dir), "bench")
	if err := os.Mkdir(h.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if h.pool, err = network.Open(t.Context(), network.Config{Dir: layout.Dir(h.dir), Ready: 2}, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.pool.Close(context.Background(), nil); err != nil {
			t.Error(err)
		}
	})
	return h
}

func request(memoryMiB int) *pb.CreateRequest {
	return &pb.CreateRequest{
		SandboxId: id.Format(id.Sandbox, uuid.New()), TeamId: id.Format(id.Team, uuid.New()), TemplateId: id.Format(id.Template, uuid.Nil),
		Vcpus: 1, MemoryMib: int32(memoryMiB), AccessToken: "a-sandboxs-token",
	}
}

// create creates a sandbox and returns its id.
func (h *host) create(t *testing.T, memoryMiB int) string {
	t.Helper()
	r := request(memoryMiB)
	if _, err := h.Create(t.Context(), connect.NewRequest(r)); err != nil {
		t.Fatalf("create: %v", err)
	}
	return r.SandboxId
}

func (h *host) destroy(t *testing.T, sandbox string) {
	t.Helper()
	if _, err := h.Destroy(t.Context(), connect.NewRequest(&pb.DestroyRequest{SandboxId: sandbox})); err != nil {
		t.Errorf("destroy: %v", err)
	}
}

// exec runs a script in a sandbox and returns what it printed.
func (h *host) exec(t *testing.T, sandbox, script string) string {
	t.Helper()
	res, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: &pb.Command{Cmd: "sh", Args: []string{"-c", script}}}))
	if err != nil {
		t.Fatalf("exec: %v", err)
	}
	if r := res.Msg; r.GetExitCode() != 0 {
		t.Fatalf("exec %q: it exited with %d: %s%s", script, r.GetExitCode(), r.GetStdout(), r.GetStderr())
	}
	return string(res.Msg.GetStdout())
}

// step is a part of an agent's operation, and the time it took.
type step struct {
	name string
	took time.Duration
}

// steps returns the steps of the agent's last operation on a sandbox that it logged as
// message.
func (h *host) steps(t *testing.T, message, sandbox string) (all []step) {
	t.Helper()
	b, err := os.ReadFile(h.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for _, line := range slices.Backward(lines) {
		if !strings.Contains(line, "msg="+strconv.Quote(message)) || !strings.Contains(line, "sandbox="+sandbox) {
			continue
		}
		// slog quotes keys with spaces in them.
		for field := range strings.SplitSeq(strings.ReplaceAll(line, `"`, ""), " steps.") {
			name, value, _ := strings.Cut(field, "=")
			value, _, _ = strings.Cut(value, " ")
			if took, err := time.ParseDuration(value); err == nil && !strings.HasPrefix(line, field) {
				all = append(all, step{name, took})
			}
		}
		return all
	}
	t.Fatalf("the agent has not logged %q of %s", message, sandbox)
	return nil
}

// sample is a series of measurements.
type sample []time.Duration

// median returns the sample's median and its index.
func (s sample) median() (d time.Duration, at int) {
	sorted := slices.Sorted(slices.Values(s))
	d = sorted[len(s)/2]
	return d, slices.Index(s, d)
}

func (s sample) mid() time.Duration {
	d, _ := s.median()
	return d
}

// span returns the median and the range of the others.
func (s sample) span() string {
	return fmt.Sprintf("%s (%s–%s)", ms(s.mid()), ms(slices.Min(s)), ms(slices.Max(s)))
}

func ms(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", d.Seconds()*1000)
	}
	if d < 10*time.Second {
		return fmt.Sprintf("%.0f ms", d.Seconds()*1000)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func mib(bytes int64) string {
	if bytes < 100<<20 {
		return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20))
	}
	return fmt.Sprintf("%.0f MiB", float64(bytes)/(1<<20))
}

func times[T time.Duration | int64](more, less T) string {
	if q := float64(more) / float64(less); q < 10 {
		return fmt.Sprintf("%.2f", q)
	} else {
		return fmt.Sprintf("%.0f", q)
	}
}

func middle(all []int64) int64 {
	return slices.Sorted(slices.Values(all))[len(all)/2]
}

// table prints a table.
func table(title string, head []string, rows [][]string) {
	var b strings.Builder
	line := func(cells []string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	fmt.Fprintf(&b, "### %s\n\n", title)
	line(head)
	line(slices.Repeat([]string{"---"}, len(head)))
	for _, r := range rows {
		line(r)
	}
	fmt.Fprintln(tables, b.String())
}

// stepsTable prints how an operation's time was spent.
func stepsTable(title string, total time.Duration, steps []step) {
	rows := [][]string{}
	rest := total
	for _, s := range steps {
		rows = append(rows, []string{s.name, ms(s.took)})
		rest -= s.took
	}
	rows = append(rows, []string{"between the steps, and the call", ms(rest)}, []string{"**total**", ms(total)})
	table(title, []string{"step", "time"}, rows)
}

// TestMachine describes the machine that the tables were measured on.
func TestMachine(t *testing.T) {
	h := newHost(t, 4096, nil)
	read := func(name string) string {
		b, _ := os.ReadFile(name)
		return strings.TrimSpace(string(b))
	}
	model := "unknown"
	for line := range strings.Lines(read("/proc/cpuinfo")) {
		if k, v, _ := strings.Cut(line, ":"); strings.TrimSpace(k) == "model name" {
			model = strings.TrimSpace(v)
			break
		}
	}
	table("The machine", []string{"what", "value"}, [][]string{
		{"processors", fmt.Sprintf("%d × %s", runtime.NumCPU(), model)},
		{"memory", mib(meminfo(t, "MemTotal"))},
		{"kernel", read("/proc/sys/kernel/osrelease")},
		{"guests' kernel", filepath.Base(filepath.Dir(h.Images.Kernel.Vmlinux))},
		{"QEMU", version(t)},
		{"accelerator", h.accel},
		{"load average at the start", strings.Join(strings.Fields(read("/proc/loadavg"))[:3], " ")},
	})
}

// meminfo returns a value of /proc/meminfo, in bytes.
func meminfo(t *testing.T, key string) int64 {
	t.Helper()
	return kib(t, "/proc/meminfo", key)
}

// kib returns in bytes a value that a /proc file has in KiB.
func kib(t *testing.T, file, key string) int64 {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == key+":" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatalf("%s has no %s", file, key)
	return 0
}
