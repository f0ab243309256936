package server_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/internal/id"
)

// These tests loop over every operation of the OpenAPI document, so that a new one cannot
// be forgotten.

// anybody reports whether an operation needs no credentials.
func (o operation) anybody() bool { return o.rule.Role == "none" }

// rates are the calls per minute that one address may make to operations without
// credentials, by the operation's tag.
var rates = map[string]int{"login": 30, "service": 600, "hosts": 12000}

// checkRates calls every operation without credentials until it is refused, each from its
// own address.
func checkRates(t *testing.T, p *plane) {
	w := p.world()
	nobody := callers()[0]
	options, err := redis.ParseURL(p.config.RedisURL)
	if err != nil {
		t.Fatal(err)
	}
	client := redis.NewClient(options)
	defer client.Close()
	counts := func() map[string]bool {
		found := make(map[string]bool)
		for _, key := range client.Keys(t.Context(), "rate:*").Val() {
			found[key] = true
		}
		return found
	}
	checked := 0
	for _, o := range operations(t) {
		if !o.anybody() {
			continue
		}
		checked++
		most, ok := rates[o.Tags[0]]
		if !ok {
			t.Errorf("%s: no expected rate for its tag", o)
			continue
		}
		// From here on, the server counts this address's calls for this operation alone
		// if it is a login operation, and for all others together.
		from := 10000 + checked
		before, begun, answered := counts(), time.Now(), 0
		var r response
		call := func() {
			r = w.send(o, nobody, targets[0], from)
			answered++
		}
		if most <= 100 {
			for call(); r.Status != http.StatusTooManyRequests && answered <= 2*most; {
				call()
			}
			// The budget refills gradually.
			if again := int(time.Since(begun).Seconds()*float64(most)/60) + 1; r.Status != http.StatusTooManyRequests || answered <= most || answered > 1+most+again {
				t.Errorf("%s: after %d calls the status is %d; want %d admitted calls, then 429", o, answered, r.Status, most)
				continue
			}
		} else {
			// High rates refill faster than a busy machine calls. Redis stores when the
			// budget will be full again; each call moves that time back.
			key, at := "", 0.
			p.eventually("Redis has the counter", func() bool {
				call()
				for k := range counts() {
					if !before[k] {
						tx := client.TxPipeline() // Otherwise it may be forgotten after a second.
						late := tx.IncrByFloat(t.Context(), k, 30)
						tx.Expire(t.Context(), k, time.Hour)
						_, _ = tx.Exec(t.Context())
						key, at = k, late.Val()
					}
				}
				return at > 60 // The counter has not expired.
			})
			call()
			now, err := client.Get(t.Context(), key).Float64()
			// The server may count some of the caller's next calls together with this one.
			each := 60 / float64(most)
			calls := math.Round((now - at) / each)
			if err != nil || calls < 1 || calls > 16 || math.Abs(now-at-calls*each) > each/10 {
				t.Errorf("%s: a call is counted as %v s of a minute, want %v (%v)", o, now-at, each, err)
			}
			client.IncrByFloat(t.Context(), key, 60)
			for range int(calls) {
				if call(); r.Status == http.StatusTooManyRequests {
					break
				}
			}
			if r.Status != http.StatusTooManyRequests {
				t.Errorf("%s: beyond its rate the status is %d", o, r.Status)
				continue
			}
		}
		r.fails(429, "rate_limited")
		if wait, err := strconv.Atoi(r.Header.Get("Retry-After")); err != nil || wait < 1 || wait > 60 {
			t.Errorf("%s: Retry-After: %q", o, r.Header.Get("Retry-After"))
		}
		if r := w.send(o, nobody, targets[0], from+1000); r.Status == http.StatusTooManyRequests {
			t.Errorf("%s: another address is refused too", o)
		}
	}
	if checked < 15 {
		t.Errorf("only %d operations that anybody may call", checked)
	}
	t.Logf("rates of %d operations that anybody may call", checked)
}

