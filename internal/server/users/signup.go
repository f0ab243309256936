package users

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/mail"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// The purposes of links in mails.
const (
	verify = "verify"
	reset  = "reset"
)

// verifyLasts is how long a link that verifies an address is valid.
const verifyLasts = 24 * time.Hour

// prefixes and pages map a purpose to the prefix of its tokens and to the page that the
// link opens.
var (
	prefixes = map[string]string{verify: "wrv_", reset: "wrp_"}
	pages    = map[string]string{verify: "/verify", reset: "/reset-password"}
)

// newLink creates and stores the token for a link in a mail to a user.
func newLink(ctx context.Context, q *db.Queries, user uuid.UUID, purpose string, lasts time.Duration) (token string, err error) {
	token, hash := mail.NewToken(prefixes[purpose])
	return token, q.InsertMailToken(ctx, db.InsertMailTokenParams{Hash: hash, UserID: user, Purpose: purpose, ExpiresAt: time.Now().Add(lasts)})
}

func (s *Service) link(purpose, token string) string {
	return mail.Link(s.PublicURL, pages[purpose], token)
}

func errTaken() error {
	return fault.New(fault.Conflict, "an account with this e-mail address exists")
}

func errClosed() error {
	return fault.New(fault.PermissionDenied, "sign-up is closed: ask the platform's admin for an account")
}

func errFirst() error {
	return fault.New(fault.PermissionDenied, "token: the first account becomes the platform's admin and needs the token from the server's log")
}

// claim creates an account with an unverified address. It takes over an existing account
// whose address was never verified, because its creator may not own the address. It fails
// with conflict if the address is verified.
func claim(ctx context.Context, q *db.Queries, email string, hash *string, admin bool) (uuid.UUID, error) {
	is, err := q.GetUserByEmail(ctx, email)
	switch {
	case errors.Is(err, store.ErrNoRows):
		user := uuid.New()
		return user, q.InsertUser(ctx, db.InsertUserParams{ID: user, Email: email, PasswordHash: hash, Admin: admin})
	case err != nil:
		return is.ID, err
	case is.VerifiedAt != nil:
		return is.ID, errTaken()
	}
	if err := q.DeleteVerifyTokens(ctx, is.ID); err != nil {
		return is.ID, err
	}
	return is.ID, q.SignUpAgain(ctx, db.SignUpAgainParams{ID: is.ID, PasswordHash: hash, Admin: admin})
}

// open marks an account's address verified, and creates the user's own team the first
// time.
func open(ctx context.Context, q *db.Queries, user uuid.UUID) error {
	n, err := q.VerifyUser(ctx, user)
	if err != nil || n == 0 {
		return err
	}
	row, err := q.GetUser(ctx, user)
	if err != nil {
		return err
	}
	team := uuid.New()
	name, _, _ := strings.Cut(row.Email, "@")
	if err := q.InsertTeam(ctx, db.InsertTeamParams{ID: team, Name: name}); err != nil {
		return err
	}
	return q.InsertTeamMember(ctx, db.InsertTeamMemberParams{TeamID: team, UserID: user, Role: string(auth.Owner)})
}

// SignUpOpen reports whether anybody may sign up.
func (s *Service) SignUpOpen(ctx context.Context) (bool, error) {
	settings, err := s.Store.GetSettings(ctx)
	if err != nil {
		return false, fmt.Errorf("read settings: %w", err)
	}
	if settings.SignupOpen {
		return true, nil
	}
	return s.NobodyYet(ctx)
}

// NobodyYet reports whether there are no users yet.
func (s *Service) NobodyYet(ctx context.Context) (bool, error) {
	n, err := s.Store.CountUsers(ctx)
	if err != nil {
		return false, fmt.Errorf("count users: %w", err)
	}
	return n == 0, nil
}

// SignUp creates an account and mails a link that opens it. If the address already has an
// account, only the mail says so, not the response. The first user becomes the platform's
// admin, and SignUp logs them in at once (g is not nil). It fails with permission_denied
// if sign-up is closed, or if the first user lacks Config.FirstToken.
func (s *Service) SignUp(ctx context.Context, email, password, token string, from Origin) (g *auth.Grant, user db.User, err error) {
	if err := checkEmail(email); err != nil {
		return nil, user, err
	}
	may, err := s.SignUpOpen(ctx)
	if err != nil {
		return nil, user, err
	}
	if !may {
		return nil, user, errClosed()
	}
	if err := s.Limiter.Allow(ctx, limitSignUp, strings.ToLower(email)); err != nil {
		return nil, user, err
	}
	hash, err := s.hash(ctx, password)
	if err != nil {
		return nil, user, err
	}
	var message mail.Message
	err = s.join(ctx, func(q *db.Queries, first bool) error {
		g = nil
		if first && !auth.Equal(token, s.FirstToken) {
			return errFirst()
		}
		made, err := claim(ctx, q, email, &hash, first)
		if fault.Is(err, fault.Conflict) {
			message = mail.Message{To: email, Subject: "Your Wrenn account", Text: "Somebody, probably you, signed up with this address, which has an account.\nLog in at " + s.PublicURL + "; if you forgot the password, ask for a new one there.\n"}
			return nil
		}
		if err != nil {
			return err
		}
		if !first {
			message, err = s.verifyMail(ctx, q, made, email)
			return err
		}
		if err := open(ctx, q, made); err != nil {
			return err
		}
		if user, err = q.GetUser(ctx, made); err != nil {
			return err
		}
		grant, err := s.Sessions.Start(ctx, q, made, from.Agent, from.Address)
		g = &grant
		return err
	})
	if err != nil {
		return nil, user, err
	}
	if g == nil {
		s.Mail.Send(message)
	}
	return g, user, nil
}

