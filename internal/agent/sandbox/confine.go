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
	failed := map[string]bool{}
	for _, inst := range m.all() {
		inst.mu.Lock()
		spec, vm := inst.rec.Spec, inst.vm
		inst.mu.Unlock()
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
