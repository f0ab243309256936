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

// confirmLasts is how long the link of a letter that asks for confirmation is good for.
const confirmLasts = 24 * time.Hour

// The recipients of these letters did not ask for them. One mailbox can have many
// addresses, so there is also a bound for all teams of one owner.
var (
	limitAddress = ratelimit.Limit{Name: "confirm-address", Burst: 1, Per: time.Hour}
	limitLetters = ratelimit.Limit{Name: "confirm-letters", Burst: 20, Per: 24 * time.Hour}
)

// errUnconfirmed is the error of a mail channel that its recipient has not confirmed.
var errUnconfirmed = errors.New("the recipient has not confirmed the address")

// Confirmed reports whether a channel may get messages.
func Confirmed(c db.Channel) bool { return c.Kind != Email || c.ConfirmedAt != nil }

// confirmation is the token of a letter; the zero confirmation sends none.
type confirmation struct {
	token string
	hash  []byte
	until *time.Time
}

// confirmation makes a confirmation for a team's address, or fails with rate_limited.
// It returns the zero confirmation if the address is confirmed for the team already.
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
	// First, so that a payer who may send no letter does not use up the address's.
	if err := s.Limiter.Allow(ctx, limitLetters, payer.String()); err != nil {
		return confirmation{}, err
	}
	if err := s.Limiter.Allow(ctx, limitAddress, strings.ToLower(address)); err != nil {
		return confirmation{}, err
	}
	token, hash := mail.NewToken("wrc_")
	until := time.Now().Add(confirmLasts)
	return confirmation{token, hash, &until}, nil
}

// ask sends the letter. It contains nothing that the team wrote, so that nobody can
// send their own text to strangers.
func (s *Service) ask(row db.Channel, c confirmation) {
	if c.token == "" || Confirmed(row) {
		return
	}
	s.Mail.Send(mail.Letter{
		To: row.Target, Subject: "Confirm notifications of Wrenn",
		Text: "A team of the Wrenn service at " + strings.TrimSuffix(s.PublicURL, "/") + " (" + id.Format(id.Team, row.TeamID) + ") wants to send its notifications to this address.\n" +
			"If you want them, confirm that within a day:\n\n" + mail.Link(s.PublicURL, "/confirm-channel", c.token) +
			"\n\nIf you do not know the team, there is nothing to do: you get no notifications.\n",
	})
}

// AskConfirmation sends the letter of an unconfirmed channel again, with another
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
	if c.token == "" { // Confirmed by now, and this channel with it.
		return none
	}
	n, err := s.Store.AskConfirmation(ctx, db.AskConfirmationParams{ID: row.ID, Target: row.Target, ConfirmHash: c.hash, ConfirmUntil: c.until})
	if err != nil {
		return fmt.Errorf("write confirmation: %w", err)
	}
	if n == 0 {
		return none
	}
	s.ask(row, c)
	return nil
}

// Confirm confirms the address of the channel whose mailed token this is, for all of
// the team's channels. It fails with unauthenticated for any other token.
func (s *Service) Confirm(ctx context.Context, token string) error {
	n, err := s.Store.ConfirmChannel(ctx, mail.HashToken(token))
	if err != nil {
		return fmt.Errorf("confirm channel: %w", err)
	}
	if n == 0 {
		return fault.New(fault.Unauthenticated, "the link is not valid, or no longer")
	}
	return nil
}
