package server_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/apitest"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/linger/lingertest"
	"github.com/wrenn-dev/wrenn/internal/patience"
	"github.com/wrenn-dev/wrenn/internal/server"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/events/redistest"
	"github.com/wrenn-dev/wrenn/internal/server/rest"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

func TestMain(m *testing.M) {
	// The tests have their own servers, hosts and databases, and mostly wait.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	pgtest.Main(m)
}

const adminKey = "wrn_0123456789abcdefghijklmnopqrstuvwxyzABCD"

// plane is a control plane under test, with its host.
type plane struct {
	testing.TB
	agent  *agent
	config server.Config
	server *server.Server
	http   *httptest.Server
	end    func()
	// halt stops the server's background work; requests continue.
	halt     func()
	document *apitest.Document
	redis    *redisServer
	// logs receives the server's log, one line per write, if it is set.
	logs io.Writer
	// conn and sessions are opened when first needed.
	conn     *pgx.Conn
	sessions func(user uuid.UUID) string
}

func newPlane(t testing.TB) *plane {
	a, rd := newAgent(t), startRedis(t)
	p := &plane{TB: t, agent: a, redis: rd, config: server.Config{
		DatabaseURL: storetest.New(t), RedisURL: rd.url,
		Domain: "localhost", PublicURL: "http://localhost:8000", SecretKey: strings.Repeat("ab", 32),
		AgentURL: a.url(), AgentToken: agentToken,
		AdminEmail: "admin@example.com", AdminPassword: "correct horse", AdminAPIKey: adminKey,
		StopTimeout: 5 * time.Second,
		// TestRates tests rate limits.
		Rates: rest.Rates{Read: 1e6, Change: 1e6, Expensive: 1e6, Outgoing: 1e6},
		// With the race detector, the usual cost takes seconds.
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

// start starts a server on p's database and host. A server that already runs stays up.
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
	web := lingertest.NewServer(patience.Answers(s.Handler(), patience.Default)) // like cmd/wrenn
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

// eventually waits for the server's background work, which signals nothing to the
// outside.
func (p *plane) eventually(what string, ok func() bool) {
	p.Helper()
	await.Until(p, what, ok)
}

// metrics returns the response for Prometheus.
func (p *plane) metrics() string {
	p.Helper()
	w := httptest.NewRecorder()
	p.server.Metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		p.Fatalf("/metrics: %d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// metric returns the value of a metric without labels.
func (p *plane) metric(name string) string {
	p.Helper()
	_, rest, found := strings.Cut(p.metrics(), "\n"+name+" ")
	if !found {
		p.Fatalf("metrics: no %s", name)
	}
	value, _, _ := strings.Cut(rest, "\n")
	return value
}

// compared waits until the server has reconciled a host several times.
func (p *plane) compared(a *agent) {
	p.Helper()
	from := a.called("list")
	p.eventually("the server has reconciled the host several times", func() bool { return a.called("list") > from+3 })
}

// response is a response with its whole body.
type response struct {
	*plane
	what   string
	Status int
	Header http.Header
	Body   []byte
}

// browser follows no redirects, since nothing listens where they lead.
var browser = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// call makes a request with the admin's key and checks the response against the OpenAPI
// document. A string or []byte is sent as it is, any other body but nil as JSON.
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

// conforms checks the response against the OpenAPI document.
func (r response) conforms(req *http.Request) {
	r.Helper()
	if err := r.document.Check(req, r.Status, r.Header, r.Body); err != nil {
		r.Errorf("%s: response %d does not conform to the OpenAPI document: %v", r.what, r.Status, err)
	}
}

// want fails the test unless the response has the status.
func (r response) want(status int) response {
	r.Helper()
	if r.Status != status {
		r.Fatalf("%s: %d, want %d\n%s", r.what, r.Status, status, r.Body)
	}
	return r
}

// fails fails the test unless the response is the given error.
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

// create creates a sandbox and returns its id.
func (p *plane) create(body any) string {
	p.Helper()
	return p.call("POST", "/v1/sandboxes", body).want(201).str("id")
}

func (p *plane) state(sandbox string) string {
	p.Helper()
	return p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200).str("state")
}

// newKey returns a made-up API key and the hash under which it is stored.
func newKey() (key string, hash []byte) {
	key = "wrn_" + strings.ReplaceAll(uuid.NewString()+uuid.NewString(), "-", "")[:40]
	sum := sha256.Sum256([]byte(key))
	return key, sum[:]
}

// newTeam creates another team and returns a key of it.
func (p *plane) newTeam() string {
	p.Helper()
	team := uuid.New()
	key, hash := newKey()
	p.sql("INSERT INTO teams (id, name) VALUES ($1, 'other')", team)
	p.sql("INSERT INTO api_keys (id, team_id, name, prefix, hash) VALUES ($1, $2, 'k', $3, $4)", uuid.New(), team, key[:8], hash)
	return key
}

// redisServer is the test's own Redis.
type redisServer struct {
	url  string
	stop func()
}

func startRedis(t testing.TB) *redisServer {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "redis.sock")
	return &redisServer{url: "unix://" + socket, stop: redistest.Start(t, socket)}
}
