package server_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/api"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// The authorization walk calls every operation of the OpenAPI document as every kind of
// caller, with the ids of the caller's team and of another. It derives the expected
// results from x-wrenn-access and the caller, by rules written independently of the
// server's. An operation without a rule fails.

// The teams of a world. Callers belong to the first, to the third, or to none.
const (
	ours = iota
	theirs
	staffs
)

// walkTeam is a team and one of everything that a team owns.
type walkTeam struct {
	id                       uuid.UUID
	owner, admin, member     uuid.UUID
	mate                     uuid.UUID // The member whom calls change.
	sandbox, key, template   uuid.UUID
	build, channel           uuid.UUID
	wireTeam, wireMate       string
	wireSandbox, wireKey     string
	wireTemplate, nameOfTmpl string
}

// world is the state for one call, or for all calls that change nothing.
type world struct {
	*plane
	teams    [3]walkTeam
	stranger string // The email address of a user in no team.
	loner    uuid.UUID
	staff    uuid.UUID // An admin of the platform, in the third team.
	left     uuid.UUID // A deactivated owner of the first team.
	host     string
	shown    map[string][]string // Callers' headers, created on demand.
	records  *[]asked            // The calls made, if the test wants them.
}

func insertUser(b *pgx.Batch, admin, active bool) uuid.UUID {
	u := uuid.New()
	b.Queue("INSERT INTO users (id, email, verified_at, admin, active) VALUES ($1, $2, now(), $3, $4)", u, "u"+u.String()+"@example.com", admin, active)
	return u
}

func (p *plane) world() *world {
	p.Helper()
	p.agent.mu.Lock()
	p.agent.files["/walk"] = []byte("walk") // for operations on files
	p.agent.mu.Unlock()
	w, b := &world{plane: p, shown: make(map[string][]string)}, &pgx.Batch{}
	var host uuid.UUID
	if err := p.db().QueryRow(context.Background(), "SELECT id FROM hosts WHERE NOT enrolled AND url IS NOT NULL").Scan(&host); err != nil {
		p.Fatal(err)
	}
	for i := range w.teams {
		t := &w.teams[i]
		t.id, t.sandbox, t.key, t.template = uuid.New(), uuid.New(), uuid.New(), uuid.New()
		b.Queue("INSERT INTO teams (id, name) VALUES ($1, 'walk')", t.id)
		for _, m := range []struct {
			user *uuid.UUID
			role string
		}{{&t.owner, "owner"}, {&t.admin, "admin"}, {&t.member, "member"}, {&t.mate, "member"}} {
			*m.user = insertUser(b, false, true)
			b.Queue("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, $3)", t.id, *m.user, m.role)
		}
		t.wireTeam, t.wireMate, t.wireSandbox = id.Format(id.Team, t.id), id.Format(id.User, t.mate), id.Format(id.Sandbox, t.sandbox)
		t.wireKey, t.wireTemplate = id.Format(id.APIKey, t.key), id.Format(id.Template, t.template)
		t.nameOfTmpl = "t" + strings.ReplaceAll(t.template.String(), "-", "")
		b.Queue("INSERT INTO api_keys (id, team_id, user_id, name, prefix, hash) VALUES ($1, $2, $3, 'k', 'wrn_', $4)", t.key, t.id, t.member, t.key[:])
		p.agent.mu.Lock()
		p.agent.sandboxes[t.wireSandbox] = &hostagentv1.Sandbox{
			SandboxId: t.wireSandbox, TeamId: t.wireTeam, State: hostagentv1.SandboxState_SANDBOX_STATE_RUNNING, Vcpus: 1, MemoryMib: 512, DiskMib: 5120, CreatedAt: timestamppb.Now(),
		}
		p.agent.templates[t.wireTemplate] = &hostagentv1.Template{
			TemplateId: t.wireTemplate, TeamId: t.wireTeam, Name: t.nameOfTmpl, SizeBytes: 1, CreatedAt: timestamppb.New(time.Unix(1, 0)), DiskMib: 5120,
		}
		p.agent.mu.Unlock()
		b.Queue("INSERT INTO templates (id, team_id, name, size_bytes, created_at, disk_mib, captured_from) VALUES ($1, $2, $3, 1, 'epoch'::timestamptz + interval '1 second', 5120, $4)", t.template, t.id, t.nameOfTmpl, t.sandbox)
		t.build, t.channel = uuid.New(), uuid.New()
		b.Queue("INSERT INTO builds (id, team_id, name, tags, recipe, options, state, total_steps, created_at, ended_at) VALUES ($1, $2, 'b', '{}', 'RUN true', '{}', 'succeeded', 1, now(), now())", t.build, t.id)
		b.Queue("INSERT INTO channels (id, team_id, name, kind, events, target, sealed, confirmed_at) VALUES ($1, $2, 'c', 'email', '{quota.reached}', 'c@example.com', '', now())", t.channel, t.id)
		b.Queue("INSERT INTO template_tags (team_id, name, tag, template_id) VALUES ($1, $2, 'latest', $3)", t.id, t.nameOfTmpl, t.template)
		b.Queue("INSERT INTO host_templates (host_id, template_id) VALUES ($1, $2)", host, t.template)
		b.Queue(`INSERT INTO sandboxes (id, team_id, host_id, template_id, template_name, state, vcpus, memory_mib, disk_mib, timeout_seconds, metadata, created_at, auto_resume)
			VALUES ($1, $2, $3, $4, 'x', 'running', 1, 512, 5120, 0, '{}', now(), true)`, t.sandbox, t.id, host, t.template)
	}
	w.loner, w.staff, w.left = insertUser(b, false, true), insertUser(b, true, true), insertUser(b, false, false)
	b.Queue("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, 'owner'), ($3, $4, 'owner')", w.teams[staffs].id, w.staff, w.teams[ours].id, w.left)
	w.stranger = "u" + insertUser(b, false, true).String() + "@example.com"
	if err := p.db().SendBatch(context.Background(), b).Close(); err != nil {
		p.Fatal(err)
	}
	return w
}

