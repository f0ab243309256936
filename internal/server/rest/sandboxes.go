package rest

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
)

// Defaults, as in the document.
const (
	defaultTemplate = "minimal"
	defaultTimeout  = 300
	defaultLimit    = 100
)

// or returns *p, or otherwise if p is nil.
func or[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}

// some returns a pointer to v unless v is zero.
func some[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

func sandboxID(text string) (uuid.UUID, error) { return parseID(id.Sandbox, "sandbox", text) }

// sandbox converts a row for the API. It includes the sandbox's tokens only for callers
// who may use them, not for read-only keys or admins of the platform.
func (a *API) sandbox(r *http.Request, row db.Sandbox) rest.Sandbox {
	wire := id.Format(id.Sandbox, row.ID)
	s := rest.Sandbox{
		ID: wire, TeamID: id.Format(id.Team, row.TeamID), TemplateID: id.Format(id.Template, row.TemplateID), Template: row.TemplateName,
		State: rest.SandboxState(row.State), Vcpus: row.VCPUs, MemoryMib: row.MemoryMiB, DiskMib: row.DiskMiB, TimeoutSeconds: row.TimeoutSeconds,
		OnTimeout: rest.OnTimeout(row.OnTimeout), AutoResume: row.AutoResume,
		Metadata: row.Metadata, CreatedAt: row.CreatedAt.UTC(), StartedAt: utc(row.StartedAt), ExpiresAt: utc(row.ExpiresAt), PausedAt: utc(row.PausedAt), EndedAt: utc(row.EndedAt),
		Error: some(row.Error), StartMs: row.StartMs,
		URL: a.sandboxURL(wire),
	}
	if who := caller(r); who.Team == row.TeamID && who.CanWrite() {
		s.AccessToken, s.TrafficToken = some(a.Tokens.Access(row.ID, row.TokenEpoch)), some(a.Tokens.Traffic(row.ID, row.TokenEpoch))
	}
	if row.HostID != nil {
		s.HostID = some(id.Format(id.Host, *row.HostID))
	}
	if row.ForkedFrom != nil {
		s.ForkedFrom = some(id.Format(id.Sandbox, *row.ForkedFrom))
	}
	if row.EndReason != nil {
		s.EndReason = some(rest.SandboxEndReason(*row.EndReason))
	}
	s.EndedBecause = row.EndedBecause
	if c := sandboxes.ConditionOf(row); c.Reason != "" {
		s.Condition = &rest.Condition{Kind: rest.ConditionKind(c.Reason.Kind()), Reason: rest.ConditionReason(c.Reason), Message: c.Text(), Since: c.Since.UTC()}
	}
	if sandboxes.State(row.State).Ended() {
		s.ExpiresAt, s.PausedAt = nil, nil
	}
	return s
}

func utc(t *time.Time) *time.Time {
	if t == nil {
		return nil
	}
	u := t.UTC()
	return &u
}

// CreateSandbox answers POST /v1/sandboxes.
func (a *API) CreateSandbox(w http.ResponseWriter, r *http.Request, params rest.CreateSandboxParams) {
	var req rest.CreateSandbox
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	p := sandboxes.CreateParams{
		Template: or(req.Template, defaultTemplate), VCPUs: or(req.Vcpus, 0), MemoryMiB: or(req.MemoryMib, 0), DiskMiB: or(req.DiskMib, 0),
		TimeoutSeconds: or(req.TimeoutSeconds, defaultTimeout), OnTimeout: string(or(req.OnTimeout, "")), AutoResume: req.AutoResume, Envs: or(req.Envs, nil), Metadata: or(req.Metadata, nil),
		HostTags: or(req.HostTags, nil),
	}
	row, replayed, err := a.Sandboxes.Create(r.Context(), caller(r).Team, p, or(params.IdempotencyKey, ""))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	markReplayed(w, replayed)
	sb := a.sandbox(r, row)
	w.Header().Set("Location", "/v1/sandboxes/"+sb.ID)
	answer(w, http.StatusCreated, sb)
}

// markReplayed marks a response that repeats the result of an earlier call with the same
// key.
func markReplayed(w http.ResponseWriter, replayed bool) {
	if replayed {
		w.Header().Set("Idempotent-Replayed", "true")
	}
}

// ListSandboxes answers GET /v1/sandboxes.
func (a *API) ListSandboxes(w http.ResponseWriter, r *http.Request, params rest.ListSandboxesParams) {
	f := sandboxes.Filter{Cursor: or(params.Cursor, ""), Limit: or(params.Limit, defaultLimit)}
	for _, s := range or(params.State, nil) {
		f.States = append(f.States, sandboxes.State(s))
	}
	for _, pair := range or(params.Metadata, nil) {
		k, v, _ := strings.Cut(pair, "=")
		if other, twice := f.Metadata[k]; twice && other != v {
			// No sandbox has two values for one key.
			answer(w, http.StatusOK, rest.SandboxList{Sandboxes: []rest.Sandbox{}})
			return
		}
		if f.Metadata == nil {
			f.Metadata = make(map[string]string)
		}
		f.Metadata[k] = v
	}
	rows, next, err := a.Sandboxes.List(r.Context(), caller(r).Team, f)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	a.answerSandboxes(w, r, rows, next)
}

// answerSandboxes responds with a page of sandboxes.
func (a *API) answerSandboxes(w http.ResponseWriter, r *http.Request, rows []db.Sandbox, next string) {
	list := rest.SandboxList{Sandboxes: make([]rest.Sandbox, len(rows)), NextCursor: some(next)}
	for i, row := range rows {
		list.Sandboxes[i] = a.sandbox(r, row)
	}
	answer(w, http.StatusOK, list)
}

// GetSandbox answers GET /v1/sandboxes/{sandbox_id}.
func (a *API) GetSandbox(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	u, err := sandboxID(sandbox)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := a.Sandboxes.Get(r.Context(), caller(r).Team, u)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, a.sandbox(r, row))
}

