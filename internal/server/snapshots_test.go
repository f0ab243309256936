package server_test

import (
	"context"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/api"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
)

func TestSnapshots(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{"vcpus": 2, "memory_mib": 256})
	snap := func(body any, headers ...string) response { return p.call("POST", "/v1/snapshots", body, headers...) }
	made := snap(map[string]any{"sandbox_id": sandbox, "name": "base-1.0"}).want(201).object()
	for k, want := range map[string]any{"name": "base-1.0", "vcpus": 2., "memory_mib": 256., "disk_mib": float64(hostwire.DefaultDiskMiB), "sandbox_id": sandbox, "size_bytes": float64(1 << 20)} {
		if made[k] != want {
			t.Errorf("%s = %v, want %v", k, made[k], want)
		}
	}
	if s := p.state(sandbox); s != "running" {
		t.Errorf("the captured sandbox is %s", s)
	}
	snap(map[string]any{"sandbox_id": sandbox, "name": "base-1.0"}).fails(409, "conflict")
	for name, body := range map[string]any{
		"empty": map[string]any{"sandbox_id": sandbox, "name": ""}, "capitals": map[string]any{"sandbox_id": sandbox, "name": "Base"},
		"slash": map[string]any{"sandbox_id": sandbox, "name": "a/b"}, "dots": map[string]any{"sandbox_id": sandbox, "name": ".."},
		"long": map[string]any{"sandbox_id": sandbox, "name": strings.Repeat("a", 64)}, "an id": map[string]any{"sandbox_id": sandbox, "name": id.Format(id.Template, uuid.New())},
		"no sandbox": map[string]any{"name": "x"}, "malformed sandbox": map[string]any{"sandbox_id": "x", "name": "x"}, "NUL": map[string]any{"sandbox_id": sandbox, "name": "a\x00"},
	} {
		if r := snap(body); r.Status != 400 {
			t.Errorf("%s: %d %s", name, r.Status, r.Body)
		}
	}
	snap(map[string]any{"sandbox_id": id.Format(id.Sandbox, uuid.New()), "name": "x"}).fails(404, "not_found")
	// A paused sandbox can be captured and stays paused.
	p.call("POST", "/v1/sandboxes/"+sandbox+"/pause", nil).want(200)
	snap(map[string]any{"sandbox_id": sandbox, "name": "frozen"}).want(201)
	if s := p.state(sandbox); s != "paused" || p.agent.called("resume") != 0 {
		t.Errorf("the captured sandbox is %s", s)
	}
	// A sandbox made from it has its settings.
	from := func(body map[string]any) response { return p.call("POST", "/v1/sandboxes", body) }
	if sb := from(map[string]any{"template": "base-1.0"}).want(201).object(); sb["vcpus"] != 2. || sb["memory_mib"] != 256. || sb["template"] != "base-1.0" {
		t.Errorf("made from a snapshot: %v", sb)
	}
	from(map[string]any{"template": "base-1.0", "vcpus": 2, "memory_mib": 256, "disk_mib": hostwire.DefaultDiskMiB}).want(201)
	asked := p.agent.created()
	for _, body := range []map[string]any{{"vcpus": 1}, {"memory_mib": 512}, {"disk_mib": hostwire.DefaultDiskMiB - 1}} {
		body["template"] = "base-1.0"
		from(body).fails(400, "invalid_argument")
	}
	if p.agent.created() != asked {
		t.Error("the host was asked for a sandbox that it cannot make")
	}
	if sb := from(map[string]any{}).want(201).object(); sb["vcpus"] != float64(hostwire.DefaultVCPUs) || sb["memory_mib"] != float64(hostwire.DefaultMemoryMiB) {
		t.Errorf("made from minimal: %v", sb)
	}
	// Lists.
	names := func(r response, list string) (names []string) {
		for _, x := range r.want(200).list(list) {
			names = append(names, x.(map[string]any)["name"].(string))
		}
		return names
	}
	if got := names(p.call("GET", "/v1/templates", nil), "templates"); !slices.Equal(got, []string{"base-1.0", "frozen", "minimal"}) {
		t.Errorf("templates %v", got)
	}
	page := p.call("GET", "/v1/snapshots?limit=1", nil)
	if got := names(page, "snapshots"); !slices.Equal(got, []string{"base-1.0"}) {
		t.Errorf("first page %v", got)
	}
	page = p.call("GET", "/v1/snapshots?limit=1&cursor="+page.str("next_cursor"), nil)
	if got := names(page, "snapshots"); !slices.Equal(got, []string{"frozen"}) || page.str("next_cursor") != "" {
		t.Errorf("second page %v", got)
	}
	p.call("GET", "/v1/snapshots?cursor=x", nil).fails(400, "invalid_argument")
	// Other teams have their own names, and see no other team's snapshots.
	other := p.newTeam()
	if got := names(p.call("GET", "/v1/templates", nil, "X-API-Key", other), "templates"); !slices.Equal(got, []string{"minimal"}) {
		t.Errorf("another team sees %v", got)
	}
	p.call("POST", "/v1/sandboxes", map[string]any{"template": "base-1.0"}, "X-API-Key", other).fails(404, "not_found")
	p.call("POST", "/v1/sandboxes", map[string]any{"template": made["id"]}, "X-API-Key", other).fails(404, "not_found")
	p.call("DELETE", "/v1/snapshots/base-1.0", nil, "X-API-Key", other).fails(404, "not_found")
	snap(map[string]any{"sandbox_id": sandbox, "name": "stolen"}, "X-API-Key", other).fails(404, "not_found")
	theirs := p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", other).want(201).str("id")
	snap(map[string]any{"sandbox_id": theirs, "name": "base-1.0"}, "X-API-Key", other).want(201)
	// A team's own template takes precedence over the platform's.
	own := snap(map[string]any{"sandbox_id": theirs, "name": "minimal"}, "X-API-Key", other).want(201).str("id")
	if got := p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", other).want(201).str("template_id"); got != own {
		t.Errorf("minimal is %s, want the team's own %s", got, own)
	}
	p.call("DELETE", "/v1/snapshots/minimal", nil, "X-API-Key", other).want(204)
	p.call("DELETE", "/v1/snapshots/minimal", nil, "X-API-Key", other).fails(403, "permission_denied")
	// Deletion.
	p.call("DELETE", "/v1/snapshots/minimal", nil).fails(403, "permission_denied")
	p.call("DELETE", "/v1/snapshots/"+id.Format(id.Template, uuid.Nil), nil).fails(403, "permission_denied")
	p.call("DELETE", "/v1/snapshots/nope", nil).fails(404, "not_found")
	p.call("DELETE", "/v1/snapshots/a%00b", nil).fails(400, "invalid_argument")
	p.call("DELETE", "/v1/snapshots/base-1.0", nil).want(204)
	p.call("DELETE", "/v1/snapshots/base-1.0", nil).fails(404, "not_found")
	if p.agent.hasTemplate(made["id"].(string)) {
		t.Error("the host still has the template")
	}
	p.call("POST", "/v1/sandboxes", map[string]any{"template": "base-1.0"}).fails(404, "not_found")
	snap(map[string]any{"sandbox_id": sandbox, "name": "base-1.0"}).want(201)
	// During a capture its name is taken, but the snapshot is not listed.
	g := newGate()
	p.agent.hook(g.on)
	slow := p.later("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "slow"})
	<-g.asked
	p.call("POST", "/v1/sandboxes", map[string]any{"template": "slow"}).fails(404, "not_found")
	p.call("DELETE", "/v1/snapshots/slow", nil).fails(409, "conflict")
	if got := names(p.call("GET", "/v1/snapshots", nil), "snapshots"); slices.Contains(got, "slow") {
		t.Errorf("listed during the capture: %v", got)
	}
	g.release <- nil
	(<-slow).want(201)
	// An unreachable host deletes it when it is back.
	p.agent.vanish()
	p.call("DELETE", "/v1/snapshots/frozen", nil).fails(503, "host_unreachable")
	if got := names(p.call("GET", "/v1/snapshots", nil), "snapshots"); slices.Contains(got, "frozen") {
		t.Errorf("still listed: %v", got)
	}
	p.agent.hook(nil)
	p.agent.serve(t)
	p.eventually("the host has deleted it", func() bool { return p.call("DELETE", "/v1/snapshots/frozen", nil).Status == 404 })
}

