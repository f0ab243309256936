package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/page"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// An API key is keyPrefix and random characters. Lists show its first shownChars
// characters.
const (
	keyPrefix  = "wrn_"
	minKey     = 24
	maxKey     = 256
	maxKeys    = 1000 // of a team, expired ones included
	shownChars = 8
)

// flushEvery bounds how long the last use of a key stays unwritten.
const flushEvery = 15 * time.Second

// Keys authenticates and manages API keys.
type Keys struct {
	store *store.Store
	log   *slog.Logger

	mu   sync.Mutex
	used map[uuid.UUID]time.Time

	recent recent
}

// NewKeys returns the API keys in a store. [Keys.Run] writes their last uses.
func NewKeys(s *store.Store, log *slog.Logger) *Keys {
	return &Keys{store: s, log: log, used: make(map[uuid.UUID]time.Time)}
}

// Check returns the holder of a key. It fails with unauthenticated if the key is not
// valid.
func (k *Keys) Check(ctx context.Context, key string) (Principal, error) {
	p, _, err := k.check(ctx, key)
	return p, err
}

// check is [Keys.Check], and also returns when the key expires (nil: never).
func (k *Keys) check(ctx context.Context, key string) (Principal, *time.Time, error) {
	if key == "" {
		return Principal{}, nil, fault.New(fault.Unauthenticated, "no API key: send one in X-API-Key")
	}
	invalid := fault.New(fault.Unauthenticated, "invalid API key")
	if !strings.HasPrefix(key, keyPrefix) || len(key) > maxKey {
		return Principal{}, nil, invalid
	}
	hash := sha256.Sum256([]byte(key))
	found, err := k.store.GetAPIKeyByHash(ctx, hash[:])
	if errors.Is(err, store.ErrNoRows) || err == nil && subtle.ConstantTimeCompare(hash[:], found.APIKey.Hash) != 1 {
		return Principal{}, nil, invalid
	}
	if err != nil {
		return Principal{}, nil, fmt.Errorf("look up API key: %w", err)
	}
	row := found.APIKey
	k.mu.Lock()
	k.used[row.ID] = time.Now()
	k.mu.Unlock()
	p := Principal{Team: row.TeamID, Payer: found.Payer, Key: row.ID, Scopes: make([]Scope, len(row.Scopes)), epoch: found.Epoch}
	for i, s := range row.Scopes {
		p.Scopes[i] = Scope(s)
	}
	if row.UserID != nil {
		p.User = *row.UserID
	}
	p.Platform = found.Admin && slices.Contains(p.Scopes, PlatformScope)
	return p, row.ExpiresAt, nil
}

// Again checks a key again for a request that who began. It also fails with
// unauthenticated if the holder's rights were revoked since then, even if they were
// restored.
func (k *Keys) Again(ctx context.Context, key string, who Principal) (Principal, error) {
	now, err := k.Check(ctx, key)
	if err == nil {
		err = who.since(now)
	}
	return now, err
}

// Run writes the keys' last uses in batches until ctx is done, and a last time then.
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

// FirstAdmin is the first user of an installation.
type FirstAdmin struct {
	Email, Password string
	// APIKey is a key for the admin's team; empty: none.
	APIKey string
	// PasswordCost is the cost of the password's hash.
	PasswordCost Cost
}

// Bootstrap creates the first admin with a team and an API key if there are no users yet.
// It reports whether it did.
func Bootstrap(ctx context.Context, s *store.Store, a FirstAdmin) (bool, error) {
	if a.Email == "" {
		return false, nil
	}
	if !strings.Contains(a.Email, "@") {
		return false, errors.New("create first admin: WRENN_ADMIN_EMAIL is not an e-mail address")
	}
	if a.Password == "" {
		return false, errors.New("create first admin: WRENN_ADMIN_PASSWORD is not set")
	}
	if a.APIKey != "" && (!strings.HasPrefix(a.APIKey, keyPrefix) || len(a.APIKey) < minKey || len(a.APIKey) > maxKey) {
		return false, fmt.Errorf("create first admin: WRENN_ADMIN_API_KEY must be %q and at least %d random characters", keyPrefix, minKey-len(keyPrefix))
	}
	made := false
	err := s.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockBootstrap(ctx); err != nil {
			return err
		}
		if n, err := q.CountUsers(ctx); err != nil || n > 0 {
			return err
		}
		user, team, hash := uuid.New(), uuid.New(), a.PasswordCost.Hash(a.Password)
		if err := q.InsertUser(ctx, db.InsertUserParams{ID: user, Email: a.Email, PasswordHash: &hash, Admin: true}); err != nil {
			return err
		}
		// The operator configured the address, so it needs no confirmation.
		if _, err := q.VerifyUser(ctx, user); err != nil {
			return err
		}
		if err := q.InsertTeam(ctx, db.InsertTeamParams{ID: team, Name: "default"}); err != nil {
			return err
		}
		if err := q.InsertTeamMember(ctx, db.InsertTeamMemberParams{TeamID: team, UserID: user, Role: "owner"}); err != nil {
			return err
		}
		// Only the machine itself limits its owner.
		if err := q.SetQuota(ctx, db.SetQuotaParams{TeamID: team}); err != nil {
			return err
		}
		made = true
		if a.APIKey == "" {
			return nil
		}
		_, err := insertKey(ctx, q, db.InsertAPIKeyParams{TeamID: team, UserID: &user, Name: "first", Scopes: []string{string(PlatformScope)}}, a.APIKey)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("create first admin: %w", err)
	}
	return made, nil
}

