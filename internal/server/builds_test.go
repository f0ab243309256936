package server_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/await"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/recipe/buildcontext"
)

// build starts a build and returns its id.
func (p *plane) build(body map[string]any) string {
	p.Helper()
	if body["name"] == nil {
		body["name"] = "hello"
	}
	return p.call("POST", "/v1/templates/builds", body).want(202).str("id")
}

// ended waits until a build has ended, and returns it.
func (p *plane) ended(build string) (b map[string]any) {
	p.Helper()
	p.eventually("the build has ended", func() bool {
		b = p.call("GET", "/v1/templates/builds/"+build, nil).want(200).object()
		return b["state"] != "queued" && b["state"] != "running"
	})
	return b
}

// steps returns a build's steps, each as its state and text.
func steps(b map[string]any) (all []string) {
	for _, s := range b["steps"].([]any) {
		step := s.(map[string]any)
		all = append(all, step["state"].(string)+" "+step["text"].(string))
	}
	return all
}

// clean fails the test unless builds left nothing but the given number of templates.
func (p *plane) clean(templates int) {
	p.Helper()
	p.eventually("builds left only their templates", func() bool {
		boxes, has := p.agent.left()
		var rows int
		if err := p.db().QueryRow(context.Background(), `SELECT (SELECT count(*) FROM sandboxes WHERE state NOT IN ('stopped', 'error')) + (SELECT count(*) FROM templates WHERE state <> 'ready')`).Scan(&rows); err != nil {
			p.Fatal(err)
		}
		return boxes == 0 && has == templates && rows == 0
	})
}

func TestBuild(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	text := "FROM minimal\nENV A=1\nRUN one\nWORKDIR /srv\nRUN two\n"
	b := p.ended(p.build(map[string]any{"recipe": text, "tags": []string{"latest", "v1"}}))
	want := []string{
		"succeeded apt-get update", "succeeded ENV A=1", "succeeded RUN one", "succeeded WORKDIR /srv", "succeeded RUN two",
		"succeeded apt-get -y autoremove", "succeeded apt-get clean", "succeeded rm -rf /var/lib/apt/lists/*", "succeeded capture",
	}
	if b["state"] != "succeeded" || !slices.Equal(steps(b), want) || b["done_steps"] != 9. || b["total_steps"] != 9. || b["version"] != 1. {
		t.Fatalf("%v\n%q", b, steps(b))
	}
	if out := b["steps"].([]any)[2].(map[string]any); out["output"] != "one\n" || out["exit_code"] != 0. || out["phase"] != "recipe" {
		t.Errorf("a step is %v", out)
	}
	p.agent.lines()
	p.clean(1 + 1 + 3) // minimal, the template, and layers after update and both RUNs
	for _, ref := range []string{"hello", "hello:v1", "hello@1"} {
		if got := p.call("GET", "/v1/templates/"+ref, nil).want(200).str("id"); got != b["template_id"] {
			t.Errorf("%s is %s", ref, got)
		}
	}
	// Nobody sees layers or the build's sandbox.
	if n := len(p.call("GET", "/v1/templates", nil).list("templates")); n != 2 {
		t.Errorf("%d templates", n)
	}
	if n := len(p.call("GET", "/v1/sandboxes?state=stopped", nil).list("sandboxes")); n != 0 {
		t.Errorf("%d sandboxes", n)
	}

	// Build again with the last step changed: no other step runs.
	b = p.ended(p.build(map[string]any{"recipe": strings.Replace(text, "two", "other", 1)}))
	if got := p.agent.lines(); b["version"] != 2. || !slices.Equal(got, []string{"other", "apt-get -y autoremove", "apt-get clean", "rm -rf /var/lib/apt/lists/*"}) {
		t.Errorf("version %v ran %q", b["version"], got)
	}
	if got := steps(b)[:4]; !slices.Equal(got, []string{"cached apt-get update", "cached ENV A=1", "cached RUN one", "succeeded WORKDIR /srv"}) {
		t.Errorf("steps %q", got)
	}
	// A changed variable changes the input of every later step.
	p.ended(p.build(map[string]any{"recipe": strings.Replace(text, "A=1", "A=2", 1)}))
	if got := p.agent.lines(); got[0] != "one" {
		t.Errorf("with another variable it ran %q", got)
	}
	b = p.ended(p.build(map[string]any{"recipe": text, "no_cache": true, "skip_pre_post": true}))
	if got := p.agent.lines(); !slices.Equal(got, []string{"one", "two"}) || b["total_steps"] != 5. {
		t.Errorf("without a cache it ran %q", got)
	}
	// Versions 2 and 3 have lost their tags; 1 still has one.
	if got := p.call("GET", "/v1/templates/hello", nil).want(200).object()["version"]; got != 4. {
		t.Errorf("hello is version %v", got)
	}
	p.call("GET", "/v1/templates/hello@1", nil).want(200)
	p.call("GET", "/v1/templates/builds?limit=2", nil).want(200)
	other := p.newTeam()
	p.call("GET", "/v1/templates/builds/"+b["id"].(string), nil, "X-API-Key", other).fails(404, "not_found")
	p.call("POST", "/v1/templates/builds/"+b["id"].(string)+"/cancel", nil, "X-API-Key", other).fails(404, "not_found")

	// After the end, the log has every step and then the end.
	req := httptest.NewRequest(http.MethodGet, p.http.URL+"/v1/templates/builds/"+b["id"].(string)+"/logs", nil)
	req.RequestURI = ""
	req.Header.Set("X-API-Key", adminKey)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var log bytes.Buffer
	if _, err := log.ReadFrom(resp.Body); err != nil || !strings.Contains(log.String(), `"data":"two\n"`) || !strings.Contains(log.String(), `"type":"end"`) {
		t.Errorf("log: %s, %v", log.String(), err)
	}
}

