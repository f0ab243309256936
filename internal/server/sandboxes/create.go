package sandboxes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/idempotency"
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

// What happens to a sandbox when it was idle for its timeout.
const (
	DestroyOnTimeout = "destroy"
	PauseOnTimeout   = "pause"
)

// CreateParams describes a sandbox to create.
type CreateParams struct {
	// Template is a name or an id.
	Template       string
	VCPUs          int32 // 0: the template's, else the default
	MemoryMiB      int32 // 0: the template's, else the default
	DiskMiB        int32 // 0: the template's
	TimeoutSeconds int32 // 0: never
	Envs           map[string]string
	Metadata       map[string]string
	// HostTags are tags that the sandbox's host must have.
	HostTags []string `json:",omitempty"`
	// OnTimeout is DestroyOnTimeout (the default) or PauseOnTimeout.
	OnTimeout string
	// AutoResume lets calls and requests resume the sandbox; nil: only if OnTimeout is
	// PauseOnTimeout.
	AutoResume *bool

	build *uuid.UUID // the build that the sandbox belongs to
}

// normal returns p with the defaults that do not depend on the template.
func (p CreateParams) normal() CreateParams {
	p.OnTimeout = cmp.Or(p.OnTimeout, DestroyOnTimeout)
	if p.AutoResume == nil {
		auto := p.OnTimeout == PauseOnTimeout
		p.AutoResume = &auto
	}
	return p
}

// asked returns p in a canonical form for comparing requests with the same idempotency
// key.
func (p CreateParams) asked() CreateParams {
	p = p.normal()
	p.VCPUs, p.MemoryMiB = cmp.Or(p.VCPUs, hostwire.DefaultVCPUs), cmp.Or(p.MemoryMiB, hostwire.DefaultMemoryMiB)
	return p
}

// fit returns p with the sizes for a sandbox of the template. It fails with
// invalid_argument if the template does not allow the requested sizes.
func (p CreateParams) fit(t db.Template) (CreateParams, error) {
	for _, size := range []struct {
		name           string
		asked          *int32
		has, otherwise int32
	}{
		{"vcpus", &p.VCPUs, t.VCPUs, hostwire.DefaultVCPUs},
		{"memory_mib", &p.MemoryMiB, t.MemoryMiB, hostwire.DefaultMemoryMiB},
	} {
		if size.has != 0 && *size.asked != 0 && *size.asked != size.has {
			return p, fault.New(fault.InvalidArgument, "%s: template %q was captured with %d and allows no other value", size.name, t.Name, size.has)
		}
		*size.asked = cmp.Or(*size.asked, size.has, size.otherwise)
	}
	if p.DiskMiB != 0 && p.DiskMiB < t.DiskMiB {
		return p, fault.New(fault.InvalidArgument, "disk_mib: template %q needs at least %d", t.Name, t.DiskMiB)
	}
	p.DiskMiB = cmp.Or(p.DiskMiB, t.DiskMiB)
	return p, nil
}

func (p CreateParams) check() error {
	if err := CheckEnvs(p.Envs); err != nil {
		return err
	}
	return checkMetadata(p.Metadata)
}

// CheckEnvs fails with invalid_argument if an environment variable's name is not valid.
// OpenAPI schemas cannot describe the names of an object's members.
func CheckEnvs(envs map[string]string) error {
	for k := range envs {
		if k == "" || strings.Contains(k, "=") {
			return fault.New(fault.InvalidArgument, "envs: %q is not an environment variable: names must not be empty or contain '='", k)
		}
	}
	return nil
}

func checkMetadata(m map[string]string) error {
	for k := range m {
		if k == "" || utf8.RuneCountInString(k) > 128 || strings.Contains(k, "=") {
			return fault.New(fault.InvalidArgument, "metadata: %q is not a valid key: keys have 1 to 128 characters without '='", k)
		}
	}
	return nil
}

// Create creates a sandbox for a team and returns when it runs. The end of ctx does not
// stop the creation. If an earlier call with the same key created a sandbox, Create
// returns that one with replayed true.
func (s *Service) Create(ctx context.Context, team uuid.UUID, p CreateParams, key string) (row db.Sandbox, replayed bool, err error) {
	if err := p.check(); err != nil {
		return row, false, err
	}
	o, err := idempotency.Name(team, key, p.asked())
	if err != nil {
		return row, false, err
	}
	rows, replayed, err := s.once(ctx, o, func() ([]db.Sandbox, error) {
		template, err := s.Templates.Locate(ctx, team, p.Template)
		if err != nil {
			return nil, err
		}
		row, err := s.createFrom(ctx, team, template, p.normal(), o)
		return []db.Sandbox{row}, err
	})
	if err != nil {
		return row, replayed, err
	}
	return rows[0], replayed, nil
}

