package sandbox

import (
	"context"
	"time"

	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

// carry returns a copy of to that belongs to the request of from, and to its trace.
func carry(from, to context.Context) context.Context {
	if id := requestid.From(from); id != "" {
		to = requestid.With(to, id)
	}
	return tracing.Carry(from, to)
}

// operation begins an operation on the sandbox, to which the steps belong until the next
// one begins. The sandbox's goroutine calls it, and then end with the result.
func (inst *instance) operation(ctx context.Context, name string) (_ context.Context, end func(error)) {
	begin := time.Now()
	inst.doing = name
	inst.set(func() { inst.steps = nil })
	ctx, span := tracing.Start(ctx, name)
	if span.On() {
		span.Set("wrenn.sandbox_id", id.Format(id.Sandbox, inst.rec.Spec.ID))
	}
	return ctx, func(err error) {
		span.EndWith(err)
		inst.m.Observe(name, "", time.Since(begin), err)
	}
}

// step calls f as a step of the operation, and records its duration.
func (inst *instance) step(ctx context.Context, name string, f func(context.Context) error) error {
	begin := time.Now()
	ctx, span := tracing.Step(ctx, inst.doing, name)
	err := f(ctx)
	span.EndWith(err)
	took := time.Since(begin)
	inst.set(func() { inst.steps = append(inst.steps, Step{name, took}) })
	inst.m.Observe(inst.doing, name, took, err)
	if err != nil {
		inst.log.Debug("step failed", "step", name, "took", took, "error", err)
		return err
	}
	inst.log.Debug("step", "step", name, "took", took)
	return nil
}
