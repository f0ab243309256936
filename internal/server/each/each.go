// Package each runs a function for each of several items concurrently, so that one that
// fails, hangs or panics does not stop the others.
package each

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// Do calls f for each item, at most n at once, waits for all calls, and joins their
// errors. It bounds each call's context by within. It logs a panic and returns it as an
// error (see [fault.Guard]). After ctx ends, Do starts no further calls.
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
