package notify

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/mail"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
)

// confirmLasts is how long the link in a confirmation mail is valid.
const confirmLasts = 24 * time.Hour

// Recipients did not ask for these mails. One mailbox can have many addresses, so all
// teams of one owner share a limit too.
var (
	limitAddress = ratelimit.Limit{Name: "confirm-address", Burst: 1, Per: time.Hour}
	// The name is also that of the counts in Redis, so a new one would reset them.
	limitMails = ratelimit.Limit{Name: "confirm-letters", Burst: 20, Per: 24 * time.Hour}
)

// errUnconfirmed is the error of a mail channel that its recipient has not confirmed.
var errUnconfirmed = errors.New("the recipient has not confirmed the address")

// Confirmed reports whether a channel may get messages.
func Confirmed(c db.Channel) bool { return c.Kind != Email || c.ConfirmedAt != nil }

// confirmation is the token for a confirmation mail. If it is zero, no mail is sent.
type confirmation struct {
	token string
	hash  []byte
	until *time.Time
}

// confirmation creates a token to confirm a team's address, or fails with rate_limited.
// It returns zero if the team has already confirmed the address.
func (s *Service) confirmation(ctx context.Context, team uuid.UUID, address string) (confirmation, error) {
	confirmed, err := s.Store.AddressConfirmed(ctx, db.AddressConfirmedParams{TeamID: team, Address: address})
	if err != nil {
		return confirmation{}, fmt.Errorf("look up address: %w", err)
	}
	if confirmed {
		return confirmation{}, nil
	}
	payer, err := s.Store.GetTeamPayer(ctx, team)
	if err != nil {
		return confirmation{}, fmt.Errorf("look up owner: %w", err)
	}
	// Check this limit first, so that a payer who exceeds it does not use up the
	// address's.
	if err := s.Limiter.Allow(ctx, limitMails, payer.String()); err != nil {
		return confirmation{}, err
	}
	if err := s.Limiter.Allow(ctx, limitAddress, strings.ToLower(address)); err != nil {
		return confirmation{}, err
	}
	token, hash := mail.NewToken("wrc_")
	until := time.Now().Add(confirmLasts)
	return confirmation{token, hash, &until}, nil
}

// ask sends the confirmation mail. The mail contains nothing that the team wrote, so that
// nobody can send their own text to strangers.
func (s *Service) ask(row db.Channel, c confirmation) {
	if c.token == "" || Confirmed(row) {
		return
	}
	s.Mail.Send(mail.Message{
		To: row.Target, Subject: "Confirm notifications of Wrenn",
		Text: "A team of the Wrenn service at " + strings.TrimSuffix(s.PublicURL, "/") + " (" + id.Format(id.Team, row.TeamID) + ") wants to send its notifications to this address.\n" +
			"If you want them, confirm that within a day:\n\n" + mail.Link(s.PublicURL, "/confirm-channel", c.token) +
			"\n\nIf you do not know the team, there is nothing to do: you get no notifications.\n",
	})
}

// AskConfirmation sends an unconfirmed channel's confirmation mail again, with a new
// link. It fails with conflict if there is nothing to confirm.
func (s *Service) AskConfirmation(ctx context.Context, team, channel uuid.UUID) error {
	none := fault.New(fault.Conflict, "the channel needs no confirmation")
	row, err := s.Get(ctx, team, channel)
	if err != nil {
		return err
	}
	if Confirmed(row) {
		return none
	}
	c, err := s.confirmation(ctx, team, row.Target)
	if err != nil {
		return err
	}
	if c.token == "" { // A concurrent request confirmed the address.
		return none
	}
	n, err := s.Store.AskConfirmation(ctx, db.AskConfirmationParams{ID: row.ID, Target: row.Target, ConfirmHash: c.hash, ConfirmUntil: c.until})
	if err != nil {
		return fmt.Errorf("update confirmation: %w", err)
	}
	if n == 0 {
		return none
	}
	s.ask(row, c)
	return nil
}

// Confirm confirms the address of the channel that the mailed token belongs to, for all
// channels of the team. It fails with unauthenticated if the token is not valid.
func (s *Service) Confirm(ctx context.Context, token string) error {
	n, err := s.Store.ConfirmChannel(ctx, mail.HashToken(token))
	if err != nil {
		return fmt.Errorf("confirm channel: %w", err)
	}
	if n == 0 {
		return fault.New(fault.Unauthenticated, "the link is not valid or has expired")
	}
	return nil
}
