package server_test

import (
	"testing"
	"time"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// TestClockSetBack sets the database's clock back just after a host and a server died:
// nobody takes them for alive until the clock reaches that time again.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Heartbeat = time.Second
	p.start()
	sandbox := p.create(map[string]any{})
	later := func(what string) {
		if _, err := p.db().Exec(t.Context(), what); err != nil {
			t.Fatal(err)
		}
	}
	p.agent.close()
	later("UPDATE hosts SET last_seen_at = now() + interval '1 hour'")
	p.eventually("the sandbox is missing", func() bool { return p.state(sandbox) == "missing" })
	p.agent.serve(t)
	p.eventually("the sandbox runs again", func() bool { return p.state(sandbox) == "running" })

	later("INSERT INTO servers (id, seen_at) VALUES ('00000000-0000-4000-8000-000000000001', now() + interval '1 hour')")
	later("INSERT INTO leases (name, server, until) SELECT name, '00000000-0000-4000-8000-000000000001', now() + interval '1 hour' FROM leases ON CONFLICT (name) DO UPDATE SET server = EXCLUDED.server, until = EXCLUDED.until")
	later("UPDATE hosts SET watcher = '00000000-0000-4000-8000-000000000001'")
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, sandbox, "")
	p.eventually("the host is watched again", func() bool {
		return p.call("GET", "/v1/sandboxes/"+sandbox, nil).str("end_reason") == "expired"
	})
}

// TestClockSetForth sets the database's clock an hour forward: every sign of life is an
// hour old, and nothing ends because of that.
func TestClockSetForth(t *testing.T) {
	p := newPlane(t)
	p.end()
	p.config.Heartbeat = time.Second
	p.start()
	sandbox := p.create(map[string]any{})
	for _, table := range []string{"hosts SET last_seen_at = last_seen_at", "servers SET seen_at = seen_at", "leases SET until = until"} {
		if _, err := p.db().Exec(t.Context(), "UPDATE "+table+" - interval '1 hour'"); err != nil {
			t.Fatal(err)
		}
	}
	p.compared(p.agent)
	p.eventually("the sandbox runs", func() bool { return p.state(sandbox) == "running" })
	if !p.agent.has(sandbox) {
		t.Error("the host no longer has the sandbox")
	}
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, sandbox, "")
	p.eventually("the host is watched", func() bool {
		return p.call("GET", "/v1/sandboxes/"+sandbox, nil).str("end_reason") == "expired"
	})
}
