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
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

const (
	// workers is how many deliveries a server tries at once, ofChannel how many of
	// one channel and ofTeam of one team, so that receivers that hang hold up their
	// own channel alone, and a team that has only such ones no other.
	workers   = 32
	ofChannel = 2
	ofTeam    = 8
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

// underWay are the deliveries that a server tries now.
type underWay struct {
	wg sync.WaitGroup

	mu       sync.Mutex
	all      int
	channels map[uuid.UUID]int
	teams    map[uuid.UUID]int
}

// count adds n to what is under way of a channel.
func (u *underWay) count(n int, c db.Channel) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.all += n
	u.channels[c.ID] += n
	u.teams[c.TeamID] += n
	if u.channels[c.ID] == 0 {
		delete(u.channels, c.ID)
	}
	if u.teams[c.TeamID] == 0 {
		delete(u.teams, c.TeamID)
	}
}

// busy returns the channels and teams of which no more may be begun, and
// whether nothing may.
func (u *underWay) busy() (channels, teams []uuid.UUID, full bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	channels, teams = []uuid.UUID{}, []uuid.UUID{}
	for of, n := range u.channels {
		if n >= ofChannel {
			channels = append(channels, of)
		}
	}
	for of, n := range u.teams {
		if n >= ofTeam {
			teams = append(teams, of)
		}
	}
	return channels, teams, u.all >= workers
}

// Run delivers until ctx is done.
func (s *Service) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { s.Store.Listen(ctx, s.Log, "wrenn_deliveries", func(string) { s.look() }) })
	wg.Go(func() { s.prune(ctx) })
	u := &underWay{channels: make(map[uuid.UUID]int), teams: make(map[uuid.UUID]int)}
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

// look has Run look for deliveries.
func (s *Service) look() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// begin begins all that is due and may be, and returns how long there is
// nothing to do unless something happens: the end of a delivery wakes Run.
func (s *Service) begin(ctx context.Context, u *underWay) time.Duration {
	for {
		channels, teams, full := u.busy()
		if full {
			return time.Minute
		}
		d, err := s.Store.ClaimDelivery(ctx, db.ClaimDeliveryParams{Secs: claimFor.Seconds(), BusyChannels: channels, BusyTeams: teams})
		if errors.Is(err, store.ErrNoRows) {
			secs, err := s.Store.NextDelivery(ctx, db.NextDeliveryParams{BusyChannels: channels, BusyTeams: teams})
			if err != nil {
				return minWait
			}
			return min(max(time.Duration(secs*float64(time.Second)), 100*time.Millisecond), time.Minute)
		}
		if err != nil {
			if ctx.Err() == nil {
				s.Log.Warn("look for deliveries", "error", err)
			}
			return minWait
		}
		c, err := s.Store.GetChannel(ctx, d.ChannelID)
		if errors.Is(err, store.ErrNoRows) {
			continue // It was deleted, and the delivery with it.
		}
		if err != nil {
			s.Log.Warn("look up channel", "error", err)
			return minWait // The delivery is due again in a while.
		}
		u.count(1, c)
		u.wg.Go(func() {
			defer s.look()
			defer u.count(-1, c)
			if err := s.try(ctx, c, d); err != nil && ctx.Err() == nil {
				s.Log.Warn("write what became of a delivery", "delivery", d.ID, "error", err)
			}
		})
	}
}

// try tries a delivery and writes down how that went.
func (s *Service) try(ctx context.Context, c db.Channel, d db.Delivery) error {
	if !c.Enabled {
		return s.Store.DeliveryTried(ctx, db.DeliveryTriedParams{ID: d.ID, State: "failed", Error: "the channel is disabled"})
	}
	if !Confirmed(c) { // Its address was changed since.
		return s.Store.DeliveryTried(ctx, db.DeliveryTriedParams{ID: d.ID, State: "failed", Error: errUnconfirmed.Error()})
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
	err := s.Store.DeliveryTried(ctx, tried)
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
