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
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// needs is what the host of a sandbox must have.
func (p CreateParams) needs() scheduler.Request {
	return scheduler.Request{MemoryMiB: int64(p.MemoryMiB), VCPUs: int64(p.VCPUs), Tags: p.HostTags}
}

// places returns the hosts that a sandbox of a template may start on. Where
// none was heard of yet, as when everything was started a moment ago, they are
// asked first.
func (s *Service) places(ctx context.Context, template uuid.UUID, p CreateParams) ([]*hosts.Host, error) {
	found, err := s.Hosts.Places(ctx, template, p.needs())
	if !fault.Is(err, fault.NoCapacity) {
		return found, err
	}
	online, counted := s.Store.CountOnlineHosts(ctx)
	if counted != nil || online > 0 {
		return nil, err
	}
	for _, h := range s.Hosts.All() {
		if err := s.Hosts.Contact(ctx, h); err != nil {
			s.Log.Debug("ask host", "host", h.URL, "error", err)
		}
	}
	return s.Hosts.Places(ctx, template, p.needs())
}

// elsewhere is why a sandbox is tried on another host.
type elsewhere struct{ told error }

func (e *elsewhere) Error() string { return e.told.Error() }

// mayElsewhere says whether what failed on one host may work on another: the
// host is full, goes, or cannot be reached. What the guest made of it would be
// the same anywhere.
func mayElsewhere(err error) bool {
	if !connect.IsWireError(err) {
		return connect.CodeOf(err) != connect.CodeCanceled
	}
	switch connect.CodeOf(err) {
	case connect.CodeResourceExhausted, connect.CodeUnavailable, connect.CodeNotFound, connect.CodeUnauthenticated:
		return true
	}
	return false
}

// startOn starts the sandbox of a row, whose host is the first of those given,
// on that one or, where that cannot, on the next.
func (s *Service) startOn(row db.Sandbox, places []*hosts.Host, p CreateParams) (db.Sandbox, error) {
	var why error
	for i, host := range places {
		if i > 0 {
			moved, err := s.move(row, host, p)
			if fault.Is(err, fault.NoCapacity) {
				continue
			}
			if errors.Is(err, store.ErrNoRows) {
				return row, fault.New(fault.Conflict, "the sandbox was deleted while it started")
			}
			if err != nil {
				return row, s.giveUp(row, fmt.Errorf("move sandbox to another host: %w", err))
			}
			row = moved
		}
		ran, err := s.start(row, host, p.Envs, i == len(places)-1)
		var next *elsewhere
		if !errors.As(err, &next) {
			return ran, err
		}
		why = next.told
	}
	return row, s.giveUp(row, why)
}

// giveUp writes that a sandbox did not start, and returns why.
func (s *Service) giveUp(row db.Sandbox, why error) error {
	var f *fault.Error
	if !errors.As(why, &f) {
		f = fault.Because(why, fault.Internal, "the sandbox could not be placed")
	}
	s.metrics.created(string(f.Code), 0)
	if err := s.fail(s.ctx, row.ID, f.Message); err != nil && !errors.Is(err, store.ErrNoRows) {
		s.Log.Error("write that sandbox failed", "sandbox_id", id.Format(id.Sandbox, row.ID), "error", err)
	}
	return f
}

// move reserves room for a sandbox that is starting on another host.
func (s *Service) move(row db.Sandbox, to *hosts.Host, p CreateParams) (db.Sandbox, error) {
	var moved db.Sandbox
	err := s.persist(s.ctx, func(ctx context.Context) error {
		return s.Store.InTx(ctx, func(q *db.Queries) error {
			if err := s.Hosts.Reserve(ctx, q, to.ID, p.needs()); err != nil {
				return err
			}
			var err error
			moved, err = q.SandboxMoves(ctx, db.SandboxMovesParams{ID: row.ID, ToHost: &to.ID, FromHost: row.HostID})
			return err
		})
	})
	return moved, err
}

// resolve finds the template that a team means. One that is not known may be
// new on a host, or no host has been asked yet.
func (s *Service) resolve(ctx context.Context, team uuid.UUID, ref string) (db.Template, error) {
	row, err := s.Templates.Resolve(ctx, team, ref)
	if !fault.Is(err, fault.NotFound) {
		return row, err
	}
	ask, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	all := s.Hosts.All()
	if len(all) == 0 {
		return row, fault.New(fault.NoCapacity, "no host is connected")
	}
	answered := false
	var failed error
	for _, host := range all {
		known, err := s.Templates.Known(ctx, host.ID)
		if err != nil {
			return row, err
		}
		has, err := host.Agent.Templates(ask, connect.NewRequest(&hostagentv1.TemplatesRequest{}))
		if err != nil {
			failed = hosts.Fault(err)
			continue
		}
		answered = true
		if err := s.Templates.Sync(ctx, host.ID, known, has.Msg.Templates); err != nil {
			return row, err
		}
	}
	if !answered {
		return row, failed
	}
	return s.Templates.Resolve(ctx, team, ref)
}
