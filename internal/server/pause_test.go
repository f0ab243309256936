package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/await"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

const (
	running = hostagentv1.SandboxState_SANDBOX_STATE_RUNNING
	pausing = hostagentv1.SandboxState_SANDBOX_STATE_PAUSING
	paused  = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED
)

// gate blocks calls of the agent until the test releases them, and can make them fail.
type gate struct {
	asked   chan string
	release chan error
}

func newGate() *gate { return &gate{asked: make(chan string, 100), release: make(chan error, 100)} }

func (g *gate) on(ctx context.Context, call string) error {
	g.asked <- call
	select {
	case err := <-g.release:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// later makes a request in the background. The channel yields its response.
func (p *plane) later(method, path string, body any, headers ...string) <-chan response {
	answer := make(chan response, 1)
	go func() {
		r, err := p.try(method, path, body, headers...)
		if err != nil {
			p.Errorf("%s %s: %v", method, path, err)
		}
		answer <- r
	}()
	return answer
}

// waiting returns how many requests wait for the server's current operation on a sandbox.
func (p *plane) waiting() int {
	p.Helper()
	n, err := strconv.Atoi(p.metric("wrenn_sandbox_waiting_calls"))
	if err != nil {
		p.Fatalf("number of waiting calls: %v", err)
	}
	return n
}

func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{"timeout_seconds": 60})
	base := "/v1/sandboxes/" + sandbox
	for range 2 { // The second pause finds it paused.
		sb := p.call("POST", base+"/pause", nil).want(200).object()
		if sb["state"] != "paused" || sb["paused_at"] == nil || sb["expires_at"] != nil || sb["on_timeout"] != "destroy" || sb["auto_resume"] != false {
			t.Errorf("paused: %v", sb)
		}
	}
	if n := p.agent.called("pause"); n != 1 {
		t.Errorf("the host was asked %d times to pause", n)
	}
	if got := p.call("GET", "/v1/sandboxes?state=paused", nil).want(200).list("sandboxes"); len(got) != 1 {
		t.Errorf("list of paused ones: %v", got)
	}
	if got := p.call("GET", "/v1/sandboxes", nil).want(200).list("sandboxes"); len(got) != 1 {
		t.Errorf("list without a state: %v", got)
	}
	if got := p.call("GET", "/v1/sandboxes?state=running", nil).want(200).list("sandboxes"); len(got) != 0 {
		t.Errorf("list of running ones: %v", got)
	}
	// It has no auto-resume.
	for _, c := range []struct {
		method, path string
		body         any
	}{
		{"POST", base + "/ping", nil},
		{"GET", base + "/metrics", nil},
		{"GET", base + "/logs", nil},
		{"POST", base + "/exec", map[string]any{"cmd": "cat"}},
		{"GET", base + "/files?path=/x", nil},
		{"PUT", base + "/files?path=/x", []byte("x")},
		{"GET", base + "/archive?path=/x", nil},
		{"PUT", base + "/archive?path=/x", []byte("x")},
		{"POST", base + "/fork", map[string]any{"count": 2}},
	} {
		p.call(c.method, c.path, c.body).fails(409, "sandbox_paused")
	}
	p.call("GET", "/", nil, "Host", "8000-"+sandbox+".localhost").fails(409, "sandbox_paused")
	_, res, err := websocket.Dial(context.Background(), p.http.URL+base+"/exec/stream", &websocket.DialOptions{HTTPHeader: http.Header{"X-Api-Key": {adminKey}}})
	if err == nil || res.StatusCode != 409 {
		t.Errorf("exec/stream of a paused sandbox: %v", err)
	}
	for range 2 {
		sb := p.call("POST", base+"/resume", nil).want(200).object()
		if sb["state"] != "running" || sb["paused_at"] != nil || sb["expires_at"] == nil {
			t.Errorf("resumed: %v", sb)
		}
	}
	if n := p.agent.called("resume"); n != 1 {
		t.Errorf("the host was asked %d times to resume", n)
	}
	p.call("POST", base+"/exec", map[string]any{"cmd": "cat"}).want(200)
	// A paused sandbox can be deleted like any other.
	p.call("POST", base+"/pause", nil).want(200)
	p.call("DELETE", base, nil).want(204)
	if p.agent.has(sandbox) {
		t.Error("the host still has the sandbox")
	}
	if sb := p.call("GET", base, nil).want(200).object(); sb["state"] != "stopped" || sb["paused_at"] != nil {
		t.Errorf("deleted: %v", sb)
	}
	for _, what := range []string{"/pause", "/resume"} {
		p.call("POST", base+what, nil).fails(409, "conflict")
		p.call("POST", "/v1/sandboxes/"+id.Format(id.Sandbox, uuid.New())+what, nil).fails(404, "not_found")
		p.call("POST", "/v1/sandboxes/nonsense"+what, nil).fails(400, "invalid_argument")
	}
	p.call("POST", base+"/fork", map[string]any{}).fails(409, "conflict")
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "x"}).fails(409, "conflict")
}

