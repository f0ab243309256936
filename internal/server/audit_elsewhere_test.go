package server_test

import (
	"bytes"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/coder/websocket"

	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/recipe/buildcontext"
)

// deed is a successful call of an operation.
type deed struct {
	// named are the path's parameters, in order; query follows the path.
	named []string
	query string
	body  any
	// headers authenticate the caller. Without them, operations that need authentication
	// get the session of an admin of the platform.
	headers []string
	// actor is the expected actor of the record, an id or "anonymous", if neither headers
	// nor the response tell.
	actor string
}

// stage has everything that deeds need.
type stage struct {
	*plane
	admin, adminID string // A session, and its user.
	sandbox        string // One with a code interpreter.
	messages       func() string
}

// nextMailTo returns the next mail to an address, and discards mails to others.
func (s *stage) nextMailTo(email string) (message string) {
	s.Helper()
	for !strings.HasPrefix(message, "To: "+email+"\n") {
		message = s.messages()
	}
	return message
}

// mailTo creates a mail channel to an unconfirmed address.
func (s *stage) mailTo(address string) (channel string) {
	s.Helper()
	body := map[string]any{"name": "c", "kind": "email", "address": address, "events": []string{"quota.reached"}}
	return s.call("POST", "/v1/channels", body, as(s.admin)...).want(201).str("id")
}

// given returns a deed that needs no preparation.
func given(body map[string]any) func(*stage) deed {
	return func(*stage) deed { return deed{body: body} }
}

// inside returns a deed in the sandbox.
func inside(body any, named ...string) func(*stage) deed {
	return func(s *stage) deed { return deed{body: body, named: append([]string{s.sandbox}, named...)} }
}

// upload returns a deed that uploads a folder.
func upload(s *stage) deed {
	s.Helper()
	var packed bytes.Buffer
	digest, err := buildcontext.Pack(s.Context(), &packed, s.TempDir(), buildcontext.Limits{})
	if err != nil {
		s.Fatal(err)
	}
	return deed{named: []string{string(digest)}, body: packed.Bytes(), headers: append(as(s.admin), "Content-Type", "application/x-tar")}
}

// elsewhere has the changing operations that the walk's made-up requests never pass: they
// need a valid password or token, a guest that answers, a recipe, an archive or a running
// build. Each function prepares that and returns a call that succeeds.
var elsewhere = map[string]func(*stage) deed{
	"signUp": func(*stage) deed {
		return deed{body: map[string]any{"email": "one@example.com", "password": password}, actor: "anonymous"}
	},
	"verifyEmail": func(s *stage) deed {
		s.call("POST", "/v1/auth/signup", map[string]any{"email": "two@example.com", "password": password}, nobody...).want(202)
		return deed{body: map[string]any{"token": s.linked(s.nextMailTo("two@example.com"), "verify"), "password": password}}
	},
	"logIn": given(map[string]any{"email": "admin@example.com", "password": "correct horse"}),
	"refresh": func(s *stage) deed {
		_, token := s.login("admin@example.com", "correct horse")
		return deed{body: map[string]any{"refresh_token": token}}
	},
	"changePassword": func(s *stage) deed {
		u := s.person("three@example.com")
		s.sql("UPDATE users SET password_hash = (SELECT password_hash FROM users WHERE email = 'admin@example.com') WHERE id = $1", u)
		return deed{body: map[string]any{"current_password": "correct horse", "new_password": password}, headers: as(s.bearer(u))}
	},
	"resetPassword": func(s *stage) deed {
		u := s.person("four@example.com")
		s.call("POST", "/v1/auth/password/forgot", map[string]any{"email": "four@example.com"}, nobody...).want(202)
		return deed{body: map[string]any{"token": s.linked(s.nextMailTo("four@example.com"), "reset-password"), "password": password}, actor: id.Format(id.User, u)}
	},
	"confirmChannel": func(s *stage) deed {
		s.mailTo("six@example.com")
		return deed{body: map[string]any{"token": s.linked(s.nextMailTo("six@example.com"), "confirm-channel")}, actor: "anonymous"}
	},
	"askConfirmation": func(s *stage) deed {
		channel := s.mailTo("seven@example.com")
		s.nextMailTo("seven@example.com")
		s.sql("UPDATE channels SET target = 'eight@example.com' WHERE target = 'seven@example.com'") // Pretend that it got none within the hour.
		return deed{named: []string{channel}}
	},
	"finishGitHub": func(s *stage) deed {
		q, c := s.toGitHub("/v1/auth/github?link=true", &http.Cookie{Name: "wrenn_access", Value: s.admin})
		return deed{query: "?" + q.Encode(), headers: slices.Concat(nobody, []string{"Cookie", c.Name + "=" + c.Value}), actor: s.adminID}
	},
	"registerHost": func(s *stage) deed {
		body := s.addHost("one", "127.0.0.1:1")
		s.sql("UPDATE hosts SET draining = true WHERE name = 'one'") // The host has no agent.
		return deed{body: body}
	},
	"refreshHost": func(s *stage) deed {
		s.enroll("two")
		return deed{body: map[string]any{"refresh_token": "refresh of two", "next_hash": hashOf("another")}}
	},
	"execStream":           inside(nil),
	"runCode":              inside(map[string]any{"code": "1"}),
	"createContext":        inside(map[string]any{}),
	"changeContext":        inside(nil, "x", "restart"),
	"deleteContext":        inside(nil, "x"),
	"putBuildArchive":      upload,
	"putBuildArchiveAdmin": upload,
	"createBuild":          given(map[string]any{"name": "a", "recipe": "FROM minimal\nRUN one"}),
	"createBuildAdmin":     given(map[string]any{"name": "b", "recipe": "FROM minimal\nRUN one"}),
	"cancelBuildAdmin": func(s *stage) deed {
		build := s.call("POST", "/v1/admin/builds", map[string]any{"name": "c", "recipe": "FROM minimal\nRUN hang"}, as(s.admin)...).want(202)
		return deed{named: []string{build.str("id")}}
	},
	"importTemplate":         given(map[string]any{"name": "d", "reference": "registry.example/there:1", "username": "reader", "password": "s3cret"}),
	"importPlatformTemplate": given(map[string]any{"name": "e", "reference": "registry.example/there:1", "username": "reader", "password": "s3cret"}),
}

