// Package budget bounds the memory that requests take while they are answered,
// so that no caller can take the service's.
package budget

import (
	"io"
	"sync"
	"time"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

const (
	// Share is the part of the whole that one owner may hold: a quarter of it.
	Share = 4
	// Free is how much a request may take beside the budget, in bytes read or
	// printed: what is short goes on however much others hold.
	Free = 4 << 10
)

// retryAfter is when a request that was refused may be tried again.
const retryAfter = time.Second

// Budget is what requests may hold at the same time, in bytes. It may be used
// by several goroutines.
type Budget struct {
	total, each int64

	mu     sync.Mutex
	used   int64
	owners map[string]int64 // those who hold something
}

// New returns a budget of total bytes, of which one owner gets a [Share].
func New(total int64) *Budget {
	return &Budget{total: total, each: total / Share, owners: make(map[string]int64)}
}

// Used returns how many bytes are held.
func (b *Budget) Used() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// Hold begins to hold for an owner: nothing yet. Whoever calls it calls
// [Held.Release].
func (b *Budget) Hold(owner string) *Held { return &Held{budget: b, owner: owner} }

// Held is what one request holds. One goroutine uses it at a time.
type Held struct {
	budget *Budget
	owner  string
	bytes  int64
}

// Grow takes n bytes more, before they are used. Where there are not so many
// it takes none, and the error is fault.RateLimited.
func (h *Held) Grow(n int64) error {
	b := h.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used+n > b.total || b.owners[h.owner]+n > b.each {
		err := fault.New(fault.RateLimited, "requests under way hold as much memory as they may: try again, or use the streaming operations")
		err.RetryAfter = retryAfter
		return err
	}
	b.used += n
	b.owners[h.owner] += n
	h.bytes += n
	return nil
}

// Release gives everything back. It may be called twice.
func (h *Held) Release() {
	b := h.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= h.bytes
	if b.owners[h.owner] -= h.bytes; b.owners[h.owner] == 0 {
		delete(b.owners, h.owner)
	}
	h.bytes = 0
}

// Reader returns a reader of r that takes cost bytes for each byte before it
// reads it, the first [Free] of them not counted. It ends with [Held.Grow]'s error.
func (h *Held) Reader(r io.Reader, cost int64) io.Reader {
	return &reader{held: h, from: r, cost: cost, left: Free}
}

// step is how much a reader takes at once.
const step = 32 << 10

type reader struct {
	held *Held
	from io.Reader
	cost int64
	left int // what has been taken for and not been read
}

func (r *reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.left == 0 {
		if err := r.held.Grow(step * r.cost); err != nil {
			return 0, err
		}
		r.left = step
	}
	n, err := r.from.Read(p[:min(len(p), r.left)])
	r.left -= n
	return n, err
}