// TestBuildLimits checks that a recipe's limits reach its host with the template, apply
// to whatever starts from it, and are shown.
func TestBuildLimits(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	built := func(name, recipe string) {
		t.Helper()
		if b := p.ended(p.build(map[string]any{"name": name, "recipe": recipe, "skip_pre_post": true})); b["state"] != "succeeded" {
			t.Fatalf("%s: %v", recipe, b)
		}
	}
	check := func(ref string, want map[string]any) {
		t.Helper()
		got, _ := p.call("GET", "/v1/templates/"+ref, nil).want(200).object()["limits"].(map[string]any)
		if !maps.Equal(got, want) {
			t.Errorf("%s has the limits %v, not %v", ref, got, want)
		}
	}
	built("plain", "FROM minimal\nRUN one")
	check("plain", nil)
	built("limited", "FROM minimal\nLIMIT disk_ops=100 net_bytes=65536\nRUN one\nHEALTHCHECK CMD true")
	check("limited", map[string]any{"disk_ops": 100., "net_bytes": 65536.})
	built("other", "FROM limited\nRUN two\nLIMIT net_bytes=0 disk_ops=200 net_packets=300")
	check("other", map[string]any{"disk_ops": 200., "net_packets": 300.})
	built("same", "FROM other\nRUN three")
	check("same", map[string]any{"disk_ops": 200., "net_packets": 300.})
	box := p.call("POST", "/v1/sandboxes", map[string]any{"template": "same"}).want(201).str("id")
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": box, "name": "shot"}).want(201)
	check("shot", map[string]any{"disk_ops": 200., "net_packets": 300.})
	built("none", "FROM same\nLIMIT disk_ops=0 net_packets=0")
	check("none", nil)
	p.call("POST", "/v1/templates/builds", map[string]any{"name": "bad", "recipe": "FROM minimal\nLIMIT disk_ops=1"}).fails(400, "invalid_argument")

	// If a host makes up limits, none of them exceeds what a recipe may ask for.
	p.agent.mu.Lock()
	p.agent.imports = func(tpl *hostagentv1.Template) {
		tpl.Defaults = &hostagentv1.Defaults{Limits: map[string]int64{"disk_ops": 1 << 60, "net_bytes": -1, "speed": 7}}
	}
	p.agent.mu.Unlock()
	p.call("POST", "/v1/templates/import/archive?name=lie", []byte("x"), "Content-Type", "application/x-tar").want(201)
	check("lie", map[string]any{"disk_ops": 1e10})
}

