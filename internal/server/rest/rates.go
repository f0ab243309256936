package rest

import (
	"cmp"
	"context"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
)

// Rates are how many calls of each class somebody may make in a minute, all at
// once too. Zero fields are defaults. A team, all of its members and keys
// together, may make teamFactor times as many; outgoing ones it may no more.
type Rates struct {
	// Read is for calls that change nothing (6000), Change for those that do
	// (6000), Expensive for those that take a host's memory or disk (3000), and
	// Outgoing for those that send something elsewhere (20).
	Read      int `env:"WRENN_RATE_READ"`
	Change    int `env:"WRENN_RATE_CHANGE"`
	Expensive int `env:"WRENN_RATE_EXPENSIVE"`
	Outgoing  int `env:"WRENN_RATE_OUTGOING"`
}

const teamFactor = 5

// of returns the limits of a class: of a principal and of a team.
func (r Rates) of(class auth.Rate) (one, team ratelimit.Limit) {
	n, factor := 0, teamFactor
	switch class {
	case auth.RateRead:
		n = cmp.Or(r.Read, 6000)
	case auth.RateChange:
		n = cmp.Or(r.Change, 6000)
	case auth.RateExpensive:
		n = cmp.Or(r.Expensive, 3000)
	case auth.RateOutgoing:
		n, factor = cmp.Or(r.Outgoing, 20), 1
	}
	one = ratelimit.Limit{Name: "calls:" + string(class), Burst: n, Per: time.Minute}
	team = ratelimit.Limit{Name: "team-calls:" + string(class), Burst: n * factor, Per: time.Minute}
	return one, team
}

// spend counts a call of somebody and, if ofTeam, of their team, or fails with
// rate_limited.
func (a *API) spend(ctx context.Context, class auth.Rate, who auth.Principal, ofTeam bool) error {
	one, team := a.Rates.of(class)
	// One after the other: what one of a team is refused does not count for the team.
	if err := a.Limiter.Allow(ctx, one, who.ID().String()); err != nil || !ofTeam || who.Team == uuid.Nil {
		return err
	}
	return a.Limiter.Allow(ctx, team, who.Team.String())
}
