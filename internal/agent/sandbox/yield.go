package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// A machine yields to others once it has used more than 0.6 of a processor for a second,
// until it uses less than 0.4. Between the two it stays as it is.
const (
	yieldEvery = time.Second
	yieldAbove = 0.6 // processors
	yieldBelow = 0.4
)

// Yield lets machines that use processors steadily yield to those that use them now and
// then, until ctx is done. A machine that answers a request then hardly waits for a
// neighbour that computes or floods its disk or network. Machines that all compute have
// equal shares again.
func (m *Manager) Yield(ctx context.Context) {
	d, ok := m.Driver.(vmm.Yielder)
	if !ok {
		return
	}
	y := yielding{driver: d, spent: processorTime}
	tick := time.NewTicker(yieldEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			m.endYielding(&y)
			return
		case <-tick.C:
			m.yield(&y, time.Now())
		}
	}
}

// yielding is what [Manager.Yield] knows between two rounds.
type yielding struct {
	driver vmm.Yielder
	spent  func(pid int) (time.Duration, error) // [processorTime]
	uses   map[uuid.UUID]*use                   // by the machine's id
}

// yield is one round.
func (m *Manager) yield(y *yielding, now time.Time) {
	all := m.all()
	uses := make(map[uuid.UUID]*use, len(all))
	for _, inst := range all {
		inst.mu.Lock()
		spec, vm := inst.rec.Spec, inst.vm
		inst.mu.Unlock()
		if vm == nil {
			continue
		}
		spent, err := y.spent(vm.PID())
		if err != nil {
			continue // it has ended
		}
		st := vm.State()
		u := y.uses[st.ID]
		if u == nil {
			u = &use{sandbox: spec.ID, machine: st, vcpus: spec.VCPUs, spent: spent, at: now, told: true}
		}
		uses[st.ID] = u
		u.next(spent, now)
		m.tell(y, u)
	}
	y.uses = uses
}

// endYielding makes the share of every machine normal. The next agent may be of an earlier
// release, which would leave them as they are.
func (m *Manager) endYielding(y *yielding) {
	for _, u := range y.uses {
		u.yields = false
		m.tell(y, u)
	}
}

// tell makes a machine yield or not, as it should.
func (m *Manager) tell(y *yielding, u *use) {
	// A machine that yields is told so each time, because its control group may have been
	// made again.
	if !u.yields && !u.told {
		return
	}
	err := y.driver.Yield(u.machine, vmm.Spec{VCPUs: u.vcpus}, u.yields)
	if err == nil {
		u.told, u.failed = u.yields, false
		return
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return // The machine has ended, or its control group will be made again.
	}
	if !u.failed {
		m.Log.Warn("cannot change a machine's share of the processors", "sandbox", id.Format(id.Sandbox, u.sandbox), "error", err)
	}
	u.failed = true
}

// use is what a running machine had used of the processors at a time.
type use struct {
	sandbox uuid.UUID
	machine vmm.State
	vcpus   int
	spent   time.Duration
	at      time.Time
	yields  bool // it should
	told    bool // what it was told last; true at first, because an earlier agent may have told it to
	failed  bool // telling it failed
}

// next decides whether the machine yields, from the processor time that it has used
// until now.
func (u *use) next(spent time.Duration, now time.Time) {
	if passed := now.Sub(u.at); passed > 0 {
		switch processors := float64(spent-u.spent) / float64(passed); {
		case processors > yieldAbove:
			u.yields = true
		case processors < yieldBelow:
			u.yields = false
		}
	}
	u.spent, u.at = spent, now
}

// processorTime returns the time that a process has used of the processors.
func processorTime(pid int) (time.Duration, error) {
	const scheduled = 2 // CPUCLOCK_SCHED, the clock of all of the process's threads
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduled), &t); err != nil {
		return 0, fmt.Errorf("read the processor time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}
