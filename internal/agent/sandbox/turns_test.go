package sandbox

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

func TestTurns(t *testing.T) {
	turns := newTurns(3, 2, time.Nanosecond)
	ctx := await.Context(t)
	enter := func(key string) (leave func()) {
		t.Helper()
		leave, err := turns.enter(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		return leave
	}
	ended, end := context.WithCancel(ctx)
	end()
	// full reports whether there is no place for a key now.
	full := func(key string) bool {
		t.Helper()
		leave, err := turns.enter(ended, key)
		if err == nil {
			leave()
		} else if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		return err != nil
	}
	a1, a2 := enter("a"), enter("a")
	b := enter("b")
	entered := make(chan func(), 1)
	go func() {
		leave, err := turns.enter(ctx, "a")
		if err != nil {
			t.Error(err)
		}
		entered <- leave
	}()
	// Repeat this, because a select with two ready cases chooses at random.
	for range 50 {
		if !full("a") || !full("c") {
			t.Fatal("more turns than the limits allow")
		}
	}
	a1()
	a3 := await.Recv(t, "a turn after another has ended", entered)
	b()
	a2()
	a3()
	if len(turns.keys) != 0 || len(turns.all) != 0 {
		t.Errorf("%d keys and %d turns are left", len(turns.keys), len(turns.all))
	}
}

// TestTurnsBegin checks that a turn begins when the previous one of its key has ended, or
// after the gap.
func TestTurnsBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const gap = time.Second
		turns := newTurns(10, 10, gap)
		begun := time.Now()
		enter := func(after time.Duration) (leave func()) {
			t.Helper()
			leave, err := turns.enter(t.Context(), "key")
			if err != nil {
				t.Fatal(err)
			}
			if since := time.Since(begun); since != after {
				t.Errorf("the turn begins after %v, not %v", since, after)
			}
			return leave
		}
		enter(0)()
		first := enter(0)
		second := enter(gap)
		first()
		second()
		third := enter(gap)
		third()
		time.Sleep(2 * gap)
		if len(turns.keys) != 0 || len(turns.all) != 0 {
			t.Errorf("%d keys and %d turns are left", len(turns.keys), len(turns.all))
		}
	})
}
