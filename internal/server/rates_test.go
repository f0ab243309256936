package server_test

import (
	"context"
	"log/slog"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
	"github.com/wrenn-dev/wrenn/internal/server/rest"
)

// TestRates calls every operation with a rate per principal more often than its class
// allows. The call after that is refused, and says when to retry.
func TestRates(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.Rates = rest.Rates{Read: 1, Change: 1, Expensive: 1, Outgoing: 1}
	p.start()
	w := p.world()
	all, n := callers(), 0
	for _, o := range operations(t) {
		if !slices.Contains([]string{"read", "change", "expensive", "outgoing"}, o.rule.Rate) {
			t.Errorf("%s has no class: say rate in x-wrenn-access", o)
		}
		if o.rule.Read != (o.rule.Rate == "read") {
			t.Errorf("%s: read is %v, its class %q", o, o.rule.Read, o.rule.Rate)
		}
		if o.rule.Role == "none" {
			continue // Its rate is per address, see TestLimits.
		}
		for _, c := range all {
			if c.dead || o.expected(c, targets[0]) != 0 {
				continue
			}
			n++
			w.compose(o, c, targets[0], n) // This creates the caller's credentials.
			w.spend(w.shown[c.name], o.rule.Rate)
			r := w.send(o, c, targets[0], n)
			if r.Status != http.StatusTooManyRequests || r.Header.Get("Retry-After") == "" {
				t.Errorf("%s as %s: %d %s", o, c.name, r.Status, r.Body)
			}
			break
		}
	}
	if n < 90 {
		t.Errorf("only %d operations were called", n)
	}
}

// TestRefusedCallsCount checks that calls refused for lack of permission count too.
func TestRefusedCallsCount(t *testing.T) {
	p := newPlane(t)
	p.end()
	p.config.Rates = rest.Rates{Expensive: 3}
	p.start()
	w := p.world()
	shown := keyOf(func(w *world) uuid.UUID { return w.teams[ours].owner }, "1 hour", "read-only")(w)
	for range 3 {
		p.call("POST", "/v1/sandboxes", map[string]any{}, shown...).fails(403, "permission_denied")
	}
	p.call("POST", "/v1/sandboxes", map[string]any{}, shown...).fails(429, "rate_limited")
}

// spend counts calls of a class without making them.
func (w *world) spend(headers []string, class string) {
	w.Helper()
	actor, _ := w.actor(headers)
	var of uuid.UUID
	for _, kind := range []id.Kind{id.User, id.APIKey} {
		if u, err := id.Parse(kind, actor); err == nil {
			of = u
		}
	}
	options, err := redis.ParseURL(w.redis.url)
	if err != nil {
		w.Fatal(err)
	}
	client := redis.NewClient(options)
	defer client.Close()
	// The server may have counted before.
	_ = ratelimit.New(client, slog.New(slog.DiscardHandler)).Allow(context.Background(), ratelimit.Limit{Name: "calls:" + class, Burst: 1, Per: time.Minute}, of.String())
}

// TestRatesOfOwner checks that an owner may make no more calls by having more teams and
// keys, and that other owners' calls are not refused.
func TestRatesOfOwner(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	keys := p.ownerOf(3, "ada@example.com")
	other := p.ownerOf(1, "bob@example.com")[0]
	for _, team := range keys[:3:3] {
		for range 4 {
			key, hash := newKey()
			p.sql("INSERT INTO api_keys (id, team_id, user_id, name, prefix, hash) SELECT $1, team_id, user_id, 'k', 'wrn_', $2 FROM api_keys WHERE hash = sha256(convert_to($3, 'UTF8'))", uuid.New(), hash, team)
			keys = append(keys, key)
		}
	}
	p.end()
	p.config.Rates = rest.Rates{Read: 1, Change: 1, Expensive: 1, Outgoing: 1}
	p.start()
	admitted := func(method, path string, body any) (n int) {
		for _, key := range keys { // each of them may make a call
			switch r := p.call(method, path, body, "X-API-Key", key); {
			case r.Status != http.StatusTooManyRequests:
				n++
			case r.Header.Get("Retry-After") == "":
				t.Errorf("%s %s: no Retry-After", method, path)
			}
		}
		if r := p.call(method, path, body, "X-API-Key", other); r.Status == http.StatusTooManyRequests {
			t.Errorf("another owner's %s %s: %d %s", method, path, r.Status, r.Body)
		}
		return n
	}
	// While they come, the limits forget some of the calls.
	begun := time.Now()
	n := admitted("GET", "/v1/sandboxes", nil)
	if most := 11 + int(time.Since(begun)/(6*time.Second)); len(keys) != 15 || n < 10 || n > most {
		t.Errorf("%d of %d calls that read were admitted, want 10", n, len(keys))
	}
	begun = time.Now()
	body := map[string]any{"name": "n", "kind": "webhook", "url": "https://hooks.example.com/x", "secret": "0123456789abcdef", "events": []string{"sandbox.lost"}}
	n = admitted("POST", "/v1/channels", body)
	if most := 2 + int(time.Since(begun)/time.Minute); n < 1 || n > most {
		t.Errorf("%d outgoing calls were admitted, want 1", n)
	}
}