// insertKey inserts a key. It sets the fields of p that are derived from the key.
func insertKey(ctx context.Context, q *db.Queries, p db.InsertAPIKeyParams, key string) (uuid.UUID, error) {
	hash := sha256.Sum256([]byte(key))
	p.ID, p.Prefix, p.Hash = uuid.New(), key[:shownChars], hash[:]
	return p.ID, q.InsertAPIKey(ctx, p)
}

// NewKey describes an API key to create.
type NewKey struct {
	Name   string
	Scopes []Scope
	// ExpiresAt is when the key expires; nil: never.
	ExpiresAt *time.Time
}

// LockMembers locks a team's members and keys until q's transaction ends. It fails with
// [store.ErrNoRows] if the team is gone.
func LockMembers(ctx context.Context, q *db.Queries, team uuid.UUID) error {
	if err := q.LockLimit(ctx, db.LockLimitParams{What: "members", TeamID: team}); err != nil {
		return err
	}
	_, err := q.KeepTeam(ctx, team)
	return err
}

// Create creates a key for the team that the user by acts for. This is the only time the
// key itself is returned.
func (k *Keys) Create(ctx context.Context, by Principal, n NewKey) (key string, row db.APIKey, err error) {
	if n.ExpiresAt != nil && !n.ExpiresAt.After(time.Now()) {
		return "", row, fault.New(fault.InvalidArgument, "expires_at: is in the past")
	}
	if slices.Contains(n.Scopes, PlatformScope) && !by.Platform {
		return "", row, fault.New(fault.PermissionDenied, "only the platform's admins may create keys with the scope %q", PlatformScope)
	}
	scopes := []string{}
	for _, s := range n.Scopes {
		if !slices.Contains(scopes, string(s)) {
			scopes = append(scopes, string(s))
		}
	}
	var random [20]byte
	rand.Read(random[:])
	key = keyPrefix + hex.EncodeToString(random[:])
	err = k.store.InTx(ctx, func(q *db.Queries) error {
		// Removing a member takes the same lock, so a removed member gets no key.
		if err := LockMembers(ctx, q, by.Team); err != nil {
			return err
		}
		if _, err := q.GetMember(ctx, db.GetMemberParams{TeamID: by.Team, UserID: by.User}); err != nil {
			return err
		}
		if n, err := q.CountAPIKeys(ctx, by.Team); err != nil {
			return err
		} else if n >= maxKeys {
			return fault.New(fault.Conflict, "a team has at most %d API keys: revoke some", maxKeys)
		}
		made, err := insertKey(ctx, q, db.InsertAPIKeyParams{TeamID: by.Team, UserID: &by.User, Name: n.Name, Scopes: scopes, ExpiresAt: n.ExpiresAt}, key)
		if err != nil {
			return err
		}
		row, err = q.GetAPIKey(ctx, db.GetAPIKeyParams{ID: made, TeamID: by.Team})
		return err
	})
	if errors.Is(err, store.ErrNoRows) {
		return "", row, fault.New(fault.NotFound, "no such team")
	}
	if fault.Is(err, fault.Conflict) {
		return "", row, err
	}
	if err != nil {
		return "", row, fmt.Errorf("create API key: %w", err)
	}
	return key, row, nil
}

// List returns a page of a team's keys, newest first, and the cursor of the next page (""
// on the last).
func (k *Keys) List(ctx context.Context, team uuid.UUID, cursor string, limit int) ([]db.ListAPIKeysRow, string, error) {
	at, before, err := page.Newest(cursor)
	if err != nil {
		return nil, "", err
	}
	rows, err := k.store.ListAPIKeys(ctx, db.ListAPIKeysParams{TeamID: team, BeforeAt: at, BeforeID: before, MaxRows: int32(limit) + 1})
	if err != nil {
		return nil, "", fmt.Errorf("list API keys: %w", err)
	}
	rows, next := page.Cut(rows, limit, func(r db.ListAPIKeysRow) string { return page.Time(r.APIKey.CreatedAt, r.APIKey.ID) })
	return rows, next, nil
}

// Revoke deletes a team's key with immediate effect. Members may revoke their own keys,
// admins all of the team's.
func (k *Keys) Revoke(ctx context.Context, by Principal, key uuid.UUID) error {
	row, err := k.store.GetAPIKey(ctx, db.GetAPIKeyParams{ID: key, TeamID: by.Team})
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.NotFound, "no such API key")
	}
	if err != nil {
		return fmt.Errorf("look up API key: %w", err)
	}
	if !by.Role.AtLeast(Admin) && (row.UserID == nil || *row.UserID != by.User) {
		return fault.New(fault.PermissionDenied, "you may only revoke keys that you created; the team's admins may revoke all")
	}
	if _, err := k.store.DeleteAPIKey(ctx, db.DeleteAPIKeyParams{ID: key, TeamID: by.Team}); err != nil {
		return fmt.Errorf("revoke API key: %w", err)
	}
	k.Forget() // The database's notification arrives later.
	return nil
}
