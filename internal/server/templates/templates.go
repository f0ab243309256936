// Package templates manages the templates that sandboxes start from: names, versions and
// tags, which hosts have them, and their captures, imports and deletions.
package templates

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/recipe"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// listWithin bounds the calls that list hosts' templates.
const listWithin = 15 * time.Second

// State is the state of a template.
type State string

// The states of a template.
const (
	Pending  State = "pending" // being captured or imported
	Ready    State = "ready"
	Deleting State = "deleting" // being deleted on its hosts
)

// Catalog looks templates up by name and tracks which hosts have them.
type Catalog struct {
	store *store.Store
	hosts *hosts.Registry
	log   *slog.Logger

	// mu guards refused. It is not held during calls to other code.
	mu sync.Mutex
	// refused has the templates that hosts reported without permission, each of which is
	// logged once, up to maxRefusals.
	refused map[refusal]bool
}

// maxRefusals bounds the memory that a host can use up by reporting invented templates.
const maxRefusals = 1000

type refusal struct{ host, template uuid.UUID }

// NewCatalog returns the catalog in a store.
func NewCatalog(s *store.Store, h *hosts.Registry, log *slog.Logger) *Catalog {
	return &Catalog{store: s, hosts: h, log: log, refused: make(map[refusal]bool)}
}

// name matches valid names of templates. They need no quoting in URLs and shells.
var name = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// reserved lists names that mean something else after /v1/templates/.
var reserved = []string{"builds", "import"}

// CheckName fails with invalid_argument if a name is reserved or looks like an id. The
// API document's schema checks its syntax.
func CheckName(s string) error {
	if slices.Contains(reserved, s) {
		return fault.New(fault.InvalidArgument, "name: %q has another meaning in the API's paths", s)
	}
	if _, err := id.Parse(id.Template, s); err == nil {
		return fault.New(fault.InvalidArgument, "name: %s is a template's id", s)
	}
	return nil
}

// tag matches valid tags, as in Docker's references.
var tag = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)

// LayerPrefix begins the names of builds' layers on hosts. Layers have no names in the
// database.
const LayerPrefix = "layer:"

// Latest is the default tag.
const Latest = "latest"

// Ref is a parsed reference to a template: "name", "name:tag", "name@version" or an id.
type Ref struct {
	ID      *uuid.UUID
	Name    string
	Tag     string // "latest" by default
	Version int32  // 0: use Tag
	Bare    bool   // only a name
}

// ParseRef parses a reference. ok is false if s is not one.
func ParseRef(s string) (r Ref, ok bool) {
	if u, err := id.Parse(id.Template, s); err == nil {
		return Ref{ID: &u}, true
	}
	if n, v, versioned := strings.Cut(s, "@"); versioned {
		number, err := strconv.ParseInt(v, 10, 32)
		return Ref{Name: n, Version: int32(number)}, err == nil && number > 0 && name.MatchString(n)
	}
	n, t, tagged := strings.Cut(s, ":")
	if !tagged {
		t = Latest
	}
	return Ref{Name: n, Tag: t, Bare: !tagged}, name.MatchString(n) && tag.MatchString(t)
}

// Resolve returns the ready template that a reference means for a team: its own, or else
// the platform's. It fails with not_found.
func (s *Catalog) Resolve(ctx context.Context, team uuid.UUID, ref string) (db.Template, error) {
	return named(team, ref, func(p db.ResolveTemplateParams) (db.Template, error) { return s.store.ResolveTemplate(ctx, p) })
}

