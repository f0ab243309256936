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
	// guardPace is the shortest time between two checks.
	guardPace = 250 * time.Millisecond
	// guardAnyway is the time between two checks if no change is noticed.
	guardAnyway = 30 * time.Second
)

// guardHost repairs what other software does to the agent's control groups and files, and
// lets busy machines yield to others, until ctx is done. The network has a guard of its
// own.
func (a *Agent) guardHost(ctx context.Context) error {
	wake := make(chan struct{}, 1)
	w, err := hostwatch.Open(false, func() {
		select {
		case wake <- struct{}{}:
		default: // a check is pending already
		}
	})
	if err != nil {
		return err
	}
	a.guarding.Go(func() { a.sandboxes.Yield(ctx) })
	a.guarding.Go(func() {
		defer w.Close()
		tick := time.NewTicker(guardAnyway)
		defer tick.Stop()
		for ctx.Err() == nil {
			a.guardLock()
			a.guardProblems()
			// Each time, because the groups' folders come with the first machine and go
			// with the last.
			for _, dir := range append(cgroup.Folders(), a.cfg.Dir.Run()) {
				if err := w.Add(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					a.log.Debug("cannot watch a folder; the regular check covers it", "error", err)
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

// guardLock locks the agent's data again if somebody removed the lock file, without
// which another agent could start on the same data.
func (a *Agent) guardLock() {
	path := a.cfg.Dir.AgentLock()
	held, err := a.lock.Stat()
	if err != nil {
		return // the agent is closing
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
			a.problems.Repaired(problem.Files, path, "somebody removed the agent's lock file")
			a.problems.Clear(problem.Files, path)
			return
		}
	}
	a.problems.Report(problem.Files, path, fmt.Sprintf("somebody removed %s, and the agent cannot lock it again (%v); if another agent uses the same data, stop one of them", path, err))
}

// guardProblems writes the list of problems again if somebody removed its file, without
// which wrenn doctor would believe that no agent runs.
func (a *Agent) guardProblems() {
	lost, err := a.problems.Restore()
	switch {
	case err != nil:
		a.log.Error("cannot restore the list of problems, which somebody removed", "error", err)
	case lost:
		a.problems.Repaired(problem.Files, a.cfg.Dir.Problems(), "somebody removed the list of problems")
	}
}
