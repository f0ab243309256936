package agent

import (
	"errors"
	"fmt"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// CheckFormats returns an error if a later release wrote any of the data in
// dir. It changes nothing.
func CheckFormats(dir layout.Dir) error {
	newer := sandbox.Newer(dir)
	damaged, err := image.Examine(dir)
	if err != nil {
		return err
	}
	look := func(err error) {
		var e *format.NewerError
		if errors.As(err, &e) {
			newer = append(newer, e)
		}
	}
	for _, d := range damaged {
		look(d.Err)
	}
	look(journal.Check(dir.Events()))
	switch len(newer) {
	case 0:
		return nil
	case 1:
		return newer[0]
	}
	return fmt.Errorf("%w (and %d more like it)", newer[0], len(newer)-1)
}

// setAside moves unreadable templates and captures away. If a move fails, the agent
// starts all the same, and the next start tries again.
func (a *Agent) setAside() error {
	damaged, err := image.Examine(a.cfg.Dir)
	if err != nil {
		return err
	}
	items, err := image.SetAside(a.cfg.Dir, damaged)
	if err != nil {
		a.log.Error("cannot set unreadable data aside", "error", err)
	}
	for _, i := range items {
		a.log.Error("set unreadable data aside", "kind", i.Kind, "path", i.Path, "from", i.From, "reason", i.Reason)
	}
	return nil
}

// templates returns the readable templates and reports the others as a problem.
func (a *Agent) templates() ([]image.Template, error) {
	all, damaged, err := image.Load(a.cfg.Dir)
	if err != nil {
		return nil, err
	}
	if len(damaged) == 0 {
		a.problems.Clear(problem.Unreadable, damagedTemplates)
		return all, nil
	}
	a.problems.Report(problem.Unreadable, damagedTemplates, fmt.Sprintf(
		"%d templates cannot be read. The first is in %s: %v. Repair it, or restart the agent to set it aside.", len(damaged), damaged[0].Path, damaged[0].Err))
	return all, nil
}

// damagedTemplates is the object of the problem of templates that were damaged while
// the agent ran.
const damagedTemplates = "template in use"

// reportUnreadable reports data that was set aside, until the operator removes it.
func (a *Agent) reportUnreadable() error {
	items, err := unreadable.List(a.cfg.Dir)
	if err != nil {
		return err
	}
	n := map[unreadable.Kind]int{}
	for _, i := range items {
		n[i.Kind]++
	}
	for _, kind := range unreadable.Kinds() {
		if n[kind] == 0 {
			a.problems.Clear(problem.Unreadable, string(kind))
			continue
		}
		a.problems.Report(problem.Unreadable, string(kind), fmt.Sprintf(
			"The agent keeps unreadable data in %s (%s: %d). Run \"wrenn doctor\" on the host, then repair it and put it back, or delete it; see docs/upgrade.md.", a.cfg.Dir.Unreadable(), kind, n[kind]))
	}
	return nil
}