// caller is a kind of caller, and what the rules need to know of it.
type caller struct {
	name string
	// show creates the caller's headers.
	show func(w *world) []string
	// dead credentials count as none.
	dead bool
	key  bool
	// role is the caller's role in the first team, or in the third for staff; "" means no
	// team.
	role string
	team int
	// platform means that the caller may act as an admin of the platform.
	platform bool
	scopes   []string
}

func session(user func(*world) uuid.UUID) func(*world) []string {
	return func(w *world) []string { return as(w.bearer(user(w))) }
}

// keyOf creates an API key of the first team.
func keyOf(user func(*world) uuid.UUID, expires string, scopes ...string) func(*world) []string {
	return func(w *world) []string {
		w.Helper()
		key, row := newKey()
		if scopes == nil {
			scopes = []string{}
		}
		w.sql("INSERT INTO api_keys (id, team_id, user_id, name, prefix, hash, scopes, expires_at) VALUES ($1, $2, $3, 'walk', 'wrn_', $4, $5, now() + $6::interval)",
			uuid.New(), w.teams[ours].id, user(w), row, scopes, expires)
		return []string{"X-API-Key", key}
	}
}

func callers() []caller {
	owner := func(w *world) uuid.UUID { return w.teams[ours].owner }
	staff := func(w *world) uuid.UUID { return w.staff }
	left := func(w *world) uuid.UUID { return w.left }
	key := func(name string, scopes ...string) caller {
		return caller{name: "key " + name, show: keyOf(owner, "1 hour", scopes...), key: true, scopes: scopes}
	}
	const none = -1
	return []caller{
		{name: "nobody", show: func(*world) []string { return nobody }, dead: true, team: none},
		{name: "user without a team", show: session(func(w *world) uuid.UUID { return w.loner }), team: none},
		{name: "member", show: session(func(w *world) uuid.UUID { return w.teams[ours].member }), role: "member"},
		{name: "admin", show: session(func(w *world) uuid.UUID { return w.teams[ours].admin }), role: "admin"},
		{name: "owner", show: session(owner), role: "owner"},
		{name: "platform admin", show: session(staff), role: "owner", team: staffs, platform: true},
		key("of everything"),
		key("sandboxes", "sandboxes"),
		key("templates", "templates"),
		key("read-only", "read-only"),
		key("sandboxes read-only", "sandboxes", "read-only"),
		key("sandboxes templates", "sandboxes", "templates"),
		// The scope alone does not make a user's key an admin's.
		key("platform of an owner", "platform"),
		{name: "key platform", show: keyOf(staff, "1 hour", "platform"), key: true, scopes: []string{"platform"}, platform: true},
		{name: "key platform read-only", show: keyOf(staff, "1 hour", "platform", "read-only"), key: true, scopes: []string{"platform", "read-only"}, platform: true},
		// Without the scope, an admin's key is an ordinary key of the team.
		{name: "key of a platform admin", show: keyOf(staff, "1 hour"), key: true},
		{name: "key expired", show: keyOf(owner, "-1 second"), key: true, dead: true},
		{name: "key revoked", show: func(w *world) []string {
			shown := keyOf(owner, "1 hour")(w)
			hash := sha256.Sum256([]byte(shown[1]))
			w.sql("DELETE FROM api_keys WHERE hash = $1", hash[:])
			return shown
		}, key: true, dead: true},
		{name: "key of a deactivated user", show: keyOf(left, "1 hour"), key: true, dead: true},
		{name: "deactivated user", show: session(left), role: "owner", dead: true},
		{name: "logged out", show: func(w *world) []string {
			shown := session(func(w *world) uuid.UUID { return w.left })(w)
			w.sql("DELETE FROM sessions WHERE user_id = $1", w.left)
			return shown
		}, dead: true},
	}
}

