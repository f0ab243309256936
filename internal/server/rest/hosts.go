package rest

import (
	"encoding/hex"
	"net/http"
	"strings"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
)

func hostID(text string) (uuid.UUID, error) { return parseID(id.Host, "host", text) }

// host converts a row for the API.
func host(row db.Host) rest.Host {
	h := rest.Host{
		ID: id.Format(id.Host, row.ID), Name: row.Name, Tags: row.Tags, Status: rest.HostStatus(hosts.Status(row)), Draining: row.Draining, URL: row.URL,
		Version: row.Version, Vmm: row.VMM, Accelerator: row.Accelerator, Cpus: row.CPUs, MemoryBytes: row.MemoryBytes, DiskBytes: row.DiskBytes,
		CapacityMib: row.CapacityMib, Slots: row.Slots, NetworkBlock: row.NetworkBlock,
		Load: rest.HostLoad{
			Sandboxes: row.Sandboxes, UsedMemoryMib: row.UsedMemoryMib, UsedVcpus: row.UsedVcpus, DiskFreeBytes: row.DiskFreeBytes,
		},
		Problems:  []rest.HostProblem{},
		CreatedAt: row.CreatedAt.UTC(), LastSeenAt: utc(row.LastSeenAt),
	}
	for _, p := range hosts.Problems(row) {
		h.Problems = append(h.Problems, rest.HostProblem{Kind: p.Kind, Object: some(p.Object), Message: p.Message, Since: p.Since.UTC()})
	}
	return h
}

// ListHosts answers GET /v1/admin/hosts.
func (a *API) ListHosts(w http.ResponseWriter, r *http.Request) {
	rows, err := a.Hosts.List(r.Context())
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	list := rest.HostList{Hosts: make([]rest.Host, len(rows))}
	for i, row := range rows {
		list.Hosts[i] = host(row)
	}
	answer(w, http.StatusOK, list)
}

// AddHost answers POST /v1/admin/hosts.
func (a *API) AddHost(w http.ResponseWriter, r *http.Request) {
	var req rest.AddHost
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	row, token, err := a.Hosts.Add(r.Context(), req.Name, or(req.Tags, nil))
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.Header().Set("Location", "/v1/admin/hosts/"+id.Format(id.Host, row.ID))
	answer(w, http.StatusCreated, rest.HostRegistration{Host: host(row), Token: token, ExpiresAt: row.RegistrationExpiresAt.UTC()})
}

// RenewHostToken answers POST /v1/admin/hosts/{host_id}/token.
func (a *API) RenewHostToken(w http.ResponseWriter, r *http.Request, text rest.HostID) {
	u, err := hostID(text)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, token, err := a.Hosts.Renew(r.Context(), u)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusCreated, rest.HostRegistration{Host: host(row), Token: token, ExpiresAt: row.RegistrationExpiresAt.UTC()})
}

// GetHost answers GET /v1/admin/hosts/{host_id}.
func (a *API) GetHost(w http.ResponseWriter, r *http.Request, text rest.HostID, params rest.GetHostParams) {
	u, err := hostID(text)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, load, err := a.Hosts.Describe(r.Context(), u)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	h := host(row)
	if or(params.Preview, false) {
		h.Loses = &rest.HostLoses{Sandboxes: load.Sandboxes, Templates: load.Templates}
	}
	answer(w, http.StatusOK, h)
}

// ChangeHost answers PATCH /v1/admin/hosts/{host_id}.
func (a *API) ChangeHost(w http.ResponseWriter, r *http.Request, text rest.HostID) {
	u, err := hostID(text)
	var req rest.ChangeHost
	if err == nil {
		err = decode(r, &req)
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	row, err := a.Hosts.Update(r.Context(), u, hosts.Change{Draining: req.Draining, Name: req.Name, Tags: or(req.Tags, nil)})
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, host(row))
}

// DeleteHost answers DELETE /v1/admin/hosts/{host_id}.
func (a *API) DeleteHost(w http.ResponseWriter, r *http.Request, text rest.HostID, params rest.DeleteHostParams) {
	u, err := hostID(text)
	if err == nil {
		var lost []uuid.UUID
		lost, err = a.Hosts.Delete(r.Context(), u, or(params.Force, false))
		a.Sandboxes.Changed(lost...)
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// RegisterHost answers POST /v1/hosts/register.
func (a *API) RegisterHost(w http.ResponseWriter, r *http.Request) {
	var req rest.RegisterHost
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	refresh, err := hex.DecodeString(req.RefreshHash)
	if err != nil {
		a.Fail(w, r, fault.New(fault.InvalidArgument, "refresh_hash: %v", err))
		return
	}
	c, err := a.Hosts.Enroll(r.Context(), hosts.Registration{Token: req.Token, URL: req.URL, Specs: specs(req.Status), Refresh: refresh, CSR: []byte(or(req.Csr, ""))})
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	observed(r).host = c.Host
	answer(w, http.StatusCreated, credentials(c))
}

// RefreshHost answers POST /v1/hosts/refresh.
func (a *API) RefreshHost(w http.ResponseWriter, r *http.Request) {
	var req rest.RefreshHost
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	next, err := hex.DecodeString(req.NextHash)
	if err != nil {
		a.Fail(w, r, fault.New(fault.InvalidArgument, "next_hash: %v", err))
		return
	}
	c, err := a.Hosts.RefreshCredentials(r.Context(), hosts.Renewal{Refresh: req.RefreshToken, Next: next, CSR: []byte(or(req.Csr, ""))})
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	observed(r).host = c.Host
	answer(w, http.StatusOK, credentials(c))
}

// HostHeartbeat answers POST /v1/hosts/heartbeat.
func (a *API) HostHeartbeat(w http.ResponseWriter, r *http.Request) {
	var req rest.HostHeartbeat
	if err := decode(r, &req); err != nil {
		a.Fail(w, r, err)
		return
	}
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok {
		a.Fail(w, r, fault.New(fault.Unauthenticated, "send the host's token as Authorization: Bearer"))
		return
	}
	var err error
	switch {
	case or(req.Leaving, false):
		err = a.Hosts.Leave(r.Context(), token)
	case req.Status == nil:
		err = fault.New(fault.InvalidArgument, "status: missing")
	default:
		_, err = a.Hosts.Beat(r.Context(), token, specs(*req.Status))
	}
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, rest.HeartbeatInterval{HeartbeatMs: a.Hosts.Heartbeat.Milliseconds()})
}

func specs(s rest.HostReport) hosts.Specs {
	return hosts.Specs{
		Version: s.Version, VMM: s.Vmm, Accelerator: s.Accelerator, CPUs: s.Cpus, MemoryBytes: s.MemoryBytes, DiskBytes: s.DiskBytes,
		CapacityMiB: s.CapacityMib, Slots: s.Slots, NetworkBlock: s.NetworkBlock,
		Sandboxes: s.Sandboxes, UsedMemoryMiB: s.UsedMemoryMib, UsedVCPUs: s.UsedVcpus, DiskFreeBytes: s.DiskFreeBytes,
	}
}

func credentials(c hosts.Credentials) rest.HostCredentials {
	return rest.HostCredentials{
		HostID: id.Format(id.Host, c.Host), Token: c.Token, ExpiresAt: c.Expires.UTC(), AgentToken: c.AgentToken,
		Certificate: some(string(c.Certificate)), Authority: some(string(c.Authority)), HeartbeatMs: c.Heartbeat.Milliseconds(),
	}
}
