package sandboxes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// Snapshot captures a team's running or paused sandbox, which stays as it is,
// as a template of that name, and returns when it can be started from. It goes
// on when ctx ends before, and again when the host did not answer and is back.
// With a key, the template that the same key made before is returned, and
// replayed is true.
func (s *Service) Snapshot(ctx context.Context, team, sandbox uuid.UUID, name, key string) (_ db.Template, replayed bool, err error) {
	var none db.Template
	if err := templates.CheckName(name); err != nil {
		return none, false, err
	}
	o, err := onceFor(team, key, map[string]any{"snapshot": sandbox, "name": name})
	if err != nil {
		return none, false, err
	}
	deadline := now().Add(settleWithin)
	for {
		if template, found, err := s.replayTemplate(ctx, o); found || err != nil {
			return template, found, err
		}
		row, err := s.Get(ctx, team, sandbox)
		if err != nil {
			return none, false, err
		}
		var template db.Template
		switch State(row.State) {
		case Running, Paused:
			// Read only after it has ended: it goes on when the caller leaves.
			_, err = s.turn(ctx, sandbox, "", func() (_ db.Sandbox, err error) {
				template, err = s.snapshot(row, name, o)
				return row, err
			})
		case Pausing, Resuming:
			_, err = s.wait(ctx, row, "", deadline)
		default:
			err = notRunning(row)
		}
		if err == nil {
			return template, false, nil
		}
		if !errors.Is(err, errMoved) && !errors.Is(err, errTaken) {
			return none, false, err
		}
	}
}

// snapshot claims the name and has the sandbox captured.
func (s *Service) snapshot(row db.Sandbox, name string, o once) (db.Template, error) {
	ctx, cancel := context.WithTimeout(s.ctx, shortCall)
	defer cancel()
	is, err := s.Lookup(ctx, row.ID)
	if err != nil || is.State != row.State {
		return db.Template{}, cmp.Or(err, errMoved)
	}
	template := uuid.New()
	// Known to be at work on before the row is there, as in create.
	if err := s.begin(func() { s.templates[template]++ }); err != nil {
		return db.Template{}, err
	}
	defer s.finishTemplate(template)
	var claimed db.Template
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		var err error
		claimed, err = q.ClaimTemplate(ctx, db.ClaimTemplateParams{
			ID: template, TeamID: row.TeamID, Name: name, CreatedAt: now(), VCPUs: row.VCPUs, MemoryMiB: row.MemoryMiB, DiskMiB: row.DiskMiB, CapturedFrom: &row.ID,
			Worker: &s.Store.Server,
		})
		if err != nil {
			return err
		}
		if _, err := q.SetTag(ctx, db.SetTagParams{ID: template, Tag: templates.Latest}); err != nil {
			return err
		}
		if err := q.AddHostTemplate(ctx, db.AddHostTemplateParams{HostID: *row.HostID, TemplateID: template}); err != nil {
			return err
		}
		return o.claim(ctx, q, db.ClaimIdempotencyKeyParams{TemplateID: &template})
	})
	if errors.Is(err, store.ErrNoRows) {
		// By this very call, to another server?
		if _, found, err := s.made(ctx, o); found || err != nil {
			return db.Template{}, cmp.Or(err, errTaken)
		}
		return db.Template{}, fault.New(fault.Conflict, "the team has a template %q", name)
	}
	if err != nil {
		return db.Template{}, fmt.Errorf("write template: %w", err)
	}
	return s.capture(claimed)
}

func (s *Service) finishTemplate(template uuid.UUID) {
	s.finish(func() { less(s.templates, template) })
}