// Locate is [Catalog.Resolve], but asks the hosts about an unknown template, because a
// host may have a new one that it has not reported yet.
func (s *Catalog) Locate(ctx context.Context, team uuid.UUID, ref string) (db.Template, error) {
	row, err := s.Resolve(ctx, team, ref)
	if !fault.Is(err, fault.NotFound) {
		return row, err
	}
	all := s.hosts.All()
	if len(all) == 0 {
		return row, fault.New(fault.NoCapacity, "no host is connected")
	}
	ask, cancel := context.WithTimeout(ctx, listWithin)
	defer cancel()
	failed := make([]error, len(all))
	var g errgroup.Group
	for i, host := range all {
		g.Go(func() error {
			failed[i] = s.ask(ask, host)
			return nil
		})
	}
	_ = g.Wait()
	if !slices.Contains(failed, nil) {
		return row, hosts.Fault(failed[0])
	}
	return s.Resolve(ctx, team, ref)
}

// ask stores which templates a host has.
func (s *Catalog) ask(ctx context.Context, host *hosts.Host) error {
	known, err := s.Known(ctx, host.ID)
	if err != nil {
		return err
	}
	has, err := host.Agent.Templates(ctx, connect.NewRequest(&hostagentv1.TemplatesRequest{}))
	if err != nil {
		return err
	}
	return s.sync(ctx, host.ID, known, has.Msg.Templates)
}

// Find is [Catalog.Resolve] for a template in any state. It prefers the team's own to the
// platform's, and one that is not being deleted.
func (s *Catalog) Find(ctx context.Context, team uuid.UUID, ref string) (db.Template, error) {
	return named(team, ref, func(p db.ResolveTemplateParams) (db.Template, error) {
		return s.store.FindTemplate(ctx, db.FindTemplateParams{TeamID: p.TeamID, ID: p.ID, Name: p.Name, Version: p.Version, Tag: p.Tag})
	})
}

// named returns the template that query finds for a reference.
func named(team uuid.UUID, ref string, query func(db.ResolveTemplateParams) (db.Template, error)) (db.Template, error) {
	r, ok := ParseRef(ref)
	if !ok {
		return db.Template{}, fault.New(fault.NotFound, "no template %q", ref)
	}
	p := db.ResolveTemplateParams{TeamID: team, ID: r.ID}
	switch {
	case r.Version > 0:
		p.Name, p.Version = &r.Name, &r.Version
	case r.ID == nil:
		p.Name, p.Tag = &r.Name, &r.Tag
	}
	row, err := query(p)
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no template %q", ref)
	}
	if err != nil {
		return row, fmt.Errorf("look up template: %w", err)
	}
	return row, nil
}

// Listed is a template with its tags.
type Listed struct {
	db.Template
	Tags []string
	// Failed is the last import of the name, if it failed. Only [Catalog.Show] sets it.
	Failed *db.FailedImport
}

// Show returns the template that a reference means for a team, with its tags. For the
// team's own, it includes the failure of the last import of the name. If the import of
// the name's first version failed, the not_found error says so.
func (s *Catalog) Show(ctx context.Context, team uuid.UUID, ref string) (Listed, error) {
	row, err := s.Resolve(ctx, team, ref)
	var none *fault.Error
	if errors.As(err, &none) && none.Code == fault.NotFound {
		r, _ := ParseRef(ref)
		if failed, _ := s.failed(ctx, team, r.Name); failed != nil {
			err = fault.New(fault.NotFound, "%s: its import failed at %s: %s", none.Message, failed.FailedAt.UTC().Format(time.RFC3339), failed.Error)
		}
	}
	if err != nil {
		return Listed{}, err
	}
	t, err := s.tagged(ctx, row)
	if err != nil || row.TeamID != team {
		return t, err
	}
	t.Failed, err = s.failed(ctx, team, row.Name)
	return t, err
}

// failed returns the last import of a team's name if it failed, and nil otherwise.
func (s *Catalog) failed(ctx context.Context, team uuid.UUID, name string) (*db.FailedImport, error) {
	row, err := s.store.GetFailedImport(ctx, db.GetFailedImportParams{TeamID: team, Name: name})
	if errors.Is(err, store.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up failed import: %w", err)
	}
	return &row, nil
}

