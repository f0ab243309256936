// Package users has the rules of accounts: sign-up, login, and password resets.
package users

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/mail"
	"github.com/wrenn-dev/wrenn/internal/server/page"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// Rate limits. Guesses are counted per network, so that a stranger cannot lock a user out
// elsewhere, and in total.
var (
	limitGuesses = ratelimit.Limit{Name: "account", Burst: 10, Per: 5 * time.Minute}
	limitAccount = ratelimit.Limit{Name: "account-everywhere", Burst: 200, Per: 5 * time.Minute}
	limitForgot  = ratelimit.Limit{Name: "forgot", Burst: 3, Per: time.Hour}
	limitSignUp  = ratelimit.Limit{Name: "signup", Burst: 5, Per: time.Hour}
	limitFind    = ratelimit.Limit{Name: "find", Burst: 60, Per: time.Minute}
)

const (
	// resetWithin bounds the creation of one link, because others wait for it.
	resetWithin = 5 * time.Second
	// resetLasts is how long a requested reset link is valid, inviteLasts one that an
	// admin created.
	resetLasts  = time.Hour
	inviteLasts = 24 * time.Hour
	// github is GitHub's name as a provider of identities.
	github = "github"
)

// Config configures a [Service].
type Config struct {
	// FirstToken is the token that the first sign-up needs, which creates the platform's
	// admin.
	FirstToken string
	Store      *store.Store
	Sessions   *auth.Sessions
	Limiter    *ratelimit.Limiter
	Mail       *mail.Sender
	// PublicURL is the service's URL in mails.
	PublicURL string
	// PasswordCost is the cost of password hashes.
	PasswordCost auth.Cost
	Log          *slog.Logger
}

// Service manages all accounts.
type Service struct {
	Config
	// hashing limits concurrent password hashes, each of which takes 64 MiB.
	hashing chan struct{}
	// nobody is a hash to check for users that do not exist, so that the response takes
	// as long as for others.
	nobody string
	// forgotten queues the addresses that want reset links.
	forgotten chan string
}

// New returns a service. [Service.Run] sends reset links.
func New(c Config) *Service {
	return &Service{
		Config: c, hashing: make(chan struct{}, max(2, runtime.NumCPU())),
		nobody: c.PasswordCost.Hash(rand.Text()), forgotten: make(chan string, 256),
	}
}