// asked is a call that was made, and what its record must contain.
type asked struct {
	operation
	caller
	response
	id, address string
	// actor is the caller, or "" if only the request's content tells; user created the
	// key, if the caller is one.
	actor, user string
	// teams are those whose logs may have the record.
	teams []string
	// named are the values in the path.
	named []string
}

// fill puts a parameter into a path. It names an object unless its value is one of a few
// fixed words.
func (a *asked) fill(path string, p *openapi3.Parameter, text string) string {
	if len(p.Schema.Value.Enum) == 0 {
		a.named = append(a.named, text)
	}
	return strings.ReplaceAll(path, "{"+p.Name+"}", url.PathEscape(text))
}

// actor returns the caller with these headers: its id on the wire, and the user who
// created it if it is a key.
func (p *plane) actor(headers []string) (actor, user string) {
	p.Helper()
	for i := 0; i < len(headers); i += 2 {
		switch v := headers[i+1]; {
		case headers[i] == "X-API-Key" && v != "":
			var key uuid.UUID
			var maker *uuid.UUID
			hash := sha256.Sum256([]byte(v))
			if p.db().QueryRow(context.Background(), "SELECT id, user_id FROM api_keys WHERE hash = $1", hash[:]).Scan(&key, &maker) != nil {
				return "", ""
			}
			if maker != nil {
				user = id.Format(id.User, *maker)
			}
			return id.Format(id.APIKey, key), user
		case headers[i] == "Authorization":
			var claims struct{ Sub string }
			parts := strings.Split(v, ".")
			raw, err := base64.RawURLEncoding.DecodeString(parts[1])
			if err == nil {
				err = json.Unmarshal(raw, &claims)
			}
			u, bad := uuid.Parse(claims.Sub)
			if err != nil || bad != nil {
				p.Fatalf("token: %v, %v", err, bad)
			}
			return id.Format(id.User, u), ""
		}
	}
	return "", ""
}

// teamsOf returns the teams of a user, or the team of a key.
func (p *plane) teamsOf(actor string) (teams []string) {
	p.Helper()
	u, err := id.Parse(id.User, actor)
	if err != nil {
		u, err = id.Parse(id.APIKey, actor)
	}
	if err != nil {
		return nil
	}
	var of []uuid.UUID
	if err := p.db().QueryRow(context.Background(), "SELECT array(SELECT team_id FROM team_members WHERE user_id = $1 UNION SELECT team_id FROM api_keys WHERE id = $1)", u).Scan(&of); err != nil {
		p.Fatal(err)
	}
	for _, team := range of {
		teams = append(teams, id.Format(id.Team, team))
	}
	return teams
}

// changing reports whether calls of an operation must be recorded.
func (o operation) changing() bool {
	switch o.OperationID {
	case "hostHeartbeat": // It reports no change.
		return false
	case "execStream", "finishGitHub": // Browsers use GET for them.
		return true
	}
	return o.method != http.MethodGet && !o.rule.Read
}

// actors are the kinds of actors, by the prefix of their ids.
var actors = map[string]string{"usr": "user", "key": "key", "hst": "host", "anonymous": "anonymous"}

// kinds are the kinds of objects with ids.
var kinds = map[string]id.Kind{
	"sandbox": id.Sandbox, "team": id.Team, "user": id.User, "host": id.Host, "template": id.Template, "build": id.Build, "key": id.APIKey, "channel": id.Channel,
}

// outcomes counts an operation's successful and refused calls.
type outcomes struct{ done, refused int }