func (s *Catalog) tagged(ctx context.Context, row db.Template) (Listed, error) {
	tags, err := s.store.ListTags(ctx, row.ID)
	if err != nil {
		return Listed{}, fmt.Errorf("list template's tags: %w", err)
	}
	return Listed{Template: row, Tags: tags}, nil
}

// Own is [Catalog.Resolve] for operations that change a template. It fails with
// permission_denied for the platform's templates.
func (s *Catalog) Own(ctx context.Context, team uuid.UUID, ref string) (db.Template, error) {
	row, err := s.Resolve(ctx, team, ref)
	if err == nil && row.TeamID != team {
		err = fault.New(fault.PermissionDenied, "template %q belongs to the platform", row.Name)
	}
	return row, err
}

// SetTag moves a tag to a team's template. A new tag counts as stored, an existing one
// does not count again.
func (s *Catalog) SetTag(ctx context.Context, team uuid.UUID, ref, tag string) (Listed, error) {
	row, err := s.Own(ctx, team, ref)
	if err != nil {
		return Listed{}, err
	}
	var n int64
	err = s.store.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockLimit(ctx, db.LockLimitParams{What: "tags", TeamID: team}); err != nil {
			return err
		}
		exists, err := q.HasTag(ctx, db.HasTagParams{ID: row.ID, Tag: tag})
		if err != nil {
			return err
		}
		if n, err = q.SetTag(ctx, db.SetTagParams{ID: row.ID, Tag: tag}); err != nil || exists {
			return err
		}
		return q.CheckRoom(ctx, team)
	})
	if err != nil {
		return Listed{}, fmt.Errorf("set tag: %w", err)
	}
	if n == 0 {
		return Listed{}, fault.New(fault.NotFound, "no template %q", ref)
	}
	return s.tagged(ctx, row)
}

// RemoveTag removes a tag from the team's templates of a name. A built template without
// tags is deleted when no sandbox uses it.
func (s *Catalog) RemoveTag(ctx context.Context, team uuid.UUID, name, tag string) error {
	n, err := s.store.RemoveTag(ctx, db.RemoveTagParams{TeamID: team, Name: name, Tag: tag})
	if err != nil {
		return fmt.Errorf("remove tag: %w", err)
	}
	if n == 0 {
		return fault.New(fault.NotFound, "no template %q has a tag %q", name, tag)
	}
	return nil
}

// page is the parsed cursor of a list of templates.
type page struct {
	name string
	id   uuid.UUID
}

func parseCursor(cursor string) (p page, err error) {
	if cursor == "" {
		return p, nil
	}
	raw, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil || len(raw) < 16 || !utf8.Valid(raw[16:]) || bytes.IndexByte(raw[16:], 0) >= 0 {
		return p, fault.New(fault.InvalidArgument, "cursor: does not belong to this list")
	}
	copy(p.id[:], raw)
	p.name = string(raw[16:])
	return p, nil
}

// cut returns at most limit rows and the cursor of the next page, if there are more.
func cut(rows []Listed, limit int) ([]Listed, string) {
	if len(rows) <= limit {
		return rows, ""
	}
	rows = rows[:limit]
	last := rows[limit-1]
	return rows, base64.RawURLEncoding.EncodeToString(append(last.ID[:], last.Name...))
}

// List returns a page of the templates that a team sees, sorted by name, and the cursor
// of the next page ("" on the last).
func (s *Catalog) List(ctx context.Context, team uuid.UUID, cursor string, limit int) ([]Listed, string, error) {
	after, err := parseCursor(cursor)
	if err != nil {
		return nil, "", err
	}
	rows, err := s.store.ListTemplates(ctx, db.ListTemplatesParams{TeamID: team, AfterName: after.name, AfterID: after.id, MaxRows: int32(limit) + 1})
	if err != nil {
		return nil, "", fmt.Errorf("list templates: %w", err)
	}
	list := make([]Listed, len(rows))
	for i, row := range rows {
		list[i] = Listed{Template: row.Template, Tags: row.Tags}
	}
	list, next := cut(list, limit)
	return list, next, nil
}

