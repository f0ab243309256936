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
// teamFactor times as many, except for outgoing calls.
type Rates struct {
	Read      int `env:"WRENN_RATE_READ" envDefault:"6000" help:"calls a minute of one key or user that change nothing"`
	Change    int `env:"WRENN_RATE_CHANGE" envDefault:"6000" help:"calls a minute of one key or user that change something"`
	Expensive int `env:"WRENN_RATE_EXPENSIVE" envDefault:"3000" help:"calls a minute of one key or user that take memory or disk space of a host"`
	Outgoing  int `env:"WRENN_RATE_OUTGOING" envDefault:"20" help:"calls a minute of one key or user that send something to other services"`
}

const teamFactor = 5

// of returns the limits of a class for a principal and for a team.
func (r Rates) of(class auth.Rate) (one, team ratelimit.Limit) {
	n, factor := 0, teamFactor
	switch class {
	case auth.RateRead:
		n = r.Read
	case auth.RateChange:
		n = r.Change
	case auth.RateExpensive:
		n = r.Expensive
	case auth.RateOutgoing:
		n, factor = r.Outgoing, 1
	}
	one = ratelimit.Limit{Name: "calls:" + string(class), Burst: n, Per: time.Minute}
	team = ratelimit.Limit{Name: "team-calls:" + string(class), Burst: n * factor, Per: time.Minute}
	return one, team
}

// spend counts a call of a principal and, if ofTeam, of their team, or fails with
// rate_limited.
func (a *API) spend(ctx context.Context, class auth.Rate, who auth.Principal, ofTeam bool) error {
	one, team := a.Rates.of(class)
	tries := []ratelimit.Try{{Limit: one, Of: who.ID().String()}}
	if ofTeam && who.Team != uuid.Nil {
		// Count for the team second, so that calls which a member's own limit refuses do
		// not count for the team.
		tries = append(tries, ratelimit.Try{Limit: team, Of: who.Team.String()})
	}
	return a.Limiter.AllowAll(ctx, tries...)
}
