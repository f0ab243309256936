package sandboxes

import (
	"context"
	"errors"
	"testing"

	"github.com/google/uuid"
)

func TestCache(t *testing.T) {
	s := new(Service)
	c, ctx, sandbox := NewCache[State](s), context.Background(), uuid.New()
	looked := 0
	state := Starting
	var during func()
	lookup := func(context.Context, uuid.UUID) (State, bool, error) {
		looked++
		found := state
		if during != nil {
			during()
		}
		return found, found == Running, nil
	}
	get := func(wantLooked int, wantState State) {
		t.Helper()
		got, err := c.Get(ctx, sandbox, lookup)
		if err != nil || got != wantState || looked != wantLooked {
			t.Errorf("got %s, %v after %d look-ups; want %s after %d", got, err, looked, wantState, wantLooked)
		}
	}
	get(1, Starting)
	state = Running
	get(2, Running) // Only running sandboxes are cached.
	get(2, Running)
	state = Stopping
	s.ChangedElsewhere(sandbox)
	get(3, Stopping)
	// A change during a lookup makes its result outdated.
	state = Running
	during = func() { s.ChangedElsewhere(sandbox) }
	get(4, Running)
	during, state = nil, Stopped
	get(5, Stopped)

	if _, err := c.Get(ctx, uuid.New(), func(context.Context, uuid.UUID) (State, bool, error) { return "", true, errors.New("x") }); err == nil {
		t.Error("the error of a lookup is lost")
	}
	state = Running
	for range maxCached + 100 {
		if _, err := c.Get(ctx, uuid.New(), lookup); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.known) > maxCached {
		t.Errorf("cache has %d sandboxes", len(c.known))
	}
	// While other servers' changes can be missed, nothing is believed.
	before := looked
	s.Disconnected(true)
	get(before+1, Running)
	get(before+2, Running)
	s.Disconnected(false)
	get(before+3, Running)
	get(before+3, Running)
	c.Clear()
	get(before+4, Running)
}