// TestPauseFails makes the host refuse: the sandbox stays as it was, and the response
// says why.
func TestPauseFails(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	base := "/v1/sandboxes/" + sandbox
	before := p.call("GET", base, nil).want(200).str("expires_at")
	full := connect.NewError(connect.CodeResourceExhausted, errors.New("the host's disk is full"))
	broken := connect.NewError(connect.CodeInternal, errors.New("open /secret/path: broken"))
	fail := func(err error) { p.agent.hook(func(context.Context, string) error { return err }) }
	fail(full)
	r := p.call("POST", base+"/pause", nil).fails(507, "no_space")
	if !strings.Contains(string(r.Body), "the host's disk is full") {
		t.Errorf("the error does not say why: %s", r.Body)
	}
	fail(broken)
	if r := p.call("POST", base+"/pause", nil).fails(500, "internal"); strings.Contains(string(r.Body), "secret") {
		t.Errorf("a host's internal error is shown: %s", r.Body)
	}
	if sb := p.call("GET", base, nil).want(200); sb.str("state") != "running" || sb.str("expires_at") != before {
		t.Errorf("after pauses that failed: %s", sb.Body)
	}
	fail(nil)
	p.call("POST", base+"/pause", nil).want(200)
	fail(connect.NewError(connect.CodeResourceExhausted, errors.New("no memory left on the host")))
	p.call("POST", base+"/resume", nil).fails(503, "no_capacity")
	if s := p.state(sandbox); s != "paused" {
		t.Errorf("after a resume that failed: %s", s)
	}
	fail(nil)
	p.call("POST", base+"/resume", nil).want(200)
	fail(full)
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "x"}).fails(507, "no_space")
	if got := p.call("GET", "/v1/snapshots", nil).want(200).list("snapshots"); len(got) != 0 {
		t.Errorf("a snapshot that failed is listed: %v", got)
	}
	fail(connect.NewError(connect.CodeResourceExhausted, errors.New("no slot left on the host")))
	p.call("POST", base+"/fork", map[string]any{"count": 3}).fails(503, "no_capacity")
	if got := p.call("GET", "/v1/sandboxes", nil).want(200).list("sandboxes"); len(got) != 1 {
		t.Errorf("a fork that failed left %v", got)
	}
	fail(nil)
	// An older agent does not know the call.
	fail(connect.NewError(connect.CodeUnimplemented, errors.New("hostagent.v1.HostAgent.Pause is not implemented")))
	p.call("POST", base+"/pause", nil).fails(501, "unimplemented")
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "x"}).fails(501, "unimplemented")
	p.call("POST", base+"/fork", map[string]any{}).fails(501, "unimplemented")
	if s := p.state(sandbox); s != "running" {
		t.Errorf("after a pause that the host does not know: %s", s)
	}
	fail(nil)
	// The failed snapshot's name is free.
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "x"}).want(201)
}

