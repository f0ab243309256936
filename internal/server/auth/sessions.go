package auth

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/text"
)

const (
	// AccessLasts is the lifetime of an access token.
	AccessLasts = 15 * time.Minute
	// RefreshLasts is the lifetime of an unused refresh token. sessionLasts bounds a
	// session however often it is refreshed.
	RefreshLasts = 30 * 24 * time.Hour
	sessionLasts = 180 * 24 * time.Hour
	// overlap is how long a repeated use of the previous refresh token counts as a race
	// of two browser windows or a lost response, and not as theft.
	overlap = 10 * time.Second

	refreshPrefix = "wrr_"
	issuer        = "wrenn"
	maxAgent      = 256
	maxSessions   = 100 // of a user; another login ends the oldest
)

// Derive derives a key for one purpose from the server's secret.
func Derive(secret []byte, purpose string) []byte {
	m := hmac.New(sha256.New, secret)
	m.Write([]byte("key:" + purpose))
	return m.Sum(nil)
}

// Sessions manages users' logins. A session is a row in the database. Its access token is
// a JWT that is valid for minutes. Its refresh token is random, valid for one use, and
// stored as a hash.
type Sessions struct {
	store *store.Store
	log   *slog.Logger
	key   []byte
}

// NewSessions returns the sessions in a store. secret is the installation's.
func NewSessions(s *store.Store, secret []byte, log *slog.Logger) *Sessions {
	return &Sessions{store: s, log: log, key: Derive(secret, "session")}
}

// Grant is the pair of tokens that a login or a refresh returns.
type Grant struct {
	User            uuid.UUID
	Access, Refresh string
	AccessExpires   time.Time
	RefreshExpires  time.Time
}

type claims struct {
	jwt.RegisteredClaims
	Session string `json:"sid"`
}

// Start creates a session for a user in q's transaction. The user sees agent and address
// in the list of sessions.
func (s *Sessions) Start(ctx context.Context, q *db.Queries, user uuid.UUID, agent, address string) (Grant, error) {
	session := uuid.New()
	refresh, hash := newRefresh(session)
	now := time.Now()
	expires := now.Add(RefreshLasts).UTC().Truncate(time.Microsecond)
	err := q.InsertSession(ctx, db.InsertSessionParams{
		ID: session, UserID: user, RefreshHash: hash, ExpiresAt: expires,
		UserAgent: text.Clean(agent, maxAgent), Address: address,
	})
	if err != nil {
		return Grant{}, fmt.Errorf("write session: %w", err)
	}
	if err := q.DeleteExcessSessions(ctx, db.DeleteExcessSessionsParams{UserID: user, Keep: session, Most: maxSessions - 1}); err != nil {
		return Grant{}, fmt.Errorf("end oldest sessions: %w", err)
	}
	return s.grant(user, session, refresh, now, expires)
}

func (s *Sessions) grant(user, session uuid.UUID, refresh string, now, expires time.Time) (Grant, error) {
	g := Grant{User: user, Refresh: refresh, RefreshExpires: expires, AccessExpires: now.Add(AccessLasts)}
	var err error
	g.Access, err = jwt.NewWithClaims(jwt.SigningMethodHS256, claims{
		RegisteredClaims: jwt.RegisteredClaims{
			Issuer: issuer, Subject: user.String(), IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(g.AccessExpires),
		},
		Session: session.String(),
	}).SignedString(s.key)
	if err != nil {
		return Grant{}, fmt.Errorf("sign access token: %w", err)
	}
	return g, nil
}

// newRefresh returns a new refresh token for a session and its hash.
func newRefresh(session uuid.UUID) (string, []byte) {
	var random [32]byte
	rand.Read(random[:])
	token := refreshPrefix + base64.RawURLEncoding.EncodeToString(append(session[:], random[:]...))
	hash := sha256.Sum256([]byte(token))
	return token, hash[:]
}

// refreshSession returns the session that a refresh token names, without checking the
// token.
func refreshSession(token string) (uuid.UUID, bool) {
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token, refreshPrefix))
	if err != nil || len(raw) != 48 || !strings.HasPrefix(token, refreshPrefix) {
		return uuid.Nil, false
	}
	return uuid.UUID(raw[:16]), true
}

// errNoSession is the error for every token that is not valid.
func errNoSession() error { return fault.New(fault.Unauthenticated, "not logged in, or no longer") }