// checkRecords checks that every changing call has one record with the actor, the object,
// the address and the outcome, and that no other call has one. It returns the outcomes by
// operation.
func checkRecords(t *testing.T, p *plane, all []asked) map[string]outcomes {
	type record struct {
		Action, Actor, Address, Object, Result, Code string
		ActorKind                                    string `json:"actor_kind"`
		ObjectKind                                   string `json:"object_kind"`
		RequestID                                    string `json:"request_id"`
		UserID                                       string `json:"user_id"`
		TeamID                                       string `json:"team_id"`
		Count                                        int64
	}
	written := make(map[string][]record)
	counted, refused := make(map[string]int64), make(map[string]int64) // by actor, action and code
	for line := range bytes.Lines(p.call("GET", "/v1/admin/audit?format=ndjson", nil).want(200).Body) {
		var r record
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		written[r.RequestID] = append(written[r.RequestID], r)
		if r.Result == "refused" {
			counted[r.Actor+" "+r.Action+" "+r.Code] += r.Count
		}
	}
	of := make(map[string]outcomes)
	for _, a := range all {
		got := written["ext-"+a.id] // as a client sent it
		known := a.Status != http.StatusUnauthorized && a.actor != ""
		if !a.changing() || !known && !a.anybody() {
			if len(got) != 0 {
				t.Errorf("%s as %s, status %d, has the record: %+v", a.operation, a.caller.name, a.Status, got)
			}
			continue
		}
		kind, _, _ := strings.Cut(a.actor, "-")
		want := record{Action: a.OperationID, Address: a.address, RequestID: "ext-" + a.id, Actor: a.actor, UserID: a.user, ActorKind: actors[kind], Result: "ok"}
		if a.Status >= 400 {
			var body struct{ Error struct{ Code string } }
			_ = json.Unmarshal(a.Body, &body)
			want.Result, want.Code = "refused", body.Error.Code
		}
		if a.Status >= 500 {
			want.Result = "failed"
		}
		if a.OperationID == "finishGitHub" && strings.Contains(a.Header.Get("Location"), "login_error") {
			want.Result, want.Code = "refused", a.Header.Get("Location")[strings.LastIndex(a.Header.Get("Location"), "=")+1:]
		}
		o := of[a.OperationID]
		if want.Result == "ok" {
			o.done++
		} else {
			o.refused++
		}
		of[a.OperationID] = o
		if want.Result == "refused" {
			if known {
				refused[want.Actor+" "+want.Action+" "+want.Code]++
			}
			if len(got) == 0 {
				continue // An earlier record counts it.
			}
		}
		if len(got) != 1 {
			t.Errorf("%s as %s, status %d: %d records", a.operation, a.caller.name, a.Status, len(got))
			continue
		}
		r := got[0]
		// A created object's id is in the response; otherwise the record names the last
		// object of the path.
		object := ""
		if at := a.Header.Get("Location"); at != "" && a.OperationID != "finishGitHub" {
			object = at[strings.LastIndex(at, "/")+1:]
		} else if len(a.named) > 0 {
			object = a.named[len(a.named)-1]
			if len(a.named) > 1 && (strings.Contains(a.path, "/tags/") || strings.Contains(a.path, "/contexts/")) {
				object = strings.Join(a.named, "/") // A tag needs its template.
			}
		}
		if object != "" && r.Object != object {
			t.Errorf("%s as %s: the record is about %q, want %q", a.operation, a.caller.name, r.Object, object)
		}
		made := !a.anybody() && (a.Status == http.StatusCreated || a.Status == http.StatusAccepted)
		if r.ObjectKind == "" || made && r.Object == "" {
			t.Errorf("%s as %s: the record names no object", a.operation, a.caller.name)
		}
		var said struct{ ID, Name string }
		_ = json.Unmarshal(a.Body, &said)
		for kind, prefix := range kinds {
			if made && strings.HasPrefix(said.ID, string(prefix)) && r.Object != said.ID && r.Object != said.Name {
				t.Errorf("%s as %s created %s, but the record is about %q", a.operation, a.caller.name, said.ID, r.Object)
			}
			if strings.HasPrefix(r.Object, string(prefix)) && !strings.Contains(r.Object, "/") && r.ObjectKind != kind {
				t.Errorf("%s as %s: %s is recorded as a %s", a.operation, a.caller.name, r.Object, r.ObjectKind)
			}
		}
		// Members read their teams' logs; only its admins read the platform's.
		switch platform := strings.HasPrefix(a.path, "/v1/admin/"); {
		case r.TeamID == "" && !platform && r.ActorKind == "key":
			t.Errorf("%s as %s: the record is in no team's log", a.operation, a.caller.name)
		case r.TeamID != "" && (platform || !slices.Contains(a.teams, r.TeamID)):
			t.Errorf("%s as %s: the record is in the log of %s, want one of %v", a.operation, a.caller.name, r.TeamID, a.teams)
		}
		r.Object, r.ObjectKind, r.TeamID, r.Count = "", "", "", 0
		if a.actor == "" {
			want.Actor, want.ActorKind, want.UserID = r.Actor, r.ActorKind, r.UserID
		}
		if r != want {
			t.Errorf("%s as %s, status %d: record %+v, want %+v", a.operation, a.caller.name, a.Status, r, want)
		}
	}
	for what, n := range refused {
		if counted[what] != n {
			t.Errorf("%s was refused %d times, but has %d records", what, n, counted[what])
		}
	}
	return of
}