// TestPauseOutlivesClient pauses, resumes and captures for clients that disconnect.
func TestPauseOutlivesClient(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	base := "/v1/sandboxes/" + sandbox
	g := newGate()
	p.agent.hook(g.on)
	for _, c := range []struct{ method, path, body, during, after string }{
		{"POST", base + "/pause", "", "pausing", "paused"},
		{"POST", base + "/resume", "", "resuming", "running"},
		{"POST", "/v1/snapshots", fmt.Sprintf(`{"sandbox_id":%q,"name":"mine"}`, sandbox), "running", "running"},
		{"POST", base + "/fork", `{"count":2}`, "running", "running"},
		{"DELETE", "/v1/snapshots/mine", "", "running", "running"},
	} {
		ctx, cancel := context.WithCancel(context.Background())
		req, _ := http.NewRequestWithContext(ctx, c.method, p.http.URL+c.path, strings.NewReader(c.body))
		req.Header.Set("X-API-Key", adminKey)
		if c.body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		go func() {
			<-g.asked
			cancel()
		}()
		if _, err := http.DefaultClient.Do(req); !errors.Is(err, context.Canceled) {
			t.Fatalf("%s ended with %v", c.path, err)
		}
		if s := p.state(sandbox); s != c.during {
			t.Errorf("%s: state %s, want %s", c.path, s, c.during)
		}
		g.release <- nil
		p.eventually(c.path+" is done", func() bool { return p.state(sandbox) == c.after })
		switch {
		case c.path == "/v1/snapshots":
			p.eventually("the snapshot is there", func() bool { return len(p.call("GET", "/v1/snapshots", nil).list("snapshots")) == 1 })
		case c.method == "DELETE":
			p.eventually("the snapshot is gone", func() bool { return len(p.call("GET", "/v1/snapshots", nil).list("snapshots")) == 0 })
		case strings.HasSuffix(c.path, "/fork"):
			p.eventually("the forks run", func() bool {
				return len(p.call("GET", "/v1/sandboxes?state=running", nil).list("sandboxes")) == 3
			})
		}
	}
}

// TestTurns starts several operations on one sandbox at once.
func TestTurns(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	base := "/v1/sandboxes/" + sandbox
	g := newGate()
	p.agent.hook(g.on)
	first := p.later("POST", base+"/pause", nil)
	<-g.asked
	same := p.later("POST", base+"/pause", nil)
	other := p.later("POST", base+"/resume", nil)
	p.eventually("both wait for the first", func() bool { return p.waiting() == 2 })
	// The sandbox has no auto_resume, so the command is refused instead of waiting.
	p.call("POST", base+"/exec", map[string]any{"cmd": "cat"}).fails(409, "sandbox_paused")
	g.release <- nil
	(<-first).want(200)
	if s := (<-same).want(200).str("state"); s != "paused" {
		t.Errorf("the second pause answers %s", s)
	}
	if call := <-g.asked; call != "resume" {
		t.Errorf("the next call is %s", call)
	}
	g.release <- nil
	if s := (<-other).want(200).str("state"); s != "running" {
		t.Errorf("the resume that waited answers %s", s)
	}
	if n := p.agent.called("pause"); n != 1 {
		t.Errorf("%d pauses", n)
	}
	// Delete the sandbox during a pause.
	pause := p.later("POST", base+"/pause", nil)
	<-g.asked
	p.call("DELETE", base, nil).want(204)
	g.release <- nil
	(<-pause).fails(409, "conflict")
	if s := p.state(sandbox); s != "stopped" {
		t.Errorf("state %s, want stopped", s)
	}
	// Many operations at once, in any order: in the end database and host agree.
	p.agent.hook(nil)
	sandbox = p.create(map[string]any{"on_timeout": "pause"})
	base = "/v1/sandboxes/" + sandbox
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			path, body := base+[]string{"/pause", "/resume", "/exec", "/fork"}[i%4], any(nil)
			switch i % 4 {
			case 2:
				body = map[string]any{"cmd": "cat"}
			case 3:
				body = map[string]any{"count": 1}
			}
			r, err := p.try("POST", path, body)
			if err != nil || r.Status >= 500 || r.Status >= 400 && r.Status != 409 {
				t.Errorf("%s: %d %s, %v", path, r.Status, r.Body, err)
			}
		})
	}
	wg.Wait()
	want := map[string]hostagentv1.SandboxState{"running": running, "paused": paused}[p.state(sandbox)]
	if got := p.agent.stateOf(sandbox); got != want || want == 0 {
		t.Errorf("the database says %s, the host %v", p.state(sandbox), got)
	}
}

