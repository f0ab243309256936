package ratelimit

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/server/events/redistest"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// double is a fake Redis: it allows everything, or hangs.
type double struct {
	hangs atomic.Bool
	asked atomic.Int64
}

func (d *double) DialHook(next redis.DialHook) redis.DialHook { return next }

func (d *double) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (d *double) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		d.asked.Add(1)
		if d.hangs.Load() {
			<-ctx.Done()
			cmd.SetErr(ctx.Err())
			return ctx.Err()
		}
		if c, ok := cmd.(*redis.Cmd); ok {
			c.SetVal("0")
		}
		return nil
	}
}

// TestHang checks that while Redis hangs, one call a second waits for it, and all others
// are counted without it.
func TestHang(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
	t.Cleanup(func() { _ = client.Close() })
	d := &double{}
	client.AddHook(d)
	l := New(client, slog.New(slog.DiscardHandler))
	l.redis = client      // New's client has no hooks
	var late atomic.Int64 // how far the limiter's clock is ahead
	start := time.Now()
	l.now = func() time.Time { return start.Add(time.Duration(late.Load())) }
	limit := Limit{Name: "test", Burst: 50, Per: time.Hour}
	// many makes 20 concurrent calls, each counted for a user and the user's team, and
	// returns how often Redis was called.
	many := func() int64 {
		t.Helper()
		before := d.asked.Load()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				for _, of := range []string{"one", "team"} {
					if err := l.Allow(t.Context(), limit, of); err != nil {
						t.Error(err)
					}
				}
				l.Forget(t.Context(), limit, "somebody else")
			})
		}
		wg.Wait()
		return d.asked.Load() - before
	}
	if n := many(); n != 60 {
		t.Errorf("a working Redis was called %d times for 60 counts", n)
	}
	d.hangs.Store(true)
	if err := l.Allow(t.Context(), limit, "first"); err != nil || d.asked.Load() != 61 {
		t.Errorf("the first call without Redis: %v, %d", err, d.asked.Load())
	}
	if n := many(); n != 0 {
		t.Errorf("a hanging Redis was called %d times in the same second", n)
	}
	late.Add(int64(askAgain))
	if n := many(); n != 1 {
		t.Errorf("a hanging Redis was called %d times a second later, want once", n)
	}
	// Each has 40 counted calls; 10 are left.
	refused := 0
	for range 15 {
		if err := l.Allow(t.Context(), limit, "one"); fault.Is(err, fault.RateLimited) {
			refused++
		}
	}
	if refused != 5 {
		t.Errorf("without Redis %d of 55 calls were refused, want 5", refused)
	}
	// A cancelled call does not mean that Redis hangs.
	d.hangs.Store(false)
	late.Add(int64(askAgain))
	if err := l.Allow(t.Context(), limit, "one"); err != nil {
		t.Error(err)
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	d.hangs.Store(true)
	if err := l.Allow(gone, limit, "one"); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}
	d.hangs.Store(false)
	if n := many(); n != 60 {
		t.Errorf("Redis works again and was called %d times for 60 counts", n)
	}
}

// mute is a connection to a Redis that receives requests but does not reply while hangs
// is set.
type mute struct {
	net.Conn
	hangs *atomic.Bool
}

func (m mute) Write(p []byte) (int, error) {
	if m.hangs.Load() {
		return len(p), nil
	}
	return m.Conn.Write(p)
}

// TestHangingConnection checks that the limiter abandons a hanging connection after its
// own timeout, however long the server's client waits for other replies.
func TestHangingConnection(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	redistest.Start(t, socket)
	var hangs atomic.Bool
	client := redis.NewClient(&redis.Options{
		ReadTimeout: 10 * await.Hang,
		Dialer: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
			return mute{c, &hangs}, err
		},
	})
	t.Cleanup(func() { _ = client.Close() })
	l := New(client, slog.New(slog.DiscardHandler))
	limit := Limit{Name: "test", Burst: 1, Per: time.Hour}
	if err := l.Allow(t.Context(), limit, "one"); err != nil {
		t.Fatal(err)
	}
	if err := l.Allow(t.Context(), limit, "one"); !fault.Is(err, fault.RateLimited) {
		t.Errorf("a second time: %v", err)
	}
	hangs.Store(true)
	done := make(chan error, 1)
	go func() { done <- l.Allow(context.WithoutCancel(t.Context()), limit, "one") }()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("without Redis: %v", err)
		}
	case <-time.After(await.Hang):
		t.Error("a call waits for a Redis that hangs")
	}
}

