// Package rest is the public REST API: it checks requests against
// api/openapi.yaml, translates between HTTP and the domain's rooms, and does
// nothing more.
package rest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/go-chi/chi/v5"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/api"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/patience"
	"github.com/wrenn-dev/wrenn/internal/server/audit"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/builds"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/github"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/metrics"
	"github.com/wrenn-dev/wrenn/internal/server/notify"
	"github.com/wrenn-dev/wrenn/internal/server/platform"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/teams"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
	"github.com/wrenn-dev/wrenn/internal/server/usage"
	"github.com/wrenn-dev/wrenn/internal/server/users"
)

// Config is what the API works with.
type Config struct {
	Sandboxes *sandboxes.Service
	Templates *templates.Service
	Builds    *builds.Service
	Hosts     *hosts.Registry
	Usage     *usage.Service
	Audit     *audit.Log
	// History is what sandboxes used lately.
	History *metrics.History
	// Channels are told of events.
	Channels *notify.Service
	Keys     *auth.Keys
	Sessions *auth.Sessions
	// Watch ends what goes on for who may no longer.
	Watch    *auth.Watch
	Users    *users.Service
	Teams    *teams.Service
	Platform *platform.Service
	Tokens   auth.Tokens
	// GitHub is asked who people are; nil: they cannot log in with it. GitHubKey
	// signs what such a login begins with.
	GitHub    *github.Client
	GitHubKey []byte
	// Limiter counts calls: of an address what anybody may call, of everybody else
	// what Rates say.
	Limiter *ratelimit.Limiter
	Rates   Rates
	// TrustedProxies are believed what they say of a request's origin.
	TrustedProxies []netip.Prefix
	// PublicURL is where clients reach the service, Domain what sandboxes'
	// host names end with.
	PublicURL, Domain string
	// Insecure lets people log in over plain HTTP at any name.
	Insecure bool
	// Memory bounds what requests take.
	Memory *budget.Budget
	// Crowd bounds each caller's requests under way.
	Crowd *budget.Crowd
	// Checks are what /health asks, by name.
	Checks map[string]func(context.Context) error
	// Observe hears of every answered request.
	Observe func(Observation)
	Log     *slog.Logger
}

// API is the REST API.
type API struct {
	Config
	spec   *openapi3.T
	access map[*openapi3.Operation]auth.Access
	// lasting has the operations that last, so that no request has to find that out.
	lasting map[*openapi3.Operation]bool
	// letters are the pages of links in letters.
	letters letterPages
	public  *url.URL
	// crossOrigin refuses what other sites make browsers send.
	crossOrigin http.CrossOriginProtection
	// pattern is sandboxes' URLs with %s for the id.
	pattern string
	health  health
	routes  router
	chi     chi.Router
}

var _ rest.ServerInterface = (*API)(nil)

// document returns the OpenAPI document. Checking it takes long, and it is the
// same for every API of a process, so it is read once; nobody may change it.
var document = sync.OnceValues(func() (*openapi3.T, error) {
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		return nil, fmt.Errorf("read OpenAPI document: %w", err)
	}
	if err := spec.Validate(context.Background()); err != nil {
		return nil, fmt.Errorf("check OpenAPI document: %w", err)
	}
	// Requests are checked as by 3.0, whose validator does not compile schemas
	// anew for each and does not repeat what it is given in its errors. So the
	// document keeps to schemas that mean the same in both.
	spec.OpenAPI, spec.Webhooks = "3.0.3", nil
	if err := spec.Validate(context.Background()); err != nil {
		return nil, fmt.Errorf("check OpenAPI document: it says what 3.0 cannot: %w", err)
	}
	return spec, nil
})

