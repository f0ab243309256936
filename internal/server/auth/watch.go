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
	// lookAgain is how often every stream is checked, because a key expires without a
	// notification.
	lookAgain = time.Minute
	// lookWithin bounds one check, looks how many run at once. A failed check is repeated
	// after lookSoon.
	lookWithin = 5 * time.Second
	looks      = 8
	lookSoon   = time.Second
)

// Watch ends long-lived streams, such as terminals, when their caller loses access. The
// database notifies all servers when somebody loses access, whichever server revoked it.
type Watch struct {
	store *store.Store
	log   *slog.Logger
	// wake asks Run to check the streams in doubt.
	wake chan struct{}

	mu sync.Mutex
	// heard counts notifications.
	heard int
	// told is called with each notification.
	told []func(whose string)
	held map[*held]struct{}
}

// held is a stream that Watch may end.
type held struct {
	about []uuid.UUID // ids whose notifications put the stream in doubt
	may   func(context.Context) error
	end   context.CancelCauseFunc
	doubt bool // The next check includes it.
}

// NewWatch returns a watch on the notifications of a store. It works while [Watch.Run]
// runs.
func NewWatch(s *store.Store, log *slog.Logger) *Watch {
	return &Watch{store: s, log: log, wake: make(chan struct{}, 1), held: make(map[*held]struct{})}
}

// Mark returns the number of notifications so far. Call it before you authenticate a
// caller and pass it to [Watch.While].
func (w *Watch) Mark() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.heard
}

// While returns a context that is cancelled when the caller loses access. Watch calls may
// again after each notification about the caller. If may returns a fault, that is the
// context's cause. Call done at the end of the stream.
func (w *Watch) While(ctx context.Context, who Principal, mark int, may func(context.Context) error) (while context.Context, done func()) {
	return w.while(ctx, []uuid.UUID{who.Session, who.Key, who.User, who.Team}, mark, may)
}

// WhileToken is [Watch.While] for a caller with a token of a team's sandbox.
func (w *Watch) WhileToken(ctx context.Context, team, sandbox uuid.UUID, mark int, may func(context.Context) error) (while context.Context, done func()) {
	return w.while(ctx, []uuid.UUID{sandbox, team}, mark, may)
}

// OnWord registers f. Watch calls it with the id of each session, key, user, team or
// sandbox that loses access; without an id it can be any. f must not block. Call OnWord
// before Run.
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

// look checks one stream and ends it if its caller has lost access. If the check fails,
// the stream stays in doubt.
func (w *Watch) look(ctx context.Context, h *held) {
	bounded, cancel := context.WithTimeout(ctx, lookWithin)
	defer cancel()
	err := h.may(bounded)
	var f *fault.Error
	switch {
	case errors.As(err, &f):
		h.end(f)
	case err != nil && ctx.Err() == nil:
		w.log.Warn("check whether a caller still has access", "error", err)
		w.mu.Lock()
		h.doubt = true
		w.mu.Unlock()
		time.AfterFunc(lookSoon, w.again)
	}
}

// again asks Run to check the streams in doubt. It does not block.
func (w *Watch) again() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Run handles notifications and checks streams until ctx is done.
func (w *Watch) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		// After a reconnect, the first notification is about everybody.
		w.store.Listen(ctx, w.log, "wrenn_access", func(whose string) {
			// First clear caches, so that the checks do not read old rights.
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
			w.look(ctx, h) // It has its own time limit.
			return nil
		})
	}
}

// doubt marks the streams of a session, key, user, team or sandbox, or all streams if
// whose is not an id.
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