// target names the teams whose ids a call uses: in the path, elsewhere, and in X-Team
// (none: no header).
type target struct {
	name             string
	path, ids, named int
}

var targets = []target{
	{"own ids", ours, ours, -1},
	{"own ids, team named", ours, ours, ours},
	{"foreign ids", theirs, theirs, -1},
	{"foreign ids, team named", theirs, theirs, theirs},
	{"own team, foreign ids", ours, theirs, ours},
}

// rule is an operation's x-wrenn-access.
type rule struct {
	Role   string   `json:"role"`
	Scopes []string `json:"scopes"`
	Read   bool     `json:"read"`
	Rate   string   `json:"rate"`
}

// ranks orders the roles in a team.
var ranks = map[string]int{"member": 1, "admin": 2, "owner": 3}

// operation is an operation of the document.
type operation struct {
	method, path string
	item         *openapi3.PathItem
	*openapi3.Operation
	rule rule
}

func (o operation) String() string { return o.method + " " + o.path }

// about reports whether the operation concerns a team's object, beyond the team itself.
func (o operation) about() bool {
	if o.OperationID == "createSnapshot" {
		return true
	}
	for _, p := range slices.Concat(o.item.Parameters, o.Parameters) {
		if p.Value.In == "path" && !slices.Contains([]string{"team_id", "host_id", "tag", "digest"}, p.Value.Name) {
			return true
		}
	}
	return false
}