// Refresh exchanges a refresh token for a new pair of tokens. A second use of a token
// ends the session, because somebody stole it. A second use within overlap fails with
// conflict instead.
func (s *Sessions) Refresh(ctx context.Context, token string) (Grant, error) {
	session, ok := refreshSession(token)
	if !ok {
		return Grant{}, errNoSession()
	}
	shown := sha256.Sum256([]byte(token))
	var g Grant
	var refused error
	err := s.store.InTx(ctx, func(q *db.Queries) error {
		row, err := q.LockSession(ctx, session)
		if errors.Is(err, store.ErrNoRows) {
			refused = errNoSession()
			return nil
		}
		if err != nil {
			return err
		}
		now := time.Now()
		switch {
		case now.After(row.ExpiresAt) || !row.Active:
			refused = errNoSession()
			return q.DeleteSession(ctx, session)
		case !Equal(string(shown[:]), string(row.RefreshHash)):
			if Equal(string(shown[:]), string(row.PreviousHash)) && now.Sub(row.RotatedAt) < overlap {
				refused = fault.New(fault.Conflict, "this refresh token was just used: use the one that replaced it")
				return nil
			}
			s.log.Warn("refresh token used twice: session ended", "session", session, "user", row.UserID)
			refused = errNoSession()
			return q.DeleteSession(ctx, session)
		}
		refresh, hash := newRefresh(session)
		expires := now.Add(RefreshLasts)
		if end := row.CreatedAt.Add(sessionLasts); expires.After(end) {
			expires = end
		}
		if err := q.RotateSession(ctx, db.RotateSessionParams{ID: session, RefreshHash: hash, RotatedAt: now, ExpiresAt: expires}); err != nil {
			return err
		}
		g, err = s.grant(row.UserID, session, refresh, now, expires)
		return err
	})
	if err == nil {
		err = refused
	}
	var f *fault.Error
	if err != nil && !errors.As(err, &f) {
		err = fmt.Errorf("refresh session: %w", err)
	}
	return g, err
}

// parse returns the user and the session of a valid access token.
func (s *Sessions) parse(token string) (user, session uuid.UUID, err error) {
	var c claims
	_, err = jwt.ParseWithClaims(token, &c, func(*jwt.Token) (any, error) { return s.key, nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}), jwt.WithIssuer(issuer), jwt.WithExpirationRequired())
	if err != nil {
		return user, session, fault.Because(err, fault.Unauthenticated, "not logged in, or no longer")
	}
	if user, err = uuid.Parse(c.Subject); err == nil {
		session, err = uuid.Parse(c.Session)
	}
	if err != nil {
		err = errNoSession()
	}
	return user, session, err
}

// Check returns the holder of an access token, acting for the given team, or for the
// first team they joined if team is nil. A token is not valid after its session ended.
func (s *Sessions) Check(ctx context.Context, token string, team *uuid.UUID) (Principal, error) {
	user, session, err := s.parse(token)
	if err != nil {
		return Principal{}, err
	}
	return s.caller(ctx, user, session, team)
}

// Again looks up again a caller whom [Sessions.Check] returned, for the same team. It
// fails with unauthenticated if their session ended or their rights were revoked since
// then, even if they were restored.
func (s *Sessions) Again(ctx context.Context, who Principal) (Principal, error) {
	team := &who.Team
	if who.Team == uuid.Nil {
		team = nil
	}
	now, err := s.caller(ctx, who.User, who.Session, team)
	if err == nil {
		err = who.since(now)
	}
	return now, err
}

func (s *Sessions) caller(ctx context.Context, user, session uuid.UUID, team *uuid.UUID) (Principal, error) {
	row, err := s.store.GetCaller(ctx, db.GetCallerParams{Session: session, UserID: user, Team: team})
	if errors.Is(err, store.ErrNoRows) {
		return Principal{}, errNoSession()
	}
	if err != nil {
		return Principal{}, fmt.Errorf("look up session: %w", err)
	}
	return Principal{
		Team: row.TeamID, Payer: row.Payer, Role: Role(row.Role), User: user, Session: session, Email: row.Email, Platform: row.Admin,
		epoch: row.Epoch, joined: row.JoinedAt,
	}, nil
}

// End ends the session of an access or refresh token and returns its user. If the token
// is not valid, it ends nothing and returns [uuid.Nil].
func (s *Sessions) End(ctx context.Context, token string) (user uuid.UUID, err error) {
	session, ok := refreshSession(token)
	if ok {
		row, err := s.store.LockSession(ctx, session)
		if errors.Is(err, store.ErrNoRows) {
			return uuid.Nil, nil
		}
		if err != nil {
			return uuid.Nil, fmt.Errorf("look up session: %w", err)
		}
		shown := sha256.Sum256([]byte(token))
		if !Equal(string(shown[:]), string(row.RefreshHash)) && !Equal(string(shown[:]), string(row.PreviousHash)) {
			return uuid.Nil, nil
		}
		user = row.UserID
	} else if user, session, err = s.parse(token); err != nil {
		return uuid.Nil, nil
	}
	if err := s.store.DeleteSession(ctx, session); err != nil {
		return user, fmt.Errorf("end session: %w", err)
	}
	return user, nil
}

// EndAll ends all sessions of a user except keep (uuid.Nil: none).
func (s *Sessions) EndAll(ctx context.Context, user, keep uuid.UUID) error {
	if err := s.store.DeleteUserSessions(ctx, db.DeleteUserSessionsParams{UserID: user, Keep: keep}); err != nil {
		return fmt.Errorf("end sessions: %w", err)
	}
	return nil
}

// Run deletes expired sessions, mail tokens and unconfirmed users until ctx is done.
func (s *Sessions) Run(ctx context.Context) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		if err := errors.Join(s.store.DeleteOldSessions(ctx), s.store.DeleteOldMailTokens(ctx), s.store.DeleteUnverifiedUsers(ctx)); err != nil && ctx.Err() == nil {
			s.log.Warn("delete expired sessions", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
