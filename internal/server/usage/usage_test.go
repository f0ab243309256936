package usage

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// life is the model's state of a sandbox.
type life struct {
	id     uuid.UUID
	team   int
	vcpus  int
	mib    int
	state  string
	start  time.Time // of the current run
	miss   time.Time
	runs   [][2]time.Time
	begins []time.Time
}

// next lists the transitions from each state in the control plane. A transition that is listed
// twice is twice as likely.
var next = map[string][]string{
	"starting": {"running", "running", "error", "stopping"},
	"running":  {"pausing", "missing", "paused", "stopping", "expired", "lost"},
	"missing":  {"running", "running", "paused", "stopping", "expired", "lost"},
	"pausing":  {"paused", "paused", "running", "stopping", "lost"},
	"paused":   {"resuming", "running", "stopping", "lost"},
	"resuming": {"running", "paused", "stopping"},
	"stopping": {"stopped"},
}

type bench struct {
	*testing.T
	conn  *pgx.Conn
	usage *Service
	teams []uuid.UUID
}

func newBench(t *testing.T) *bench {
	ctx := context.Background()
	url := storetest.New(t)
	st, err := store.Open(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	b := &bench{T: t, conn: pgtest.Connect(t, url), usage: New(st, slog.New(slog.DiscardHandler))}
	for n := range 3 {
		b.teams = append(b.teams, uuid.New())
		b.exec("INSERT INTO teams (id, name) VALUES ($1, $2)", b.teams[n], fmt.Sprint("team", n))
		// Random lives ignore quotas, so the teams have an unlimited one.
		b.exec("INSERT INTO team_quotas (team_id) VALUES ($1)", b.teams[n])
	}
	return b
}

func (b *bench) exec(sql string, args ...any) {
	b.Helper()
	if _, err := b.conn.Exec(context.Background(), sql, args...); err != nil {
		b.Fatalf("%s: %v", sql, err)
	}
}

// tx runs f in a transaction, with that transaction's time in the database.
func (b *bench) tx(f func(tx pgx.Tx, now time.Time) error) {
	b.Helper()
	ctx := context.Background()
	err := pgx.BeginFunc(ctx, b.conn, func(tx pgx.Tx) error {
		var now time.Time
		if err := tx.QueryRow(ctx, "SELECT now()").Scan(&now); err != nil {
			return err
		}
		return f(tx, now)
	})
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bench) begin(r *rand.Rand) *life {
	l := &life{id: uuid.New(), team: r.IntN(len(b.teams)), vcpus: 1 + r.IntN(4), mib: 128 << r.IntN(4), state: "starting"}
	b.exec(`INSERT INTO sandboxes (id, team_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at)
		VALUES ($1, $2, $3, 'minimal', 'starting', $4, $5, 0, 0, '{}', now())`, l.id, b.teams[l.team], uuid.Nil, l.vcpus, l.mib)
	return l
}

func between(r *rand.Rand, a, z time.Time) time.Time {
	if !z.After(a) {
		return a
	}
	return a.Add(time.Duration(r.Int64N(int64(z.Sub(a))))).Truncate(time.Microsecond)
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (b *bench) step(r *rand.Rand, l *life) {
	ctx := context.Background()
	to := next[l.state][r.IntN(len(next[l.state]))]
	b.tx(func(tx pgx.Tx, now time.Time) error {
		// Hosts' times may be slightly late, early or wrong.
		said := between(r, now.Add(-3*time.Millisecond), now.Add(time.Millisecond))
		ran := l.state == "running" || l.state == "missing" || l.state == "pausing"
		ends := now
		if !l.miss.IsZero() {
			ends = l.miss
		}
		end := func(at time.Time) {
			if at.After(now) {
				at = now
			}
			l.runs = append(l.runs, [2]time.Time{l.start, latest(l.start, at)})
			l.miss = time.Time{}
		}
		var err error
		switch to {
		case "running":
			first := l.state == "starting"
			_, err = tx.Exec(ctx, "UPDATE sandboxes SET state = 'running', started_at = COALESCE(started_at, $2), paused_at = NULL WHERE id = $1", l.id, said)
			if !ran {
				l.start = now
				if first {
					if said.Before(now) {
						l.start = said
					}
					l.begins = append(l.begins, l.start)
				}
			}
			l.miss, l.state = time.Time{}, "running"
		case "missing":
			_, err = tx.Exec(ctx, "UPDATE sandboxes SET state = 'missing' WHERE id = $1", l.id)
			l.miss, l.state = now, to
		case "paused":
			_, err = tx.Exec(ctx, "UPDATE sandboxes SET state = 'paused', paused_at = $2 WHERE id = $1", l.id, said)
			if ran {
				end(said)
			}
			l.state = to
		case "expired":
			_, err = tx.Exec(ctx, "UPDATE sandboxes SET state = 'stopped', end_reason = 'expired', ended_at = $2 WHERE id = $1", l.id, said)
			end(said)
			l.state = "stopped"
		case "lost":
			_, err = tx.Exec(ctx, "UPDATE sandboxes SET state = 'stopped', end_reason = 'lost', ended_at = now() WHERE id = $1", l.id)
			if ran {
				end(ends)
			}
			l.state = "stopped"
		default:
			_, err = tx.Exec(ctx, "UPDATE sandboxes SET state = $2 WHERE id = $1", l.id, to)
			if ran && to == "stopping" {
				end(ends)
			}
			l.state = to
		}
		return err
	})
}

// TestLives compares the usage of sandboxes with random lives with a simple model. The lives
// last days, and the test compares before and after it aggregates all or some of the days.
func TestLives(t *testing.T) {
	b := newBench(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	var lives []*life
	for range 600 {
		if len(lives) < 5 || r.IntN(6) == 0 {
			lives = append(lives, b.begin(r))
			continue
		}
		l := lives[r.IntN(len(lives))]
		if next[l.state] != nil {
			b.step(r, l)
		}
	}
	// Stretch milliseconds to hours, so that the lives end an hour ago.
	var base time.Time
	if err := b.conn.QueryRow(context.Background(), "SELECT min(started_at) FROM sandbox_runs").Scan(&base); err != nil {
		t.Fatal(err)
	}
	scale := 20 * 24 * time.Hour / time.Since(base)
	length := time.Since(base) * scale
	origin := time.Now().Add(-length - time.Hour).Truncate(time.Microsecond)
	move := func(at time.Time) time.Time { return origin.Add(at.Sub(base) * scale) }
	b.exec(`UPDATE sandbox_runs SET started_at = $1::timestamptz + (started_at - $2::timestamptz) * $3::int, ended_at = $1::timestamptz + (ended_at - $2::timestamptz) * $3::int, missing_at = $1::timestamptz + (missing_at - $2::timestamptz) * $3::int`, origin, base, int(scale))

	check := func(what string) {
		t.Helper()
		for n, team := range b.teams {
			asked := time.Now()
			days, err := b.usage.Of(context.Background(), team, origin, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			took := time.Since(asked).Seconds()
			got := make(map[time.Time]Amount)
			for _, d := range days {
				got[d.Day] = d.Amount
			}
			var open float64 // running vCPUs: a later query yields more
			for d := day(origin); !d.After(Today()); d = d.AddDate(0, 0, 1) {
				var want Amount
				for _, l := range lives {
					if l.team != n {
						continue
					}
					runs := l.runs
					if l.state == "running" || l.state == "missing" || l.state == "pausing" {
						end := base.Add(time.Since(origin) / scale).Add(10 * time.Millisecond)
						if !l.miss.IsZero() {
							end = l.miss
						} else {
							open += float64(l.vcpus)
						}
						runs = append(runs[:len(runs):len(runs)], [2]time.Time{l.start, end})
					}
					for _, run := range runs {
						from, to := latest(move(run[0]), d), move(run[1])
						if to.After(asked) {
							to = asked
						}
						if z := d.AddDate(0, 0, 1); to.After(z) {
							to = z
						}
						if s := to.Sub(from).Seconds(); s > 0 {
							want.VCPUSeconds += s * float64(l.vcpus)
							want.GiBSeconds += s * float64(l.mib) / 1024
						}
					}
					for _, at := range l.begins {
						if day(move(at)).Equal(d) {
							want.Starts++
						}
					}
				}
				slack := 1e-3
				if d.Equal(Today()) {
					slack += (took + 0.1) * 4 * (open + 1)
				}
				if g := got[d]; math.Abs(g.VCPUSeconds-want.VCPUSeconds) > slack || math.Abs(g.GiBSeconds-want.GiBSeconds) > slack || g.Starts != want.Starts {
					t.Errorf("%s: team %d on %s: %+v, want %+v", what, n, d.Format(time.DateOnly), g, want)
				}
			}
		}
	}
	check("before aggregation")
	if err := b.usage.Roll(context.Background()); err != nil {
		t.Fatal(err)
	}
	check("all days aggregated")
	if err := b.usage.Roll(context.Background()); err != nil {
		t.Fatal(err)
	}
	check("all days aggregated again")
	b.exec("DELETE FROM usage_rollups WHERE extract(day FROM day)::int % 2 = 0")
	check("some aggregates deleted")
	if err := b.usage.Roll(context.Background()); err != nil {
		t.Fatal(err)
	}
	check("deleted aggregates restored")

	// The total equals the sum of the teams.
	all, err := b.usage.ByTeam(context.Background(), origin, time.Now(), uuid.Nil, 10)
	if err != nil {
		t.Fatal(err)
	}
	for _, team := range all {
		days, err := b.usage.Of(context.Background(), team.ID, origin, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		var sum Amount
		for _, d := range days {
			sum = sum.Add(d.Amount)
		}
		if math.Abs(sum.VCPUSeconds-team.VCPUSeconds) > 100 || sum.Starts != team.Starts || team.Name == "" {
			t.Errorf("team %s: %+v, want %+v", team.Name, team, sum)
		}
	}
}

// TestLateReport checks that an aggregated day is aggregated again when its host reports
// later that a sandbox ended on it.
func TestLateReport(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	r := rand.New(rand.NewPCG(1, 2))
	l := b.begin(r)
	start := Today().AddDate(0, 0, -5).Add(6 * time.Hour)
	b.exec("UPDATE sandboxes SET state = 'running', started_at = $2 WHERE id = $1", l.id, start)
	if err := b.usage.Roll(ctx); err != nil {
		t.Fatal(err)
	}
	sum := func() (hours float64, starts int64) {
		days, err := b.usage.Of(ctx, b.teams[l.team], start, Today().AddDate(0, 0, -1))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range days {
			hours += d.VCPUSeconds / 3600 / float64(l.vcpus)
			starts += d.Starts
		}
		return hours, starts
	}
	if h, n := sum(); math.Abs(h-(18+4*24)) > 1e-6 || n != 1 {
		t.Fatalf("%v hours, %d starts", h, n)
	}
	end := Today().AddDate(0, 0, -4).Add(time.Hour)
	b.exec("UPDATE sandboxes SET state = 'stopped', end_reason = 'expired', ended_at = $2 WHERE id = $1", l.id, end)
	if h, _ := sum(); math.Abs(h-19) > 1e-6 {
		t.Errorf("%v hours before it is aggregated again", h)
	}
	if err := b.usage.Roll(ctx); err != nil {
		t.Fatal(err)
	}
	if h, n := sum(); math.Abs(h-19) > 1e-6 || n != 1 {
		t.Errorf("%v hours, %d starts after it is aggregated again", h, n)
	}
	if _, err := b.usage.Of(ctx, b.teams[0], start, start.AddDate(0, 0, -1)); err == nil {
		t.Error("a span that ends before it begins is accepted")
	}
}

// TestLease checks that only one of two servers aggregates.
func TestLease(t *testing.T) {
	ctx := context.Background()
	url := storetest.New(t)
	var servers [2]*store.Store
	for i := range servers {
		s, err := store.Open(ctx, url)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		servers[i] = s
	}
	for i, want := range []bool{true, false, true} {
		got, err := servers[i%2].Lease(ctx, "x", time.Minute)
		if err != nil || got != want {
			t.Errorf("%d: %v, %v", i, got, err)
		}
	}
	if _, err := servers[0].Lease(ctx, "x", 0); err != nil {
		t.Fatal(err)
	}
	if got, err := servers[1].Lease(ctx, "x", time.Minute); err != nil || !got {
		t.Errorf("another server cannot take an expired lease: %v, %v", got, err)
	}
}

// TestDayFails makes the aggregation of one day fail. The service must aggregate the other
// days, keep that day's runs until it succeeds, and remove older runs.
func TestDayFails(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	l := b.begin(rand.New(rand.NewPCG(1, 2)))
	bad := Today().AddDate(0, 0, -50)
	b.exec("DELETE FROM sandbox_runs")
	for _, d := range []time.Time{bad.AddDate(0, 0, -2), bad, Today().AddDate(0, 0, -5)} {
		b.exec("INSERT INTO sandbox_runs (sandbox_id, team_id, vcpus, memory_mib, first, started_at, ended_at) VALUES ($1, $2, 1, 1024, true, $3, $4)", l.id, b.teams[0], d.Add(time.Hour), d.Add(2*time.Hour))
	}
	b.exec(`CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$`)
	b.exec(fmt.Sprintf("CREATE TRIGGER refuse BEFORE INSERT ON usage_rollups FOR EACH ROW WHEN (NEW.day = '%s') EXECUTE FUNCTION refuse()", bad.Format(time.DateOnly)))
	hours := func() (sum float64) {
		days, err := b.usage.Of(ctx, b.teams[0], bad.AddDate(0, 0, -3), Today())
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range days {
			sum += d.VCPUSeconds / 3600
		}
		return sum
	}
	runs := func() (n int) {
		if err := b.conn.QueryRow(ctx, "SELECT count(*) FROM sandbox_runs").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if err := b.usage.Roll(ctx); err == nil {
		t.Error("the failure is not reported")
	}
	var rolled int
	if err := b.conn.QueryRow(ctx, "SELECT count(*) FROM usage_rollups WHERE day >= $1", Today().AddDate(0, 0, -49)).Scan(&rolled); err != nil || rolled < 40 {
		t.Errorf("%d later days were aggregated, %v", rolled, err)
	}
	if n := runs(); n != 2 || hours() != 3 {
		t.Errorf("%d runs are left, %v hours", n, hours())
	}
	b.exec("DROP TRIGGER refuse ON usage_rollups")
	if err := b.usage.Roll(ctx); err != nil {
		t.Fatal(err)
	}
	if n := runs(); n != 1 || hours() != 3 {
		t.Errorf("then %d runs are left, %v hours", n, hours())
	}
}