// CreateFor creates a sandbox for a build from a template, which may have no name, and
// returns when it runs. Only the build may use it, and it counts towards the team's
// quota. The end of ctx does not stop the creation: see [Service.End].
func (s *Service) CreateFor(ctx context.Context, team, build uuid.UUID, template db.Template, p CreateParams) (db.Sandbox, error) {
	p = p.normal()
	p.build = &build
	return s.createFrom(ctx, team, template, p, idempotency.Call{})
}

// createFrom reserves room on a host and starts the sandbox.
func (s *Service) createFrom(ctx context.Context, team uuid.UUID, template db.Template, p CreateParams, o idempotency.Call) (row db.Sandbox, err error) {
	if p, err = p.fit(template); err != nil {
		return row, err
	}
	var places []*hosts.Host
	err = s.step(ctx, "create", stepPlace, func(ctx context.Context) (err error) {
		places, err = s.places(ctx, template.ID, p)
		return err
	})
	if err != nil {
		return row, err
	}
	sandbox := uuid.New()
	end, err := s.beginCreation(sandbox)
	if err != nil {
		return row, err
	}
	err = s.step(ctx, "create", stepReserve, func(ctx context.Context) (err error) {
		row, places, err = s.reserve(ctx, sandbox, team, template, places, p, o)
		return err
	})
	if err != nil {
		end(nil, err)
		return row, err
	}
	c := s.creation(sandbox)
	begun := row // The goroutine must not share row with the return value.
	go func() {
		var started db.Sandbox
		err := s.Work.Guard(func() (err error) {
			started, err = s.startOn(ctx, begun, places, p)
			return err
		})
		end([]db.Sandbox{started}, err)
	}()
	select {
	case <-c.done:
		return c.row, c.err
	case <-ctx.Done():
		return db.Sandbox{}, ctx.Err()
	}
}

// needs returns what the sandbox's host must have.
func (p CreateParams) needs() scheduler.Request {
	return scheduler.Request{MemoryMiB: int64(p.MemoryMiB), VCPUs: int64(p.VCPUs), DiskMiB: saves(p.OnTimeout, p.MemoryMiB), Tags: p.HostTags}
}

// saves returns how much disk space in MiB the host needs to save the sandbox's memory.
func saves(onTimeout string, memoryMiB int32) int64 {
	if onTimeout == PauseOnTimeout {
		return int64(memoryMiB)
	}
	return 0
}

// places returns the hosts that a sandbox of a template may start on. If no host is
// online, as just after a start, it polls the hosts first.
func (s *Service) places(ctx context.Context, template uuid.UUID, p CreateParams) ([]*hosts.Host, error) {
	found, err := s.Hosts.Places(ctx, template, p.needs())
	if !fault.Is(err, fault.NoCapacity) {
		return found, err
	}
	online, counted := s.Store.CountOnlineHosts(ctx)
	if counted != nil {
		return nil, err
	}
	var asked errgroup.Group
	if online == 0 {
		for _, h := range s.Hosts.All() {
			asked.Go(func() error {
				if err := s.Hosts.Contact(ctx, h); err != nil {
					s.Log.Debug("poll host", "host", h.URL, "error", err)
				}
				return nil
			})
		}
	}
	_ = asked.Wait()
	// Try again in any case: a host may have come online since the first attempt.
	return s.Hosts.Places(ctx, template, p.needs())
}

// reserve inserts a starting sandbox's row on the first place that still has room. It
// returns the row and the places from that one on.
func (s *Service) reserve(ctx context.Context, sandbox, team uuid.UUID, template db.Template, places []*hosts.Host, p CreateParams, o idempotency.Call) (row db.Sandbox, from []*hosts.Host, err error) {
	metadata := p.Metadata
	if metadata == nil {
		metadata = map[string]string{}
	}
	for from = places; ; from = from[1:] {
		host := from[0].ID
		err = s.Store.InTx(ctx, func(q *db.Queries) (err error) {
			if err := s.Hosts.Reserve(ctx, q, host, p.needs()); err != nil {
				return err
			}
			row, err = q.InsertSandbox(ctx, db.InsertSandboxParams{
				ID: sandbox, TeamID: team, HostID: &host, TemplateID: template.ID, TemplateName: template.Name,
				VCPUs: p.VCPUs, MemoryMiB: p.MemoryMiB, DiskMiB: p.DiskMiB, TimeoutSeconds: p.TimeoutSeconds,
				Metadata: metadata, CreatedAt: store.Now(), OnTimeout: p.OnTimeout, AutoResume: *p.AutoResume, BuildID: p.build,
			})
			if err != nil {
				return err
			}
			return o.Claim(ctx, q, db.ClaimIdempotencyKeyParams{SandboxID: &sandbox})
		})
		// Skip a host that concurrent requests have filled.
		if !fault.Is(err, fault.NoCapacity) || len(from) == 1 {
			break
		}
	}
	if err != nil && !errors.Is(err, idempotency.ErrTaken) && !fault.Is(err, fault.NoCapacity) {
		err = fmt.Errorf("insert sandbox: %w", err)
	}
	return row, from, err
}

