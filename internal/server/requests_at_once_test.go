package server_test

import (
	"context"
	"slices"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/await"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// newCrowdedPlane returns a plane that allows each principal one concurrent request.
func newCrowdedPlane(t *testing.T) *plane {
	t.Helper()
	p := newPlane(t)
	p.end()
	p.config.RequestsAtOnce = 1
	p.start()
	return p
}

// sendFrom makes a call from an address.
func (w *world) sendFrom(o operation, c caller, n int, address string) response {
	w.Helper()
	_, path, body, headers := w.compose(o, c, targets[0], n)
	headers[slices.Index(headers, "X-Forwarded-For")+1] = address
	r, err := w.try(o.method, path, body, headers...)
	if err != nil {
		w.Fatalf("%s as %s: %v", o, c.name, err)
	}
	return r
}

// crowded reports whether a call exceeded the limit of concurrent requests.
func crowded(r response) bool {
	return r.Status == 429 && r.Header.Get("Retry-After") != ""
}

// TestRequestsAtOnce gives each caller one request in flight, which is the limit. For every
// operation, the server refuses the caller's next request and accepts somebody else's.
func TestRequestsAtOnce(t *testing.T) {
	t.Parallel()
	p := newCrowdedPlane(t)
	w := p.world()
	all := operations(t)
	tried := 0
	var free []operation
	for _, o := range all {
		if !o.anybody() {
			free = append(free, o)
		}
	}
	for _, c := range callers() {
		if c.dead {
			continue
		}
		may := func(o operation) bool { return o.expected(c, targets[0]) == 0 }
		body := slices.IndexFunc(all, func(o operation) bool { return !o.anybody() && o.RequestBody != nil && may(o) })
		look := slices.IndexFunc(all, func(o operation) bool { return !o.anybody() && !o.changing() && may(o) })
		if body < 0 || look < 0 {
			continue
		}
		s := w.stall(all[body], c, p.http.Listener.Addr())
		left := free[:0:0]
		for _, o := range free {
			if !may(o) {
				left = append(left, o)
				continue
			}
			tried++
			if r := w.send(o, c, targets[0], tried); !crowded(r) {
				t.Errorf("%s as %s: %d %s", o, c.name, r.Status, r.Body)
			}
		}
		free = left
		s.Close()
		p.eventually("the request has ended", func() bool { return !crowded(w.send(all[look], c, targets[0], 0)) })
	}
	for _, o := range free {
		t.Errorf("%s: nobody may", o)
	}
	if tried < 90 {
		t.Errorf("only %d operations were tried", tried)
	}
}

// TestRequestsAtOnceOfOwner checks that one owner's teams together may have twice as many requests
// in flight as one principal, whatever the number of keys, and that requests to ports
// count.
func TestRequestsAtOnceOfOwner(t *testing.T) {
	t.Parallel()
	p := newCrowdedPlane(t)
	keys := p.ownerOf(3, "ada@example.com")
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", keys[2]).want(201).str("id")
	other := p.newTeam()
	hold := newGate()
	p.agent.mu.Lock()
	p.agent.onCreate = func(ctx context.Context, _ *hostagentv1.CreateRequest) error { return hold.on(ctx, "create") }
	p.agent.mu.Unlock()
	answers := make([]<-chan response, 2)
	for i := range answers {
		answers[i] = p.later("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", keys[i])
		await.Recv(t, "a sandbox is made", hold.asked)
	}
	list := func(key string) response { return p.call("GET", "/v1/sandboxes", nil, "X-API-Key", key) }
	if r := list(keys[2]); !crowded(r) {
		t.Errorf("a third of one owner's: %d %s", r.Status, r.Body)
	}
	port := func(headers ...string) response {
		return p.call("GET", "/", nil, append([]string{"Host", "8000-" + sandbox + ".localhost"}, headers...)...)
	}
	if r := port("X-API-Key", keys[2]); !crowded(r) {
		t.Errorf("one to a port: %d %s", r.Status, r.Body)
	}
	list(other).want(200)
	hold.release <- nil
	hold.release <- nil
	for _, a := range answers {
		await.Recv(t, "a sandbox is made", a).want(201)
	}
	p.eventually("the owner's requests have ended", func() bool { return !crowded(list(keys[2])) })
}

// TestRequestsAtOnceOfAddress has two requests in flight from one address, as the front door
// reports it. For every operation, the server refuses the next one and accepts another
// address's.
func TestRequestsAtOnceOfAddress(t *testing.T) {
	t.Parallel()
	p := newCrowdedPlane(t)
	w := p.world()
	all, people := operations(t), callers()
	login := all[slices.IndexFunc(all, func(o operation) bool { return o.OperationID == "logIn" })]
	// The walk's first calls come from this address.
	const address = "198.18.0.0"
	for range 2 {
		w.stall(login, people[0], p.http.Listener.Addr())
	}
	for n, o := range all {
		if r := w.sendFrom(o, people[0], n, address); !crowded(r) {
			t.Errorf("%s: %d %s", o, r.Status, r.Body)
		}
	}
	if r := w.sendFrom(login, people[0], 0, "198.18.9.9"); crowded(r) {
		t.Errorf("from another address: %d %s", r.Status, r.Body)
	}
	if r := p.call("GET", "/", nil, "Host", "8000-"+w.teams[ours].wireSandbox+".localhost", "X-Forwarded-For", address); !crowded(r) {
		t.Errorf("one to a port: %d %s", r.Status, r.Body)
	}
}
