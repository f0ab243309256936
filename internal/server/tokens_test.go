package server_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/filesign"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// TestRevokeTokens checks that revoked tokens, and URLs signed with them, open nothing on
// any server, that connections opened with them end, and that the new tokens work. The
// guest daemon still gets its original token.
func TestRevokeTokens(t *testing.T) {
	t.Parallel()
	p, q := newTwo(t, 10*time.Second)
	made := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	sandbox := made.str("id")
	u, err := id.Parse(id.Sandbox, sandbox)
	if err != nil {
		t.Fatal(err)
	}
	p.agent.mu.Lock()
	guest := p.agent.creates[0].AccessToken
	p.agent.mu.Unlock()
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			ws, err := websocket.Accept(w, r, nil)
			if err == nil {
				_, _, _ = ws.Read(r.Context())
			}
			return
		}
		v := r.URL.Query()
		if token := r.Header.Get("X-Access-Token"); token != "" && token != guest ||
			v.Has("signature") && v.Get("signature") != filesign.Of(v.Get("path"), "read", v.Get("username"), guest, v.Get("signature_expiration")) {
			w.WriteHeader(http.StatusTeapot - 1)
			return
		}
		w.WriteHeader(http.StatusTeapot)
	})
	port := func(s *plane, port, path string, headers ...string) int {
		t.Helper()
		r, err := s.try("GET", path, nil, append([]string{"Host", port + "-" + sandbox + ".localhost", "X-API-Key", ""}, headers...)...)
		if err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	check := func(when string, of response, want int) {
		t.Helper()
		for _, s := range []*plane{p, q} {
			for what, got := range map[string]int{
				"traffic token": port(s, "80", "/", "X-Traffic-Token", of.str("traffic_token")),
				"access token":  port(s, "49983", "/health", "X-Access-Token", of.str("access_token")),
				"signed URL":    port(s, "49983", signed("/a b", of.str("access_token"), time.Unix(4102444800, 0))),
			} {
				if got != want {
					t.Errorf("%s, %s: %d, want %d", when, what, got, want)
				}
			}
		}
	}
	check("at first", made, http.StatusTeapot)
	ws, _, err := websocket.Dial(t.Context(), q.http.URL+"/ws", &websocket.DialOptions{Host: "80-" + sandbox + ".localhost", HTTPHeader: http.Header{"X-Traffic-Token": {made.str("traffic_token")}}})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _, _ = ws.Read(t.Context())
	}()
	p.call("POST", "/v1/sandboxes/"+sandbox+"/tokens/revoke", nil, "X-API-Key", p.newTeam()).fails(404, "not_found")
	select {
	case <-ended:
		t.Fatal("a WebSocket ended without reason")
	default:
	}
	again := p.call("POST", "/v1/sandboxes/"+sandbox+"/tokens/revoke", nil).want(200)
	if again.str("traffic_token") == made.str("traffic_token") || again.str("access_token") == made.str("access_token") {
		t.Errorf("revoked: %s", again.Body)
	}
	select {
	case <-ended:
	case <-time.After(await.Hang):
		t.Error("a connection opened with a revoked token stays open")
	}
	p.eventually("the other server learns of it", func() bool {
		return port(q, "80", "/", "X-Traffic-Token", made.str("traffic_token")) == 401
	})
	check("revoked", made, 401)
	check("their successors", again, http.StatusTeapot)
	if got := p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200); got.str("traffic_token") != again.str("traffic_token") {
		t.Errorf("the sandbox shows %s", got.Body)
	}

	// Revoking a key, or removing a member, also revokes the tokens that they know.
	for name, leave := range map[string]func(){
		"a key": func() {
			key := uuid.New()
			p.sql("INSERT INTO api_keys (id, team_id, name, prefix, hash) SELECT $1, team_id, 'k', 'wrn_', 'x' FROM sandboxes WHERE id = $2", key, u)
			p.sql("DELETE FROM api_keys WHERE id = $1", key)
		},
		"a member": func() {
			ada := p.person("ada@example.com")
			p.sql("INSERT INTO team_members (team_id, user_id, role) SELECT team_id, $1, 'member' FROM sandboxes WHERE id = $2", ada, u)
			p.sql("DELETE FROM team_members WHERE user_id = $1", ada)
		},
	} {
		before := p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200)
		leave()
		for _, s := range []*plane{p, q} {
			s.eventually("tokens are revoked with "+name, func() bool {
				return port(s, "80", "/", "X-Traffic-Token", before.str("traffic_token")) == 401
			})
		}
		check("with "+name, before, 401)
		check("after "+name, p.call("GET", "/v1/sandboxes/"+sandbox, nil).want(200), http.StatusTeapot)
	}
}
