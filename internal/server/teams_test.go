package server_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

func TestTeams(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	ada, bob, eve := p.person("ada@example.com"), p.person("bob@example.com"), p.person("eve@example.com")
	asAda, asBob, asEve := as(p.bearer(ada)), as(p.bearer(bob)), as(p.bearer(eve))
	p.call("GET", "/v1/keys", nil, asAda...).fails(403, "permission_denied") // Ada is in no team.
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201).str("id")
	base := "/v1/teams/" + team
	p.call("GET", base, nil, asEve...).fails(404, "not_found")
	p.call("GET", "/v1/teams/"+id.Format(id.Team, uuid.New()), nil, asEve...).fails(404, "not_found")
	p.call("GET", "/v1/teams/"+id.Format(id.Team, uuid.Nil), nil, asEve...).fails(404, "not_found")
	if got := p.call("PATCH", base, map[string]any{"name": "new"}, asAda...).want(200).str("name"); got != "new" {
		t.Errorf("name = %q", got)
	}
	p.call("PATCH", base, map[string]any{"name": " "}, asAda...).fails(400, "invalid_argument")
	p.call("POST", base+"/members", map[string]any{"email": "nobody@example.com", "role": "member"}, asAda...).fails(404, "not_found")
	p.call("POST", base+"/members", map[string]any{"email": "BOB@example.com", "role": "admin"}, asAda...).want(201)
	p.call("POST", base+"/members", map[string]any{"email": "bob@example.com", "role": "admin"}, asAda...).fails(409, "conflict")
	// An admin may add members but not owners, and cannot change owners.
	p.call("POST", base+"/members", map[string]any{"email": "eve@example.com", "role": "owner"}, asBob...).fails(403, "permission_denied")
	p.call("POST", base+"/members", map[string]any{"email": "eve@example.com", "role": "member"}, asBob...).want(201)
	member := func(u uuid.UUID) string { return base + "/members/" + id.Format(id.User, u) }
	p.call("PATCH", member(ada), map[string]any{"role": "member"}, asBob...).fails(403, "permission_denied")
	p.call("DELETE", member(ada), nil, asBob...).fails(403, "permission_denied")
	p.call("PATCH", member(bob), map[string]any{"role": "owner"}, asBob...).fails(403, "permission_denied")
	p.call("DELETE", member(bob), nil, asEve...).fails(403, "permission_denied")
	// The last owner cannot leave, even if two leave at once.
	p.call("POST", base+"/leave", nil, asAda...).fails(409, "conflict")
	p.call("PATCH", member(ada), map[string]any{"role": "admin"}, asAda...).fails(409, "conflict")
	p.call("PATCH", member(bob), map[string]any{"role": "owner"}, asAda...).want(200)
	var wg sync.WaitGroup
	statuses := make(chan int, 2)
	for _, who := range [][]string{asAda, asBob} {
		wg.Go(func() {
			r, err := p.try("POST", base+"/leave", nil, who...)
			if err != nil {
				t.Error(err)
			}
			statuses <- r.Status
		})
	}
	wg.Wait()
	if a, b := <-statuses, <-statuses; a+b != 204+409 {
		t.Errorf("two owners left at once: %d, %d", a, b)
	}
	if p.call("GET", base, nil, asAda...).Status == 404 {
		ada, asAda = bob, asBob
	}
	// A removed member's keys are revoked.
	key := p.call("POST", "/v1/keys", map[string]any{"name": "eve's"}, append(asEve, "X-Team", team)...).want(201).str("key")
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", key).want(200)
	p.call("DELETE", member(eve), nil, asAda...).want(204)
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", key).fails(401, "unauthenticated")
	p.call("GET", base, nil, asEve...).fails(404, "not_found")
	p.call("GET", "/v1/sandboxes", nil, append(asEve, "X-Team", team)...).fails(404, "not_found")

	// Only somebody who may add members can look up users, and only by the full address.
	for _, c := range []struct {
		email string
		by    uuid.UUID
		finds int
	}{{"BOB@example.com", ada, 1}, {"bob@example.com", eve, 0}, {"bob", ada, 0}, {"bob@example", ada, 0}, {"%25%25%25", ada, 0}, {"bob@example.co_", ada, 0}} {
		p.sql("UPDATE team_members SET role = CASE WHEN user_id = $1 THEN 'member' ELSE 'admin' END", eve)
		users := p.call("GET", "/v1/users?email="+c.email, nil, as(p.bearer(c.by))...).want(200).list("users")
		if len(users) != c.finds {
			t.Errorf("%s finds %v", c.email, users)
		}
	}
	p.call("GET", "/v1/users?email_prefix=bob", nil, asAda...).fails(400, "invalid_argument")
}

