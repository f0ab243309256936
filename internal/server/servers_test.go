package server_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
)

// TestTwoServersTakeTurns sends concurrent requests about one sandbox to two servers: the
// host is asked once, and all requests get the same result.
func TestTwoServersTakeTurns(t *testing.T) {
	t.Parallel()
	p, q := newTwo(t, 2*time.Second)
	sandbox := p.create(map[string]any{"auto_resume": true})
	base := "/v1/sandboxes/" + sandbox
	// both makes n concurrent calls to each server; all must get the same response.
	both := func(n int, method, path string, body any, headers ...string) {
		t.Helper()
		var wg sync.WaitGroup
		for _, s := range []*plane{p, q} {
			for range n {
				wg.Go(func() {
					r, err := s.try(method, path, body, headers...)
					if err != nil || r.Status != http.StatusOK {
						t.Errorf("%s %s: %d %s %v", method, path, r.Status, r.Body, err)
					}
				})
			}
		}
		wg.Wait()
	}
	// The host blocks until every other call waits for the first.
	p.agent.hook(func(_ context.Context, call string) error {
		if call == "run" {
			return nil
		}
		p.eventually("all but one wait", func() bool { return p.waiting()+q.waiting() == 9 })
		return nil
	})
	both(5, "POST", base+"/pause", nil)
	if n := p.agent.called("pause"); n != 1 {
		t.Errorf("the host was asked to pause %d times", n)
	}
	// Requests through both servers resume it once.
	both(5, "POST", base+"/exec", map[string]any{"cmd": "cat"})
	if n := p.agent.called("resume"); n != 1 {
		t.Errorf("the host was asked to resume %d times", n)
	}
	p.agent.hook(nil)
	for _, s := range []*plane{p, q} {
		if got := s.state(sandbox); got != "running" {
			t.Errorf("it is %s", got)
		}
	}
}

