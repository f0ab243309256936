package templates

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// Remove deletes a template: its files on every host that has them, and then
// its row. What fails can be repeated. It fails with not_found, with conflict
// for the built-in template and for one in use, with host_unreachable.
func (s *Service) Remove(ctx context.Context, registry *hosts.Registry, template uuid.UUID) error {
	if template == uuid.Nil {
		return fault.New(fault.Conflict, "the built-in template stays")
	}
	row, err := s.store.GetTemplate(ctx, template)
	if errors.Is(err, store.ErrNoRows) {
		return fault.New(fault.NotFound, "no such template")
	}
	if err != nil {
		return fmt.Errorf("look up template: %w", err)
	}
	on, err := s.store.ListTemplateHosts(ctx, template)
	if err != nil {
		return fmt.Errorf("look up template's hosts: %w", err)
	}
	for _, h := range on {
		host, err := registry.Get(&h)
		if err != nil {
			return err
		}
		_, err = host.Agent.DeleteTemplate(ctx, connect.NewRequest(&hostagentv1.DeleteTemplateRequest{
			TeamId: id.Format(id.Team, row.TeamID), TemplateId: id.Format(id.Template, template),
		}))
		if err != nil && !(connect.IsWireError(err) && connect.CodeOf(err) == connect.CodeNotFound) {
			return hosts.Fault(err)
		}
	}
	if err := s.store.DeleteTemplate(ctx, template); err != nil {
		return fmt.Errorf("delete template: %w", err)
	}
	return nil
}
