package rest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
)

// accessOf parses the x-wrenn-access of every operation. An operation without one is an
// error, so that none is open by oversight.
func accessOf(spec *openapi3.T) (map[*openapi3.Operation]auth.Access, error) {
	all := make(map[*openapi3.Operation]auth.Access)
	var errs []error
	for path, item := range spec.Paths.Map() {
		for method, op := range item.Operations() {
			a, err := auth.ParseAccess(op.Extensions["x-wrenn-access"])
			if err == nil {
				err = agrees(spec, path, op, a)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s %s: %w", method, path, err))
			}
			all[op] = a
		}
	}
	return all, errors.Join(errs...)
}

// agrees checks that the document's security, which clients see, matches the access that
// the server enforces.
func agrees(spec *openapi3.T, path string, op *openapi3.Operation, a auth.Access) error {
	requirements := spec.Security
	if op.Security != nil {
		requirements = *op.Security
	}
	var says []string
	for _, r := range requirements {
		says = append(says, slices.Sorted(maps.Keys(r))...)
	}
	var want []string
	switch {
	case a.Role == auth.Anybody && slices.Equal(says, []string{"host"}):
		return nil // Agents have tokens of their own, which their operations check.
	case a.Role == auth.Anybody:
	case len(a.Scopes) > 0:
		want = []string{"apiKey", "bearer", "cookie"}
	default:
		want = []string{"bearer", "cookie"}
	}
	if !slices.Equal(says, want) {
		return fmt.Errorf("security is %v, but x-wrenn-access requires %v", says, want)
	}
	if strings.Contains(path, "{team_id}") && !a.Role.OfTeam() && a.Role != auth.Platform {
		return fmt.Errorf("a path with a team's id needs a role of a team, not %q", a.Role)
	}
	return nil
}

type principalKey struct{}

// caller returns the principal of an authenticated operation.
func caller(r *http.Request) auth.Principal {
	p, _ := r.Context().Value(principalKey{}).(auth.Principal)
	return p
}

// authorize authenticates the caller and checks their access. It runs before anything but
// the request's address is used.
func (a *API) authorize(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		op := routed(r).op
		access := a.access[op]
		err := a.checkPrivate(r, op)
		if err == nil {
			err = a.sameSite(r)
		}
		if err != nil {
			a.Fail(w, r, err)
			return
		}
		if access.Role == auth.Anybody {
			if err := a.admit(r, op); err != nil {
				a.Fail(w, r, err)
				return
			}
			next.ServeHTTP(w, r)
			return
		}
		mark := a.Guard.Mark()
		who, err := a.identify(r, access)
		if o := observed(r); o != nil {
			o.who = who // known even if the request names another team
		}
		if err == nil {
			err = access.Check(who)
		}
		if who.ID() != uuid.Nil {
			// Refused requests count for the caller, but not for the team.
			if often := a.spend(r.Context(), access.Rate, who, err == nil); often != nil {
				err = often
			}
		}
		if err != nil {
			a.Fail(w, r, err)
			return
		}
		ctx := context.WithValue(r.Context(), principalKey{}, who)
		if propertiesOf(op).lasts {
			var done func()
			ctx, done = a.Guard.While(ctx, who, mark, func(ctx context.Context) error { return a.again(ctx, r, access, who) })
			defer done()
			if streams(op) {
				// When the access ends, also interrupt a read that waits for the body.
				defer context.AfterFunc(ctx, func() { _ = http.NewResponseController(w).SetReadDeadline(time.Unix(1, 0)) })()
			}
		}
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// again checks whether the caller of a running request still has access.
func (a *API) again(ctx context.Context, r *http.Request, access auth.Access, who auth.Principal) (err error) {
	if who.HasKey() {
		who, err = a.Keys.Again(ctx, r.Header.Get("X-API-Key"), who)
	} else {
		who, err = a.Sessions.Again(ctx, who)
	}
	if err == nil {
		err = access.Check(who)
	}
	return err
}

// identify authenticates a request by its API key, or by an access token in the header
// Authorization or in the cookie. If the caller has no access to the requested team, it
// fails but still returns the caller.
func (a *API) identify(r *http.Request, access auth.Access) (auth.Principal, error) {
	team, malformed := a.teamOf(r, access)
	if key := r.Header.Get("X-API-Key"); key != "" {
		check := a.Keys.Check
		if propertiesOf(routed(r).op).lasts {
			check = a.Keys.CheckRecent // Guard ends the call when the key is revoked.
		}
		who, err := check(r.Context(), key)
		if err == nil && team != nil && *team != who.Team {
			err = fault.New(fault.NotFound, "no such team")
		}
		if err == nil {
			err = malformed
		}
		return who, err
	}
	token := a.accessToken(r)
	if token == "" {
		return auth.Principal{}, fault.New(fault.Unauthenticated, "no credentials: send an API key in X-API-Key, or log in")
	}
	who, err := a.Sessions.Check(r.Context(), token, team)
	if err == nil && team != nil && who.Team == uuid.Nil {
		// The same error whether the team exists or not.
		err = fault.New(fault.NotFound, "no such team")
	}
	if err == nil {
		err = malformed
	}
	return who, err
}

// teamOf returns the team that a request names in its path or in X-Team; nil: none.
// Browsers cannot send headers for a WebSocket, so those name it in the query.
func (a *API) teamOf(r *http.Request, access auth.Access) (*uuid.UUID, error) {
	if !access.Role.OfTeam() {
		return nil, nil
	}
	where, text := "team_id", routed(r).params["team_id"]
	if text == "" {
		where, text = "X-Team", r.Header.Get("X-Team")
	}
	if text == "" && r.Header.Get("Upgrade") != "" {
		where, text = "team", r.URL.Query().Get("team")
	}
	if text == "" {
		return nil, nil
	}
	u, err := id.Parse(id.Team, text)
	if errors.Is(err, id.ErrNone) {
		return nil, fault.New(fault.NotFound, "no such team")
	}
	if err != nil {
		return nil, fault.New(fault.InvalidArgument, "%s: %v", where, err)
	}
	return &u, nil
}

// accessToken returns the request's access token ("": none).
func (a *API) accessToken(r *http.Request) string {
	if header := r.Header.Get("Authorization"); header != "" {
		scheme, token, _ := strings.Cut(header, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return ""
		}
		return token
	}
	if c, err := r.Cookie(a.cookieName(accessCookie)); err == nil && !elsewhere(r) {
		return c.Value
	}
	return ""
}

// elsewhere reports whether a page of another origin loads the response. Browsers send
// the user's cookies if that origin is of the same site, which guests' pages can be.
// Following a link does not count.
func elsewhere(r *http.Request) bool {
	switch r.Header.Get("Sec-Fetch-Site") {
	case "same-site", "cross-site":
		return r.Header.Get("Sec-Fetch-Mode") != "navigate" || r.Header.Get("Sec-Fetch-Dest") != "document"
	}
	return false
}

// sameSite refuses requests that another site's page makes a browser send with the user's
// cookies. Requests with a key or a token in a header cannot be forged that way.
func (a *API) sameSite(r *http.Request) error {
	if r.Header.Get("X-API-Key") != "" || r.Header.Get("Authorization") != "" {
		return nil
	}
	if err := a.crossOrigin.Check(r); err != nil {
		return fault.Because(err, fault.PermissionDenied, "origin not allowed")
	}
	// Browsers open WebSockets with GET, which crossOrigin considers safe.
	if r.Header.Get("Upgrade") != "" && !a.originAllowed(r) {
		return fault.New(fault.PermissionDenied, "origin not allowed")
	}
	return nil
}