// TestFullRedis checks that while Redis is out of memory, each server keeps its own
// counts, also if Redis refuses writes and evicts keys, and keeps them until Redis counts
// again.
func TestFullRedis(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	redistest.Start(t, socket)
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket})
	t.Cleanup(func() { _ = client.Close() })
	l := New(client, slog.New(slog.DiscardHandler))
	var late atomic.Int64
	start := time.Now()
	l.now = func() time.Time { return start.Add(time.Duration(late.Load())) }
	limit := Limit{Name: "test", Burst: 2, Per: time.Hour}
	allow := func(of string) bool {
		t.Helper()
		err := l.Allow(t.Context(), limit, of)
		if err != nil && !fault.Is(err, fault.RateLimited) {
			t.Errorf("%s: %v", of, err)
		}
		return err == nil
	}
	memory := func(most string) {
		t.Helper()
		for name, value := range map[string]string{"maxmemory-policy": "noeviction", "maxmemory": most} {
			if err := client.ConfigSet(t.Context(), name, value).Err(); err != nil {
				t.Fatal(err)
			}
		}
	}
	// allowed returns how many of three calls are allowed.
	allowed := func(of string) (n int) {
		t.Helper()
		for range 3 {
			if allow(of) {
				n++
			}
		}
		return n
	}
	if n := allowed("before"); n != 2 {
		t.Fatalf("%d calls of three are allowed, want 2", n)
	}
	memory("1")
	if err := client.Set(t.Context(), "k", "v", 0).Err(); err == nil {
		t.Fatal("this Redis is not full")
	}
	if n := allowed("one"); n != 2 {
		t.Errorf("a server by itself allows %d calls of three, want 2", n)
	}
	// The server tries Redis again: it still refuses, and evicts.
	late.Add(int64(askAgain))
	if allow("before") {
		t.Error("an earlier count is lost")
	}
	late.Add(int64(askAgain))
	l.Forget(t.Context(), limit, "somebody")
	late.Add(int64(askAgain))
	if n := allowed("one"); n != 0 {
		t.Errorf("while Redis is full, the server loses its counts: it allows %d more calls", n)
	}
	// Redis has room again.
	memory("0")
	late.Add(int64(askAgain))
	if !allow("one") || client.Exists(t.Context(), limit.key("one")).Val() != 1 {
		t.Error("Redis does not count again")
	}
}

// TestAllowAll checks that several tries are counted in order, in one round trip, until one
// is refused, with Redis and without it.
func TestAllowAll(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	redistest.Start(t, socket)
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket})
	t.Cleanup(func() { _ = client.Close() })
	one, team := Limit{Name: "one", Burst: 3, Per: time.Hour}, Limit{Name: "team", Burst: 4, Per: time.Hour}
	for _, where := range []string{"Redis", "this server"} {
		l := New(client, slog.New(slog.DiscardHandler))
		if where != "Redis" {
			l.say(errors.New("it is down"))
		}
		allowed := func(of string) (n int) {
			t.Helper()
			for range 5 {
				err := l.AllowAll(t.Context(), Try{one, of}, Try{team, "theirs"})
				if err != nil && !fault.Is(err, fault.RateLimited) {
					t.Fatal(err)
				}
				var f *fault.Error
				if errors.As(err, &f) && (f.RetryAfter <= 0 || f.RetryAfter > time.Hour) {
					t.Errorf("%s says to try again in %v", where, f.RetryAfter)
				}
				if err == nil {
					n++
				}
			}
			return n
		}
		if n := allowed("a"); n != 3 {
			t.Errorf("%s allows %d calls of the first member, want 3", where, n)
		}
		// Refusals of the first member did not count for the team.
		if n := allowed("b"); n != 1 {
			t.Errorf("%s allows %d calls of the second member, want the one that the team has left", where, n)
		}
		// The team's refusals counted for the second member, who has no calls left.
		if err := l.Allow(t.Context(), one, "b"); !fault.Is(err, fault.RateLimited) {
			t.Errorf("%s does not count the team's refusals: %v", where, err)
		}
		l.Forget(t.Context(), one, "b")
		if err := l.Allow(t.Context(), one, "b"); err != nil {
			t.Errorf("%s has not forgotten: %v", where, err)
		}
	}
}