// capture has the host make a template whose row is pending and writes down
// how that went.
func (s *Service) capture(row db.Template) (db.Template, error) {
	log := s.Log.With("template_id", id.Format(id.Template, row.ID), "sandbox_id", id.Format(id.Sandbox, *row.CapturedFrom))
	defer s.changed(*row.CapturedFrom) // Whoever waits for the template looks again.
	drop := func(ctx context.Context) error { return s.Store.DropTemplate(ctx, row.ID) }
	host, err := s.hostOf(*row.CapturedFrom)
	if err != nil {
		if err := s.persist(s.ctx, drop); err != nil {
			log.Error("write that there is no template", "error", err)
		}
		return row, err
	}
	ctx, cancel := context.WithTimeout(s.ctx, pauseTimeout)
	defer cancel()
	begun := now()
	answer, err := host.Agent.Snapshot(ctx, connect.NewRequest(&hostagentv1.SnapshotRequest{
		SandboxId: id.Format(id.Sandbox, *row.CapturedFrom), TemplateId: id.Format(id.Template, row.ID), Name: row.Name,
	}))
	if err != nil {
		return row, s.turnFailed("capture", err, log, drop)
	}
	var ready db.Template
	err = s.persist(s.ctx, func(ctx context.Context) error {
		var err error
		ready, err = s.Store.TemplateReady(ctx, templates.Measured(row.ID, answer.Msg.GetTemplate()))
		return err
	})
	if err != nil {
		return row, fmt.Errorf("write that template is ready: %w", err)
	}
	log.Info("sandbox captured", "name", row.Name, "took", now().Sub(begun))
	return ready, nil
}

// hostOf is the host of a sandbox that has not ended.
func (s *Service) hostOf(sandbox uuid.UUID) (*hosts.Host, error) {
	ctx, cancel := context.WithTimeout(s.ctx, shortCall)
	defer cancel()
	row, err := s.Lookup(ctx, sandbox)
	if err != nil {
		return nil, err
	}
	return s.Hosts.Get(row.HostID)
}

// DeleteTemplate removes a team's template, by name or id, and returns when
// its files are gone. Sandboxes that started from it go on. It goes on when
// ctx ends before, and again when a host was unreachable and is back.
func (s *Service) DeleteTemplate(ctx context.Context, team uuid.UUID, ref string) error {
	if err := checkText("name", ref); err != nil {
		return err
	}
	row, err := s.Templates.Find(ctx, team, ref)
	if err != nil {
		return err
	}
	if row.TeamID == uuid.Nil && team != uuid.Nil {
		return fault.New(fault.PermissionDenied, "template %q is the platform's", row.Name)
	}
	return s.deleteTemplate(ctx, row)
}

// DeleteAnyTemplate is DeleteTemplate for any team's, or the platform's.
func (s *Service) DeleteAnyTemplate(ctx context.Context, template uuid.UUID) error {
	row, err := s.Store.GetTemplate(ctx, template)
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.NotFound, "no such template")
	}
	if err != nil {
		return fmt.Errorf("look up template: %w", err)
	}
	return s.deleteTemplate(ctx, row)
}

func (s *Service) deleteTemplate(ctx context.Context, row db.Template) error {
	switch {
	case row.ID == uuid.Nil:
		return fault.New(fault.PermissionDenied, "template %q is built in", row.Name)
	case templates.State(row.State) == templates.Pending:
		return fault.New(fault.Conflict, "template %q is being captured", row.Name)
	}
	return s.Remove(ctx, row)
}

// DeleteVersions is DeleteTemplate for all versions of a name, if ref is no
// more than that.
func (s *Service) DeleteVersions(ctx context.Context, team uuid.UUID, ref string) error {
	r, ok := templates.ParseRef(ref)
	if !ok || !r.Bare {
		return s.DeleteTemplate(ctx, team, ref)
	}
	rows, err := s.Store.ListVersions(ctx, db.ListVersionsParams{TeamID: team, Name: r.Name})
	if err != nil {
		return fmt.Errorf("list template's versions: %w", err)
	}
	if len(rows) == 0 {
		return s.DeleteTemplate(ctx, team, ref) // which says why not
	}
	for _, row := range rows {
		if err := s.deleteTemplate(ctx, row); err != nil {
			return err
		}
	}
	return nil
}

