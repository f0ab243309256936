package server_test

import (
	"context"
	"errors"
	"net/url"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

// TestHostVanishes makes calls while the host is unreachable.
func TestHostVanishes(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox, doomed := p.create(map[string]any{}), p.create(map[string]any{})
	p.agent.close()
	p.call("POST", "/v1/sandboxes", map[string]any{}).fails(503, "host_unreachable")
	p.call("POST", "/v1/sandboxes/"+sandbox+"/exec", map[string]any{"cmd": "cat"}).fails(503, "host_unreachable")
	p.call("GET", "/v1/sandboxes/"+sandbox+"/files?path=/x", nil).fails(503, "host_unreachable")
	p.call("PUT", "/v1/sandboxes/"+sandbox+"/files?path=/x", []byte("x")).fails(503, "host_unreachable")
	p.call("DELETE", "/v1/sandboxes/"+doomed, nil).fails(503, "host_unreachable")
	if s := p.state(doomed); s != "stopping" {
		t.Errorf("state %s, want stopping", s)
	}
	h := p.call("GET", "/health", nil).want(503).object()
	if c := h["checks"].(map[string]any); c["agent"] != "unreachable" || c["database"] != "ok" || c["redis"] != "ok" {
		t.Errorf("health: %v", h)
	}
	if s := p.state(sandbox); s != "running" {
		t.Errorf("state %s, want running: its host may be back", s)
	}
	p.agent.serve(t)
	p.eventually("the server completes the deletion", func() bool { return p.state(doomed) == "stopped" })
	if p.agent.has(doomed) {
		t.Error("the host still has it")
	}
	p.call("POST", "/v1/sandboxes/"+sandbox+"/exec", map[string]any{"cmd": "cat"}).want(200)
	p.eventually("health is ok", func() bool { return p.call("GET", "/health", nil).Status == 200 })
}

// TestServerDies starts a second server, which finds what the first one left in transit.
// The first stops without cleaning up, as after SIGKILL.
func TestServerDies(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	hang := make(chan struct{})
	asked := make(chan string)
	p.agent.onCreate = func(_ context.Context, m *hostagentv1.CreateRequest) error {
		asked <- m.SandboxId
		<-hang
		return connect.NewError(connect.CodeUnavailable, errors.New("too late"))
	}
	p.agent.onDestroy = func(_ context.Context, m *hostagentv1.DestroyRequest) error {
		if p.agent.created() < 3 {
			return nil
		}
		select {
		case asked <- m.SandboxId:
		default:
		}
		<-hang
		return nil
	}
	for i := range 2 {
		go p.try("POST", "/v1/sandboxes", map[string]any{"metadata": map[string]string{"i": strconv.Itoa(i)}}, "Idempotency-Key", "k"+strconv.Itoa(i))
	}
	first, second := <-asked, <-asked
	third := id.Format(id.Sandbox, uuid.New())
	stray := id.Format(id.Sandbox, uuid.New())
	thirdID, _ := id.Parse(id.Sandbox, third)
	p.sql(`INSERT INTO sandboxes SELECT $1, team_id, host_id, template_id, template_name, 'stopping', vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at FROM sandboxes LIMIT 1`, thirdID)
	// The host completed one of the first server's requests.
	p.agent.add(first, 60)
	p.agent.add(third, 60)
	p.agent.add(stray, 60)
	old := p.end
	p.halt()
	p.agent.mu.Lock()
	p.agent.onCreate, p.agent.onDestroy = nil, nil
	p.agent.mu.Unlock()
	// The heartbeat decides how soon the next server takes the first for dead.
	p.config.Heartbeat = 2 * time.Second
	p.start()
	next := p.end
	p.end = func() { next(); close(hang); old() }
	p.eventually("the one that the host has runs", func() bool { return p.state(first) == "running" })
	p.eventually("the one that the host does not have failed", func() bool { return p.state(second) == "error" })
	p.eventually("the one that was stopping is stopped", func() bool { return p.state(third) == "stopped" })
	if p.agent.has(third) {
		t.Error("the host still has the one that was stopping")
	}
	if !p.agent.has(stray) {
		t.Error("a sandbox that the database does not know was destroyed at once")
	}
	one := p.call("GET", "/v1/sandboxes/"+first, nil).object()["metadata"].(map[string]any)["i"].(string)
	if r := p.call("POST", "/v1/sandboxes", map[string]any{"metadata": map[string]string{"i": one}}, "Idempotency-Key", "k"+one).want(201); r.str("id") != first {
		t.Errorf("the key names %s, want %s", r.str("id"), first)
	}
	p.agent.mu.Lock()
	p.agent.onCreate = nil
	p.agent.mu.Unlock()
	two := p.call("GET", "/v1/sandboxes/"+second, nil).object()["metadata"].(map[string]any)["i"].(string)
	if r := p.call("POST", "/v1/sandboxes", map[string]any{"metadata": map[string]string{"i": two}}, "Idempotency-Key", "k"+two).want(201); r.str("id") == second {
		t.Error("the key still names the failed one")
	}
}

func TestDatabaseRestarts(t *testing.T) {
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	c := pgtest.Shared(t)
	c.Stop()
	p.call("GET", "/v1/sandboxes/"+sandbox, nil).fails(503, "unavailable")
	if h := p.call("GET", "/health", nil).want(503).object(); h["checks"].(map[string]any)["database"] != "unreachable" {
		t.Errorf("health: %v", h)
	}
	p.metrics()
	// The sandbox ends while the database is down.
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, sandbox, "")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	p.eventually("the server records the end", func() bool {
		r := p.call("GET", "/v1/sandboxes/"+sandbox, nil)
		return r.Status == 200 && r.str("end_reason") == "expired"
	})
	p.create(map[string]any{})
}

