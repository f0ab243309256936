package server_test

import (
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/server"
)

// TestRotateSecret rotates WRENN_SECRET_KEY in steps. Sandboxes' tokens, a host's token,
// a login and sealed values stay valid.
func TestRotateSecret(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	one, two, three := strings.Repeat("ab", 32), strings.Repeat("cd", 32), strings.Repeat("ef", 32)
	p.agent.guest = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	admin := p.bearerOf("admin@example.com")
	access, refresh := p.login("admin@example.com", "correct horse")
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	host := p.enroll("far")
	channel := p.call("POST", "/v1/channels", map[string]any{
		"name": "c", "kind": "webhook", "url": "https://example.com/hook", "secret": "sixteen characters", "events": []string{"sandbox.lost"},
	}).want(201).str("id")
	check := func(when string) {
		t.Helper()
		for _, token := range []string{admin, access} {
			if r := p.call("GET", "/v1/me", nil, as(token)...); r.Status != 200 {
				t.Errorf("%s: a login: %d %s", when, r.Status, r.Body)
			}
		}
		for port, header := range map[string][]string{"80": {"X-Traffic-Token", sandbox.str("traffic_token")}, "49983": {"X-Access-Token", sandbox.str("access_token")}} {
			r, err := p.try("GET", "/health", nil, append([]string{"Host", port + "-" + sandbox.str("id") + ".localhost", "X-API-Key", ""}, header...)...)
			if err != nil || r.Status != http.StatusTeapot {
				t.Errorf("%s: port %s: %d, %v", when, port, r.Status, err)
			}
		}
		if r := p.call("POST", "/v1/hosts/heartbeat", map[string]any{"status": report()}, "Authorization", "Bearer "+host.token); r.Status != 200 {
			t.Errorf("%s: a host: %d %s", when, r.Status, r.Body)
		}
		// Changing a sealed value requires opening it.
		if r := p.call("PATCH", "/v1/channels/"+channel, map[string]any{"url": "https://example.com/" + when}); r.Status != 200 {
			t.Errorf("%s: a channel: %d %s", when, r.Status, r.Body)
		}
	}
	restart := func(keys string) {
		t.Helper()
		p.end()
		p.config.SecretKey = keys
		p.start()
	}
	refused := func(keys, says string) {
		t.Helper()
		p.end()
		c := p.config
		c.SecretKey, c.Log = keys, slog.New(slog.DiscardHandler)
		s, err := server.New(t.Context(), c)
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), keys) {
			t.Errorf("with %.4s…: %v", keys, err)
		}
	}
	check("before")
	restart(two + "," + one)
	check("both")
	restart(one + "," + two) // a server with the keys in another order
	check("turned")
	restart(two + ", " + one)
	restart(two)
	check("after")
	refused(one, "lacks the key")
	refused(three, "lacks the key")
	restart(three + "," + two)
	restart(three)
	check("again")
	if r := p.call("POST", "/v1/auth/refresh", map[string]any{"refresh_token": refresh}, nobody...); r.Status != 200 {
		t.Errorf("a refresh token: %d %s", r.Status, r.Body)
	}
	// No key is stored in clear text.
	var found int
	if err := p.db().QueryRow(t.Context(), "SELECT count(*) FROM installation_secret WHERE encode(sealed, 'hex') LIKE ANY (ARRAY['%' || $1 || '%', '%' || $2 || '%', '%' || $3 || '%'])", one, two, three).Scan(&found); err != nil || found != 0 {
		t.Errorf("%d rows have a key, %v", found, err)
	}
}

// TestSecretOfEarlierRelease checks that an installation from before the database kept a
// secret keeps using its key.
func TestSecretOfEarlierRelease(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.sql("DELETE FROM installation_secret") // as the previous release left it
	p.start()                                // uses its only key as the secret
	before := p.call("POST", "/v1/sandboxes", map[string]any{}).want(201)
	p.end()
	p.sql("DELETE FROM installation_secret")
	p.config.SecretKey = strings.Repeat("cd", 32) + "," + p.config.SecretKey // upgraded and rotated at once
	p.start()
	after := p.call("GET", "/v1/sandboxes/"+before.str("id"), nil).want(200)
	if after.str("traffic_token") != before.str("traffic_token") {
		t.Error("a token from before the upgrade is lost")
	}
}
