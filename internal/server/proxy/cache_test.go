package proxy

import (
	"context"
	"errors"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
)

func TestCache(t *testing.T) {
	c, ctx, sandbox := newCache(), context.Background(), uuid.New()
	looked := 0
	state := sandboxes.Starting
	var during func()
	lookup := func(context.Context, uuid.UUID) (target, error) {
		looked++
		found := target{state: state}
		if during != nil {
			during()
		}
		return found, nil
	}
	get := func(wantLooked int, wantState sandboxes.State) {
		t.Helper()
		got, err := c.get(ctx, sandbox, lookup)
		if err != nil || got.state != wantState || looked != wantLooked {
			t.Errorf("got %s, %v after %d look-ups; want %s after %d", got.state, err, looked, wantState, wantLooked)
		}
	}
	get(1, sandboxes.Starting)
	state = sandboxes.Running
	get(2, sandboxes.Running) // Only running sandboxes are cached.
	get(2, sandboxes.Running)
	state = sandboxes.Stopping
	c.drop(sandbox)
	get(3, sandboxes.Stopping)
	// A change during a lookup makes its result outdated.
	state = sandboxes.Running
	during = func() { c.drop(sandbox) }
	get(4, sandboxes.Running)
	during, state = nil, sandboxes.Stopped
	get(5, sandboxes.Stopped)

	if _, err := c.get(ctx, uuid.New(), func(context.Context, uuid.UUID) (target, error) { return target{}, errors.New("x") }); err == nil {
		t.Error("the error of a lookup is lost")
	}
	state = sandboxes.Running
	for range maxTargets + 100 {
		if _, err := c.get(ctx, uuid.New(), lookup); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.targets) > maxTargets {
		t.Errorf("cache has %d targets", len(c.targets))
	}
}