// expected returns the status that must come, or 0 if the call must be admitted.
func (o operation) expected(c caller, t target) int {
	r := o.rule
	if c.dead {
		return 401
	}
	ofTeam := ranks[r.Role] > 0
	asked := -1
	if ofTeam {
		if asked = t.named; strings.Contains(o.path, "{team_id}") {
			asked = t.path
		}
	}
	switch {
	case asked >= 0 && asked != c.team:
		return 404 // As if there were no such team.
	case ofTeam && c.team < 0:
		return 403
	case c.key:
		limited := slices.Contains(c.scopes, "sandboxes") || slices.Contains(c.scopes, "templates")
		fits := slices.ContainsFunc(r.Scopes, func(s string) bool {
			if s == "platform" {
				return c.platform && slices.Contains(c.scopes, s)
			}
			return !limited || slices.Contains(c.scopes, s)
		})
		if !fits || !r.Read && slices.Contains(c.scopes, "read-only") {
			return 403
		}
	case r.Role == "platform" && !c.platform, ofTeam && ranks[c.role] < ranks[r.Role]:
		return 403
	}
	if ofTeam && o.about() && t.ids != c.team {
		return 404
	}
	return 0
}

// fields are values that bodies and parameters need where an example of their schema does
// not do.
func (w *world) fields(o operation, t target) map[string]any {
	of := w.teams[t.ids]
	all := map[string]any{
		"sandbox_id": of.wireSandbox, "key_id": of.wireKey, "user_id": of.wireMate, "template_id": of.wireTemplate, "host_id": w.host,
		"team_id": w.teams[t.path].wireTeam, "tag": "latest", "digest": fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("walk"))), "build_id": id.Format(id.Build, of.build), "channel_id": id.Format(id.Channel, of.channel), "path": "/walk", "email_prefix": "u12", "email": "u12@example.com", "Upgrade": "websocket",
	}
	if strings.Contains(o.path, "{template}") {
		all["template"] = of.nameOfTmpl
	}
	if strings.Contains(o.path, "{name}") {
		all["name"] = of.nameOfTmpl
	}
	switch o.OperationID {
	case "logIn", "forgotPassword", "signUp":
		all["email"] = "new-" + uuid.NewString() + "@example.com"
	case "exec":
		all["cmd"] = "say"
	case "hostHeartbeat":
		all["leaving"] = true
	case "addMember":
		all["email"], all["role"] = w.stranger, "member"
	case "adminCreateUser":
		all["email"] = "new-" + uuid.NewString() + "@example.com"
	case "adminChangeUser":
		all["active"] = false
	case "changeMember":
		all["role"] = "admin"
	case "createKey":
		all["name"] = "walk's"
	case "createSandbox":
		all["template"] = "minimal"
	case "addHost", "createSnapshot":
		all["name"] = "n" + strings.ReplaceAll(uuid.NewString(), "-", "")
	case "changeHost":
		all["draining"] = true
	case "createChannel":
		all["url"], all["secret"] = "https://hooks.example.com/walk", strings.Repeat("s", 32)
	case "changePassword":
		all["current_password"] = "wrong"
	}
	return all
}

// value returns an example of a schema: its required members, and those in fields.
func value(name string, s *openapi3.Schema, fields map[string]any) any {
	if v, ok := fields[name]; ok && name != "" {
		return v
	}
	switch {
	case s.Type.Is("object") || len(s.Properties) > 0:
		m := make(map[string]any)
		for p, ref := range s.Properties {
			_, given := fields[p]
			if given || slices.Contains(s.Required, p) {
				m[p] = value(p, ref.Value, fields)
			}
		}
		return m
	case s.Example != nil:
		return s.Example
	case s.Default != nil:
		return s.Default
	case len(s.Enum) > 0:
		return s.Enum[0]
	case s.Type.Is("array"):
		if s.MinItems == 0 {
			return []any{}
		}
		return []any{value("", s.Items.Value, fields)}
	case s.Type.Is("integer"), s.Type.Is("number"):
		if s.Min != nil {
			return *s.Min
		}
		return 1
	case s.Type.Is("boolean"):
		return true
	case s.Format == "date-time":
		return time.Now().Add(time.Hour).UTC()
	case strings.Contains(s.Pattern, "64"):
		return strings.Repeat("0", 64)
	}
	return strings.Repeat("x", max(1, int(s.MinLength)))
}

