package notify

import (
	"context"
	"crypto/rand"
	"errors"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

const (
	// workers is how many deliveries a server tries at once.
	workers = 8
	// tryWithin bounds one attempt, claimFor is how long nobody else makes one.
	tryWithin = 15 * time.Second
	claimFor  = 2 * time.Minute
	// attempts is how often a delivery is tried, over some three hours.
	attempts = 12
	// The first wait, which doubles, and the longest.
	minWait = 5 * time.Second
	maxWait = time.Hour
	// giveUpAfter is how long nothing may have been delivered for a channel to be
	// disabled.
	giveUpAfter = 3 * 24 * time.Hour
	// kept is how long deliveries are listed, and keep how many of a channel.
	kept       = 7 * 24 * time.Hour
	keep       = 500
	pruneEvery = 10 * time.Minute
	batch      = 1000
)

func nonce() []byte {
	b := make([]byte, chacha20poly1305.NonceSizeX, chacha20poly1305.NonceSizeX+512)
	rand.Read(b)
	return b
}

// wait is how long after the nth attempt the next comes: doubled each time, and
// by chance half as much more or less, so that what failed together does not
// come back together.
func wait(n int32) time.Duration {
	d := maxWait
	if n < 12 {
		d = min(maxWait, minWait<<(n-1))
	}
	return d/2 + mathrand.N(d)
}

// Run delivers until ctx is done.
func (s *Service) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() {
		s.Store.Listen(ctx, s.Log, "wrenn_deliveries", func(string) {
			select {
			case s.wake <- struct{}{}:
			default:
			}
		})
	})
	wg.Go(func() { s.prune(ctx) })
	defer wg.Wait()
	for ctx.Err() == nil {
		pause := s.round(ctx)
		t := time.NewTimer(pause)
		select {
		case <-s.wake:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// round tries all that is due, and returns how long there is nothing to do.
func (s *Service) round(ctx context.Context) time.Duration {
	for {
		due, err := s.Store.ClaimDeliveries(ctx, db.ClaimDeliveriesParams{Secs: claimFor.Seconds(), MaxRows: workers})
		if err != nil {
			if ctx.Err() == nil {
				s.Log.Warn("look for deliveries", "error", err)
			}
			return minWait
		}
		var wg sync.WaitGroup
		for _, d := range due {
			wg.Go(func() {
				if err := s.try(ctx, d); err != nil && ctx.Err() == nil {
					s.Log.Warn("write what became of a delivery", "delivery", d.ID, "error", err)
				}
			})
		}
		wg.Wait()
		if len(due) == workers {
			continue
		}
		secs, err := s.Store.NextDelivery(ctx)
		if err != nil {
			return minWait
		}
		return min(max(time.Duration(secs*float64(time.Second)), 100*time.Millisecond), time.Minute)
	}
}

// try tries a delivery and writes down how that went.
func (s *Service) try(ctx context.Context, d db.Delivery) error {
	c, err := s.Store.GetChannel(ctx, d.ChannelID)
	if errors.Is(err, store.ErrNoRows) {
		return nil // It was deleted, and the delivery with it.
	}
	if err != nil {
		return err
	}
	if !c.Enabled {
		return s.Store.DeliveryTried(ctx, db.DeliveryTriedParams{ID: d.ID, State: "failed", Error: "the channel is disabled"})
	}
	out := s.deliver(ctx, c, d)
	if ctx.Err() != nil && out.err != nil {
		return ctx.Err() // The server stops; it is due again in a while.
	}
	// What happened is written whether the server stops or not.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	tried := db.DeliveryTriedParams{ID: d.ID, State: "delivered", TookMs: out.took.Milliseconds(), Status: int32(out.status), Error: out.problem()}
	if out.err == nil {
		return errors.Join(s.Store.DeliveryTried(ctx, tried), s.Store.ChannelWorks(ctx, c.ID))
	}
	tried.State = "failed"
	if d.Attempts < attempts {
		tried.State, tried.Secs = "pending", wait(d.Attempts).Seconds()
	}
	err = s.Store.DeliveryTried(ctx, tried)
	enabled, failErr := s.Store.ChannelFails(ctx, db.ChannelFailsParams{ID: c.ID, Secs: giveUpAfter.Seconds(), Reason: "nothing was delivered for 3 days: " + out.problem()})
	if failErr == nil && !enabled {
		s.Log.Warn("channel disabled", "channel", c.ID, "kind", c.Kind)
	}
	return errors.Join(err, failErr)
}

// prune forgets old deliveries. Of several servers one does.
func (s *Service) prune(ctx context.Context) {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		if err := s.forget(ctx); err != nil && ctx.Err() == nil {
			s.Log.Warn("forget old deliveries", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Service) forget(ctx context.Context) error {
	mine, err := s.Store.Lease(ctx, "deliveries", 2*pruneEvery)
	for n := int64(batch); mine && err == nil && n == batch; {
		n, err = s.Store.ForgetDeliveries(ctx, db.ForgetDeliveriesParams{Before: time.Now().Add(-kept), MaxRows: batch})
	}
	for n := int64(batch); mine && err == nil && n == batch; {
		n, err = s.Store.TrimDeliveries(ctx, db.TrimDeliveriesParams{Keep: keep, MaxRows: batch})
	}
	return err
}
