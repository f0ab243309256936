// Package backoff computes how long to wait between retries.
package backoff

import (
	"context"
	"time"

	"github.com/sethvargo/go-retry"
)

// jitter is the random part of each wait in percent, so that callers that failed at the
// same time do not retry at the same time.
const jitter = 33

// Backoff is a series of waits, each about twice as long as the one before. It is not
// safe for concurrent use.
type Backoff struct {
	first, most time.Duration
	next        retry.Backoff
}

// New returns a series of waits from first to most. Each differs from that by up to a
// third, at random.
func New(first, most time.Duration) *Backoff {
	b := &Backoff{first: first, most: most}
	b.Reset()
	return b
}

// Reset restarts the series.
func (b *Backoff) Reset() {
	b.next = retry.WithJitterPercent(jitter, retry.WithCappedDuration(b.most, retry.NewExponential(b.first)))
}

// Next returns how long to wait before the next attempt.
func (b *Backoff) Next() time.Duration {
	wait, _ := b.next.Next()
	return wait
}

// Wait waits before the next attempt. If ctx is done first, it returns the cause.
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
