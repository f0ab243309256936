package sandboxes

import (
	"context"
	"sync"
	"time"

	"github.com/google/uuid"
)

const (
	// cacheLasts is how long a [Cache] believes what it was told without asking again.
	cacheLasts = 120 * time.Second
	// maxCached bounds a cache.
	maxCached = 8192
)

// Cache remembers something about sandboxes until they change. It is safe for concurrent
// use.
type Cache[T any] struct {
	mu    sync.Mutex
	known map[uuid.UUID]cached[T]
	// drops counts changes, so that what was looked up before one is not
	// remembered after it.
	drops uint64
	// deaf says that changes can be missed: nothing is believed.
	deaf bool
}

type cached[T any] struct {
	value T
	until time.Time
}

// NewCache returns a cache that hears of changes from s. Call it before the service
// is used.
func NewCache[T any](s *Service) *Cache[T] {
	c := &Cache[T]{known: make(map[uuid.UUID]cached[T])}
	s.OnChange(c.Drop)
	s.OnDeaf(c.deafen)
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

// deafen forgets everything, and remembers nothing while changes can be missed.
func (c *Cache[T]) deafen(is bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drops++
	c.deaf = is
	clear(c.known)
}

// Get returns what is known of a sandbox, or what lookup returns. That is remembered if
// lookup says keep.
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
	if c.drops != drops || c.deaf {
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
