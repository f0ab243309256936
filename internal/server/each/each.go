// Package each does something for each of several objects, so that one that
// fails, hangs or panics holds up none of the others.
package each

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// Do calls f for each item, for at most n at once, and returns when all calls
// have: the errors that they returned, joined. A call's context ends after
// within. What is left when ctx ends is not begun.
func Do[T any](ctx context.Context, n int, within time.Duration, items []T, f func(context.Context, T) error) error {
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
			errs[i] = Safely(func() error { return f(ctx, item) })
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// PanicError is a panic that was made an error.
type PanicError struct {
	Value any
	Stack []byte
}

func (e *PanicError) Error() string { return fmt.Sprintf("panic: %v\n%s", e.Value, e.Stack) }

// Safely calls f and returns its error, or a [PanicError] if it panics.
func Safely(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{v, debug.Stack()}
		}
	}()
	return f()
}
