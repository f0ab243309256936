package server_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// TestPathsHaveOneSpelling checks that an escaped path means the same as the plain one,
// for the operation and in the audit record.
func TestPathsHaveOneSpelling(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	w := p.world()
	team := w.teams[ours]
	key := keyOf(func(w *world) uuid.UUID { return w.teams[ours].owner }, "1 hour")(w)
	name := team.nameOfTmpl
	w.call("DELETE", "/v1/templates/%74"+name[1:], nil, key...).want(204)
	w.call("GET", "/v1/templates/"+name, nil, key...).fails(404, "not_found")
	admin := as(w.bearer(team.admin))
	records := w.call("GET", "/v1/audit?action=deleteTemplate&object="+name, nil, admin...).want(200).list("records")
	if len(records) != 1 || records[0].(map[string]any)["object"] != name {
		t.Errorf("records of the deletion of %s: %v", name, records)
	}
	// An escape of an escape is another name.
	w.call("GET", "/v1/templates/%2574"+name[1:], nil, key...).fails(404, "not_found")
	archive := []byte("no tar")
	escaped := fmt.Sprintf("/v1/templates/builds/archives/sha256%%3A%x", sha256.Sum256(archive))
	plain := strings.Replace(escaped, "%3A", ":", 1)
	if a, b := w.call("PUT", escaped, archive, key...), w.call("PUT", plain, archive, key...); a.Status != b.Status || string(a.Body) != string(b.Body) {
		t.Errorf("escaped: %d %s; plain: %d %s", a.Status, a.Body, b.Status, b.Body)
	}
	w.call("%47ET", "/v1/templates", nil, key...).fails(405, "method_not_allowed")
}

// TestTextIsText checks that the server refuses text that PostgreSQL cannot store,
// wherever it comes from, and no other text.
func TestTextIsText(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	for _, bad := range []string{"%00", "%ff", "%ed%a0%80"} {
		for _, path := range []string{"/v1/audit?object=x" + bad, "/v1/audit?action=x" + bad, "/v1/templates/x" + bad, "/v1/snapshots?cursor=" + bad, "/v1/admin/users?email_prefix=" + bad, "/v1/sandboxes?metadata=a=" + bad} {
			p.call("GET", path, nil).fails(400, "invalid_argument")
		}
		p.call("PUT", "/v1/templates/minimal"+bad+"/tags/x", nil).fails(400, "invalid_argument")
		p.call("DELETE", "/v1/templates/minimal/tags/x"+bad, nil).fails(400, "invalid_argument")
		p.call("DELETE", "/v1/snapshots/x"+bad, nil).fails(400, "invalid_argument")
	}
	for _, bad := range []string{`\u0000`, "\xff", `\ud800`} {
		p.call("POST", "/v1/channels", `{"name":"x`+bad+`","kind":"email","address":"a@example.com","events":["sandbox.lost"]}`).fails(400, "invalid_argument")
		p.call("POST", "/v1/sandboxes", `{"metadata":{"k":"`+bad+`"}}`).fails(400, "invalid_argument")
		p.call("POST", "/v1/sandboxes", `{"metadata":{"`+bad+`":"v"}}`).fails(400, "invalid_argument")
		p.call("POST", "/v1/admin/hosts", `{"name":"h","tags":["`+bad+`"]}`).fails(400, "invalid_argument")
	}
	long := strings.Repeat("é", 99) + "x"
	p.call("GET", "/v1/audit?object="+url.QueryEscape(long+long[:1]), nil).fails(400, "invalid_argument")
	p.call("GET", "/v1/audit?object="+url.QueryEscape("x"+long), nil).want(200)
	// A record quotes whole characters: the limit of 200 bytes would cut the last in
	// half.
	key := p.newTeam()
	p.call("DELETE", "/v1/snapshots/"+url.PathEscape("x"+strings.Repeat("é", 100)), nil, "X-API-Key", key).fails(404, "not_found")
	sandbox := p.create(map[string]any{})
	out := p.call("POST", "/v1/sandboxes/"+sandbox+"/exec", `{"cmd":"cat","stdin":"a\u0000b"}`).want(200)
	if got := out.str("stdout"); got != "a\x00b" {
		t.Errorf("standard input with NUL came out as %q", got)
	}
}

