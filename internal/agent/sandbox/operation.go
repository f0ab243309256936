package sandbox

import (
	"context"
	"time"
)

// operation begins something that is done with the sandbox. The sandbox's goroutine
// calls it, and end once it knows how that went. Steps belong to the operation until
// the next one begins.
func (b *box) operation(ctx context.Context, name string) (_ context.Context, end func(error)) {
	begin := time.Now()
	b.doing = name
	b.set(func() { b.steps = nil })
	return ctx, func(err error) { b.m.Observe(name, "", time.Since(begin), err) }
}

// step does one step of an operation and tells how long it took.
func (b *box) step(ctx context.Context, name string, f func(context.Context) error) error {
	begin := time.Now()
	err := f(ctx)
	took := time.Since(begin)
	b.set(func() { b.steps = append(b.steps, Step{name, took}) })
	b.m.Observe(b.doing, name, took, err)
	if err != nil {
		b.log.Debug("step failed", "step", name, "took", took, "error", err)
		return err
	}
	b.log.Debug("step", "step", name, "took", took)
	return nil
}
