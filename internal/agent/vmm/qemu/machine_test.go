package qemu

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

// TestEndOutOfGroup moves a machine's process out of its cgroup: the driver still kills
// it, and no other process.
func TestEndOutOfGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if err := cgroup.Available(); err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	started, err := startTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	st := vmm.State{ID: uuid.New(), PID: cmd.Process.Pid, StartTime: started + 1, BootID: "boot"}
	d := &Driver{bootID: "boot", accel: TCG}
	if err := d.endings.end(ctx, st, "boot"); err != nil {
		t.Error(err)
	}
	if repaired, err := d.Confine(st, vmm.Spec{VCPUs: 1, MemoryMiB: 64}); err != nil || repaired {
		t.Errorf("another process of the same pid was confined: %v, %v", repaired, err)
	}
	select {
	case err := <-ended:
		t.Fatalf("another process of the same pid was killed: %v", err)
	default:
	}

	st.StartTime = started
	g := cgroup.Group{Name: st.ID.String()}
	if repaired, err := d.Confine(st, vmm.Spec{VCPUs: 1, MemoryMiB: 64}); err != nil || !repaired {
		t.Errorf("a process outside its group: %v, %v", repaired, err)
	}
	if _, err := g.Memory(); err != nil {
		t.Error(err)
	}
	for _, yield := range []bool{true, false} {
		if err := d.Yield(st, vmm.Spec{VCPUs: 1}, yield); err != nil {
			t.Errorf("yield %v: %v", yield, err)
		}
	}
	// While the driver ends the process, it stays out of the group.
	if err := vmmtest.MoveOut(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	done := d.endings.begin(st.ID)
	if repaired, err := d.Confine(st, vmm.Spec{VCPUs: 1, MemoryMiB: 64}); err != nil || repaired {
		t.Errorf("a process that is being ended was confined: %v, %v", repaired, err)
	}
	done()
	if repaired, err := d.Confine(st, vmm.Spec{VCPUs: 1, MemoryMiB: 64}); err != nil || !repaired {
		t.Errorf("a process that was moved out: %v, %v", repaired, err)
	}
	// Move it out again, and kill it by its pid alone.
	if err := vmmtest.MoveOut(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := d.endings.end(ctx, st, "boot"); err != nil {
		t.Fatal(err)
	}
	// The driver counts it as ended even if its parent has not reaped it yet.
	if repaired, err := d.Confine(st, vmm.Spec{VCPUs: 1, MemoryMiB: 64}); err != nil || repaired {
		t.Errorf("a process that has ended was confined: %v, %v", repaired, err)
	}
	<-ended
	if _, err := g.Memory(); err == nil {
		t.Error("the group still exists")
	}
	if repaired, err := d.Confine(st, vmm.Spec{VCPUs: 1, MemoryMiB: 64}); err != nil || repaired {
		t.Errorf("a process that has ended was confined: %v, %v", repaired, err)
	}
}
