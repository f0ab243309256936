package server_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// newTwo returns two servers on one database, Redis and host, with the given time between
// heartbeats.
func newTwo(t *testing.T, heartbeat time.Duration) (p, q *plane) {
	t.Helper()
	p = newPlaneBeating(t, heartbeat)
	return p, p.second()
}

// newPlaneBeating starts a server with the given time between heartbeats.
func newPlaneBeating(t *testing.T, heartbeat time.Duration) *plane {
	t.Helper()
	p := newPlane(t)
	p.end()
	p.config.Heartbeat = heartbeat
	p.start()
	return p
}

// second starts another server on the same database, Redis and host. It stops at the end
// of the test or when end is called.
func (p *plane) second() *plane {
	p.Helper()
	q := &plane{TB: p.TB, agent: p.agent, config: p.config, document: p.document}
	q.start()
	p.Cleanup(func() { q.end() })
	return q
}

// TestTwoServers checks that two servers behave as one.
func TestTwoServers(t *testing.T) {
	t.Parallel()
	p, q := newTwo(t, 2*time.Second)
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })

	// A server leaves alone what the other has in transit, long past the grace period,
	// and learns of its end.
	asked, let := make(chan struct{}), make(chan struct{})
	p.agent.onCreate = func(context.Context, *hostagentv1.CreateRequest) error {
		close(asked)
		<-let
		return nil
	}
	made := make(chan response, 2)
	create := func(s *plane) {
		r, err := s.try("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "k")
		if err != nil {
			t.Error(err)
		}
		made <- r
	}
	go create(p)
	<-asked
	p.agent.mu.Lock()
	p.agent.onCreate = nil
	p.agent.mu.Unlock()
	go create(q)
	from := p.agent.called("list")
	p.eventually("comparisons, a second apart, for longer than the grace", func() bool {
		select {
		case r := <-made:
			t.Fatalf("creation ended early: %s", r.Body)
		default:
		}
		return p.agent.called("list") > from+5
	})
	close(let)
	one, two := (<-made).want(201), (<-made).want(201)
	sandbox := one.str("id")
	if two.str("id") != sandbox || p.agent.created() != 1 {
		t.Fatalf("one key made %s and %s in %d creations", sandbox, two.str("id"), p.agent.created())
	}

	// Both proxies have cached the sandbox. One server deletes it, and the other drops it
	// at once, not after the cache's 120 s.
	port := func(s *plane) int {
		r, err := s.try("GET", "/", nil, "Host", "80-"+sandbox+".localhost")
		if err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	for _, s := range []*plane{p, q, p, q} {
		if got := port(s); got != http.StatusTeapot {
			t.Fatalf("port answers %d", got)
		}
	}
	q.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	p.eventually("the other server's proxy forgets the sandbox", func() bool { return port(p) == http.StatusNotFound })

	// One server stops; the other learns what the host does by itself.
	other := q.create(map[string]any{})
	p.end()
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, other, "")
	q.eventually("the remaining server records the event", func() bool { return q.state(other) == "stopped" })
}

// tcpHost is a registered host whose agent is a fake on loopback.
type tcpHost struct {
	*agent
	id, token string
}

// enroll adds a host as an admin and registers an agent for it.
func (p *plane) enroll(name string, tags ...string) *tcpHost {
	p.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		p.Fatal(err)
	}
	r := p.call("POST", "/v1/hosts/register", p.addHost(name, l.Addr().String(), tags...)).want(201)
	h := &tcpHost{agent: newTCPAgent(p.TB, l, r.str("agent_token")), id: r.str("host_id"), token: r.str("token")}
	return h
}

// addHost adds a host as an admin, and returns the request with which its agent
// registers.
func (p *plane) addHost(name, address string, tags ...string) map[string]any {
	p.Helper()
	added := p.call("POST", "/v1/admin/hosts", map[string]any{"name": name, "tags": append([]string{}, tags...)}).want(201)
	if got := added.object()["host"].(map[string]any)["status"]; got != "pending" {
		p.Errorf("a host that nobody registered yet is %v", got)
	}
	return map[string]any{"token": added.str("token"), "url": "http://" + address, "refresh_hash": hashOf("refresh of " + name), "status": report()}
}

