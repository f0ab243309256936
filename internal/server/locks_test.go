package server_test

import (
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// blocks waits until another connection waits for what p.db holds.
func (p *plane) blocks(what string) {
	p.Helper()
	p.eventually(what, func() bool {
		var n int
		if err := p.db().QueryRow(p.Context(), "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))").Scan(&n); err != nil {
			p.Fatal(err)
		}
		return n > 0
	})
}

// TestRevokeWhilePausing pauses and resumes a sandbox while its tokens are
// revoked because somebody loses access: neither waits for the other in a circle.
func TestRevokeWhilePausing(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	asAda, admin := as(p.bearer(p.person("ada@example.com"))), as(p.bearerOf("admin@example.com"))
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201).str("id")
	base := "/v1/teams/" + team
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, asAda...).want(201).str("id")
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	type request struct {
		method, path string
		body         any
		headers      []string
	}
	for what, prepare := range map[string]func(user string, headers []string) request{
		"remove": func(user string, _ []string) request {
			return request{"DELETE", base + "/members/" + user, nil, asAda}
		},
		"leave": func(_ string, headers []string) request {
			return request{"POST", base + "/leave", nil, headers}
		},
		"revoke": func(_ string, headers []string) request {
			key := p.call("POST", "/v1/keys", map[string]any{"name": "k"}, headers...).want(201).str("id")
			return request{"DELETE", "/v1/keys/" + key, nil, headers}
		},
		"deactivate": func(user string, _ []string) request {
			return request{"PATCH", "/v1/admin/users/" + user, map[string]any{"active": false}, admin}
		},
	} {
		user := p.person(what + "@example.com")
		p.call("POST", base+"/members", map[string]any{"email": what + "@example.com", "role": "member"}, asAda...).want(201)
		r := prepare(id.Format(id.User, user), as(p.bearer(user)))
		p.sql("BEGIN")
		p.sql("SELECT FROM sandboxes WHERE id = $1 FOR UPDATE", u)
		answer := make(chan response, 1)
		go func() {
			res, err := p.try(r.method, r.path, r.body, r.headers...)
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
			answer <- res
		}()
		p.blocks(what + " waits for the sandbox")
		for _, state := range []string{"pausing", "paused", "resuming", "running"} {
			p.sql("UPDATE sandboxes SET state = $2 WHERE id = $1", u, state)
		}
		p.sql("COMMIT")
		if res := await.Recv(t, what, answer); res.Status >= 300 {
			t.Errorf("%s: %d %s", what, res.Status, res.Body)
		}
	}
	var epoch int
	if err := p.db().QueryRow(t.Context(), "SELECT token_epoch FROM sandboxes WHERE id = $1", u).Scan(&epoch); err != nil || epoch < 4 {
		t.Errorf("the tokens were revoked %d times, %v", epoch, err)
	}
}
