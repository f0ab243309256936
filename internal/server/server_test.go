package server_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/api"
	"github.com/wrenn-dev/wrenn/internal/apitest"
	"github.com/wrenn-dev/wrenn/internal/await"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/linger/lingertest"
	"github.com/wrenn-dev/wrenn/internal/patience"
	"github.com/wrenn-dev/wrenn/internal/server"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/events/redistest"
	"github.com/wrenn-dev/wrenn/internal/server/rest"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

func TestMain(m *testing.M) {
	// The tests have servers, hosts and databases of their own, and wait more
	// than they compute.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	pgtest.Main(m)
}

// migrated is a database with the schema, which takes long to make.
var migrated = pgtest.Template{Fill: func(url string) error {
	s, err := store.Open(context.Background(), url)
	if err != nil {
		return err
	}
	s.Close()
	return nil
}}

const adminKey = "wrn_0123456789abcdefghijklmnopqrstuvwxyzABCD"

// plane is a control plane under test, with its host.
type plane struct {
	testing.TB
	agent  *agent
	config server.Config
	server *server.Server
	http   *httptest.Server
	end    func()
	// halt stops what the server does on its own; what it was asked for goes on.
	halt     func()
	document *apitest.Document
	redis    *redisServer
	// logs gets what the server logs, one line a call; nil: nothing does.
	logs io.Writer
	// conn and sessions are made when they are first needed.
	conn     *pgx.Conn
	sessions func(user uuid.UUID) string
}

func newPlane(t testing.TB) *plane {
	a, rd := newAgent(t), startRedis(t)
	p := &plane{TB: t, agent: a, redis: rd, config: server.Config{
		DatabaseURL: migrated.New(t), RedisURL: rd.url,
		Domain: "localhost", PublicURL: "http://localhost:8000", SecretKey: strings.Repeat("ab", 32),
		AgentURL: a.url(), AgentToken: agentToken,
		AdminEmail: "admin@example.com", AdminPassword: "correct horse", AdminAPIKey: adminKey,
		StopTimeout: 5 * time.Second,
		// How often somebody may call is TestRates' to test.
		Rates: rest.Rates{Read: 1e6, Change: 1e6, Expensive: 1e6, Outgoing: 1e6},
		// The race detector makes the usual cost seconds.
		PasswordCost: auth.Cost{Passes: 1, MemoryKiB: 64, Threads: 1},
	}}
	var err error
	if p.document, err = apitest.Load(); err != nil {
		t.Fatal(err)
	}
	p.start()
	t.Cleanup(func() { p.end() })
	p.eventually("the host's templates are known", func() bool {
		return len(p.call("GET", "/v1/templates", nil).list("templates")) == 1
	})
	return p
}

// start starts a server on p's database and host; the one that may run goes on.
func (p *plane) start() {
	p.Helper()
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("WRENN_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if p.logs != nil {
		log = slog.New(slog.NewTextHandler(p.logs, nil))
	}
	c := p.config
	c.Log = log
	s, err := server.New(context.Background(), c)
	if err != nil {
		p.Fatalf("start server: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			p.Errorf("Run: %v", err)
		}
	}()
	web := lingertest.NewServer(patience.Answers(s.Handler(), patience.Default)) // as cmd/wrenn serves it
	p.server, p.http = s, web
	halt := func() {
		begun := time.Now()
		cancel()
		<-done
		if took := time.Since(begun); took > await.Hang {
			p.Errorf("the server took %v to stop", took)
		}
	}
	p.halt = halt
	p.end = sync.OnceFunc(func() {
		web.CloseClientConnections()
		halt()
		s.Close()
		web.Close()
	})
}

// eventually waits for what the server does on its own, of which there is no
// event to wait for from outside.
func (p *plane) eventually(what string, ok func() bool) {
	p.Helper()
	await.Until(p, what, ok)
}

// metrics returns what Prometheus reads.
func (p *plane) metrics() string {
	p.Helper()
	w := httptest.NewRecorder()
	p.server.Metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		p.Fatalf("/metrics: %d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// metric returns the value of a metric that has no labels.
func (p *plane) metric(name string) string {
	p.Helper()
	_, rest, found := strings.Cut(p.metrics(), "\n"+name+" ")
	if !found {
		p.Fatalf("metrics: no %s", name)
	}
	value, _, _ := strings.Cut(rest, "\n")
	return value
}

// compared waits until the server has compared what a host has with the table a
// few times.
func (p *plane) compared(a *agent) {
	p.Helper()
	from := a.called("list")
	p.eventually("a few comparisons", func() bool { return a.called("list") > from+3 })
}

// response is an answer, read to its end.
type response struct {
	*plane
	what   string
	Status int
	Header http.Header
	Body   []byte
}

// browser does not go where it is sent: nothing is there.
var browser = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// call makes a request with the admin's key and checks that the answer is one
// that the OpenAPI document has. Body: nil, a string or []byte as it is, else JSON.
func (p *plane) call(method, path string, body any, headers ...string) response {
	p.Helper()
	r, err := p.try(method, path, body, headers...)
	if err != nil {
		p.Fatalf("%s %s: %v", method, path, err)
	}
	return r
}

func (p *plane) try(method, path string, body any, headers ...string) (response, error) {
	var rd io.Reader
	kind := "application/octet-stream"
	switch b := body.(type) {
	case nil:
	case string:
		rd = strings.NewReader(b)
		kind = "application/json"
	case []byte:
		rd = bytes.NewReader(b)
	case io.Reader:
		rd = b
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			return response{}, err
		}
		rd, kind = bytes.NewReader(raw), "application/json"
	}
	req, err := http.NewRequest(method, p.http.URL+path, rd)
	if err != nil {
		return response{}, err
	}
	req.Header.Set("X-API-Key", adminKey)
	if body != nil {
		req.Header.Set("Content-Type", kind)
	}
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
		} else if headers[i+1] == "" {
			req.Header.Del(headers[i])
		} else {
			req.Header.Set(headers[i], headers[i+1])
		}
	}
	res, err := browser.Do(req)
	if err != nil {
		return response{}, err
	}
	defer res.Body.Close()
	content, err := io.ReadAll(res.Body)
	if err != nil {
		return response{}, err
	}
	r := response{plane: p, what: method + " " + path, Status: res.StatusCode, Header: res.Header, Body: content}
	if req.Host == "" || strings.HasPrefix(p.http.URL, "http://"+req.Host) {
		r.conforms(req)
	}
	return r, nil
}

// conforms checks the answer against the OpenAPI document.
func (r response) conforms(req *http.Request) {
	r.Helper()
	if err := r.document.Check(req, r.Status, r.Header, r.Body); err != nil {
		r.Errorf("%s: answer %d is not in the OpenAPI document: %v", r.what, r.Status, err)
	}
}

// want fails the test unless the status is the one given.
func (r response) want(status int) response {
	r.Helper()
	if r.Status != status {
		r.Fatalf("%s: %d, want %d\n%s", r.what, r.Status, status, r.Body)
	}
	return r
}

// fails fails the test unless the answer is the error given.
func (r response) fails(status int, code string) response {
	r.Helper()
	var e struct {
		Error struct{ Code, Message string }
	}
	if err := json.Unmarshal(r.Body, &e); err != nil || r.Status != status || e.Error.Code != code || e.Error.Message == "" {
		r.Errorf("%s: %d %s, want %d %s", r.what, r.Status, r.Body, status, code)
	}
	if ct := r.Header.Get("Content-Type"); ct != "application/json" {
		r.Errorf("%s: error as %q", r.what, ct)
	}
	return r
}

func (r response) object() map[string]any {
	r.Helper()
	var m map[string]any
	if err := json.Unmarshal(r.Body, &m); err != nil {
		r.Fatalf("%s: %v in %q", r.what, err, r.Body)
	}
	return m
}

func (r response) list(name string) []any {
	l, _ := r.object()[name].([]any)
	return l
}

func (r response) str(name string) string {
	s, _ := r.object()[name].(string)
	return s
}

