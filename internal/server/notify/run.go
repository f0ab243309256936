package notify

import (
	"context"
	"crypto/rand"
	"errors"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

const (
	// workers is how many deliveries a server attempts at once, ofChannel how many per
	// channel and ofPayer how many of all teams of one owner. So receivers that hang delay
	// only their own channel, and an owner's channels cannot delay other owners'.
	workers   = 32
	ofChannel = 2
	ofPayer   = 8
	// tryWithin bounds one attempt. claimFor is how long a claim keeps other servers from
	// attempting.
	tryWithin = 15 * time.Second
	claimFor  = 2 * time.Minute
	// attempts is how often a delivery is attempted, over about three hours.
	attempts = 12
	// The first wait, which doubles after each attempt, and the longest.
	minWait = 5 * time.Second
	maxWait = time.Hour
	// giveUpAfter is how long all deliveries of a channel must fail until it is disabled.
	giveUpAfter = 3 * 24 * time.Hour
	// kept is how long deliveries are stored, and keep how many per channel.
	kept       = 7 * 24 * time.Hour
	keep       = 500
	pruneEvery = 10 * time.Minute
	batch      = 1000
)

// limitEvents limits the mails about events of all teams of one owner. Further ones wait.
var limitEvents = ratelimit.Limit{Name: "event-mails", Burst: 60, Per: time.Minute}

func nonce() []byte {
	b := make([]byte, chacha20poly1305.NonceSizeX, chacha20poly1305.NonceSizeX+512)
	rand.Read(b)
	return b
}

// wait returns the backoff after the nth attempt. It doubles each time, with jitter of
// ±50 %.
func wait(n int32) time.Duration {
	d := maxWait
	if n < 12 {
		d = min(maxWait, minWait<<(n-1))
	}
	return d/2 + mathrand.N(d)
}

// underWay counts the deliveries that this server attempts now.
type underWay struct {
	wg sync.WaitGroup

	mu       sync.Mutex
	all      int
	channels map[uuid.UUID]int
	payers   map[uuid.UUID]int
}

// count adds n to the counts of a channel and its team's payer.
func (u *underWay) count(n int, channel, payer uuid.UUID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.all += n
	u.channels[channel] += n
	u.payers[payer] += n
	if u.channels[channel] == 0 {
		delete(u.channels, channel)
	}
	if u.payers[payer] == 0 {
		delete(u.payers, payer)
	}
}

// busy returns the channels and payers that are at their limit, and whether the server is
// at its own.
func (u *underWay) busy() (channels, payers []uuid.UUID, full bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	channels, payers = []uuid.UUID{}, []uuid.UUID{}
	for of, n := range u.channels {
		if n >= ofChannel {
			channels = append(channels, of)
		}
	}
	for of, n := range u.payers {
		if n >= ofPayer {
			payers = append(payers, of)
		}
	}
	return channels, payers, u.all >= workers
}

// Run delivers events until ctx is done.
func (s *Service) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { s.Store.Listen(ctx, s.Log, "wrenn_deliveries", func(string) { s.look() }) })
	wg.Go(func() { s.prune(ctx) })
	u := &underWay{channels: make(map[uuid.UUID]int), payers: make(map[uuid.UUID]int)}
	defer wg.Wait()
	defer u.wg.Wait()
	for ctx.Err() == nil {
		t := time.NewTimer(s.begin(ctx, u))
		select {
		case <-s.wake:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// look makes Run look for deliveries.
func (s *Service) look() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// begin starts the due deliveries that the limits allow. It returns how long Run can
// sleep; the end of a delivery wakes it earlier.
func (s *Service) begin(ctx context.Context, u *underWay) time.Duration {
	for {
		channels, payers, full := u.busy()
		if full {
			return time.Minute
		}
		d, err := s.Store.ClaimDelivery(ctx, db.ClaimDeliveryParams{Secs: claimFor.Seconds(), BusyChannels: channels, BusyPayers: payers})
		if errors.Is(err, store.ErrNoRows) {
			secs, err := s.Store.NextDelivery(ctx, db.NextDeliveryParams{BusyChannels: channels, BusyPayers: payers})
			if err != nil {
				return minWait
			}
			return min(max(time.Duration(secs*float64(time.Second)), 100*time.Millisecond), time.Minute)
		}
		if err != nil {
			if ctx.Err() == nil {
				s.Log.Warn("claim delivery", "error", err)
			}
			return minWait
		}
		row, err := s.Store.GetChannelPayer(ctx, d.ChannelID)
		if errors.Is(err, store.ErrNoRows) {
			continue // A concurrent request deleted it and its deliveries.
		}
		if err != nil {
			s.Log.Warn("look up channel", "error", err)
			return minWait // The claim on the delivery expires.
		}
		c, payer := row.Channel, row.Payer
		u.count(1, c.ID, payer)
		u.wg.Go(func() {
			defer s.look()
			defer u.count(-1, c.ID, payer)
			if err := s.try(ctx, c, payer, d); err != nil && ctx.Err() == nil {
				s.Log.Warn("write the result of a delivery", "delivery", d.ID, "error", err)
			}
		})
	}
}

// try attempts a delivery and stores the result.
func (s *Service) try(ctx context.Context, c db.Channel, payer uuid.UUID, d db.Delivery) error {
	if !c.Enabled {
		return s.Store.DeliveryTried(ctx, db.DeliveryTriedParams{ID: d.ID, State: "failed", Error: "the channel is disabled"})
	}
	if !Confirmed(c) { // Its address changed after the event.
		return s.Store.DeliveryTried(ctx, db.DeliveryTriedParams{ID: d.ID, State: "failed", Error: errUnconfirmed.Error()})
	}
	if c.Kind == Email {
		if err := s.Limiter.Allow(ctx, limitEvents, payer.String()); fault.Is(err, fault.RateLimited) {
			return s.Store.DelayDeliveries(ctx, db.DelayDeliveriesParams{Claimed: d.ID, ChannelID: c.ID, Secs: limitEvents.Per.Seconds()})
		} else if err != nil {
			return err // The server stops, and the claim expires.
		}
	}
	out := s.deliver(ctx, c, d)
	if ctx.Err() != nil && out.err != nil {
		return ctx.Err() // The server stops, and the claim expires.
	}
	// Store the result even if the server stops.
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
	err := s.Store.DeliveryTried(ctx, tried)
	enabled, failErr := s.Store.ChannelFails(ctx, db.ChannelFailsParams{ID: c.ID, Secs: giveUpAfter.Seconds(), Reason: "all deliveries failed for 3 days: " + out.problem()})
	if failErr == nil && !enabled {
		s.Log.Warn("channel disabled", "channel", c.ID, "kind", c.Kind)
	}
	return errors.Join(err, failErr)
}

// prune deletes old deliveries. A lease ensures that only one server at a time does this.
func (s *Service) prune(ctx context.Context) {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		if err := s.forget(ctx); err != nil && ctx.Err() == nil {
			s.Log.Warn("delete old deliveries", "error", err)
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
	if err != nil || !mine {
		return err
	}
	var errs []error
	for _, forget := range []func() (int64, error){
		func() (int64, error) {
			return s.Store.ForgetDeliveries(ctx, db.ForgetDeliveriesParams{Before: time.Now().Add(-kept), MaxRows: batch})
		},
		func() (int64, error) {
			return s.Store.TrimDeliveries(ctx, db.TrimDeliveriesParams{Keep: keep, MaxRows: batch})
		},
	} {
		for n := int64(batch); n == batch; {
			if n, err = forget(); err != nil {
				errs = append(errs, err)
				break
			}
		}
	}
	return errors.Join(errs...)
}
