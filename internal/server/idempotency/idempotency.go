// Package idempotency makes it safe to repeat calls that create objects: a caller names
// the call (Idempotency-Key), and a repeated call returns what the first one created.
package idempotency

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// keysLast is how long a key stays valid.
const keysLast = 24 * time.Hour

// ErrTaken rolls back a transaction whose key has already created something.
var ErrTaken = errors.New("idempotency key in use")

// Call is a call with an idempotency key. The zero Call has no key, so every one is new.
type Call struct {
	team uuid.UUID
	key  string
	hash []byte // of the request
}

// Name returns a team's call with a key and a request. Two requests are equal if their
// JSON is.
func Name(team uuid.UUID, key string, asked any) (Call, error) {
	if key == "" {
		return Call{}, nil
	}
	text, err := json.Marshal(asked)
	if err != nil {
		return Call{}, err
	}
	hash := sha256.Sum256(text)
	return Call{team, key, hash[:]}, nil
}

// Claim records what the call creates, in the transaction that creates it. It fails with
// [ErrTaken] if the key has already created something.
func (c Call) Claim(ctx context.Context, q *db.Queries, made db.ClaimIdempotencyKeyParams) error {
	if c.key == "" {
		return nil
	}
	made.TeamID, made.Key, made.RequestHash = c.team, c.key, c.hash
	n, err := q.ClaimIdempotencyKey(ctx, made)
	if err == nil && n == 0 {
		err = ErrTaken
	}
	return err
}

// Made looks up what the key created; found is false if it created nothing. It fails with
// unprocessable if the key was used for another request.
func (c Call) Made(ctx context.Context, s *store.Store) (k db.IdempotencyKey, found bool, err error) {
	if c.key == "" {
		return k, false, nil
	}
	k, err = s.GetIdempotencyKey(ctx, db.GetIdempotencyKeyParams{TeamID: c.team, Key: c.key})
	if errors.Is(err, store.ErrNoRows) {
		return k, false, nil
	}
	if err != nil {
		return k, false, fmt.Errorf("look up idempotency key: %w", err)
	}
	if !bytes.Equal(k.RequestHash, c.hash) {
		return k, false, fault.New(fault.Unprocessable, "this Idempotency-Key was used with a different body")
	}
	return k, true, nil
}

// Forget deletes expired keys until ctx is done.
func Forget(ctx context.Context, s *store.Store, log *slog.Logger) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		if err := s.ForgetIdempotencyKeys(ctx, time.Now().Add(-keysLast)); err != nil && ctx.Err() == nil {
			log.Warn("delete expired idempotency keys", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
