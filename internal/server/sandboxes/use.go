package sandboxes

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// Use returns the host of a team's running sandbox and counts as a use: it restarts the
// sandbox's timeout, so that a request that cannot be repeated arrives. It resumes a
// paused sandbox that calls may resume. It fails with not_found, with sandbox_paused, or
// with conflict if the sandbox is in another state.
func (s *Service) Use(ctx context.Context, team, sandbox uuid.UUID) (*hosts.Host, error) {
	_, host, err := s.ping(ctx, team, sandbox)
	return host, err
}

// Wake is [Service.Use] without a call to the host: it trusts the state in the database.
func (s *Service) Wake(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, *hosts.Host, error) {
	row, err := s.Get(ctx, team, sandbox)
	if err != nil {
		return row, nil, err
	}
	if row, err = s.wake(ctx, row, false); err != nil {
		return row, nil, err
	}
	host, err := s.Hosts.Get(row.HostID)
	return row, host, err
}

// Refused is [Service.Wake] after the host refused a call because of the sandbox's state,
// which the database does not have yet.
func (s *Service) Refused(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, *hosts.Host, error) {
	if err := s.refresh(ctx, sandbox, true); err != nil {
		return db.Sandbox{}, nil, err
	}
	return s.Wake(ctx, team, sandbox)
}

// Tries is how often a call or a request is attempted if its sandbox is paused at the same
// time.
const Tries = 3

// place is where a team's sandbox runs.
type place struct{ team, host uuid.UUID }

// locate is [Service.Wake] that believes what this server heard last of a running
// sandbox; sure says that it has looked at the table.
func (s *Service) locate(ctx context.Context, team, sandbox uuid.UUID) (host *hosts.Host, sure bool, err error) {
	at, err := s.known.Get(ctx, sandbox, func(ctx context.Context, sandbox uuid.UUID) (place, bool, error) {
		sure = true
		row, found, err := s.Wake(ctx, team, sandbox)
		if err != nil {
			return place{}, false, err
		}
		host = found
		return place{team, host.ID}, State(row.State) == Running, nil
	})
	if err != nil || sure {
		return host, sure, err
	}
	if at.team == team {
		if host, err = s.Hosts.Get(&at.host); err == nil {
			return host, false, nil
		}
	}
	_, host, err = s.Wake(ctx, team, sandbox)
	return host, true, err
}

// call calls the host of a team's sandbox. It resumes a paused sandbox first.
func (s *Service) call(ctx context.Context, team, sandbox uuid.UUID, f func(*hosts.Host) error) error {
	host, sure, err := s.locate(ctx, team, sandbox)
	for try := 1; err == nil; try++ {
		err = f(host)
		switch {
		case try == Tries:
			return hosts.Fault(err)
		case refusedState(err):
			sure = true
			_, host, err = s.Refused(ctx, team, sandbox)
		case !sure && unknown(err):
			// The word of its end, or of its move to another host, is still on its way.
			sure = true
			s.known.Drop(sandbox)
			_, host, err = s.Wake(ctx, team, sandbox)
		default:
			return hosts.Fault(err)
		}
	}
	return err
}

// unknown reports whether a host does not have a sandbox, so that it has done nothing.
func unknown(err error) bool {
	var e *connect.Error
	return errors.As(err, &e) && e.Code() == connect.CodeNotFound && e.Meta().Get(hostwire.ErrorReason) == ""
}

// peek calls the host of a team's running sandbox. It does not resume a paused one, and
// does not count as a use.
func (s *Service) peek(ctx context.Context, team, sandbox uuid.UUID, f func(context.Context, *hosts.Host) error) error {
	row, err := s.Get(ctx, team, sandbox)
	if err != nil {
		return err
	}
	if State(row.State) != Running {
		return notRunning(row)
	}
	host, err := s.Hosts.Get(row.HostID)
	if err != nil {
		return err
	}
	ask, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	err = f(ask, host)
	if !refusedState(err) {
		return hosts.Fault(err)
	}
	if err := s.refresh(ctx, sandbox, false); err != nil {
		return err
	}
	if row, again := s.Get(ctx, team, sandbox); again == nil && State(row.State) != Running {
		return notRunning(row)
	}
	return hosts.Fault(err)
}