// create makes a sandbox and returns its id.
func (p *plane) create(body any) string {
	p.Helper()
	return p.call("POST", "/v1/sandboxes", body).want(201).str("id")
}

func (p *plane) state(sandbox string) string {
	p.Helper()
	return p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200).str("state")
}

// newKey makes up an API key, and what the table has of it.
func newKey() (key string, hash []byte) {
	key = "wrn_" + strings.ReplaceAll(uuid.NewString()+uuid.NewString(), "-", "")[:40]
	sum := sha256.Sum256([]byte(key))
	return key, sum[:]
}

// newTeam makes another team and returns its key.
func (p *plane) newTeam() string {
	p.Helper()
	team := uuid.New()
	key, hash := newKey()
	p.sql("INSERT INTO teams (id, name) VALUES ($1, 'other')", team)
	p.sql("INSERT INTO api_keys (id, team_id, name, prefix, hash) VALUES ($1, $2, 'k', $3, $4)", uuid.New(), team, key[:8], hash)
	return key
}

// redisServer is a Redis of a test's own.
type redisServer struct {
	url  string
	stop func()
}

func startRedis(t testing.TB) *redisServer {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "redis.sock")
	return &redisServer{url: "unix://" + socket, stop: redistest.Start(t, socket)}
}

func TestLifecycle(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	made := p.call("POST", "/v1/sandboxes", map[string]any{
		"vcpus": 2, "memory_mib": 256, "timeout_seconds": 60, "envs": map[string]string{"A": "b"}, "metadata": map[string]string{"job": "1"},
	}).want(201)
	sb := made.object()
	sandbox := made.str("id")
	for k, want := range map[string]any{
		"state": "running", "template": "minimal", "template_id": "tpl-0000000000000000000000000", "vcpus": 2., "memory_mib": 256., "disk_mib": 5120., "timeout_seconds": 60.,
		"url": "http://{port}-" + sandbox + ".localhost:8000",
	} {
		if sb[k] != want {
			t.Errorf("%s = %v, want %v", k, sb[k], want)
		}
	}
	for _, k := range []string{"started_at", "expires_at", "start_ms", "access_token", "traffic_token", "host_id", "team_id"} {
		if sb[k] == nil {
			t.Errorf("no %s", k)
		}
	}
	req := p.agent.creates[0]
	if req.AccessToken != sb["access_token"] || req.Envs["A"] != "b" || req.Vcpus != 2 || req.TemplateId != id.Format(id.Template, uuid.Nil) {
		t.Errorf("the host was asked for %v", req)
	}
	base := "/v1/sandboxes/" + sandbox
	pinged := p.call("POST", base+"/ping", nil).want(200)
	if pinged.str("expires_at") <= sb["expires_at"].(string) {
		t.Errorf("ping moved expires_at from %v to %v", sb["expires_at"], pinged.str("expires_at"))
	}
	if got := p.call("GET", base+"/metrics", nil).want(200).object()["cpu_used_pct"]; got != 12.5 {
		t.Errorf("cpu_used_pct = %v", got)
	}
	if got := string(p.call("GET", base+"/logs", nil).want(200).Body); !strings.HasPrefix(got, "[    0.000000] Linux") {
		t.Errorf("logs = %q", got)
	}
	if got := len(p.call("GET", "/v1/sandboxes", nil).want(200).list("sandboxes")); got != 1 {
		t.Errorf("list has %d", got)
	}
	p.call("DELETE", base, nil).want(204)
	if p.agent.has(sandbox) {
		t.Error("the host still has the sandbox")
	}
	p.call("DELETE", base, nil).want(204)
	ended := p.call("GET", base, nil).want(200).object()
	if ended["state"] != "stopped" || ended["end_reason"] != "deleted" || ended["ended_at"] == nil || ended["expires_at"] != nil {
		t.Errorf("after deletion: %v", ended)
	}
	if got := len(p.call("GET", "/v1/sandboxes", nil).want(200).list("sandboxes")); got != 0 {
		t.Errorf("list of live ones has %d", got)
	}
	if got := len(p.call("GET", "/v1/sandboxes?state=stopped&state=error", nil).want(200).list("sandboxes")); got != 1 {
		t.Errorf("list of ended ones has %d", got)
	}
	for _, m := range []string{"POST " + base + "/ping", "GET " + base + "/metrics", "GET " + base + "/logs", "GET " + base + "/files?path=/x"} {
		method, path, _ := strings.Cut(m, " ")
		p.call(method, path, nil).fails(409, "conflict")
	}
}

func TestExec(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	path := "/v1/sandboxes/" + p.create(map[string]any{}) + "/exec"
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	tests := []struct {
		name string
		body map[string]any
		want map[string]any
	}{
		{"arguments", map[string]any{"cmd": "say", "args": []string{"6*7", "42"}}, map[string]any{"stdout": "6*7 42", "encoding": "utf-8", "exit_code": 0., "timed_out": false, "truncated": false}},
		{"shell", map[string]any{"cmd": "echo a | wc", "shell": true}, map[string]any{"stdout": "-c echo a | wc"}},
		{"exit code", map[string]any{"cmd": "exit", "args": []string{"7"}}, map[string]any{"exit_code": 7.}},
		{"binary out", map[string]any{"cmd": "bytes"}, map[string]any{"encoding": "base64", "stdout": base64.StdEncoding.EncodeToString(all), "stderr": base64.StdEncoding.EncodeToString([]byte("plain"))}},
		{"text in", map[string]any{"cmd": "cat", "stdin": "héllo\n"}, map[string]any{"stdout": "héllo\n"}},
		{"binary in", map[string]any{"cmd": "cat", "stdin": base64.StdEncoding.EncodeToString(all), "stdin_encoding": "base64"}, map[string]any{"stdout": base64.StdEncoding.EncodeToString(all), "encoding": "base64"}},
		{"surroundings", map[string]any{"cmd": "env", "envs": map[string]string{"A": "x"}, "cwd": "/tmp", "user": "root", "timeout_seconds": 5}, map[string]any{"stdout": "x /tmp root 5"}},
		{"default timeout", map[string]any{"cmd": "env"}, map[string]any{"stdout": "   60"}},
		{"timeout", map[string]any{"cmd": "hang"}, map[string]any{"timed_out": true, "error": "timed out", "exit_code": 137.}},
	}
	for _, before := range []bool{false, true} {
		p.agent.before.Store(before)
		for _, tt := range tests {
			got := p.call("POST", path, tt.body).want(200).object()
			for k, v := range tt.want {
				if got[k] != v {
					t.Errorf("%s (agent of the release before: %v): %s = %v, want %v", tt.name, before, k, got[k], v)
				}
			}
		}
		p.call("POST", path, map[string]any{"cmd": "unheard-of"}).fails(400, "invalid_argument")
		for cmd, code := range map[string]string{"missing": "command_not_found", "unfit": "command_not_executable"} {
			if r := p.call("POST", path, map[string]any{"cmd": cmd}).fails(422, code); !strings.Contains(string(r.Body), cmd+": as a shell says") {
				t.Errorf("%s: %s", cmd, r.Body)
			}
		}
		if r := p.call("POST", path, map[string]any{"cmd": "lost"}).fails(500, "internal"); strings.Contains(string(r.Body), "secret") {
			t.Errorf("a host's internal error is shown: %s", r.Body)
		}
	}
}

