package server_test

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/uuid"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
)

func TestLifecycle(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	made := p.call("POST", "/v1/sandboxes", map[string]any{
		"vcpus": 2, "memory_mib": 256, "timeout_seconds": 60, "envs": map[string]string{"A": "b"}, "metadata": map[string]string{"job": "1"},
	}).want(201)
	sb := made.object()
	sandbox := made.str("id")
	for k, want := range map[string]any{
		"state": "running", "template": "minimal", "template_id": "tpl-0000000000000000000000000", "vcpus": 2., "memory_mib": 256., "disk_mib": float64(hostwire.DefaultDiskMiB), "timeout_seconds": 60.,
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
		t.Errorf("the host was asked to create %v", req)
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
			// A new sandbox does not shift the pages.
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

// TestClientGoesAway checks that creations and deletions complete after their clients
// disconnect.
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
	// A deletion continues as well.
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

func TestEvents(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	a, b, c := p.create(map[string]any{}), p.create(map[string]any{}), p.create(map[string]any{})
	p.agent.happened(hostagentv1.Event_KIND_EXPIRED, a, "")
	p.eventually("the first is stopped", func() bool { return p.state(a) == "stopped" })
	// The host keeps working while no server runs.
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
