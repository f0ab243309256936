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

// sweep removes the templates and forks that killed agents left unfinished. What
// cannot be removed is a problem, and is tried again until the manager closes.
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

// sweepAgain removes only what sweep has found: other folders may be in use by now.
func (m *Manager) sweepAgain(left []string) {
	waits := backoff.New(firstRetry, lastRetry)
	for len(left) > 0 {
		t := time.NewTimer(waits.Next())
		select {
		case <-t.C:
		case <-m.closing:
			t.Stop()
			return // the next agent goes on
		}
		var err error
		if left, err = removeEach(left); err != nil {
			m.reportLeftovers(err)
		}
	}
	m.Problems.Clear(problem.Leftover, "")
}

func (m *Manager) reportLeftovers(err error) {
	m.Problems.Report(problem.Leftover, "", fmt.Sprintf("files that a killed agent left cannot be removed; they take space, and the agent tries again: %v", err))
}

// leftovers returns the paths of unfinished templates and forks. Nobody else may
// be making any meanwhile.
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

// removeEach removes all that it can of paths and returns the others.
func removeEach(paths []string) (left []string, err error) {
	for _, path := range paths {
		if e := os.RemoveAll(path); e != nil {
			left, err = append(left, path), errors.Join(err, e)
		}
	}
	return left, err
}
