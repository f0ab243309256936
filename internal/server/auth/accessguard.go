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
	// checkEvery is how often every stream is checked, because a key expires without a
	// notification.
	checkEvery = time.Minute
	// checkTimeout bounds one check, checksAtOnce how many run at once. A check that fails
	// is retried after retryDelay.
	checkTimeout = 5 * time.Second
	checksAtOnce = 8
	retryDelay   = time.Second
)

// AccessGuard ends long-lived streams, such as terminals, when their caller loses access.
// The database notifies all servers when somebody loses access, whichever server revoked it.
type AccessGuard struct {
	store *store.Store
	log   *slog.Logger
	// wake asks Run to check the streams in doubt.
	wake chan struct{}

	mu sync.Mutex
	// notified counts notifications.
	notified int
	// onLost is called with each notification.
	onLost  []func(whose string)
	streams map[*stream]struct{}
}

// stream is a request that the guard may end.
type stream struct {
	about   []uuid.UUID // ids whose notifications put the stream in doubt
	may     func(context.Context) error
	end     context.CancelCauseFunc
	inDoubt bool // The next check includes it.
}

// NewAccessGuard returns a guard that follows the notifications of a store. It ends streams
// only while [AccessGuard.Run] runs.
func NewAccessGuard(st *store.Store, log *slog.Logger) *AccessGuard {
	return &AccessGuard{store: st, log: log, wake: make(chan struct{}, 1), streams: make(map[*stream]struct{})}
}

// Mark returns the number of notifications so far. Call it before you authenticate a
// caller and pass it to [AccessGuard.While].
func (g *AccessGuard) Mark() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.notified
}

// While returns a context that is cancelled when the caller loses access. The guard calls
// may again after each notification about the caller. If may returns a fault, that is the
// context's cause. Call done at the end of the stream.
func (g *AccessGuard) While(ctx context.Context, who Principal, mark int, may func(context.Context) error) (while context.Context, done func()) {
	return g.while(ctx, []uuid.UUID{who.Session, who.Key, who.User, who.Team}, mark, may)
}

// WhileToken is [AccessGuard.While] for a caller with a token of a team's sandbox.
func (g *AccessGuard) WhileToken(ctx context.Context, team, sandbox uuid.UUID, mark int, may func(context.Context) error) (while context.Context, done func()) {
	return g.while(ctx, []uuid.UUID{sandbox, team}, mark, may)
}

// OnLostAccess registers f. The guard calls it with the id of each session, key, user, team
// or sandbox that loses access, and with "" if it may be any. f must not block. Call
// OnLostAccess before Run.
func (g *AccessGuard) OnLostAccess(f func(whose string)) { g.onLost = append(g.onLost, f) }

func (g *AccessGuard) while(ctx context.Context, about []uuid.UUID, mark int, may func(context.Context) error) (while context.Context, done func()) {
	while, end := context.WithCancelCause(ctx)
	s := &stream{about: about, may: may, end: end}
	g.mu.Lock()
	g.streams[s] = struct{}{}
	missed := g.notified != mark
	g.mu.Unlock()
	if missed {
		g.check(while, s)
	}
	return while, func() {
		g.mu.Lock()
		delete(g.streams, s)
		g.mu.Unlock()
		end(nil)
	}
}

// check checks one stream and ends it if its caller has lost access. If the check fails,
// the stream stays in doubt.
func (g *AccessGuard) check(ctx context.Context, s *stream) {
	bounded, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	err := s.may(bounded)
	var f *fault.Error
	switch {
	case errors.As(err, &f):
		s.end(f)
	case err != nil && ctx.Err() == nil:
		g.log.Warn("check whether a caller still has access", "error", err)
		g.mu.Lock()
		s.inDoubt = true
		g.mu.Unlock()
		time.AfterFunc(retryDelay, g.wakeRun)
	}
}

// wakeRun asks Run to check the streams in doubt. It does not block.
func (g *AccessGuard) wakeRun() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// Run handles notifications and checks streams until ctx is done.
func (g *AccessGuard) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		// After a reconnect, the first notification is about everybody.
		g.store.Listen(ctx, g.log, "wrenn_access", func(whose string) {
			// First clear caches, so that the checks do not read old rights.
			for _, f := range g.onLost {
				f(whose)
			}
			g.markInDoubt(whose)
			g.wakeRun()
		})
	})
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-g.wake:
		case <-tick.C:
			g.markInDoubt("")
		case <-ctx.Done():
			return
		}
		g.mu.Lock()
		var due []*stream
		for s := range g.streams {
			if s.inDoubt {
				s.inDoubt = false
				due = append(due, s)
			}
		}
		g.mu.Unlock()
		_ = each.Do(ctx, g.log, checksAtOnce, checkTimeout, due, func(_ context.Context, s *stream) error {
			g.check(ctx, s) // It has its own time limit.
			return nil
		})
	}
}

// markInDoubt marks the streams of a session, key, user, team or sandbox, or all streams if
// whose is not an id.
func (g *AccessGuard) markInDoubt(whose string) {
	one, err := uuid.Parse(whose)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.notified++
	for s := range g.streams {
		if err != nil || slices.Contains(s.about, one) {
			s.inDoubt = true
		}
	}
}