// TestAutoResume uses paused sandboxes in every possible way.
func TestAutoResume(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.guest = guestHandler()
	p.agent.files["/f"] = []byte("content\n")
	made := p.call("POST", "/v1/sandboxes", map[string]any{"on_timeout": "pause", "timeout_seconds": 5}).want(201)
	sandbox := made.str("id")
	if made.object()["auto_resume"] != true || !p.agent.creates[0].PauseOnTimeout {
		t.Errorf("made %s; the host was asked for %v", made.Body, p.agent.creates[0])
	}
	base, name := "/v1/sandboxes/"+sandbox, "8000-"+sandbox+".localhost"
	long := strings.Repeat("x", 200<<10)
	dial := func(path, host string) func() {
		return func() {
			t.Helper()
			ctx := await.Context(t)
			ws, _, err := websocket.Dial(ctx, p.http.URL+path, &websocket.DialOptions{Host: host, HTTPHeader: http.Header{"X-Api-Key": {adminKey}}})
			if err != nil {
				t.Fatal(err)
			}
			defer ws.CloseNow()
			if err := ws.Write(ctx, websocket.MessageText, []byte(`{"cmd":"cat","stdin":true}`)); err != nil {
				t.Fatal(err)
			}
			if _, b, err := ws.Read(ctx); err != nil || !strings.Contains(string(b), `"started"`) && !strings.Contains(string(b), `"cmd"`) {
				t.Errorf("%s: %q, %v", path, b, err)
			}
		}
	}
	uses := map[string]func(){
		"ping":    func() { p.call("POST", base+"/ping", nil).want(200) },
		"exec":    func() { p.call("POST", base+"/exec", map[string]any{"cmd": "cat"}).want(200) },
		"stream":  dial(base+"/exec/stream", ""),
		"read":    func() { p.call("GET", base+"/files?path=/f", nil).want(200) },
		"write":   func() { p.call("PUT", base+"/files?path=/g", []byte(long)).want(200) },
		"fork":    func() { p.call("POST", base+"/fork", map[string]any{}).want(201) },
		"request": func() { p.call("GET", "/", nil, "Host", name).want(418) },
		"traffic": func() {
			p.call("GET", "/", nil, "Host", name, "X-API-Key", "", "X-Traffic-Token", made.str("traffic_token")).want(418)
		},
		"guest daemon": func() {
			p.call("GET", "/health", nil, "Host", "49983-"+sandbox+".localhost", "X-Access-Token", made.str("access_token")).want(418)
		},
		"signed URL": func() {
			p.call("GET", signed("/f", made.str("access_token"), time.Time{}), nil, "Host", "49983-"+sandbox+".localhost", "X-API-Key", "").want(418)
		},
		"websocket": dial("/ws", name),
		"short body": func() {
			if n := string(p.call("POST", "/count", []byte("12345"), "Host", name).want(200).Body); n != "5" {
				t.Errorf("%s bytes of a short body arrived", n)
			}
		},
		"long body": func() {
			if n := string(p.call("POST", "/count", []byte(long), "Host", name).want(200).Body); n != fmt.Sprint(len(long)) {
				t.Errorf("%s bytes of a long body arrived", n)
			}
		},
		"body of unknown length": func() {
			body := io.MultiReader(strings.NewReader(long), strings.NewReader("y"))
			if n := string(p.call("POST", "/count", body, "Host", name).want(200).Body); n != fmt.Sprint(len(long)+1) {
				t.Errorf("%s bytes of a body of unknown length arrived", n)
			}
		},
	}
	for what, use := range uses {
		t.Run(what, func(t *testing.T) {
			q, old := *p, p.TB
			q.TB, p.TB = t, t
			defer func() { p.TB = old }()
			use()
			// Paused, and the database knows it.
			p.call("POST", base+"/pause", nil).want(200)
			before := p.agent.called("resume")
			use()
			// Paused by its host, and the database does not know it yet.
			p.agent.set(sandbox, paused)
			use()
			// The host is pausing it: requests wait for that.
			p.agent.set(sandbox, pausing)
			from, looked := p.agent.called("get"), make(chan struct{})
			go func() {
				defer close(looked)
				if !await.Within(await.Hang, func() bool { return p.agent.called("get") > from }) {
					t.Error("the server does not ask the host for the sandbox's state")
				}
				p.agent.set(sandbox, paused)
			}()
			use()
			<-looked
			if n := p.agent.called("resume") - before; n != 3 {
				t.Errorf("resumed %d times, want 3", n)
			}
			if s := p.state(sandbox); s != "running" {
				t.Errorf("state %s", s)
			}
		})
	}
	// Reading a sandbox's description does not resume it.
	p.call("POST", base+"/pause", nil).want(200)
	p.call("GET", base+"/metrics", nil).fails(409, "sandbox_paused")
	p.call("GET", base+"/logs", nil).fails(409, "sandbox_paused")
	// Nor does a forged signature.
	p.call("GET", "/files?path=x&signature=v1_x", nil, "Host", "49983-"+sandbox+".localhost", "X-API-Key", "").fails(401, "unauthenticated")
	// Nor does another team's key.
	p.call("GET", "/", nil, "Host", name, "X-API-Key", p.newTeam()).fails(404, "not_found")
	p.call("GET", "/", nil, "Host", name, "X-API-Key", "").fails(401, "unauthenticated")
	if s := p.state(sandbox); s != "paused" {
		t.Errorf("state %s, want paused", s)
	}
	// Many concurrent uses resume it once.
	before := p.agent.called("resume")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			var r response
			var err error
			if i%2 == 0 {
				r, err = p.try("GET", "/", nil, "Host", name)
			} else {
				r, err = p.try("POST", base+"/exec", map[string]any{"cmd": "cat"})
			}
			if err != nil || r.Status != 418 && r.Status != 200 {
				t.Errorf("%d %s, %v", r.Status, r.Body, err)
			}
		})
	}
	wg.Wait()
	if n := p.agent.called("resume") - before; n != 1 {
		t.Errorf("20 at once resumed it %d times", n)
	}
	// If the resume fails, every waiting request learns why.
	p.call("POST", base+"/pause", nil).want(200)
	p.agent.hook(func(context.Context, string) error {
		return connect.NewError(connect.CodeResourceExhausted, errors.New("no memory left on the host"))
	})
	p.call("GET", "/", nil, "Host", name).fails(503, "no_capacity")
	p.call("POST", base+"/exec", map[string]any{"cmd": "cat"}).fails(503, "no_capacity")
	p.agent.hook(nil)
	// Each kind of use can have its own auto_resume setting.
	for _, tt := range []struct {
		body map[string]any
		want bool
	}{
		{map[string]any{"on_timeout": "pause", "auto_resume": false}, false},
		{map[string]any{"auto_resume": true}, true},
		{map[string]any{"on_timeout": "destroy"}, false},
	} {
		if got := p.call("POST", "/v1/sandboxes", tt.body).want(201).object()["auto_resume"]; got != tt.want {
			t.Errorf("%v: auto_resume %v", tt.body, got)
		}
	}
	p.call("POST", "/v1/sandboxes", map[string]any{"on_timeout": "explode"}).fails(400, "invalid_argument")
	p.call("POST", "/v1/sandboxes", map[string]any{"auto_resume": "yes"}).fails(400, "invalid_argument")
}