// Remove is DeleteTemplate for a template that is known and may be removed.
func (s *Service) Remove(ctx context.Context, row db.Template) error {
	if err := s.begin(func() { s.templates[row.ID]++ }); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer s.finishTemplate(row.ID)
		done <- fault.Guard(s.Log, func() error { return s.removeTemplate(s.ctx, row) })
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// removeTemplate writes that a template is to go, has every host that has it
// remove it, and writes that. What one host does keeps no other from doing it.
func (s *Service) removeTemplate(ctx context.Context, row db.Template) error {
	log := s.Log.With("template_id", id.Format(id.Template, row.ID))
	err := s.persist(ctx, func(ctx context.Context) error {
		_, err := s.Store.TemplateDeleting(ctx, db.TemplateDeletingParams{ID: row.ID, Worker: &s.Store.Server})
		return err
	})
	if errors.Is(err, store.ErrNoRows) {
		return nil // It is gone by now.
	}
	if err != nil {
		return fmt.Errorf("write that template goes: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, destroyTimeout)
	defer cancel()
	on, err := s.Store.ListTemplateHosts(ctx, row.ID)
	if err != nil {
		return fmt.Errorf("list template's hosts: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(removesAtOnce)
	for _, h := range on {
		g.Go(func() error { return s.removeFrom(ctx, row, h, log) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	err = s.persist(ctx, func(ctx context.Context) error { return s.Store.DropTemplate(ctx, row.ID) })
	if err != nil {
		return fmt.Errorf("write that template is gone: %w", err)
	}
	log.Info("template removed", "name", row.Name)
	return nil
}

// removesAtOnce is from how many hosts a template is removed at once.
const removesAtOnce = 16

// removeFrom has one host remove a template and writes that.
func (s *Service) removeFrom(ctx context.Context, row db.Template, from uuid.UUID, log *slog.Logger) error {
	host, err := s.Hosts.Get(&from)
	if err != nil {
		return err
	}
	_, err = host.Agent.DeleteTemplate(ctx, connect.NewRequest(&hostagentv1.DeleteTemplateRequest{TeamId: id.Format(id.Team, row.TeamID), TemplateId: id.Format(id.Template, row.ID)}))
	if err != nil && !(connect.IsWireError(err) && connect.CodeOf(err) == connect.CodeNotFound) {
		log.Error("remove template", "host", host.URL, "error", err)
		return hosts.Fault(err)
	}
	if err := s.Store.DropHostTemplates(ctx, db.DropHostTemplatesParams{HostID: from, Ids: []uuid.UUID{row.ID}}); err != nil {
		return fmt.Errorf("write that host has no template: %w", err)
	}
	return nil
}

// TemplateMade writes that a pending template, which nobody works on any more,
// is there after all.
func (s *Service) TemplateMade(ctx context.Context, row db.Template, has *hostagentv1.Template) error {
	var err error
	if isImport(row) {
		_, err = s.imported(ctx, row.ID, has)
	} else {
		_, err = s.Store.TemplateReady(ctx, templates.Measured(row.ID, has))
	}
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return fmt.Errorf("write that template is ready: %w", err)
	}
	return nil
}

// FinishTemplate goes on with what an earlier server, or one that lost the
// host, began with a template: it captures or removes it once more, since to do
// what was done changes nothing, or gives an import up.
func (s *Service) FinishTemplate(ctx context.Context, row db.Template) error {
	if err := s.begin(func() { s.templates[row.ID]++ }); err != nil {
		return err
	}
	defer s.finishTemplate(row.ID)
	if templates.State(row.State) == templates.Deleting {
		return s.removeTemplate(ctx, row)
	}
	if isImport(row) {
		// It was broken off; what it was made from is not written down.
		return s.importFails(ctx, row, "the server or the host that was at it went away", row.CreatedAt, true)
	}
	_, err := s.turn(ctx, *row.CapturedFrom, "", func() (db.Sandbox, error) {
		is, err := s.Store.GetTemplate(s.ctx, row.ID)
		if errors.Is(err, store.ErrNoRows) || err == nil && is.State != row.State {
			return db.Sandbox{}, nil // Somebody else finished it.
		}
		if err == nil {
			_, err = s.capture(is)
		}
		return db.Sandbox{}, err
	})
	if errors.Is(err, errMoved) {
		return nil // It is something else's turn; this comes up again.
	}
	return err
}

// BusyTemplate says whether this server makes or removes the template.
func (s *Service) BusyTemplate(template uuid.UUID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.templates[template] > 0
}