func notRunning(row db.Sandbox) error {
	switch State(row.State) {
	case Missing:
		return fault.New(fault.HostUnreachable, "the sandbox's host is unreachable")
	case Failed:
		return fault.New(fault.Conflict, "the sandbox failed to start")
	case Pausing, Paused:
		return fault.New(fault.SandboxPaused, "the sandbox is %s: resume it first", row.State)
	case Pending, Starting, Resuming, Stopping:
		return fault.New(fault.Conflict, "the sandbox is %s", row.State)
	case Running, Stopped, refreshing, rebooting:
	}
	if row.EndedBecause != nil {
		return fault.New(fault.Conflict, "the sandbox is stopped (%s)", *row.EndedBecause)
	}
	return fault.New(fault.Conflict, "the sandbox is stopped")
}

// Ping restarts the timeout of a team's sandbox. Like any use, it resumes a paused
// sandbox.
func (s *Service) Ping(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	pinged, host, err := s.ping(ctx, team, sandbox)
	if err != nil {
		return db.Sandbox{}, err
	}
	row, err := s.Lookup(ctx, sandbox)
	if err != nil {
		return row, err
	}
	row, err = s.Store.SandboxExpires(ctx, db.SandboxExpiresParams{ID: sandbox, HostID: &host.ID, ExpiresAt: Expiry(row, pinged, store.Now())})
	if errors.Is(err, store.ErrNoRows) {
		// Its state is changing.
		return s.Get(ctx, team, sandbox)
	}
	if err != nil {
		return row, fmt.Errorf("update sandbox's expiry: %w", err)
	}
	return row, nil
}

func (s *Service) ping(ctx context.Context, team, sandbox uuid.UUID) (pinged *hostagentv1.Sandbox, at *hosts.Host, err error) {
	err = s.call(ctx, team, sandbox, func(host *hosts.Host) error {
		ask, cancel := context.WithTimeout(ctx, shortCall)
		defer cancel()
		answer, err := host.Agent.Ping(ask, connect.NewRequest(&hostagentv1.PingRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
		if err == nil {
			pinged, at = answer.Msg.GetSandbox(), host
		}
		return err
	})
	return pinged, at, err
}

// RevokeTokens revokes the tokens of a team's sandbox and ends the streams that use them.
// It returns the sandbox with its new tokens.
func (s *Service) RevokeTokens(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	row, err := found(s.Store.RevokeTokens(ctx, db.RevokeTokensParams{ID: sandbox, TeamID: team}))
	if err == nil {
		s.changed(sandbox)
	}
	return row, err
}

// Metrics returns the current resource use of a team's sandbox.
func (s *Service) Metrics(ctx context.Context, team, sandbox uuid.UUID) (*hostagentv1.MetricsResponse, error) {
	var m *hostagentv1.MetricsResponse
	err := s.peek(ctx, team, sandbox, func(ctx context.Context, host *hosts.Host) error {
		answer, err := host.Agent.Metrics(ctx, connect.NewRequest(&hostagentv1.MetricsRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
		if err == nil {
			m = answer.Msg
		}
		return err
	})
	return m, err
}

// Console returns the last output of a sandbox's serial console.
func (s *Service) Console(ctx context.Context, team, sandbox uuid.UUID) ([]byte, error) {
	var output []byte
	err := s.peek(ctx, team, sandbox, func(ctx context.Context, host *hosts.Host) error {
		answer, err := host.Agent.Console(ctx, connect.NewRequest(&hostagentv1.ConsoleRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
		if err == nil {
			output = answer.Msg.Output
		}
		return err
	})
	return output, err
}
