package sandboxes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/idempotency"
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

// Fork creates copies of a team's running sandbox, which keeps running, and returns when
// all of them run. It creates all or none. It resumes a paused sandbox that calls may
// resume. The end of ctx does not stop it. If an earlier call with the same key created
// copies, Fork returns those with replayed true.
func (s *Service) Fork(ctx context.Context, team, sandbox uuid.UUID, count int, key string) (copies []db.Sandbox, replayed bool, err error) {
	o, err := idempotency.Name(team, key, map[string]any{"fork": sandbox, "count": count})
	if err != nil {
		return nil, false, err
	}
	return s.once(ctx, o, func() (copies []db.Sandbox, err error) {
		for {
			// Use keeps the sandbox from being paused for idleness before the fork's
			// turn.
			host, err := s.Use(ctx, team, sandbox)
			if err != nil {
				return nil, err
			}
			var made []db.Sandbox
			// Read made only after success: when the caller leaves, the turn continues
			// and still writes it.
			_, err = s.turn(ctx, sandbox, "", func() (_ db.Sandbox, err error) {
				made, err = s.fork(ctx, sandbox, host, count, o)
				return db.Sandbox{}, err
			})
			if err == nil {
				return made, nil
			}
			if !errors.Is(err, ErrMoved) {
				return nil, err
			}
		}
	})
}

// fork creates the copies. The caller has the sandbox's turn.
func (s *Service) fork(ctx context.Context, parent uuid.UUID, host *hosts.Host, count int, o idempotency.Call) (copies []db.Sandbox, err error) {
	ctx = s.Work.For(ctx)
	of := make([]uuid.UUID, count)
	for i := range of {
		of[i] = uuid.New()
	}
	end, err := s.beginCreation(of...)
	if err != nil {
		return nil, err
	}
	defer func() { end(copies, err) }()
	rows, err := s.reserveCopies(ctx, parent, of, host, o)
	if err != nil {
		return nil, err
	}
	req := &hostagentv1.ForkRequest{SandboxId: id.Format(id.Sandbox, parent)}
	for _, c := range of {
		req.Copies = append(req.Copies, &hostagentv1.ForkRequest_Copy{SandboxId: id.Format(id.Sandbox, c), AccessToken: s.Tokens.Guest(c)})
	}
	call, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	log := s.logOn(parent, host)
	begun := time.Now()
	answer, err := host.Agent.Fork(call, connect.NewRequest(req))
	took := time.Since(begun)
	if ctx.Err() != nil {
		return nil, fault.New(fault.Unavailable, "the server is stopping")
	}
	if err == nil && len(answer.Msg.Sandboxes) != count {
		err = fmt.Errorf("host made %d copies of %d", len(answer.Msg.Sandboxes), count)
	}
	if err != nil {
		return nil, s.forkFailed(rows, host, err, log)
	}
	if rows, err = s.forked(rows, answer.Msg.Sandboxes, took, host, log); err != nil {
		return nil, err
	}
	log.Info("sandbox forked", "copies", count, "took", took)
	return rows, nil
}