// TestBadInput is everything that a client may get wrong.
func TestBadInput(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	base := "/v1/sandboxes/" + sandbox
	unknown := id.Format(id.Sandbox, uuid.New())
	big := strings.Repeat("x", 2<<20)
	tests := []struct {
		name, method, path string
		body               any
		headers            []string
		status             int
		code               string
	}{
		{"unknown template", "POST", "/v1/sandboxes", map[string]any{"template": "nope"}, nil, 404, "not_found"},
		{"unknown template id", "POST", "/v1/sandboxes", map[string]any{"template": id.Format(id.Template, uuid.New())}, nil, 404, "not_found"},
		{"template with NUL", "POST", "/v1/sandboxes", map[string]any{"template": "a\x00b"}, nil, 400, "invalid_argument"},
		{"memory 0", "POST", "/v1/sandboxes", map[string]any{"memory_mib": 0}, nil, 400, "invalid_argument"},
		{"memory above limit", "POST", "/v1/sandboxes", map[string]any{"memory_mib": 16385}, nil, 400, "invalid_argument"},
		{"memory negative", "POST", "/v1/sandboxes", map[string]any{"memory_mib": -1}, nil, 400, "invalid_argument"},
		{"memory beyond int32", "POST", "/v1/sandboxes", `{"memory_mib": 1e300}`, nil, 400, "invalid_argument"},
		{"memory text", "POST", "/v1/sandboxes", map[string]any{"memory_mib": "512"}, nil, 400, "invalid_argument"},
		{"vcpus 0", "POST", "/v1/sandboxes", map[string]any{"vcpus": 0}, nil, 400, "invalid_argument"},
		{"vcpus above limit", "POST", "/v1/sandboxes", map[string]any{"vcpus": 17}, nil, 400, "invalid_argument"},
		{"disk above limit", "POST", "/v1/sandboxes", map[string]any{"disk_mib": 1 << 30}, nil, 400, "invalid_argument"},
		{"timeout above limit", "POST", "/v1/sandboxes", map[string]any{"timeout_seconds": 2592001}, nil, 400, "invalid_argument"},
		{"unknown field", "POST", "/v1/sandboxes", map[string]any{"memory": 512}, nil, 400, "invalid_argument"},
		{"env name with =", "POST", "/v1/sandboxes", map[string]any{"envs": map[string]string{"A=B": "c"}}, nil, 400, "invalid_argument"},
		{"env value with NUL", "POST", "/v1/sandboxes", map[string]any{"envs": map[string]string{"A": "\x00"}}, nil, 400, "invalid_argument"},
		{"metadata key empty", "POST", "/v1/sandboxes", map[string]any{"metadata": map[string]string{"": "x"}}, nil, 400, "invalid_argument"},
		{"metadata with NUL", "POST", "/v1/sandboxes", map[string]any{"metadata": map[string]string{"a": "\x00"}}, nil, 400, "invalid_argument"},
		{"metadata no text", "POST", "/v1/sandboxes", `{"metadata":{"a":1}}`, nil, 400, "invalid_argument"},
		{"no JSON", "POST", "/v1/sandboxes", `{"vcpus":`, nil, 400, "invalid_argument"},
		{"JSON of another kind", "POST", "/v1/sandboxes", `[]`, nil, 400, "invalid_argument"},
		{"no body", "POST", "/v1/sandboxes", nil, nil, 400, "invalid_argument"},
		{"another content type", "POST", "/v1/sandboxes", []byte("{}"), nil, 400, "invalid_argument"},
		{"oversized body", "POST", "/v1/sandboxes", map[string]any{"envs": map[string]string{"A": big}}, nil, 413, "payload_too_large"},
		{"oversized body of unknown length", "POST", "/v1/sandboxes", io.MultiReader(strings.NewReader(`{"envs":{"A":"` + big)), []string{"Content-Type", "application/json"}, 413, "payload_too_large"},
		{"oversized exec", "POST", base + "/exec", map[string]any{"cmd": "cat", "stdin": strings.Repeat("x", 17<<20)}, nil, 413, "payload_too_large"},
		{"oversized idempotency key", "POST", "/v1/sandboxes", map[string]any{}, []string{"Idempotency-Key", strings.Repeat("k", 256)}, 400, "invalid_argument"},
		{"idempotency key no UTF-8", "POST", "/v1/sandboxes", map[string]any{}, []string{"Idempotency-Key", "\xff"}, 400, "invalid_argument"},

		{"malformed id", "GET", "/v1/sandboxes/nonsense", nil, nil, 400, "invalid_argument"},
		{"id with NUL", "GET", "/v1/sandboxes/cl-%00" + unknown[4:], nil, nil, 400, "invalid_argument"},
		{"id out of range", "GET", "/v1/sandboxes/cl-" + strings.Repeat("z", 25), nil, nil, 404, "not_found"},
		{"id of another kind", "GET", "/v1/sandboxes/tpl-" + unknown[3:], nil, nil, 400, "invalid_argument"},
		{"id in capitals", "DELETE", "/v1/sandboxes/" + strings.ToUpper(unknown), nil, nil, 400, "invalid_argument"},
		{"unknown id", "GET", "/v1/sandboxes/" + unknown, nil, nil, 404, "not_found"},
		{"unknown id deleted", "DELETE", "/v1/sandboxes/" + unknown, nil, nil, 404, "not_found"},
		{"unknown id pinged", "POST", "/v1/sandboxes/" + unknown + "/ping", nil, nil, 404, "not_found"},
		{"unknown id exec", "POST", "/v1/sandboxes/" + unknown + "/exec", map[string]any{"cmd": "cat"}, nil, 404, "not_found"},

		{"no key", "GET", "/v1/sandboxes", nil, []string{"X-API-Key", ""}, 401, "unauthenticated"},
		{"wrong key", "GET", "/v1/sandboxes", nil, []string{"X-API-Key", "wrn_" + strings.Repeat("x", 40)}, 401, "unauthenticated"},
		{"key of another form", "GET", "/v1/sandboxes", nil, []string{"X-API-Key", "' OR 1=1 --"}, 401, "unauthenticated"},
		{"no key before anything else", "GET", "/v1/sandboxes?limit=0", nil, []string{"X-API-Key", ""}, 401, "unauthenticated"},

		{"limit 0", "GET", "/v1/sandboxes?limit=0", nil, nil, 400, "invalid_argument"},
		{"limit above", "GET", "/v1/sandboxes?limit=1001", nil, nil, 400, "invalid_argument"},
		{"limit text", "GET", "/v1/sandboxes?limit=many", nil, nil, 400, "invalid_argument"},
		{"cursor", "GET", "/v1/sandboxes?cursor=xyz", nil, nil, 400, "invalid_argument"},
		{"cursor of another list", "GET", "/v1/templates?cursor=AA", nil, nil, 400, "invalid_argument"},
		{"cursor out of range", "GET", "/v1/sandboxes?cursor=" + base64.RawURLEncoding.EncodeToString(bytes.Repeat([]byte{255}, 24)), nil, nil, 400, "invalid_argument"},
		{"template cursor with NUL", "GET", "/v1/templates?cursor=" + base64.RawURLEncoding.EncodeToString(make([]byte, 20)), nil, nil, 400, "invalid_argument"},
		{"unknown state", "GET", "/v1/sandboxes?state=asleep", nil, nil, 400, "invalid_argument"},
		{"metadata without value", "GET", "/v1/sandboxes?metadata=job", nil, nil, 400, "invalid_argument"},
		{"metadata filter with NUL", "GET", "/v1/sandboxes?metadata=job%3D%00", nil, nil, 400, "invalid_argument"},

		{"no command", "POST", base + "/exec", map[string]any{"cmd": ""}, nil, 400, "invalid_argument"},
		{"command with NUL", "POST", base + "/exec", map[string]any{"cmd": "a\x00"}, nil, 400, "invalid_argument"},
		{"argument with NUL", "POST", base + "/exec", map[string]any{"cmd": "a", "args": []string{"\x00"}}, nil, 400, "invalid_argument"},
		{"shell with arguments", "POST", base + "/exec", map[string]any{"cmd": "a", "args": []string{"b"}, "shell": true}, nil, 400, "invalid_argument"},
		{"timeout 0", "POST", base + "/exec", map[string]any{"cmd": "a", "timeout_seconds": 0}, nil, 400, "invalid_argument"},
		{"user that is none", "POST", base + "/exec", map[string]any{"cmd": "a", "user": "../root"}, nil, 400, "invalid_argument"},
		{"stdin no base64", "POST", base + "/exec", map[string]any{"cmd": "cat", "stdin": "!", "stdin_encoding": "base64"}, nil, 400, "invalid_argument"},
		{"exec stream without upgrade", "GET", base + "/exec/stream", nil, nil, 400, "invalid_argument"},

		{"no path", "GET", base + "/files", nil, nil, 400, "invalid_argument"},
		{"empty path", "GET", base + "/files?path=", nil, nil, 400, "invalid_argument"},
		{"path with ..", "GET", base + "/files?path=/tmp/../etc/shadow", nil, nil, 400, "invalid_argument"},
		{"path is ..", "PUT", base + "/files?path=..", []byte("x"), nil, 400, "invalid_argument"},
		{"path with NUL", "GET", base + "/files?path=/etc/passwd%00.png", nil, nil, 400, "invalid_argument"},
		{"path no UTF-8", "GET", base + "/files?path=/%ff", nil, nil, 400, "invalid_argument"},
		{"archive path with ..", "PUT", base + "/archive?path=a/../../b", []byte("x"), nil, 400, "invalid_argument"},
		{"path too long", "GET", base + "/files?path=" + strings.Repeat("x", 4097), nil, nil, 400, "invalid_argument"},
		{"no such file", "GET", base + "/files?path=/nope", nil, nil, 404, "not_found"},
		{"disk full", "PUT", base + "/files?path=/full", []byte("x"), nil, 507, "no_space"},

		{"unknown route", "GET", "/v1/nope", nil, nil, 404, "not_found"},
		{"unknown route, no key", "GET", "/nope", nil, []string{"X-API-Key", ""}, 404, "not_found"},
		{"method", "PATCH", base, nil, nil, 405, "method_not_allowed"},
		{"method of no standard", "FROB", base, nil, nil, 405, "method_not_allowed"},
		{"path that climbs", "GET", "/v1/sandboxes/../../etc/passwd", nil, nil, 404, "not_found"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := *p
			q.TB = t
			q.call(tt.method, tt.path, tt.body, tt.headers...).fails(tt.status, tt.code)
		})
	}
	if got := p.agent.created(); got != 1 {
		t.Errorf("the host was asked for %d sandboxes, want 1", got)
	}
	if got := len(p.call("GET", "/v1/sandboxes?state=error&state=running&state=starting", nil).list("sandboxes")); got != 1 {
		t.Errorf("%d rows, want 1: refused requests left some", got)
	}
	if allow := p.call("PATCH", base, nil).Header.Values("Allow"); !slices.Equal(allow, []string{"DELETE, GET, HEAD, OPTIONS"}) {
		t.Errorf("Allow: %q", allow)
	}
}