// Run sends requested reset links until ctx is done. It is separate from the request, so
// that the response time does not reveal whether an account exists.
func (s *Service) Run(ctx context.Context) {
	for {
		select {
		case email := <-s.forgotten:
			err := fault.Guard(s.Log, func() error { return s.sendReset(ctx, email) })
			if err != nil && ctx.Err() == nil {
				s.Log.Error("send reset link", "error", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// Origin is the client of a call, for the user's list of sessions.
type Origin struct{ Agent, Address string }

// network returns the key for rate limits of the origin's network.
func (o Origin) network() string {
	if a, err := netip.ParseAddr(o.Address); err == nil {
		return ratelimit.Address(a)
	}
	return o.Address
}

func checkEmail(email string) error {
	bad := func(r rune) bool { return unicode.IsControl(r) || unicode.IsSpace(r) }
	local, domain, ok := strings.Cut(email, "@")
	if !ok || local == "" || domain == "" || len(email) > 254 || !utf8.ValidString(email) || strings.ContainsFunc(email, bad) || strings.ContainsAny(email, `<>(),;:"\`) {
		return fault.New(fault.InvalidArgument, "email: not an address")
	}
	return nil
}

// hash returns a password's hash. It waits for a place in hashing.
func (s *Service) hash(ctx context.Context, password string) (string, error) {
	select {
	case s.hashing <- struct{}{}:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { <-s.hashing }()
	return s.PasswordCost.Hash(password), nil
}

// check reports whether hash is the hash of password. A nil hash means a user without a
// password.
func (s *Service) check(ctx context.Context, hash *string, password string) (bool, error) {
	select {
	case s.hashing <- struct{}{}:
	case <-ctx.Done():
		return false, ctx.Err()
	}
	defer func() { <-s.hashing }()
	if hash == nil {
		_, err := auth.CheckPassword(s.nobody, password)
		return false, err
	}
	return auth.CheckPassword(*hash, password)
}

// wrap adds the operation to internal errors. Faults stay as they are.
func wrap(err error, doing string) error {
	var f *fault.Error
	if err == nil || errors.As(err, &f) {
		return err
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// LogIn starts a session. All failures of the credentials have the same response and
// timing.
func (s *Service) LogIn(ctx context.Context, email, password string, from Origin) (auth.Grant, db.User, error) {
	var g auth.Grant
	account := strings.ToLower(email)
	here := account + " " + from.network()
	if err := s.Limiter.Allow(ctx, limitGuesses, here); err != nil {
		return g, db.User{}, err
	}
	if err := s.Limiter.Allow(ctx, limitAccount, account); err != nil {
		return g, db.User{}, err
	}
	user, err := s.byEmail(ctx, email)
	if err != nil {
		return g, user, err
	}
	ok, err := s.check(ctx, user.PasswordHash, password)
	if err != nil {
		return g, user, fmt.Errorf("check password: %w", err)
	}
	if !ok || !user.Active {
		return g, user, fault.New(fault.Unauthenticated, "wrong e-mail address or password")
	}
	if user.VerifiedAt == nil {
		if err := s.remind(ctx, user); err != nil {
			return g, user, err
		}
		return g, user, fault.New(fault.PermissionDenied, "the address is not verified: open the link in the mail first")
	}
	s.Limiter.Forget(ctx, limitGuesses, here)
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		// Changing the password takes the same lock, so it ends a session that started
		// with the old one.
		now, err := q.LockUser(ctx, user.ID)
		if err != nil {
			return err
		}
		if !now.Active || now.PasswordHash == nil || *now.PasswordHash != *user.PasswordHash {
			return fault.New(fault.Unauthenticated, "wrong e-mail address or password")
		}
		g, err = s.Sessions.Start(ctx, q, user.ID, from.Agent, from.Address)
		return err
	})
	return g, user, wrap(err, "log in")
}

// byEmail returns the user with an address; zero if there is none.
func (s *Service) byEmail(ctx context.Context, email string) (db.User, error) {
	user, err := s.Store.GetUserByEmail(ctx, email)
	if errors.Is(err, store.ErrNoRows) {
		return db.User{}, nil
	}
	if err != nil {
		return user, fmt.Errorf("look up user: %w", err)
	}
	return user, nil
}

// ChangePassword changes a user's password and ends their other sessions.
func (s *Service) ChangePassword(ctx context.Context, who auth.Principal, current, next string) error {
	if err := s.Limiter.Allow(ctx, limitGuesses, "change:"+who.User.String()); err != nil {
		return err
	}
	user, err := s.Store.GetUser(ctx, who.User)
	if err != nil {
		return fmt.Errorf("look up user: %w", err)
	}
	ok, err := s.check(ctx, user.PasswordHash, current)
	if err != nil {
		return fmt.Errorf("check password: %w", err)
	}
	if !ok {
		return fault.New(fault.PermissionDenied, "wrong current password")
	}
	s.Limiter.Forget(ctx, limitGuesses, "change:"+who.User.String())
	return s.setPassword(ctx, who.User, who.Session, next)
}

// setPassword sets a password, ends all sessions except keep, and deletes reset links.
func (s *Service) setPassword(ctx context.Context, user, keep uuid.UUID, password string) error {
	hash, err := s.hash(ctx, password)
	if err != nil {
		return err
	}
	err = s.Store.InTx(ctx, func(q *db.Queries) error { return setPassword(ctx, q, user, keep, hash) })
	return wrap(err, "set password")
}

func setPassword(ctx context.Context, q *db.Queries, user, keep uuid.UUID, hash string) error {
	if _, err := q.LockUser(ctx, user); err != nil {
		return err
	}
	if err := q.SetUserPassword(ctx, db.SetUserPasswordParams{ID: user, PasswordHash: &hash}); err != nil {
		return err
	}
	if err := q.DeleteMailTokens(ctx, user); err != nil {
		return err
	}
	return q.DeleteUserSessions(ctx, db.DeleteUserSessionsParams{UserID: user, Keep: keep})
}

// ForgotPassword queues a reset link to an address, if it belongs to a user. It fails
// only if its rate limit is exceeded.
func (s *Service) ForgotPassword(ctx context.Context, email string) error {
	if err := s.Limiter.Allow(ctx, limitForgot, strings.ToLower(email)); err != nil {
		return err
	}
	select {
	case s.forgotten <- email:
	default:
		s.Log.Error("queue of reset links is full: dropping one")
	}
	return nil
}

func (s *Service) sendReset(ctx context.Context, email string) error {
	ctx, cancel := context.WithTimeout(ctx, resetWithin)
	defer cancel()
	user, err := s.byEmail(ctx, email)
	if err != nil || !user.Active {
		return err
	}
	token, err := newLink(ctx, s.Store.Queries, user.ID, reset, resetLasts)
	if err != nil {
		return err
	}
	s.Mail.Send(mail.Message{To: user.Email, Subject: "Your Wrenn password", Text: "Somebody, probably you, asked for a new password for your account.\nSet it here within the hour:\n\n" + s.link(reset, token) + "\n\nIf it was not you, there is nothing to do.\n"})
	return nil
}

// ResetPassword sets the password of the user of a reset link and ends their sessions.
// The link also verifies the address. It returns the user.
func (s *Service) ResetPassword(ctx context.Context, token, password string) (user uuid.UUID, err error) {
	invalid := fault.New(fault.Unauthenticated, "the reset link is not valid or has expired")
	if !strings.HasPrefix(token, prefixes[reset]) {
		return user, invalid
	}
	hash, err := s.hash(ctx, password)
	if err != nil {
		return user, err
	}
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		of, err := q.TakeMailToken(ctx, db.TakeMailTokenParams{Hash: mail.HashToken(token), Purpose: reset})
		if errors.Is(err, store.ErrNoRows) {
			return invalid
		}
		if err != nil {
			return err
		}
		if err := setPassword(ctx, q, of, uuid.Nil, hash); err != nil {
			return err
		}
		user = of
		return open(ctx, q, of)
	})
	return user, wrap(err, "reset password")
}

// GitHub logs in the user of an identity on GitHub. If the identity is new and sign-up is
// open, it creates an account. If the address already has an account, it fails with
// conflict, because the address may have changed hands; the account's user can connect
// the identity with [Service.Link].
func (s *Service) GitHub(ctx context.Context, subject, email string, from Origin) (g auth.Grant, err error) {
	user, err := s.Store.GetIdentityUser(ctx, db.GetIdentityUserParams{Provider: github, Subject: subject})
	if errors.Is(err, store.ErrNoRows) {
		return s.joinGitHub(ctx, subject, email, from)
	}
	if err != nil {
		return g, fmt.Errorf("look up identity: %w", err)
	}
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		now, err := q.LockUser(ctx, user.ID)
		if err != nil {
			return err
		}
		if !now.Active {
			return fault.New(fault.Unauthenticated, "the account is not active")
		}
		g, err = s.Sessions.Start(ctx, q, user.ID, from.Agent, from.Address)
		return err
	})
	return g, wrap(err, "log in")
}

// Link connects an identity on GitHub with a user's account.
func (s *Service) Link(ctx context.Context, user uuid.UUID, subject string) error {
	n, err := s.Store.InsertIdentity(ctx, db.InsertIdentityParams{Provider: github, Subject: subject, UserID: user})
	if err != nil {
		return fmt.Errorf("link identity: %w", err)
	}
	if n > 0 {
		return nil
	}
	owner, err := s.Store.GetIdentityUser(ctx, db.GetIdentityUserParams{Provider: github, Subject: subject})
	if err == nil && owner.ID == user {
		return nil
	}
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return fmt.Errorf("look up identity: %w", err)
	}
	return fault.New(fault.Conflict, "this GitHub account, or another one of yours, is already connected")
}

// Account is a user and their ways to log in.
type Account struct {
	db.User
	GitHub bool
}

// Get returns a user.
func (s *Service) Get(ctx context.Context, user uuid.UUID) (Account, error) {
	row, err := s.Store.GetUser(ctx, user)
	if err != nil {
		return Account{}, fmt.Errorf("look up user: %w", err)
	}
	identities, err := s.Store.ListIdentities(ctx, user)
	if err != nil {
		return Account{}, fmt.Errorf("look up identities: %w", err)
	}
	return Account{User: row, GitHub: len(identities) > 0}, nil
}

// pattern returns a LIKE pattern for texts that begin with prefix.
func pattern(prefix string) string {
	return strings.NewReplacer(`\`, `\\`, `%`, `\%`, `_`, `\_`).Replace(strings.ToLower(prefix)) + "%"
}

// Find returns the user with an address, if the caller may add members to a team.
func (s *Service) Find(ctx context.Context, by auth.Principal, email string) ([]db.User, error) {
	if err := s.Limiter.Allow(ctx, limitFind, by.User.String()); err != nil {
		return nil, err
	}
	rows, err := s.Store.FindUser(ctx, db.FindUserParams{Email: email, AskedBy: by.User})
	if err != nil {
		return nil, fmt.Errorf("find user: %w", err)
	}
	return rows, nil
}

// List returns a page of all users, sorted by address, and the cursor of the next page.
func (s *Service) List(ctx context.Context, prefix, cursor string, limit int) ([]db.User, string, error) {
	after, err := page.After(cursor)
	if err != nil {
		return nil, "", err
	}
	rows, err := s.Store.ListUsers(ctx, db.ListUsersParams{Pattern: pattern(prefix), After: after, MaxRows: int32(limit) + 1})
	if err != nil {
		return nil, "", fmt.Errorf("list users: %w", err)
	}
	rows, next := page.Cut(rows, limit, func(u db.User) string { return page.Text(strings.ToLower(u.Email)) })
	return rows, next, nil
}

// Create creates an account for somebody, and mails and returns the link with which they
// set its password.
func (s *Service) Create(ctx context.Context, email string, admin bool) (user db.User, link string, err error) {
	if err := checkEmail(email); err != nil {
		return user, "", err
	}
	var token string
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		made, err := claim(ctx, q, email, nil, admin)
		if err != nil {
			return err
		}
		if token, err = newLink(ctx, q, made, reset, inviteLasts); err != nil {
			return err
		}
		user, err = q.GetUser(ctx, made)
		return err
	})
	if store.Duplicate(err) {
		err = errTaken()
	}
	if err != nil {
		return user, "", wrap(err, "create account")
	}
	link = s.link(reset, token)
	s.Mail.Send(mail.Message{To: email, Subject: "Your Wrenn account", Text: "You have an account. Set its password within a day:\n\n" + link + "\n"})
	return user, link, nil
}

// Change sets whether a user is active and an admin of the platform (nil: unchanged). It
// fails with conflict if no active admin would be left.
func (s *Service) Change(ctx context.Context, user uuid.UUID, active, admin *bool) (db.User, error) {
	var row db.User
	err := s.Store.InTx(ctx, func(q *db.Queries) error {
		// The lock keeps two admins from removing each other.
		if err := q.LockBootstrap(ctx); err != nil {
			return err
		}
		var err error
		row, err = q.UpdateUser(ctx, db.UpdateUserParams{ID: user, Active: active, Admin: admin})
		if errors.Is(err, store.ErrNoRows) {
			return fault.New(fault.NotFound, "no such user")
		}
		if err != nil {
			return err
		}
		if n, err := q.CountAdmins(ctx); err != nil {
			return err
		} else if n == 0 {
			return fault.New(fault.Conflict, "this is the last active admin")
		}
		if row.Active {
			return nil
		}
		if err := q.DeleteMailTokens(ctx, user); err != nil {
			return err
		}
		return q.DeleteUserSessions(ctx, db.DeleteUserSessionsParams{UserID: user})
	})
	return row, wrap(err, "update user")
}
