package rest

import (
	"net/http"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/platform"
)

// parseID parses a public id that matches the document's pattern. Some of those are still
// not valid ids.
func parseID(kind id.Kind, what, text string) (uuid.UUID, error) {
	u, err := id.Parse(kind, text)
	if err != nil {
		return u, fault.Because(err, fault.NotFound, "no such %s", what)
	}
	return u, nil
}

// team converts a row for the API. role is the caller's; empty: none.
func team(row db.Team, role string) rest.Team {
	return rest.Team{ID: id.Format(id.Team, row.ID), Name: row.Name, Role: some(rest.TeamRole(role)), CreatedAt: row.CreatedAt.UTC()}
}

// ListTeams answers GET /v1/teams.
func (a *API) ListTeams(w http.ResponseWriter, r *http.Request) {
	rows, err := a.Teams.Of(r.Context(), caller(r).User)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.TeamList{Teams: make([]rest.Team, len(rows))}
	for i, t := range rows {
		list.Teams[i] = team(t.Team, t.Role)
	}
	answer(w, http.StatusOK, list)
}

// CreateTeam answers POST /v1/teams.
func (a *API) CreateTeam(w http.ResponseWriter, r *http.Request) {
	var req rest.NewTeam
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := a.Teams.Create(r.Context(), caller(r).User, req.Name)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	made := team(row, string(auth.Owner))
	w.Header().Set("Location", "/v1/teams/"+made.ID)
	answer(w, http.StatusCreated, made)
}

// GetTeam answers GET /v1/teams/{team_id}.
func (a *API) GetTeam(w http.ResponseWriter, r *http.Request, _ rest.TeamID) {
	row, err := a.Teams.Get(r.Context(), caller(r).Team)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, team(row, string(caller(r).Role)))
}

// RenameTeam answers PATCH /v1/teams/{team_id}.
func (a *API) RenameTeam(w http.ResponseWriter, r *http.Request, _ rest.TeamID) {
	var req rest.NewTeam
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := a.Teams.Rename(r.Context(), caller(r).Team, req.Name)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, team(row, string(caller(r).Role)))
}

// DeleteTeam answers DELETE /v1/teams/{team_id}.
func (a *API) DeleteTeam(w http.ResponseWriter, r *http.Request, _ rest.TeamID) {
	a.deleteTeam(w, r, caller(r).Team)
}

func (a *API) deleteTeam(w http.ResponseWriter, r *http.Request, team uuid.UUID) {
	done, err := a.Teams.Delete(r.Context(), team)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	if !done {
		w.WriteHeader(http.StatusAccepted)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// GetTeamQuota answers GET /v1/teams/{team_id}/quota.
func (a *API) GetTeamQuota(w http.ResponseWriter, r *http.Request, _ rest.TeamID) {
	a.quota(w, r, caller(r).Team)
}

func (a *API) quota(w http.ResponseWriter, r *http.Request, team uuid.UUID) {
	u, err := a.Platform.Usage(r.Context(), team)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, rest.TeamQuota{Running: u.Running, Vcpus: u.VCPUs, MemoryMib: u.MemoryMiB, DiskMib: u.DiskMiB, StoredMib: u.StoredMiB, Quota: quota(u.Quota), OwnQuota: u.Own})
}

func quota(q platform.Quota) rest.Quota {
	return rest.Quota{MaxRunning: q.Running, MaxVcpus: q.VCPUs, MaxMemoryMib: q.MemoryMiB, MaxDiskMib: q.DiskMiB, MaxStoredMib: q.StoredMiB}
}

func bounds(q rest.Quota) platform.Quota {
	return platform.Quota{Running: q.MaxRunning, VCPUs: q.MaxVcpus, MemoryMiB: q.MaxMemoryMib, DiskMiB: q.MaxDiskMib, StoredMiB: q.MaxStoredMib}
}

func teamMember(m db.GetMemberRow) rest.Member {
	return rest.Member{ID: id.Format(id.User, m.ID), Email: m.Email, Role: rest.TeamRole(m.Role), JoinedAt: m.CreatedAt.UTC()}
}

// ListMembers answers GET /v1/teams/{team_id}/members.
func (a *API) ListMembers(w http.ResponseWriter, r *http.Request, _ rest.TeamID) {
	rows, err := a.Teams.Members(r.Context(), caller(r).Team)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.MemberList{Members: make([]rest.Member, len(rows))}
	for i, m := range rows {
		list.Members[i] = teamMember(db.GetMemberRow(m))
	}
	answer(w, http.StatusOK, list)
}

// AddMember answers POST /v1/teams/{team_id}/members.
func (a *API) AddMember(w http.ResponseWriter, r *http.Request, text rest.TeamID) {
	var req rest.NewMember
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := a.Teams.Add(r.Context(), caller(r), req.Email, auth.Role(req.Role))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	m := teamMember(row)
	w.Header().Set("Location", "/v1/teams/"+text+"/members/"+m.ID)
	answer(w, http.StatusCreated, m)
}

// ChangeMember answers PATCH /v1/teams/{team_id}/members/{user_id}.
func (a *API) ChangeMember(w http.ResponseWriter, r *http.Request, _ rest.TeamID, user rest.UserID) {
	var req rest.MemberRole
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	u, err := parseID(id.User, "user", user)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := a.Teams.SetRole(r.Context(), caller(r), u, auth.Role(req.Role))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, teamMember(row))
}

