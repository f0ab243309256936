package rest

import (
	"net/http"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// templateOf converts a row for the API.
func templateOf(row db.Template, tags []string) rest.Template {
	t := rest.Template{
		Version: row.Version, Tags: append([]string{}, tags...),
		ID: id.Format(id.Template, row.ID), TeamID: id.Format(id.Team, row.TeamID), Name: row.Name, SizeBytes: row.SizeBytes,
		Vcpus: some(row.VCPUs), MemoryMib: some(row.MemoryMiB), DiskMib: row.DiskMiB, CreatedAt: row.CreatedAt.UTC(),
	}
	if row.CapturedFrom != nil {
		t.SandboxID = some(id.Format(id.Sandbox, *row.CapturedFrom))
	}
	if l := row.Limits; len(l) > 0 {
		t.Limits = &rest.TemplateLimits{
			DiskBytes: some(l["disk_bytes"]), DiskOps: some(l["disk_ops"]), NetBytes: some(l["net_bytes"]), NetPackets: some(l["net_packets"]),
		}
	}
	return t
}

func templateList(rows []templates.Listed) []rest.Template {
	list := make([]rest.Template, len(rows))
	for i, row := range rows {
		list[i] = templateOf(row.Template, row.Tags)
	}
	return list
}

// ListTemplates answers GET /v1/templates.
func (a *API) ListTemplates(w http.ResponseWriter, r *http.Request, params rest.ListTemplatesParams) {
	rows, next, err := a.Templates.List(r.Context(), caller(r).Team, or(params.Cursor, ""), or(params.Limit, defaultLimit))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, rest.TemplateList{Templates: templateList(rows), NextCursor: some(next)})
}

// ListSnapshots answers GET /v1/snapshots.
func (a *API) ListSnapshots(w http.ResponseWriter, r *http.Request, params rest.ListSnapshotsParams) {
	rows, next, err := a.Templates.Snapshots(r.Context(), caller(r).Team, or(params.Cursor, ""), or(params.Limit, defaultLimit))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, rest.SnapshotList{Snapshots: templateList(rows), NextCursor: some(next)})
}

// CreateSnapshot answers POST /v1/snapshots.
func (a *API) CreateSnapshot(w http.ResponseWriter, r *http.Request, params rest.CreateSnapshotParams) {
	var req rest.CreateSnapshot
	err := decode(r, &req)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	u, err := sandboxID(req.SandboxID)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, replayed, err := a.Templates.Snapshot(r.Context(), caller(r).Team, u, req.Name, or(params.IdempotencyKey, ""))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	markReplayed(w, replayed)
	w.Header().Set("Location", "/v1/snapshots/"+row.Name)
	answer(w, http.StatusCreated, templateOf(row, []string{templates.Latest}))
}

// DeleteSnapshot answers DELETE /v1/snapshots/{name}.
func (a *API) DeleteSnapshot(w http.ResponseWriter, r *http.Request, name string) {
	if err := a.Templates.Delete(r.Context(), caller(r).Team, name); err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// GetTemplate answers GET /v1/templates/{template}.
func (a *API) GetTemplate(w http.ResponseWriter, r *http.Request, template rest.TemplateRef) {
	t, err := a.Templates.Show(r.Context(), caller(r).Team, template)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	shown := templateOf(t.Template, t.Tags)
	if t.Failed != nil {
		shown.FailedImport = &rest.FailedImport{Error: t.Failed.Error, FailedAt: t.Failed.FailedAt.UTC()}
	}
	answer(w, http.StatusOK, shown)
}

// DeleteTemplate answers DELETE /v1/templates/{template}.
func (a *API) DeleteTemplate(w http.ResponseWriter, r *http.Request, template rest.TemplateRef) {
	if err := a.Templates.DeleteVersions(r.Context(), caller(r).Team, template); err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// SetTag answers PUT /v1/templates/{template}/tags/{tag}.
func (a *API) SetTag(w http.ResponseWriter, r *http.Request, template rest.TemplateRef, tag rest.TemplateTag) {
	t, err := a.Templates.SetTag(r.Context(), caller(r).Team, template, tag)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, templateOf(t.Template, t.Tags))
}

// RemoveTag answers DELETE /v1/templates/{template}/tags/{tag}.
func (a *API) RemoveTag(w http.ResponseWriter, r *http.Request, template rest.TemplateRef, tag rest.TemplateTag) {
	if err := a.Templates.RemoveTag(r.Context(), caller(r).Team, template, tag); err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
