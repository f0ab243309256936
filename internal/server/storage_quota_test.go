package server_test

import (
	"bytes"
	"testing"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// TestStored checks that whatever outlives a request counts towards its team's storage
// before it is written, however small the request.
func TestStored(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	admin := as(p.bearerOf("admin@example.com"))
	asAda := as(p.bearer(p.person("ada@example.com")))
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201).str("id")
	key := p.call("POST", "/v1/keys", map[string]any{"name": "k"}, asAda...).want(201).str("key")
	quota := func(most int) {
		t.Helper()
		p.call("PUT", "/v1/admin/teams/"+team+"/quota", map[string]any{"max_stored_mib": most}, admin...).want(200)
	}
	stored := func() float64 {
		t.Helper()
		return p.call("GET", "/v1/teams/"+team+"/quota", nil, asAda...).want(200).object()["stored_mib"].(float64)
	}
	archive := bytes.Repeat([]byte("x"), 3418)
	tar := []string{"Content-Type", "application/x-tar", "X-API-Key", key}
	// Not every team may have a disk of 1 TiB.
	p.call("POST", "/v1/templates/import/archive?name=huge&disk_mib=1048576", archive, tar...).fails(403, "quota_exceeded")
	if got := stored(); got != 0 {
		t.Errorf("after a refused import %v MiB are stored", got)
	}
	const most = hostwire.DefaultDiskMiB + hostwire.DefaultMemoryMiB // of an import under way
	quota(most + 368)
	var during float64
	p.agent.mu.Lock()
	p.agent.imports = func(tpl *hostagentv1.Template) {
		during = stored()
		tpl.SizeBytes = 1690 << 20
	}
	p.agent.mu.Unlock()
	p.call("POST", "/v1/templates/import/archive?name=app", archive, tar...).want(201)
	if during != most || stored() != 1690 {
		t.Errorf("an import counts as %v MiB while it is made and as %v afterwards", during, stored())
	}
	p.call("POST", "/v1/templates/import/archive?name=app", archive, tar...).fails(403, "quota_exceeded")

	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{"memory_mib": 1024}, "X-API-Key", key).want(201).str("id")
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "snap"}, "X-API-Key", key).fails(403, "quota_exceeded")
	p.call("POST", "/v1/sandboxes/"+sandbox+"/pause", nil, "X-API-Key", key).want(200)
	if got := stored(); got != 1690+1024 {
		t.Errorf("with a paused sandbox %v MiB are stored", got)
	}
	if got := p.call("GET", "/v1/usage", nil, "X-API-Key", key).want(200).object()["stored_mib"]; got != 1690.+1024 {
		t.Errorf("usage shows %v MiB", got)
	}
	shown := false
	for _, row := range p.call("GET", "/v1/admin/usage", nil).want(200).list("teams") {
		shown = shown || row.(map[string]any)["stored_mib"] == 1690.+1024
	}
	if !shown {
		t.Error("usage by team does not show what is stored")
	}
	// A pause's files count until the sandbox ends.
	p.call("POST", "/v1/sandboxes/"+sandbox+"/resume", nil, "X-API-Key", key).want(200)
	quota(2000)
	p.call("POST", "/v1/sandboxes/"+sandbox+"/pause", nil, "X-API-Key", key).want(200)
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil, "X-API-Key", key).want(204)
	sandbox = p.call("POST", "/v1/sandboxes", map[string]any{"memory_mib": 1024}, "X-API-Key", key).want(201).str("id")
	p.call("POST", "/v1/sandboxes/"+sandbox+"/pause", nil, "X-API-Key", key).fails(403, "quota_exceeded")
	if got := p.call("GET", "/v1/sandboxes/"+sandbox, nil, "X-API-Key", key).want(200).str("state"); got != "running" {
		t.Errorf("a sandbox whose pause was refused is %s", got)
	}
	// A sandbox that will be paused at its timeout reserves its storage at creation.
	p.call("POST", "/v1/sandboxes", map[string]any{"memory_mib": 1024, "on_timeout": "pause"}, "X-API-Key", key).fails(403, "quota_exceeded")
	p.call("POST", "/v1/sandboxes", map[string]any{"memory_mib": 256, "on_timeout": "pause"}, "X-API-Key", key).want(201)
	if got := stored(); got != 1690+256 {
		t.Errorf("with a sandbox that is paused at its timeout %v MiB are stored", got)
	}
	for _, sb := range p.call("GET", "/v1/sandboxes", nil, "X-API-Key", key).want(200).list("sandboxes") {
		p.call("DELETE", "/v1/sandboxes/"+sb.(map[string]any)["id"].(string), nil, "X-API-Key", key).want(204)
	}
	p.call("DELETE", "/v1/templates/app", nil, "X-API-Key", key).want(204)
	if got := stored(); got != 0 {
		t.Errorf("after everything is deleted %v MiB are stored", got)
	}
}

// TestStoredHostile checks that a hostile host cannot report a larger size for a team's
// template than the team asked for, which would block its storage.
func TestStoredHostile(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	asAda := as(p.bearer(p.person("ada@example.com")))
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201).str("id")
	lie := func(tpl *hostagentv1.Template) {
		tpl.SizeBytes, tpl.DiskMib, tpl.MemoryMib = 1<<50, 1<<20, 1<<24
	}
	imported := func(name string) string {
		return p.call("POST", "/v1/templates/import/archive?name="+name+"&disk_mib=1024", []byte("x"), append(asAda, "Content-Type", "application/x-tar")...).want(201).str("id")
	}
	bounded := func(when string, templates int) {
		t.Helper()
		got := p.call("GET", "/v1/teams/"+team+"/quota", nil, asAda...).want(200).object()["stored_mib"].(float64)
		if most := float64(templates * 2 * (1024 + hostwire.DefaultMemoryMiB)); got > most {
			t.Errorf("%s: %v MiB are stored, want at most %v", when, got, most)
		}
	}
	p.agent.mu.Lock()
	p.agent.imports = lie
	p.agent.mu.Unlock()
	imported("made")
	bounded("a host lies of what it made", 1)
	p.agent.mu.Lock()
	p.agent.imports = nil
	p.agent.mu.Unlock()
	later := imported("later")
	p.agent.mu.Lock()
	lie(p.agent.templates[later])
	p.agent.mu.Unlock()
	p.compared(p.agent)
	bounded("a host lies later", 2)
	imported("another")
}