func TestOtherTeams(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	other := p.newTeam()
	base := "/v1/sandboxes/" + sandbox
	for _, tt := range []struct {
		method, path string
		body         any
	}{
		{"GET", base, nil},
		{"DELETE", base, nil},
		{"POST", base + "/ping", nil},
		{"GET", base + "/metrics", nil},
		{"GET", base + "/logs", nil},
		{"POST", base + "/exec", map[string]any{"cmd": "cat"}},
		{"GET", base + "/files?path=/x", nil},
		{"PUT", base + "/files?path=/x", []byte("x")},
		{"GET", base + "/archive?path=/x", nil},
		{"PUT", base + "/archive?path=/x", []byte("x")},
	} {
		p.call(tt.method, tt.path, tt.body, "X-API-Key", other).fails(404, "not_found")
	}
	_, res, err := websocket.Dial(context.Background(), p.http.URL+base+"/exec/stream", &websocket.DialOptions{HTTPHeader: http.Header{"X-Api-Key": {other}}})
	if err == nil || res.StatusCode != 404 {
		t.Errorf("exec/stream of another team: %v", err)
	}
	if got := p.call("GET", "/v1/sandboxes", nil, "X-API-Key", other).want(200).list("sandboxes"); len(got) != 0 {
		t.Errorf("another team lists %v", got)
	}
	if got := p.call("GET", "/v1/templates", nil, "X-API-Key", other).want(200).list("templates"); len(got) != 1 {
		t.Errorf("another team sees templates %v", got)
	}
	// A key of one team's is free for another.
	p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "k").want(201)
	if r := p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "k", "X-API-Key", other).want(201); r.Header.Get("Idempotent-Replayed") != "" {
		t.Error("a key of another team was replayed")
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var all []string
	for i := range 7 {
		all = append(all, p.create(map[string]any{"metadata": map[string]string{"n": strconv.Itoa(i), "odd": strconv.FormatBool(i%2 == 1), "quote": `a"b='c`}}))
	}
	slices.Reverse(all)
	ids := func(r response) (ids []string) {
		for _, sb := range r.want(200).list("sandboxes") {
			ids = append(ids, sb.(map[string]any)["id"].(string))
		}
		return ids
	}
	var paged []string
	cursor := ""
	for page := 0; ; page++ {
		r := p.call("GET", "/v1/sandboxes?limit=3"+cursor, nil)
		paged = append(paged, ids(r)...)
		if page == 0 {
			// What comes meanwhile does not shift the pages.
			p.create(map[string]any{})
		}
		next := r.str("next_cursor")
		if next == "" {
			break
		}
		cursor = "&cursor=" + next
	}
	if !slices.Equal(paged, all) {
		t.Errorf("pages have %v\nwant %v", paged, all)
	}
	if got := ids(p.call("GET", "/v1/sandboxes?metadata=odd%3Dtrue", nil)); !slices.Equal(got, []string{all[1], all[3], all[5]}) {
		t.Errorf("odd ones: %v", got)
	}
	if got := ids(p.call("GET", "/v1/sandboxes?metadata=odd%3Dtrue&metadata=n%3D3", nil)); !slices.Equal(got, all[3:4]) {
		t.Errorf("odd and 3: %v", got)
	}
	if got := ids(p.call("GET", "/v1/sandboxes?metadata=n%3D2&metadata=n%3D3", nil)); len(got) != 0 {
		t.Errorf("2 and 3: %v", got)
	}
	if got := ids(p.call("GET", "/v1/sandboxes?metadata=quote%3Da%22b%3D'c", nil)); len(got) != 7 {
		t.Errorf("quoted: %v", got)
	}
	p.call("DELETE", "/v1/sandboxes/"+all[0], nil).want(204)
	if got := ids(p.call("GET", "/v1/sandboxes?metadata=odd%3Dfalse&state=stopped", nil)); !slices.Equal(got, all[:1]) {
		t.Errorf("stopped: %v", got)
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
			// The same, written in another order.
			body := `{"vcpus":1,"metadata":{"a":"1","b":"2"}}`
			if i%2 == 1 {
				body = `{"metadata":{"b":"2","a":"1"},"memory_mib":512}`
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
	// After its end the key still names it.
	sandbox := slices.Collect(maps.Keys(ids))[0]
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	if r := p.call("POST", "/v1/sandboxes", map[string]any{"metadata": map[string]string{"a": "1", "b": "2"}}, "Idempotency-Key", "once").want(201); r.str("id") != sandbox || r.str("state") != "stopped" {
		t.Errorf("replayed after deletion: %s", r.Body)
	}
	// A creation that failed frees its key.
	p.agent.mu.Lock()
	p.agent.onCreate = func(context.Context, *hostagentv1.CreateRequest) error {
		return connect.NewError(connect.CodeResourceExhausted, errors.New("no memory left on the host"))
	}
	p.agent.mu.Unlock()
	r := p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "again").fails(503, "no_capacity")
	if !strings.Contains(string(r.Body), "no memory left on the host") {
		t.Errorf("does not say why: %s", r.Body)
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

// TestClientGoesAway creates for clients that do not wait.
func TestClientGoesAway(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	asked, release := make(chan struct{}), make(chan struct{})
	p.agent.onCreate = func(ctx context.Context, _ *hostagentv1.CreateRequest) error {
		close(asked)
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	req, _ := http.NewRequestWithContext(ctx, "POST", p.http.URL+"/v1/sandboxes", strings.NewReader("{}"))
	req.Header.Set("X-API-Key", adminKey)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", "mine")
	go func() {
		<-asked
		cancel()
	}()
	if _, err := http.DefaultClient.Do(req); !errors.Is(err, context.Canceled) {
		t.Fatalf("request ended with %v", err)
	}
	close(release)
	r := p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "mine").want(201)
	if r.str("state") != "running" || p.agent.created() != 1 {
		t.Errorf("%d creations, state %s", p.agent.created(), r.str("state"))
	}
	// A deletion goes on as well.
	gone, finish := make(chan struct{}), make(chan struct{})
	p.agent.mu.Lock()
	p.agent.onDestroy = func(ctx context.Context, _ *hostagentv1.DestroyRequest) error {
		close(gone)
		select {
		case <-finish:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	p.agent.mu.Unlock()
	ctx, cancel = context.WithCancel(context.Background())
	req, _ = http.NewRequestWithContext(ctx, "DELETE", p.http.URL+"/v1/sandboxes/"+r.str("id"), nil)
	req.Header.Set("X-API-Key", adminKey)
	go func() {
		<-gone
		cancel()
	}()
	if _, err := http.DefaultClient.Do(req); !errors.Is(err, context.Canceled) {
		t.Fatalf("request ended with %v", err)
	}
	if s := p.state(r.str("id")); s != "stopping" {
		t.Errorf("state %s, want stopping", s)
	}
	close(finish)
	p.eventually("the sandbox is stopped", func() bool { return p.state(r.str("id")) == "stopped" })
}

func TestDeleteWhileStarting(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	asked, release := make(chan string, 1), make(chan struct{})
	p.agent.onCreate = func(_ context.Context, m *hostagentv1.CreateRequest) error {
		asked <- m.SandboxId
		<-release
		return nil
	}
	answer := make(chan response, 1)
	go func() {
		r, err := p.try("POST", "/v1/sandboxes", map[string]any{})
		if err != nil {
			t.Error(err)
		}
		answer <- r
	}()
	sandbox := <-asked
	if s := p.state(sandbox); s != "starting" {
		t.Errorf("state %s, want starting", s)
	}
	p.call("POST", "/v1/sandboxes/"+sandbox+"/exec", map[string]any{"cmd": "cat"}).fails(409, "conflict")
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil).want(204)
	close(release)
	(<-answer).fails(409, "conflict")
	if p.agent.has(sandbox) {
		t.Error("the host still has the sandbox")
	}
	if s := p.state(sandbox); s != "stopped" {
		t.Errorf("state %s, want stopped", s)
	}
}

// TestHostVanishes calls while the host does not answer.
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
	p.eventually("the deletion is finished", func() bool { return p.state(doomed) == "stopped" })
	if p.agent.has(doomed) {
		t.Error("the host still has it")
	}
	p.call("POST", "/v1/sandboxes/"+sandbox+"/exec", map[string]any{"cmd": "cat"}).want(200)
	p.eventually("health is ok", func() bool { return p.call("GET", "/health", nil).Status == 200 })
}

func TestEvents(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	a, b, c := p.create(map[string]any{}), p.create(map[string]any{}), p.create(map[string]any{})
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, a, "")
	p.eventually("the first is stopped", func() bool { return p.state(a) == "stopped" })
	// While no server listens, the host goes on.
	p.end()
	p.agent.happened(hostagentv1.Event_KIND_EXITED, b, "the guest powered off")
	p.agent.forget(c)
	p.start()
	p.eventually("the second is stopped", func() bool { return p.state(b) == "stopped" })
	p.eventually("the third is stopped", func() bool { return p.state(c) == "stopped" })
	for sandbox, want := range map[string]string{a: "expired ", b: "exited the guest powered off", c: "lost the host no longer has the sandbox"} {
		r := p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200)
		if got := r.str("end_reason") + " " + r.str("error"); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	p.eventually("both events are acknowledged", func() bool {
		p.agent.mu.Lock()
		defer p.agent.mu.Unlock()
		return p.agent.acked == 2
	})
}

// TestServerDies lets a second server find what a first one left in transit.
// The first is not stopped in order: nothing of it runs on, as after SIGKILL.
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
	// What the first server asked for came to be, in one case.
	p.agent.add(first, 60)
	p.agent.add(third, 60)
	p.agent.add(stray, 60)
	old := p.end
	p.halt()
	p.agent.mu.Lock()
	p.agent.onCreate, p.agent.onDestroy = nil, nil
	p.agent.mu.Unlock()
	// How soon the next one takes the first for dead.
	p.config.Heartbeat = 2 * time.Second
	p.start()
	next := p.end
	p.end = func() { next(); close(hang); old() }
	p.eventually("the one that the host has runs", func() bool { return p.state(first) == "running" })
	p.eventually("the one that the host does not have is given up", func() bool { return p.state(second) == "error" })
	p.eventually("the one that was stopping is stopped", func() bool { return p.state(third) == "stopped" })
	if p.agent.has(third) {
		t.Error("the host still has the one that was stopping")
	}
	if !p.agent.has(stray) {
		t.Error("a sandbox that the table does not know was destroyed at once")
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
		t.Error("the key still names the one that was given up")
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
	// Ended while it could not be written down.
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, sandbox, "")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	p.eventually("the end is written down", func() bool {
		r := p.call("GET", "/v1/sandboxes/"+sandbox, nil)
		return r.Status == 200 && r.str("end_reason") == "expired"
	})
	p.create(map[string]any{})
}

// TestDatabaseFailsOver has a standby take the primary's place.
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
	c.Stop() // what was acknowledged is on the standby
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
	p.eventually("what happened meanwhile is written down", func() bool {
		r := p.call("GET", "/v1/sandboxes/"+sandbox, nil)
		return r.Status == 200 && r.str("end_reason") == "expired"
	})
	p.create(map[string]any{})
	p.end() // before the database that it is on goes
}