// RemoveMember answers DELETE /v1/teams/{team_id}/members/{user_id}.
func (a *API) RemoveMember(w http.ResponseWriter, r *http.Request, _ rest.TeamID, user rest.UserID) {
	u, err := parseID(id.User, "user", user)
	if err == nil {
		err = a.Teams.Remove(r.Context(), caller(r), u)
	}
	a.done(w, r, err)
}

// LeaveTeam answers POST /v1/teams/{team_id}/leave.
func (a *API) LeaveTeam(w http.ResponseWriter, r *http.Request, _ rest.TeamID) {
	a.done(w, r, a.Teams.Leave(r.Context(), caller(r)))
}

// apiKey converts a row for the API.
func apiKey(k db.APIKey, maker *string) rest.Key {
	out := rest.Key{
		ID: id.Format(id.APIKey, k.ID), Name: k.Name, Prefix: k.Prefix, Scopes: make([]rest.KeyScope, len(k.Scopes)), CreatedBy: maker,
		CreatedAt: k.CreatedAt.UTC(), ExpiresAt: utc(k.ExpiresAt), LastUsedAt: utc(k.LastUsedAt),
	}
	for i, s := range k.Scopes {
		out.Scopes[i] = rest.KeyScope(s)
	}
	return out
}

// ListKeys answers GET /v1/keys.
func (a *API) ListKeys(w http.ResponseWriter, r *http.Request, params rest.ListKeysParams) {
	rows, next, err := a.Keys.List(r.Context(), caller(r).Team, or(params.Cursor, ""), or(params.Limit, defaultLimit))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.KeyList{Keys: make([]rest.Key, len(rows)), NextCursor: some(next)}
	for i, k := range rows {
		list.Keys[i] = apiKey(k.APIKey, k.Email)
	}
	answer(w, http.StatusOK, list)
}

// CreateKey answers POST /v1/keys.
func (a *API) CreateKey(w http.ResponseWriter, r *http.Request, _ rest.CreateKeyParams) {
	var req rest.NewKey
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	n := auth.NewKey{Name: req.Name, ExpiresAt: req.ExpiresAt}
	for _, s := range or(req.Scopes, nil) {
		n.Scopes = append(n.Scopes, auth.Scope(s))
	}
	key, row, err := a.Keys.Create(r.Context(), caller(r), n)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	k := apiKey(row, some(caller(r).Email))
	w.Header().Set("Location", "/v1/keys/"+k.ID)
	answer(w, http.StatusCreated, rest.CreatedKey{
		ID: k.ID, Name: k.Name, Prefix: k.Prefix, Scopes: k.Scopes, CreatedBy: k.CreatedBy, CreatedAt: k.CreatedAt, ExpiresAt: k.ExpiresAt, Key: key,
	})
}

// RevokeKey answers DELETE /v1/keys/{key_id}.
func (a *API) RevokeKey(w http.ResponseWriter, r *http.Request, key rest.KeyID, _ rest.RevokeKeyParams) {
	u, err := parseID(id.APIKey, "API key", key)
	if err == nil {
		err = a.Keys.Revoke(r.Context(), caller(r), u)
	}
	a.done(w, r, err)
}
