// Package usage accounts for teams' use by day (UTC): the time that their sandboxes ran,
// times virtual CPUs and memory, and the number of starts.
//
// Database triggers record when a sandbox starts and stops running, in the transaction
// that changes its state. One server at a time sums up past days. Today, and a past day
// that a late report has changed, is summed up on request.
package usage

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

const (
	// rollEvery is how often Run looks for days to sum up.
	rollEvery = time.Minute
	// rollDelay is how long after its end a day is summed up. Transactions of that day have
	// ended by then.
	rollDelay = 10 * time.Minute
	// runsKept is how long runs are stored. Their days may change for 30 days.
	runsKept = 40 * 24 * time.Hour
	// batch is how many rows one query deletes.
	batch = 1000
	// MaxDays bounds the days of one request.
	MaxDays = 400
)

// Amount is an amount of use.
type Amount struct {
	VCPUSeconds float64
	// GiBSeconds is memory in GiB times seconds.
	GiBSeconds float64
	// Starts counts created sandboxes, including forks. Resuming is not a start.
	Starts int64
}

// Add returns the sum of both.
func (a Amount) Add(b Amount) Amount {
	return Amount{a.VCPUSeconds + b.VCPUSeconds, a.GiBSeconds + b.GiBSeconds, a.Starts + b.Starts}
}

// Day is the use on one day.
type Day struct {
	Day time.Time // midnight, UTC
	Amount
}

// Team is the use of one team.
type Team struct {
	ID   uuid.UUID
	Name string // empty: the team was deleted
	Amount
	StoredMiB int64 // now
}

// Service accounts for the use of all teams.
type Service struct {
	store *store.Store
	log   *slog.Logger
}

// New returns a service on a store. [Service.Run] sums up past days.
func New(s *store.Store, log *slog.Logger) *Service { return &Service{s, log} }

// Today returns the current day in UTC.
func Today() time.Time { return day(time.Now()) }

func day(t time.Time) time.Time { return t.UTC().Truncate(24 * time.Hour) }

func date(t time.Time) pgtype.Date { return pgtype.Date{Time: t, Valid: true} }

// span returns the days from one to another, inclusive: rolled are summed up, live are
// not.
func (s *Service) span(ctx context.Context, from, to time.Time) (rolled, live []pgtype.Date, err error) {
	from, to = day(from), day(to)
	if to.Before(from) {
		return nil, nil, fault.New(fault.InvalidArgument, "to: before from")
	}
	if to.Sub(from) >= MaxDays*24*time.Hour {
		return nil, nil, fault.New(fault.InvalidArgument, "to: at most %d days after from", MaxDays-1)
	}
	if rolled, err = s.store.ListRolledDays(ctx, db.ListRolledDaysParams{FromDay: date(from), ToDay: date(to)}); err != nil {
		return nil, nil, fmt.Errorf("list days: %w", err)
	}
	first, err := s.store.FirstRunDay(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("look up first day: %w", err)
	}
	if f := day(first); f.After(from) {
		from = f
	}
	if t := Today(); to.After(t) {
		to = t
	}
	for d := from; !d.After(to); d = d.AddDate(0, 0, 1) {
		if !slices.ContainsFunc(rolled, func(r pgtype.Date) bool { return r.Time.Equal(d) }) {
			live = append(live, date(d))
		}
	}
	return rolled, live, nil
}

// Of returns a team's use on each day of a range (inclusive) with any use, earliest
// first.
func (s *Service) Of(ctx context.Context, team uuid.UUID, from, to time.Time) ([]Day, error) {
	rolled, live, err := s.span(ctx, from, to)
	if err != nil {
		return nil, err
	}
	past, err := s.store.ListUsageDays(ctx, db.ListUsageDaysParams{TeamID: team, Days: rolled})
	if err != nil {
		return nil, fmt.Errorf("read usage: %w", err)
	}
	now, err := s.store.ListLiveUsage(ctx, db.ListLiveUsageParams{TeamID: team, Days: live})
	if err != nil {
		return nil, fmt.Errorf("sum up usage: %w", err)
	}
	var days []Day
	for _, r := range past {
		days = append(days, Day{r.Day.Time, amount(r.VcpuSeconds, r.MemoryMibSeconds, r.Starts)})
	}
	for _, r := range now {
		days = append(days, Day{r.Day.Time, amount(r.VcpuSeconds, r.MemoryMibSeconds, r.Starts)})
	}
	slices.SortFunc(days, func(a, b Day) int { return a.Day.Compare(b.Day) })
	return days, nil
}