func TestBuildWrong(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	for what, body := range map[string]map[string]any{
		"no recipe": {"name": "x", "recipe": "RUN x"}, "an instruction": {"name": "x", "recipe": "FROM minimal\nEXPOSE 1"},
		"name": {"name": "X", "recipe": "FROM minimal"}, "a path's name": {"name": "builds", "recipe": "FROM minimal"}, "another": {"name": "import", "recipe": "FROM minimal"}, "tag": {"name": "x", "tags": []string{".x"}, "recipe": "FROM minimal"}, "no folder": {"name": "x", "recipe": "FROM minimal\nCOPY a b"},
	} {
		if r := p.call("POST", "/v1/templates/builds", body); r.Status != 400 {
			t.Errorf("%s: %d %s", what, r.Status, r.Body)
		}
	}
	p.call("POST", "/v1/templates/builds", map[string]any{"name": "x", "recipe": "FROM minimal\nCOPY a b", "archive": "sha256:" + strings.Repeat("0", 64)}).fails(422, "unprocessable")
	for recipe, why := range map[string]string{
		"FROM minimal\nRUN exit 3":    "step 1 (RUN exit 3) ended with exit code 3",
		"FROM nope\nRUN x":            `no template "nope:latest"`,
		"FROM minimal\nWORKDIR /full": "no space left on the disk",
		"FROM minimal\nRUN hang":      "step 1 (RUN hang) did not end within 1s",
		"FROM minimal\nSTART exit 4\nHEALTHCHECK --interval=1s CMD exit 1":                "",
		"FROM minimal\nHEALTHCHECK --interval=1ms --retries=2 CMD exit 5":                 "the health check failed 2 times, the last time with exit code 5",
		"FROM minimal\nRUN echo fine\nENV X=${Y:-}\nWORKDIR $X\nRUN never":                "",
		"FROM minimal\nRUN before\nRUN exit 1\nRUN never\nSTART never\nHEALTHCHECK CMD x": "step 2 (RUN exit 1) ended with exit code 1",
	} {
		b := p.ended(p.build(map[string]any{"name": "broken", "recipe": recipe, "skip_pre_post": true, "step_timeout_seconds": 1, "no_cache": true}))
		if b["state"] != "failed" || b["error"] == "" || why != "" && b["error"] != why {
			t.Errorf("%s: %v %v", recipe, b["state"], b["error"])
		}
		for _, s := range steps(b) {
			if strings.Contains(s, "never") && strings.HasPrefix(s, "succeeded") || strings.HasPrefix(s, "running") || strings.HasPrefix(s, "pending") {
				t.Errorf("%s: step %s", recipe, s)
			}
		}
	}
	p.clean(1)
	p.call("GET", "/v1/templates/broken", nil).fails(404, "not_found")
}

