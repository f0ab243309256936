package sandbox

import (
	"context"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/condition"
)

// probing configures probes of guests.
type probing struct {
	// every is the time between probes of a guest that nobody suspects to be silent.
	every time.Duration
	// timeout bounds one probe. It allows for a busy host.
	timeout time.Duration
	// first and last are the bounds of the backoff between probes of a silent guest.
	first, last time.Duration
	// after is the time for which probes, at least two, must fail before the guest counts as
	// silent.
	after time.Duration
}

var defaultProbing = probing{every: time.Minute, timeout: 10 * time.Second, first: time.Second, last: 15 * time.Second, after: 10 * time.Second}

// probeGuest probes the sandbox's guest until life ends: regularly, and when a request
// failed. Probes do not count as uses.
func (inst *instance) probeGuest(life context.Context, g *guest.Client) {
	p := inst.m.probing
	waits := backoff.New(p.first, p.last)
	var since time.Time
	failures := 0
	for {
		wait, suspected := p.every, g.Suspected()
		if failures > 0 {
			wait, suspected = waits.Next(), nil
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-suspected:
		case <-life.Done():
			t.Stop()
			return
		}
		t.Stop()
		begun := time.Now()
		answers := g.Answers(life, p.timeout)
		if life.Err() != nil {
			return
		}
		select {
		case <-g.Suspected(): // the probe's own suspicion
		default:
		}
		if answers || inst.mayBeStopped() {
			if failures > 0 {
				failures = 0
				waits.Reset()
				inst.setSilent(life, nil)
			}
			continue
		}
		if failures++; failures == 1 {
			since = begun
		}
		if failures > 1 && time.Since(since) >= p.after {
			inst.setSilent(life, &since)
		}
	}
}

// mayBeStopped reports whether an operation may have stopped the guest.
func (inst *instance) mayBeStopped() bool {
	inst.mu.Lock()
	defer inst.mu.Unlock()
	return inst.working || inst.rec.State != Running
}

// setSilent records since when the guest has not responded (nil: it responds). It does
// nothing after life has ended.
func (inst *instance) setSilent(life context.Context, since *time.Time) {
	reason := condition.NoAnswer
	if since != nil && inst.m.DiskFull() {
		reason = condition.NoSpace
	}
	inst.mu.Lock()
	defer inst.mu.Unlock()
	was := inst.silent
	switch {
	case life.Err() != nil:
	case since == nil && was != nil:
		inst.silent = nil
		inst.log.Info("the guest responds again", "after", time.Since(was.Since))
	case since != nil && (was == nil || was.Reason != reason):
		inst.silent = &condition.Condition{Reason: reason, Since: since.UTC()}
		inst.log.Warn("the guest does not respond", "since", since.UTC(), "reason", string(reason))
	}
}

// silence returns an error for clients if the guest does not respond.
func (inst *instance) silence() error {
	i := inst.info()
	if i.State != Running || i.Condition == nil {
		return nil
	}
	return clienterr.New("the sandbox has not answered since %s (%s): reboot it, which keeps its disk, or wait", i.Condition.Since.Format(time.RFC3339), i.Condition.Reason.Text())
}

// condition returns what is wrong with the sandbox (nil: nothing).
func (inst *instance) condition() *condition.Condition { return inst.info().Condition }