// do performs an operation of elsewhere. n distinguishes its calls.
func (s *stage) do(o operation, n int) asked {
	s.Helper()
	d := elsewhere[o.OperationID](s)
	a := asked{operation: o, caller: caller{name: "one who may"}, id: fmt.Sprintf("elsewhere-%d", n), address: fmt.Sprintf("198.19.0.%d", n), actor: d.actor}
	switch {
	case d.headers != nil:
	case o.anybody():
		d.headers = nobody
	default:
		d.headers = as(s.admin)
	}
	if !o.anybody() {
		a.actor, a.user = s.actor(d.headers)
	}
	a.teams = s.teamsOf(a.actor)
	headers := slices.Concat(d.headers, []string{"X-Forwarded-For", a.address, "X-Request-Id", a.id})
	path := o.path
	for _, p := range slices.Concat(o.item.Parameters, o.Parameters) {
		if p.Value.In == "path" {
			path = a.fill(path, p.Value, d.named[0])
			d.named = d.named[1:]
		}
	}
	if o.OperationID == "execStream" {
		shown := make(http.Header)
		for i := 0; i < len(headers); i += 2 {
			shown.Set(headers[i], headers[i+1])
		}
		ws, r, err := websocket.Dial(s.Context(), s.http.URL+path, &websocket.DialOptions{HTTPHeader: shown})
		if err != nil {
			s.Fatal(err)
		}
		ws.CloseNow()
		a.response = response{plane: s.plane, Status: r.StatusCode, Header: r.Header}
		return a
	}
	if a.response = s.call(o.method, path+d.query, d.body, headers...); a.Status >= 400 {
		s.Fatalf("%s: %d, want it to be done\n%s", o, a.Status, a.Body)
	}
	if a.actor == "" { // The response names the actor.
		user, _ := a.object()["user"].(map[string]any)
		if a.actor, _ = user["id"].(string); user == nil {
			a.actor = a.str("host_id")
		}
		if a.actor == "" {
			s.Errorf("%s: the actor is unknown", o)
		}
	}
	return a
}

// TestRecordsElsewhere checks the audit records of the operations that the walk cannot
// perform.
func TestRecordsElsewhere(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.withGitHub()
	s := &stage{plane: p, messages: p.mailed(), admin: p.bearerOf("admin@example.com"), sandbox: p.create(map[string]any{})}
	s.adminID = p.call("GET", "/v1/me", nil, as(s.admin)...).want(200).str("id")
	p.sql("UPDATE platform_settings SET signup_open = true")
	p.agent.guest = http.HandlerFunc(gateway)
	var all []asked
	for n, o := range operations(t) {
		if elsewhere[o.OperationID] != nil {
			all = append(all, s.do(o, n))
		}
	}
	of := checkRecords(t, p, all)
	for name := range elsewhere {
		if of[name] != (outcomes{done: 1}) {
			t.Errorf("%s: %+v, want one record of success", name, of[name])
		}
	}
	t.Logf("audit: %d operations that the walk cannot do", len(of))
}