// TestDatabaseFailsOver promotes a standby in the primary's place.
func TestDatabaseFailsOver(t *testing.T) {
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	c := pgtest.Shared(t)
	standby := c.Standby(t)
	p.end()
	u, err := url.Parse(p.config.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	p.config.DatabaseURL = c.URL(strings.TrimPrefix(u.Path, "/"), standby)
	p.start()
	other := p.create(map[string]any{})
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, sandbox, "")
	c.Stop() // everything acknowledged is on the standby
	t.Cleanup(func() {
		if err := c.Start(); err != nil {
			t.Error(err)
		}
	})
	p.call("GET", "/v1/sandboxes/"+other, nil).fails(503, "unavailable")
	standby.Do(t, "SELECT pg_promote()")
	p.eventually("the new primary is found", func() bool {
		r := p.call("GET", "/v1/sandboxes/"+other, nil)
		return r.Status == 200 && r.str("state") == "running"
	})
	p.eventually("the server records what happened during the failover", func() bool {
		r := p.call("GET", "/v1/sandboxes/"+sandbox, nil)
		return r.Status == 200 && r.str("end_reason") == "expired"
	})
	p.create(map[string]any{})
	p.end() // before its database goes
}

// TestDatabaseTakesNoChanges makes the primary read-only, like one that lost its role,
// while its connections stay open.
func TestDatabaseTakesNoChanges(t *testing.T) {
	p := newPlane(t)
	p.create(map[string]any{})
	c := pgtest.Shared(t)
	conn := pgtest.Connect(t, c.URL("postgres"))
	set := func(to string) {
		for _, s := range []string{"SET default_transaction_read_only = off", "ALTER SYSTEM SET default_transaction_read_only = " + to, "SELECT pg_reload_conf()"} {
			if _, err := conn.Exec(context.Background(), s); err != nil {
				t.Fatal(err)
			}
		}
	}
	defer set("off")
	set("on")
	p.eventually("the server refuses changes for now", func() bool {
		r, err := p.try("POST", "/v1/sandboxes", map[string]any{})
		if err != nil {
			t.Fatal(err)
		}
		if r.Status != 201 && r.Status != 503 {
			t.Errorf("a change is answered %d: %s", r.Status, r.Body)
		}
		return r.Status == 503
	})
	set("off")
	p.eventually("the server accepts changes again", func() bool {
		r, err := p.try("POST", "/v1/sandboxes", map[string]any{})
		return err == nil && r.Status == 201
	})
}

// TestRedisFlushed empties Redis under a running server.
func TestRedisFlushed(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	q := p.second()
	flush := func() {
		if out, err := exec.Command("redis-cli", "-s", strings.TrimPrefix(p.redis.url, "unix://"), "FLUSHALL").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	sandbox := p.create(map[string]any{})
	flush()
	if r := q.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200); r.str("state") != "running" {
		t.Errorf("sandbox is %s", r.str("state"))
	}
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	flush()
	q.eventually("the other server learns of the end", func() bool {
		return q.call("GET", "/v1/sandboxes/"+sandbox, nil).str("state") == "stopped"
	})
	p.create(map[string]any{})
	if h := p.call("GET", "/health", nil).want(200).object(); h["status"] != "ok" {
		t.Errorf("health: %v", h)
	}
}

func TestRedisDown(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	r := startRedis(t)
	p.config.RedisURL = r.url
	r.stop()
	p.start()
	if h := p.call("GET", "/health", nil).want(503).object(); h["checks"].(map[string]any)["redis"] != "unreachable" || h["status"] != "unavailable" {
		t.Errorf("health: %v", h)
	}
	p.create(map[string]any{})
}