// TestDatabaseTakesNoChanges has the primary become one that only reads, as it is
// after it lost its place, while connections to it stay open.
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
	p.eventually("changes are refused for now", func() bool {
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
	p.eventually("changes are taken again", func() bool {
		r, err := p.try("POST", "/v1/sandboxes", map[string]any{})
		return err == nil && r.Status == 201
	})
}

// TestClockSetBack has a host and a server die just before the clock of the
// database is set back: neither is believed to live until the clock is there again.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Heartbeat = time.Second
	p.start()
	sandbox := p.create(map[string]any{})
	later := func(what string) {
		if _, err := p.db().Exec(t.Context(), what); err != nil {
			t.Fatal(err)
		}
	}
	p.agent.close()
	later("UPDATE hosts SET last_seen_at = now() + interval '1 hour'")
	p.eventually("the sandbox is missing", func() bool { return p.state(sandbox) == "missing" })
	p.agent.serve(t)
	p.eventually("it is back", func() bool { return p.state(sandbox) == "running" })

	later("INSERT INTO servers (id, seen_at) VALUES ('00000000-0000-4000-8000-000000000001', now() + interval '1 hour')")
	later("INSERT INTO leases (name, server, until) SELECT name, '00000000-0000-4000-8000-000000000001', now() + interval '1 hour' FROM leases ON CONFLICT (name) DO UPDATE SET server = EXCLUDED.server, until = EXCLUDED.until")
	later("UPDATE hosts SET watcher = '00000000-0000-4000-8000-000000000001'")
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, sandbox, "")
	p.eventually("the host is watched again", func() bool {
		return p.call("GET", "/v1/sandboxes/"+sandbox, nil).str("end_reason") == "expired"
	})
}

// TestClockSetForth has the clock of the database jump an hour ahead: all that was
// seen is an hour old, and nothing ends for that.
func TestClockSetForth(t *testing.T) {
	p := newPlane(t)
	p.end()
	p.config.Heartbeat = time.Second
	p.start()
	sandbox := p.create(map[string]any{})
	for _, table := range []string{"hosts SET last_seen_at = last_seen_at", "servers SET seen_at = seen_at", "leases SET until = until"} {
		if _, err := p.db().Exec(t.Context(), "UPDATE "+table+" - interval '1 hour'"); err != nil {
			t.Fatal(err)
		}
	}
	p.compared(p.agent)
	p.eventually("the sandbox runs", func() bool { return p.state(sandbox) == "running" })
	if !p.agent.has(sandbox) {
		t.Error("the host has it no more")
	}
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, sandbox, "")
	p.eventually("the host is watched", func() bool {
		return p.call("GET", "/v1/sandboxes/"+sandbox, nil).str("end_reason") == "expired"
	})
}