func (s *Service) verifyMail(ctx context.Context, q *db.Queries, user uuid.UUID, email string) (mail.Message, error) {
	token, err := newLink(ctx, q, user, verify, verifyLasts)
	return mail.Message{To: email, Subject: "Your Wrenn account", Text: "Somebody, probably you, signed up with this address.\nOpen the account within a day, with the password that you chose:\n\n" + s.link(verify, token) + "\n\nIf it was not you, there is nothing to do.\n"}, err
}

// remind mails a new link that verifies an address.
func (s *Service) remind(ctx context.Context, user db.User) error {
	if err := s.Limiter.Allow(ctx, limitForgot, "verify:"+user.ID.String()); err != nil {
		return err
	}
	message, err := s.verifyMail(ctx, s.Store.Queries, user.ID, user.Email)
	if err != nil {
		return fmt.Errorf("create link: %w", err)
	}
	s.Mail.Send(message)
	return nil
}

// join runs f, which creates an account, if sign-up is open, under a lock. first reports
// that there are no users yet.
func (s *Service) join(ctx context.Context, f func(q *db.Queries, first bool) error) error {
	err := s.Store.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockBootstrap(ctx); err != nil {
			return err
		}
		n, err := q.CountUsers(ctx)
		if err != nil {
			return err
		}
		settings, err := q.GetSettings(ctx)
		if err != nil {
			return err
		}
		if n > 0 && !settings.SignupOpen {
			return errClosed()
		}
		return f(q, n == 0)
	})
	if store.Duplicate(err) {
		return errTaken()
	}
	return wrap(err, "create account")
}

// joinGitHub creates an account for an identity on GitHub, which has verified the
// address, and logs it in.
func (s *Service) joinGitHub(ctx context.Context, subject, email string, from Origin) (g auth.Grant, err error) {
	if err := checkEmail(email); err != nil {
		return g, err
	}
	err = s.join(ctx, func(q *db.Queries, first bool) error {
		if first {
			return errFirst()
		}
		made, err := claim(ctx, q, email, nil, false)
		if err != nil {
			return err
		}
		if err := q.DeleteMailTokens(ctx, made); err != nil {
			return err
		}
		if err := open(ctx, q, made); err != nil {
			return err
		}
		n, err := q.InsertIdentity(ctx, db.InsertIdentityParams{Provider: github, Subject: subject, UserID: made})
		if err == nil && n == 0 {
			err = errors.New("identity was linked by a concurrent request")
		}
		if err != nil {
			return err
		}
		g, err = s.Sessions.Start(ctx, q, made, from.Agent, from.Address)
		return err
	})
	return g, err
}

// Verify opens the account of a mailed link and logs its user in. It also needs the
// password: the reader of the mail may not be the one who signed up, and must not open an
// account whose password a stranger knows.
func (s *Service) Verify(ctx context.Context, token, password string, from Origin) (g auth.Grant, user db.User, err error) {
	invalid := fault.New(fault.Unauthenticated, "the link is not valid or has expired, or the password is wrong")
	if !strings.HasPrefix(token, prefixes[verify]) {
		return g, user, invalid
	}
	hash := mail.HashToken(token)
	of, err := s.Store.GetMailToken(ctx, db.GetMailTokenParams{Hash: hash, Purpose: verify})
	if errors.Is(err, store.ErrNoRows) {
		return g, user, invalid
	}
	if err != nil {
		return g, user, fmt.Errorf("look up link: %w", err)
	}
	if err := s.Limiter.Allow(ctx, limitGuesses, "verify:"+of.String()); err != nil {
		return g, user, err
	}
	if user, err = s.Store.GetUser(ctx, of); err != nil {
		return g, user, fmt.Errorf("look up user: %w", err)
	}
	ok, err := s.check(ctx, user.PasswordHash, password)
	if err != nil {
		return g, user, fmt.Errorf("check password: %w", err)
	}
	if !ok {
		return g, user, invalid
	}
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		now, err := q.LockUser(ctx, of)
		if err != nil {
			return err
		}
		if !now.Active || now.PasswordHash == nil || *now.PasswordHash != *user.PasswordHash {
			return invalid
		}
		if _, err := q.TakeMailToken(ctx, db.TakeMailTokenParams{Hash: hash, Purpose: verify}); err != nil {
			return err
		}
		if err := q.DeleteVerifyTokens(ctx, of); err != nil {
			return err
		}
		if err := open(ctx, q, of); err != nil {
			return err
		}
		g, err = s.Sessions.Start(ctx, q, of, from.Agent, from.Address)
		return err
	})
	if errors.Is(err, store.ErrNoRows) {
		return g, user, invalid
	}
	return g, user, wrap(err, "verify address")
}
