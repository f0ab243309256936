package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/hostwatch"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/flock"
)

const (
	// guardPace is the least time between two repairs.
	guardPace = 250 * time.Millisecond
	// guardAnyway is how often the host is looked at though nothing was noticed.
	guardAnyway = 30 * time.Second
)

// guardHost notices what other software does to the agent's control groups and
// files, and repairs it, until ctx is done. The network has a guard of its own.
func (a *Agent) guardHost(ctx context.Context) error {
	wake := make(chan struct{}, 1)
	w, err := hostwatch.Open(false, func() {
		select {
		case wake <- struct{}{}:
		default: // it knows
		}
	})
	if err != nil {
		return err
	}
	a.guarding.Go(func() {
		defer w.Close()
		tick := time.NewTicker(guardAnyway)
		defer tick.Stop()
		for ctx.Err() == nil {
			a.guardLock()
			a.guardProblems()
			// Folders come and go: of groups with the first machine and the last.
			for _, dir := range append(cgroup.Folders(), a.cfg.Dir.Run()) {
				if err := w.Add(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					a.log.Debug("changes of a folder are noticed later", "error", err)
				}
			}
			a.sandboxes.Confine(a.problems)
			select {
			case <-ctx.Done():
			case <-time.After(guardPace):
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			case <-wake:
			}
		}
	})
	return nil
}

// guardLock makes the lock on the agent's data again if its file was removed:
// else another agent could start on the same data.
func (a *Agent) guardLock() {
	path := a.cfg.Dir.AgentLock()
	held, err := a.lock.Stat()
	if err != nil {
		return // closed: the agent ends
	}
	if there, err := os.Stat(path); err == nil && os.SameFile(held, there) {
		a.problems.Clear(problem.Files, path)
		return
	}
	err = os.MkdirAll(a.cfg.Dir.Run(), 0o755)
	if err == nil {
		var again *os.File
		if again, err = flock.TryLock(path); err == nil {
			old := a.lock
			a.lock = again
			old.Close()
			a.problems.Repaired(problem.Files, path, "somebody removed the file of the agent's lock")
			a.problems.Clear(problem.Files, path)
			return
		}
	}
	a.problems.Report(problem.Files, path, fmt.Sprintf("somebody removed %s, and another agent may run on the same data; stop one of them: %v", path, err))
}

// guardProblems writes the list of problems again if its file was removed: else
// wrenn doctor would take the agent for stopped.
func (a *Agent) guardProblems() {
	lost, err := a.problems.Restore()
	switch {
	case err != nil:
		a.log.Error("the list of problems was removed", "error", err)
	case lost:
		a.problems.Repaired(problem.Files, a.cfg.Dir.Problems(), "somebody removed the file of the list of problems")
	}
}