// counting counts the calls of Redis.
type counting struct{ asked atomic.Int64 }

func (c *counting) DialHook(next redis.DialHook) redis.DialHook { return next }

func (c *counting) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (c *counting) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		c.asked.Add(1)
		return next(ctx, cmd)
	}
}

// TestLeases checks that few of a frequent caller's calls ask Redis, that all servers
// together never allow more calls than the limit, and that a rare caller's calls are
// counted one by one.
func TestLeases(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	redistest.Start(t, socket)
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket})
	t.Cleanup(func() { _ = client.Close() })
	var late atomic.Int64
	start := time.Now()
	hooked := &counting{}
	server := func() *Limiter {
		l := New(client, slog.New(slog.DiscardHandler))
		l.redis.AddHook(hooked)
		l.now = func() time.Time { return start.Add(time.Duration(late.Load())) }
		return l
	}
	one, other := server(), server()
	const burst = 20 * leaseShare
	own, team := Limit{Name: "own", Burst: burst, Per: 1000 * time.Hour}, Limit{Name: "team", Burst: 2 * burst, Per: 1000 * time.Hour}
	allow := func(l *Limiter, of string) bool {
		t.Helper()
		err := l.AllowAll(t.Context(), Try{own, of}, Try{team, "theirs"})
		if err != nil && !fault.Is(err, fault.RateLimited) {
			t.Fatal(err)
		}
		return err == nil
	}

	// Rare calls: each lease has expired before the next call.
	for range 20 {
		if !allow(one, "rare") {
			t.Fatal("a rare call is refused")
		}
		late.Add(int64(leaseLasts))
	}
	if n := hooked.asked.Load(); n < 20 {
		t.Errorf("20 rare calls asked Redis %d times", n)
	}
	paid := func(limit Limit, of string) float64 {
		t.Helper()
		at, err := client.Get(t.Context(), limit.key(of)).Float64()
		if err != nil {
			t.Fatal(err)
		}
		now, err := client.Time(t.Context()).Result()
		if err != nil {
			t.Fatal(err)
		}
		return (at - float64(now.UnixNano())/1e9 + 1483228800) / limit.Per.Seconds() * float64(limit.Burst)
	}
	if n := paid(own, "rare"); n < 19.5 || n > 20.5 {
		t.Errorf("20 rare calls were counted as %.1f", n)
	}

	// Many calls at once, to two servers.
	before := hooked.asked.Load()
	var allowed atomic.Int64
	var callers sync.WaitGroup
	for i := range 8 {
		callers.Go(func() {
			l := one
			if i%2 == 1 {
				l = other
			}
			for allow(l, "many") {
				allowed.Add(1)
			}
		})
	}
	callers.Wait()
	// Some calls are admitted again while the test runs: fewer than ten in its hang time.
	if n := allowed.Load(); n > burst+10 || n < burst-2*maxLease {
		t.Errorf("%d calls of %d are allowed", n, burst)
	}
	if n := hooked.asked.Load() - before; n > burst/2 {
		t.Errorf("%d calls asked Redis %d times", burst, n)
	}
	if allow(one, "many") || allow(other, "many") {
		t.Error("a call beyond the limit is allowed")
	}
	// What leases have counted counts for the team too.
	if n := paid(team, "theirs"); n < burst || n > burst+20.5 {
		t.Errorf("%.1f calls count for the team, want %d", n, burst+20)
	}
}
