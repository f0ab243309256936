package server_test

import (
	"slices"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/id"
)

func TestTags(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	for _, name := range []string{"one", "two"} {
		p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": name}).want(201)
	}
	show := func(ref string) map[string]any { return p.call("GET", "/v1/templates/"+ref, nil).want(200).object() }
	one := show("one")
	if one["version"] != 1. || !slices.Equal(one["tags"].([]any), []any{"latest"}) {
		t.Errorf("a snapshot is %v", one)
	}
	for _, ref := range []string{"one:latest", "one@1", one["id"].(string)} {
		if got := show(ref); got["id"] != one["id"] {
			t.Errorf("%s is %v", ref, got)
		}
	}
	tagged := p.call("PUT", "/v1/templates/one@1/tags/stable", nil).want(200).object()
	if !slices.Equal(tagged["tags"].([]any), []any{"latest", "stable"}) {
		t.Errorf("tagged: %v", tagged)
	}
	p.call("PUT", "/v1/templates/one/tags/stable", nil).want(200)
	if sb := p.call("POST", "/v1/sandboxes", map[string]any{"template": "one:stable"}).want(201).object(); sb["template_id"] != one["id"] {
		t.Errorf("one:stable is %v", sb)
	}
	for _, ref := range []string{"one:nope", "one@2", "two:stable", "one@0", "one@x", "one:", "one@1:stable", "nope"} {
		p.call("GET", "/v1/templates/"+ref, nil).fails(404, "not_found")
		p.call("POST", "/v1/sandboxes", map[string]any{"template": ref}).fails(404, "not_found")
		p.call("PUT", "/v1/templates/"+ref+"/tags/x", nil).fails(404, "not_found")
	}
	p.call("PUT", "/v1/templates/one/tags/.x", nil).fails(400, "invalid_argument")
	p.call("PUT", "/v1/templates/minimal/tags/x", nil).fails(403, "permission_denied")
	p.call("DELETE", "/v1/templates/minimal/tags/latest", nil).fails(404, "not_found")
	other := p.newTeam()
	p.call("PUT", "/v1/templates/one/tags/x", nil, "X-API-Key", other).fails(404, "not_found")
	p.call("DELETE", "/v1/templates/one/tags/stable", nil, "X-API-Key", other).fails(404, "not_found")

	p.call("DELETE", "/v1/templates/one/tags/stable", nil).want(204)
	p.call("DELETE", "/v1/templates/one/tags/stable", nil).fails(404, "not_found")
	p.call("GET", "/v1/templates/one:stable", nil).fails(404, "not_found")
	// A version that lost its last tag stays, because it was captured.
	p.call("DELETE", "/v1/templates/one/tags/latest", nil).want(204)
	p.call("GET", "/v1/templates/one", nil).fails(404, "not_found")
	show("one@1")

	p.call("DELETE", "/v1/templates/minimal", nil).fails(403, "permission_denied")
	p.call("DELETE", "/v1/templates/nope", nil).fails(404, "not_found")
	p.call("DELETE", "/v1/templates/one", nil, "X-API-Key", other).fails(404, "not_found")
	p.call("DELETE", "/v1/templates/one", nil).want(204)
	p.call("GET", "/v1/templates/one@1", nil).fails(404, "not_found")
	p.call("DELETE", "/v1/templates/two:latest", nil).want(204)
	p.call("GET", "/v1/templates/two", nil).fails(404, "not_found")
}

// TestTagsOfFullTeam checks that a team without room for more can move its tags, which
// may even release old versions, but not add any.
func TestTagsOfFullTeam(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	key := []string{"X-API-Key", p.newTeam()}
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, key...).want(201).object()
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox["id"], "name": "one"}, key...).want(201)
	p.call("PUT", "/v1/templates/one/tags/stable", nil, key...).want(200)
	team, err := id.Parse(id.Team, sandbox["team_id"].(string))
	if err != nil {
		t.Fatal(err)
	}
	p.sql("INSERT INTO templates (id, team_id, name, version, size_bytes, created_at, disk_mib) SELECT gen_random_uuid(), team_id, name, 2, 1, now(), 1 FROM templates WHERE team_id = $1", team)
	p.sql("INSERT INTO host_templates (host_id, template_id) SELECT (SELECT min(host_id::text)::uuid FROM host_templates), id FROM templates WHERE team_id = $1 AND version = 2", team)
	p.sql("INSERT INTO team_quotas (team_id, max_stored_mib) VALUES ($1, 0) ON CONFLICT (team_id) DO UPDATE SET max_stored_mib = 0", team)
	p.call("PUT", "/v1/templates/one@2/tags/fresh", nil, key...).fails(403, "quota_exceeded")
	p.call("PUT", "/v1/templates/one@2/tags/stable", nil, key...).want(200)
	if got := p.call("GET", "/v1/templates/one:stable", nil, key...).want(200).object()["version"]; got != 2. {
		t.Errorf("the moved tag means version %v", got)
	}
}
