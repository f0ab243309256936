package rest

import (
	"net/http"
	"time"

	"github.com/google/uuid"
	openapi_types "github.com/oapi-codegen/runtime/types"

	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/metrics"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/usage"
)

// days returns the requested range of days (default: the current month up to today).
func days(from, to *openapi_types.Date) (first, last time.Time) {
	last = usage.Today()
	if to != nil {
		last = to.Time
	}
	first = time.Date(last.Year(), last.Month(), 1, 0, 0, 0, 0, time.UTC)
	if from != nil {
		first = from.Time
	}
	return first, last
}

func amount(a usage.Amount) rest.UsageAmount {
	return rest.UsageAmount{VcpuSeconds: a.VCPUSeconds, MemoryGibSeconds: a.GiBSeconds, SandboxStarts: a.Starts}
}

// GetUsage answers GET /v1/usage.
func (a *API) GetUsage(w http.ResponseWriter, r *http.Request, params rest.GetUsageParams) {
	from, to := days(params.From, params.To)
	used, err := a.Usage.Of(r.Context(), caller(r).Team, from, to)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	stored, err := a.Usage.Stored(r.Context(), caller(r).Team)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	u := rest.Usage{StoredMib: stored, From: openapi_types.Date{Time: from}, To: openapi_types.Date{Time: to}, Days: make([]rest.UsageDay, len(used))}
	var total usage.Amount
	for i, d := range used {
		u.Days[i] = rest.UsageDay{Day: openapi_types.Date{Time: d.Day}, Amount: amount(d.Amount)}
		total = total.Add(d.Amount)
	}
	u.Total = amount(total)
	answer(w, http.StatusOK, u)
}

// GetUsageByTeam answers GET /v1/admin/usage.
func (a *API) GetUsageByTeam(w http.ResponseWriter, r *http.Request, params rest.GetUsageByTeamParams) {
	from, to := days(params.From, params.To)
	after, limit := uuid.Nil, or(params.Limit, defaultLimit)
	if params.Cursor != nil {
		var err error
		if after, err = id.Parse(id.Team, *params.Cursor); err != nil {
			a.Fail(w, r, fault.New(fault.InvalidArgument, "cursor: does not belong to this list"))
			return
		}
	}
	teams, err := a.Usage.ByTeam(r.Context(), from, to, after, limit+1)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	u := rest.UsageByTeam{From: openapi_types.Date{Time: from}, To: openapi_types.Date{Time: to}, Teams: []rest.TeamUsage{}}
	if len(teams) > limit {
		teams = teams[:limit]
		u.NextCursor = some(id.Format(id.Team, teams[limit-1].ID))
	}
	for _, t := range teams {
		u.Teams = append(u.Teams, rest.TeamUsage{TeamID: id.Format(id.Team, t.ID), Name: some(t.Name), Amount: amount(t.Amount), StoredMib: t.StoredMiB})
	}
	answer(w, http.StatusOK, u)
}

// GetSandboxMetricsHistory answers GET /v1/sandboxes/{sandbox_id}/metrics/history.
func (a *API) GetSandboxMetricsHistory(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID, params rest.GetSandboxMetricsHistoryParams) {
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
	window := metrics.Windows[0]
	for _, known := range metrics.Windows {
		if params.Window != nil && known.Name == string(*params.Window) {
			window = known
		}
	}
	h := rest.SandboxMetricsHistory{Window: rest.MetricsWindow(window.Name), StepSeconds: int32(window.Step.Seconds()), Points: []rest.MetricsPoint{}}
	if !sandboxes.State(row.State).Ended() {
		points, err := a.History.Read(r.Context(), u, window)
		if err != nil {
			a.Fail(w, r, err)
			return
		}
		for _, p := range points {
			h.Points = append(h.Points, rest.MetricsPoint{Time: p.Time, CPUUsedPct: p.CPUPercent, MemoryBytes: p.MemoryBytes, DiskBytes: p.DiskBytes})
		}
	}
	answer(w, http.StatusOK, h)
}
