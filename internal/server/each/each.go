// Package each does something for each of several objects, so that one that
// fails, hangs or panics holds up none of the others.
package each

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// Do calls f for each item, for at most n at once, and returns when all calls
// have: the errors that they returned, joined. A call's context ends after
// within, and a panic is logged and becomes an error (see [fault.Guard]). What
// is left when ctx ends is not begun.
func Do[T any](ctx context.Context, log *slog.Logger, n int, within time.Duration, items []T, f func(context.Context, T) error) error {
	errs := make([]error, len(items))
	turn := make(chan struct{}, n)
	var wg sync.WaitGroup
	for i, item := range items {
		select {
		case turn <- struct{}{}:
		case <-ctx.Done():
			wg.Wait()
			return errors.Join(append(errs, ctx.Err())...)
		}
		wg.Go(func() {
			defer func() { <-turn }()
			ctx, cancel := context.WithTimeout(ctx, within)
			defer cancel()
			errs[i] = fault.Guard(log, func() error { return f(ctx, item) })
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
