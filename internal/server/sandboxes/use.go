package sandboxes

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// Live returns a team's running sandbox and its host. It fails with
// not_found, or with conflict when the sandbox is in another state.
func (s *Service) Live(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, *hosts.Host, error) {
	row, err := s.Get(ctx, team, sandbox)
	if err != nil {
		return row, nil, err
	}
	if State(row.State) != Running {
		return row, nil, notRunning(row)
	}
	host, err := s.Hosts.Get(row.HostID)
	return row, host, err
}

func notRunning(row db.Sandbox) error {
	switch State(row.State) {
	case Missing:
		return fault.New(fault.HostUnreachable, "the sandbox's host is not heard of")
	case Failed:
		return fault.New(fault.Conflict, "the sandbox failed to start")
	case Pending, Starting, Stopping:
		return fault.New(fault.Conflict, "the sandbox is %s", row.State)
	}
	if row.EndReason != nil {
		return fault.New(fault.Conflict, "the sandbox is stopped (%s)", *row.EndReason)
	}
	return fault.New(fault.Conflict, "the sandbox is stopped")
}

// Ping extends the life of a team's sandbox by its timeout from now.
func (s *Service) Ping(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	_, host, err := s.Live(ctx, team, sandbox)
	if err != nil {
		return db.Sandbox{}, err
	}
	ask, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	answer, err := host.Agent.Ping(ask, connect.NewRequest(&hostagentv1.PingRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
	if err != nil {
		return db.Sandbox{}, hosts.Fault(err)
	}
	row, err := s.Store.SandboxExpires(ctx, db.SandboxExpiresParams{ID: sandbox, ExpiresAt: expiry(answer.Msg.GetSandbox())})
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.Conflict, "the sandbox is stopping")
	}
	if err != nil {
		return row, fmt.Errorf("write sandbox's expiry: %w", err)
	}
	return row, nil
}

// Metrics returns what a team's sandbox uses now.
func (s *Service) Metrics(ctx context.Context, team, sandbox uuid.UUID) (*hostagentv1.MetricsResponse, error) {
	_, host, err := s.Live(ctx, team, sandbox)
	if err != nil {
		return nil, err
	}
	ask, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	answer, err := host.Agent.Metrics(ask, connect.NewRequest(&hostagentv1.MetricsRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
	if err != nil {
		return nil, hosts.Fault(err)
	}
	return answer.Msg, nil
}

// Console returns the last output of a team's sandbox's serial console.
func (s *Service) Console(ctx context.Context, team, sandbox uuid.UUID) ([]byte, error) {
	_, host, err := s.Live(ctx, team, sandbox)
	if err != nil {
		return nil, err
	}
	ask, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	answer, err := host.Agent.Console(ask, connect.NewRequest(&hostagentv1.ConsoleRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
	if err != nil {
		return nil, hosts.Fault(err)
	}
	return answer.Msg.Output, nil
}

// Exec runs a command in a team's sandbox to its end.
func (s *Service) Exec(ctx context.Context, team, sandbox uuid.UUID, c *hostagentv1.Command, stdin []byte) (*hostagentv1.ExecResponse, error) {
	_, host, err := s.Live(ctx, team, sandbox)
	if err != nil {
		return nil, err
	}
	answer, err := host.Agent.Exec(ctx, connect.NewRequest(&hostagentv1.ExecRequest{SandboxId: id.Format(id.Sandbox, sandbox), Command: c, Stdin: stdin}))
	if err != nil {
		return nil, hosts.Fault(err)
	}
	return answer.Msg, nil
}
