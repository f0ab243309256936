// Package templates knows what sandboxes can be started from.
package templates

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"unicode/utf8"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// Service answers for the templates of a store.
type Service struct {
	store *store.Store
	log   *slog.Logger

	mu sync.Mutex
	// synced is what each host had when it was last written down.
	synced map[uuid.UUID]*hostagentv1.TemplatesResponse
}

// New returns the templates of a store.
func New(s *store.Store, log *slog.Logger) *Service {
	return &Service{store: s, log: log, synced: make(map[uuid.UUID]*hostagentv1.TemplatesResponse)}
}

// Resolve finds the template that a team means by a name or an id: its own, or
// else the platform's. It fails with not_found.
func (s *Service) Resolve(ctx context.Context, team uuid.UUID, ref string) (db.Template, error) {
	p := db.ResolveTemplateParams{TeamID: team}
	if u, err := id.Parse(id.Template, ref); err == nil {
		p.ID = &u
	} else {
		p.Name = &ref
	}
	row, err := s.store.ResolveTemplate(ctx, p)
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no template %q", ref)
	}
	if err != nil {
		return row, fmt.Errorf("look up template: %w", err)
	}
	return row, nil
}

// List returns a page of the templates that a team sees, by name, and the
// cursor of the next one ("" on the last page).
func (s *Service) List(ctx context.Context, team uuid.UUID, cursor string, limit int) ([]db.Template, string, error) {
	p := db.ListTemplatesParams{TeamID: team, MaxRows: int32(limit) + 1}
	if cursor != "" {
		raw, err := base64.RawURLEncoding.DecodeString(cursor)
		if err != nil || len(raw) < 16 || !utf8.Valid(raw[16:]) || bytes.IndexByte(raw[16:], 0) >= 0 {
			return nil, "", fault.New(fault.InvalidArgument, "cursor: not one of this list")
		}
		copy(p.AfterID[:], raw)
		p.AfterName = string(raw[16:])
	}
	rows, err := s.store.ListTemplates(ctx, p)
	if err != nil {
		return nil, "", fmt.Errorf("list templates: %w", err)
	}
	if len(rows) <= limit {
		return rows, "", nil
	}
	rows = rows[:limit]
	last := rows[limit-1]
	return rows, base64.RawURLEncoding.EncodeToString(append(last.ID[:], last.Name...)), nil
}

// Sync writes down what a host says it has.
func (s *Service) Sync(ctx context.Context, host uuid.UUID, has *hostagentv1.TemplatesResponse) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if proto.Equal(s.synced[host], has) {
		return nil
	}
	err := s.store.InTx(ctx, func(q *db.Queries) error {
		keep := []uuid.UUID{}
		for _, t := range has.Templates {
			tid, err := id.Parse(id.Template, t.TemplateId)
			if err != nil {
				return err
			}
			team, err := id.Parse(id.Team, t.TeamId)
			if err != nil {
				return err
			}
			n, err := q.UpsertTemplate(ctx, db.UpsertTemplateParams{ID: tid, TeamID: team, Name: t.Name, SizeBytes: t.SizeBytes, CreatedAt: t.CreatedAt.AsTime()})
			if err != nil {
				return fmt.Errorf("template %s: %w", t.TemplateId, err)
			}
			if n == 0 {
				s.log.Warn("host has a template of a team that does not exist", "host_id", host, "template_id", t.TemplateId, "team_id", t.TeamId)
				continue
			}
			if err := q.UpsertHostTemplate(ctx, db.UpsertHostTemplateParams{HostID: host, TemplateID: tid}); err != nil {
				return err
			}
			keep = append(keep, tid)
		}
		return q.KeepHostTemplates(ctx, db.KeepHostTemplatesParams{HostID: host, Keep: keep})
	})
	if err != nil {
		return fmt.Errorf("write down the host's templates: %w", err)
	}
	s.synced[host] = has
	s.log.Info("templates of host", "host_id", host, "count", len(has.Templates))
	return nil
}
