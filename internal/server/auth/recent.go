package auth

import (
	"context"
	"crypto/sha256"
	"strings"
	"sync"
	"time"
)

const (
	// recentLasts is how long a server trusts a key without asking the database. It
	// hears of revocations at once; this bounds the delay if it hears nothing.
	recentLasts = time.Second
	// maxRecent bounds the keys that are remembered.
	maxRecent = 4096
)

// recent caches the holders of API keys that were shown a moment ago.
type recent struct {
	mu    sync.Mutex
	known map[[sha256.Size]byte]known
	// forgets counts calls of Forget, so that a lookup that began before one is not
	// remembered after it.
	forgets int
}

type known struct {
	Principal
	until time.Time
}

// CheckRecent returns what [Keys.Check] returns, but asks the database for a key
// at most once a second. It is for requests that come by the thousands.
func (k *Keys) CheckRecent(ctx context.Context, key string) (Principal, error) {
	if !strings.HasPrefix(key, keyPrefix) || len(key) > maxKey {
		return k.Check(ctx, key) // which says what is wrong with it
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

// Forget makes [Keys.CheckRecent] ask the database again for every key. Call it when
// somebody's rights were revoked.
func (k *Keys) Forget() {
	k.recent.mu.Lock()
	defer k.recent.mu.Unlock()
	k.recent.forgets++
	clear(k.recent.known)
}
