// Package budget bounds how many requests a caller may have in flight and how much memory
// they take, so that no caller can exhaust the server.
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
	// Share is the divisor for one owner: nobody may hold more than a quarter of a
	// budget.
	Share = 4
	// Free is how many bytes a request may read or print without taking from the budget,
	// so that small requests work however much others hold.
	Free = 4 << 10
)

// retryAfter is the Retry-After of a refused request.
const retryAfter = time.Second

// InFlight bounds the requests in flight of each principal, of all teams of each owner, and
// of each address. It is safe for concurrent use.
type InFlight struct{ principals, payers, addresses *Budget }

// ofPayer is the limit of all teams of one owner, and of one address, as a multiple of a
// principal's.
const ofPayer = 2

// NewInFlight returns an InFlight that lets each principal have that many requests in flight.
func NewInFlight(each int) *InFlight {
	places := func(each int) *Budget {
		return &Budget{total: math.MaxInt64, each: int64(each), owners: make(map[string]int64)}
	}
	return &InFlight{places(each), places(ofPayer * each), places(ofPayer * each)}
}

// enter takes one place for who. The caller must call leave once.
func enter(places *Budget, who string) (leave func(), err error) {
	if !places.take(who, 1) {
		return nil, refuse("%d requests are in flight, which is the limit: try again when one has ended", places.each)
	}
	return func() { places.give(who, 1) }, nil
}

// Enter counts a request for a principal and its payer. The caller must call leave once.
// Enter fails with fault.RateLimited if a limit is reached.
func (c *InFlight) Enter(principal, payer uuid.UUID) (leave func(), err error) {
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

// EnterFrom is [InFlight.Enter] for a request's address.
func (c *InFlight) EnterFrom(address string) (leave func(), err error) {
	return enter(c.addresses, address)
}

// Budget is what requests may hold at the same time: bytes, or places in an [InFlight]. It is
// safe for concurrent use.
type Budget struct {
	total, each int64

	mu     sync.Mutex
	used   int64
	owners map[string]int64 // only those that hold something
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

// Reserve returns an empty reservation for a request of an owner. The caller must call
// [Reservation.Release].
func (b *Budget) Reserve(owner string) *Reservation {
	return &Reservation{budget: b, owner: owner, rows: Free}
}

// Reservation is the memory that one request has reserved. It is safe for concurrent use.
type Reservation struct {
	budget *Budget
	owner  string

	mu    sync.Mutex // locked before Budget.mu
	bytes int64
	rows  int // bytes that further rows may have before they take more
}

// Grow takes n more bytes; call it before you use them. If the budget lacks them, it
// takes none and fails with fault.RateLimited.
func (h *Reservation) Grow(n int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.grow(n)
}

// grow is Grow for a caller that holds h.mu.
func (h *Reservation) grow(n int64) error {
	if n == 0 {
		return nil
	}
	if !h.budget.take(h.owner, n) {
		return refuse("requests in flight hold all the memory they may: try again, or use the streaming operations")
	}
	h.bytes += n
	return nil
}

// GrowFor takes cost bytes for each of n bytes except the first [Free], as [Reservation.Reader]
// does.
func (h *Reservation) GrowFor(n int, cost int64) error { return h.Grow(cost * int64(max(0, n-Free))) }

// rowCost is the memory per byte of a row: as the database sends it, decoded, and twice in
// the response, whose buffer grows by doubling.
const rowCost = 4

// GrowForRow takes the memory of a row of n bytes that the database sends, in steps. The
// first [Free] bytes of the request's rows take nothing.
func (h *Reservation) GrowForRow(n int) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n > h.rows {
		more := (n - h.rows + step - 1) / step * step
		if err := h.grow(rowCost * int64(more)); err != nil {
			return err
		}
		h.rows += more
	}
	h.rows -= n
	return nil
}

// refuse returns a fault.RateLimited with a Retry-After.
func refuse(format string, args ...any) error {
	err := fault.New(fault.RateLimited, format, args...)
	err.RetryAfter = retryAfter
	return err
}

// take takes n for an owner, or nothing if that exceeds a limit.
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

// give returns n of an owner's.
func (b *Budget) give(owner string, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.used -= n
	if b.owners[owner] -= n; b.owners[owner] == 0 {
		delete(b.owners, owner)
	}
}

// Release returns everything. The reservation can be used again.
func (h *Reservation) Release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.budget.give(h.owner, h.bytes)
	h.bytes, h.rows = 0, Free
}

// Reader returns a reader of r that takes cost bytes of the budget for each byte except
// the first [Free], before it reads them. Its reads fail with the error of [Reservation.Grow].
func (h *Reservation) Reader(r io.Reader, cost int64) io.Reader {
	return &reader{held: h, from: r, cost: cost, left: Free}
}

// step is how many bytes a reader takes for at once.
const step = 32 << 10

type reader struct {
	held *Reservation
	from io.Reader
	cost int64
	left int // bytes taken for but not read yet
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
