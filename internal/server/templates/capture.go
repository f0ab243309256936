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

// Snapshot captures a team's running or paused sandbox, which stays as it is,
// as a template of that name, and returns when it can be started from. It goes
// on when ctx ends before, and again when the host did not answer and is back.
// With a key, the template that the same key made before is returned, and
// replayed is true.
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
		// Read only after it has ended: it goes on when the caller leaves.
		err := s.Sandboxes.Hold(ctx, team, sandbox, func(row db.Sandbox) (err error) {
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

// snapshot claims the name and has the sandbox captured.
func (s *Service) snapshot(ctx context.Context, row db.Sandbox, name string, o idempotency.Call) (db.Template, error) {
	ctx, cancel := context.WithTimeout(s.Work.For(ctx), shortCall)
	defer cancel()
	template := uuid.New()
	// Known to be at work on before the row is there, as in create.
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
		// By this very call, to another server?
		if _, found, err := o.Made(ctx, s.Store); found || err != nil {
			return db.Template{}, cmp.Or(err, idempotency.ErrTaken)
		}
		return db.Template{}, fault.New(fault.Conflict, "the team has a template %q", name)
	}
	if err != nil {
		return db.Template{}, fmt.Errorf("write template: %w", err)
	}
	return s.capture(ctx, claimed)
}

// capture has the host make a template whose row is pending and writes down
// how that went.
func (s *Service) capture(ctx context.Context, row db.Template) (db.Template, error) {
	log := s.Log.With("template_id", id.Format(id.Template, row.ID), "sandbox_id", id.Format(id.Sandbox, *row.CapturedFrom))
	defer s.Sandboxes.Changed(*row.CapturedFrom) // Whoever waits for the template looks again.
	drop := func(ctx context.Context) error { return s.Store.DropTemplate(ctx, row.ID) }
	host, err := s.hostOf(*row.CapturedFrom)
	if err != nil {
		if err := work.Persist(s.Work.Context(), drop); err != nil {
			log.Error("write that there is no template", "error", err)
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

// hostOf is the host of a sandbox that has not ended.
func (s *Service) hostOf(sandbox uuid.UUID) (*hosts.Host, error) {
	ctx, cancel := context.WithTimeout(s.Work.Context(), shortCall)
	defer cancel()
	row, err := s.Sandboxes.Lookup(ctx, sandbox)
	if err != nil {
		return nil, err
	}
	return s.Hosts.Get(row.HostID)
}

// captureFailed drops a template of which it is certain that the host did not
// make it, and leaves it to the controller if it is not. It returns what the
// caller is told.
func (s *Service) captureFailed(err error, log *slog.Logger, drop func(context.Context) error) error {
	if s.Work.Context().Err() != nil {
		return fault.New(fault.Unavailable, "the server is stopping") // The next server looks.
	}
	log.Error("capture sandbox", "error", err)
	if hosts.Definite(err) {
		if err := work.Persist(s.Work.Context(), drop); err != nil {
			log.Error("write that there is no template", "error", err)
		}
	}
	return hosts.FaultIn("capture", err)
}

// replay returns the template that the key made, waiting for it while it is
// being captured; found is false if the key is free.
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
			continue // Its key went with it.
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
				return false, fault.New(fault.Unavailable, "the sandbox is captured as soon as its host answers")
			}
			return false, nil
		})
		if !errors.Is(err, store.ErrNoRows) {
			return row, true, err
		}
	}
}
