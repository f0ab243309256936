package auth

import (
	"context"
	"crypto/sha256"
	"strings"
	"sync"
	"time"
)

const (
	// recentLasts is how long a server trusts a key without asking the database. The
	// database notifies it of revocations; this bounds the delay if a notification is
	// lost.
	recentLasts = time.Second
	// maxRecent bounds the cache, in keys.
	maxRecent = 4096
)

// recent caches the holders of keys that the database confirmed within recentLasts.
type recent struct {
	mu    sync.Mutex
	known map[[sha256.Size]byte]known
	// forgets counts calls of Forget, so that a lookup that began before a call is not
	// cached after it.
	forgets int
}

type known struct {
	Principal
	until time.Time
}

// CheckRecent is [Keys.Check], but asks the database for a key at most once a second. It
// is for very frequent requests, and for those that [AccessGuard.While] ends if the key is
// revoked.
func (k *Keys) CheckRecent(ctx context.Context, key string) (Principal, error) {
	if !strings.HasPrefix(key, keyPrefix) || len(key) > maxKey {
		return k.Check(ctx, key) // It returns the right error.
	}
	hash, now := sha256.Sum256([]byte(key)), time.Now()
	r := &k.recent
	r.mu.Lock()
	found, ok := r.known[hash]
	forgets := r.forgets
	r.mu.Unlock()
	if ok && now.Before(found.until) {
		return found.Principal, nil
	}
	p, expires, err := k.check(ctx, key)
	if err != nil {
		return p, err
	}
	until := now.Add(recentLasts)
	if expires != nil && expires.Before(until) {
		until = *expires
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.forgets != forgets {
		return p, nil
	}
	if r.known == nil || len(r.known) >= maxRecent {
		r.known = make(map[[sha256.Size]byte]known)
	}
	r.known[hash] = known{p, until}
	return p, nil
}

// Forget clears the cache of [Keys.CheckRecent]. Call it after a revocation.
func (k *Keys) Forget() {
	k.recent.mu.Lock()
	defer k.recent.mu.Unlock()
	k.recent.forgets++
	clear(k.recent.known)
}