// startOn starts a sandbox on the first of the places and, if that fails, on the next
// ones. It stores the result.
func (s *Service) startOn(ctx context.Context, row db.Sandbox, places []*hosts.Host, p CreateParams) (db.Sandbox, error) {
	var failed error
	for i, host := range places {
		if i > 0 {
			moved, err := s.move(row, host, p)
			if fault.Is(err, fault.NoCapacity) {
				continue
			}
			if err != nil {
				failed = err
				break
			}
			row = moved
		}
		made, took, err := s.start(ctx, row, host, p.Envs)
		if err == nil {
			return s.started(ctx, row, host, made, took)
		}
		if failed = err; !mayElsewhere(err) || s.Work.Context().Err() != nil {
			break
		}
	}
	return row, s.startFailed(row, failed)
}

// start makes the host create a sandbox.
func (s *Service) start(ctx context.Context, row db.Sandbox, host *hosts.Host, envs map[string]string) (made *hostagentv1.Sandbox, took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(s.Work.For(ctx), createTimeout)
	defer cancel()
	begun := time.Now()
	var answer *connect.Response[hostagentv1.CreateResponse]
	err = s.step(ctx, "create", stepHost, func(ctx context.Context) (err error) {
		answer, err = host.Agent.Create(ctx, connect.NewRequest(&hostagentv1.CreateRequest{
			SandboxId: id.Format(id.Sandbox, row.ID), TeamId: id.Format(id.Team, row.TeamID), TemplateId: id.Format(id.Template, row.TemplateID),
			Vcpus: row.VCPUs, MemoryMib: row.MemoryMiB, DiskMib: row.DiskMiB, TimeoutSeconds: row.TimeoutSeconds,
			Envs: envs, AccessToken: s.Tokens.Guest(row.ID), PauseOnTimeout: row.OnTimeout == PauseOnTimeout,
		}))
		return err
	})
	took = time.Since(begun)
	if err == nil {
		return answer.Msg.GetSandbox(), took, nil
	}
	log := s.logOn(row.ID, host)
	log.Error("create sandbox", "error", err)
	if !connect.IsWireError(err) && s.Work.Context().Err() == nil {
		// The host may still execute the call. If this call does not reach it,
		// reconciliation destroys the orphan.
		_ = s.destroy(s.Work.Context(), row.ID, host, log)
	}
	return nil, took, err
}

// started marks a sandbox running.
func (s *Service) started(ctx context.Context, row db.Sandbox, host *hosts.Host, made *hostagentv1.Sandbox, took time.Duration) (db.Sandbox, error) {
	log := s.logOn(row.ID, host)
	ms, at := took.Milliseconds(), store.Now()
	var running db.Sandbox
	err := s.step(s.Work.For(ctx), "create", stepWrite, func(ctx context.Context) error {
		return work.Persist(ctx, func(ctx context.Context) (err error) {
			running, err = markRunning(ctx, s.Store.Queries, db.SandboxRunningParams{
				ID: row.ID, HostID: row.HostID, StartedAt: &at, ExpiresAt: Expiry(row, made, at), DiskMiB: disk(row, made), StartMs: &ms,
			})
			return err
		})
	})
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		log.Error("mark sandbox running", "error", err)
		return row, err
	}
	if err != nil || State(running.State).ends() {
		// A concurrent deletion may have called the host before the creation did.
		_ = s.destroy(s.Work.Context(), row.ID, host, log)
		s.metrics.created("deleted", took)
		return row, errDeleted()
	}
	s.metrics.created("ok", took)
	log.Info("sandbox started", "template", row.TemplateName, "took", took)
	return running, nil
}