// TestBodiesHaveOneMeaning checks that handlers see the same value of a body that
// validation saw.
func TestBodiesHaveOneMeaning(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	entries := func(from int) string {
		var all []string
		for i := range 64 {
			all = append(all, fmt.Sprintf(`"k%d":"v"`, from+i))
		}
		return "{" + strings.Join(all, ",") + "}"
	}
	p.call("POST", "/v1/sandboxes", `{"metadata":`+entries(0)+`,"metadata":`+entries(64)+`}`).fails(400, "invalid_argument")
	p.call("PUT", "/v1/admin/settings", `{"signup_open":false,"default_quota":{"max_running":5},"default_quota":{"max_vcpus":5}}`).fails(400, "invalid_argument")
	p.call("POST", "/v1/sandboxes", `{} {"vcpus":2}`).fails(400, "invalid_argument")
	p.call("POST", "/v1/sandboxes", strings.Repeat(`{"metadata":`, 1000)+strings.Repeat("}", 1000)).fails(400, "invalid_argument")
	if got := p.call("POST", "/v1/sandboxes", `{"vcpus":2.0,"memory_mib":5.12e2}`).want(201).object(); got["vcpus"] != 2. || got["memory_mib"] != 512. {
		t.Errorf("2.0 and 5.12e2: %v and %v", got["vcpus"], got["memory_mib"])
	}
	r := p.call("POST", "/v1/sandboxes", `{"vcpus":1.5}`)
	r.fails(400, "invalid_argument")
	if strings.Contains(string(r.Body), "Go") || strings.Contains(string(r.Body), "int32") {
		t.Errorf("the error names types: %s", r.Body)
	}
}

// TestBrokenBody checks that a body with broken chunks is the client's fault, both for
// the API and for a sandbox's port.
func TestBrokenBody(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.guest = guestHandler()
	sandbox := p.create(map[string]any{})
	for _, to := range []string{"POST /v1/sandboxes HTTP/1.1\r\nHost: localhost", "PUT /v1/sandboxes/" + sandbox + "/files?path=/x HTTP/1.1\r\nHost: localhost", "POST /count HTTP/1.1\r\nHost: 8000-" + sandbox + ".localhost"} {
		for _, body := range []string{"zz\r\n\r\n", "2\r\n{ \r\nzz\r\n\r\n"} {
			c, err := net.Dial("tcp", p.http.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			kind := "application/json"
			if strings.HasPrefix(to, "PUT") {
				kind = "application/octet-stream"
			}
			fmt.Fprintf(c, "%s\r\nX-API-Key: %s\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n%s", to, adminKey, kind, body)
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Errorf("%s, %q: %v", to, body, err)
				continue
			}
			const want = `{"error":{"code":"invalid_argument","message":"body: broke off"}}`
			if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != 400 || strings.TrimSpace(string(b)) != want {
				t.Errorf("%s, %q: %s %s, %v", to, body, resp.Status, b, err)
			}
		}
	}
}

// TestHead checks that HEAD gets the response to GET without its body wherever GET only
// reads, and is refused everywhere else.
func TestHead(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	w := p.world()
	var owner, staff caller
	for _, c := range callers() {
		switch c.name {
		case "owner":
			owner = c
		case "platform admin":
			staff = c
		}
	}
	checked := 0
	for i, o := range operations(t) {
		if o.method != http.MethodGet || o.changing() {
			continue
		}
		c := owner
		if o.rule.Role == "platform" {
			c = staff
		}
		head := o
		head.method = http.MethodHead
		get, got := w.send(o, c, targets[0], i), w.send(head, c, targets[0], i)
		if got.Status != get.Status || got.Header.Get("Content-Type") != get.Header.Get("Content-Type") || len(got.Body) > 0 {
			t.Errorf("%s: %d %s; HEAD: %d %s with %d bytes", o, get.Status, get.Header.Get("Content-Type"), got.Status, got.Header.Get("Content-Type"), len(got.Body))
		}
		checked++
	}
	if checked < 30 {
		t.Errorf("only %d operations that read", checked)
	}
	base := "/v1/sandboxes/" + w.teams[ours].wireSandbox + "/files?path=/walk"
	key := keyOf(func(w *world) uuid.UUID { return w.teams[ours].owner }, "1 hour")(w)
	if got := w.call("HEAD", base, nil, key...).want(200).Header.Get("Content-Length"); got != "4" {
		t.Errorf("HEAD of a file of 4 bytes: Content-Length: %q", got)
	}
}

