package auth

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/server/each"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

const (
	// lookAgain is how long something may go on for somebody of whom nothing was
	// heard: keys expire without a word.
	lookAgain = time.Minute
	// lookWithin bounds one look, looks is how many there are at once. One that
	// fails is repeated after lookSoon.
	lookWithin = 5 * time.Second
	looks      = 8
	lookSoon   = time.Second
)

// Watch ends what goes on for as long as a client likes, a terminal for one,
// when who asked for it may no longer. Servers hear from the database that
// somebody may do less than before, whichever of them was asked for it.
type Watch struct {
	store *store.Store
	log   *slog.Logger
	// wake asks for a look at what is in doubt.
	wake chan struct{}

	mu sync.Mutex
	// heard counts what was heard.
	heard int
	// told are called with what was heard.
	told []func(whose string)
	held map[*held]struct{}
}

// held is something that goes on.
type held struct {
	about []uuid.UUID // whose change is a reason to ask again
	may   func(context.Context) error
	end   context.CancelCauseFunc
	doubt bool // It is to be looked at again.
}

// NewWatch returns a watch that hears from a store. Run must run for anything
// to be ended.
func NewWatch(s *store.Store, log *slog.Logger) *Watch {
	return &Watch{store: s, log: log, wake: make(chan struct{}, 1), held: make(map[*held]struct{})}
}

// Mark returns what [Watch.While] must be given that was taken before it was
// looked at who calls.
func (w *Watch) Mark() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.heard
}

// While returns a context that ends when may, which is asked again whenever
// something of the caller's is changed, fails with a fault: the cause is that
// fault. done must be called when it is over.
func (w *Watch) While(ctx context.Context, who Principal, mark int, may func(context.Context) error) (while context.Context, done func()) {
	return w.while(ctx, []uuid.UUID{who.Session, who.Key, who.User, who.Team}, mark, may)
}

// WhileToken is While for somebody who showed a token of a team's sandbox.
func (w *Watch) WhileToken(ctx context.Context, team, sandbox uuid.UUID, mark int, may func(context.Context) error) (while context.Context, done func()) {
	return w.while(ctx, []uuid.UUID{sandbox, team}, mark, may)
}

// OnWord has f called with the id of every session, key, user, team or sandbox
// of which it is heard that access to it ends; no id: it can be any. Call it
// before Run. f must not block.
func (w *Watch) OnWord(f func(whose string)) { w.told = append(w.told, f) }

func (w *Watch) while(ctx context.Context, about []uuid.UUID, mark int, may func(context.Context) error) (while context.Context, done func()) {
	while, end := context.WithCancelCause(ctx)
	h := &held{about: about, may: may, end: end}
	w.mu.Lock()
	w.held[h] = struct{}{}
	missed := w.heard != mark
	w.mu.Unlock()
	if missed {
		w.look(while, h)
	}
	return while, func() {
		w.mu.Lock()
		delete(w.held, h)
		w.mu.Unlock()
		end(nil)
	}
}

// look asks whether something may go on, and ends it if not. While that cannot be
// known, it stays in doubt.
func (w *Watch) look(ctx context.Context, h *held) {
	bounded, cancel := context.WithTimeout(ctx, lookWithin)
	defer cancel()
	err := h.may(bounded)
	var f *fault.Error
	switch {
	case errors.As(err, &f):
		h.end(f)
	case err != nil && ctx.Err() == nil:
		w.log.Warn("look whether somebody may go on", "error", err)
		w.mu.Lock()
		h.doubt = true
		w.mu.Unlock()
		time.AfterFunc(lookSoon, w.again)
	}
}

// again has Run look at what is in doubt. It does not block.
func (w *Watch) again() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Run hears until ctx is done.
func (w *Watch) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		// The first word, after what may have been missed, is about everybody.
		w.store.Listen(ctx, w.log, "wrenn_access", func(whose string) {
			// First, so that nobody who asks again is told what was so before.
			for _, f := range w.told {
				f(whose)
			}
			w.doubt(whose)
			w.again()
		})
	})
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	for {
		select {
		case <-w.wake:
		case <-tick.C:
			w.doubt("")
		case <-ctx.Done():
			return
		}
		w.mu.Lock()
		var look []*held
		for h := range w.held {
			if h.doubt {
				h.doubt = false
				look = append(look, h)
			}
		}
		w.mu.Unlock()
		_ = each.Do(ctx, w.log, looks, lookWithin, look, func(_ context.Context, h *held) error {
			w.look(ctx, h) // which has its own bound
			return nil
		})
	}
}

// doubt marks what goes on for a session, key, user or team; for everybody
// where it is no id.
func (w *Watch) doubt(whose string) {
	one, err := uuid.Parse(whose)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heard++
	for h := range w.held {
		if err != nil || slices.Contains(h.about, one) {
			h.doubt = true
		}
	}
}
