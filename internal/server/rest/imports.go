package rest

import (
	"net/http"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/server/spool"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// ImportTemplate answers POST /v1/templates/import.
func (a *API) ImportTemplate(w http.ResponseWriter, r *http.Request) {
	a.importReference(w, r, caller(r).Team)
}

// ImportPlatformTemplate answers POST /v1/admin/templates/import.
func (a *API) ImportPlatformTemplate(w http.ResponseWriter, r *http.Request) {
	a.importReference(w, r, uuid.Nil)
}

// ImportArchive answers POST /v1/templates/import/archive.
func (a *API) ImportArchive(w http.ResponseWriter, r *http.Request, p rest.ImportArchiveParams) {
	a.importImage(w, r, caller(r).Team, templates.Image{Name: p.Name, Archive: &spool.Body{Reader: r.Body, Length: r.ContentLength}, Tag: or(p.Tag, ""), DiskMiB: or(p.DiskMib, 0), Inert: or(p.Inert, false)})
}

// ImportPlatformArchive answers POST /v1/admin/templates/import/archive.
func (a *API) ImportPlatformArchive(w http.ResponseWriter, r *http.Request, p rest.ImportPlatformArchiveParams) {
	a.importImage(w, r, uuid.Nil, templates.Image{Name: p.Name, Archive: &spool.Body{Reader: r.Body, Length: r.ContentLength}, Tag: or(p.Tag, ""), DiskMiB: or(p.DiskMib, 0), Inert: or(p.Inert, false)})
}

func (a *API) importReference(w http.ResponseWriter, r *http.Request, team uuid.UUID) {
	var req rest.ImportTemplate
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	a.importImage(w, r, team, templates.Image{
		Name: req.Name, Reference: req.Reference, Username: or(req.Username, ""), Password: or(req.Password, ""),
		DiskMiB: or(req.DiskMib, 0), Inert: or(req.Inert, false),
	})
}

func (a *API) importImage(w http.ResponseWriter, r *http.Request, team uuid.UUID, i templates.Image) {
	row, err := a.Templates.Import(r.Context(), team, i)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.Header().Set("Location", "/v1/templates/"+row.Name)
	answer(w, http.StatusCreated, templateOf(row, []string{templates.Latest}))
}
