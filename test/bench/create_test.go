package bench

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qemu"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

const (
	createMemory = 512
	// coldBoots and creates are the numbers of repetitions.
	coldBoots = 5
	creates   = 9
	// coldUID is a user that no agent assigns to a sandbox.
	coldUID = 64000
)

// start has the times until a guest responded, until it had run its first command, and of
// the next command.
type start struct{ answers, command, next sample }

// time measures wait, which waits for the guest, and the first and the next command.
func (s *start) time(wait, first, next func()) {
	begin := time.Now()
	wait()
	s.answers = append(s.answers, time.Since(begin))
	first()
	s.command = append(s.command, time.Since(begin))
	begin = time.Now()
	next()
	s.next = append(s.next, time.Since(begin))
}

// TestCreate measures the time from the request for a sandbox to the result of its first
// command.
func TestCreate(t *testing.T) {
	h := newHost(t, 8192, nil)
	// This captures the template, which happens once.
	first := h.create(t, createMemory)
	line := cmdline(t, first)
	h.destroy(t, first)

	// Alternate, so that other work on the machine affects all alike.
	boot, floorOnce := h.coldBoots(t), h.floors(t, line)
	var cold, floor, plain start
	var runs sample
	var plainSteps [][]step
	for i := range creates {
		if i < coldBoots {
			boot(&cold)
		}
		floorOnce(&floor, &runs)
		plainSteps = append(plainSteps, h.createOnce(t, &plain))
	}

	h.Kill(t, syscall.SIGTERM)
	h.Env["WRENN_WARM"] = "1"
	h.Start(t)
	warm, warmSteps := h.warmCreates(t)

	row := func(what string, s start) []string {
		return []string{
			what, s.answers.span(), s.command.span(), ms(s.next.mid()),
			times(cold.answers.mid(), s.answers.mid()), times(cold.command.mid(), s.command.mid()),
			times(s.answers.mid(), floor.answers.mid()), times(s.command.mid(), floor.command.mid()), times(s.command.mid(), floor.answers.mid()),
		}
	}
	table("Create to the first command's result, 512 MiB, one processor",
		[]string{
			"how", "until the guest answers", "until the first command's result", "the next command",
			"answers: cold boot ÷ this", "result: cold boot ÷ this",
			"answers: this ÷ floor", "result: this ÷ floor", "result ÷ floor's answer",
		}, [][]string{
			row("cold boot", cold),
			row("restore, without a warm machine", plain),
			row("restore, with a warm machine", warm),
			row("floor: bare `qemu-system-x86_64 -incoming`", floor),
		})
	_, at := floor.command.median()
	stepsTable("Steps of the floor", floor.command[at], []step{
		{"QEMU starts, reads the devices' state, and the guest runs", runs[at]},
		{"the guest answers", floor.answers[at] - runs[at]},
		{"init and first command", floor.command[at] - floor.answers[at]},
	})
	show := func(title string, s start, steps [][]step) {
		_, at := s.command.median()
		stepsTable(title, s.command[at], append(steps[at], step{"first command", s.command[at] - s.answers[at]}))
	}
	show("Steps of a create without a warm machine", plain, plainSteps)
	show("Steps of a create with a warm machine", warm, warmSteps)
}

// createOnce creates a sandbox and returns the agent's steps.
func (h *host) createOnce(t *testing.T, s *start) []step {
	t.Helper()
	r := request(createMemory)
	hello := func() { h.hello(t, r.SandboxId) }
	s.time(func() {
		if _, err := h.Create(t.Context(), connect.NewRequest(r)); err != nil {
			t.Fatalf("create: %v", err)
		}
	}, hello, hello)
	steps := h.steps(t, "sandbox runs", r.SandboxId)
	h.destroy(t, r.SandboxId)
	return steps
}

// hello runs the first command.
func (h *host) hello(t *testing.T, sandbox string) {
	t.Helper()
	res, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: &pb.Command{Cmd: "echo", Args: []string{"hello"}}}))
	if err != nil || string(res.Msg.GetStdout()) != "hello\n" {
		t.Fatalf("exec: %v %v", res, err)
	}
}

// warmCreates creates sandboxes that each find a warm machine.
func (h *host) warmCreates(t *testing.T) (s start, steps [][]step) {
	t.Helper()
	h.destroy(t, h.create(t, createMemory)) // tells the agent which template is in use
	for made := range creates {
		for deadline := time.Now().Add(patience); h.waiting(t) <= made; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("no warm machine is ready")
			}
		}
		steps = append(steps, h.createOnce(t, &s))
		if !slices.ContainsFunc(steps[made], func(s step) bool { return s.name == "take" }) {
			t.Errorf("a sandbox did not start from a warm machine: %v", steps[made])
		}
	}
	return s, steps
}

