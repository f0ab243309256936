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

// What a sandbox has unless it, or its template, says otherwise. The database has the
// memory as default_memory_mib().
const (
	DefaultVCPUs     = 1
	DefaultMemoryMiB = 512
)

// What becomes of a sandbox that was not used for its timeout.
const (
	DestroyOnTimeout = "destroy"
	PauseOnTimeout   = "pause"
)

// CreateParams is what a sandbox is asked to be.
type CreateParams struct {
	// Template is a name or an id.
	Template       string
	VCPUs          int32 // 0: the template's, else 1
	MemoryMiB      int32 // 0: the template's, else 512
	DiskMiB        int32 // 0: the template's
	TimeoutSeconds int32 // 0: never
	Envs           map[string]string
	Metadata       map[string]string
	// HostTags are tags that the sandbox's host must have.
	HostTags []string `json:",omitempty"`
	// OnTimeout is DestroyOnTimeout or PauseOnTimeout; empty: the former.
	OnTimeout string
	// AutoResume lets calls and requests resume the sandbox; nil: if it is
	// paused when its timeout ends.
	AutoResume *bool

	build *uuid.UUID // it is made for
}

// normal returns p with what is left open said, where that does not depend on
// the template.
func (p CreateParams) normal() CreateParams {
	p.OnTimeout = cmp.Or(p.OnTimeout, DestroyOnTimeout)
	if p.AutoResume == nil {
		auto := p.OnTimeout == PauseOnTimeout
		p.AutoResume = &auto
	}
	return p
}

// asked is what is asked for, however it was said.
func (p CreateParams) asked() CreateParams {
	p = p.normal()
	p.VCPUs, p.MemoryMiB = cmp.Or(p.VCPUs, DefaultVCPUs), cmp.Or(p.MemoryMiB, DefaultMemoryMiB)
	return p
}

// fit returns p with the sizes that a sandbox of the template gets, or fails
// with invalid_argument where it cannot have those that are asked for.
func (p CreateParams) fit(t db.Template) (CreateParams, error) {
	for _, size := range []struct {
		name           string
		asked          *int32
		has, otherwise int32
	}{
		{"vcpus", &p.VCPUs, t.VCPUs, DefaultVCPUs},
		{"memory_mib", &p.MemoryMiB, t.MemoryMiB, DefaultMemoryMiB},
	} {
		if size.has != 0 && *size.asked != 0 && *size.asked != size.has {
			return p, fault.New(fault.InvalidArgument, "%s: template %q was captured with %d and takes no other", size.name, t.Name, size.has)
		}
		*size.asked = cmp.Or(*size.asked, size.has, size.otherwise)
	}
	if p.DiskMiB != 0 && p.DiskMiB < t.DiskMiB {
		return p, fault.New(fault.InvalidArgument, "disk_mib: template %q has %d, which is the least", t.Name, t.DiskMiB)
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

// CheckEnvs fails with invalid_argument for names that no environment variable
// can have. The API document's schemas cannot speak of members' names.
func CheckEnvs(envs map[string]string) error {
	for k := range envs {
		if k == "" || strings.Contains(k, "=") {
			return fault.New(fault.InvalidArgument, "envs: %q is no environment variable: names are not empty and have no '='", k)
		}
	}
	return nil
}

func checkMetadata(m map[string]string) error {
	for k := range m {
		if k == "" || utf8.RuneCountInString(k) > 128 || strings.Contains(k, "=") {
			return fault.New(fault.InvalidArgument, "metadata: %q cannot be an entry: keys have 1 to 128 characters without '='", k)
		}
	}
	return nil
}

// Create makes a sandbox of a team and returns when it runs. It goes on when
// ctx ends before. With a key, the sandbox that the same key made before is
// returned, and replayed is true.
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

// CreateFor makes a sandbox of a template, which need not have a name, for a
// build, and returns when it runs. It is nobody's but the build's, and counts as
// any other of the team's. It goes on when ctx ends before: see [Service.End].
func (s *Service) CreateFor(ctx context.Context, team, build uuid.UUID, template db.Template, p CreateParams) (db.Sandbox, error) {
	p = p.normal()
	p.build = &build
	return s.createFrom(ctx, team, template, p, idempotency.Call{})
}

// createFrom reserves room for a sandbox and starts it.
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
	begun := row // what is returned is written while it starts
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

// needs is what the host of a sandbox must have.
func (p CreateParams) needs() scheduler.Request {
	return scheduler.Request{MemoryMiB: int64(p.MemoryMiB), VCPUs: int64(p.VCPUs), DiskMiB: saves(p.OnTimeout, p.MemoryMiB), Tags: p.HostTags}
}

// saves returns how much room a sandbox's host must have to save its memory.
func saves(onTimeout string, memoryMiB int32) int64 {
	if onTimeout == PauseOnTimeout {
		return int64(memoryMiB)
	}
	return 0
}

// places returns the hosts that a sandbox of a template may start on. Where
// none was heard of yet, as when everything was started a moment ago, they are
// asked first.
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
					s.Log.Debug("ask host", "host", h.URL, "error", err)
				}
				return nil
			})
		}
	}
	_ = asked.Wait()
	// Also where one came online since the first look.
	return s.Hosts.Places(ctx, template, p.needs())
}

