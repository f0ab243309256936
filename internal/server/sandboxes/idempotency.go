package sandboxes

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// errTaken is why a transaction is rolled back whose key is in use.
var errTaken = errors.New("idempotency key in use")

// once is the name that a caller gave to a call, so that to repeat it does
// nothing more. The zero once names nothing: each call is another.
type once struct {
	team uuid.UUID
	key  string
	hash []byte // of what was asked for
}

// onceFor returns the name of a call that asks for something, which is written
// as JSON; maps are, in the order of their keys.
func onceFor(team uuid.UUID, key string, asked any) (once, error) {
	if key == "" {
		return once{}, nil
	}
	if err := checkText("Idempotency-Key", key); err != nil {
		return once{}, err
	}
	text, err := json.Marshal(asked)
	if err != nil {
		return once{}, err
	}
	hash := sha256.Sum256(text)
	return once{team, key, hash[:]}, nil
}

// claim writes what the call makes, in the transaction that makes it. It fails
// with errTaken where the key has made something already.
func (o once) claim(ctx context.Context, q *db.Queries, made db.ClaimIdempotencyKeyParams) error {
	if o.key == "" {
		return nil
	}
	made.TeamID, made.Key, made.RequestHash = o.team, o.key, o.hash
	n, err := q.ClaimIdempotencyKey(ctx, made)
	if err == nil && n == 0 {
		err = errTaken
	}
	return err
}

// made looks up what the key made; found is false where it is free.
func (s *Service) made(ctx context.Context, o once) (k db.IdempotencyKey, found bool, err error) {
	if o.key == "" {
		return k, false, nil
	}
	k, err = s.Store.GetIdempotencyKey(ctx, db.GetIdempotencyKeyParams{TeamID: o.team, Key: o.key})
	if errors.Is(err, store.ErrNoRows) {
		return k, false, nil
	}
	if err != nil {
		return k, false, fmt.Errorf("look up idempotency key: %w", err)
	}
	if !bytes.Equal(k.RequestHash, o.hash) {
		return k, false, fault.New(fault.Unprocessable, "this Idempotency-Key was used with another body")
	}
	return k, true, nil
}

// replay returns the sandboxes that the key made, waiting for them while they
// are being made; found is false where the key is free.
func (s *Service) replay(ctx context.Context, o once) (rows []db.Sandbox, found bool, err error) {
	defer s.metrics.wait()()
	for {
		k, found, err := s.made(ctx, o)
		if !found || err != nil {
			return nil, found, err
		}
		if k.SandboxID == nil {
			return nil, false, errors.New("the idempotency key made no sandbox")
		}
		rows = rows[:0]
		freed := false
		for _, sandbox := range append([]uuid.UUID{*k.SandboxID}, k.Copies...) {
			row, err := s.begun(ctx, sandbox)
			if err != nil {
				return nil, true, err
			}
			// The first one's key is freed in the moment in which it fails.
			freed = freed || sandbox == *k.SandboxID && State(row.State) == Failed
			rows = append(rows, row)
		}
		if !freed {
			return rows, true, nil
		}
	}
}

// begun returns a sandbox when it is no longer being made, by this server or
// another, or why this one could not.
func (s *Service) begun(ctx context.Context, sandbox uuid.UUID) (db.Sandbox, error) {
	for {
		s.mu.Lock()
		c := s.creating[sandbox]
		s.mu.Unlock()
		if c != nil {
			select {
			case <-c.done:
				return c.row, c.err
			case <-ctx.Done():
				return db.Sandbox{}, ctx.Err()
			}
		}
		change := s.change(sandbox)
		row, err := s.Store.GetSandbox(ctx, sandbox)
		if err != nil {
			return row, fmt.Errorf("look up sandbox: %w", err)
		}
		if state := State(row.State); state != Pending && state != Starting {
			return row, nil
		}
		// Another server began it, and says how it ended, or the reconciler does.
		if err := lookAgainAfter(ctx, change, lookAgain); err != nil {
			return row, err
		}
	}
}

// replayTemplate returns the template that the key made, waiting for it while
// it is being captured; found is false where the key is free.
func (s *Service) replayTemplate(ctx context.Context, o once) (row db.Template, found bool, err error) {
	defer s.metrics.wait()()
	deadline := now().Add(settleWithin)
	for {
		k, found, err := s.made(ctx, o)
		if !found || err != nil {
			return row, found, err
		}
		if k.TemplateID == nil {
			return row, false, errors.New("the idempotency key made no template")
		}
		row, err := s.Store.GetTemplate(ctx, *k.TemplateID)
		if errors.Is(err, store.ErrNoRows) {
			continue // Its key went with it.
		}
		if err != nil {
			return row, false, fmt.Errorf("look up template: %w", err)
		}
		if templates.State(row.State) != templates.Pending {
			return row, true, nil
		}
		change := s.change(*row.CapturedFrom)
		if !s.BusyTemplate(row.ID) && now().After(deadline) {
			return row, true, fault.New(fault.Unavailable, "the sandbox is captured as soon as its host answers")
		}
		if err := lookAgainAfter(ctx, change, lookAgain); err != nil {
			return row, true, err
		}
	}
}

// lookAgainAfter waits for a change, but no longer than most: there may be no
// word of it.
func lookAgainAfter(ctx context.Context, change <-chan struct{}, most time.Duration) error {
	look := time.NewTimer(most)
	defer look.Stop()
	select {
	case <-change:
	case <-look.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}
