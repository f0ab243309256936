package sandbox

import (
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// Confine puts machines that other software moved out of their control groups back into
// them. If it cannot, it reports a problem until it can or the machine has ended.
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
			problems.Report(problem.Cgroup, sandbox, "sandbox "+sandbox+" is outside of its control group and may exceed its limits: "+err.Error())
		case repaired:
			problems.Repaired(problem.Cgroup, sandbox, "somebody moved the sandbox's machine out of its control group, or removed the group")
		}
	}
	for _, p := range problems.All() {
		if p.Kind == problem.Cgroup && !failed[p.Object] {
			problems.Clear(problem.Cgroup, p.Object)
		}
	}
}
