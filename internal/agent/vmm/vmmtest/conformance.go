package vmmtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/await"
)

// Opener opens a driver. dir is a folder for the driver only.
type Opener func(dir string, log *slog.Logger) (vmm.Driver, error)

// Subject is a driver under test.
type Subject struct {
	// New opens the driver with [Accelerator].
	New Opener
	// Needs returns an error if the driver cannot run on this machine, in which case the
	// tests are skipped.
	Needs func() error
	// Hostile has drivers that run a program of the test instead of the monitor. The keys name
	// the programs' attacks.
	Hostile map[string]Hostile

	// Forget disconnects the driver from a machine, as if the agent had ended.
	Forget func(vmm.VM)
	// Complains is part of the error of a start if the monitor rejects the kernel. Rebooted is
	// the error of a machine whose guest has rebooted.
	Complains, Rebooted string
	// Returns says that guests return memory that they free; see [vmm.Config].
	Returns bool
	// Devices checks the saved state of a machine's devices. It may be nil.
	Devices func(t *testing.T, s vmm.Spec, state []byte)
}

// Hostile is a driver with a monitor that its guest has taken over.
type Hostile struct {
	New Opener
	// Starts is true if the monitor attacks only after it has started a machine.
	Starts bool
}

// parts are the subtests of the suite. Those that only restore a machine share one boot; see
// [suite.saved].
var parts = []struct {
	name string
	run  func(s *suite, t *testing.T)
}{
	{"boot", (*suite).boot},
	{"busy host", (*suite).busyHost},
	{"descriptors", (*suite).descriptors},
	{"console", (*suite).console},
	{"end", (*suite).end},
	{"standstill", (*suite).standstill},
	{"hostile", (*suite).hostile},
	{"failed start", (*suite).failedStart},
	{"failed restore", (*suite).failedRestore},
	{"save", (*suite).save},
	{"pages", (*suite).pages},
	{"rates", (*suite).rates},
	{"pauses", (*suite).pauses},
}

// Conformance checks that a driver implements [vmm.Driver] and [vmm.VM]. Each driver must
// pass it with each accelerator.
func Conformance(t *testing.T, subject Subject) {
	s := &suite{Subject: subject, top: t}
	if o := os.Getenv(agentEnv); o != "" {
		s.agent(o)
	}
	for _, p := range parts {
		t.Run(strings.ReplaceAll(p.name, " ", "-"), func(t *testing.T) { p.run(s, t) })
	}
}

type suite struct {
	Subject
	top  *testing.T
	kept *savedMachine
}

// savedMachine is a machine that was saved while it ran [Counting].
type savedMachine struct {
	image   *memory.Image
	ram     *os.File
	devices []byte
	overlay string
	count   int // its count before it was saved
}

// savedToken is the token of a saved machine's guest daemon.
const savedToken = "saved"

// from returns the state for a restore.
func (m *savedMachine) from() vmm.Saved { return vmm.Saved{Memory: m.ram, Devices: m.devices} }

// saved returns a bench without a machine, and a saved machine that all parts share. The
// first part that needs it boots and saves it.
func (s *suite) saved(t *testing.T) (*Bench, *savedMachine) {
	t.Helper()
	b := s.NewBench(t)
	if s.kept == nil {
		b.dir = s.top.TempDir()
		b.Boot(savedToken)
		m := &savedMachine{overlay: filepath.Join(b.dir, "overlay")}
		b.Sh(Counting)
		m.count = b.Number("cat /dev/shm/count")
		m.image, m.devices = b.Save(nil)
		b.Kill()
		b.Must(os.Rename(b.Spec.Overlay, m.overlay))
		var err error
		m.ram, err = m.image.Materialize(t.Context(), "saved")
		b.Must(err)
		s.top.Cleanup(func() { m.ram.Close(); m.image.Close() })
		b.dir, s.kept = "", m
	}
	b.Fresh(s.kept.overlay)
	return b, s.kept
}

// agentEnv is the environment variable with the orders for a process that acts as an agent.
const agentEnv = "WRENN_VMMTEST_AGENT"

// orders tell such an agent to start a machine, or to attach to one and hold it.
type orders struct {
	Dir   string     // folder for the driver
	Start *vmm.Spec  `json:",omitempty"`
	Hold  *vmm.State `json:",omitempty"`
}

// agent follows orders, prints the state of the machine, and waits to be killed. It never
// returns.
func (s *suite) agent(text string) {
	st, err := s.obey(text)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	b, _ := json.Marshal(st)
	fmt.Printf("%s\n", b)
	_, _ = io.Copy(io.Discard, os.Stdin) // so that this process ends with the test at the latest
	os.Exit(1)
}

func (s *suite) obey(text string) (vmm.State, error) {
	var o orders
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return vmm.State{}, err
	}
	d, err := s.New(o.Dir, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return vmm.State{}, err
	}
	ctx := s.top.Context()
	if o.Start != nil {
		vm, err := d.Start(ctx, *o.Start)
		if err != nil {
			return vmm.State{}, err
		}
		return vm.State(), nil
	}
	vm, err := d.Attach(ctx, *o.Hold)
	if err != nil {
		return vmm.State{}, err
	}
	return vm.State(), vm.Hold(ctx)
}

// killedAgent makes another process follow orders, kills it, and returns the state of the
// machine that it left.
func (s *suite) killedAgent(t *testing.T, o orders) (st vmm.State) {
	t.Helper()
	o.Dir = t.TempDir()
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+s.top.Name()+"$")
	cmd.Env = append(os.Environ(), agentEnv+"="+string(text))
	cmd.Stderr = t.Output()
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make(chan error, 1)
	go func() { said <- json.NewDecoder(stdout).Decode(&st) }()
	err = await.Recv(t, "the agent prints the machine's state", said)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		t.Fatalf("read the agent's output: %v", err)
	}
	return st
}