// deleter names the caller for the record of who deleted a sandbox.
func deleter(r *http.Request) string {
	who := caller(r)
	if who.HasKey() {
		return "key " + id.Format(id.APIKey, who.Key)
	}
	return "user " + id.Format(id.User, who.User)
}

// DeleteSandbox answers DELETE /v1/sandboxes/{sandbox_id}.
func (a *API) DeleteSandbox(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	u, err := sandboxID(sandbox)
	if err == nil {
		err = a.Sandboxes.Delete(r.Context(), caller(r).Team, u, deleter(r))
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// PauseSandbox answers POST /v1/sandboxes/{sandbox_id}/pause.
func (a *API) PauseSandbox(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	a.change(w, r, sandbox, a.Sandboxes.Pause)
}

// ResumeSandbox answers POST /v1/sandboxes/{sandbox_id}/resume.
func (a *API) ResumeSandbox(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	a.change(w, r, sandbox, a.Sandboxes.Resume)
}

// RebootSandbox answers POST /v1/sandboxes/{sandbox_id}/reboot.
func (a *API) RebootSandbox(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	a.change(w, r, sandbox, a.Sandboxes.Reboot)
}

// PingSandbox answers POST /v1/sandboxes/{sandbox_id}/ping.
func (a *API) PingSandbox(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	a.change(w, r, sandbox, a.Sandboxes.Ping)
}

// RevokeTokens answers POST /v1/sandboxes/{sandbox_id}/tokens/revoke.
func (a *API) RevokeTokens(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	a.change(w, r, sandbox, a.Sandboxes.RevokeTokens)
}

// change runs an operation on a sandbox and responds with the sandbox.
func (a *API) change(w http.ResponseWriter, r *http.Request, sandbox string, f func(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error)) {
	u, err := sandboxID(sandbox)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := f(r.Context(), caller(r).Team, u)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, a.sandbox(r, row))
}

// ForkSandbox answers POST /v1/sandboxes/{sandbox_id}/fork.
func (a *API) ForkSandbox(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID, params rest.ForkSandboxParams) {
	u, err := sandboxID(sandbox)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	var req rest.ForkRequest
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	rows, replayed, err := a.Sandboxes.Fork(r.Context(), caller(r).Team, u, int(or(req.Count, 1)), or(params.IdempotencyKey, ""))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	markReplayed(w, replayed)
	made := rest.ForkResult{Sandboxes: make([]rest.Sandbox, len(rows))}
	for i, row := range rows {
		made.Sandboxes[i] = a.sandbox(r, row)
	}
	answer(w, http.StatusCreated, made)
}

// GetSandboxMetrics answers GET /v1/sandboxes/{sandbox_id}/metrics.
func (a *API) GetSandboxMetrics(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	u, err := sandboxID(sandbox)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	m, err := a.Sandboxes.Metrics(r.Context(), caller(r).Team, u)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, rest.SandboxMetrics{
		Time: m.GetTime().AsTime(), CPUCount: m.CpuCount, CPUUsedPct: m.CpuUsedPct,
		MemoryTotalBytes: m.MemoryTotalBytes, MemoryUsedBytes: m.MemoryUsedBytes,
		DiskTotalBytes: m.DiskTotalBytes, DiskUsedBytes: m.DiskUsedBytes, HostMemoryBytes: m.HostMemoryBytes,
	})
}

// GetSandboxLogs answers GET /v1/sandboxes/{sandbox_id}/logs.
func (a *API) GetSandboxLogs(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	u, err := sandboxID(sandbox)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	console, err := a.Sandboxes.Console(r.Context(), caller(r).Team, u)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write(console)
}
