// Package backoff says how long to wait between attempts that fail.
package backoff

import (
	"context"
	"time"

	"github.com/sethvargo/go-retry"
)

// jitter is how much each wait differs by chance, in percent, so that those
// that failed together do not come back together.
const jitter = 33

// Backoff is a series of waits, of which each is about twice the one before.
// It is not safe for concurrent use.
type Backoff struct {
	first, most time.Duration
	next        retry.Backoff
}

// New returns a series that begins with about first and ends with about most:
// up to a third less or more.
func New(first, most time.Duration) *Backoff {
	b := &Backoff{first: first, most: most}
	b.Reset()
	return b
}

// Reset lets the series begin again.
func (b *Backoff) Reset() {
	b.next = retry.WithJitterPercent(jitter, retry.WithCappedDuration(b.most, retry.NewExponential(b.first)))
}

// Next returns how long to wait before the next attempt.
func (b *Backoff) Next() time.Duration {
	wait, _ := b.next.Next()
	return wait
}

// Wait waits before the next attempt. If ctx is done before, it returns the
// cause.
func (b *Backoff) Wait(ctx context.Context) error {
	t := time.NewTimer(b.Next())
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