// markRunning marks a started sandbox running and returns its row. If the sandbox was
// deleted, or another server adopted it because it took this one for dead, it returns the
// current row.
func markRunning(ctx context.Context, q *db.Queries, p db.SandboxRunningParams) (db.Sandbox, error) {
	row, err := q.SandboxRunning(ctx, p)
	if errors.Is(err, store.ErrNoRows) {
		return q.GetSandbox(ctx, p.ID)
	}
	return row, err
}

func errDeleted() error {
	return fault.New(fault.Conflict, "the sandbox was deleted during its start")
}

// startFailed marks a sandbox failed and returns the error for the caller.
func (s *Service) startFailed(row db.Sandbox, err error) error {
	if s.Work.Context().Err() != nil {
		// Leave the row to the next server.
		return fault.New(fault.Unavailable, "the server is stopping")
	}
	if errors.Is(err, store.ErrNoRows) {
		return errDeleted()
	}
	f := startFault(row, err)
	s.metrics.created(string(f.Code), 0)
	if err := s.fail(s.Work.Context(), row, f.Message); err != nil && !errors.Is(err, store.ErrNoRows) {
		s.Log.Error("mark sandbox failed", "sandbox_id", id.Format(id.Sandbox, row.ID), "error", err)
	}
	return f
}

// reason returns the [hostwire.ErrorReason] of a host's error, or "" if it has none.
func reason(err error) string {
	var wire *connect.Error
	if !errors.As(err, &wire) || !connect.IsWireError(err) {
		return ""
	}
	return wire.Meta().Get(hostwire.ErrorReason)
}

// startFault converts the error of a start for the caller.
func startFault(row db.Sandbox, err error) *fault.Error {
	var wire *connect.Error
	if !errors.As(err, &wire) {
		return fault.Because(err, fault.Internal, "cannot place the sandbox")
	}
	if reason(err) == hostwire.GuestStart {
		return fault.Because(err, fault.Unprocessable, "%s; the cause is probably template %q", hosts.Message(err), row.TemplateName)
	}
	told := hosts.Fault(err)
	switch {
	case fault.Is(told, fault.NotFound):
		return fault.Because(err, fault.NoCapacity, "the host no longer has template %q", row.TemplateName)
	case fault.Is(told, fault.Internal):
		return fault.Because(err, fault.Internal, "the host failed to start the sandbox")
	}
	var f *fault.Error
	errors.As(told, &f)
	return f
}

// fail marks a sandbox failed and frees its idempotency key.
func (s *Service) fail(ctx context.Context, row db.Sandbox, why string) error {
	return work.Persist(ctx, func(ctx context.Context) error {
		return s.Store.InTx(ctx, func(q *db.Queries) error {
			if err := q.FreeIdempotencyKeys(ctx, &row.ID); err != nil {
				return err
			}
			_, err := q.SandboxFailed(ctx, db.SandboxFailedParams{ID: row.ID, HostID: row.HostID, Error: why})
			return err
		})
	})
}

// mayElsewhere reports whether a start that failed on one host may succeed on another,
// because the host is full, leaving or unreachable. A guest would fail the same way on
// any host, and a slow guest has used up the caller's time.
func mayElsewhere(err error) bool {
	if !connect.IsWireError(err) {
		return connect.CodeOf(err) != connect.CodeCanceled
	}
	switch reason(err) {
	case hostwire.GuestStart, hostwire.GuestSlow:
		return false
	}
	switch connect.CodeOf(err) {
	case connect.CodeResourceExhausted, connect.CodeUnavailable, connect.CodeNotFound, connect.CodeUnauthenticated:
		return true
	}
	return false
}

// move moves a starting sandbox's reservation to another host.
func (s *Service) move(row db.Sandbox, to *hosts.Host, p CreateParams) (db.Sandbox, error) {
	var moved db.Sandbox
	err := work.Persist(s.Work.Context(), func(ctx context.Context) error {
		return s.Store.InTx(ctx, func(q *db.Queries) error {
			if err := s.Hosts.Reserve(ctx, q, to.ID, p.needs()); err != nil {
				return err
			}
			var err error
			moved, err = q.SandboxMoves(ctx, db.SandboxMovesParams{ID: row.ID, ToHost: &to.ID, FromHost: row.HostID})
			return err
		})
	})
	return moved, err
}

func (s *Service) logOn(sandbox uuid.UUID, host *hosts.Host) *slog.Logger {
	return s.Log.With("sandbox_id", id.Format(id.Sandbox, sandbox), "host", host.URL)
}