// TestPausedWithoutServer pauses a sandbox on its host while no server runs. Usage counts
// until the pause, not until the next server learns of it, and subscribers are notified.
func TestPausedWithoutServer(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{"on_timeout": "pause", "vcpus": 2})
	p.end()
	// As if it had started two hours ago and been paused an hour ago.
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	p.sql("UPDATE sandbox_runs SET started_at = now() - interval '2 hours' WHERE sandbox_id = $1", u)
	p.sql("UPDATE sandboxes SET created_at = now() - interval '2 hours', started_at = now() - interval '2 hours' WHERE id = $1", u)
	at := time.Now().Add(-time.Hour)
	p.agent.mu.Lock()
	p.agent.sandboxes[sandbox].PausedAt = timestamppb.New(at)
	p.agent.mu.Unlock()
	p.agent.happened(hostagentv1.Event_KIND_PAUSED, sandbox, "expired")
	p.start()
	p.eventually("it is paused", func() bool { return p.state(sandbox) == "paused" })
	var seconds float64
	var ended time.Time
	if err := p.db().QueryRow(context.Background(), "SELECT extract(epoch FROM ended_at - started_at), ended_at FROM sandbox_runs WHERE sandbox_id = $1", u).Scan(&seconds, &ended); err != nil {
		t.Fatal(err)
	}
	if off := ended.Sub(at).Abs(); off > time.Millisecond || seconds < 3500 || seconds > 3700 {
		t.Errorf("usage is %.0f s, until %v; it was paused at %v", seconds, ended, at)
	}
	var who string
	if err := p.db().QueryRow(context.Background(), "SELECT actor FROM audit_records WHERE object_id = $1 AND action = 'sandbox.paused'", u.String()).Scan(&who); err != nil || who != "host" {
		t.Errorf("the audit record's actor is %q: %v", who, err)
	}
}

