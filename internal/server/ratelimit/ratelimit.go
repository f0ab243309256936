// Package ratelimit limits how often something may be done, across all servers, with
// counts in Redis. While Redis is down, each server counts by itself, so that an outage
// neither allows guessing nor locks everybody out.
package ratelimit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/time/rate"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

const (
	// answerWithin bounds a call to Redis.
	answerWithin = 500 * time.Millisecond
	// askAgain is how often Redis is tried while it is down: by one call, while the
	// others count locally without waiting.
	askAgain = time.Second
	// maxLocal bounds the local counters. Beyond it, new keys are refused, because
	// dropping a counter would reset it.
	maxLocal = 65536
	// A server leases at most maxLease calls, and at most 1/leaseShare of a limit's, for
	// at most leaseLasts. It leases nothing if that is less than minLease, as for strangers'
	// calls. maxLeases bounds the callers with leases.
	minLease   = 4
	maxLease   = 16
	leaseShare = 256
	leaseLasts = 10 * time.Second
	maxLeases  = 8192
)

// Limit allows Burst calls at once, and Burst more in each Per.
type Limit struct {
	Name  string
	Burst int
	Per   time.Duration
}

// Try is a call to count for a caller, towards a limit.
type Try struct {
	Limit Limit
	Of    string
}

// allow counts tries by the generic cell rate algorithm, in order, until one is refused.
// A key has the time at which all its tries are paid off, in seconds since 2017, where
// doubles are precise enough. It returns how many seconds to wait, "0" if nothing was refused.
// Its keys and values are those of redis_rate, which earlier releases used.
//
// It counts ARGV[1] calls more for each try, as a lease, if none is refused then. The
// result is minus their number.
var allow = redis.NewScript(`
local time = redis.call("TIME")
local now = (time[1] - 1483228800) + time[2] / 1000000
local function count(i, calls)
  local burst, period = tonumber(ARGV[2 * i]), tonumber(ARGV[2 * i + 1])
  local paid = math.max(tonumber(redis.call("GET", KEYS[i]) or now), now) + calls * period / burst
  return paid, paid - period - now
end
local more = tonumber(ARGV[1])
for i = 1, more > 0 and #KEYS or 0 do
  local _, wait = count(i, 1 + more)
  if wait > 0 then
    more = 0
    break
  end
end
for i, key in ipairs(KEYS) do
  local paid, wait = count(i, 1 + more)
  if wait > 0 then
    return tostring(wait)
  end
  redis.call("SET", key, paid, "EX", math.ceil(paid - now))
end
return tostring(0 - more)
`)

// Limiter counts calls. It is safe for concurrent use.
type Limiter struct {
	redis *redis.Client
	log   *slog.Logger
	now   func() time.Time // replaced in tests

	mu     sync.Mutex // not held during calls that can block
	local  map[string]*rate.Limiter
	leases map[string]*lease // by the keys of all tries
	down   bool
	ask    time.Time // when to try Redis again, if it is down
}

// lease has calls that Redis has counted before they are made, so that not every one of a
// frequent caller's calls waits for Redis. What is left of it after leaseLasts was counted
// in vain.
type lease struct {
	size  int // calls counted together
	left  int // of them, not made yet
	until time.Time
	// asking is set while a call asks Redis for a new lease. Others count one call.
	asking bool
}

// New returns a limiter that counts in Redis.
func New(client *redis.Client, log *slog.Logger) *Limiter {
	// The client's own timeout applies even if the context's deadline is sooner.
	return &Limiter{redis: client.WithTimeout(answerWithin), log: log, now: time.Now, local: make(map[string]*rate.Limiter), leases: make(map[string]*lease)}
}

// key returns the counter's key. It hashes the address or account, so that Redis does not
// store it.
func (l Limit) key(of string) string {
	sum := sha256.Sum256([]byte(of))
	return "rate:wrenn:" + l.Name + ":" + hex.EncodeToString(sum[:16])
}

// Allow counts one call of a caller, or fails with rate_limited.
func (l *Limiter) Allow(ctx context.Context, limit Limit, of string) error {
	return l.AllowAll(ctx, Try{limit, of})
}

