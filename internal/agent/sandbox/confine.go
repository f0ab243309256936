package sandbox

import (
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// Confine puts the machines that other software has taken out of their bounds
// back into them. What cannot be is a problem until it could be, or the machine
// has ended.
func (m *Manager) Confine(problems *problem.List) {
	c, ok := m.Driver.(vmm.Confiner)
	if !ok {
		return
	}
	m.mu.Lock()
	boxes := make([]*box, 0, len(m.boxes))
	for _, b := range m.boxes {
		boxes = append(boxes, b)
	}
	m.mu.Unlock()
	failed := map[string]bool{}
	for _, b := range boxes {
		b.mu.Lock()
		spec, vm := b.rec.Spec, b.vm
		b.mu.Unlock()
		if vm == nil {
			continue
		}
		sandbox := id.Format(id.Sandbox, spec.ID)
		repaired, err := c.Confine(vm.State(), vmm.Spec{VCPUs: spec.VCPUs, MemoryMiB: spec.MemoryMiB})
		switch {
		case err != nil:
			failed[sandbox] = true
			problems.Report(problem.Cgroup, sandbox, "sandbox "+sandbox+" may take more of this host than it should: "+err.Error())
		case repaired:
			problems.Repaired(problem.Cgroup, sandbox, "somebody moved the sandbox's machine out of its control group, or removed that")
		}
	}
	for _, p := range problems.All() {
		if p.Kind == problem.Cgroup && !failed[p.Object] {
			problems.Clear(problem.Cgroup, p.Object)
		}
	}
}