// Snapshots is [Catalog.List] for templates captured from the team's sandboxes.
func (s *Catalog) Snapshots(ctx context.Context, team uuid.UUID, cursor string, limit int) ([]Listed, string, error) {
	after, err := parseCursor(cursor)
	if err != nil {
		return nil, "", err
	}
	rows, err := s.store.ListSnapshots(ctx, db.ListSnapshotsParams{TeamID: team, AfterName: after.name, AfterID: after.id, MaxRows: int32(limit) + 1})
	if err != nil {
		return nil, "", fmt.Errorf("list snapshots: %w", err)
	}
	list := make([]Listed, len(rows))
	for i, row := range rows {
		list[i] = Listed{Template: row.Template, Tags: row.Tags}
	}
	list, next := cut(list, limit)
	return list, next, nil
}

// Known returns the templates that a host has, is creating or must delete, according to
// the database. Call it before you ask the host.
func (s *Catalog) Known(ctx context.Context, host uuid.UUID) ([]db.Template, error) {
	rows, err := s.store.ListHostTemplates(ctx, host)
	if err != nil {
		return nil, fmt.Errorf("list host's templates: %w", err)
	}
	return rows, nil
}

// sync stores which templates a host has, given what was known before the host was asked.
// It skips templates that a server is creating or deleting. A failure for one template
// does not stop the others.
func (s *Catalog) sync(ctx context.Context, host uuid.UUID, known []db.Template, has []*hostagentv1.Template) error {
	rows := make(map[uuid.UUID]db.Template, len(known))
	for _, row := range known {
		rows[row.ID] = row
	}
	var errs []error
	for _, t := range has {
		tid, err := id.Parse(id.Template, t.TemplateId)
		if err != nil {
			errs = append(errs, fmt.Errorf("host's template: %w", err))
			continue
		}
		if row, ok := rows[tid]; ok && (State(row.State) != Ready || Same(row, t)) {
			continue
		}
		errs = append(errs, s.Learn(ctx, host, t))
	}
	return errors.Join(errs...)
}

// Forget records that a host has lost a template. If no other host has it, a team's
// template is gone until the host has it again.
func (s *Catalog) Forget(ctx context.Context, host, template uuid.UUID) error {
	gone := []uuid.UUID{template}
	var lost []db.Template
	err := s.store.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockTemplate(ctx, template); err != nil {
			return err
		}
		if err := q.KeepLostTemplate(ctx, db.KeepLostTemplateParams{HostID: host, ID: template}); err != nil {
			return err
		}
		err := q.DropHostTemplates(ctx, db.DropHostTemplatesParams{HostID: host, Ids: gone})
		if err == nil {
			lost, err = q.DropLostTemplates(ctx, gone)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("record loss of host's template: %w", err)
	}
	for _, row := range lost {
		s.log.Error("the last host of a team's template has lost it", "template_id", id.Format(id.Template, row.ID), "team_id", id.Format(id.Team, row.TeamID), "name", row.Name)
	}
	return nil
}

// Same reports whether a row agrees with a host's report of the template. Each host
// builds the built-in template itself, so its size differs.
func Same(row db.Template, t *hostagentv1.Template) bool {
	m := Measured(uuid.Nil, row, t)
	if row.ID == uuid.Nil {
		return row.DiskMiB == m.DiskMiB && row.SizeBytes > 0
	}
	return row.SizeBytes == m.SizeBytes
}

// Learn records that a host has a template that it may have: the built-in one, one that
// it had lost, or one that a server made it create. It updates the template's sizes. It
// ignores all other templates that a host reports.
func (s *Catalog) Learn(ctx context.Context, host uuid.UUID, t *hostagentv1.Template) error {
	tid, err := id.Parse(id.Template, t.TemplateId)
	if err != nil {
		return fmt.Errorf("host's template: %w", err)
	}
	if err := s.learn(ctx, host, tid, t); err != nil {
		return fmt.Errorf("confirm template %s: %w", t.TemplateId, err)
	}
	return nil
}