// AllowAll is [Limiter.Allow] for each try in order, in at most one round trip to Redis.
// It counts none of those after one that is refused.
func (l *Limiter) AllowAll(ctx context.Context, tries ...Try) error {
	keys, args := make([]string, len(tries)), make([]any, 1, 1+2*len(tries))
	for i, t := range tries {
		keys[i] = t.Limit.key(t.Of)
		args = append(args, t.Limit.Burst, t.Limit.Per.Seconds())
	}
	leased, more, granted := l.lease(tries, keys)
	if leased {
		return nil
	}
	var leases int
	defer func() { granted(leases) }()
	if !l.mayAsk() {
		return l.allowLocally(tries, keys)
	}
	ask, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	args[0] = more
	wait, counted, err := result(allow.Run(ask, l.redis, keys, args...))
	leases = counted
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		l.say(err)
		return l.allowLocally(tries, keys)
	}
	if wait > 0 {
		return tooOften(wait)
	}
	l.say(nil)
	return nil
}

// lease takes a call from the caller's lease. If there is none, it returns how many more
// calls to count together with this one; the caller must call granted once, with how
// many of them Redis has counted.
func (l *Limiter) lease(tries []Try, keys []string) (leased bool, more int, granted func(left int)) {
	most := maxLease
	for _, t := range tries {
		most = min(most, t.Limit.Burst/leaseShare)
	}
	if most < minLease {
		return false, 0, func(int) {}
	}
	name := strings.Join(keys, " ")
	l.mu.Lock()
	defer l.mu.Unlock()
	now, one := l.now(), l.leases[name]
	switch {
	case one == nil || !one.asking && !now.Before(one.until):
		// The caller is not frequent.
		if len(l.leases) >= maxLeases {
			clear(l.leases)
		}
		one = &lease{size: 1}
		l.leases[name] = one
	case one.left > 0 && now.Before(one.until):
		one.left--
		return true, 0, nil
	case one.asking:
		return false, 0, func(int) {}
	default:
		one.size = min(2*one.size, most)
	}
	one.asking = true
	return false, one.size - 1, func(left int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		one.asking, one.left, one.until = false, left, l.now().Add(leaseLasts)
	}
}

// result reads what the script allow returned: how long to wait, or how many calls it has
// leased.
func result(answer *redis.Cmd) (wait time.Duration, leased int, err error) {
	text, err := answer.Text()
	if err != nil {
		return 0, 0, err
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("read Redis's count: %w", err)
	}
	if n < 0 {
		return 0, int(-n), nil
	}
	return time.Duration(n * float64(time.Second)), 0, nil
}

// Forget resets a caller's counter.
func (l *Limiter) Forget(ctx context.Context, limit Limit, of string) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	key := limit.key(of)
	if l.mayAsk() {
		if err := l.redis.Del(ctx, key).Err(); err != nil {
			l.say(err)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.local, key)
}

func (l *Limiter) allowLocally(tries []Try, keys []string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, t := range tries {
		if err := l.countLocally(t.Limit, keys[i]); err != nil {
			return err
		}
	}
	return nil
}

// countLocally counts one try. l.mu is held.
func (l *Limiter) countLocally(limit Limit, key string) error {
	one, ok := l.local[key]
	if !ok {
		if len(l.local) >= maxLocal {
			return tooOften(limit.Per)
		}
		one = rate.NewLimiter(rate.Every(limit.Per/time.Duration(limit.Burst)), limit.Burst)
		l.local[key] = one
	}
	r := one.Reserve()
	if wait := r.Delay(); wait > 0 {
		r.Cancel()
		return tooOften(wait)
	}
	return nil
}

// mayAsk reports whether to call Redis: always while it is up, otherwise once per
// askAgain.
func (l *Limiter) mayAsk() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if l.down && now.Before(l.ask) {
		return false
	}
	l.ask = now.Add(askAgain)
	return true
}

// say records whether Redis works and logs changes. When it works again, say clears the
// local counters. Only a successful count proves that Redis works: a full Redis still
// serves reads and deletions.
func (l *Limiter) say(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil && !l.down:
		l.log.Warn("Redis is down: this server counts rate limits by itself", "error", err)
	case err == nil && l.down:
		l.log.Info("Redis is up again")
		clear(l.local)
	}
	if l.down = err != nil; l.down {
		l.ask = l.now().Add(askAgain)
	}
}

func tooOften(wait time.Duration) error {
	secs := math.Ceil(wait.Seconds())
	f := fault.New(fault.RateLimited, "too often: try again in %.0f s", secs)
	f.RetryAfter = time.Duration(secs) * time.Second
	return f
}

// Address returns the key of a client's address. For IPv6 it is the /64 network, because
// one client can use all of its addresses.
func Address(a netip.Addr) string {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.String()
		}
	}
	return a.String()
}