// Stored returns how much a team stores now, in MiB.
func (s *Service) Stored(ctx context.Context, team uuid.UUID) (int64, error) {
	row, err := s.store.GetUsage(ctx, team)
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return 0, fmt.Errorf("read stored size: %w", err)
	}
	return row.StoredMiB, nil
}

// ByTeam returns each team's use in a range of days, sorted by team id: at most limit
// teams after the given id.
func (s *Service) ByTeam(ctx context.Context, from, to time.Time, after uuid.UUID, limit int) ([]Team, error) {
	rolled, live, err := s.span(ctx, from, to)
	if err != nil {
		return nil, err
	}
	rows, err := s.store.ListUsageByTeam(ctx, db.ListUsageByTeamParams{Rolled: rolled, Live: live, AfterTeam: after, MaxRows: int32(limit)})
	if err != nil {
		return nil, fmt.Errorf("sum up usage: %w", err)
	}
	teams := make([]Team, len(rows))
	for i, r := range rows {
		teams[i] = Team{r.TeamID, r.Name, amount(r.VcpuSeconds, r.MemoryMibSeconds, r.Starts), r.StoredMiB}
	}
	return teams, nil
}

func amount(vcpuSeconds, mibSeconds float64, starts int64) Amount {
	return Amount{VCPUSeconds: vcpuSeconds, GiBSeconds: mibSeconds / 1024, Starts: starts}
}

// Run sums up past days until ctx is done.
func (s *Service) Run(ctx context.Context) {
	tick := time.NewTicker(rollEvery)
	defer tick.Stop()
	failing := false
	for {
		mine, err := s.store.Lease(ctx, "usage", 3*rollEvery)
		if err == nil && mine {
			err = s.Roll(ctx)
		}
		if err != nil && !failing && ctx.Err() == nil {
			s.log.Warn("sum up usage", "error", err)
		}
		failing = err != nil
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Roll sums up past days that are not summed up yet, and deletes old runs that are. It is
// idempotent. A day that fails does not stop the others.
func (s *Service) Roll(ctx context.Context) error {
	first, err := s.store.FirstRunDay(ctx)
	if err != nil {
		return fmt.Errorf("look up first day: %w", err)
	}
	from, to := day(first), day(time.Now().Add(-rollDelay)).AddDate(0, 0, -1)
	if to.Before(from) {
		return nil
	}
	rolled, err := s.store.ListRolledDays(ctx, db.ListRolledDaysParams{FromDay: date(from), ToDay: date(to)})
	if err != nil {
		return fmt.Errorf("list days: %w", err)
	}
	var errs []error
	before := time.Now().Add(-runsKept)
	for d := from; !d.After(to); d = d.AddDate(0, 0, 1) {
		if slices.ContainsFunc(rolled, func(r pgtype.Date) bool { return r.Time.Equal(d) }) {
			continue
		}
		if err := s.roll(ctx, d); err != nil {
			errs = append(errs, fmt.Errorf("sum up %s: %w", d.Format(time.DateOnly), err))
			// Keep its runs until it is summed up.
			if d.Before(before) {
				before = d
			}
		}
	}
	for {
		n, err := s.store.ForgetRuns(ctx, db.ForgetRunsParams{Before: &before, MaxRows: batch})
		if err != nil {
			errs = append(errs, fmt.Errorf("delete old runs: %w", err))
		}
		if err != nil || n < batch {
			return errors.Join(errs...)
		}
	}
}

// roll sums up one day. Transactions that change a past day wait for it.
func (s *Service) roll(ctx context.Context, d time.Time) error {
	return s.store.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockUsage(ctx); err != nil {
			return err
		}
		if err := q.ForgetUsageDay(ctx, date(d)); err != nil {
			return err
		}
		if err := q.RollUsageDay(ctx, date(d)); err != nil {
			return err
		}
		return q.MarkUsageDay(ctx, date(d))
	})
}
