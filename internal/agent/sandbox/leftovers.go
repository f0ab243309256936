package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// sweep removes unfinished templates and forks of killed agents. If it cannot remove one, it
// reports a problem, and retries until the manager closes.
func (m *Manager) sweep() {
	left, err := leftovers(m.Dir)
	left, failed := removeEach(left)
	if err = errors.Join(err, failed); err == nil {
		return
	}
	m.reportLeftovers(err)
	if len(left) > 0 {
		m.wg.Go(func() { m.sweepAgain(left) })
	}
}

// sweepAgain retries to remove what sweep found. It does not look for more, because other
// folders may be in use by now.
func (m *Manager) sweepAgain(left []string) {
	waits := backoff.New(firstRetry, lastRetry)
	for len(left) > 0 {
		t := time.NewTimer(waits.Next())
		select {
		case <-t.C:
		case <-m.closing:
			t.Stop()
			return // the next agent tries again
		}
		var err error
		if left, err = removeEach(left); err != nil {
			m.reportLeftovers(err)
		}
	}
	m.Problems.Clear(problem.Leftover, "")
}

func (m *Manager) reportLeftovers(err error) {
	m.Problems.Report(problem.Leftover, "", fmt.Sprintf("cannot remove files that a killed agent left; they take space, and the agent retries: %v", err))
}

// leftovers returns the paths of unfinished templates and forks. Nobody may be making any
// during the call.
func leftovers(dir layout.Dir) ([]string, error) {
	all, err := image.Leftovers(dir)
	forks, e := os.ReadDir(dir.Forks())
	if errors.Is(e, syscall.ENOTDIR) {
		return append(all, dir.Forks()), err
	}
	if e != nil && !errors.Is(e, fs.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("look for unfinished forks: %w", e))
	}
	for _, f := range forks {
		all = append(all, filepath.Join(dir.Forks(), f.Name()))
	}
	return all, err
}

// removeEach removes paths, and returns those that it cannot remove.
func removeEach(paths []string) (left []string, err error) {
	for _, path := range paths {
		if e := os.RemoveAll(path); e != nil {
			left, err = append(left, path), errors.Join(err, e)
		}
	}
	return left, err
}