// hashOf returns the hash under which the server stores a refresh token.
func hashOf(token string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(token))) }

func report() map[string]any {
	return map[string]any{
		"version": "test", "vmm": "none", "accelerator": "none", "cpus": 2, "memory_bytes": 1, "disk_bytes": 1 << 40, "capacity_mib": 4096, "slots": 0,
		"network_block": 0, "sandboxes": 0, "used_memory_mib": 0, "used_vcpus": 0, "disk_free_bytes": 1 << 39,
	}
}

// beat sends heartbeats until stop is called.
func (h *tcpHost) beat(p *plane, every time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			_, _ = p.try("POST", "/v1/hosts/heartbeat", map[string]any{"status": report()}, "Authorization", "Bearer "+h.token)
			select {
			case <-time.After(every): // real time: the interval of the heartbeats
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

func (p *plane) hostStatus(host string) string {
	p.Helper()
	return p.call("GET", "/v1/admin/hosts/"+host, nil).want(200).str("status")
}

// TestHosts checks what the scheduler does while hosts register, fill, fail, vanish, come
// back, drain and leave.
func TestHosts(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	const beat = 2 * time.Second
	p.config.Heartbeat, p.config.AgentURL, p.config.AgentToken = beat, "", ""
	p.config.OvercommitMemory, p.config.OvercommitVCPUs = 1, 32
	// The host of the configuration must not count.
	p.sql("UPDATE hosts SET status = 'unreachable'")
	p.start()
	p.call("POST", "/v1/sandboxes", map[string]any{}).fails(503, "no_capacity")
	p.call("POST", "/v1/admin/hosts", map[string]any{"name": "x"}, "X-API-Key", p.newTeam()).fails(403, "permission_denied")

	a, b := p.enroll("a", "red"), p.enroll("b", "blue")
	stopA, stopB := a.beat(p, beat), b.beat(p, beat)
	defer func() { stopB() }()
	for _, h := range []*tcpHost{a, b} {
		p.eventually("the host is online", func() bool { return p.hostStatus(h.id) == "online" })
	}
	p.eventually("both have the template", func() bool {
		var n int
		err := p.db().QueryRow(context.Background(), "SELECT count(*) FROM host_templates JOIN hosts ON id = host_id WHERE enrolled").Scan(&n)
		return err == nil && n == 2
	})
	where := func(sandbox string) string {
		return p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200).str("host_id")
	}
	on := map[string][]string{}
	for range 10 {
		sandbox := p.create(map[string]any{"memory_mib": 128})
		on[where(sandbox)] = append(on[where(sandbox)], sandbox)
	}
	if len(on[a.id]) != 5 || len(on[b.id]) != 5 {
		t.Errorf("%d and %d of 10 sandboxes", len(on[a.id]), len(on[b.id]))
	}
	for range 3 {
		if got := where(p.create(map[string]any{"memory_mib": 128, "host_tags": []string{"red"}})); got != a.id {
			t.Errorf("a sandbox for red hosts is on %s", got)
		}
	}
	for why, body := range map[string]map[string]any{
		"tags [red blue]":    {"host_tags": []string{"red", "blue"}},
		"8192 MiB of memory": {"memory_mib": 8192},
		"4 virtual CPUs":     {"vcpus": 4},
	} {
		r := p.call("POST", "/v1/sandboxes", body).fails(503, "no_capacity")
		if !strings.Contains(string(r.Body), why) {
			t.Errorf("%v: it does not say %q: %s", body, why, r.Body)
		}
	}

	// A sandbox stays on the only host that can run it, however full: the one that has
	// its template, or the one where it was paused.
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": on[a.id][3], "name": "local"}).want(201)
	for range 3 {
		if got := where(p.create(map[string]any{"template": "local"})); got != a.id {
			t.Errorf("a sandbox is on %s, which does not have its template", got)
		}
	}
	rests := p.create(map[string]any{"template": "local"})
	p.call("POST", "/v1/sandboxes/"+rests+"/pause", nil).want(200)
	p.call("POST", "/v1/sandboxes/"+rests+"/resume", nil).want(200)
	if got := where(rests); got != a.id || !a.has(rests) || b.has(rests) {
		t.Errorf("a sandbox that was paused on one host was resumed on %s", got)
	}
	p.call("POST", "/v1/sandboxes/"+rests+"/pause", nil).want(200)

	// If one host fails, the server asks another.
	b.mu.Lock()
	b.onCreate = func(context.Context, *hostagentv1.CreateRequest) error {
		return connect.NewError(connect.CodeResourceExhausted, errors.New("full"))
	}
	b.mu.Unlock()
	for range 4 {
		if got := where(p.create(map[string]any{"memory_mib": 128})); got != a.id {
			t.Errorf("on %s", got)
		}
	}
	p.call("POST", "/v1/sandboxes", map[string]any{"host_tags": []string{"blue"}}).fails(503, "no_capacity")
	b.mu.Lock()
	b.onCreate = nil
	b.mu.Unlock()

	// A host vanishes: its sandboxes are missing, and new ones go to the other host.
	vanished := time.Now()
	stopA()
	a.vanish()
	missing := on[a.id][0]
	p.eventually("the sandbox is missing", func() bool { return p.state(missing) == "missing" })
	t.Logf("missing %v after the host vanished, heartbeats being %v apart", time.Since(vanished).Round(time.Millisecond), beat)
	if got := p.hostStatus(a.id); got != "unreachable" {
		t.Errorf("the host is %s", got)
	}
	p.call("POST", "/v1/sandboxes/"+missing+"/exec", map[string]any{"cmd": "cat"}).fails(503, "host_unreachable")
	p.call("POST", "/v1/sandboxes/"+rests+"/resume", nil).fails(503, "host_unreachable")
	if got := p.state(rests); got != "paused" {
		t.Errorf("a paused sandbox whose host is gone is %s", got)
	}
	p.call("POST", "/v1/sandboxes", map[string]any{"template": "local"}).fails(503, "no_capacity")
	for range 3 {
		if got := where(p.create(map[string]any{"memory_mib": 128})); got != b.id {
			t.Errorf("a new sandbox is on the host that vanished")
		}
	}
	if got := p.state(on[b.id][0]); got != "running" {
		t.Errorf("the other host's sandbox is %s", got)
	}
	// Of the missing sandboxes, one ended on its host, and a client deleted another.
	ended, deleted := on[a.id][1], on[a.id][2]
	a.forget(ended)
	p.call("DELETE", "/v1/sandboxes/"+deleted, nil).fails(503, "host_unreachable")
	l, err := net.Listen("tcp", a.address)
	if err != nil {
		t.Fatal(err)
	}
	a.serveOn(l)
	stopA = a.beat(p, beat)
	defer func() { stopA() }()
	p.eventually("the sandbox is back", func() bool { return p.state(missing) == "running" })
	p.eventually("the server learns that one ended", func() bool {
		return p.call("GET", "/v1/sandboxes/"+ended, nil).want(200).str("end_reason") == "lost"
	})
	p.eventually("the deleted one is stopped", func() bool { return p.state(deleted) == "stopped" })
	p.call("POST", "/v1/sandboxes/"+missing+"/exec", map[string]any{"cmd": "cat"}).want(200)

	// A draining host gets no new sandboxes.
	p.call("PATCH", "/v1/admin/hosts/"+a.id, map[string]any{"draining": true}).want(200)
	if got := p.hostStatus(a.id); got != "draining" {
		t.Errorf("the host is %s", got)
	}
	for range 3 {
		if got := where(p.create(map[string]any{"memory_mib": 128})); got != b.id {
			t.Errorf("a new sandbox is on the draining host")
		}
	}
	p.call("POST", "/v1/sandboxes/"+missing+"/exec", map[string]any{"cmd": "cat"}).want(200)

	// Before it removes a host, the server says what would be lost.
	p.call("DELETE", "/v1/admin/hosts/"+a.id, nil).fails(409, "conflict")
	loses := p.call("GET", "/v1/admin/hosts/"+a.id+"?preview=true", nil).want(200).object()["loses"].(map[string]any)["sandboxes"].(map[string]any)
	if loses["running"].(float64) < 5 {
		t.Errorf("preview: %v", loses)
	}
	p.call("DELETE", "/v1/admin/hosts/"+a.id+"?force=true", nil).want(204)
	if got := p.call("GET", "/v1/sandboxes/"+missing, nil).want(200); got.str("state") != "stopped" || got.str("end_reason") != "lost" {
		t.Errorf("its sandbox: %s", got.Body)
	}
	if a.has(missing) {
		t.Error("the host still has a sandbox that its removal ended")
	}
	p.call("GET", "/v1/admin/hosts/"+a.id, nil).fails(404, "not_found")
	p.call("POST", "/v1/hosts/heartbeat", map[string]any{"status": report()}, "Authorization", "Bearer "+a.token).fails(401, "unauthenticated")
	p.call("POST", "/v1/hosts/heartbeat", map[string]any{"status": report()}).fails(401, "unauthenticated")
	// If a host says goodbye, its sandboxes are missing at once.
	stopB()
	p.call("POST", "/v1/hosts/heartbeat", map[string]any{"leaving": true}, "Authorization", "Bearer "+b.token).want(200)
	p.eventually("what ran on the host that left is missing", func() bool { return p.state(on[b.id][0]) == "missing" })
	if got := p.hostStatus(b.id); got != "offline" {
		t.Errorf("the host is %s", got)
	}
}

// TestGuestDoesNotStart creates sandboxes whose guest starts on neither of two hosts.
func TestGuestDoesNotStart(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	b := p.enroll("b")
	defer b.beat(p, time.Second)()
	p.eventually("both hosts have the template", func() bool {
		var n int
		err := p.db().QueryRow(context.Background(), "SELECT count(*) FROM host_templates JOIN hosts ON id = host_id WHERE status = 'online'").Scan(&n)
		return err == nil && n == 2
	})
	const why = "the sandbox did not start: no such user"
	for _, tt := range []struct {
		name   string
		reason string
		calls  int
		status int
		code   string
	}{
		{"the guest", hostwire.GuestStart, 1, 422, "unprocessable"},
		{"a guest that took too long", hostwire.GuestSlow, 1, 503, "unavailable"},
		{"the host, or an earlier agent", "", 2, 503, "unavailable"},
	} {
		before := p.agent.created() + b.created()
		for _, a := range []*agent{p.agent, b.agent} {
			a.mu.Lock()
			a.onCreate = func(context.Context, *hostagentv1.CreateRequest) error {
				err := connect.NewError(connect.CodeUnavailable, errors.New(why))
				if tt.reason != "" {
					err.Meta().Set(hostwire.ErrorReason, tt.reason)
				}
				return err
			}
			a.mu.Unlock()
		}
		r := p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "k").fails(tt.status, tt.code)
		if !strings.Contains(string(r.Body), why) || strings.Contains(string(r.Body), "template") != (tt.reason == hostwire.GuestStart) {
			t.Errorf("%s: the error does not say why: %s", tt.name, r.Body)
		}
		if n := p.agent.created() + b.created() - before; n != tt.calls {
			t.Errorf("%s: it was tried %d times, want %d", tt.name, n, tt.calls)
		}
	}
	failed := p.call("GET", "/v1/sandboxes?state=error", nil).want(200).list("sandboxes")
	if len(failed) != 3 {
		t.Errorf("failed ones: %v", failed)
	}
	// The idempotency key can be used again.
	for _, a := range []*agent{p.agent, b.agent} {
		a.mu.Lock()
		a.onCreate = nil
		a.mu.Unlock()
	}
	p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "k").want(201)
}
