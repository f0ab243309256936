package mail

import (
	"context"
	"errors"
)

// ErrNoServer is the error of [Sender.SendNow] if no mail server is configured.
var ErrNoServer = errors.New("no mail server is configured")

// SendNow makes one attempt to send a mail and returns after the mail server has accepted
// it.
func (s *Sender) SendNow(ctx context.Context, message Message) error {
	if s.client == nil {
		return ErrNoServer
	}
	return s.try(ctx, message)
}
