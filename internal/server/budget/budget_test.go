package budget

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// TestBounds checks the share of one owner, the total of all owners, and that released
// memory can be used again.
func TestBounds(t *testing.T) {
	b := New(100)
	a := b.Reserve("a")
	if err := a.Grow(25); err != nil {
		t.Fatal(err)
	}
	if err := a.Grow(1); !fault.Is(err, fault.RateLimited) {
		t.Errorf("beyond an owner's share: %v", err)
	}
	if err := b.Reserve("a").Grow(1); !fault.Is(err, fault.RateLimited) {
		t.Errorf("beyond an owner's share, in another request: %v", err)
	}
	d := b.Reserve("d")
	for _, other := range []string{"b", "c", "e"} {
		if err := b.Reserve(other).Grow(22); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Grow(11); !fault.Is(err, fault.RateLimited) {
		t.Errorf("beyond the whole: %v", err)
	}
	a.Release()
	a.Release()
	if err := d.Grow(11); err != nil || b.Used() != 77 {
		t.Errorf("after a release: %v, %d are used", err, b.Used())
	}
}

// TestManyOwners checks that concurrent requests keep within the bounds and release
// everything.
func TestManyOwners(t *testing.T) {
	const total = 1000
	b := New(total)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 1))
			for range 2000 {
				h := b.Reserve(fmt.Sprint(r.IntN(3)))
				for range r.IntN(4) {
					if err := h.Grow(r.Int64N(300)); err != nil && !fault.Is(err, fault.RateLimited) {
						t.Error(err)
					}
				}
				b.mu.Lock()
				if b.used > total || b.owners[h.owner] > b.each {
					t.Errorf("%d are used, %d by one", b.used, b.owners[h.owner])
				}
				b.mu.Unlock()
				h.Release()
			}
		})
	}
	wg.Wait()
	if b.Used() != 0 || len(b.owners) != 0 {
		t.Errorf("%d bytes are still used, by %v", b.Used(), b.owners)
	}
}

// TestReader checks that a reader reserves what it reads, and stops at the bound.
func TestReader(t *testing.T) {
	b := New(4 * Share * step)
	h := b.Reserve("a")
	if got, err := io.ReadAll(h.Reader(strings.NewReader(strings.Repeat("x", Free-1)), 2)); err != nil || len(got) != Free-1 || h.bytes != 0 {
		t.Errorf("%d bytes of a short body, %d held, %v", len(got), h.bytes, err)
	}
	got, err := io.ReadAll(h.Reader(strings.NewReader(strings.Repeat("x", step+Free+1)), 2))
	if err != nil || len(got) != step+Free+1 || h.bytes < 2*int64(len(got)-Free) {
		t.Errorf("%d bytes, %d held, %v", len(got), h.bytes, err)
	}
	h.Release()
	got, err = io.ReadAll(h.Reader(bytes.NewReader(make([]byte, 10*step)), 1))
	if !fault.Is(err, fault.RateLimited) || len(got) != 4*step+Free {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
