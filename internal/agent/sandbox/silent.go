package sandbox

import (
	"context"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/told"
	"github.com/wrenn-dev/wrenn/internal/backoff"
	"github.com/wrenn-dev/wrenn/internal/condition"
)

// probing says how guests are asked whether they answer.
type probing struct {
	// every is how often one is asked although nothing suggests that it does not.
	every time.Duration
	// timeout bounds one probe: a host may be busy.
	timeout time.Duration
	// The pauses between probes of a guest that does not answer.
	first, last time.Duration
	// after is for how long probes must have failed, two at least.
	after time.Duration
}

var defaultProbing = probing{every: time.Minute, timeout: 10 * time.Second, first: time.Second, last: 15 * time.Second, after: 10 * time.Second}

// watchGuest finds out whether the sandbox's guest answers, until life ends. It asks
// once a minute, and at once when a request failed; that counts as no use.
func (b *box) watchGuest(life context.Context, g *guest.Client) {
	p := b.m.probing
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
		case <-g.Suspected(): // of the probe itself
		default:
		}
		if answers || b.standsStill() {
			if failures > 0 {
				failures = 0
				waits.Reset()
				b.hush(life, nil)
			}
			continue
		}
		if failures++; failures == 1 {
			since = begun
		}
		if failures > 1 && time.Since(since) >= p.after {
			b.hush(life, &since)
		}
	}
}

// standsStill reports whether the sandbox's guest may stand still because of what is
// being done with it.
func (b *box) standsStill() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.working || b.rec.State != Running
}

// hush notes since when the guest does not answer; nil: it does. Once life has ended
// this is about no guest any more.
func (b *box) hush(life context.Context, since *time.Time) {
	reason := condition.NoAnswer
	if since != nil && b.m.DiskFull() {
		reason = condition.NoSpace
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.silent
	switch {
	case life.Err() != nil:
	case since == nil && was != nil:
		b.silent = nil
		b.log.Info("the guest answers again", "after", time.Since(was.Since))
	case since != nil && (was == nil || was.Reason != reason):
		b.silent = &condition.Condition{Reason: reason, Since: since.UTC()}
		b.log.Warn("the guest does not answer", "since", since.UTC(), "reason", string(reason))
	}
}

// silence says to clients that the guest does not answer; nil: it does.
func (b *box) silence() error {
	i := b.info()
	if i.State != Running || i.Condition == nil {
		return nil
	}
	return told.New("the sandbox has not answered since %s (%s): reboot it, which keeps its disk, or wait", i.Condition.Since.Format(time.RFC3339), i.Condition.Reason.Text())
}

// condition is what is wrong with the sandbox; nil: nothing.
func (b *box) condition() *condition.Condition { return b.info().Condition }
