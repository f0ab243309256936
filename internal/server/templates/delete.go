package templates

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/each"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

// Delete deletes a team's template, by name or id, and returns when its files are gone.
// Sandboxes that started from it keep running. The end of ctx does not stop it. If a host
// is unreachable, reconciliation finishes the deletion later.
func (s *Service) Delete(ctx context.Context, team uuid.UUID, ref string) error {
	row, err := s.Find(ctx, team, ref)
	if err != nil {
		return err
	}
	if row.TeamID == uuid.Nil && team != uuid.Nil {
		return fault.New(fault.PermissionDenied, "template %q belongs to the platform", row.Name)
	}
	return s.delete(ctx, row)
}

// DeleteAny is [Service.Delete] for any team's or the platform's template.
func (s *Service) DeleteAny(ctx context.Context, template uuid.UUID) error {
	row, err := s.Store.GetTemplate(ctx, template)
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.NotFound, "no such template")
	}
	if err != nil {
		return fmt.Errorf("look up template: %w", err)
	}
	return s.delete(ctx, row)
}

func (s *Service) delete(ctx context.Context, row db.Template) error {
	switch {
	case row.ID == uuid.Nil:
		return fault.New(fault.PermissionDenied, "template %q is built in", row.Name)
	case State(row.State) == Pending:
		return fault.New(fault.Conflict, "template %q is being captured", row.Name)
	}
	return s.Remove(ctx, row)
}

// DeleteVersions is [Service.Delete], but deletes all versions of a name if ref is only a
// name.
func (s *Service) DeleteVersions(ctx context.Context, team uuid.UUID, ref string) error {
	r, ok := ParseRef(ref)
	if !ok || !r.Bare {
		return s.Delete(ctx, team, ref)
	}
	rows, err := s.Store.ListVersions(ctx, db.ListVersionsParams{TeamID: team, Name: r.Name})
	if err != nil {
		return fmt.Errorf("list template's versions: %w", err)
	}
	if len(rows) == 0 {
		return s.Delete(ctx, team, ref) // It returns the right error.
	}
	for _, row := range rows {
		if err := s.delete(ctx, row); err != nil {
			return err
		}
	}
	return nil
}

// Remove deletes a template without checking whether that is allowed.
func (s *Service) Remove(ctx context.Context, row db.Template) error {
	end, err := s.begin(row.ID)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer end()
		done <- s.Work.Guard(func() error { return s.remove(s.Work.For(ctx), row) })
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// remove marks a template deleting, deletes it on every host that has it, and deletes its
// row. Failures on one host do not stop the others.
func (s *Service) remove(ctx context.Context, row db.Template) error {
	log := s.Log.With("template_id", id.Format(id.Template, row.ID))
	err := work.Persist(ctx, func(ctx context.Context) error {
		_, err := s.Store.TemplateDeleting(ctx, db.TemplateDeletingParams{ID: row.ID, Worker: &s.Store.Server})
		return err
	})
	if errors.Is(err, store.ErrNoRows) {
		return nil // It has already been deleted.
	}
	if err != nil {
		return fmt.Errorf("mark template deleting: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, removeWithin)
	defer cancel()
	on, err := s.Store.ListTemplateHosts(ctx, row.ID)
	if err != nil {
		return fmt.Errorf("list template's hosts: %w", err)
	}
	err = each.Do(ctx, s.Log, removesAtOnce, removeWithin, on, func(ctx context.Context, h uuid.UUID) error { return s.removeFrom(ctx, row, h, log) })
	if err != nil {
		return err
	}
	err = work.Persist(ctx, func(ctx context.Context) error { return s.Store.DropTemplate(ctx, row.ID) })
	if err != nil {
		return fmt.Errorf("delete template's row: %w", err)
	}
	log.Info("template deleted", "name", row.Name)
	return nil
}

// removesAtOnce is on how many hosts a template is deleted at once.
const removesAtOnce = 16

// removeFrom deletes a template on one host and records that.
func (s *Service) removeFrom(ctx context.Context, row db.Template, from uuid.UUID, log *slog.Logger) error {
	host, err := s.Hosts.Get(&from)
	if err != nil {
		return err
	}
	_, err = host.Agent.DeleteTemplate(ctx, connect.NewRequest(&hostagentv1.DeleteTemplateRequest{TeamId: id.Format(id.Team, row.TeamID), TemplateId: id.Format(id.Template, row.ID)}))
	if err != nil && !(connect.IsWireError(err) && connect.CodeOf(err) == connect.CodeNotFound) {
		log.Error("delete template", "host", host.URL, "error", err)
		return hosts.Fault(err)
	}
	if err := s.Store.DropHostTemplates(ctx, db.DropHostTemplatesParams{HostID: from, Ids: []uuid.UUID{row.ID}}); err != nil {
		return fmt.Errorf("record that host has no template: %w", err)
	}
	return nil
}
