package server_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/mail/mailtest"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
)

const password = "correct horse battery"

// sql runs a statement on the plane's database.
func (p *plane) sql(query string, args ...any) {
	p.Helper()
	if _, err := p.db().Exec(context.Background(), query, args...); err != nil {
		p.Fatalf("%s: %v", query, err)
	}
}

func (p *plane) db() *pgx.Conn {
	p.Helper()
	if p.conn == nil {
		p.conn = pgtest.Connect(p, p.config.DatabaseURL)
	}
	return p.conn
}

// person creates an account without a password.
func (p *plane) person(email string) uuid.UUID {
	p.Helper()
	u := uuid.New()
	p.sql("INSERT INTO users (id, email, verified_at) VALUES ($1, $2, now())", u, email)
	return u
}

// ownerOf creates a user who owns the given number of teams, and returns a key of each
// team.
func (p *plane) ownerOf(teams int, email string) (keys []string) {
	p.Helper()
	p.person(email)
	who := as(p.bearerOf(email))
	for range teams {
		team := p.call("POST", "/v1/teams", map[string]any{"name": "t"}, who...).want(201).str("id")
		keys = append(keys, p.call("POST", "/v1/keys", map[string]any{"name": "k"}, append(who, "X-Team", team)...).want(201).str("key"))
	}
	return keys
}

// bearer logs a user in without the password.
func (p *plane) bearer(user uuid.UUID) string {
	p.Helper()
	if p.sessions == nil {
		s, err := store.Open(context.Background(), p.config.DatabaseURL)
		if err != nil {
			p.Fatal(err)
		}
		p.Cleanup(s.Close)
		p.sessions = func(user uuid.UUID) string {
			ring, err := auth.ParseRing(p.config.SecretKey)
			if err != nil {
				p.Fatal(err)
			}
			secret, err := ring.Secret(context.Background(), s)
			if err != nil {
				p.Fatal(err)
			}
			sessions := auth.NewSessions(s, secret, slog.Default())
			var g auth.Grant
			err = s.InTx(context.Background(), func(q *db.Queries) (err error) {
				g, err = sessions.Start(context.Background(), q, user, "test", "")
				return err
			})
			if err != nil {
				p.Fatal(err)
			}
			return g.Access
		}
	}
	return p.sessions(user)
}

// as returns the headers that authenticate call with a token.
func as(token string, more ...string) []string {
	return append([]string{"X-API-Key", "", "Authorization", "Bearer " + token}, more...)
}

var nobody = []string{"X-API-Key", ""}

// login logs in with a password and returns the access and the refresh token.
func (p *plane) login(email, password string) (access, refresh string) {
	p.Helper()
	r := p.call("POST", "/v1/auth/login", map[string]any{"email": email, "password": password, "tokens": true}, nobody...).want(200)
	return r.str("access_token"), r.str("refresh_token")
}

