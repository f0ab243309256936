package agent

import (
	"context"
	"errors"
	"testing"

	"github.com/google/uuid"
)

// TestImportsAreShared has a team ask for more imports than there are places:
// another team's is made all the same.
func TestImportsAreShared(t *testing.T) {
	var i imports
	off := func(error) {}
	hog, other := uuid.New(), uuid.New()
	leave, err := i.enter(t.Context(), off, hog, uuid.New())
	if err != nil {
		t.Fatal(err)
	}
	type entered struct {
		leave func()
		err   error
	}
	second := make(chan entered, 1)
	go func() {
		leave, err := i.enter(t.Context(), off, hog, uuid.New())
		second <- entered{leave, err}
	}()
	away, err := i.enter(t.Context(), off, other, uuid.New())
	if err != nil {
		t.Fatal(err)
	}
	// All places are taken, and the team's share.
	gone, cancel := context.WithCancelCause(t.Context())
	why := errors.New("gone")
	cancel(why)
	for _, team := range []uuid.UUID{hog, uuid.New()} {
		if _, err := i.enter(gone, off, team, uuid.New()); !errors.Is(err, why) {
			t.Errorf("one more got in: %v", err)
		}
	}
	away()
	select {
	case <-second:
		t.Error("one team has all places")
	default:
	}
	if _, err := i.enter(gone, off, hog, uuid.New()); !errors.Is(err, why) {
		t.Errorf("the team has the last place: %v", err)
	}
	leave()
	e := <-second
	if e.err != nil {
		t.Fatal(e.err)
	}
	e.leave()
	if len(i.taken) != 0 || len(i.running) != 0 {
		t.Errorf("taken %v, running %v", i.taken, i.running)
	}
}
