package rest

import (
	"context"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
)

// Rates limits the calls per minute of one key or user, for each class. The whole
// minute's calls may come at once. A team, with all its members and keys, may make
// teamFactor times as many, and all teams of one owner ownerFactor times as many as one
// of them. Of outgoing calls, all of them together may make no more than one user.
type Rates struct {
	Read      int `env:"WRENN_RATE_READ" envDefault:"6000" help:"calls a minute of one key or user that change nothing"`
	Change    int `env:"WRENN_RATE_CHANGE" envDefault:"6000" help:"calls a minute of one key or user that change something"`
	Expensive int `env:"WRENN_RATE_EXPENSIVE" envDefault:"3000" help:"calls a minute of one key or user that take memory or disk space of a host"`
	Outgoing  int `env:"WRENN_RATE_OUTGOING" envDefault:"20" help:"calls a minute of one key or user that send something to other services"`
}

const (
	teamFactor  = 5
	ownerFactor = 2
)

// of returns the limits of a class for a principal, for a team, and for all teams of one
// owner.
func (r Rates) of(class auth.Rate) (one, team, owner ratelimit.Limit) {
	n, ofTeam, ofOwner := 0, teamFactor, teamFactor*ownerFactor
	switch class {
	case auth.RateRead:
		n = r.Read
	case auth.RateChange:
		n = r.Change
	case auth.RateExpensive:
		n = r.Expensive
	case auth.RateOutgoing:
		n, ofTeam, ofOwner = r.Outgoing, 1, 1
	}
	limit := func(name string, factor int) ratelimit.Limit {
		return ratelimit.Limit{Name: name + ":" + string(class), Burst: n * factor, Per: time.Minute}
	}
	return limit("calls", 1), limit("team-calls", ofTeam), limit("owner-calls", ofOwner)
}

// spend counts a call of a principal and, if ofTeam, of their team and its owner, or fails
// with rate_limited.
func (a *API) spend(ctx context.Context, class auth.Rate, who auth.Principal, ofTeam bool) error {
	one, team, owner := a.Rates.of(class)
	tries := []ratelimit.Try{{Limit: one, Of: who.ID().String()}}
	if ofTeam && who.Team != uuid.Nil {
		// Count for the team second, so that calls which a member's own limit refuses do
		// not count for the team.
		tries = append(tries, ratelimit.Try{Limit: team, Of: who.Team.String()}, ratelimit.Try{Limit: owner, Of: who.Payer.String()})
	}
	return a.Limiter.AllowAll(ctx, tries...)
}