// send makes the call.
func (w *world) send(o operation, c caller, t target, n int) response {
	w.Helper()
	ask, path, body, headers := w.compose(o, c, t, n)
	r, err := w.try(o.method, path, body, headers...)
	if err != nil {
		w.Fatalf("%s as %s, %s: %v", o, c.name, t.name, err)
	}
	if ask.response = r; w.records != nil {
		*w.records = append(*w.records, ask)
	}
	return r
}

// compose creates a call.
func (w *world) compose(o operation, c caller, t target, n int) (ask asked, path string, body any, headers []string) {
	w.Helper()
	if strings.Contains(o.path, "{host_id}") && w.host == "" {
		w.host = w.call("POST", "/v1/admin/hosts", map[string]any{"name": "h" + strings.ReplaceAll(uuid.NewString(), "-", "")}).want(201).object()["host"].(map[string]any)["id"].(string)
	}
	shown, ok := w.shown[c.name]
	if !ok {
		shown = c.show(w)
		w.shown[c.name] = shown
	}
	ask = asked{operation: o, caller: c, id: fmt.Sprintf("walk-%d", n), address: fmt.Sprintf("198.18.%d.%d", n/250, n%250)}
	if w.records != nil && !o.anybody() {
		ask.actor, ask.user = w.actor(shown)
		ask.teams = w.teamsOf(ask.actor)
	}
	// Each call has its own address: other tests check the rates.
	headers = append(slices.Clone(shown), "X-Forwarded-For", ask.address, "X-Request-Id", ask.id)
	if t.named >= 0 {
		headers = append(headers, "X-Team", w.teams[t.named].wireTeam)
	}
	fields := w.fields(o, t)
	path = o.path
	query := url.Values{}
	for _, p := range slices.Concat(o.item.Parameters, o.Parameters) {
		if !p.Value.Required {
			continue
		}
		v := value(p.Value.Name, p.Value.Schema.Value, fields)
		if _, given := fields[p.Value.Name]; !given && p.Value.Example != nil {
			v = p.Value.Example
		}
		text := fmt.Sprint(v)
		switch p.Value.In {
		case "path":
			path = ask.fill(path, p.Value, text)
		case "query":
			query.Set(p.Value.Name, text)
		case "header":
			headers = append(headers, p.Value.Name, text)
		}
	}
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	if o.RequestBody != nil {
		content := o.RequestBody.Value.Content
		if media := content.Get("application/json"); media != nil && len(content) == 1 {
			body = value("", media.Schema.Value, fields)
		} else {
			body = []byte("walk")
			for kind := range maps.Keys(content) {
				headers = append(headers, "Content-Type", kind)
			}
		}
	}
	return ask, path, body, headers
}

// state returns everything in a world that calls could change.
func (w *world) state() string {
	w.Helper()
	var all []string
	var teams, people []uuid.UUID
	for _, t := range w.teams {
		teams = append(teams, t.id)
		people = append(people, t.owner, t.admin, t.member, t.mate)
	}
	people = append(people, w.loner, w.staff, w.left)
	for _, query := range []string{
		"SELECT (id, name, deleting_at)::text FROM teams WHERE id = ANY ($1) OR id = ANY ($2) ORDER BY 1",
		"SELECT (id, email, password_hash, admin, active)::text FROM users WHERE id = ANY ($1) OR id = ANY ($2) ORDER BY 1",
		"SELECT m::text FROM team_members m WHERE team_id = ANY ($1) OR user_id = ANY ($2) ORDER BY 1",
		"SELECT (id, name, scopes, expires_at)::text FROM api_keys WHERE name <> 'walk' AND (team_id = ANY ($1) OR user_id = ANY ($2)) ORDER BY 1",
		"SELECT (id, state, disk_mib)::text FROM sandboxes WHERE team_id = ANY ($1) OR id = ANY ($2) ORDER BY 1",
		"SELECT (id, name, state)::text FROM templates WHERE team_id = ANY ($1) OR id = ANY ($2) ORDER BY 1",
		"SELECT q::text FROM team_quotas q WHERE team_id = ANY ($1) OR team_id = ANY ($2) ORDER BY 1",
	} {
		rows, err := w.db().Query(context.Background(), query, teams, people)
		if err != nil {
			w.Fatal(err)
		}
		for rows.Next() {
			var line string
			if err := rows.Scan(&line); err != nil {
				w.Fatal(err)
			}
			all = append(all, line)
		}
		if err := rows.Err(); err != nil {
			w.Fatal(err)
		}
	}
	return strings.Join(all, "\n")
}