// TestBuildCopies uploads a folder, and a build copies it.
func TestBuildCopies(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"a.txt": "a", "sub/b": "b"} {
		f := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	pack := func() string {
		var packed bytes.Buffer
		digest, err := buildcontext.Pack(t.Context(), &packed, dir, buildcontext.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		path := "/v1/templates/builds/archives/"
		p.call("PUT", path+"sha256:"+strings.Repeat("1", 64), packed.Bytes(), "Content-Type", "application/x-tar").fails(400, "invalid_argument")
		p.call("PUT", path+string(digest), packed.Bytes(), "Content-Type", "application/x-tar").want(204)
		p.call("PUT", path+string(digest), packed.Bytes(), "Content-Type", "application/x-tar").want(204)
		return string(digest)
	}
	digest := pack()
	recipe := "FROM minimal\nCOPY a.txt /etc/motd\nCOPY . /srv/\nRUN x\n"
	b := p.ended(p.build(map[string]any{"recipe": recipe, "archive": digest, "skip_pre_post": true}))
	if b["state"] != "succeeded" {
		t.Fatalf("%v %q", b["error"], steps(b))
	}
	p.agent.mu.Lock()
	if got := string(p.agent.files["/etc"]); !strings.Contains(got, "motd") {
		t.Errorf("copied to /etc: %q", got)
	}
	if got := string(p.agent.files["/srv"]); !strings.Contains(got, "sub/b") || !strings.Contains(got, "a.txt") {
		t.Errorf("copied to /srv: %q", got)
	}
	// Zip archives have no date before 1980, whatever the time zone.
	sent := tar.NewReader(bytes.NewReader(p.agent.files["/srv"]))
	entries := 0
	for {
		h, err := sent.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		entries++
		if h.ModTime.In(time.FixedZone("west", -12*60*60)).Year() < 1980 {
			t.Errorf("%s is of %v", h.Name, h.ModTime)
		}
	}
	if entries == 0 {
		t.Error("nothing was copied to /srv")
	}
	p.agent.mu.Unlock()
	// A changed file that the first COPY does not take reruns only the second.
	if err := os.WriteFile(filepath.Join(dir, "sub/b"), []byte("c"), 0o644); err != nil {
		t.Fatal(err)
	}
	b = p.ended(p.build(map[string]any{"recipe": recipe, "archive": pack(), "skip_pre_post": true}))
	if got := steps(b); !slices.Equal(got[:3], []string{"cached COPY a.txt /etc/motd", "succeeded COPY . /srv/", "succeeded RUN x"}) {
		t.Errorf("steps %q", got)
	}
	b = p.ended(p.build(map[string]any{"recipe": "FROM minimal\nCOPY nope /x\n", "archive": digest, "skip_pre_post": true}))
	if b["state"] != "failed" || b["error"] != `recipe: 2:6: the folder has no "nope"` {
		t.Errorf("%v %v", b["state"], b["error"])
	}
}

// TestBuildCancelled cancels a build in each of its phases.
func TestBuildCancelled(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	recipe := "FROM minimal\nRUN one\nSTART hang\nHEALTHCHECK --interval=1s CMD well\n"
	for _, at := range []struct {
		call string
		n    int // the call's number
	}{{"run", 1}, {"settle", 1}, {"snapshot", 1}, {"run", 2}, {"run", 4}, {"run", 6}, {"snapshot", 2}} {
		reached, seen := make(chan struct{}), 0
		p.agent.hook(func(ctx context.Context, call string) error {
			if call != at.call {
				return nil
			}
			if seen++; seen != at.n {
				return nil
			}
			close(reached)
			<-ctx.Done()
			return ctx.Err()
		})
		build := p.build(map[string]any{"name": "never", "recipe": recipe, "no_cache": at.n > 3 && at.call == "run"})
		await.Recv(t, fmt.Sprintf("%v is reached", at), reached)
		p.call("POST", "/v1/templates/builds/"+build+"/cancel", nil).want(200)
		b := p.ended(build)
		if b["state"] != "cancelled" {
			t.Errorf("%v: %v %v", at, b["state"], b["error"])
		}
		for _, s := range steps(b) {
			if strings.HasPrefix(s, "running") || strings.HasPrefix(s, "pending") || strings.HasPrefix(s, "failed") {
				t.Errorf("%v: step %s", at, s)
			}
		}
		p.agent.hook(nil)
		p.eventually("no sandbox is left", func() bool { n, _ := p.agent.left(); return n == 0 })
	}
	p.call("GET", "/v1/templates/never", nil).fails(404, "not_found")
	// A queued build ends at once.
	hold := p.newHold("run")
	running := []string{p.build(map[string]any{"recipe": "FROM minimal\nRUN a"}), p.build(map[string]any{"recipe": "FROM minimal\nRUN b"})}
	<-hold.asked
	<-hold.asked
	waits := p.build(map[string]any{"recipe": "FROM minimal\nRUN c"})
	if got := p.call("POST", "/v1/templates/builds/"+waits+"/cancel", nil).want(200).str("state"); got != "cancelled" {
		t.Errorf("the queued build is %s", got)
	}
	for _, b := range running {
		p.call("POST", "/v1/templates/builds/"+b+"/cancel", nil).want(200)
		p.ended(b)
	}
}

// newHold makes calls of the agent block until they are cancelled.
func (p *plane) newHold(call string) *gate {
	g := newGate()
	p.agent.hook(func(ctx context.Context, is string) error {
		if is == call {
			return g.on(ctx, is)
		}
		return nil
	})
	return g
}

// TestBuildWorkerDies stops the server that runs a build; another server finishes it.
func TestBuildWorkerDies(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	// The lease is long enough for a live worker on a busy machine to keep it.
	p.config.Heartbeat, p.config.Builds.Lease = time.Second, 5*time.Second
	p.start()
	for _, call := range []string{"run", "settle", "snapshot"} {
		hold := p.newHold(call)
		build := p.build(map[string]any{"recipe": "FROM minimal\nRUN " + call + "\n", "skip_pre_post": true, "no_cache": call == "run"})
		<-hold.asked
		p.agent.hook(nil)
		p.end() // a clean stop returns the build to the queue
		p.start()
		if b := p.ended(build); b["state"] != "succeeded" {
			t.Errorf("%s: %v %v", call, b["state"], b["error"])
		}
		// A dead worker returns nothing: its lease runs out.
		hold = p.newHold(call)
		build = p.build(map[string]any{"recipe": "FROM minimal\nRUN " + call + " dies\n", "skip_pre_post": true, "no_cache": call == "run"})
		<-hold.asked
		// Pretend that a dead server has the build.
		p.sql(`UPDATE builds SET worker = gen_random_uuid(), lease_until = now() + interval '1 second' WHERE state = 'running'`)
		p.agent.hook(nil)
		if b := p.ended(build); b["state"] != "succeeded" || b["attempts"] != 2. {
			t.Errorf("%s: %v %v, attempt %v", call, b["state"], b["error"], b["attempts"])
		}
	}
	p.eventually("no sandbox is left", func() bool { n, _ := p.agent.left(); return n == 0 })
}

// TestBuildHostFull builds on a host that has no room for the capture.
func TestBuildHostFull(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.hook(func(_ context.Context, call string) error {
		if call == "snapshot" {
			return connect.NewError(connect.CodeResourceExhausted, errors.New("this host has no disk space left"))
		}
		return nil
	})
	b := p.ended(p.build(map[string]any{"recipe": "FROM minimal\nRUN one\n", "skip_pre_post": true}))
	if b["state"] != "failed" || b["error"] != "this host has no disk space left" {
		t.Errorf("%v %v", b["state"], b["error"])
	}
	p.clean(1)
}

// TestBuildImage builds from an image in a registry that asks for a password. The host
// imports it once per digest, and not at all for a cancelled build.
func TestBuildImage(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.digest = strings.Repeat("1", 64)
	const password = "s3cret"
	body := func(reference, password, last string) map[string]any {
		b := map[string]any{"recipe": "FROM oci:" + reference + "\nRUN one\nRUN " + last + "\n", "skip_pre_post": true}
		if password != "" {
			b["registry"] = map[string]any{"username": "reader", "password": password}
		}
		return b
	}
	const there = "registry.example/there:1"
	for what, c := range map[string]struct {
		body map[string]any
		why  string
	}{
		"a wrong password": {body(there, "wrong", "two"), "the registry denies access with these credentials"},
		"nobody":           {body(there, "", "two"), "the registry denies access with these credentials"},
		"no such image":    {body("registry.example/none:1", password, "two"), "the registry does not have this image"},
	} {
		if b := p.ended(p.build(c.body)); b["state"] != "failed" || b["error"] != c.why {
			t.Errorf("%s: %v %v", what, b["state"], b["error"])
		}
	}
	p.call("POST", "/v1/templates/builds", map[string]any{"name": "x", "recipe": "FROM minimal\nRUN x", "registry": map[string]any{"username": "reader", "password": password}}).fails(400, "invalid_argument")
	p.clean(1)

	b := p.ended(p.build(body(there, password, "two")))
	if b["state"] != "succeeded" {
		t.Fatalf("%v %q", b["error"], steps(b))
	}
	p.ended(p.build(body(there, password, "other")))
	if got, n := p.agent.lines(), p.agent.called("import"); !slices.Equal(got, []string{"one", "two", "other"}) || n != 1 {
		t.Errorf("it ran %q and imported %d times", got, n)
	}
	// The cache does not replace the password.
	if b := p.ended(p.build(body(there, "wrong", "two"))); b["state"] != "failed" {
		t.Errorf("with a wrong password and the image there: %v", b["state"])
	}
	// The tag now means another image: nothing of the first may be reused.
	p.agent.mu.Lock()
	p.agent.digest = strings.Repeat("2", 64)
	p.agent.mu.Unlock()
	p.ended(p.build(body(there, password, "two")))
	if got, n := p.agent.lines(), p.agent.called("import"); !slices.Equal(got, []string{"one", "two"}) || n != 2 {
		t.Errorf("of another image it ran %q, after %d imports", got, n)
	}

	// Cancelling the build cancels its import.
	p.agent.mu.Lock()
	p.agent.digest = strings.Repeat("3", 64)
	p.agent.mu.Unlock()
	_, has := p.agent.left()
	for _, call := range []string{"resolve", "import"} {
		hold := p.newHold(call)
		build := p.build(body(there, password, "two"))
		<-hold.asked
		var sealed []byte
		if err := p.db().QueryRow(t.Context(), "SELECT registry FROM builds WHERE state = 'running'").Scan(&sealed); err != nil || len(sealed) == 0 || bytes.Contains(sealed, []byte(password)) {
			t.Errorf("while it runs the table has %q, %v", sealed, err)
		}
		p.call("POST", "/v1/templates/builds/"+build+"/cancel", nil).want(200)
		if b := p.ended(build); b["state"] != "cancelled" {
			t.Errorf("cancelled in %s: %v %v", call, b["state"], b["error"])
		}
		p.agent.hook(nil)
		p.clean(has)
	}
	var kept int
	if err := p.db().QueryRow(t.Context(), "SELECT count(*) FROM builds WHERE registry IS NOT NULL").Scan(&kept); err != nil || kept != 0 {
		t.Errorf("%d builds have credentials after their end, %v", kept, err)
	}
}

// TestBuildVersionsGo removes a version that no tag names once no sandbox uses it, paused
// ones included, and not before. It also removes surplus layers.
func TestBuildVersionsGo(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Builds.Sweep, p.config.Builds.Layers = 50*time.Millisecond, 1
	p.start()
	version := func(line string) map[string]any {
		t.Helper()
		b := p.ended(p.build(map[string]any{"recipe": "FROM minimal\nRUN " + line + "\n", "skip_pre_post": true}))
		if b["state"] != "succeeded" {
			t.Fatalf("%v", b["error"])
		}
		return b
	}
	has := func(ref string) bool { return p.call("GET", "/v1/templates/"+ref, nil).Status == 200 }
	one := version("one")
	sandbox := p.create(map[string]any{"template": "hello"})
	p.call("POST", "/v1/sandboxes/"+sandbox+"/pause", nil).want(200)
	version("two")
	version("three")
	p.eventually("a version that nothing uses goes", func() bool { return !has("hello@2") })
	if !has("hello@1") || !has("hello@3") {
		t.Error("a version that is used went")
	}
	// What stays: minimal, two versions, and one layer.
	p.eventually("layers that are too many go", func() bool { _, n := p.agent.left(); return n == 1+2+1 })
	p.call("POST", "/v1/sandboxes/"+sandbox+"/resume", nil).want(200)
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil)
	p.eventually("it goes with its last sandbox", func() bool { return !has("hello@1") && !p.agent.hasTemplate(one["template_id"].(string)) })
	// Version numbers are not reused.
	if b := version("four"); b["version"] != 4. {
		t.Errorf("the next version is %v", b["version"])
	}
}