// TestRedisFlushed has Redis forget all that it knows while a server works.
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
	q.eventually("the other server knows of the end", func() bool {
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

func TestFiles(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	base := "/v1/sandboxes/" + p.create(map[string]any{})
	content := bytes.Repeat([]byte(strings.Repeat("0123456789", 100)+"\n"), 1600) // a line is a message
	put := p.call("PUT", base+"/files?path=/tmp/f", content).want(200).object()
	if put["size"] != float64(len(content)) || put["path"] != "/tmp/f" || put["name"] != "f" {
		t.Errorf("written: %v", put)
	}
	// The content type says nothing about a file.
	p.call("PUT", base+"/files?path=/tmp/g", `{"not": "json`).want(200)
	p.call("PUT", base+"/files?path=/tmp/empty", []byte{}).want(200)
	p.call("PUT", base+"/files?path=/tmp/large", content).want(200)
	r := p.call("GET", base+"/files?path=/tmp/f", nil).want(200)
	if !bytes.Equal(r.Body, content) || r.Header.Get("Content-Length") != strconv.Itoa(len(content)) || r.Header.Get("Accept-Ranges") != "bytes" {
		t.Errorf("read %d bytes, header %v", len(r.Body), r.Header)
	}
	if r := p.call("GET", base+"/files?path=/tmp/empty", nil).want(200); len(r.Body) != 0 {
		t.Errorf("empty file has %q", r.Body)
	}
	size := len(content)
	for _, tt := range []struct {
		header   string
		status   int
		from, to int
	}{
		{"bytes=0-0", 206, 0, 1},
		{"bytes=0-", 206, 0, size},
		{"bytes=10-19", 206, 10, 20},
		{"bytes=100-", 206, 100, size},
		{"bytes=-5", 206, size - 5, size},
		{"bytes=-99999999", 206, 0, size},
		{"bytes=5-99999999", 206, 5, size},
		{"bytes=99999999-", 416, 0, 0},
		{"bytes=-0", 416, 0, 0},
		{"bytes=5-3", 200, 0, size},
		{"bytes=0-1,4-5", 200, 0, size},
		{"lines=0-1", 200, 0, size},
		{"bytes=a-b", 200, 0, size},
		{"bytes=+1-2", 200, 0, size},
	} {
		for _, path := range []string{"/tmp/f", "/tmp/large"} {
			r := p.call("GET", base+"/files?path="+path, nil, "Range", tt.header)
			if r.Status != tt.status {
				t.Errorf("%s, Range %s: %d, want %d", path, tt.header, r.Status, tt.status)
				continue
			}
			if tt.status == 416 {
				r.fails(416, "range_not_satisfiable")
				if got := r.Header.Get("Content-Range"); got != fmt.Sprintf("bytes */%d", size) {
					t.Errorf("%s, Range %s: Content-Range %q", path, tt.header, got)
				}
				continue
			}
			if !bytes.Equal(r.Body, content[tt.from:tt.to]) {
				t.Errorf("%s, Range %s: %d bytes, want %d", path, tt.header, len(r.Body), tt.to-tt.from)
			}
			if want := fmt.Sprintf("bytes %d-%d/%d", tt.from, tt.to-1, size); tt.status == 206 && r.Header.Get("Content-Range") != want {
				t.Errorf("%s, Range %s: Content-Range %q, want %q", path, tt.header, r.Header.Get("Content-Range"), want)
			}
		}
	}
	if got := p.call("HEAD", base+"/files?path=/tmp/large", nil).want(200).Header.Get("Content-Length"); got != strconv.Itoa(size) {
		t.Errorf("HEAD of a large file: Content-Length %q", got)
	}
	for _, version := range []string{`"x"`, "Wed, 21 Oct 2015 07:28:00 GMT"} {
		r := p.call("GET", base+"/files?path=/tmp/f", nil, "Range", "bytes=0-0", "If-Range", version).want(200)
		if !bytes.Equal(r.Body, content) {
			t.Errorf("a range of another version, %s: %d bytes", version, len(r.Body))
		}
	}
	p.agent.mu.Lock()
	p.agent.files["/proc/status"] = []byte("not empty\n")
	p.agent.files["/proc/kallsyms"] = []byte("without an end\n")
	p.agent.files[breakAfter] = []byte("one\ntwo\n")
	p.agent.mu.Unlock()
	if r := p.call("GET", base+"/files?path=/proc/status", nil).want(200); string(r.Body) != "not empty\n" {
		t.Errorf("file without a size: %q", r.Body)
	}
	for _, suffix := range []string{"bytes=-3", "bytes=-0"} {
		if r := p.call("GET", base+"/files?path=/proc/kallsyms", nil, "Range", suffix).want(200); string(r.Body) != "without an end\n" {
			t.Errorf("Range %s of a file whose size is not known: %q", suffix, r.Body)
		}
	}
	for _, path := range []string{"/files", "/archive"} {
		if r, err := p.try("GET", base+path+"?path="+breakAfter, nil); err == nil {
			t.Errorf("a read of %s that broke off ended like a whole one: %d %q", path, r.Status, r.Body)
		}
	}
	p.call("PUT", base+"/archive?path=/dir", []byte("tar\nbytes\n")).want(200)
	if r := p.call("GET", base+"/archive?path=/dir", nil).want(200); string(r.Body) != "tar\nbytes\n" || r.Header.Get("Content-Type") != "application/x-tar" {
		t.Errorf("archive: %q as %s", r.Body, r.Header.Get("Content-Type"))
	}
	// A body that breaks off writes nothing.
	conn, err := net.Dial("tcp", p.http.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "PUT %s/files?path=/tmp/half HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Length: 1000\r\n\r\nhalf", base, adminKey)
	conn.(*net.TCPConn).CloseWrite()
	io.Copy(io.Discard, conn)
	conn.Close()
	p.call("GET", base+"/files?path=/tmp/half", nil).fails(404, "not_found")
}

// heapDuring returns by how much the heap grew while f ran, at most.
func heapDuring(f func()) uint64 {
	runtime.GC()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	stop, done := make(chan struct{}), make(chan struct{})
	var most uint64
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			var now runtime.MemStats
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapInuse)
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	f()
	close(stop)
	<-done
	return most - min(most, before.HeapInuse)
}

// TestLongBodies sends a GiB through each way that takes bodies of any size. It
// measures the process, so it is not parallel.
func TestLongBodies(t *testing.T) {
	if testing.Short() {
		t.Skip("moves hundreds of megabytes")
	}
	const size, bound = 256 << 20, 64 << 20
	p := newPlane(t)
	p.agent.guest = guestHandler()
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	host := "8000-" + made.str("id") + ".localhost"
	send := func(method, url, host string) (status int, n int64, text string) {
		var body io.Reader
		if method != "GET" {
			body = io.LimitReader(zeros{}, size)
		}
		req, err := http.NewRequest(method, url, body)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		if body != nil {
			req.ContentLength = size
		}
		req.Header.Set("X-API-Key", adminKey)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		var head bytes.Buffer
		n, err = io.Copy(&head, io.LimitReader(res.Body, 1000))
		if err != nil {
			t.Fatal(err)
		}
		rest, err := io.Copy(io.Discard, res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, n + rest, head.String()
	}
	for _, tt := range []struct {
		name, method, url, host string
		n                       int64
		text                    string
	}{
		{"download through the proxy", "GET", p.http.URL + "/zeros?n=" + strconv.Itoa(size), host, size, ""},
		{"upload through the proxy", "POST", p.http.URL + "/count", host, 9, strconv.Itoa(size)},
		{"upload of a file", "PUT", p.http.URL + "/v1/sandboxes/" + made.str("id") + "/files?path=/dev/null", "", -1, strconv.Itoa(size)},
	} {
		grew := heapDuring(func() {
			status, n, text := send(tt.method, tt.url, tt.host)
			if status != 200 || tt.n >= 0 && n != tt.n || !strings.Contains(text, tt.text) {
				t.Errorf("%s: %d, %d bytes, %.100q", tt.name, status, n, text)
			}
		})
		t.Logf("%s: heap grew by %d KiB", tt.name, grew>>10)
		if grew > bound {
			t.Errorf("%s: heap grew by %d MiB", tt.name, grew>>20)
		}
	}
}

func TestProxy(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.guest = guestHandler()
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	sandbox, access, traffic := made.str("id"), made.str("access_token"), made.str("traffic_token")
	two := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	other := p.newTeam()
	unknown := id.Format(id.Sandbox, uuid.New())
	name := func(port, sandbox string) string { return port + "-" + sandbox + ".localhost:8000" }
	const reached = 418
	for _, tt := range []struct {
		name, host, path string
		headers          []string
		status           int
	}{
		{"key", name("8000", sandbox), "/", nil, reached},
		{"host in capitals", strings.ToUpper(name("8000", sandbox)), "/", nil, reached},
		{"traffic token", name("8000", sandbox), "/", []string{"X-API-Key", "", "X-Traffic-Token", traffic}, reached},
		{"nothing", name("8000", sandbox), "/", []string{"X-API-Key", ""}, 401},
		{"wrong key", name("8000", sandbox), "/", []string{"X-API-Key", "wrn_" + strings.Repeat("y", 40)}, 401},
		{"wrong traffic token", name("8000", sandbox), "/", []string{"X-API-Key", "", "X-Traffic-Token", traffic[1:] + "0"}, 401},
		{"another sandbox's traffic token", name("8000", sandbox), "/", []string{"X-API-Key", "", "X-Traffic-Token", two.str("traffic_token")}, 401},
		{"access token instead of traffic token", name("8000", sandbox), "/", []string{"X-API-Key", "", "X-Traffic-Token", access}, 401},
		{"another team's key", name("8000", sandbox), "/", []string{"X-API-Key", other}, 404},
		{"unknown sandbox", name("8000", unknown), "/", nil, 404},
		{"unknown sandbox, nothing shown", name("8000", unknown), "/", []string{"X-API-Key", ""}, 401},
		{"port 0", name("0", sandbox), "/", nil, 400},
		{"port 65536", name("65536", sandbox), "/", nil, 400},
		{"port 65535", name("65535", sandbox), "/", nil, reached},
		{"port 1", name("1", sandbox), "/", nil, reached},
		{"port negative", name("-1", sandbox), "/", nil, 400},
		{"port with zeros", name("08000", sandbox), "/", nil, 400},
		{"port text", name("http", sandbox), "/", nil, 400},
		{"port huge", name("99999999999999999999", sandbox), "/", nil, 400},
		{"malformed id", name("8000", "cl-nonsense"), "/", nil, 400},
		{"guest daemon with key", name("49983", sandbox), "/health", nil, 401},
		{"guest daemon with traffic token", name("49983", sandbox), "/health", []string{"X-Traffic-Token", traffic}, 401},
		{"guest daemon with its token", name("49983", sandbox), "/health", []string{"X-API-Key", "", "X-Access-Token", access}, reached},
		{"guest daemon with another's token", name("49983", sandbox), "/health", []string{"X-Access-Token", two.str("access_token")}, 401},
		{"guest daemon, signed file", name("49983", sandbox), signed("x", access, time.Time{}), []string{"X-API-Key", ""}, reached},
		{"guest daemon, signed something else", name("49983", sandbox), "/envs?signature=v1_x", []string{"X-API-Key", ""}, 401},
		{"guest daemon, signed file and wrong token", name("49983", sandbox), "/files?signature=v1_x", []string{"X-Access-Token", "x"}, 401},
		{"guest daemon's init", name("49983", sandbox), "/init", []string{"X-Access-Token", access}, 404},
	} {
		r := p.call("GET", tt.path, nil, append([]string{"Host", tt.host}, tt.headers...)...)
		if r.Status != tt.status {
			t.Errorf("%s: %d, want %d: %s", tt.name, r.Status, tt.status, r.Body)
			continue
		}
		if tt.status != reached {
			r.fails(tt.status, map[int]string{400: "invalid_argument", 401: "unauthenticated", 404: "not_found"}[tt.status])
		}
	}
	// What the guest sees: all that was sent, less what was for us.
	host := name("8000", sandbox)
	r := p.call("PUT", "/a%2Fb//c/../d?x=1;y=%zz", []byte("x"), "Host", host, "Authorization", "Basic dXNlcjo=", "X-Traffic-Token", traffic,
		"X-Forwarded-For", "192.0.2.1", "X-Forwarded-Proto", "https", "X-Wrenn-Evil", "1", "Cookie", "a=b").want(reached)
	if got, want := r.Header.Get("X-Path"), "/proxy/"+sandbox+"/8000/a%2Fb//c/../d?x=1;y=%zz"; got != want {
		t.Errorf("path %q, want %q", got, want)
	}
	if got := r.Header.Get("X-Host"); got != host {
		t.Errorf("host %q, want %q", got, host)
	}
	saw := r.Header.Values("X-Saw")
	for _, want := range []string{"Authorization=Bearer " + agentToken, "X-Wrenn-Authorization=Basic dXNlcjo=", "X-Forwarded-For=192.0.2.1", "X-Forwarded-Proto=https", "Cookie=a=b"} {
		if !slices.Contains(saw, want) {
			t.Errorf("the agent did not see %q in %q", want, saw)
		}
	}
	for _, s := range saw {
		if strings.HasPrefix(s, "X-Api-Key") || strings.HasPrefix(s, "X-Traffic-Token") || strings.HasPrefix(s, "X-Wrenn-Evil") {
			t.Errorf("the agent saw %q", s)
		}
	}
	// Streams come as they are made.
	ctx := await.Context(t)
	req, _ := http.NewRequestWithContext(ctx, "GET", p.http.URL+"/tick", nil)
	req.Host = host
	req.Header.Set("X-API-Key", adminKey)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	first := make([]byte, 5)
	if _, err := io.ReadFull(res.Body, first); err != nil || string(first) != "first" {
		t.Errorf("first bytes of a stream: %q, %v", first, err)
	}
	res.Body.Close()
	// WebSockets.
	ws, _, err := websocket.Dial(ctx, p.http.URL+"/ws", &websocket.DialOptions{Host: host, HTTPHeader: http.Header{"X-Api-Key": {adminKey}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"hello", "world"} {
		if err := ws.Write(ctx, websocket.MessageText, []byte(s)); err != nil {
			t.Fatal(err)
		}
		if _, b, err := ws.Read(ctx); err != nil || string(b) != s {
			t.Errorf("echo of %q: %q, %v", s, b, err)
		}
	}
	ws.CloseNow()
	// An end is noticed at once, however it comes, in spite of the cache.
	p.call("DELETE", "/v1/sandboxes/"+two.str("id"), nil, "X-API-Key", adminKey).want(204)
	p.call("GET", "/", nil, "Host", name("8000", two.str("id"))).fails(404, "not_found")
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, sandbox, "")
	p.eventually("the proxy knows that the sandbox ended", func() bool {
		return p.call("GET", "/", nil, "Host", host).Status == 404
	})
	three := p.create(map[string]any{})
	p.call("GET", "/hijack", nil, "Host", name("80", three)).fails(503, "host_unreachable")
	p.agent.close()
	p.call("GET", "/", nil, "Host", name("80", three)).fails(503, "host_unreachable")
}

// TestProxyStreamsBothWays answers before the request's body has ended, and
// breaks off a response, through the server's proxy.
func TestProxyStreamsBothWays(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.EnableFullDuplex()
		for s := bufio.NewScanner(r.Body); s.Scan(); {
			fmt.Fprintln(w, "echo", s.Text())
			_ = rc.Flush()
			if s.Text() == "break" {
				panic(http.ErrAbortHandler)
			}
		}
	})
	host := "80-" + p.create(map[string]any{}) + ".localhost"
	for _, last := range []string{"end", "break"} {
		r, w := io.Pipe()
		ctx := await.Context(t)
		context.AfterFunc(ctx, func() { r.CloseWithError(ctx.Err()) })
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.http.URL+"/", r)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		req.Header.Set("X-API-Key", adminKey)
		go fmt.Fprintln(w, "first") // Ends when the request does.
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(resp.Body)
		for _, line := range []string{"first", "second", last} {
			if line != "first" {
				fmt.Fprintln(w, line)
			}
			if !lines.Scan() || lines.Text() != "echo "+line {
				t.Fatalf("got %q, %v", lines.Text(), lines.Err())
			}
		}
		if last == "end" {
			w.Close()
		}
		if lines.Scan() || (lines.Err() != nil) != (last == "break") {
			t.Errorf("after %q: %q, %v", last, lines.Text(), lines.Err())
		}
		if ctx.Err() != nil {
			t.Errorf("the client did not see within %v that the response has ended", await.Hang)
		}
		resp.Body.Close()
	}
}