// TestForkCopiesSettings checks that a copy has whatever the creation of its original set and
// the API shows of a sandbox.
func TestForkCopiesSettings(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	set := map[string]any{
		"template": "minimal", "vcpus": 2, "memory_mib": 256, "disk_mib": hostwire.DefaultDiskMiB + 1, "timeout_seconds": 60,
		"on_timeout": "pause", "auto_resume": false, "metadata": map[string]string{"job": "1"},
	}
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
	shown := spec.Components.Schemas["Sandbox"].Value.Properties
	for field := range spec.Components.Schemas["CreateSandbox"].Value.Properties {
		if set[field] == nil && shown[field] != nil {
			t.Errorf("the test sets no %s", field)
		}
	}
	original := p.call("POST", "/v1/sandboxes", set).want(201).object()
	made := p.call("POST", "/v1/sandboxes/"+original["id"].(string)+"/fork", map[string]any{}).want(201).list("sandboxes")[0].(map[string]any)
	for field := range set {
		if !reflect.DeepEqual(made[field], original[field]) {
			t.Errorf("%s is %v, that of the original is %v", field, made[field], original[field])
		}
	}
}

func TestFork(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	made := p.call("POST", "/v1/sandboxes", map[string]any{"on_timeout": "pause", "timeout_seconds": 60, "metadata": map[string]string{"job": "1"}}).want(201)
	sandbox := made.str("id")
	base := "/v1/sandboxes/" + sandbox
	copies := p.call("POST", base+"/fork", map[string]any{"count": 3}).want(201).list("sandboxes")
	seen := map[any]bool{sandbox: true, made.str("access_token"): true, made.str("traffic_token"): true}
	for _, c := range copies {
		sb := c.(map[string]any)
		for _, k := range []string{"id", "access_token", "traffic_token"} {
			if seen[sb[k]] {
				t.Errorf("%s %v is not the fork's own", k, sb[k])
			}
			seen[sb[k]] = true
		}
		if sb["state"] != "running" || sb["forked_from"] != sandbox || sb["on_timeout"] != "pause" || sb["auto_resume"] != true || sb["timeout_seconds"] != 60. || sb["metadata"].(map[string]any)["job"] != "1" || sb["expires_at"] == nil {
			t.Errorf("fork: %v", sb)
		}
		if !p.agent.has(sb["id"].(string)) {
			t.Errorf("the host has no %v", sb["id"])
		}
	}
	if len(copies) != 3 || len(seen) != 12 {
		t.Errorf("%d forks, %d ids and tokens", len(copies), len(seen))
	}
	if got := len(p.call("POST", base+"/fork", map[string]any{}).want(201).list("sandboxes")); got != 1 {
		t.Errorf("%d forks by default", got)
	}
	for _, body := range []any{map[string]any{"count": 0}, map[string]any{"count": 65}, map[string]any{"count": "2"}, map[string]any{"n": 1}, nil} {
		p.call("POST", base+"/fork", body).fails(400, "invalid_argument")
	}
	// Delete one fork while it is created: the others stay.
	g := newGate()
	p.agent.hook(g.on)
	two := p.later("POST", base+"/fork", map[string]any{"count": 2})
	<-g.asked
	var one string
	for _, sb := range p.call("GET", "/v1/sandboxes?state=starting", nil).list("sandboxes") {
		one = sb.(map[string]any)["id"].(string)
	}
	p.call("DELETE", "/v1/sandboxes/"+one, nil).want(204)
	g.release <- nil
	for _, c := range (<-two).want(201).list("sandboxes") {
		sb := c.(map[string]any)
		if want := map[bool]string{true: "stopped", false: "running"}[sb["id"] == one]; sb["state"] != want {
			t.Errorf("the fork is %v, want %s", sb["state"], want)
		}
	}
	if p.agent.has(one) {
		t.Error("the host has the deleted fork")
	}
	// The host becomes unreachable but still creates the forks: none stays.
	asked, let := make(chan struct{}), make(chan struct{})
	p.agent.hook(func(context.Context, string) error {
		close(asked)
		<-let
		return nil
	})
	lost := p.later("POST", base+"/fork", map[string]any{"count": 2})
	<-asked
	before := len(p.call("GET", "/v1/sandboxes?state=running", nil).list("sandboxes"))
	p.agent.close()
	(<-lost).fails(503, "host_unreachable")
	close(let)
	p.agent.vanish()
	if has, _ := p.agent.left(); has != before+2 {
		t.Errorf("the host has %d sandboxes, want %d", has, before+2)
	}
	p.agent.hook(nil)
	p.agent.serve(t)
	p.eventually("the host has only the sandboxes in the database", func() bool {
		p.agent.mu.Lock()
		defer p.agent.mu.Unlock()
		return len(p.agent.sandboxes) == before
	})
	if got := len(p.call("GET", "/v1/sandboxes", nil).list("sandboxes")); got != before {
		t.Errorf("%d sandboxes, want %d", got, before)
	}
}