// TestBuildQuota checks that builds' sandboxes count towards the team's usage and quota
// while they run, that a build without room says so, and that nothing counts afterwards.
func TestBuildQuota(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	admin := as(p.bearerOf("admin@example.com"))
	ada := p.person("ada@example.com")
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, as(p.bearer(ada))...).want(201).str("id")
	key := []string{"X-API-Key", p.call("POST", "/v1/keys", map[string]any{"name": "k"}, as(p.bearer(ada))...).want(201).str("key")}
	p.call("PUT", "/v1/admin/teams/"+team+"/quota", map[string]any{"max_running": 1}, admin...).want(200)
	running := func() any {
		return p.call("GET", "/v1/teams/"+team+"/quota", nil, as(p.bearer(ada))...).want(200).object()["running"]
	}
	build := func() string {
		t.Helper()
		return p.call("POST", "/v1/templates/builds", map[string]any{"name": "x", "recipe": "FROM minimal\nRUN one\n", "skip_pre_post": true, "no_cache": true}, key...).want(202).str("id")
	}
	ended := func(build string) (b map[string]any) {
		t.Helper()
		p.eventually("the build has ended", func() bool {
			b = p.call("GET", "/v1/templates/builds/"+build, nil, key...).want(200).object()
			return b["state"] != "queued" && b["state"] != "running"
		})
		return b
	}
	hold := p.newHold("run")
	under := build()
	<-hold.asked
	if n := running(); n != 1. {
		t.Errorf("while a build runs the team has %v sandboxes", n)
	}
	p.call("POST", "/v1/sandboxes", map[string]any{}, key...).fails(403, "quota_exceeded")
	hold.release <- nil
	p.agent.hook(nil)
	if b := ended(under); b["state"] != "succeeded" {
		t.Errorf("%v %v", b["state"], b["error"])
	}
	p.eventually("after a build the team has no sandbox", func() bool { return running() == 0. })
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, key...).want(201).str("id")
	b := ended(build())
	if why, _ := b["error"].(string); b["state"] != "failed" || !strings.HasPrefix(why, "the team may run 1 sandboxes at once") {
		t.Errorf("without room: %v %v", b["state"], b["error"])
	}
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil, key...).want(204)
	if b := ended(build()); b["state"] != "succeeded" {
		t.Errorf("with room again: %v %v", b["state"], b["error"])
	}
}

