package server_test

import (
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// journal keeps what is written to it.
type journal struct {
	mu   sync.Mutex
	text strings.Builder
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(b)
}

// line returns a line that contains all words, or "".
func (j *journal) line(words ...string) string {
	j.mu.Lock()
	defer j.mu.Unlock()
lines:
	for line := range strings.Lines(j.text.String()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue lines
			}
		}
		return line
	}
	return ""
}

// TestRequestIDReachesTheHost checks that calls to the host carry the id of the client's
// request.
func TestRequestIDReachesTheHost(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var ids sync.Map
	saw := func(r *http.Request) {
		if id := r.Header.Get(hostwire.RequestID); id != "" {
			ids.Store(id, path.Base(r.URL.Path))
		}
	}
	p.agent.saw.Store(&saw)
	made := p.call("POST", "/v1/sandboxes", map[string]any{}, "X-Request-Id", "creates").want(201)
	p.call("POST", "/v1/sandboxes/"+made.str("id")+"/exec", map[string]any{"cmd": "cat"}, "X-Request-Id", "runs").want(200)
	p.call("GET", "/page", nil, "Host", "8000-"+made.str("id")+".localhost", "X-Traffic-Token", made.str("traffic_token"), "X-Request-Id", "visits", hostwire.RequestID, "forged")
	for id, want := range map[string]string{"ext-creates": "Create", "ext-runs": "Run", "ext-visits": "page"} {
		if got, _ := ids.Load(id); got != want {
			t.Errorf("the host saw %s in %v, want it in %s", id, got, want)
		}
	}
	if _, ok := ids.Load("forged"); ok {
		t.Error("the host saw an id that a client made up")
	}
}

// TestPortsAnswerWithTheRequestID checks that responses of a sandbox's ports have the id
// of the client's request, which a program in the sandbox may replace, but the guest
// daemon may not.
func TestPortsAnswerWithTheRequestID(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.guest = guestHandler()
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	for _, tt := range []struct{ method, port, path, want string }{
		{"GET", "8000", "/", "ext-visit"},
		{"GET", "8000", "/own-id", "the program's"},
		{"GET", "49983", "/", "ext-visit"},
		{"GET", "49983", "/own-id", "ext-visit"},
		{"OPTIONS", "49983", "/files?signature=v1_x", "ext-visit"},
	} {
		r := p.call(tt.method, tt.path, nil, "Host", tt.port+"-"+made.str("id")+".localhost", "X-Request-Id", "visit",
			"X-Traffic-Token", made.str("traffic_token"), "X-Access-Token", made.str("access_token"), "Access-Control-Request-Method", "GET")
		if got := r.Header.Values("X-Request-Id"); !slices.Equal(got, []string{tt.want}) {
			t.Errorf("%s %s of port %s: %d with the id %q, want %q", tt.method, tt.path, tt.port, r.Status, got, tt.want)
		}
	}
}

// TestRefusalsAreLogged checks that the log says why a request was refused, with the id
// that the client got.
func TestRefusalsAreLogged(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201).str("id")
	p.end()
	var log journal
	p.logs = &log
	p.start()
	for id, ask := range map[string]func(...string) response{
		"not_found":       func(h ...string) response { return p.call("GET", "/v1/sandboxes/"+made[:len(made)-1]+"0", nil, h...) },
		"unauthenticated": func(h ...string) response { return p.call("GET", "/v1/sandboxes", nil, append(h, "X-API-Key", "")...) },
		"invalid_argument": func(h ...string) response {
			return p.call("POST", "/v1/sandboxes", map[string]any{"memory_mib": -1}, h...)
		},
	} {
		ask("X-Request-Id", id).fails(map[string]int{"not_found": 404, "unauthenticated": 401, "invalid_argument": 400}[id], id)
		p.eventually(id+" is logged", func() bool {
			return log.line("level=INFO", "msg=request ", "request_id=ext-"+id+" ", "code="+id+" ", "error=") != ""
		})
	}
	refused := p.call("GET", "/", nil, "Host", "8000-"+made+".localhost", "X-Traffic-Token", "wrong", "X-API-Key", "", "X-Request-Id", "port")
	refused.fails(401, "unauthenticated")
	if got := refused.Header.Get("X-Request-Id"); got != "ext-port" {
		t.Errorf("X-Request-Id of a refused request to a port: %q", got)
	}
	p.eventually("a refused request to a port is logged", func() bool {
		return log.line("level=INFO", "request_id=ext-port ", "host=8000-"+made+".localhost", "code=unauthenticated", "invalid traffic token") != ""
	})
}