// TestTwoServersWatch checks that one of two servers watches a host, and that the other
// takes over when the first dies.
func TestTwoServersWatch(t *testing.T) {
	t.Parallel()
	p := newPlaneBeating(t, hosts.DefaultHeartbeat) // Even on a busy machine, a live server sends heartbeats this often.
	watcher := func() (id string, alive bool) {
		err := p.db().QueryRow(t.Context(), "SELECT servers.id::text, seen_at > now() - make_interval(secs => $1) FROM hosts JOIN servers ON servers.id = watcher", p.config.Heartbeat.Seconds()).Scan(&id, &alive)
		if err != nil {
			return "", false
		}
		return id, alive
	}
	var first string
	p.eventually("the first watches the host", func() bool {
		var alive bool
		first, alive = watcher()
		return alive
	})
	// Start it only now: of two servers that claim a host at the same moment, the second
	// may get it.
	q := p.second()
	// The first keeps the host while both send heartbeats.
	signs := make(map[string]map[time.Time]bool)
	p.eventually("both servers have sent several heartbeats", func() bool {
		if now, _ := watcher(); now != first {
			t.Fatalf("the host moved from %s to %s while both live", first, now)
		}
		rows, err := p.db().Query(t.Context(), "SELECT id::text, seen_at FROM servers")
		if err != nil {
			t.Fatal(err)
		}
		often := 0
		var id string
		var at time.Time
		if _, err := pgx.ForEachRow(rows, []any{&id, &at}, func() error {
			if signs[id] == nil {
				signs[id] = make(map[time.Time]bool)
			}
			if signs[id][at] = true; len(signs[id]) > 5 {
				often++
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return often == 2
	})
	p.halt() // without saying goodbye
	q.eventually("the other server watches the host", func() bool {
		now, alive := watcher()
		return alive && now != first
	})
	// Events from the host reach it.
	sandbox := q.create(map[string]any{})
	p.agent.forget(sandbox)
	q.eventually("the server records what the host lost", func() bool { return q.state(sandbox) == "stopped" })
}

// TestTwoServersWithoutRedis checks that servers which cannot notify each other trust no
// cache.
func TestTwoServersWithoutRedis(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	r := startRedis(t)
	p.end()
	p.config.RedisURL = r.url
	p.start()
	q := p.second()
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	sandbox := p.create(map[string]any{})
	port := func(s *plane) int {
		r, err := s.try("GET", "/", nil, "Host", "80-"+sandbox+".localhost")
		if err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	for _, s := range []*plane{p, q} {
		if got := port(s); got != http.StatusTeapot {
			t.Fatalf("port answers %d", got)
		}
	}
	r.stop()
	q.eventually("without Redis it still works", func() bool { return port(q) == http.StatusTeapot })
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	q.eventually("the other server's proxy forgets the sandbox", func() bool { return port(q) == http.StatusNotFound })
}

// TestRevokedEverywhere revokes a host through one server: no other server calls it any
// more, long before its next regular look at its hosts.
func TestRevokedEverywhere(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Heartbeat, p.config.AgentURL, p.config.AgentToken = 2*time.Second, "", ""
	p.start()
	h := p.enroll("a")
	stop := h.beat(p, p.config.Heartbeat)
	p.eventually("the host is online", func() bool { return p.hostStatus(h.id) == "online" })
	var sandbox string
	p.eventually("the host takes a sandbox", func() bool {
		r := p.call("POST", "/v1/sandboxes", map[string]any{"timeout_seconds": 0})
		sandbox, _ = r.object()["id"].(string)
		return r.Status == 201
	})
	stop()
	// From now on they look at their hosts every minute.
	p.end()
	p.config.Heartbeat = 5 * time.Minute
	p.start()
	q := p.second()
	exec := func(s *plane) response {
		r, err := s.try("POST", "/v1/sandboxes/"+sandbox+"/exec", map[string]any{"cmd": "cat"})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	for _, s := range []*plane{p, q} {
		s.eventually("the other server uses it", func() bool { return exec(s).Status == 200 })
	}
	refresh := func(next string) response {
		hash := sha256.Sum256([]byte(next))
		return p.call("POST", "/v1/hosts/refresh", map[string]any{"refresh_token": "refresh of a", "next_hash": hex.EncodeToString(hash[:])})
	}
	refresh("the host's next").want(200)
	refresh("a thief's").fails(401, "unauthenticated")
	exec(p).fails(503, "host_unreachable") // at once
	q.eventually("the other server does not call it", func() bool { return exec(q).Status == 503 })
	if got := p.hostStatus(h.id); got != "offline" {
		t.Errorf("the host is %s", got)
	}
	p.call("POST", "/v1/hosts/heartbeat", map[string]any{"status": report()}, "Authorization", "Bearer "+h.token).fails(401, "unauthenticated")
}

// TestForgetServers removes the row of a server that crashed long ago, and no other row.
func TestForgetServers(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	old, lately := uuid.New(), uuid.New()
	p.sql("INSERT INTO servers (id, seen_at) VALUES ($1, now() - interval '2 days'), ($2, now() - interval '2 hours')", old, lately)
	p.start()
	there := func(server uuid.UUID) (is bool) {
		if err := p.db().QueryRow(t.Context(), "SELECT EXISTS (SELECT 1 FROM servers WHERE id = $1)", server).Scan(&is); err != nil {
			t.Fatal(err)
		}
		return is
	}
	p.eventually("the server that crashed is forgotten", func() bool { return !there(old) })
	if !there(lately) {
		t.Error("a server that may live was forgotten")
	}
}

// TestCloseWaits closes a server during a creation: Close returns after the host has
// answered, and other servers learn of the sandbox.
func TestCloseWaits(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Heartbeat, p.config.StopTimeout = time.Second, 2*time.Minute
	p.start()
	begun, let := make(chan struct{}), make(chan struct{})
	p.agent.mu.Lock()
	p.agent.onCreate = func(ctx context.Context, _ *hostagentv1.CreateRequest) error {
		close(begun)
		select {
		case <-let:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.agent.mu.Unlock()
	redisOptions, err := redis.ParseURL(p.redis.url)
	if err != nil {
		t.Fatal(err)
	}
	client := redis.NewClient(redisOptions)
	defer client.Close()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		_, _ = p.try("POST", "/v1/sandboxes", map[string]any{})
	}()
	<-begun
	p.halt()
	heard := client.Subscribe(t.Context(), "wrenn:sandboxes")
	defer heard.Close()
	if _, err := heard.Receive(t.Context()); err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	_, last := p.heartbeats()
	go func() { defer close(closed); _ = p.server.Close() }()
	p.eventually("the closing server sends a heartbeat", func() bool {
		_, at := p.heartbeats()
		return at.After(last)
	})
	select {
	case <-closed:
		t.Fatal("the server did not wait for the creation")
	default: // Package work tests for how long it waits.
	}
	close(let)
	<-closed
	<-answered
	var state string
	if err := p.db().QueryRow(t.Context(), "SELECT state FROM sandboxes").Scan(&state); err != nil || state != "running" {
		t.Errorf("the sandbox is %q, %v", state, err)
	}
	if _, err := heard.ReceiveTimeout(t.Context(), time.Minute); err != nil {
		t.Errorf("other servers do not learn of it: %v", err)
	}
}

// TestStoppingServerKeepsItsWork stops one of two servers while it creates a sandbox,
// which takes far longer than a dead server's grace period. The other server watches the
// host, and leaves the creation alone.
func TestStoppingServerKeepsItsWork(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Heartbeat, p.config.StopTimeout = time.Second, 2*time.Minute
	p.start()
	q := p.second()
	begun, let := make(chan struct{}), make(chan struct{})
	p.agent.mu.Lock()
	p.agent.onCreate = func(context.Context, *hostagentv1.CreateRequest) error {
		close(begun)
		<-let
		return nil
	}
	p.agent.mu.Unlock()
	go func() { _, _ = p.try("POST", "/v1/sandboxes", map[string]any{}) }()
	<-begun
	var creating uuid.UUID
	state := func(sandbox uuid.UUID) (is string) {
		if err := q.db().QueryRow(t.Context(), "SELECT state FROM sandboxes WHERE id = $1", sandbox).Scan(&is); err != nil {
			t.Fatal(err)
		}
		return is
	}
	if err := q.db().QueryRow(t.Context(), "SELECT id FROM sandboxes").Scan(&creating); err != nil {
		t.Fatal(err)
	}
	p.halt()
	closed := make(chan struct{})
	go func() { defer close(closed); _ = p.server.Close() }()
	// After the grace period, the other server gives up what no server works on.
	for range 3 {
		left := uuid.New()
		q.sql(`INSERT INTO sandboxes SELECT $1, team_id, host_id, template_id, template_name, 'starting', vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at FROM sandboxes LIMIT 1`, left)
		q.eventually("the other server gives up what no server works on", func() bool { return state(left) == "error" })
	}
	if is := state(creating); is != "starting" {
		t.Errorf("the stopping server's unfinished sandbox is %s", is)
	}
	close(let)
	<-closed
	if is := state(creating); is != "running" {
		t.Errorf("the stopping server's sandbox is %s", is)
	}
}

// heartbeats returns how many servers count as alive, and the time of the last heartbeat.
func (p *plane) heartbeats() (servers int, last time.Time) {
	p.Helper()
	if err := p.db().QueryRow(p.Context(), "SELECT count(*), COALESCE(max(seen_at), 'epoch') FROM servers").Scan(&servers, &last); err != nil {
		p.Fatal(err)
	}
	return servers, last
}

// TestSignsOfLifeWhileItStops checks that a stopping server sends heartbeats until its
// work is done.
func TestSignsOfLifeWhileItStops(t *testing.T) {
	p := newPlane(t)
	p.halt()
	_, last := p.heartbeats()
	p.server.Linger()
	for range 2 {
		p.eventually("another heartbeat", func() bool {
			_, at := p.heartbeats()
			return at.After(last)
		})
		_, last = p.heartbeats()
	}
	p.end()
	if n, _ := p.heartbeats(); n != 0 {
		t.Errorf("%d servers count as alive", n)
	}
}
