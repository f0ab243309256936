package templates

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
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

// Snapshot captures a team's running or paused sandbox, which keeps its state, as a
// template, and returns when sandboxes can start from it. The end of ctx does not stop
// it. If the host is unreachable, reconciliation finishes the capture later. If an
// earlier call with the same key created a template, Snapshot returns that one with
// replayed true.
func (s *Service) Snapshot(ctx context.Context, team, sandbox uuid.UUID, name, key string) (_ db.Template, replayed bool, err error) {
	var none db.Template
	if err := CheckName(name); err != nil {
		return none, false, err
	}
	o, err := idempotency.Name(team, key, map[string]any{"snapshot": sandbox, "name": name})
	if err != nil {
		return none, false, err
	}
	for {
		if template, found, err := s.replay(ctx, o); found || err != nil {
			return template, found, err
		}
		var template db.Template
		// Read template only after success: when the caller leaves, the capture continues
		// and still writes it.
		err := s.Sandboxes.AloneWhileStable(ctx, team, sandbox, func(row db.Sandbox) (err error) {
			template, err = s.snapshot(ctx, row, name, o)
			return err
		})
		if err == nil {
			return template, false, nil
		}
		if !errors.Is(err, idempotency.ErrTaken) {
			return none, false, err
		}
	}
}

// snapshot claims the name and captures the sandbox.
func (s *Service) snapshot(ctx context.Context, row db.Sandbox, name string, o idempotency.Call) (db.Template, error) {
	ctx, cancel := context.WithTimeout(s.Work.For(ctx), shortCall)
	defer cancel()
	template := uuid.New()
	// Mark it before its row exists, as for creations.
	end, err := s.begin(template)
	if err != nil {
		return db.Template{}, err
	}
	defer end()
	var claimed db.Template
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		var err error
		claimed, err = q.ClaimTemplate(ctx, db.ClaimTemplateParams{
			ID: template, TeamID: row.TeamID, Name: name, CreatedAt: store.Now(), VCPUs: row.VCPUs, MemoryMiB: row.MemoryMiB, DiskMiB: row.DiskMiB, CapturedFrom: &row.ID,
			Worker: &s.Store.Server,
		})
		if err != nil {
			return err
		}
		if _, err := q.SetTag(ctx, db.SetTagParams{ID: template, Tag: Latest}); err != nil {
			return err
		}
		if err := q.AddHostTemplate(ctx, db.AddHostTemplateParams{HostID: *row.HostID, TemplateID: template}); err != nil {
			return err
		}
		return o.Claim(ctx, q, db.ClaimIdempotencyKeyParams{TemplateID: &template})
	})
	if errors.Is(err, store.ErrNoRows) {
		// The same call to another server may have claimed it.
		if _, found, err := o.Made(ctx, s.Store); found || err != nil {
			return db.Template{}, cmp.Or(err, idempotency.ErrTaken)
		}
		return db.Template{}, fault.New(fault.Conflict, "the team already has a template %q", name)
	}
	if err != nil {
		return db.Template{}, fmt.Errorf("insert template: %w", err)
	}
	return s.capture(ctx, claimed)
}

// capture makes the host capture a pending template and stores the result.
func (s *Service) capture(ctx context.Context, row db.Template) (db.Template, error) {
	log := s.Log.With("template_id", id.Format(id.Template, row.ID), "sandbox_id", id.Format(id.Sandbox, *row.CapturedFrom))
	defer s.Sandboxes.Changed(*row.CapturedFrom) // wakes callers that wait for the template
	drop := func(ctx context.Context) error { return s.Store.DropTemplate(ctx, row.ID) }
	host, err := s.hostOf(*row.CapturedFrom)
	if err != nil {
		if err := work.Persist(s.Work.Context(), drop); err != nil {
			log.Error("delete row of failed template", "error", err)
		}
		return row, err
	}
	ctx, cancel := context.WithTimeout(s.Work.For(ctx), captureWithin)
	defer cancel()
	begun := store.Now()
	answer, err := host.Agent.Snapshot(ctx, connect.NewRequest(&hostagentv1.SnapshotRequest{
		SandboxId: id.Format(id.Sandbox, *row.CapturedFrom), TemplateId: id.Format(id.Template, row.ID), Name: row.Name,
	}))
	if err != nil {
		return row, s.captureFailed(err, log, drop)
	}
	var ready db.Template
	err = work.Persist(s.Work.Context(), func(ctx context.Context) error {
		var err error
		ready, err = s.Store.TemplateReady(ctx, Measured(host.ID, row, answer.Msg.GetTemplate()))
		return err
	})
	if err != nil {
		return row, fmt.Errorf("mark template ready: %w", err)
	}
	log.Info("sandbox captured", "name", row.Name, "took", store.Now().Sub(begun))
	return ready, nil
}

// hostOf returns the host of a sandbox that has not ended.
func (s *Service) hostOf(sandbox uuid.UUID) (*hosts.Host, error) {
	ctx, cancel := context.WithTimeout(s.Work.Context(), shortCall)
	defer cancel()
	row, err := s.Sandboxes.Lookup(ctx, sandbox)
	if err != nil {
		return nil, err
	}
	return s.Hosts.Get(row.HostID)
}

// captureFailed deletes the template's row if the host certainly did not capture it, and
// leaves it to the reconciler otherwise. It returns the error for the caller.
func (s *Service) captureFailed(err error, log *slog.Logger, drop func(context.Context) error) error {
	if s.Work.Context().Err() != nil {
		return fault.New(fault.Unavailable, "the server is stopping") // The next server reconciles it.
	}
	log.Error("capture sandbox", "error", err)
	if hosts.Definite(err) {
		if err := work.Persist(s.Work.Context(), drop); err != nil {
			log.Error("delete row of failed template", "error", err)
		}
	}
	return hosts.FaultIn("capture", err)
}

// replay returns the template that the key has created, and waits for its capture. found
// is false if the key is free.
func (s *Service) replay(ctx context.Context, o idempotency.Call) (row db.Template, found bool, err error) {
	deadline := time.Now().Add(replayWithin)
	for {
		k, found, err := o.Made(ctx, s.Store)
		if !found || err != nil {
			return row, found, err
		}
		if k.TemplateID == nil {
			return row, false, errors.New("idempotency key was used by a request that created no template")
		}
		row, err := s.Store.GetTemplate(ctx, *k.TemplateID)
		if errors.Is(err, store.ErrNoRows) {
			continue // Deleting the template freed the key.
		}
		if err != nil {
			return row, false, fmt.Errorf("look up template: %w", err)
		}
		err = s.Sandboxes.Until(ctx, *row.CapturedFrom, lookAgain, func() (bool, error) {
			row, err = s.Store.GetTemplate(ctx, *k.TemplateID)
			switch {
			case err != nil || State(row.State) != Pending:
				return true, err
			case !s.Busy(row.ID) && time.Now().After(deadline):
				return false, fault.New(fault.Unavailable, "the capture waits for the sandbox's host")
			}
			return false, nil
		})
		if !errors.Is(err, store.ErrNoRows) {
			return row, true, err
		}
	}
}
