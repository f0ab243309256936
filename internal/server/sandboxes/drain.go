package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// A host that drains gets no new sandboxes, and those on it that are idle are
// paused: nothing was in flight to them for a while, be it a request to a port
// that lasts, a command that somebody waits for, or a call. That nobody asked
// for the pause is written down with it (drained). So the next use resumes the
// sandbox, whatever its auto_resume says, and one that ends unused after a
// time still ends then, by [watch.expireDrained] where its host has no timer
// for it any more.

// DefaultDrainIdle is for how long nothing uses a sandbox that is idle.
const DefaultDrainIdle = 30 * time.Second

// drainsAtOnce is how many sandboxes of one host are paused at once.
const drainsAtOnce = 2

// drainSoon has the idle sandboxes paused if the host drains. While earlier
// ones are, these are left to the next comparison.
func (w *watch) drainSoon(ctx context.Context, idle []db.Sandbox) error {
	if len(idle) == 0 {
		return nil
	}
	host, err := w.Store.GetHost(ctx, w.host.ID)
	if err != nil {
		return fmt.Errorf("look up host: %w", err)
	}
	if !host.Draining {
		return nil
	}
	select {
	case w.idle <- idle:
	default:
	}
	return nil
}

// drainLoop pauses the idle sandboxes of a host that drains until ctx is done.
func (w *watch) drainLoop(ctx context.Context) {
	for {
		select {
		case idle := <-w.idle:
			var g errgroup.Group
			g.SetLimit(drainsAtOnce)
			for _, row := range idle {
				if ctx.Err() != nil {
					break
				}
				g.Go(func() error {
					w.drain(ctx, row)
					return nil
				})
			}
			_ = g.Wait()
		case <-ctx.Done():
			return
		}
	}
}

// drain pauses one sandbox unless it is used after all.
func (w *watch) drain(ctx context.Context, row db.Sandbox) {
	// Shared with nobody: it may come to nothing, which whoever asks for a pause
	// does not mean.
	_, err := w.turn(ctx, row.ID, "", func() (db.Sandbox, error) { return w.pauseIdle(row, w.DrainIdle) })
	if err != nil && !errors.Is(err, errMoved) && !fault.Is(err, fault.Conflict) && ctx.Err() == nil {
		w.log.Warn("pause sandbox of a host that drains", "sandbox_id", id.Format(id.Sandbox, row.ID), "error", err)
	}
}

// expireDrained begins the end of sandboxes that were paused because the host
// drains and that nobody has used for their timeout.
func (w *watch) expireDrained(ctx context.Context) error {
	ended, err := w.Store.DrainedExpire(ctx, &w.host.ID)
	if err != nil {
		return fmt.Errorf("end what drained and was not used: %w", err)
	}
	w.Changed(ended...)
	return nil
}
