package server_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/await"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

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
	// The guest sees the whole request, without our own headers.
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
	// A stream arrives piece by piece.
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
	// The proxy notices the end of a sandbox at once, despite its cache.
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

// TestProxyStreamsBothWays responds before the request's body has ended, and breaks off a
// response, both through the server's proxy.
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
