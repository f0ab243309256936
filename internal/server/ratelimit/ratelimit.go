// Package ratelimit bounds how often something may be tried, over all servers
// together: the counts are in Redis. While Redis does not answer each server
// counts by itself, so that an outage neither opens the door to guessing nor
// locks everybody out.
package ratelimit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"math"
	"net/netip"
	"sync"
	"time"

	"github.com/go-redis/redis_rate/v10"
	"github.com/redis/go-redis/v9"
	"golang.org/x/time/rate"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

const (
	// answerWithin is how long Redis may take.
	answerWithin = 500 * time.Millisecond
	// askAgain is how often Redis is asked while it does not answer: one call waits
	// for it, and all others are counted here at once.
	askAgain = time.Second
	// maxLocal bounds what a server counts by itself. Beyond it nothing new is
	// admitted: what is forgotten could be tried again.
	maxLocal = 65536
)

// Limit is how often: Burst times at once, and Burst times again in each Per.
type Limit struct {
	Name  string
	Burst int
	Per   time.Duration
}

// Limiter counts.
type Limiter struct {
	redis *redis_rate.Limiter
	log   *slog.Logger
	now   func() time.Time // a test's own

	mu    sync.Mutex // held for no call that can block
	local map[string]*rate.Limiter
	down  bool
	ask   time.Time // when Redis is asked again; if it is down
}

// New returns a limiter that counts in Redis.
func New(client *redis.Client, log *slog.Logger) *Limiter {
	// A client's own timeout holds even if the context's deadline is sooner.
	return &Limiter{redis: redis_rate.NewLimiter(client.WithTimeout(answerWithin)), log: log, now: time.Now, local: make(map[string]*rate.Limiter)}
}

// key names what is counted. What it is of, an address or an account, is not
// readable in it.
func (l Limit) key(of string) string {
	sum := sha256.Sum256([]byte(of))
	return "wrenn:" + l.Name + ":" + hex.EncodeToString(sum[:16])
}

// Allow counts one try of somebody, or fails with rate_limited.
func (l *Limiter) Allow(ctx context.Context, limit Limit, of string) error {
	key := limit.key(of)
	if !l.mayAsk() {
		return l.allowLocally(limit, key)
	}
	ask, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	answer, err := l.redis.Allow(ask, key, redis_rate.Limit{Rate: limit.Burst, Burst: limit.Burst, Period: limit.Per})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		l.say(err)
		return l.allowLocally(limit, key)
	}
	if answer.Allowed == 0 {
		return tooOften(answer.RetryAfter)
	}
	l.say(nil)
	return nil
}

// Forget lets somebody begin anew.
func (l *Limiter) Forget(ctx context.Context, limit Limit, of string) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	key := limit.key(of)
	if l.mayAsk() {
		if err := l.redis.Reset(ctx, key); err != nil {
			l.say(err)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.local, key)
}

func (l *Limiter) allowLocally(limit Limit, key string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
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

// mayAsk says whether to ask Redis: always if it answers, else once in a while.
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

// say logs when Redis goes and when it comes back; then what was counted
// without it is forgotten. It is back once it has counted something: a full Redis
// answers, removes and refuses, but does not count.
func (l *Limiter) say(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil && !l.down:
		l.log.Warn("Redis does not answer; each server limits rates by itself", "error", err)
	case err == nil && l.down:
		l.log.Info("Redis answers again")
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

// Address is what is counted of a client's address: with IPv6 its network, of
// which anybody has 2^64 addresses.
func Address(a netip.Addr) string {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.String()
		}
	}
	return a.String()
}
