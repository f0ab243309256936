package rest

import (
	"net/http"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/platform"
)

func settings(s platform.Settings) rest.Settings {
	return rest.Settings{SignupOpen: s.SignUpOpen, DefaultQuota: quota(s.Quota)}
}

// GetSettings answers GET /v1/admin/settings.
func (a *API) GetSettings(w http.ResponseWriter, r *http.Request) {
	s, err := a.Platform.Settings(r.Context())
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, settings(s))
}

// SetSettings answers PUT /v1/admin/settings.
func (a *API) SetSettings(w http.ResponseWriter, r *http.Request) {
	var req rest.Settings
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	s, err := a.Platform.SetSettings(r.Context(), platform.Settings{SignUpOpen: req.SignupOpen, Quota: bounds(req.DefaultQuota)})
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, settings(s))
}

func adminUser(u db.User) rest.AdminUser {
	return rest.AdminUser{ID: id.Format(id.User, u.ID), Email: u.Email, Admin: u.Admin, Active: u.Active, Verified: u.VerifiedAt != nil, CreatedAt: u.CreatedAt.UTC()}
}

// AdminListUsers answers GET /v1/admin/users.
func (a *API) AdminListUsers(w http.ResponseWriter, r *http.Request, params rest.AdminListUsersParams) {
	rows, next, err := a.Users.List(r.Context(), or(params.EmailPrefix, ""), or(params.Cursor, ""), or(params.Limit, defaultLimit))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.AdminUserList{Users: make([]rest.AdminUser, len(rows)), NextCursor: some(next)}
	for i, u := range rows {
		list.Users[i] = adminUser(u)
	}
	answer(w, http.StatusOK, list)
}

// AdminCreateUser answers POST /v1/admin/users.
func (a *API) AdminCreateUser(w http.ResponseWriter, r *http.Request) {
	var req rest.NewUser
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	user, link, err := a.Users.Create(r.Context(), req.Email, or(req.Admin, false))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	u := adminUser(user)
	w.Header().Set("Location", "/v1/admin/users/"+u.ID)
	answer(w, http.StatusCreated, rest.CreatedUser{User: u, ResetURL: link})
}

// AdminChangeUser answers PATCH /v1/admin/users/{user_id}.
func (a *API) AdminChangeUser(w http.ResponseWriter, r *http.Request, user rest.UserID) {
	var req rest.ChangeUser
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	u, err := parseID(id.User, "user", user)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := a.Users.Change(r.Context(), u, req.Active, req.Admin)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, adminUser(row))
}

// AdminListTeams answers GET /v1/admin/teams.
func (a *API) AdminListTeams(w http.ResponseWriter, r *http.Request, params rest.AdminListTeamsParams) {
	rows, next, err := a.Teams.List(r.Context(), or(params.Cursor, ""), or(params.Limit, defaultLimit))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.TeamList{Teams: make([]rest.Team, len(rows)), NextCursor: some(next)}
	for i, t := range rows {
		list.Teams[i] = team(t, "")
	}
	answer(w, http.StatusOK, list)
}

// AdminDeleteTeam answers DELETE /v1/admin/teams/{team_id}.
func (a *API) AdminDeleteTeam(w http.ResponseWriter, r *http.Request, team rest.TeamID) {
	u, err := parseID(id.Team, "team", team)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	a.deleteTeam(w, r, u)
}

// AdminGetQuota answers GET /v1/admin/teams/{team_id}/quota.
func (a *API) AdminGetQuota(w http.ResponseWriter, r *http.Request, team rest.TeamID) {
	u, err := parseID(id.Team, "team", team)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	a.quota(w, r, u)
}

// AdminSetQuota answers PUT /v1/admin/teams/{team_id}/quota.
func (a *API) AdminSetQuota(w http.ResponseWriter, r *http.Request, team rest.TeamID) {
	var req rest.Quota
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	u, err := parseID(id.Team, "team", team)
	if err == nil {
		q := bounds(req)
		err = a.Platform.SetQuota(r.Context(), u, &q)
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	a.quota(w, r, u)
}

// AdminDeleteQuota answers DELETE /v1/admin/teams/{team_id}/quota.
func (a *API) AdminDeleteQuota(w http.ResponseWriter, r *http.Request, team rest.TeamID) {
	u, err := parseID(id.Team, "team", team)
	if err == nil {
		err = a.Platform.SetQuota(r.Context(), u, nil)
	}
	a.done(w, r, err)
}

// AdminListSandboxes answers GET /v1/admin/sandboxes.
func (a *API) AdminListSandboxes(w http.ResponseWriter, r *http.Request, params rest.AdminListSandboxesParams) {
	rows, next, err := a.Platform.Sandboxes(r.Context(), or(params.Cursor, ""), or(params.Limit, defaultLimit))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	a.answerSandboxes(w, r, rows, next)
}

// AdminDeleteSandbox answers DELETE /v1/admin/sandboxes/{sandbox_id}.
func (a *API) AdminDeleteSandbox(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	u, err := sandboxID(sandbox)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := a.Sandboxes.Lookup(r.Context(), u)
	if err == nil {
		err = a.Sandboxes.Delete(r.Context(), row.TeamID, u, deleter(r))
	}
	a.done(w, r, err)
}

// AdminListTemplates answers GET /v1/admin/templates.
func (a *API) AdminListTemplates(w http.ResponseWriter, r *http.Request, params rest.AdminListTemplatesParams) {
	rows, next, err := a.Platform.Templates(r.Context(), or(params.Cursor, ""), or(params.Limit, defaultLimit))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, rest.TemplateList{Templates: templateList(rows), NextCursor: some(next)})
}

// AdminDeleteTemplate answers DELETE /v1/admin/templates/{template_id}.
func (a *API) AdminDeleteTemplate(w http.ResponseWriter, r *http.Request, template rest.TemplateIDPath) {
	u, err := parseID(id.Template, "template", template)
	if err == nil {
		err = a.Templates.DeleteAny(r.Context(), u)
	}
	a.done(w, r, err)
}
