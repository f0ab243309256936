package sandboxes

import (
	"context"
	"sync"
	"time"

	"github.com/google/uuid"
)

const (
	// cacheLasts is how long a [Cache] uses an entry without another lookup.
	cacheLasts = 120 * time.Second
	// maxCached is the most entries of a cache.
	maxCached = 8192
)

// Cache remembers something about sandboxes until they change. It is safe for concurrent
// use.
type Cache[T any] struct {
	mu    sync.Mutex
	known map[uuid.UUID]cached[T]
	// drops counts changes, so that a result from before a change is not stored after it.
	drops uint64
	// disconnected is set while changes can be missed. The cache is not used then.
	disconnected bool
}

type cached[T any] struct {
	value T
	until time.Time
}

// NewCache returns a cache whose entries s drops when their sandboxes change. Call it
// before the service is used.
func NewCache[T any](s *Service) *Cache[T] {
	c := &Cache[T]{known: make(map[uuid.UUID]cached[T])}
	s.OnChange(c.Drop)
	s.OnDisconnected(c.setDisconnected)
	return c
}

// Drop forgets a sandbox.
func (c *Cache[T]) Drop(sandbox uuid.UUID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drops++
	delete(c.known, sandbox)
}

// Clear forgets every sandbox.
func (c *Cache[T]) Clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drops++
	clear(c.known)
}

// setDisconnected empties the cache, and disables it while changes can be missed.
func (c *Cache[T]) setDisconnected(is bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drops++
	c.disconnected = is
	clear(c.known)
}

// Get returns a sandbox's entry, or else the result of lookup, which it stores if keep is
// set.
func (c *Cache[T]) Get(ctx context.Context, sandbox uuid.UUID, lookup func(context.Context, uuid.UUID) (v T, keep bool, err error)) (T, error) {
	c.mu.Lock()
	found, ok := c.known[sandbox]
	drops := c.drops
	c.mu.Unlock()
	now := time.Now()
	if ok && now.Before(found.until) {
		return found.value, nil
	}
	v, keep, err := lookup(ctx, sandbox)
	if err != nil || !keep {
		return v, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.drops != drops || c.disconnected {
		return v, nil
	}
	if len(c.known) >= maxCached {
		for other, old := range c.known {
			if len(c.known) < maxCached && now.Before(old.until) {
				break
			}
			delete(c.known, other)
		}
	}
	c.known[sandbox] = cached[T]{v, now.Add(cacheLasts)}
	return v, nil
}
