package server_test

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/api"
	"github.com/wrenn-dev/wrenn/internal/server"
)

func TestService(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	none := []string{"X-API-Key", ""}
	if h := p.call("GET", "/health", nil, none...).want(200).object(); h["status"] != "ok" {
		t.Errorf("health: %v", h)
	}
	if got := p.call("GET", "/openapi.yaml", nil, none...).want(200).Body; !bytes.Equal(got, api.OpenAPI) {
		t.Error("/openapi.yaml is another document")
	}
	if docs := p.call("GET", "/docs", nil, none...).want(200).Body; !bytes.Contains(docs, []byte("/v1/sandboxes/{sandbox_id}/exec/stream")) {
		t.Error("/docs has not the document")
	}
	base := "/v1/sandboxes/" + p.create(map[string]any{})
	p.call("POST", base+"/pause", nil).want(200)
	p.call("POST", base+"/resume", nil).want(200)
	p.call("GET", "/v1/nope", nil)
	metrics := p.metrics()
	p.call("GET", "/metrics", nil, none...).fails(404, "not_found") // strangers reach this address
	for _, want := range []string{
		`wrenn_sandboxes{state="running"} 1`, `wrenn_sandbox_creations_total{result="ok"} 1`, `wrenn_sandbox_create_seconds_count 1`,
		`wrenn_http_requests_total{method="POST",route="/v1/sandboxes",status="201"} 1`, `wrenn_http_requests_total{method="other",route="other",status="404"} 1`,
		`wrenn_http_request_seconds_bucket{method="POST",route="/v1/sandboxes"`,
		`wrenn_sandbox_step_seconds_count{operation="create",result="ok",step="place"} 1`, `wrenn_sandbox_step_seconds_count{operation="create",result="ok",step="reserve"} 1`,
		`wrenn_sandbox_step_seconds_count{operation="create",result="ok",step="host"} 1`, `wrenn_sandbox_step_seconds_count{operation="create",result="ok",step="write"} 1`,
		`wrenn_sandbox_step_seconds_count{operation="pause",result="ok",step="mark"} 1`, `wrenn_sandbox_step_seconds_count{operation="pause",result="ok",step="host"} 1`,
		`wrenn_sandbox_step_seconds_count{operation="resume",result="ok",step="host"} 1`, `wrenn_sandbox_step_seconds_count{operation="resume",result="ok",step="write"} 1`,
		`wrenn_hosts{state="online"} 1`, `wrenn_hosts{state="unreachable"} 0`, `wrenn_builds{state="queued"} 0`, `wrenn_deliveries{state="due"} 0`,
		`wrenn_database_connections_limit{pool="main"} 16`, `wrenn_database_connections_limit{pool="vital"} 4`, `wrenn_database_connections{pool="main",state="used"} `, `wrenn_database_waits_total{pool="main"} `,
		`wrenn_reconcile_lag_seconds{host="hst-`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("/metrics has no %s", want)
		}
	}
	if got := p.call("GET", "/health", nil, "X-Request-Id", "from-the-front_door1").Header.Get("X-Request-Id"); got != "ext-from-the-front_door1" {
		t.Errorf("X-Request-Id %q", got)
	}
	if got := p.call("GET", "/health", nil, "X-Request-Id", "not fit for\ta log").Header.Get("X-Request-Id"); len(got) != 16 {
		t.Errorf("X-Request-Id %q", got)
	}
}

func TestFirstAdmin(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	// The first admin exists: later values in the environment change nothing.
	p.config.AdminEmail, p.config.AdminAPIKey = "other@example.com", "wrn_"+strings.Repeat("z", 40)
	p.start()
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", p.config.AdminAPIKey).fails(401, "unauthenticated")
	p.call("GET", "/v1/sandboxes", nil).want(200)
	p.end() // A stopping server writes the last uses.
	var email, hash, prefix, role string
	var admin, used bool
	err := p.db().QueryRow(context.Background(), `SELECT email, password_hash, admin, role, prefix, last_used_at IS NOT NULL FROM users JOIN team_members m ON m.user_id = users.id JOIN api_keys k ON k.team_id = m.team_id`).Scan(&email, &hash, &admin, &role, &prefix, &used)
	if err != nil || email != "admin@example.com" || !admin || role != "owner" || prefix != adminKey[:8] || !used || !strings.HasPrefix(hash, "$argon2id$") {
		t.Errorf("%s %s %s %s admin=%v used=%v: %v", email, hash, role, prefix, admin, used, err)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	good := server.Config{DatabaseURL: "postgres:///x?host=/nowhere", RedisURL: "redis://localhost:1", Domain: "localhost", PublicURL: "http://localhost:8000", SecretKey: strings.Repeat("ab", 32), AgentURL: "unix:/nowhere", AgentToken: "t"}
	for name, c := range map[string]struct {
		change func(*server.Config)
		names  string // what the error names
	}{
		"short secret":      {func(c *server.Config) { c.SecretKey = "abcd" }, "WRENN_SECRET_KEY"},
		"secret no hex":     {func(c *server.Config) { c.SecretKey = strings.Repeat("x", 64) }, "WRENN_SECRET_KEY"},
		"no agent":          {func(c *server.Config) { c.AgentURL = "" }, "WRENN_AGENT_URL"},
		"no token":          {func(c *server.Config) { c.AgentToken = "" }, "WRENN_AGENT_TOKEN"},
		"no authority":      {func(c *server.Config) { c.CAKey = "key.pem" }, "WRENN_CA_CERT"},
		"little memory":     {func(c *server.Config) { c.RequestMemoryMiB = 1 }, "WRENN_REQUEST_MEMORY_MIB"},
		"negative requests": {func(c *server.Config) { c.RequestsAtOnce = -1 }, "WRENN_REQUESTS_AT_ONCE"},
		"short heartbeat":   {func(c *server.Config) { c.Heartbeat = time.Nanosecond }, "WRENN_HEARTBEAT"},
		"overcommit":        {func(c *server.Config) { c.OvercommitMemory = -1 }, "WRENN_OVERCOMMIT_MEMORY"},
		"stop timeout":      {func(c *server.Config) { c.StopTimeout = -1 }, "WRENN_STOP_TIMEOUT"},
		"redis":             {func(c *server.Config) { c.RedisURL = "http://:hunter2@x" }, "REDIS_URL"},
		"database":          {func(c *server.Config) { c.DatabaseURL = "mysql://u:hunter2@x/[" }, "DATABASE_URL"},
		"no database":       {func(*server.Config) {}, "/nowhere"},
	} {
		config := good
		c.change(&config)
		_, err := server.New(context.Background(), config)
		if err == nil || !strings.Contains(err.Error(), c.names) || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), strings.Repeat("x", 64)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
