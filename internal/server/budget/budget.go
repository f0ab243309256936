// Package budget bounds the requests under way, and the memory that they take while
// they are answered, so that no caller can take the service's.
package budget

import (
	"io"
	"math"
	"sync"
	"time"

	"github.com/google/uuid"

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

// Crowd bounds the requests under way of each principal, of all teams of each owner,
// and of each address. It may be used by several goroutines.
type Crowd struct{ principals, payers, addresses *Budget }

// ofPayer is how many times a principal's bound all teams of one owner together, or one
// address, may have under way.
const ofPayer = 2

// NewCrowd returns a Crowd that lets each principal have that many requests under way.
func NewCrowd(each int) *Crowd {
	places := func(each int) *Budget {
		return &Budget{total: math.MaxInt64, each: int64(each), owners: make(map[string]int64)}
	}
	return &Crowd{places(each), places(ofPayer * each), places(ofPayer * each)}
}

// enter takes one of somebody's places until leave is called, once.
func enter(places *Budget, who string) (leave func(), err error) {
	if !places.take(who, 1) {
		return nil, refuse("%d requests are under way, as many as may be: try again when one has ended", places.each)
	}
	return func() { places.give(who, 1) }, nil
}

// Enter counts a request for a principal and for its payer until leave is called, once.
// If it is one too many, the error is fault.RateLimited.
func (c *Crowd) Enter(principal, payer uuid.UUID) (leave func(), err error) {
	one, err := enter(c.principals, principal.String())
	if err != nil || payer == uuid.Nil {
		return one, err
	}
	all, err := enter(c.payers, payer.String())
	if err != nil {
		one()
		return nil, err
	}
	return func() { all(); one() }, nil
}

// EnterFrom is Enter for a request's address.
func (c *Crowd) EnterFrom(address string) (leave func(), err error) {
	return enter(c.addresses, address)
}

// Budget is what requests may hold at the same time: bytes, or in a [Crowd] places.
// It may be used by several goroutines.
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
	if n == 0 {
		return nil
	}
	if !h.budget.take(h.owner, n) {
		return refuse("requests under way hold as much memory as they may: try again, or use the streaming operations")
	}
	h.bytes += n
	return nil
}

// GrowFor takes cost for each of n bytes, the first [Free] of them not counted, as a
// [Held.Reader] does.
func (h *Held) GrowFor(n int, cost int64) error { return h.Grow(cost * int64(max(0, n-Free))) }

// refuse returns a fault.RateLimited that says when to try again.
func refuse(format string, args ...any) error {
	err := fault.New(fault.RateLimited, format, args...)
	err.RetryAfter = retryAfter
	return err
}

// take takes n for an owner, all of it or nothing.
func (b *Budget) take(owner string, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used+n > b.total || b.owners[owner]+n > b.each {
		return false
	}
	b.used += n
	b.owners[owner] += n
	return true
}

// give takes n back from an owner.
func (b *Budget) give(owner string, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	if b.owners[owner] -= n; b.owners[owner] == 0 {
		delete(b.owners, owner)
	}
}

// Release gives everything back. It may be called twice.
func (h *Held) Release() {
	h.budget.give(h.owner, h.bytes)
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