// reserve writes the row of a sandbox that starts on the first of the places
// that still has room, and returns it with the places from that one on.
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
		// A host that others filled meanwhile is passed over.
		if !fault.Is(err, fault.NoCapacity) || len(from) == 1 {
			break
		}
	}
	if err != nil && !errors.Is(err, idempotency.ErrTaken) && !fault.Is(err, fault.NoCapacity) {
		err = fmt.Errorf("write sandbox: %w", err)
	}
	return row, from, err
}

// startOn starts the sandbox of a row, whose host is the first of those given,
// on that one or, where that cannot, on the next, and writes how that went.
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

// start asks the host for the sandbox of a row that is starting.
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
		// The host may have got the call and still be at it. What this does not reach
		// is a stray there.
		_ = s.destroy(s.Work.Context(), row.ID, host, log)
	}
	return nil, took, err
}

// started writes that a sandbox runs.
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
		log.Error("write that sandbox runs", "error", err)
		return row, err
	}
	if err != nil || State(running.State).ends() {
		// Deleted meanwhile. The deletion's own call may have come before ours.
		_ = s.destroy(s.Work.Context(), row.ID, host, log)
		s.metrics.created("deleted", took)
		return row, errDeleted()
	}
	s.metrics.created("ok", took)
	log.Info("sandbox runs", "template", row.TemplateName, "took", took)
	return running, nil
}

// markRunning writes that a sandbox which started runs, and returns its row. Of
// one that was deleted meanwhile, or that another server adopted because it took
// this one for dead, it returns the row as it is.
func markRunning(ctx context.Context, q *db.Queries, p db.SandboxRunningParams) (db.Sandbox, error) {
	row, err := q.SandboxRunning(ctx, p)
	if errors.Is(err, store.ErrNoRows) {
		return q.GetSandbox(ctx, p.ID)
	}
	return row, err
}

func errDeleted() error {
	return fault.New(fault.Conflict, "the sandbox was deleted while it started")
}

// startFailed writes why a sandbox did not start, and returns what the caller
// is told.
func (s *Service) startFailed(row db.Sandbox, err error) error {
	if s.Work.Context().Err() != nil {
		// The row stays as it is, the next server looks.
		return fault.New(fault.Unavailable, "the server is stopping")
	}
	if errors.Is(err, store.ErrNoRows) {
		return errDeleted()
	}
	f := startFault(row, err)
	s.metrics.created(string(f.Code), 0)
	if err := s.fail(s.Work.Context(), row, f.Message); err != nil && !errors.Is(err, store.ErrNoRows) {
		s.Log.Error("write that sandbox failed", "sandbox_id", id.Format(id.Sandbox, row.ID), "error", err)
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

// startFault is what the caller is told of a sandbox that did not start.
func startFault(row db.Sandbox, err error) *fault.Error {
	var wire *connect.Error
	if !errors.As(err, &wire) {
		return fault.Because(err, fault.Internal, "the sandbox could not be placed")
	}
	if reason(err) == hostwire.GuestStart {
		return fault.Because(err, fault.Unprocessable, "%s; template %q is probably at fault", wire.Message(), row.TemplateName)
	}
	told := hosts.Fault(err)
	switch {
	case fault.Is(told, fault.NotFound):
		return fault.Because(err, fault.NoCapacity, "the host no longer has template %q", row.TemplateName)
	case fault.Is(told, fault.Internal):
		return fault.Because(err, fault.Internal, "the host could not start the sandbox")
	}
	var f *fault.Error
	errors.As(told, &f)
	return f
}

// fail writes that a sandbox did not start and frees its idempotency key.
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

// mayElsewhere says whether what failed on one host may work on another: the
// host is full, leaving or unreachable. What the guest did would be the same on any
// host, and a guest that took too long has used up the caller's time.
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

// move reserves room for a sandbox that is starting on another host.
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
