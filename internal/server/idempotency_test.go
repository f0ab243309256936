package server_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// TestIdempotentForkAndSnapshot sends forks and captures with the same idempotency key to
// two servers at once: repeated requests change nothing.
func TestIdempotentForkAndSnapshot(t *testing.T) {
	t.Parallel()
	p, q := newTwo(t, 2*time.Second)
	sandbox := p.create(map[string]any{"timeout_seconds": 0})
	fork := "/v1/sandboxes/" + sandbox + "/fork"
	tests := []struct {
		call, path        string
		body, other, once map[string]any
		// made returns the ids in a response.
		made func(response) []string
	}{
		{"fork", fork, map[string]any{"count": 3}, map[string]any{"count": 2}, map[string]any{"count": 1}, func(r response) (all []string) {
			for _, c := range r.want(201).list("sandboxes") {
				all = append(all, c.(map[string]any)["id"].(string))
			}
			return all
		}},
		{"snapshot", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "a"}, map[string]any{"sandbox_id": sandbox, "name": "b"}, map[string]any{"sandbox_id": sandbox, "name": "c"}, func(r response) []string {
			return []string{r.want(201).str("id")}
		}},
	}
	for _, tt := range tests {
		g := newGate()
		p.agent.hook(g.on)
		var answers []<-chan response
		for range 3 {
			for _, s := range []*plane{p, q} {
				answers = append(answers, s.later("POST", tt.path, tt.body, "Idempotency-Key", tt.call))
			}
		}
		<-g.asked
		p.eventually("the repeated requests wait for the first", func() bool { return p.waiting()+q.waiting() == len(answers)-1 })
		close(g.release)
		var first []string
		fresh := 0
		for _, a := range answers {
			r := <-a
			all := tt.made(r)
			if first == nil {
				first = all
			}
			if !slices.Equal(all, first) {
				t.Errorf("%s: one key made %v and %v", tt.call, first, all)
			}
			if r.Header.Get("Idempotent-Replayed") == "" {
				fresh++
			}
		}
		if n := p.agent.called(tt.call); n != 1 || fresh != 1 {
			t.Errorf("%s: the host was asked %d times, %d answers are not replayed", tt.call, n, fresh)
		}
		p.agent.hook(nil)
		q.call("POST", tt.path, tt.other, "Idempotency-Key", tt.call).fails(422, "unprocessable")
		q.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", tt.call).fails(422, "unprocessable")
		// Without a key, or with another, it is a new request.
		if all := tt.made(p.call("POST", tt.path, tt.other)); slices.Equal(all, first) {
			t.Errorf("%s: without a key it made %v again", tt.call, all)
		}

		// A failed request frees its key.
		g = newGate()
		p.agent.hook(g.on)
		g.release <- connect.NewError(connect.CodeInternal, errors.New("the disk is broken"))
		p.call("POST", tt.path, tt.once, "Idempotency-Key", "fails "+tt.call).fails(500, "internal")
		p.agent.hook(nil)
		r := q.call("POST", tt.path, tt.once, "Idempotency-Key", "fails "+tt.call)
		if tt.made(r); r.Header.Get("Idempotent-Replayed") != "" {
			t.Errorf("%s: a failure is replayed", tt.call)
		}
		if again := tt.made(p.call("POST", tt.path, tt.once, "Idempotency-Key", "fails "+tt.call)); !slices.Equal(again, tt.made(r)) {
			t.Errorf("%s: one key made %v and %v", tt.call, tt.made(r), again)
		}
	}

	// Keys belong to a team, and outlive the forked sandbox.
	p.call("POST", fork, map[string]any{"count": 3}, "Idempotency-Key", "fork", "X-API-Key", p.newTeam()).fails(404, "not_found")
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	for _, tt := range tests {
		if r := q.call("POST", tt.path, tt.body, "Idempotency-Key", tt.call).want(201); r.Header.Get("Idempotent-Replayed") != "true" {
			t.Errorf("%s: not replayed after the sandbox's end", tt.call)
		}
	}
	// A deleted template takes its key along.
	p.call("DELETE", "/v1/snapshots/a", nil).want(204)
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "a"}, "Idempotency-Key", "snapshot").fails(409, "conflict")
}