// checkChanges checks the records of a walk. It also checks that the walk got each
// changing operation refused, and that it succeeded either in the walk or in elsewhere.
func checkChanges(t *testing.T, p *plane, all []asked) {
	of := checkRecords(t, p, all)
	checked := 0
	for _, o := range operations(t) {
		if !o.changing() {
			continue
		}
		n := of[o.OperationID]
		checked += n.done + n.refused
		if n.refused == 0 && !o.anybody() {
			t.Errorf("%s was never refused", o)
		}
		if (n.done > 0) == (elsewhere[o.OperationID] != nil) {
			t.Errorf("%s succeeded %d times in the walk; in elsewhere: %v", o, n.done, elsewhere[o.OperationID] != nil)
		}
	}
	t.Logf("audit: %d calls of %d changing operations have their records", checked, len(of))
	if checked < 1500 {
		t.Errorf("only %d records", checked)
	}
}

// checkOrigins calls every changing operation as a browser does for another site's page,
// with its user's cookies. All calls are refused, and nothing changes. n is the number of
// its first call.
func checkOrigins(t *testing.T, p *plane, n int) {
	w := p.world()
	before := w.state()
	cookies := func(token string, more ...string) func(*world) []string {
		return func(*world) []string {
			return append([]string{"X-API-Key", "", "Cookie", "wrenn_access=" + token}, more...)
		}
	}
	owner, staff, loner := w.bearer(w.teams[ours].owner), w.bearer(w.staff), w.bearer(w.loner)
	checked := 0
	for _, o := range operations(t) {
		if o.method == http.MethodGet && o.OperationID != "execStream" {
			continue
		}
		checked++
		token := owner
		if o.rule.Role == "platform" {
			token = staff
		}
		for _, header := range [][]string{
			{"Origin", "https://evil.example"},
			{"Origin", "null"},
			{"Origin", "http://8000-" + w.teams[ours].wireSandbox + ".localhost:8000"},
			{"Sec-Fetch-Site", "cross-site"},
			{"Sec-Fetch-Site", "same-site", "Origin", "http://other.localhost:8000"},
		} {
			if o.OperationID == "execStream" && header[0] != "Origin" {
				continue // Browsers send the origin of every WebSocket.
			}
			n++
			r := w.send(o, caller{name: o.OperationID + strings.Join(header, "="), show: cookies(token, header...)}, targets[0], n)
			if r.Status != http.StatusForbidden || !strings.Contains(string(r.Body), "origin not allowed") {
				t.Errorf("%s by a page with %v: %d %s", o, header, r.Status, r.Body)
			}
		}
		// The service's own pages may call them.
		n++
		r := w.send(o, caller{name: o.OperationID + " of ours", show: cookies(loner, "Origin", "http://localhost:8000", "Sec-Fetch-Site", "same-origin")}, targets[0], n)
		if strings.Contains(string(r.Body), "origin not allowed") {
			t.Errorf("%s by a page of the service's: %d %s", o, r.Status, r.Body)
		}
	}
	if after := w.state(); after != before {
		t.Errorf("another site's page changed something: before\n%s\n\nafter\n%s", before, after)
	}
	if checked < 50 {
		t.Errorf("only %d operations", checked)
	}
	t.Logf("origins: %d operations refuse other sites' pages", checked)
}