// operations returns the document's operations.
func operations(t testing.TB) []operation {
	t.Helper()
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
	var all []operation
	for path, item := range spec.Paths.Map() {
		for method, op := range item.Operations() {
			o := operation{method: method, path: path, item: item, Operation: op}
			raw, err := json.Marshal(op.Extensions["x-wrenn-access"])
			if err == nil {
				err = json.Unmarshal(raw, &o.rule)
			}
			if err != nil || o.rule.Role == "" {
				t.Errorf("%s has no rule: add x-wrenn-access (%v)", o, err)
			}
			all = append(all, o)
		}
	}
	slices.SortFunc(all, func(a, b operation) int { return strings.Compare(a.String(), b.String()) })
	return all
}

func TestAuthorization(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	var records []asked
	world := func() *world {
		w := p.world()
		w.records = &records
		return w
	}
	shared := world()
	before := shared.state()
	calls, admitted := 0, 0
	all := operations(t)
	for _, o := range all {
		if o.rule.Role == "none" {
			// For everybody the result must be the same.
			want := 0
			for _, c := range callers() {
				w := shared
				if o.method != http.MethodGet {
					w = world() // Logging out, for example, is a change.
				}
				r := w.send(o, c, targets[0], calls)
				calls++
				if want == 0 {
					want = r.Status
				}
				if r.Status != want || r.Status >= 500 && o.path != "/health" {
					t.Errorf("%s as %s: %d, as nobody %d\n%s", o, c.name, r.Status, want, r.Body)
				}
			}
			continue
		}
		for _, c := range callers() {
			for _, tg := range targets {
				want, w := o.expected(c, tg), shared
				if want == 0 && o.method != http.MethodGet {
					w = world()
				}
				r := w.send(o, c, tg, calls)
				calls++
				if want == 0 {
					admitted++
					// The operation was admitted, and found its object.
					switch {
					case r.Status < 300, r.Status == 409, r.Status == 404 && strings.Contains(string(r.Body), "the registry does not have this image"),
						// Only the platform's own builds; a world has none.
						r.Status == 404 && strings.HasPrefix(o.path, "/v1/admin/builds/"), o.OperationID == "execStream" && r.Status == 400 && strings.Contains(string(r.Body), "handshake"):
					case o.OperationID == "changePassword" && r.Status == 403 && strings.Contains(string(r.Body), "wrong current password"):
					case r.Status >= 400 && r.Status < 500 && r.Status != 401 && r.Status != 403 && r.Status != 404 && r.Status != 429 && !o.about():
						t.Logf("%s as %s, %s: %d %s", o, c.name, tg.name, r.Status, r.Body)
					default:
						t.Errorf("%s as %s, %s: %d, want it to be admitted\n%s", o, c.name, tg.name, r.Status, r.Body)
					}
				} else if r.Status != want {
					t.Errorf("%s as %s, %s: %d, want %d\n%s", o, c.name, tg.name, r.Status, want, r.Body)
				}
			}
		}
	}
	if after := shared.state(); after != before {
		t.Errorf("calls that were refused changed something: before\n%s\n\nafter\n%s", before, after)
	}
	checkChanges(t, p, records)
	checkOrigins(t, p, calls)
	t.Logf("authorization walk: %d operations, %d callers, %s calls, %d of them admitted", len(all), len(callers()), strconv.Itoa(calls), admitted)
	if calls < 3000 {
		t.Errorf("only %d calls", calls)
	}
}