// TestReplayWithoutServer kills the server during calls and repeats them through another
// one, which finds what the host made.
func TestReplayWithoutServer(t *testing.T) {
	t.Parallel()
	p, q := newTwo(t, 2*time.Second)
	sandbox := p.create(map[string]any{"timeout_seconds": 0})
	for call, c := range map[string]struct {
		path string
		body map[string]any
	}{
		"fork":     {"/v1/sandboxes/" + sandbox + "/fork", map[string]any{"count": 2}},
		"snapshot": {"/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "a"}},
	} {
		dying := p.second()
		g := newGate()
		p.agent.hook(g.on)
		go dying.try("POST", c.path, c.body, "Idempotency-Key", call)
		<-g.asked
		dying.halt()
		again := q.later("POST", c.path, c.body, "Idempotency-Key", call)
		p.agent.hook(nil)
		close(g.release) // Either the host completes the call, or the call ended with the server.
		r := (<-again).want(201)
		if more := p.call("POST", c.path, c.body, "Idempotency-Key", call).want(201); more.Header.Get("Idempotent-Replayed") != "true" {
			t.Errorf("%s: the repeated request's response is not marked as replayed: %s", call, more.Body)
		}
		if call == "fork" && len(r.list("sandboxes")) != 2 {
			t.Errorf("%s", r.Body)
		}
	}
	if got := len(p.call("GET", "/v1/sandboxes", nil).list("sandboxes")); got != 3 {
		t.Errorf("%d sandboxes, want the one and its two forks", got)
	}
}

func TestIdempotency(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	release := make(chan struct{})
	p.agent.onCreate = func(context.Context, *hostagentv1.CreateRequest) error {
		<-release
		return nil
	}
	const n = 8
	answers := make(chan response, n)
	for i := range n {
		go func() {
			// The same request with its members in another order.
			body := `{"vcpus":1,"metadata":{"a":"1","b":"2"}}`
			if i%2 == 1 {
				body = fmt.Sprintf(`{"metadata":{"b":"2","a":"1"},"memory_mib":%d}`, hostwire.DefaultMemoryMiB)
			}
			r, err := p.try("POST", "/v1/sandboxes", body, "Idempotency-Key", "once")
			if err != nil {
				t.Error(err)
			}
			answers <- r
		}()
	}
	p.eventually("the host is asked", func() bool { return p.agent.created() == 1 })
	p.call("POST", "/v1/sandboxes", map[string]any{"vcpus": 2}, "Idempotency-Key", "once").fails(422, "unprocessable")
	close(release)
	ids, fresh := make(map[string]bool), 0
	for range n {
		r := (<-answers).want(201)
		ids[r.str("id")] = true
		if r.Header.Get("Idempotent-Replayed") == "" {
			fresh++
		}
	}
	if len(ids) != 1 || fresh != 1 || p.agent.created() != 1 {
		t.Errorf("one key made %d sandboxes (%d calls to the host, %d answers not replayed)", len(ids), p.agent.created(), fresh)
	}
	// The key still names the sandbox after its end.
	sandbox := slices.Collect(maps.Keys(ids))[0]
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	if r := p.call("POST", "/v1/sandboxes", map[string]any{"metadata": map[string]string{"a": "1", "b": "2"}}, "Idempotency-Key", "once").want(201); r.str("id") != sandbox || r.str("state") != "stopped" {
		t.Errorf("replayed after deletion: %s", r.Body)
	}
	// A failed creation frees its key.
	p.agent.mu.Lock()
	p.agent.onCreate = func(context.Context, *hostagentv1.CreateRequest) error {
		return connect.NewError(connect.CodeResourceExhausted, errors.New("no memory left on the host"))
	}
	p.agent.mu.Unlock()
	r := p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "again").fails(503, "no_capacity")
	if !strings.Contains(string(r.Body), "no memory left on the host") {
		t.Errorf("the error does not say why: %s", r.Body)
	}
	failed := p.call("GET", "/v1/sandboxes?state=error", nil).want(200).list("sandboxes")
	if len(failed) != 1 || failed[0].(map[string]any)["error"] != "no memory left on the host" || failed[0].(map[string]any)["end_reason"] != "failed" {
		t.Errorf("failed ones: %v", failed)
	}
	p.agent.mu.Lock()
	p.agent.onCreate = nil
	p.agent.mu.Unlock()
	p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "again").want(201)
}