// TestDeleteTeam deletes a team whose host is unreachable at first.
func TestDeleteTeam(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	ada := p.person("ada@example.com")
	asAda := as(p.bearer(ada))
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201).str("id")
	teamID, _ := id.Parse(id.Team, team)
	key := p.call("POST", "/v1/keys", map[string]any{"name": "k"}, asAda...).want(201).str("key")
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", key).want(201).str("id")
	paused := p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", key).want(201).str("id")
	p.call("POST", "/v1/sandboxes/"+paused+"/pause", nil, "X-API-Key", key).want(200)
	template := p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "mine"}, "X-API-Key", key).want(201).str("id")
	p.agent.mu.Lock()
	p.agent.onDestroy = func(context.Context, *hostagentv1.DestroyRequest) error {
		return connect.NewError(connect.CodeUnavailable, fmt.Errorf("not now"))
	}
	p.agent.mu.Unlock()
	p.call("DELETE", "/v1/teams/"+team, nil, asAda...).want(202)
	// Nobody sees the team any more.
	p.call("GET", "/v1/teams/"+team, nil, asAda...).fails(404, "not_found")
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", key).fails(401, "unauthenticated")
	if !p.agent.has(sandbox) {
		t.Fatal("the sandbox is gone already")
	}
	p.agent.mu.Lock()
	p.agent.onDestroy = nil
	p.agent.mu.Unlock()
	p.eventually("the team's rows are gone", func() bool {
		var n int
		err := p.db().QueryRow(context.Background(), "SELECT (SELECT count(*) FROM teams WHERE id = $1) + (SELECT count(*) FROM sandboxes WHERE team_id = $1) + (SELECT count(*) FROM templates WHERE team_id = $1) + (SELECT count(*) FROM api_keys WHERE team_id = $1)", teamID).Scan(&n)
		return err == nil && n == 0
	})
	if p.agent.has(sandbox) || p.agent.has(paused) {
		t.Error("the host still has a sandbox")
	}
	if p.agent.hasTemplate(template) {
		t.Error("the host still has the template")
	}
}

// TestDeleteTeamOthers makes the host hang while it ends one sandbox of a deleted team:
// the team's other sandboxes end, and another team's deletion completes.
func TestDeleteTeamOthers(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var teams []uuid.UUID
	var boxes []string
	for n, sandboxes := range []int{4, 1} {
		asOwner := as(p.bearer(p.person(fmt.Sprintf("owner%d@example.com", n))))
		wire := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asOwner...).want(201).str("id")
		team, err := id.Parse(id.Team, wire)
		if err != nil {
			t.Fatal(err)
		}
		teams = append(teams, team)
		for range sandboxes {
			boxes = append(boxes, p.call("POST", "/v1/sandboxes", map[string]any{}, asOwner...).want(201).str("id"))
		}
	}
	p.agent.mu.Lock()
	p.agent.onDestroy = func(ctx context.Context, req *hostagentv1.DestroyRequest) error {
		switch req.SandboxId {
		case boxes[0], boxes[1]:
			<-ctx.Done()
			return ctx.Err()
		case boxes[2]:
			return connect.NewError(connect.CodeInternal, errors.New("it does not end"))
		}
		return nil
	}
	p.agent.mu.Unlock()
	// As if a server died and left them to this one.
	p.end()
	p.sql("UPDATE teams SET deleting_at = now() - interval '1 hour' WHERE id = $1", teams[0])
	p.sql("UPDATE teams SET deleting_at = now() WHERE id = $1", teams[1])
	p.start()
	p.eventually("the sandbox that the host ends is gone", func() bool { return !p.agent.has(boxes[3]) })
	p.eventually("the other team is gone", func() bool {
		var n int
		err := p.db().QueryRow(t.Context(), "SELECT count(*) FROM teams WHERE id = $1", teams[1]).Scan(&n)
		return err == nil && n == 0
	})
}

