// Package idempotency lets callers name what they ask for (Idempotency-Key), so
// that to repeat a call does nothing more.
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

// keysLast is how long a key is remembered.
const keysLast = 24 * time.Hour

// ErrTaken is why a transaction is rolled back whose key has made something.
var ErrTaken = errors.New("idempotency key in use")

// Call is the name that a caller gave to a call. The zero Call names nothing:
// each call is another.
type Call struct {
	team uuid.UUID
	key  string
	hash []byte // of what was asked for
}

// Name returns the name of a team's call that asks for something, which is
// written as JSON; maps are, in the order of their keys.
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

// Claim writes what the call makes, in the transaction that makes it. It fails
// with ErrTaken if the key has made something already.
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

// Made looks up what the key made; found is false if it is free. It fails with
// unprocessable if the key was used for something else.
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
		return k, false, fault.New(fault.Unprocessable, "this Idempotency-Key was used with another body")
	}
	return k, true, nil
}

// Forget forgets keys that are old enough until ctx is done.
func Forget(ctx context.Context, s *store.Store, log *slog.Logger) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		if err := s.ForgetIdempotencyKeys(ctx, time.Now().Add(-keysLast)); err != nil && ctx.Err() == nil {
			log.Warn("forget old idempotency keys", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
