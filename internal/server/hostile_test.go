package server_test

import (
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// TestHostileHost makes a second host report what is not its own. It gets no other team's
// sandbox by listing templates under that team's name, and cannot end another host's
// sandboxes.
func TestHostileHost(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Heartbeat = 2 * time.Second
	p.start()
	victim := p.create(map[string]any{})
	snapshot := p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": victim, "name": "mine"}).want(201).str("id")
	team := p.call("GET", "/v1/sandboxes/"+victim, nil).want(200).str("team_id")

	evil := p.enroll("evil")
	stop := evil.beat(p, p.config.Heartbeat/2)
	defer stop()
	own := id.Format(id.Template, uuid.New())
	evil.mu.Lock()
	for wire, name := range map[string]string{own: "minimal", snapshot: "mine", id.Format(id.Template, uuid.New()): "other"} {
		evil.templates[wire] = &hostagentv1.Template{TemplateId: wire, TeamId: team, Name: name, SizeBytes: 1, CreatedAt: timestamppb.Now()}
	}
	evil.mu.Unlock()
	evil.add(victim, 60)
	p.eventually("the host is online", func() bool { return p.hostStatus(evil.id) == "online" })
	p.compared(evil.agent)

	names := make(map[string]int)
	for _, tpl := range p.call("GET", "/v1/templates", nil).want(200).list("templates") {
		names[tpl.(map[string]any)["name"].(string)]++
	}
	if len(names) != 2 || names["minimal"] != 1 || names["mine"] != 1 {
		t.Errorf("the team's templates are %v", names)
	}
	// It may claim the platform's minimal, and so gets new sandboxes of that, but none of
	// a template that only another host has.
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{"template": "minimal"}).want(201)
	if got := sandbox.str("template_id"); got != id.Format(id.Template, uuid.Nil) {
		t.Errorf("minimal is %s", got)
	}
	for range 4 {
		sb := p.call("POST", "/v1/sandboxes", map[string]any{"template": "mine"}).want(201)
		if sb.str("host_id") == evil.id {
			t.Error("a sandbox of another host's template is on the hostile host")
		}
	}

	evil.happened(hostagentv1.Event_KIND_EXPIRED, victim, "")
	p.eventually("the event is acknowledged", func() bool {
		evil.mu.Lock()
		defer evil.mu.Unlock()
		return evil.acked > 0
	})
	p.compared(evil.agent)
	if got := p.state(victim); got != "running" || !p.agent.has(victim) {
		t.Errorf("another host's sandbox is %s, on its host: %v", got, p.agent.has(victim))
	}
}

// TestEnrollSocket checks that no host can register a socket address, which would make
// the server call a socket on its own machine.
func TestEnrollSocket(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	body := p.addHost("evil", "127.0.0.1:1")
	for _, url := range []string{"unix:/var/run/docker.sock", "unix:///var/run/docker.sock", "unix:@abstract", "UNIX:/x"} {
		body["url"] = url
		p.call("POST", "/v1/hosts/register", body).fails(400, "invalid_argument")
	}
}