// TestDeleteTeamHostAway deletes a team while one of its hosts is away, and restarts the
// server before that host returns.
func TestDeleteTeamHostAway(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	const beat = 2 * time.Second
	p.config.Heartbeat = beat
	p.start()
	far := p.enroll("far", "far")
	stop := far.beat(p, beat)
	p.eventually("the host is online", func() bool { return p.hostStatus(far.id) == "online" })
	p.eventually("it has the template", func() bool {
		var n int
		err := p.db().QueryRow(t.Context(), "SELECT count(*) FROM host_templates JOIN hosts ON id = host_id WHERE enrolled").Scan(&n)
		return err == nil && n == 1
	})
	asAda := as(p.bearer(p.person("ada@example.com")))
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201).str("id")
	teamID, _ := id.Parse(id.Team, team)
	p.call("POST", "/v1/channels", map[string]any{"name": "c", "kind": "email", "address": "ops@example.com", "events": []string{"sandbox.lost"}}, asAda...).want(201)
	near := p.call("POST", "/v1/sandboxes", map[string]any{}, asAda...).want(201).str("id")
	away := p.call("POST", "/v1/sandboxes", map[string]any{"host_tags": []string{"far"}}, asAda...).want(201).str("id")
	paused := p.call("POST", "/v1/sandboxes", map[string]any{"host_tags": []string{"far"}}, asAda...).want(201).str("id")
	template := p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": away, "name": "mine"}, asAda...).want(201).str("id")
	p.call("POST", "/v1/sandboxes/"+paused+"/pause", nil, asAda...).want(200)
	if !far.has(away) || !far.has(paused) || !far.hasTemplate(template) || p.agent.has(near) == far.has(near) {
		t.Fatal("the sandboxes are not where this test needs them")
	}
	stop()
	far.vanish()
	p.eventually("the host is away", func() bool { return p.hostStatus(far.id) == "unreachable" })
	p.call("DELETE", "/v1/teams/"+team, nil, asAda...).want(202)
	p.call("GET", "/v1/teams/"+team, nil, asAda...).fails(404, "not_found")
	if !far.has(near) {
		p.eventually("the other host has nothing of the team", func() bool { return !p.agent.has(near) })
	}
	p.end()
	p.start()
	var n int
	if err := p.db().QueryRow(t.Context(), "SELECT count(*) FROM sandboxes WHERE team_id = $1 AND state NOT IN ('stopped', 'error')", teamID).Scan(&n); err != nil || n < 2 {
		t.Errorf("while the host is away %d sandboxes are known to be there: %v", n, err)
	}
	if !far.has(away) || !far.hasTemplate(template) {
		t.Error("a host that is away lost something")
	}
	l, err := net.Listen("tcp", far.address)
	if err != nil {
		t.Fatal(err)
	}
	far.serveOn(l)
	t.Cleanup(far.close)
	defer far.beat(p, beat)()
	begun := time.Now()
	p.eventually("no row of the team is left", func() bool {
		err := p.db().QueryRow(t.Context(), `SELECT (SELECT count(*) FROM teams WHERE id = $1) + (SELECT count(*) FROM sandboxes WHERE team_id = $1) + (SELECT count(*) FROM templates WHERE team_id = $1)
			+ (SELECT count(*) FROM api_keys WHERE team_id = $1) + (SELECT count(*) FROM channels WHERE team_id = $1) + (SELECT count(*) FROM team_members WHERE team_id = $1)`, teamID).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n == 0
	})
	t.Logf("the team was gone %v after its host came back", time.Since(begun).Round(time.Second))
	if p.agent.has(near) || far.has(near) || far.has(away) || far.has(paused) || far.hasTemplate(template) {
		t.Error("a host still has something of the team")
	}
}