// New returns the API. It fails when the OpenAPI document is not valid.
func New(c Config) (*API, error) {
	spec, err := document()
	if err != nil {
		return nil, err
	}
	public, err := url.Parse(c.PublicURL)
	if err != nil || public.Host == "" {
		return nil, fmt.Errorf("read WRENN_PUBLIC_URL: %q is not a URL like http://localhost:8000", c.PublicURL)
	}
	c.PublicURL = strings.TrimSuffix(c.PublicURL, "/")
	a := &API{Config: c, spec: spec, public: public, lasting: make(map[*openapi3.Operation]bool)}
	if a.access, err = accessOf(spec); err != nil {
		return nil, fmt.Errorf("read OpenAPI document: %w", err)
	}
	for op := range a.access {
		a.lasting[op] = lasts(op)
	}
	if err := a.crossOrigin.AddTrustedOrigin(public.Scheme + "://" + public.Host); err != nil {
		return nil, fmt.Errorf("read WRENN_PUBLIC_URL: %w", err)
	}
	a.pattern = public.Scheme + "://{port}-%s." + c.Domain
	if p := public.Port(); p != "" {
		a.pattern += ":" + p
	}
	if a.letters, err = renderLetterPages(c.PublicURL); err != nil {
		return nil, fmt.Errorf("render pages of letters: %w", err)
	}
	a.health.checks = c.Checks

	a.routes = newRouter(spec)
	r := chi.NewRouter()
	r.Use(a.audit, a.authorize, a.limit, a.validate)
	rest.HandlerWithOptions(a, rest.ChiServerOptions{
		BaseRouter:       r,
		ErrorHandlerFunc: func(w http.ResponseWriter, r *http.Request, err error) { a.Fail(w, r, unbound(err)) },
	})
	a.chi = r
	return a, nil
}

// Handler serves the API.
func (a *API) Handler() http.Handler { return a.observe(a.recover(a.BoundAddresses(a.route(a.chi)))) }

// Bounds of bodies that are JSON, in bytes.
const (
	maxBody     = 1 << 20
	maxExecBody = 16 << 20
)

// streams reports whether an operation's body is passed on as it comes, as all but JSON are.
func streams(op *openapi3.Operation) bool {
	return op.RequestBody != nil && !isJSON(op.RequestBody.Value.Content)
}

// isJSON reports whether content has no media type but JSON. It may have none at all.
func isJSON(content openapi3.Content) bool {
	for kind := range content {
		if kind != jsonType {
			return false
		}
	}
	return true
}

// limit bounds the caller's requests under way, and bodies unless they are streamed on.
// It begins to count the request's memory for the team's owner, or for the address of a
// caller without a team.
func (a *API) limit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := caller(r)
		if who.ID() != uuid.Nil {
			leave, err := a.Crowd.Enter(who.ID(), who.Payer)
			if err != nil {
				a.Fail(w, r, err)
				return
			}
			defer leave()
		}
		owner := who.Payer.String()
		if who.Payer == uuid.Nil {
			owner = a.addressText(r)
		}
		o := observed(r)
		o.held = a.Memory.Hold(owner)
		defer o.held.Release()
		op := routed(r).op
		if streams(op) {
			patience.Stream(r)
			next.ServeHTTP(w, r)
			return
		}
		most := int64(maxBody)
		if op.OperationID == "exec" || op.OperationID == "runCode" {
			patience.Stream(r)
			most = maxExecBody
		}
		if r.ContentLength > most {
			a.Fail(w, r, tooLarge(most))
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, most)
		next.ServeHTTP(w, r)
	})
}

func tooLarge(most int64) error {
	return fault.New(fault.PayloadTooLarge, "the body is longer than %d bytes", most)
}

// recover answers a panic with an error, and logs it.
func (a *API) recover(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			v := recover()
			if v == nil {
				return
			}
			//nolint:errorlint // The sentinel itself is what must go on.
			if v == http.ErrAbortHandler {
				panic(v)
			}
			o := observed(r)
			a.log(r).Error("panic", "value", fmt.Sprint(v), "stack", stack())
			if o != nil && o.status != 0 {
				panic(http.ErrAbortHandler)
			}
			a.Fail(w, r, errors.New("panic"))
		}()
		next.ServeHTTP(w, r)
	})
}

// sandboxURL is where the sandbox's ports are, "{port}" standing for the port.
func (a *API) sandboxURL(wire string) string { return fmt.Sprintf(a.pattern, wire) }

// originAllowed says whether a browser's page may open a WebSocket: one of the
// service's own may.
func (a *API) originAllowed(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && (strings.EqualFold(u.Host, r.Host) || strings.EqualFold(u.Host, a.public.Host))
}