// TestBuildOtherSecret starts a build whose registry credentials were encrypted with
// another WRENN_SECRET_KEY. It fails, says why, and contacts no registry.
func TestBuildOtherSecret(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.digest = strings.Repeat("1", 64)
	hold := p.newHold("resolve")
	build := p.build(map[string]any{
		"recipe": "FROM oci:registry.example/there:1\nRUN one\n", "skip_pre_post": true,
		"registry": map[string]any{"username": "reader", "password": "s3cret"},
	})
	<-hold.asked
	p.end() // the build returns to the queue
	p.agent.hook(nil)
	asked := p.agent.called("resolve")
	// As if the row came from another installation's backup.
	p.sql("DELETE FROM installation_secret")
	p.config.SecretKey = strings.Repeat("cd", 32)
	p.start()
	b := p.ended(build)
	if b["state"] != "failed" || b["error"] != "cannot decrypt the registry credentials: they were encrypted with another WRENN_SECRET_KEY" {
		t.Errorf("%v %v", b["state"], b["error"])
	}
	if n := p.agent.called("resolve"); n != asked {
		t.Errorf("the registry was asked %d times more", n-asked)
	}
	if b = p.ended(p.build(map[string]any{"recipe": "FROM minimal\nRUN one\n", "skip_pre_post": true})); b["state"] != "succeeded" {
		t.Errorf("another: %v %v", b["state"], b["error"])
	}
	p.clean(1 + 1 + 1)
}