// reserveCopies inserts the rows of the copies, if the sandbox still runs and its host
// has room for all of them.
func (s *Service) reserveCopies(ctx context.Context, parent uuid.UUID, of []uuid.UUID, host *hosts.Host, o idempotency.Call) ([]db.Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, shortCall)
	defer cancel()
	row, err := s.Lookup(ctx, parent)
	if err != nil || State(row.State) != Running {
		return nil, cmp.Or(err, ErrMoved)
	}
	room := scheduler.Request{MemoryMiB: int64(row.MemoryMiB), VCPUs: int64(row.VCPUs), DiskMiB: saves(row.OnTimeout, row.MemoryMiB)}
	rows := make([]db.Sandbox, len(of))
	err = s.Store.InTx(ctx, func(q *db.Queries) (err error) {
		for i, c := range of {
			// This also counts the copies inserted so far.
			if err := s.Hosts.Reserve(ctx, q, host.ID, room); err != nil {
				return err
			}
			rows[i], err = q.InsertSandbox(ctx, db.InsertSandboxParams{
				ID: c, TeamID: row.TeamID, HostID: row.HostID, TemplateID: row.TemplateID, TemplateName: row.TemplateName,
				VCPUs: row.VCPUs, MemoryMiB: row.MemoryMiB, DiskMiB: row.DiskMiB, TimeoutSeconds: row.TimeoutSeconds, Metadata: row.Metadata,
				CreatedAt: store.Now(), OnTimeout: row.OnTimeout, AutoResume: row.AutoResume, ForkedFrom: &parent,
			})
			if err != nil {
				return err
			}
		}
		return o.Claim(ctx, q, db.ClaimIdempotencyKeyParams{SandboxID: &of[0], Copies: of[1:]})
	})
	if fault.Is(err, fault.NoCapacity) {
		return nil, fault.New(fault.NoCapacity, "the sandbox's host has no room for %d copies", len(of))
	}
	if err != nil {
		return nil, fmt.Errorf("insert copies: %w", err)
	}
	return rows, nil
}

// forked marks the copies running.
func (s *Service) forked(rows []db.Sandbox, made []*hostagentv1.Sandbox, took time.Duration, host *hosts.Host, log *slog.Logger) ([]db.Sandbox, error) {
	at, ms := store.Now(), took.Milliseconds()
	running := make([]db.Sandbox, len(rows))
	var deleted []uuid.UUID
	err := work.Persist(s.Work.Context(), func(ctx context.Context) error {
		deleted = nil
		return s.Store.InTx(ctx, func(q *db.Queries) error {
			if err := q.LockSandboxes(ctx, ids(rows)); err != nil {
				return err
			}
			for i, sb := range made {
				row, err := markRunning(ctx, q, db.SandboxRunningParams{ID: rows[i].ID, HostID: rows[i].HostID, StartedAt: &at, ExpiresAt: Expiry(rows[i], sb, at), DiskMiB: disk(rows[i], sb), StartMs: &ms})
				if err != nil {
					return err
				}
				if State(row.State).ends() {
					deleted = append(deleted, rows[i].ID)
				}
				running[i] = row
			}
			return nil
		})
	})
	if err != nil {
		return rows, fmt.Errorf("mark forks running: %w", err)
	}
	for _, c := range deleted {
		// A concurrent deletion may have called the host before the fork did.
		s.destroy(s.Work.Context(), c, host, log)
	}
	for range running {
		s.metrics.created("ok", took)
	}
	return running, nil
}

// forkFailed undoes a failed fork and returns the error for the caller.
func (s *Service) forkFailed(rows []db.Sandbox, host *hosts.Host, err error, log *slog.Logger) error {
	log.Error("fork sandbox", "error", err)
	told := hosts.FaultIn("fork", err)
	var f *fault.Error
	errors.As(told, &f)
	for range rows {
		s.metrics.created(string(f.Code), 0)
	}
	if hosts.Definite(err) {
		// The host made no copy, and nobody knows the ids.
		if err := work.Persist(s.Work.Context(), func(ctx context.Context) error { return s.Store.DropUnstarted(ctx, ids(rows)) }); err != nil {
			log.Error("delete rows of failed copies", "error", err)
		}
		return f
	}
	for _, row := range rows {
		s.destroy(s.Work.Context(), row.ID, host, log)
		if err := s.fail(s.Work.Context(), row, f.Message); err != nil && !errors.Is(err, store.ErrNoRows) {
			log.Error("mark copy failed", "error", err)
		}
	}
	return f
}

func ids(rows []db.Sandbox) []uuid.UUID {
	all := make([]uuid.UUID, len(rows))
	for i, row := range rows {
		all[i] = row.ID
	}
	return all
}
