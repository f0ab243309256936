package sandbox

import (
	"os"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/procfs"

	"github.com/wrenn-dev/wrenn/internal/agent/sparse"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Sample is the host's measurement of a sandbox's use of resources.
type Sample struct {
	ID    uuid.UUID
	VCPUs int
	// CPU is the processor time of the machine's process since its start. A resume starts a
	// new process.
	CPU time.Duration
	// MemoryBytes is the host's memory that the machine takes, DiskBytes the disk space of
	// the sandbox's own files.
	MemoryBytes, DiskBytes int64
}

// Samples measures all running sandboxes. It leaves out those that end during the call.
func (m *Manager) Samples() []Sample {
	var samples []Sample
	for _, inst := range m.all() {
		inst.mu.Lock()
		s, home, vm := Sample{ID: inst.rec.Spec.ID, VCPUs: inst.rec.Spec.VCPUs}, inst.rec.Home, inst.vm
		running := inst.rec.State == Running && vm != nil
		inst.mu.Unlock()
		if running && s.measure(vm, m.Dir.Sandbox(home)) == nil {
			samples = append(samples, s)
		}
	}
	return samples
}

func (s *Sample) measure(vm vmm.VM, dir string) error {
	p, err := procfs.NewProc(vm.PID())
	if err != nil {
		return err
	}
	stat, err := p.Stat()
	if err != nil {
		return err
	}
	s.CPU = time.Duration(stat.CPUTime() * float64(time.Second))
	if s.MemoryBytes, err = vm.Memory(); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // It is gone.
		}
		if info.Mode().IsRegular() && e.Name() != layout.Modules {
			s.DiskBytes += sparse.Allocated(info)
		}
	}
	return nil
}