// TestSweepOthers makes the host hang, fail or succeed in ending sandboxes that builds
// left behind. The server removes what it can, whatever becomes of the others.
func TestSweepOthers(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Builds.Sweep = 50 * time.Millisecond
	p.start()
	template := p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": p.create(map[string]any{}), "name": "old"}).want(201).str("id")
	var boxes []string
	hangs, fails, let := map[string]bool{}, map[string]bool{}, make(chan struct{})
	defer close(let)
	for n := range 4 {
		box := p.create(map[string]any{})
		boxes = append(boxes, box)
		hangs[box], fails[box] = n < 2, n == 2
	}
	p.agent.mu.Lock()
	p.agent.onDestroy = func(ctx context.Context, req *hostagentv1.DestroyRequest) error {
		if hangs[req.SandboxId] {
			select {
			case <-let:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if fails[req.SandboxId] {
			return connect.NewError(connect.CodeInternal, errors.New("it does not end"))
		}
		return nil
	}
	p.agent.mu.Unlock()
	// In one transaction: a sweep that sees only the two that hang would delay the next
	// one.
	err := pgx.BeginFunc(t.Context(), p.db(), func(tx pgx.Tx) error {
		var all []error
		sql := func(sql string, args ...any) {
			_, err := tx.Exec(t.Context(), sql, args...)
			all = append(all, err)
		}
		builtBy := func() (build uuid.UUID) {
			build = uuid.New()
			sql("INSERT INTO builds (id, team_id, name, tags, recipe, options, state, total_steps, created_at) SELECT $1, team_id, 'b', '{latest}', 'FROM minimal', '{}', 'failed', 1, now() FROM sandboxes LIMIT 1", build)
			return build
		}
		sql("DELETE FROM template_tags")
		sql("UPDATE templates SET build_id = $1, kind = 'template' WHERE name = 'old'", builtBy())
		for _, box := range boxes {
			sandbox, err := id.Parse(id.Sandbox, box)
			all = append(all, err)
			sql("UPDATE sandboxes SET build_id = $1 WHERE id = $2", builtBy(), sandbox)
		}
		return errors.Join(all...)
	})
	if err != nil {
		t.Fatal(err)
	}
	p.eventually("the sandbox whose end succeeds is gone", func() bool { return !p.agent.has(boxes[3]) })
	p.eventually("the template is gone", func() bool { return !p.agent.hasTemplate(template) })
}
