package server_test

import (
	"slices"
	"sync"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// TestQuota makes many requests at once, for few of which the team's quota has room.
func TestQuota(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	admin := as(p.bearerOf("admin@example.com"))
	ada := p.person("ada@example.com")
	asAda := as(p.bearer(ada))
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201).str("id")
	key := p.call("POST", "/v1/keys", map[string]any{"name": "k"}, asAda...).want(201).str("key")
	quota := func(q map[string]any) {
		t.Helper()
		p.call("PUT", "/v1/admin/teams/"+team+"/quota", q, admin...).want(200)
	}
	// together makes calls at once, and returns the responses that the quota did not
	// refuse.
	together := func(method string, body any, paths ...string) (done []response) {
		t.Helper()
		var wg sync.WaitGroup
		var mu sync.Mutex
		for _, path := range paths {
			wg.Go(func() {
				r, err := p.try(method, path, body, "X-API-Key", key)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err != nil:
					t.Error(err)
				case r.Status < 300:
					done = append(done, r)
				default:
					r.fails(403, "quota_exceeded")
				}
			})
		}
		wg.Wait()
		return done
	}
	usage := func() map[string]any {
		t.Helper()
		return p.call("GET", "/v1/teams/"+team+"/quota", nil, asAda...).want(200).object()
	}
	remove := func(sandboxes ...string) {
		t.Helper()
		for _, s := range sandboxes {
			p.call("DELETE", "/v1/sandboxes/"+s, nil, "X-API-Key", key).want(204)
		}
	}
	// For each limit, exactly as many of fifty concurrent creations succeed as there is
	// room for.
	var left []string
	for _, c := range []struct {
		bound, counts string
		most          int
		fit           int
	}{
		{"max_vcpus", "vcpus", 7, 3}, {"max_memory_mib", "memory_mib", 2*768 + 700, 2}, {"max_disk_mib", "disk_mib", 5*hostwire.DefaultDiskMiB - 1, 4}, {"max_running", "running", 4, 4},
	} {
		quota(map[string]any{c.bound: c.most})
		done := together("POST", map[string]any{"vcpus": 2, "memory_mib": 768}, slices.Repeat([]string{"/v1/sandboxes"}, 50)...)
		if len(done) != c.fit {
			t.Errorf("%s of %d: %d of 50 were made, want %d", c.bound, c.most, len(done), c.fit)
		}
		u := usage()
		if u["running"] != float64(len(done)) || u["vcpus"] != float64(2*len(done)) || u["memory_mib"] != float64(768*len(done)) || u["disk_mib"] != float64(hostwire.DefaultDiskMiB*len(done)) || u["own_quota"] != true || u["quota"].(map[string]any)[c.bound] != float64(c.most) {
			t.Errorf("%s: usage: %v", c.bound, u)
		}
		left = nil
		for _, r := range done {
			left = append(left, r.str("id"))
		}
		if c.bound != "max_running" {
			remove(left...)
		}
	}
	if len(left) != 4 {
		t.FailNow()
	}
	// A paused sandbox does not count as running until it is resumed.
	var resumes []string
	for _, s := range left[1:] {
		p.call("POST", "/v1/sandboxes/"+s+"/pause", nil, "X-API-Key", key).want(200)
		resumes = append(resumes, "/v1/sandboxes/"+s+"/resume")
	}
	if u := usage(); u["running"] != 1. || u["disk_mib"] != 4.*hostwire.DefaultDiskMiB {
		t.Errorf("with three of four paused, usage: %v", u)
	}
	quota(map[string]any{"max_running": 2})
	resumed := together("POST", nil, resumes...)
	if len(resumed) != 1 {
		t.Fatalf("%d of 3 were resumed, want 1", len(resumed))
	}
	remove(resumed[0].str("id"))
	// A fork counts too. One call makes all of its forks, or none.
	fork := "/v1/sandboxes/" + left[0] + "/fork"
	p.call("POST", fork, map[string]any{"count": 2}, "X-API-Key", key).fails(403, "quota_exceeded")
	if forked := together("POST", map[string]any{"count": 1}, slices.Repeat([]string{fork}, 5)...); len(forked) != 1 {
		t.Errorf("%d of 5 fork calls succeeded, want 1", len(forked))
	}
	if u := usage(); u["running"] != 2. {
		t.Errorf("usage: %v", u)
	}
	// A build's sandbox counts too.
	quota(map[string]any{"max_running": 3})
	build := p.call("POST", "/v1/templates/builds", map[string]any{"name": "b", "recipe": "FROM minimal\nRUN hang"}, "X-API-Key", key).want(202).str("id")
	p.eventually("the build's sandbox counts", func() bool { return usage()["running"] == 3. })
	p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", key).fails(403, "quota_exceeded")
	p.call("POST", "/v1/templates/builds/"+build+"/cancel", nil, "X-API-Key", key).want(200)
	p.eventually("the build's sandbox does not count", func() bool { return usage()["running"] == 2. })
	remove(left[0])
	p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", key).want(201)
	p.call("DELETE", "/v1/admin/teams/"+team+"/quota", nil, admin...).want(204)
	p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", key).want(201)
}
