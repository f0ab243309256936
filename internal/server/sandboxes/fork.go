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
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// Fork makes copies of a team's running sandbox, which goes on, and returns
// when they run: all or none. A paused sandbox that calls resume is resumed
// first. It goes on when ctx ends before. With a key, the copies that the same
// key made before are returned, and replayed is true.
func (s *Service) Fork(ctx context.Context, team, sandbox uuid.UUID, count int, key string) (copies []db.Sandbox, replayed bool, err error) {
	o, err := onceFor(team, key, map[string]any{"fork": sandbox, "count": count})
	if err != nil {
		return nil, false, err
	}
	for {
		if copies, found, err := s.replay(ctx, o); found || err != nil {
			return copies, found, err
		}
		// A use: it does not fall asleep before its turn comes.
		host, err := s.Use(ctx, team, sandbox)
		if err != nil {
			return nil, false, err
		}
		var copies []db.Sandbox
		// Read only after it has ended: it goes on when the caller leaves.
		_, err = s.turn(ctx, sandbox, "", func() (_ db.Sandbox, err error) {
			copies, err = s.fork(sandbox, host, count, o)
			return db.Sandbox{}, err
		})
		if err == nil {
			return copies, false, nil
		}
		if !errors.Is(err, errMoved) && !errors.Is(err, errTaken) {
			return nil, false, err
		}
	}
}

func (s *Service) fork(parent uuid.UUID, host *hosts.Host, count int, o once) ([]db.Sandbox, error) {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, parent), "host", host.URL)
	short, cancel := context.WithTimeout(s.ctx, shortCall)
	defer cancel()
	row, err := s.Lookup(short, parent)
	if err != nil || State(row.State) != Running {
		return nil, cmp.Or(err, errMoved)
	}
	rows := make([]db.Sandbox, count)
	made := make([]*creation, count)
	req := &hostagentv1.ForkRequest{SandboxId: id.Format(id.Sandbox, parent)}
	for i := range rows {
		rows[i].ID, made[i] = uuid.New(), &creation{done: make(chan struct{})}
		req.Copies = append(req.Copies, &hostagentv1.ForkRequest_Copy{SandboxId: id.Format(id.Sandbox, rows[i].ID), AccessToken: s.Tokens.Access(rows[i].ID)})
	}
	// One piece of work, of which every copy knows.
	if err := s.begin(func() {
		for i, c := range rows {
			s.creating[c.ID] = made[i]
		}
	}); err != nil {
		return nil, err
	}
	defer func() {
		s.finish(func() {
			for _, c := range rows {
				delete(s.creating, c.ID)
			}
		})
		for i, c := range rows {
			made[i].row, made[i].err = c, err
			close(made[i].done)
			s.changed(c.ID)
		}
	}()
	room := scheduler.Request{MemoryMiB: int64(row.MemoryMiB), VCPUs: int64(row.VCPUs)}
	err = s.Store.InTx(short, func(q *db.Queries) error {
		for i := range rows {
			// Counts the copies before it too.
			if err := s.Hosts.Reserve(short, q, host.ID, room); err != nil {
				return err
			}
			copied, err := q.InsertSandbox(short, db.InsertSandboxParams{
				ID: rows[i].ID, TeamID: row.TeamID, HostID: row.HostID, TemplateID: row.TemplateID, TemplateName: row.TemplateName,
				VCPUs: row.VCPUs, MemoryMiB: row.MemoryMiB, DiskMiB: row.DiskMiB, TimeoutSeconds: row.TimeoutSeconds, Metadata: row.Metadata,
				CreatedAt: now(), OnTimeout: row.OnTimeout, AutoResume: row.AutoResume, ForkedFrom: &parent,
			})
			if err != nil {
				return err
			}
			rows[i] = copied
		}
		all := ids(rows)
		return o.claim(short, q, db.ClaimIdempotencyKeyParams{SandboxID: &all[0], Copies: all[1:]})
	})
	if fault.Is(err, fault.NoCapacity) {
		err = fault.New(fault.NoCapacity, "the sandbox's host has no room for %d copies", count)
		return nil, err
	}
	if err != nil {
		err = fmt.Errorf("write copies: %w", err)
		return nil, err
	}
	ctx, end := context.WithTimeout(s.ctx, createTimeout)
	defer end()
	begun := time.Now()
	answer, err := host.Agent.Fork(ctx, connect.NewRequest(req))
	took := time.Since(begun)
	if s.ctx.Err() != nil {
		err = fault.New(fault.Unavailable, "the server is stopping")
		return nil, err
	}
	if err == nil && len(answer.Msg.Sandboxes) != count {
		err = fmt.Errorf("host made %d copies of %d", len(answer.Msg.Sandboxes), count)
	}
	if err != nil {
		err = s.forkFailed(rows, host, err, log)
		return nil, err
	}
	if rows, err = s.forked(rows, answer.Msg.Sandboxes, took, host, log); err != nil {
		return nil, err
	}
	log.Info("sandbox forked", "copies", count, "took", took)
	return rows, nil
}

// forked writes that copies run.
func (s *Service) forked(rows []db.Sandbox, made []*hostagentv1.Sandbox, took time.Duration, host *hosts.Host, log *slog.Logger) ([]db.Sandbox, error) {
	at, ms := now(), took.Milliseconds()
	running := make([]db.Sandbox, len(rows))
	var deleted []uuid.UUID
	err := s.persist(s.ctx, func(ctx context.Context) error {
		deleted = nil
		return s.Store.InTx(ctx, func(q *db.Queries) error {
			if err := q.LockSandboxes(ctx, ids(rows)); err != nil {
				return err
			}
			for i, sb := range made {
				row, err := q.SandboxRunning(ctx, db.SandboxRunningParams{ID: rows[i].ID, StartedAt: &at, ExpiresAt: Expiry(sb), DiskMiB: max(sb.GetDiskMib(), rows[i].DiskMiB), StartMs: &ms})
				if errors.Is(err, store.ErrNoRows) {
					deleted = append(deleted, rows[i].ID)
					row, err = q.GetSandbox(ctx, rows[i].ID)
				}
				if err != nil {
					return err
				}
				running[i] = row
			}
			return nil
		})
	})
	if err != nil {
		return rows, fmt.Errorf("write that copies run: %w", err)
	}
	for _, c := range deleted {
		// The deletion's own call may have come before ours.
		s.destroy(s.ctx, c, host, log)
	}
	for range running {
		s.metrics.created("ok", took)
	}
	return running, nil
}

// forkFailed undoes a fork that failed with err, and returns what the caller
// is told.
func (s *Service) forkFailed(rows []db.Sandbox, host *hosts.Host, err error, log *slog.Logger) error {
	log.Error("fork sandbox", "error", err)
	told := hostFault("fork", err)
	var f *fault.Error
	errors.As(told, &f)
	for _, row := range rows {
		if !definite(err) {
			s.destroy(s.ctx, row.ID, host, log)
		}
		s.metrics.created(string(f.Code), 0)
		if err := s.fail(s.ctx, row.ID, f.Message); err != nil && !errors.Is(err, store.ErrNoRows) {
			log.Error("write that copy failed", "error", err)
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
