package sandboxes

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/idempotency"
)

// once returns the sandboxes that the key has created, or else calls create, which claims
// the key.
func (s *Service) once(ctx context.Context, o idempotency.Call, create func() ([]db.Sandbox, error)) (rows []db.Sandbox, replayed bool, err error) {
	for {
		if rows, found, err := s.replay(ctx, o); found || err != nil {
			return rows, found, err
		}
		if rows, err = create(); !errors.Is(err, idempotency.ErrTaken) {
			return rows, false, err
		}
	}
}

// replay returns the sandboxes that the key has created, and waits for their start. found
// is false if the key is free.
func (s *Service) replay(ctx context.Context, o idempotency.Call) (rows []db.Sandbox, found bool, err error) {
	for {
		k, found, err := o.Made(ctx, s.Store)
		if !found || err != nil {
			return nil, found, err
		}
		if k.SandboxID == nil {
			return nil, false, errors.New("idempotency key was used by a request that created no sandbox")
		}
		rows = rows[:0]
		freed := false
		for _, sandbox := range append([]uuid.UUID{*k.SandboxID}, k.Copies...) {
			row, err := s.begun(ctx, sandbox)
			if err != nil {
				return nil, true, err
			}
			// A failed start frees the key in the same transaction.
			freed = freed || sandbox == *k.SandboxID && State(row.State) == Failed
			rows = append(rows, row)
		}
		if !freed {
			return rows, true, nil
		}
	}
}

// begun waits until this or another server has finished creating a sandbox. It returns
// the sandbox, or why this server could not create it.
func (s *Service) begun(ctx context.Context, sandbox uuid.UUID) (row db.Sandbox, err error) {
	defer s.metrics.wait()()
	if c := s.creation(sandbox); c != nil {
		select {
		case <-c.done:
			return c.row, c.err
		case <-ctx.Done():
			return row, ctx.Err()
		}
	}
	// Another server creates it. That server or the reconciler stores the result.
	err = s.until(ctx, sandbox, lookAgain, func() (bool, error) {
		if row, err = s.Store.GetSandbox(ctx, sandbox); err != nil {
			return false, fmt.Errorf("look up sandbox: %w", err)
		}
		return !State(row.State).is(starting), nil
	})
	return row, err
}
