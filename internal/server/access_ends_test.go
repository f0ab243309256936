package server_test

import (
	"context"
	"crypto/sha256"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// TestAccessEnds revokes access through one server while its holder uses it through
// another.
func TestAccessEnds(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.agent.guest = guestHandler()
	q := p.second()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	admin := as(p.bearerOf("admin@example.com"))
	ada, bob := p.person("ada@example.com"), p.person("bob@example.com")
	asAda := as(p.bearer(ada))

	// Open a terminal of the API, or a WebSocket of a guest, that responds.
	open := func(host, path string, headers []string) *websocket.Conn {
		t.Helper()
		o := &websocket.DialOptions{Host: host, HTTPHeader: http.Header{}}
		for i := 0; i < len(headers); i += 2 {
			if headers[i+1] != "" {
				o.HTTPHeader.Set(headers[i], headers[i+1])
			}
		}
		ws, res, err := websocket.Dial(ctx, q.http.URL+path, o)
		if err != nil {
			t.Fatalf("%s: %v, %v", path, res, err)
		}
		t.Cleanup(func() { ws.CloseNow() })
		first := "ping"
		if host == "" {
			first = `{"cmd":"cat"}`
		}
		if err := ws.Write(ctx, websocket.MessageText, []byte(first)); err != nil {
			t.Fatal(err)
		}
		if _, b, err := ws.Read(ctx); err != nil || !strings.Contains(string(b), "ping") && !strings.Contains(string(b), "started") {
			t.Fatalf("%s: %q, %v", path, b, err)
		}
		return ws
	}
	ended := func(what string, ws *websocket.Conn) {
		t.Helper()
		begun := time.Now()
		wait, cancel := context.WithTimeout(ctx, await.Hang)
		defer cancel()
		_, b, err := ws.Read(wait)
		for err == nil && strings.Contains(string(b), "error") {
			_, b, err = ws.Read(wait) // The reason comes before the close.
		}
		if err == nil || wait.Err() != nil {
			t.Errorf("%s: a WebSocket stays open after %v: %q, %v", what, time.Since(begun), b, err)
		}
	}
	goesOn := func(what string, ws *websocket.Conn) {
		t.Helper()
		kind, text := websocket.MessageBinary, "\x00pong"
		if err := ws.Write(ctx, kind, []byte(text)); err != nil {
			t.Errorf("%s: an unrelated WebSocket: %v", what, err)
			return
		}
		if _, b, err := ws.Read(ctx); err != nil || !strings.Contains(string(b), "pong") {
			t.Errorf("%s: an unrelated WebSocket: %q, %v", what, b, err)
		}
	}
	// atOnce changes the database in one transaction, so servers are notified once all is
	// done.
	atOnce := func(statements ...string) {
		t.Helper()
		err := pgx.BeginFunc(ctx, p.db(), func(tx pgx.Tx) error {
			for _, s := range statements {
				if _, err := tx.Exec(ctx, s, ada); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, how := range []struct {
		name string
		do   func(team, key string)
		// session, key and token tell which connections end, by the credential that
		// opened them.
		session, key, token bool
	}{
		{"log out everywhere", func(string, string) {
			p.call("POST", "/v1/auth/logout-all", nil, asAda...).want(204)
			q.call("GET", "/v1/me", nil, asAda...).fails(401, "unauthenticated")
		}, true, false, false},
		{"revoke the key", func(_, key string) { p.call("DELETE", "/v1/keys/"+key, nil, asAda...).want(204) }, false, true, true},
		{"remove from the team", func(team, _ string) {
			p.sql("INSERT INTO team_members (team_id, user_id, role) SELECT team_id, $1, 'owner' FROM team_members WHERE user_id = $2", bob, ada)
			p.call("DELETE", "/v1/teams/"+team+"/members/"+id.Format(id.User, ada), nil, as(p.bearer(bob))...).want(204)
		}, true, true, true},
		{"delete the team", func(team, _ string) { p.call("DELETE", "/v1/teams/"+team, nil, asAda...) }, true, true, true},
		{"deactivate the user", func(string, string) {
			p.call("PATCH", "/v1/admin/users/"+id.Format(id.User, ada), map[string]any{"active": false}, admin...).want(200)
			q.call("GET", "/v1/me", nil, asAda...).fails(401, "unauthenticated")
			p.call("PATCH", "/v1/admin/users/"+id.Format(id.User, ada), map[string]any{"active": true}, admin...).want(200)
		}, true, true, true},
		// Access that is revoked and restored before a server looks counts as revoked.
		{"deactivate and activate the user", func(string, string) {
			atOnce("UPDATE users SET active = false WHERE id = $1", "UPDATE users SET active = true WHERE id = $1")
		}, true, true, true},
		{"make an admin, and no longer", func(string, string) {
			atOnce("UPDATE users SET admin = true WHERE id = $1", "UPDATE users SET admin = false WHERE id = $1")
		}, true, true, false},
		{"remove from the team and take back", func(string, string) {
			atOnce("WITH gone AS (DELETE FROM team_members WHERE user_id = $1 RETURNING *) INSERT INTO team_members (team_id, user_id, role) SELECT team_id, user_id, role FROM gone")
		}, true, false, true},
	} {
		p.sql("DELETE FROM team_members WHERE user_id = $1", ada)
		asAda = as(p.bearer(ada))
		team := p.call("POST", "/v1/teams", map[string]any{"name": how.name}, asAda...).want(201).str("id")
		made := p.call("POST", "/v1/keys", map[string]any{"name": "k"}, asAda...).want(201)
		byKey := []string{"X-API-Key", made.str("key")}
		sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, asAda...).want(201)
		terminal, guest := "/v1/sandboxes/"+sandbox.str("id")+"/exec/stream", "8000-"+sandbox.str("id")+".localhost"
		one, two, three := open("", terminal, asAda), open("", terminal, byKey), open(guest, "/ws", byKey)
		// Somebody who used a sandbox may have kept its token.
		own := open(guest, "/ws", []string{"X-Traffic-Token", sandbox.str("traffic_token")})
		how.do(team, made.object()["id"].(string))
		if how.session {
			ended(how.name, one)
		} else {
			goesOn(how.name, one)
		}
		for _, ws := range []*websocket.Conn{two, three} {
			if how.key {
				ended(how.name, ws)
			} else {
				goesOn(how.name, ws)
			}
		}
		if how.token {
			ended(how.name, own)
		} else {
			goesOn(how.name, own)
		}
	}

	// A key expires in use, without a notification: the server notices within a minute,
	// or at the next notification.
	asBob := as(p.bearer(bob))
	p.sql("DELETE FROM team_members WHERE user_id = $1", bob)
	p.call("POST", "/v1/teams", map[string]any{"name": "bob's"}, asBob...).want(201)
	made := p.call("POST", "/v1/keys", map[string]any{"name": "k", "expires_at": time.Now().Add(time.Hour)}, asBob...).want(201)
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, asBob...).want(201).str("id")
	ws := open("", "/v1/sandboxes/"+sandbox+"/exec/stream", []string{"X-API-Key", made.str("key")})
	keyID, err := id.Parse(id.APIKey, made.str("id"))
	if err != nil {
		t.Fatal(err)
	}
	p.sql("UPDATE api_keys SET expires_at = now() WHERE id = $1", keyID)
	ended("expire the key", ws)

	// The database has a key's hash and its visible prefix only.
	key := p.call("POST", "/v1/keys", map[string]any{"name": "k"}, asBob...).want(201).str("key")
	var rows int
	err = p.db().QueryRow(ctx, "SELECT count(*) FROM api_keys k WHERE k::text LIKE '%' || $1 || '%'", key[len("wrn_xxxx"):]).Scan(&rows)
	if err != nil || rows != 0 {
		t.Errorf("%d rows hold a key: %v", rows, err)
	}
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", key).want(200)
	p.end() // A stopping server writes the last uses.
	var used bool
	var prefix string
	err = p.db().QueryRow(ctx, "SELECT prefix, last_used_at > now() - interval '5 minutes' FROM api_keys WHERE hash = sha256($1::text::bytea)", key).Scan(&prefix, &used)
	if err != nil || !used || prefix != key[:8] {
		t.Errorf("key: prefix %q, used: %v; %v", prefix, used, err)
	}
}

// TestCallsToGuestsEnd calls every operation that waits for the sandbox's code interpreter,
// which does not respond: the call ends when the caller's key is revoked.
func TestCallsToGuestsEnd(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	asked := make(chan string)
	p.agent.guest = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case asked <- r.URL.Path:
			<-r.Context().Done()
		case <-r.Context().Done():
		}
	})
	w := p.world()
	n := 0
	for _, o := range operations(t) {
		if !strings.Contains(o.path, "/code") {
			continue
		}
		n++
		for _, c := range callers() {
			if !c.key || c.dead || o.expected(c, targets[0]) != 0 {
				continue
			}
			delete(w.shown, c.name) // makes a new key
			_, path, body, headers := w.compose(o, c, targets[0], n)
			hash := sha256.Sum256([]byte(w.shown[c.name][1]))
			delete(w.shown, c.name)
			answer := p.later(o.method, path, body, headers...)
			await.Recv(t, o.String()+" reaches the guest", asked)
			w.sql("DELETE FROM api_keys WHERE hash = $1", hash[:])
			if r := await.Recv(t, o.String()+" ends", answer); r.Status != http.StatusUnauthorized {
				t.Errorf("%s: %d %s", o, r.Status, r.Body)
			}
			break
		}
	}
	if n < 5 {
		t.Errorf("only %d operations call the code interpreter", n)
	}
}
