package mail

import (
	"context"
	"errors"
)

// ErrNoServer is what SendNow returns where no mail server is configured.
var ErrNoServer = errors.New("no mail server is configured")

// SendNow tries once to send a letter, and returns when the mail server has it.
func (s *Sender) SendNow(ctx context.Context, l Letter) error {
	if s.client == nil {
		return ErrNoServer
	}
	return s.try(ctx, l)
}