func TestExecStream(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	path := "/v1/sandboxes/" + p.create(map[string]any{}) + "/exec/stream"
	ctx := await.Context(t)
	dial := func(origin string) (*websocket.Conn, *http.Response, error) {
		h := http.Header{"X-Api-Key": {adminKey}}
		if origin != "" {
			h.Set("Origin", origin)
		}
		return websocket.Dial(ctx, p.http.URL+path, &websocket.DialOptions{HTTPHeader: h})
	}
	open := func(start string) *websocket.Conn {
		t.Helper()
		ws, _, err := dial("")
		if err != nil {
			t.Fatal(err)
		}
		ws.SetReadLimit(2 << 20)
		if err := ws.Write(ctx, websocket.MessageText, []byte(start)); err != nil {
			t.Fatal(err)
		}
		return ws
	}
	// next returns a message: text as it is, binary as "channel:data".
	next := func(ws *websocket.Conn) string {
		kind, b, err := ws.Read(ctx)
		if err != nil {
			return "closed: " + strconv.Itoa(int(websocket.CloseStatus(err)))
		}
		if kind == websocket.MessageBinary {
			return strconv.Itoa(int(b[0])) + ":" + string(b[1:])
		}
		return string(b)
	}
	expect := func(ws *websocket.Conn, want ...string) {
		t.Helper()
		for _, w := range want {
			if got := next(ws); got != w {
				t.Errorf("got %q, want %q", got, w)
			}
		}
	}
	text := func(ws *websocket.Conn, s string) {
		t.Helper()
		if err := ws.Write(ctx, websocket.MessageText, []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	const started = `{"pid":42,"type":"started"}`

	ws := open(`{"cmd":"cat","stdin":true}`)
	expect(ws, started)
	if err := ws.Write(ctx, websocket.MessageBinary, []byte("\x00a\x00\xffb")); err != nil {
		t.Fatal(err)
	}
	expect(ws, "1:a\x00\xffb")
	text(ws, `{"type":"close_stdin"}`)
	expect(ws, "2:4", `{"exit_code":7,"timed_out":false,"type":"exited"}`, "closed: 1000")

	ws = open(`{"cmd":"tty","terminal":{"cols":80,"rows":24}}`)
	expect(ws, started)
	text(ws, `{"type":"resize","cols":100,"rows":40}`)
	big := bytes.Repeat([]byte("x"), 1<<20)
	big[0] = 0
	if err := ws.Write(ctx, websocket.MessageBinary, big); err != nil {
		t.Fatal(err)
	}
	n := 0
	for n < len(big)-1 {
		n += len(strings.TrimPrefix(next(ws), "1:"))
	}
	text(ws, `{"type":"signal","signal":15}`)
	expect(ws, `{"exit_code":143,"timed_out":false,"type":"exited"}`, "closed: 1000")
	p.agent.mu.Lock()
	if !slices.Contains(p.agent.resized, "100x40") {
		t.Errorf("resized: %q", p.agent.resized)
	}
	p.agent.mu.Unlock()

	for start, message := range map[string]string{
		`{"cmd":"cat"`:   "JSON: malformed",
		`{"args":["x"]}`: `cmd: property "cmd" is missing`,
		`{"cmd":"cat","terminal":{"cols":0,"rows":1}}`:     "terminal.cols: number must be at least 1",
		`{"cmd":"c\u0000"}`:                                "cmd: must be UTF-8 without NUL",
		`{"cmd":"cat","envs":{"A=":"b"}}`:                  "",
		`{"cmd":"cat","timeout_seconds":1e10}`:             "",
		`{"cmd":"cat","user":"a b"}`:                       "",
		`[]`:                                               "",
		`{"cmd":"x","args":["y"],"shell":true,"cwd":"/a"}`: "args: a line for the shell has none",
	} {
		ws := open(start)
		got := next(ws)
		if !strings.Contains(got, `"code":"invalid_argument"`) || message != "" && !strings.Contains(got, strings.ReplaceAll(message, `"`, `\"`)) {
			t.Errorf("start %s: %s, want %s", start, got, message)
		}
		expect(ws, "closed: 1000")
	}
	for _, bad := range []string{`{"type":"dance"}`, `{"type":"resize"}`, `{"type":"signal","signal":99}`, `{`} {
		ws := open(`{"cmd":"cat","stdin":true}`)
		expect(ws, started)
		text(ws, bad)
		if got := next(ws); !strings.Contains(got, `"code":"invalid_argument"`) {
			t.Errorf("control %s: %s", bad, got)
		}
	}
	// A client that goes ends its command.
	ws = open(`{"cmd":"cat","stdin":true}`)
	expect(ws, started)
	p.agent.mu.Lock()
	p.agent.resized = nil
	p.agent.mu.Unlock()
	ws.CloseNow()
	p.eventually("the command is ended", func() bool {
		p.agent.mu.Lock()
		defer p.agent.mu.Unlock()
		return slices.Contains(p.agent.resized, "gone")
	})
	// A host that goes is not a command that ended.
	ws = open(`{"cmd":"cat","stdin":true}`)
	expect(ws, started)
	p.agent.close()
	if got := next(ws); !strings.Contains(got, `"type":"error"`) || !strings.Contains(got, "unreachable") {
		t.Errorf("when the host goes: %s", got)
	}
	// Pages of other sites.
	_, res, err := dial("https://evil.example")
	if err == nil || res.StatusCode != 403 {
		t.Errorf("foreign origin: %v", err)
	}
	ws, _, err = dial("http://localhost:8000")
	if err != nil {
		t.Errorf("own origin: %v", err)
	} else {
		ws.CloseNow()
	}
}

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
	p.call("GET", "/metrics", nil, none...).fails(404, "not_found") // which is what strangers reach
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
	// Who is the admin is settled: what the environment says later is nothing to it.
	p.config.AdminEmail, p.config.AdminAPIKey = "other@example.com", "wrn_"+strings.Repeat("z", 40)
	p.start()
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", p.config.AdminAPIKey).fails(401, "unauthenticated")
	p.call("GET", "/v1/sandboxes", nil).want(200)
	p.end() // Last uses are written now at the latest.
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
	for name, change := range map[string]func(*server.Config){
		"short secret":  func(c *server.Config) { c.SecretKey = "abcd" },
		"secret no hex": func(c *server.Config) { c.SecretKey = strings.Repeat("x", 64) },
		"no agent":      func(c *server.Config) { c.AgentURL = "" },
		"no token":      func(c *server.Config) { c.AgentToken = "" },
		"redis":         func(c *server.Config) { c.RedisURL = "http://:hunter2@x" },
		"database":      func(c *server.Config) { c.DatabaseURL = "mysql://u:hunter2@x/[" },
		"no database":   func(*server.Config) {},
	} {
		c := good
		change(&c)
		if _, err := server.New(context.Background(), c); err == nil || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), strings.Repeat("x", 64)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
