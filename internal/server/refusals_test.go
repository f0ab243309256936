package server_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/id"
)

// TestBadInput tries everything that a client may get wrong.
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
	// Each team has its own idempotency keys.
	p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "k").want(201)
	if r := p.call("POST", "/v1/sandboxes", map[string]any{}, "Idempotency-Key", "k", "X-API-Key", other).want(201); r.Header.Get("Idempotent-Replayed") != "" {
		t.Error("another team's request was replayed")
	}
}