func (s *Catalog) learn(ctx context.Context, host, tid uuid.UUID, t *hostagentv1.Template) error {
	row, err := s.mayHave(ctx, host, tid)
	if err == nil {
		m := Measured(host, row, t)
		return s.store.TemplateMeasured(ctx, db.TemplateMeasuredParams{ID: tid, HostID: host, SizeBytes: m.SizeBytes, DiskMiB: m.DiskMiB})
	}
	if !errors.Is(err, store.ErrNoRows) {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if of := (refusal{host, tid}); !s.refused[of] && len(s.refused) < maxRefusals {
		s.refused[of] = true
		s.log.Warn("host reported a template that no server made it create", "host_id", id.Format(id.Host, host), "template_id", t.TemplateId)
	}
	return nil
}

// mayHave returns the row of a template that a host may have. It records that the host
// has the built-in template or one that it had lost. It fails with [store.ErrNoRows] if
// the host may not have the template.
func (s *Catalog) mayHave(ctx context.Context, host, tid uuid.UUID) (row db.Template, err error) {
	if tid == uuid.Nil {
		return row, s.store.AddHostTemplate(ctx, db.AddHostTemplateParams{HostID: host, TemplateID: tid})
	}
	row, err = s.store.HostHasTemplate(ctx, db.HostHasTemplateParams{ID: tid, HostID: host})
	if !errors.Is(err, store.ErrNoRows) {
		return row, err
	}
	found, err := s.store.FindLostTemplate(ctx, db.FindLostTemplateParams{HostID: host, TemplateID: tid})
	if err != nil {
		return row, err
	}
	if !found {
		return row, store.ErrNoRows
	}
	s.log.Warn("host has a lost template again", "host_id", id.Format(id.Host, host), "template_id", id.Format(id.Template, tid))
	return s.store.GetTemplate(ctx, tid)
}

// Limits on a host's report of a template.
const (
	maxVCPUs = 1024
	// maxCopies is how many times its disk and memory a template may occupy: layers can
	// repeat what is below them, and there are captures of other sizes.
	maxCopies = 2
)

// Measured returns a host's report of a template's sizes as the server stores it. The host
// is not trusted: no size is larger than the template whose row is given can have. For
// the built-in template Measured ignores the host's disk size, because all tenants use it.
func Measured(host uuid.UUID, row db.Template, t *hostagentv1.Template) db.TemplateReadyParams {
	disk, memory := cmp.Or(row.DiskMiB, hostwire.DefaultDiskMiB), cmp.Or(row.MemoryMiB, hostwire.DefaultMemoryMiB)
	says := t.GetDiskMib()
	if row.ID == uuid.Nil {
		disk, says = hostwire.DefaultDiskMiB, hostwire.DefaultDiskMiB
	}
	most := maxCopies * (int64(disk) + int64(memory)) << 20
	return db.TemplateReadyParams{
		ID: row.ID, HostID: host, SizeBytes: min(max(t.GetSizeBytes(), 0), most), CreatedAt: t.GetCreatedAt().AsTime(),
		VCPUs: min(max(t.GetVcpus(), 0), maxVCPUs), MemoryMiB: min(max(t.GetMemoryMib(), 0), memory), DiskMiB: min(max(says, 0), disk),
		Limits: limits(t.GetDefaults().GetLimits()),
	}
}

// limits returns the limits in a host's report that a recipe could have set.
func limits(said map[string]int64) map[string]int64 {
	known := map[string]int64{}
	for name := range recipe.MinLimits {
		if n := said[name]; n > 0 {
			known[name] = min(n, recipe.MaxLimit)
		}
	}
	return known
}