func TestPausedByHost(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	a, b := p.create(map[string]any{"on_timeout": "pause", "auto_resume": false}), p.create(map[string]any{"on_timeout": "pause"})
	p.agent.happened(hostagentv1.Event_KIND_PAUSED, a, "expired")
	p.eventually("it is paused", func() bool { return p.state(a) == "paused" })
	if sb := p.call("GET", "/v1/sandboxes/"+a, nil).object(); sb["expires_at"] != nil || sb["paused_at"] == nil {
		t.Errorf("paused: %v", sb)
	}
	p.eventually("the event is acknowledged", func() bool {
		p.agent.mu.Lock()
		defer p.agent.mu.Unlock()
		return p.agent.acked == 1
	})
	p.call("POST", "/v1/sandboxes/"+a+"/exec", map[string]any{"cmd": "cat"}).fails(409, "sandbox_paused")
	// Resumed before the server reads the event: the event is outdated.
	p.end()
	p.agent.happened(hostagentv1.Event_KIND_PAUSED, b, "expired")
	p.agent.set(b, running)
	p.start()
	p.eventually("the old event is acknowledged", func() bool {
		p.agent.mu.Lock()
		defer p.agent.mu.Unlock()
		return p.agent.acked == 2
	})
	if s := p.state(b); s != "running" {
		t.Errorf("state %s, want running", s)
	}
	// Without an event, the server learns of the pause from the sandbox's use.
	p.agent.set(a, running)
	p.call("POST", "/v1/sandboxes/"+a+"/resume", nil).want(200)
	p.agent.set(a, paused)
	p.call("GET", "/v1/sandboxes/"+a+"/logs", nil).fails(409, "sandbox_paused")
	if s := p.state(a); s != "paused" {
		t.Errorf("state %s, want paused", s)
	}
}

