package auth

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// An API key on the wire is keyPrefix and random characters; listed keys show
// the first shownChars of it.
const (
	keyPrefix  = "wrn_"
	minKey     = 24
	maxKey     = 256
	shownChars = 8
)

// flushEvery is how long the last use of a key may stay unwritten.
const flushEvery = 15 * time.Second

// Principal is who calls.
type Principal struct {
	// Team is whose sandboxes the caller acts on.
	Team uuid.UUID
	// Key is the API key that was shown.
	Key uuid.UUID
}

// Keys checks API keys.
type Keys struct {
	store *store.Store
	log   *slog.Logger

	mu   sync.Mutex
	used map[uuid.UUID]time.Time
}

// NewKeys returns the keys of a store. Run must run for last uses to be written.
func NewKeys(s *store.Store, log *slog.Logger) *Keys {
	return &Keys{store: s, log: log, used: make(map[uuid.UUID]time.Time)}
}

// Check returns whose key it is, or a fault: unauthenticated for any other text.
func (k *Keys) Check(ctx context.Context, key string) (Principal, error) {
	if key == "" {
		return Principal{}, fault.New(fault.Unauthenticated, "no API key: send one in X-API-Key")
	}
	invalid := fault.New(fault.Unauthenticated, "invalid API key")
	if !strings.HasPrefix(key, keyPrefix) || len(key) > maxKey {
		return Principal{}, invalid
	}
	hash := sha256.Sum256([]byte(key))
	row, err := k.store.GetAPIKeyByHash(ctx, hash[:])
	if errors.Is(err, store.ErrNoRows) || err == nil && subtle.ConstantTimeCompare(hash[:], row.Hash) != 1 {
		return Principal{}, invalid
	}
	if err != nil {
		return Principal{}, fmt.Errorf("look up API key: %w", err)
	}
	k.mu.Lock()
	k.used[row.ID] = time.Now()
	k.mu.Unlock()
	return Principal{Team: row.TeamID, Key: row.ID}, nil
}

// OfAdmin says whether a platform's admin made the key.
func (k *Keys) OfAdmin(ctx context.Context, key uuid.UUID) (bool, error) {
	admin, err := k.store.IsAdminsKey(ctx, key)
	if err != nil {
		return false, fmt.Errorf("look up who made the key: %w", err)
	}
	return admin, nil
}

// Run writes the keys' last uses, many at once, until ctx is done, and once
// more then.
func (k *Keys) Run(ctx context.Context) {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			k.flush(ctx)
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			k.flush(last)
			return
		}
	}
}

func (k *Keys) flush(ctx context.Context) {
	k.mu.Lock()
	used := k.used
	k.used = make(map[uuid.UUID]time.Time)
	k.mu.Unlock()
	if len(used) == 0 {
		return
	}
	var p db.TouchAPIKeysParams
	for id, at := range used {
		p.Ids, p.Ats = append(p.Ids, id), append(p.Ats, at)
	}
	if err := k.store.TouchAPIKeys(ctx, p); err != nil {
		k.log.Warn("write last uses of API keys", "error", err)
	}
}

// Admin is the first user of an installation.
type Admin struct {
	Email, Password string
	// APIKey is a key of the admin's team; none is made when it is empty.
	APIKey string
}

// Bootstrap makes the first admin, its team and its API key when there is no
// user at all. It says whether it did.
func Bootstrap(ctx context.Context, s *store.Store, a Admin) (bool, error) {
	if a.Email == "" {
		return false, nil
	}
	if !strings.Contains(a.Email, "@") {
		return false, errors.New("make first admin: WRENN_ADMIN_EMAIL is no e-mail address")
	}
	if a.Password == "" {
		return false, errors.New("make first admin: WRENN_ADMIN_PASSWORD is not set")
	}
	if a.APIKey != "" && (!strings.HasPrefix(a.APIKey, keyPrefix) || len(a.APIKey) < minKey || len(a.APIKey) > maxKey) {
		return false, fmt.Errorf("make first admin: WRENN_ADMIN_API_KEY must be %q and at least %d random characters", keyPrefix, minKey-len(keyPrefix))
	}
	made := false
	err := s.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockBootstrap(ctx); err != nil {
			return err
		}
		if n, err := q.CountUsers(ctx); err != nil || n > 0 {
			return err
		}
		user, team := uuid.New(), uuid.New()
		if err := q.InsertUser(ctx, db.InsertUserParams{ID: user, Email: a.Email, PasswordHash: HashPassword(a.Password), Admin: true}); err != nil {
			return err
		}
		if err := q.InsertTeam(ctx, db.InsertTeamParams{ID: team, Name: "default"}); err != nil {
			return err
		}
		if err := q.InsertTeamMember(ctx, db.InsertTeamMemberParams{TeamID: team, UserID: user, Role: "owner"}); err != nil {
			return err
		}
		made = true
		if a.APIKey == "" {
			return nil
		}
		return insertKey(ctx, q, team, &user, "first", a.APIKey)
	})
	if err != nil {
		return false, fmt.Errorf("make first admin: %w", err)
	}
	return made, nil
}

func insertKey(ctx context.Context, q *db.Queries, team uuid.UUID, user *uuid.UUID, name, key string) error {
	hash := sha256.Sum256([]byte(key))
	return q.InsertAPIKey(ctx, db.InsertAPIKeyParams{ID: uuid.New(), TeamID: team, UserID: user, Name: name, Prefix: key[:shownChars], Hash: hash[:]})
}
