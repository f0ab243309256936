// Package platform manages the settings for all teams, and teams' quotas. The database
// enforces quotas (see charge_team in the migrations), whatever code changes sandboxes.
package platform

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/page"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// Service manages the platform's settings and quotas.
type Service struct{ store *store.Store }

// New returns a service on a store.
func New(s *store.Store) *Service { return &Service{s} }

// Quota bounds a team's use; nil is no bound. Running, VCPUs and MemoryMiB count running
// sandboxes, and DiskMiB also counts paused ones.
type Quota struct {
	Running, VCPUs     *int32
	MemoryMiB, DiskMiB *int64
	// StoredMiB counts templates, layers, saved memory and archives.
	StoredMiB *int64
}

// Settings is the platform's settings.
type Settings struct {
	// SignUpOpen allows anybody to create an account.
	SignUpOpen bool
	// Quota is the default for teams without their own.
	Quota Quota
}

func settings(row db.PlatformSetting) Settings {
	return Settings{SignUpOpen: row.SignupOpen, Quota: Quota{row.MaxRunning, row.MaxVCPUs, row.MaxMemoryMiB, row.MaxDiskMiB, row.MaxStoredMiB}}
}

// Settings returns the settings.
func (s *Service) Settings(ctx context.Context) (Settings, error) {
	row, err := s.store.GetSettings(ctx)
	if err != nil {
		return Settings{}, fmt.Errorf("read settings: %w", err)
	}
	return settings(row), nil
}

// SetSettings updates the settings. A lower quota does not end running sandboxes.
func (s *Service) SetSettings(ctx context.Context, to Settings) (Settings, error) {
	q := to.Quota
	row, err := s.store.SetSettings(ctx, db.SetSettingsParams{SignupOpen: to.SignUpOpen, MaxRunning: q.Running, MaxVCPUs: q.VCPUs, MaxMemoryMiB: q.MemoryMiB, MaxDiskMiB: q.DiskMiB, MaxStoredMiB: q.StoredMiB})
	if err != nil {
		return Settings{}, fmt.Errorf("write settings: %w", err)
	}
	return settings(row), nil
}

// Usage is a team's use and quota.
type Usage struct {
	Running, VCPUs     int32
	MemoryMiB, DiskMiB int64
	StoredMiB          int64
	Quota              Quota
	// Own reports that the team has its own quota instead of the default.
	Own bool
}

// Usage returns a team's use and quota, or fails with not_found.
func (s *Service) Usage(ctx context.Context, team uuid.UUID) (Usage, error) {
	var u Usage
	if err := s.team(ctx, team); err != nil {
		return u, err
	}
	row, err := s.store.GetUsage(ctx, team)
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return u, fmt.Errorf("read usage: %w", err)
	}
	u.Running, u.VCPUs, u.MemoryMiB, u.DiskMiB, u.StoredMiB = row.Running, row.VCPUs, row.MemoryMiB, row.DiskMiB, row.StoredMiB
	own, err := s.store.GetQuota(ctx, team)
	switch {
	case err == nil:
		u.Own, u.Quota = true, Quota{own.MaxRunning, own.MaxVCPUs, own.MaxMemoryMiB, own.MaxDiskMiB, own.MaxStoredMiB}
		return u, nil
	case !errors.Is(err, store.ErrNoRows):
		return u, fmt.Errorf("read quota: %w", err)
	}
	all, err := s.Settings(ctx)
	u.Quota = all.Quota
	return u, err
}

func (s *Service) team(ctx context.Context, team uuid.UUID) error {
	_, err := s.store.GetTeam(ctx, team)
	if errors.Is(err, store.ErrNoRows) || team == uuid.Nil {
		return fault.New(fault.NotFound, "no such team")
	}
	if err != nil {
		return fmt.Errorf("look up team: %w", err)
	}
	return nil
}

// SetQuota sets a team's own quota. nil restores the default.
func (s *Service) SetQuota(ctx context.Context, team uuid.UUID, q *Quota) error {
	if err := s.team(ctx, team); err != nil {
		return err
	}
	var err error
	if q == nil {
		err = s.store.DeleteQuota(ctx, team)
	} else {
		err = s.store.SetQuota(ctx, db.SetQuotaParams{TeamID: team, MaxRunning: q.Running, MaxVCPUs: q.VCPUs, MaxMemoryMiB: q.MemoryMiB, MaxDiskMiB: q.DiskMiB, MaxStoredMiB: q.StoredMiB})
	}
	if err != nil {
		return fmt.Errorf("write quota: %w", err)
	}
	return nil
}

// Sandboxes returns a page of all teams' sandboxes, newest first, and the cursor of the
// next page.
func (s *Service) Sandboxes(ctx context.Context, cursor string, limit int) ([]db.Sandbox, string, error) {
	at, before, err := page.Newest(cursor)
	if err != nil {
		return nil, "", err
	}
	rows, err := s.store.AdminListSandboxes(ctx, db.AdminListSandboxesParams{BeforeAt: at, BeforeID: before, MaxRows: int32(limit) + 1})
	if err != nil {
		return nil, "", fmt.Errorf("list sandboxes: %w", err)
	}
	rows, next := page.Cut(rows, limit, func(r db.Sandbox) string { return page.Time(r.CreatedAt, r.ID) })
	return rows, next, nil
}

// Templates returns a page of all teams' templates and the cursor of the next page.
func (s *Service) Templates(ctx context.Context, cursor string, limit int) ([]templates.Listed, string, error) {
	after, err := page.AfterID(cursor)
	if err != nil {
		return nil, "", err
	}
	// The built-in template has the all-zeros id, which is also the zero cursor.
	rows, err := s.store.AdminListTemplates(ctx, db.AdminListTemplatesParams{AfterID: after, First: cursor == "", MaxRows: int32(limit) + 1})
	if err != nil {
		return nil, "", fmt.Errorf("list templates: %w", err)
	}
	list := make([]templates.Listed, len(rows))
	for i, row := range rows {
		list[i] = templates.Listed{Template: row.Template, Tags: row.Tags}
	}
	list, next := page.Cut(list, limit, func(l templates.Listed) string { return page.Text(l.ID.String()) })
	return list, next, nil
}