// TestHostDiesDuringOperation loses the host during pauses, resumes and snapshots. When the host
// is back, the server finds out what became of them.
func TestHostDiesDuringOperation(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	g := newGate()
	for _, done := range []bool{true, false} {
		sandbox := p.create(map[string]any{"metadata": map[string]string{"done": fmt.Sprint(done)}})
		base := "/v1/sandboxes/" + sandbox
		for _, c := range []struct {
			path, done, undone string
			body               any
		}{
			{base + "/pause", "paused", "running", nil},
			{base + "/resume", "running", "paused", nil},
		} {
			p.agent.hook(g.on)
			before := p.state(sandbox)
			if want := map[string]string{"paused": "running", "running": "paused"}[c.done]; before != want {
				p.call("POST", base+map[string]string{"running": "/resume", "paused": "/pause"}[want], nil)
			}
			answer := p.later("POST", c.path, c.body)
			<-g.asked
			p.agent.vanish()
			(<-answer).fails(503, "host_unreachable")
			p.agent.hook(nil)
			want := c.done
			if !done {
				want = c.undone
			}
			p.agent.set(sandbox, map[string]hostagentv1.SandboxState{"paused": paused, "running": running}[want])
			p.agent.serve(t)
			p.eventually(c.path+" is final", func() bool { return p.state(sandbox) == want })
			if !done {
				p.call("POST", c.path, nil).want(200)
			}
		}
	}
	sandbox := p.create(map[string]any{})
	p.agent.hook(g.on)
	answer := p.later("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "later"})
	<-g.asked
	p.agent.vanish()
	(<-answer).fails(503, "host_unreachable")
	p.agent.hook(nil)
	p.agent.serve(t)
	p.eventually("the snapshot is made", func() bool { return len(p.call("GET", "/v1/snapshots", nil).list("snapshots")) == 1 })
}

// TestServerDiesDuringOperation starts a second server, which finds what the first one left in
// transit.
func TestServerDiesDuringOperation(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var sandboxes []string
	for range 8 {
		sandboxes = append(sandboxes, p.create(map[string]any{}))
	}
	for _, sandbox := range sandboxes[2:4] {
		p.call("POST", "/v1/sandboxes/"+sandbox+"/pause", nil).want(200)
	}
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandboxes[4], "name": "removed"}).want(201)
	hang := make(chan struct{})
	asked := make(chan string, 100)
	p.agent.hook(func(_ context.Context, call string) error {
		asked <- call
		<-hang
		return connect.NewError(connect.CodeUnavailable, errors.New("too late"))
	})
	fire := func(method, path string, body any) {
		go p.try(method, path, body)
		<-asked
	}
	fire("POST", "/v1/sandboxes/"+sandboxes[0]+"/pause", nil)
	fire("POST", "/v1/sandboxes/"+sandboxes[1]+"/pause", nil)
	fire("POST", "/v1/sandboxes/"+sandboxes[2]+"/resume", nil)
	fire("POST", "/v1/sandboxes/"+sandboxes[3]+"/resume", nil)
	fire("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandboxes[5], "name": "half"})
	fire("POST", "/v1/sandboxes/"+sandboxes[6]+"/fork", map[string]any{"count": 2})
	fire("POST", "/v1/sandboxes/"+sandboxes[7]+"/fork", map[string]any{"count": 2})
	fire("DELETE", "/v1/snapshots/removed", nil)
	// What the host completed: one pause, one resume and one fork.
	p.agent.set(sandboxes[0], paused)
	p.agent.set(sandboxes[1], running)
	p.agent.set(sandboxes[2], running)
	p.agent.set(sandboxes[3], paused)
	from, _ := id.Parse(id.Sandbox, sandboxes[6])
	rows, err := p.db().Query(context.Background(), "SELECT id FROM sandboxes WHERE forked_from = $1", from)
	if err != nil {
		t.Fatal(err)
	}
	copies, err := pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
	if err != nil || len(copies) != 2 {
		t.Fatalf("forks %v, %v", copies, err)
	}
	for _, c := range copies {
		p.agent.add(id.Format(id.Sandbox, c), 60)
	}
	old := p.end
	p.halt()
	p.agent.hook(nil)
	// The heartbeat decides how soon the next server takes the first for dead.
	p.config.Heartbeat = time.Second
	p.start()
	next := p.end
	p.end = func() { next(); close(hang); old() }
	for i, want := range []string{"paused", "running", "running", "paused"} {
		p.eventually(fmt.Sprintf("sandbox %d is %s", i, want), func() bool { return p.state(sandboxes[i]) == want })
	}
	for _, c := range copies {
		p.eventually("the forks that the host has are running", func() bool { return p.state(id.Format(id.Sandbox, c)) == "running" })
	}
	p.eventually("the forks that it does not have failed", func() bool {
		return len(p.call("GET", "/v1/sandboxes?state=error", nil).list("sandboxes")) == 2
	})
	p.eventually("one of the snapshots is ready and one is removed", func() bool {
		list := p.call("GET", "/v1/snapshots", nil).list("snapshots")
		return len(list) == 1 && list[0].(map[string]any)["name"] == "half"
	})
	p.eventually("the host has no other template", func() bool {
		p.agent.mu.Lock()
		defer p.agent.mu.Unlock()
		return len(p.agent.templates) == 2
	})
	// Every sandbox can be used.
	for _, sandbox := range sandboxes {
		p.call("POST", "/v1/sandboxes/"+sandbox+"/resume", nil).want(200)
	}
}
