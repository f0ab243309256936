package server_test

import (
	"testing"
	"time"
)

// TestUsage runs a sandbox through a pause and a fork and looks at what it used.
func TestUsage(t *testing.T) {
	p := newPlane(t)
	begun := time.Now()
	sandbox := p.create(map[string]any{"vcpus": 2, "memory_mib": 2048})
	p.call("POST", "/v1/sandboxes/"+sandbox+"/pause", nil).want(200)
	p.call("POST", "/v1/sandboxes/"+sandbox+"/resume", nil).want(200)
	p.call("POST", "/v1/sandboxes/"+sandbox+"/fork", map[string]any{"count": 2}).want(201)
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)

	today := time.Now().UTC().Format(time.DateOnly)
	u := p.call("GET", "/v1/usage?from="+begun.UTC().Format(time.DateOnly)+"&to="+today, nil).want(200).object()
	total := u["total"].(map[string]any)
	most := 6 * time.Since(begun).Seconds()
	if n := total["sandbox_starts"]; n != 3. {
		t.Errorf("%v starts, want 3", n)
	}
	cpu, mem := total["vcpu_seconds"].(float64), total["memory_gib_seconds"].(float64)
	if cpu <= 0 || cpu > most || mem < 0.999*cpu || mem > 1.001*cpu {
		t.Errorf("%v vCPU-seconds and %v GiB-seconds, of at most %v", cpu, mem, most)
	}
	other := p.newTeam()
	if days := p.call("GET", "/v1/usage", nil, "X-API-Key", other).want(200).list("days"); len(days) != 0 {
		t.Errorf("another team used %v", days)
	}
	p.call("GET", "/v1/admin/usage", nil, "X-API-Key", other).fails(403, "permission_denied")
	teams := p.call("GET", "/v1/admin/usage?limit=1", nil).want(200).list("teams")
	if len(teams) != 1 || teams[0].(map[string]any)["name"] != "default" {
		t.Errorf("teams: %v", teams)
	}
	p.call("GET", "/v1/usage?from=2026-01-02&to=2026-01-01", nil).fails(400, "invalid_argument")
	p.call("GET", "/v1/usage?from=yesterday", nil).fails(400, "invalid_argument")
	p.call("GET", "/v1/usage?from=2020-01-01&to=2026-01-01", nil).fails(400, "invalid_argument")
}