// TestCaptureLimit checks that the error of a sandbox that was captured as often as
// possible says so, and that a refused fork leaves nothing.
func TestCaptureLimit(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	sandbox := p.create(map[string]any{})
	const why = "the sandbox has been captured 64 times"
	p.agent.hook(func(_ context.Context, call string) error {
		if call != "fork" && call != "snapshot" {
			return nil
		}
		err := connect.NewError(connect.CodeFailedPrecondition, errors.New(why))
		err.Meta().Set(hostwire.ErrorReason, hostwire.CaptureLimit)
		return err
	})
	for _, r := range []response{
		p.call("POST", "/v1/sandboxes/"+sandbox+"/fork", map[string]any{"count": 3}, "Idempotency-Key", "k"),
		p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "a"}),
	} {
		r.fails(409, "capture_limit")
		if !strings.Contains(string(r.Body), why) {
			t.Errorf("%s: %s does not say why", r.what, r.Body)
		}
	}
	if all := p.call("GET", "/v1/sandboxes?state=error&state=starting&state=running", nil).want(200).list("sandboxes"); len(all) != 1 {
		t.Errorf("%d sandboxes, want only the one to fork: %v", len(all), all)
	}
	if all := p.call("GET", "/v1/snapshots", nil).want(200).list("snapshots"); len(all) != 0 {
		t.Errorf("templates: %v", all)
	}
	// The idempotency key can be used again.
	p.agent.hook(nil)
	if r := p.call("POST", "/v1/sandboxes/"+sandbox+"/fork", map[string]any{"count": 3}, "Idempotency-Key", "k").want(201); r.Header.Get("Idempotent-Replayed") != "" {
		t.Error("a fork that was refused is replayed")
	}
}

// TestIdsThatNameNothing checks that the server parses as an id whatever has the
// documented form of one, and nothing else.
func TestIdsThatNameNothing(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	admin := as(p.bearerOf("admin@example.com"))
	most := strings.Repeat("z", 25)
	for _, tt := range []struct{ method, path string }{
		{"GET", "/v1/sandboxes/cl-%s"},
		{"DELETE", "/v1/sandboxes/cl-%s"},
		{"GET", "/v1/admin/hosts/hst-%s"},
		{"GET", "/v1/templates/builds/bld-%s"},
		{"GET", "/v1/channels/chn-%s"},
		{"DELETE", "/v1/keys/key-%s"},
		{"DELETE", "/v1/admin/templates/tpl-%s"},
		{"GET", "/v1/admin/teams/tm-%s/quota"},
	} {
		p.call(tt.method, fmt.Sprintf(tt.path, most), nil, admin...).fails(404, "not_found")
		p.call(tt.method, fmt.Sprintf(tt.path, most[1:]), nil, admin...).fails(400, "invalid_argument")
	}
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": "cl-" + most, "name": "x"}).fails(404, "not_found")
	p.call("GET", "/v1/sandboxes", nil, append(admin, "X-Team", "tm-"+most)...).fails(404, "not_found")
	p.call("GET", "/v1/sandboxes", nil, append(admin, "X-Team", "tm-x")...).fails(400, "invalid_argument")
	sandbox := p.create(map[string]any{})
	for _, name := range []string{"builds", "import"} {
		p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": name}).fails(400, "invalid_argument")
	}
}

// TestRefusedHandshakes checks that every refused WebSocket handshake has the API's error
// shape.
func TestRefusedHandshakes(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	path := "/v1/sandboxes/" + p.create(map[string]any{}) + "/exec/stream"
	good := []string{"Connection", "Upgrade", "Upgrade", "websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="}
	for _, bad := range [][]string{
		{"Connection", "close"},
		{"Upgrade", "h2c"},
		{"Upgrade", ""},
		{"Sec-WebSocket-Version", "12"},
		{"Sec-WebSocket-Version", ""},
		{"Sec-WebSocket-Key", ""},
		{"Sec-WebSocket-Key", "short"},
		{"Sec-WebSocket-Key", "\"}"},
	} {
		p.call("GET", path, nil, append(good, bad...)...).fails(400, "invalid_argument")
	}
}