func TestAccounts(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	messages := p.mailed()
	signUp := map[string]any{"email": "ada@example.com", "password": password}
	if m := p.call("GET", "/v1/auth/methods", nil, nobody...).want(200).object(); m["signup_open"] != false || m["github"] != false {
		t.Errorf("methods: %v", m)
	}
	p.call("POST", "/v1/auth/signup", signUp, nobody...).fails(403, "permission_denied")
	admin, _ := p.login("admin@example.com", "correct horse")
	p.call("PUT", "/v1/admin/settings", map[string]any{"signup_open": true, "default_quota": map[string]any{"max_running": 3}}, as(admin)...).want(200)
	p.call("POST", "/v1/auth/signup", map[string]any{"email": "ada@example.com", "password": "short"}, nobody...).fails(400, "invalid_argument")

	// A browser gets its tokens in cookies that no script can read.
	p.call("POST", "/v1/auth/signup", signUp, append(nobody, "Origin", "http://localhost:8000")...).want(202)
	stale := p.linked(messages(), "verify")
	p.call("POST", "/v1/auth/login", signUp, nobody...).fails(403, "permission_denied")
	p.linked(messages(), "verify") // A login sends another link.
	p.call("POST", "/v1/auth/login", map[string]any{"email": "ada@example.com", "password": "wrong"}, nobody...).fails(401, "unauthenticated")
	// An unconfirmed account belongs to whoever signs up last.
	p.call("POST", "/v1/auth/signup", map[string]any{"email": "Ada@example.com", "password": "a stranger's"}, nobody...).want(202)
	strange := p.linked(messages(), "verify")
	p.call("POST", "/v1/auth/signup", signUp, nobody...).want(202)
	link := p.linked(messages(), "verify")
	for _, c := range []struct{ token, password string }{{stale, password}, {strange, "a stranger's"}, {link, "a stranger's"}, {link + "x", password}, {"", password}} {
		p.call("POST", "/v1/auth/verify", map[string]any{"token": c.token, "password": c.password}, nobody...).fails(401, "unauthenticated")
	}
	r := p.call("POST", "/v1/auth/verify", map[string]any{"token": link, "password": password}, append(nobody, "Origin", "http://localhost:8000")...).want(200)
	p.call("POST", "/v1/auth/verify", map[string]any{"token": link, "password": password}, nobody...).fails(401, "unauthenticated")
	if r.str("access_token") != "" || r.str("refresh_token") != "" {
		t.Error("a response to a browser has tokens in its body")
	}
	cookies := (&http.Response{Header: r.Header}).Cookies()
	if len(cookies) != 2 {
		t.Fatalf("cookies: %v", r.Header["Set-Cookie"])
	}
	var jar []string
	for _, c := range cookies {
		if !c.HttpOnly || c.SameSite != http.SameSiteStrictMode || c.Path != "/" || c.Domain != "" || c.MaxAge <= 0 {
			t.Errorf("cookie %+v", c)
		}
		jar = append(jar, c.Name+"="+c.Value)
	}
	cookie := []string{"X-API-Key", "", "Cookie", strings.Join(jar, "; ")}
	me := p.call("GET", "/v1/me", nil, cookie...).want(200).object()
	if me["email"] != "ada@example.com" || me["admin"] != false || me["has_password"] != true || len(me["teams"].([]any)) != 1 {
		t.Errorf("me: %v", me)
	}
	// Only a mail to the address tells whether it has an account.
	p.call("POST", "/v1/auth/signup", map[string]any{"email": "ADA@example.com", "password": "a stranger's"}, nobody...).want(202)
	if message := messages(); strings.Contains(message, "token=") || !strings.Contains(message, "has an account") {
		t.Errorf("mail to somebody who has an account:\n%s", message)
	}

	// A page of another site cannot use the cookies.
	for _, headers := range [][]string{{"Origin", "http://evil.example"}, {"Origin", "null"}, {"Sec-Fetch-Site", "cross-site"}, {"Sec-Fetch-Site", "same-site"}} {
		p.call("POST", "/v1/teams", map[string]any{"name": "x"}, append(cookie, headers...)...).fails(403, "permission_denied")
		p.call("POST", "/v1/auth/login", signUp, append(nobody, headers...)...).fails(403, "permission_denied")
	}
	p.call("POST", "/v1/teams", map[string]any{"name": "second"}, append(cookie, "Sec-Fetch-Site", "same-origin")...).want(201)
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, append(cookie, "Origin", p.http.URL)...).want(201).str("id")
	for origin, want := range map[string]int{"http://evil.example": 403, "http://localhost:8000": 101} {
		ws, res, err := websocket.Dial(context.Background(), p.http.URL+"/v1/sandboxes/"+sandbox+"/exec/stream", &websocket.DialOptions{HTTPHeader: http.Header{"Cookie": {cookie[3]}, "Origin": {origin}}})
		if res == nil || res.StatusCode != want {
			t.Errorf("WebSocket from %s: %v, %v; want %d", origin, res, err, want)
		}
		if err == nil {
			ws.CloseNow()
		}
	}

	// A refresh token can be used once.
	access, refresh := p.login("ada@example.com", password)
	other, _ := p.login("Ada@Example.com", password)
	next := p.call("POST", "/v1/auth/refresh", map[string]any{"refresh_token": refresh}, nobody...).want(200)
	p.call("POST", "/v1/auth/refresh", map[string]any{"refresh_token": refresh}, nobody...).fails(409, "conflict")
	p.call("GET", "/v1/me", nil, as(access)...).want(200)
	p.sql("UPDATE sessions SET rotated_at = rotated_at - interval '11 seconds'")
	p.call("POST", "/v1/auth/refresh", map[string]any{"refresh_token": refresh}, nobody...).fails(401, "unauthenticated")
	for _, token := range []string{access, next.str("access_token")} {
		p.call("GET", "/v1/me", nil, as(token)...).fails(401, "unauthenticated")
	}
	p.call("POST", "/v1/auth/refresh", map[string]any{"refresh_token": next.str("refresh_token")}, nobody...).fails(401, "unauthenticated")
	p.call("GET", "/v1/me", nil, as(other)...).want(200)
	for _, forged := range []string{"", "wrr_", "x", other, other[:len(other)-2] + "AA", strings.Join(append([]string{base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`))}, strings.Split(other, ".")[1], ""), ".")} {
		if len(forged) <= 256 {
			p.call("POST", "/v1/auth/refresh", map[string]any{"refresh_token": forged}, nobody...).fails(401, "unauthenticated")
		}
		if forged != other {
			p.call("GET", "/v1/me", nil, as(forged)...).fails(401, "unauthenticated")
		}
	}
	if p.call("POST", "/v1/auth/refresh", nil, append(cookie, "Origin", "http://localhost:8000")...).want(200); len(p.call("POST", "/v1/auth/refresh", nil, cookie...).fails(409, "conflict").Header["Set-Cookie"]) != 0 {
		t.Error("a second window's cookies are changed")
	}

	// A new password ends the user's other sessions.
	third, _ := p.login("ada@example.com", password)
	p.call("POST", "/v1/auth/password", map[string]any{"current_password": "wrong", "new_password": password + "!"}, as(third)...).fails(403, "permission_denied")
	p.call("POST", "/v1/auth/password", map[string]any{"current_password": password, "new_password": password + "!"}, as(third)...).want(204)
	p.call("GET", "/v1/me", nil, as(third)...).want(200)
	p.call("GET", "/v1/me", nil, as(other)...).fails(401, "unauthenticated")
	p.call("GET", "/v1/me", nil, cookie...).fails(401, "unauthenticated")
	p.call("POST", "/v1/auth/login", map[string]any{"email": "ada@example.com", "password": password}, nobody...).fails(401, "unauthenticated")

	fourth, _ := p.login("ada@example.com", password+"!")
	p.call("POST", "/v1/auth/logout", nil, as(fourth)...).want(204)
	p.call("GET", "/v1/me", nil, as(fourth)...).fails(401, "unauthenticated")
	p.call("GET", "/v1/me", nil, as(third)...).want(200)
	p.call("POST", "/v1/auth/logout-all", nil, as(third)...).want(204)
	p.call("GET", "/v1/me", nil, as(third)...).fails(401, "unauthenticated")
	p.recorded(me["id"].(string), "verifyEmail ok", "logIn ok", "refresh ok", "changePassword ok", "changePassword refused", "logOut ok", "logOutAll ok")
	// The database has none of the secrets.
	for _, secret := range []string{refresh, next.str("refresh_token")} {
		var n int
		if err := p.db().QueryRow(context.Background(), "SELECT count(*) FROM sessions s WHERE s::text LIKE '%' || $1 || '%'", secret).Scan(&n); err != nil || n != 0 {
			t.Errorf("%d sessions hold a token: %v", n, err)
		}
	}
}

// recorded checks that there are audit records of a user's actions, successful or not.
func (p *plane) recorded(user string, what ...string) {
	p.Helper()
	found := make(map[string]bool)
	for _, r := range p.call("GET", "/v1/admin/audit?limit=1000&actor="+user, nil).want(200).list("records") {
		r := r.(map[string]any)
		if r["actor"] == user && r["actor_kind"] == "user" && r["address"] == "127.0.0.1" {
			found[fmt.Sprint(r["action"], " ", r["result"])] = true
		}
	}
	for _, w := range what {
		if !found[w] {
			p.Errorf("there is no record of %q by %s, only of %v", w, user, found)
		}
	}
}

func TestGuessing(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	guess := map[string]any{"email": "Admin@example.com", "password": "wrong"}
	// All at once: the server counts a try before it checks the password.
	refused := func() (n int) {
		t.Helper()
		answers := make(chan response, 14)
		var wg sync.WaitGroup
		for range cap(answers) {
			wg.Go(func() {
				r, err := p.try("POST", "/v1/auth/login", guess, nobody...)
				if err != nil {
					t.Error(err)
				}
				answers <- r
			})
		}
		wg.Wait()
		close(answers)
		for r := range answers {
			if r.Status == 429 {
				n++
				r.fails(429, "rate_limited")
			} else {
				r.fails(401, "unauthenticated")
			}
		}
		return n
	}
	if n := refused(); n != 4 {
		t.Errorf("%d of 14 guesses at once were refused, want 4", n)
	}
	// The account's owner can still log in from another network.
	right := map[string]any{"email": "admin@example.com", "password": "correct horse"}
	p.call("POST", "/v1/auth/login", right, append(nobody, "X-Forwarded-For", "203.0.113.99")...).want(200)
	p.call("POST", "/v1/auth/login", right, nobody...).fails(429, "rate_limited")
	p.call("POST", "/v1/auth/login", guess, append(nobody, "X-Forwarded-For", "2001:db8::1")...).fails(401, "unauthenticated")
	// The limit per address counts across accounts. X-Forwarded-For comes from the front
	// door on this machine.
	limited := 0
	for i := range 40 {
		r := p.call("POST", "/v1/auth/refresh", map[string]any{"refresh_token": "x"}, append(nobody, "X-Forwarded-For", "203.0.113.7, 127.0.0.1")...)
		if r.Status == 429 {
			limited++
		} else if i < 30 && r.Status != 401 {
			t.Errorf("try %d: %d", i, r.Status)
		}
	}
	if limited < 5 {
		t.Errorf("%d of 40 tries from one address were refused", limited)
	}
	p.call("POST", "/v1/auth/refresh", map[string]any{"refresh_token": "x"}, append(nobody, "X-Forwarded-For", "203.0.113.8")...).fails(401, "unauthenticated")
	checkRates(t, p)
	// Without Redis, a server keeps its own counts.
	p.redis.stop()
	if n := refused(); n != 4 {
		t.Errorf("without Redis %d of 14 guesses at once were refused, want 4", n)
	}
}

// TestTakeOver checks that nobody can fill another user's quota by making them a team's
// owner. The next owner takes the team over; the first cannot hand it over.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	ada, bob, eve := p.person("ada@example.com"), p.person("bob@example.com"), p.person("eve@example.com")
	asAda, asBob, asEve := as(p.bearer(ada)), as(p.bearer(bob)), as(p.bearer(eve))
	team := p.call("POST", "/v1/teams", map[string]any{"name": "one"}, asAda...).want(201).str("id")
	base := "/v1/teams/" + team
	member := func(u uuid.UUID) string { return base + "/members/" + id.Format(id.User, u) }
	for _, email := range []string{"bob@example.com", "eve@example.com"} {
		p.call("POST", base+"/members", map[string]any{"email": email, "role": "owner"}, asAda...).want(201)
	}
	p.call("POST", base+"/leave", nil, asAda...).fails(409, "conflict")
	p.call("PATCH", member(ada), map[string]any{"role": "admin"}, asAda...).fails(409, "conflict")
	p.call("DELETE", member(ada), nil, asEve...).fails(409, "conflict") // Bob would be next.
	p.call("PATCH", member(ada), map[string]any{"role": "member"}, asBob...).want(200)
	// A member who was there before the owner does not become the first owner either.
	p.call("PATCH", member(ada), map[string]any{"role": "owner"}, asBob...).fails(409, "conflict")
	p.call("POST", base+"/leave", nil, asEve...).want(204)
}

func TestKeys(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	admin := as(p.bearerOf("admin@example.com"))
	make := func(body map[string]any) string {
		t.Helper()
		body["name"] = "k"
		return p.call("POST", "/v1/keys", body, admin...).want(201).str("key")
	}
	sandbox := p.create(map[string]any{})
	read := make(map[string]any{"scopes": []string{"read-only"}})
	sb := p.call("GET", "/v1/sandboxes/"+sandbox, nil, "X-API-Key", read).want(200).object()
	if sb["access_token"] != nil || sb["traffic_token"] != nil {
		t.Error("a read-only key is shown the sandbox's tokens")
	}
	p.call("DELETE", "/v1/sandboxes/"+sandbox, nil, "X-API-Key", read).fails(403, "permission_denied")
	p.call("GET", "/", nil, "Host", "8000-"+sandbox+".localhost", "X-API-Key", read).fails(403, "permission_denied")
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", make(map[string]any{"scopes": []string{"templates"}})).fails(403, "permission_denied")
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", make(map[string]any{"scopes": []string{"sandboxes"}})).want(200)
	p.call("POST", "/v1/keys", map[string]any{"name": "late", "expires_at": time.Now().Add(-time.Minute)}, admin...).fails(400, "invalid_argument")
	short := make(map[string]any{"expires_at": time.Now().Add(time.Hour)})
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", short).want(200)
	p.sql("UPDATE api_keys SET expires_at = now() WHERE expires_at IS NOT NULL")
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", short).fails(401, "unauthenticated")
	keys := p.call("GET", "/v1/keys?limit=2", nil, admin...).want(200)
	if strings.Contains(string(keys.Body), read) || len(keys.list("keys")) != 2 || keys.str("next_cursor") == "" {
		t.Errorf("keys: %s", keys.Body)
	}
	rest := p.call("GET", "/v1/keys?limit=100&cursor="+keys.str("next_cursor"), nil, admin...).want(200).list("keys")
	if len(rest) != 3 {
		t.Errorf("the second page has %d keys", len(rest))
	}
	first := rest[len(rest)-1].(map[string]any)
	p.call("DELETE", "/v1/keys/"+first["id"].(string), nil, admin...).want(204)
	p.call("GET", "/v1/sandboxes", nil).fails(401, "unauthenticated")
	p.call("DELETE", "/v1/keys/"+first["id"].(string), nil, admin...).fails(404, "not_found")
}

// bearerOf is bearer for the account with an address.
func (p *plane) bearerOf(email string) string {
	p.Helper()
	var u uuid.UUID
	if err := p.db().QueryRow(context.Background(), "SELECT id FROM users WHERE email = $1", email).Scan(&u); err != nil {
		p.Fatal(err)
	}
	return p.bearer(u)
}

func TestAdmin(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	admin := as(p.bearerOf("admin@example.com"))
	made := p.call("POST", "/v1/admin/users", map[string]any{"email": "ada@example.com"}, admin...).want(201)
	ada := made.object()["user"].(map[string]any)["id"].(string)
	_, token, _ := strings.Cut(made.str("reset_url"), "#token=")
	p.call("POST", "/v1/auth/password/reset", map[string]any{"token": token, "password": password}, nobody...).want(204)
	p.call("POST", "/v1/auth/password/reset", map[string]any{"token": token, "password": password}, nobody...).fails(401, "unauthenticated")
	access, _ := p.login("ada@example.com", password)
	key := p.call("POST", "/v1/keys", map[string]any{"name": "k"}, as(access)...).want(201).str("key")
	p.call("POST", "/v1/keys", map[string]any{"name": "k", "scopes": []string{"platform"}}, as(access)...).fails(403, "permission_denied")
	p.call("GET", "/v1/admin/users", nil, "X-API-Key", key).fails(403, "permission_denied")
	if n := len(p.call("GET", "/v1/admin/users?email_prefix=ad&limit=1", nil, admin...).want(200).list("users")); n != 1 {
		t.Errorf("%d users", n)
	}
	p.call("GET", "/v1/admin/users", nil).want(200) // This key is the installation's first.
	// A deactivated user has no access, nor do their keys, until they are activated
	// again.
	p.call("PATCH", "/v1/admin/users/"+ada, map[string]any{"active": false}, admin...).want(200)
	p.call("GET", "/v1/me", nil, as(access)...).fails(401, "unauthenticated")
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", key).fails(401, "unauthenticated")
	p.call("POST", "/v1/auth/login", map[string]any{"email": "ada@example.com", "password": password}, nobody...).fails(401, "unauthenticated")
	p.call("PATCH", "/v1/admin/users/"+ada, map[string]any{"active": true}, admin...).want(200)
	p.call("GET", "/v1/sandboxes", nil, "X-API-Key", key).want(200)
	var me uuid.UUID
	if err := p.db().QueryRow(context.Background(), "SELECT id FROM users WHERE admin").Scan(&me); err != nil {
		t.Fatal(err)
	}
	for _, body := range []map[string]any{{"active": false}, {"admin": false}} {
		p.call("PATCH", "/v1/admin/users/"+id.Format(id.User, me), body, admin...).fails(409, "conflict")
	}
	sandbox := p.call("POST", "/v1/sandboxes", map[string]any{}, "X-API-Key", key).want(201).str("id")
	list := p.call("GET", "/v1/admin/sandboxes", nil, admin...).want(200).list("sandboxes")
	if len(list) != 1 || list[0].(map[string]any)["access_token"] != nil {
		t.Errorf("all sandboxes: %v", list)
	}
	// A team's template stays until its host has removed it.
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": sandbox, "name": "mine"}, "X-API-Key", key).want(201)
	var mine uuid.UUID
	if err := p.db().QueryRow(context.Background(), "SELECT id FROM templates WHERE name = 'mine'").Scan(&mine); err != nil {
		t.Fatal(err)
	}
	template := id.Format(id.Template, mine)
	rows := func() (n int) {
		if err := p.db().QueryRow(context.Background(), "SELECT count(*) FROM templates WHERE id = $1", mine).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	hold := p.newHold("delete template")
	deleted := p.later("DELETE", "/v1/admin/templates/"+template, nil, admin...)
	<-hold.asked
	if n := rows(); n != 1 || !p.agent.hasTemplate(template) {
		t.Errorf("%d rows of a template whose host has not removed it", n)
	}
	p.agent.hook(nil)
	hold.release <- nil
	(<-deleted).want(204)
	p.eventually("the template is gone", func() bool { return rows() == 0 && !p.agent.hasTemplate(template) })
	p.call("DELETE", "/v1/admin/sandboxes/"+sandbox, nil, admin...).want(204)
	p.call("DELETE", "/v1/admin/templates/"+id.Format(id.Template, uuid.Nil), nil, admin...).fails(403, "permission_denied")
	if n := len(p.call("GET", "/v1/admin/templates", nil, admin...).want(200).list("templates")); n != 1 {
		t.Errorf("%d templates", n)
	}
	if n := len(p.call("GET", "/v1/admin/teams", nil, admin...).want(200).list("teams")); n != 2 {
		t.Errorf("%d teams", n)
	}
}

// lineWriter passes on what is written to it, and drops it if the channel is full.
type lineWriter chan string

func (w lineWriter) Write(b []byte) (int, error) {
	select {
	case w <- string(b):
	default:
	}
	return len(b), nil
}

// TestLimitsTogether makes many requests at once, for each limit that is counted before
// something is added: no more succeed than there is room for, or no more are kept.
// TestCountsAreLocked, of package store, finds a limit that is counted without a lock.
func TestLimitsTogether(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	admin := as(p.bearerOf("admin@example.com"))
	team := p.call("GET", "/v1/teams", nil, admin...).want(200).list("teams")[0].(map[string]any)["id"].(string)
	u, err := id.Parse(id.Team, team)
	if err != nil {
		t.Fatal(err)
	}
	p.call("POST", "/v1/snapshots", map[string]any{"sandbox_id": p.create(map[string]any{}), "name": "one"}).want(201)
	// No build starts, so none ends.
	p.sql("SELECT pg_advisory_lock(7239150284)")
	const room, tries = 5, 20
	at := func(path string) func(int) string { return func(int) string { return path } }
	for _, limit := range []struct {
		name, fill string
		args       []any
		method     string
		path       func(int) string
		body       map[string]any
		ok, full   int
		code       string
	}{
		{
			"channels", "INSERT INTO channels (id, team_id, name, kind, events, target, sealed) SELECT gen_random_uuid(), $1, 'c', 'webhook', '{}', '', '' FROM generate_series(1, $2::integer)",
			[]any{u, 50 - room},
			"POST", at("/v1/channels"),
			map[string]any{"name": "c", "kind": "webhook", "url": "https://example.com/hook", "secret": "sixteen characters", "events": []string{"sandbox.lost"}},
			201, 409, "conflict",
		},
		{
			"keys", "INSERT INTO api_keys (id, team_id, name, prefix, hash) SELECT gen_random_uuid(), $1, 'k', 'wrn_', sha256(n::text::bytea) FROM generate_series((SELECT count(*) FROM api_keys WHERE team_id = $1) + 1, $2::integer) n",
			[]any{u, 1000 - room},
			"POST", at("/v1/keys"),
			map[string]any{"name": "k"},
			201, 409, "conflict",
		},
		{
			"teams", `WITH made AS (INSERT INTO teams (id, name) SELECT gen_random_uuid(), 't' FROM generate_series((SELECT count(*) FROM team_members) + 1, $1::integer) RETURNING id)
				INSERT INTO team_members (team_id, user_id, role) SELECT made.id, users.id, 'member' FROM made, users WHERE users.email = 'admin@example.com'`,
			[]any{50 - room},
			"POST", at("/v1/teams"),
			map[string]any{"name": "t"},
			201, 403, "quota_exceeded",
		},
		{
			"tags", "INSERT INTO template_tags SELECT team_id, name, 'f' || n, id FROM templates, generate_series(1, most_tags() - (SELECT count(*) FROM template_tags WHERE team_id = $1) - $2::integer) n WHERE team_id = $1 AND name = 'one'",
			[]any{u, room},
			"PUT", func(n int) string { return fmt.Sprintf("/v1/templates/one/tags/t%d", n) }, nil,
			200, 403, "quota_exceeded",
		},
		{
			"builds", `INSERT INTO builds (id, team_id, name, tags, recipe, options, state, total_steps, created_at) SELECT gen_random_uuid(), $1, 'b', '{}', '', '{}', 'queued', 1, now() FROM generate_series(1, $2::integer)`,
			[]any{u, 20 - room},
			"POST", at("/v1/templates/builds"),
			map[string]any{"name": "b", "recipe": "FROM minimal\nRUN true"},
			202, 409, "conflict",
		},
	} {
		p.sql(limit.fill, limit.args...)
		var answers []<-chan response
		for n := range tries {
			answers = append(answers, p.later(limit.method, limit.path(n), limit.body, admin...))
		}
		made := 0
		for _, a := range answers {
			if r := <-a; r.Status == limit.ok {
				made++
			} else {
				r.fails(limit.full, limit.code)
			}
		}
		if made != room {
			t.Errorf("%s: %d were made where there was room for %d", limit.name, made, room)
		}
	}

	// Of these, the newest are kept.
	kept := func(what, query string, most int64) {
		t.Helper()
		var n int64
		if err := p.db().QueryRow(t.Context(), query).Scan(&n); err != nil || n != most {
			t.Errorf("%d %s are kept, want %d, %v", n, what, most, err)
		}
	}
	p.sql("INSERT INTO failed_imports (team_id, name, error, failed_at) SELECT $1, 'old' || n, 'x', now() - interval '1 hour' FROM generate_series(1, 20) n", u)
	const atOnce = 4 // of an owner
	var imports sync.WaitGroup
	for of := range atOnce {
		imports.Go(func() {
			for n := range 8 {
				r, err := p.try("POST", "/v1/templates/import", map[string]any{"name": fmt.Sprintf("no%d-%d", of, n), "reference": "registry.example/none:1"})
				if err != nil || r.Status != 404 {
					t.Errorf("an import of nothing: %d %s, %v", r.Status, r.Body, err)
				}
			}
		})
	}
	imports.Wait()
	kept("failed imports", "SELECT count(*) FROM failed_imports", 20)
	p.sql("INSERT INTO sessions (id, user_id, refresh_hash, expires_at, user_agent, address) SELECT gen_random_uuid(), id, '', now() + interval '1 day', '', '' FROM users, generate_series(1, 110) WHERE email = 'admin@example.com'")
	var logins []<-chan response
	for range 6 {
		logins = append(logins, p.later("POST", "/v1/auth/login", map[string]any{"email": "admin@example.com", "password": "correct horse"}, nobody...))
	}
	for _, a := range logins {
		(<-a).want(200)
	}
	kept("sessions", "SELECT count(*) FROM sessions WHERE user_id = (SELECT id FROM users WHERE email = 'admin@example.com')", 100)
}

// TestFirstSignUp has several people sign up at once on an empty installation: one
// becomes the platform's admin, and sign-up is closed to the others.
func TestFirstSignUp(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.config.DatabaseURL = storetest.New(t)
	p.config.AdminEmail, p.config.AdminPassword, p.config.AdminAPIKey = "", "", ""
	lines := make(lineWriter, 1000)
	p.logs = lines
	p.start()
	var token string
	for token == "" { // written before the server listens
		_, token, _ = strings.Cut(strings.TrimSpace(<-lines), " token=")
	}
	p.sql("UPDATE platform_settings SET signup_open = true") // a stranger's sign-up has the same response
	for _, wrong := range []map[string]any{{}, {"token": ""}, {"token": token + "0"}, {"token": token[1:]}} {
		wrong["email"], wrong["password"] = "stranger@example.com", password
		p.call("POST", "/v1/auth/signup", wrong, nobody...).fails(403, "permission_denied")
	}
	p.sql("UPDATE platform_settings SET signup_open = false")
	emails := make(map[string]<-chan response)
	for n := range 6 {
		email := fmt.Sprintf("u%d@example.com", n)
		emails[email] = p.later("POST", "/v1/auth/signup", map[string]any{"email": email, "password": password, "token": token}, nobody...)
	}
	var admins []string
	for email, answer := range emails {
		if r := <-answer; r.Status == 201 {
			admins = append(admins, email)
		} else {
			r.fails(403, "permission_denied")
		}
	}
	if len(admins) != 1 {
		t.Fatalf("admins are %v", admins)
	}
	access, _ := p.login(admins[0], password)
	users := p.call("GET", "/v1/admin/users", nil, as(access)...).want(200).list("users")
	if len(users) != 1 || users[0].(map[string]any)["admin"] != true {
		t.Errorf("users are %v", users)
	}
}

// mailed restarts the server with a mail server, and returns a function that returns its
// next mail.
func (p *plane) mailed() func() string {
	p.Helper()
	post := mailtest.Start(p.TB, mailtest.Options{})
	p.end()
	p.config.SMTPURL, p.config.MailFrom = "smtp://"+post.Addr+"?tls=none", "wrenn@example.com"
	p.start()
	return func() string {
		p.Helper()
		l := await.Recv(p, "a mail", post.Messages)
		return "To: " + l.To + "\nSubject: " + l.Subject + "\n\n" + l.Text
	}
}

// linked returns the token of the link in a mail.
func (p *plane) linked(message, page string) string {
	p.Helper()
	link := regexp.MustCompile(`http://localhost:8000/` + page + `#token=(wr[pvc]_[\w-]+)`).FindStringSubmatch(message)
	if link == nil {
		p.Fatalf("no link in:\n%s", message)
	}
	return link[1]
}

// TestForgottenOthers makes the database hang on one user's reset link: another user's is
// sent.
func TestForgottenOthers(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	messages := p.mailed()
	hangs := p.person("hangs@example.com")
	p.person("ada@example.com")
	tx, err := p.db().Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	if _, err := tx.Exec(t.Context(), "SELECT FROM users WHERE id = $1 FOR UPDATE", hangs); err != nil {
		t.Fatal(err)
	}
	for _, email := range []string{"hangs@example.com", "ada@example.com"} {
		p.call("POST", "/v1/auth/password/forgot", map[string]any{"email": email}, nobody...).want(202)
	}
	if message := messages(); !strings.Contains(message, "To: ada@example.com\n") {
		t.Errorf("mail:\n%s", message)
	}
}

func TestForgotPassword(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	messages := p.mailed()
	session := p.bearerOf("admin@example.com")
	p.call("POST", "/v1/auth/password/forgot", map[string]any{"email": "stranger@example.com"}, nobody...).want(202)
	p.call("POST", "/v1/auth/password/forgot", map[string]any{"email": "ADMIN@example.com"}, nobody...).want(202)
	message := messages()
	if !strings.Contains(message, "To: admin@example.com\n") {
		t.Errorf("mail:\n%s", message)
	}
	link := p.linked(message, "reset-password")
	p.call("POST", "/v1/auth/password/reset", map[string]any{"token": link + "x", "password": password}, nobody...).fails(401, "unauthenticated")
	p.call("POST", "/v1/auth/password/reset", map[string]any{"token": link, "password": password}, nobody...).want(204)
	p.call("GET", "/v1/me", nil, as(session)...).fails(401, "unauthenticated")
	again, _ := p.login("admin@example.com", password)
	p.recorded(p.call("GET", "/v1/me", nil, as(again)...).want(200).str("id"), "resetPassword ok")
	p.call("POST", "/v1/auth/password/reset", map[string]any{"token": link, "password": password}, nobody...).fails(401, "unauthenticated")
	// A link that nobody opens in time.
	p.call("POST", "/v1/auth/password/forgot", map[string]any{"email": "admin@example.com"}, nobody...).want(202)
	late := p.linked(messages(), "reset-password")
	p.sql("UPDATE mail_tokens SET expires_at = expires_at - interval '1 hour'")
	p.call("POST", "/v1/auth/password/reset", map[string]any{"token": late, "password": password + "!"}, nobody...).fails(401, "unauthenticated")
	p.login("admin@example.com", password)
	p.call("POST", "/v1/auth/password/forgot", map[string]any{"email": "admin@example.com"}, nobody...).want(202)
	p.call("POST", "/v1/auth/password/forgot", map[string]any{"email": "admin@example.com"}, nobody...).fails(429, "rate_limited")
}
