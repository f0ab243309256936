package server_test

import (
	"bytes"
	"encoding/base64"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coder/websocket"

	"github.com/wrenn-dev/wrenn/internal/await"
)

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
					t.Errorf("%s (agent of the previous release: %v): %s = %v, want %v", tt.name, before, k, got[k], v)
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
		`{"cmd":"x","args":["y"],"shell":true,"cwd":"/a"}`: "args: not allowed with shell",
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
	// A command ends if its client disconnects.
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
	// If the host disconnects, the client must not take that for the end of the command.
	ws = open(`{"cmd":"cat","stdin":true}`)
	expect(ws, started)
	p.agent.close()
	if got := next(ws); !strings.Contains(got, `"type":"error"`) || !strings.Contains(got, "unreachable") {
		t.Errorf("when the host goes: %s", got)
	}
	// A page of another site is refused.
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
