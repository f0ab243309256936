package server_test

import (
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// TestBuildsAreShared starts more builds of one team than there are workers, and none of
// them ends by itself: another team's build still runs, and theirs end at their deadline.
func TestBuildsAreShared(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Builds.Workers, p.config.Builds.TeamRunning = 2, 10
	p.start()
	hold := p.newHold("run")
	recipe := map[string]any{"recipe": "FROM minimal\nRUN sleep 1d\n", "skip_pre_post": true, "no_cache": true}
	var theirs []string
	for range 4 {
		theirs = append(theirs, p.build(recipe))
	}
	<-hold.asked
	other := p.newTeam()
	at := p.call("POST", "/v1/templates/builds", map[string]any{"name": "ours", "recipe": "FROM minimal\nRUN true\n", "skip_pre_post": true, "no_cache": true}, "X-API-Key", other).want(202).str("id")
	p.eventually("the other team's build runs", func() bool {
		return p.call("GET", "/v1/templates/builds/"+at, nil, "X-API-Key", other).want(200).str("state") == "running"
	})
	running := 0
	for _, b := range theirs {
		if p.call("GET", "/v1/templates/builds/"+b, nil).want(200).str("state") == "running" {
			running++
		}
	}
	if running != 1 {
		t.Errorf("%d builds of one team run on two workers", running)
	}
}

// TestNextBuild checks that the next build comes from the team with the fewest running
// builds.
func TestNextBuild(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Builds.Workers, p.config.Builds.TeamRunning = 3, 10
	p.start()
	hold := p.newHold("run")
	recipe := map[string]any{"name": "b", "recipe": "FROM minimal\nRUN sleep 1d\n", "skip_pre_post": true, "no_cache": true}
	start := func(key string) string {
		return p.call("POST", "/v1/templates/builds", recipe, "X-API-Key", key).want(202).str("id")
	}
	one, two := p.newTeam(), p.newTeam()
	first := start(one)
	<-hold.asked
	start(one)
	<-hold.asked
	start(two)
	<-hold.asked // All three workers are taken.
	waiting, fair := start(one), start(adminKey)
	p.call("POST", "/v1/templates/builds/"+first+"/cancel", nil, "X-API-Key", one).want(200)
	p.eventually("the build of the team with none running runs", func() bool {
		return p.call("GET", "/v1/templates/builds/"+fair, nil).want(200).str("state") == "running"
	})
	if got := p.call("GET", "/v1/templates/builds/"+waiting, nil, "X-API-Key", one).want(200).str("state"); got != "queued" {
		t.Errorf("the older build of a team that has one running is %s", got)
	}
}

// TestBuildDeadline checks that a build ends at its total time limit.
func TestBuildDeadline(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Builds.Timeout = time.Second
	p.start()
	p.newHold("run")
	b := p.ended(p.build(map[string]any{"recipe": "FROM minimal\nRUN sleep 1d\n", "skip_pre_post": true, "no_cache": true, "step_timeout_seconds": 3600}))
	if why, _ := b["error"].(string); b["state"] != "failed" || !strings.Contains(why, "did not end within 1s") {
		t.Errorf("%v %v", b["state"], b["error"])
	}
	p.eventually("no sandbox is left", func() bool { n, _ := p.agent.left(); return n == 0 })
}

// TestBuildsOfOneOwner checks that an owner gets no more places for builds and imports by
// having more teams.
func TestBuildsOfOneOwner(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Builds.Workers, p.config.Builds.TeamRunning = 2, 10
	p.start()
	keys := p.ownerOf(2, "ada@example.com")
	hold := p.newHold("run")
	start := func(key string) string {
		return p.call("POST", "/v1/templates/builds", map[string]any{"name": "b", "recipe": "FROM minimal\nRUN sleep 1d\n", "skip_pre_post": true, "no_cache": true}, "X-API-Key", key).want(202).str("id")
	}
	state := func(build, key string) string {
		return p.call("GET", "/v1/templates/builds/"+build, nil, "X-API-Key", key).want(200).str("state")
	}
	start(keys[0])
	await.Recv(t, "the first build runs", hold.asked)
	second := start(keys[1])
	other := p.newTeam()
	fair := start(other)
	p.eventually("another owner's build runs", func() bool { return state(fair, other) == "running" })
	if got := state(second, keys[1]); got != "queued" {
		t.Errorf("the second of an owner's builds, of another team, is %s on two workers", got)
	}

	payers := make(map[string]int)
	p.agent.mu.Lock()
	p.agent.payer = func(payer string) { payers[payer]++ }
	p.agent.mu.Unlock()
	for _, key := range append(keys, other) {
		p.call("POST", "/v1/templates/import", map[string]any{"name": "app", "reference": "registry.example/there:1", "username": "reader", "password": "s3cret"}, "X-API-Key", key).want(201)
	}
	if len(payers) != 2 {
		t.Errorf("the agent was told these payers of three imports of two owners: %v", payers)
	}
}