// waiting returns how many warm machines have been started so far.
func (h *host) waiting(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(h.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), `msg="made a warm machine"`)
}

// coldBoots returns a function that boots the template from its kernel.
func (h *host) coldBoots(t *testing.T) func(*start) {
	t.Helper()
	driver, err := qemu.Open(h.accel, vmm.Config{Dir: filepath.Join(h.dir, "vmm"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := driver.Close(); err != nil {
			t.Error(err)
		}
	})
	return func(s *start) { h.coldBoot(t, driver, s) }
}

func (h *host) coldBoot(t *testing.T, driver *qemu.Driver, s *start) {
	t.Helper()
	dir, err := os.MkdirTemp(h.dir, "cold-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	slot, err := h.pool.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := h.pool.Release(context.WithoutCancel(t.Context()), slot); err != nil {
			t.Error(err)
		}
	}()
	tap, err := slot.OpenTap()
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	overlay := filepath.Join(dir, "disk.qcow2")
	if err := disk.Create(disk.Qcow2, overlay, int64(h.Images.Minimal.DiskMiB)<<20, coldUID); err != nil {
		t.Fatal(err)
	}
	spec := vmm.Spec{
		ID: uuid.New(), Dir: dir, Kernel: h.Images.Kernel.Vmlinux, Initrd: h.Images.Kernel.Initrd, Modules: h.Images.Kernel.Modules, Cmdline: guest.Cmdline("sandbox"),
		VCPUs: 1, MemoryMiB: createMemory, Overlay: overlay, Base: h.Images.Minimal.Rootfs, DiskBytes: int64(h.Images.Minimal.DiskMiB) << 20,
		NetNS: slot.NetNS(), Tap: tap, MAC: guest.MAC, UID: coldUID,
	}
	g := guest.New(slot.Address, "")
	defer g.Close()
	var vm vmm.VM
	defer func() {
		if vm == nil {
			return
		}
		if err := vm.Kill(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	}()
	s.time(func() {
		if vm, err = driver.Start(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		wait(t, g)
	}, func() { greet(t, g) }, func() { hello(t, g) })
}

// greet runs the first command without an agent. A guest runs none before it has its
// identity.
func greet(t *testing.T, g *guest.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := g.Init(ctx, guest.Settings{Token: "a-sandboxs-token", Thaw: true}); err != nil {
		t.Fatal(err)
	}
	hello(t, g)
}

func hello(t *testing.T, g *guest.Client) {
	t.Helper()
	res, err := g.Exec(t.Context(), guest.Command{Cmd: "echo", Args: []string{"hello"}}, nil)
	if err != nil || string(res.Stdout) != "hello\n" {
		t.Fatalf("exec: %+v %v", res, err)
	}
}

// floors returns a function in which QEMU alone continues from the state that the agent's
// sandboxes start from. Everything else, network, disk and memory, is ready when the
// clock starts.
func (h *host) floors(t *testing.T, line []string) func(*start, *sample) {
	t.Helper()
	c := h.captured(t, createMemory)
	m, err := memory.Open(c.Memory())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	ram, err := m.Materialize(t.Context(), "bench")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ram.Close() })
	devices, err := os.ReadFile(c.Devices())
	if err != nil {
		t.Fatal(err)
	}
	return func(s *start, runs *sample) {
		t.Helper()
		overlay := filepath.Join(h.dir, "floor.qcow2")
		if err := disk.Create(disk.Qcow2, overlay, int64(c.DiskMiB)<<20, 0); err != nil {
			t.Fatal(err)
		}
		incoming := pipe(t, devices)
		launch := bare{cmdline: line, ram: ram, disk: append(under(c), overlay), token: c.Token}.prepare(t, h, incoming, true)
		var p *process
		begin := time.Now()
		s.time(func() {
			p = launch()
			p.runs(t)
			*runs = append(*runs, time.Since(begin))
			p.answers(t)
		}, func() { greet(t, p.guest) }, func() { hello(t, p.guest) })
		p.end()
		incoming.Close()
		if err := os.Remove(overlay); err != nil {
			t.Fatal(err)
		}
	}
}

// captured returns the capture of the minimal template with the given memory.
func (h *host) captured(t *testing.T, memoryMiB int) *image.Capture {
	t.Helper()
	tpl, err := image.Find(h.Dir, uuid.Nil, uuid.Nil)
	if err != nil {
		t.Fatal(err)
	}
	all, err := tpl.Captures(h.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		if c.VCPUs == 1 && c.MemoryMiB == memoryMiB {
			return c
		}
	}
	t.Fatalf("the template is not captured with %d MiB", memoryMiB)
	return nil
}
