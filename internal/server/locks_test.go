package server_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/recipe/buildcontext"
)

// blocks waits until another connection waits for a lock that p.db holds.
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

// TestRevokeWhilePausing pauses and resumes a sandbox while somebody's loss of access
// revokes its tokens: no deadlock.
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

// TestCreateWhileArchiveIsWritten creates sandboxes while the server stores a build's
// archive. An archive that exceeds the quota is refused before it is stored.
func TestCreateWhileArchiveIsWritten(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	asAda, admin := as(p.bearer(p.person("ada@example.com"))), as(p.bearerOf("admin@example.com"))
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201).str("id")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), []byte("a"), 0o644); err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	digest, err := buildcontext.Pack(t.Context(), &packed, dir, buildcontext.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	begin := func(method, path string, body any, headers ...string) <-chan response {
		answer := make(chan response, 1)
		go func() {
			r, err := p.try(method, path, body, append(headers, asAda...)...)
			if err != nil {
				t.Errorf("%s %s: %v", method, path, err)
			}
			answer <- r
		}()
		return answer
	}
	upload := func() <-chan response {
		return begin("PUT", "/v1/templates/builds/archives/"+string(digest), packed.Bytes(), "Content-Type", "application/x-tar")
	}
	quota := func(most int) {
		p.call("PUT", "/v1/admin/teams/"+team+"/quota", map[string]any{"max_stored_mib": most}, admin...).want(200)
	}
	quota(0)
	p.sql("BEGIN")
	p.sql("LOCK TABLE build_archive_chunks IN SHARE MODE")
	await.Recv(t, "an archive without room is refused", upload()).fails(403, "quota_exceeded")
	quota(1)
	uploaded := upload()
	p.blocks("the archive is written")
	await.Recv(t, "a sandbox is created", begin("POST", "/v1/sandboxes", map[string]any{})).want(201)
	p.sql("COMMIT")
	await.Recv(t, "the archive is uploaded", uploaded).want(204)
	if got := p.call("GET", "/v1/teams/"+team+"/quota", nil, asAda...).want(200).object()["stored_mib"]; got != 1. {
		t.Errorf("%v MiB are stored", got)
	}
	if n := p.call("GET", "/v1/sandboxes", nil, asAda...).want(200).list("sandboxes"); len(n) != 1 {
		t.Errorf("%d sandboxes", len(n))
	}
}
