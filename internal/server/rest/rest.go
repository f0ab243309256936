// Package rest is the public REST API. It validates requests against api/openapi.yaml and
// translates between HTTP and the domain packages. It has no rules of its own.
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
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/teams"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
	"github.com/wrenn-dev/wrenn/internal/server/usage"
	"github.com/wrenn-dev/wrenn/internal/server/users"
)

// Config configures an [API].
type Config struct {
	Sandboxes *sandboxes.Service
	Templates *templates.Service
	Builds    *builds.Service
	Hosts     *hosts.Registry
	Usage     *usage.Service
	Audit     *audit.Log
	// History has sandboxes' recent resource use.
	History *metrics.History
	// Channels manages notification channels.
	Channels *notify.Service
	Keys     *auth.Keys
	Sessions *auth.Sessions
	// Guard ends streams of callers who lost access.
	Guard    *auth.AccessGuard
	Users    *users.Service
	Teams    *teams.Service
	Platform *platform.Service
	Tokens   auth.Tokens
	// GitHub authenticates users; nil: no login with GitHub. GitHubKey signs the state of
	// such a login.
	GitHub    *github.Client
	GitHubKey []byte
	// Limiter applies Rates to authenticated callers, and fixed limits to addresses.
	Limiter *ratelimit.Limiter
	Rates   Rates
	// TrustedProxies may set headers that name the client.
	TrustedProxies []netip.Prefix
	// PublicURL is the service's URL for clients, Domain the domain of sandboxes' host
	// names.
	PublicURL, Domain string
	// Insecure allows login over plain HTTP at any name.
	Insecure bool
	// Memory bounds the memory of requests.
	Memory *budget.Budget
	// InFlight bounds each caller's requests in flight.
	InFlight *budget.InFlight
	// Checks are the checks of /health, by name.
	Checks map[string]func(context.Context) error
	// Observe is called after every request; may be nil.
	Observe func(Observation)
	Log     *slog.Logger
}

// API is the REST API.
type API struct {
	Config
	spec   *openapi3.T
	access map[*openapi3.Operation]auth.Access
	// mailPages has the pages that links in mails open.
	mailPages mailPages
	public    *url.URL
	// crossOrigin refuses requests that other sites make browsers send.
	crossOrigin http.CrossOriginProtection
	// pattern is the format of sandboxes' URLs, with %s for the id.
	pattern string
	health  health
	routes  router
	chi     chi.Router
}

var _ rest.ServerInterface = (*API)(nil)

// document returns the OpenAPI document, which must not be changed. All APIs of a process
// share it, because validating it is slow.
var document = sync.OnceValues(func() (*openapi3.T, error) {
	spec, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		return nil, fmt.Errorf("read OpenAPI document: %w", err)
	}
	if err := spec.Validate(context.Background()); err != nil {
		return nil, fmt.Errorf("check OpenAPI document: %w", err)
	}
	// Validate requests by OpenAPI 3.0, whose validator compiles each schema once and
	// does not quote values in errors. So the document only uses schemas that mean the
	// same in both versions.
	spec.OpenAPI, spec.Webhooks = "3.0.3", nil
	if err := spec.Validate(context.Background()); err != nil {
		return nil, fmt.Errorf("check OpenAPI document: not valid in OpenAPI 3.0: %w", err)
	}
	if err := readProperties(spec); err != nil {
		return nil, fmt.Errorf("check OpenAPI document: %w", err)
	}
	return spec, nil
})

// New returns the API. It fails if the configuration or the OpenAPI document is not
// valid.
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
	a := &API{Config: c, spec: spec, public: public}
	if a.access, err = accessOf(spec); err != nil {
		return nil, fmt.Errorf("read OpenAPI document: %w", err)
	}
	if err := a.crossOrigin.AddTrustedOrigin(public.Scheme + "://" + public.Host); err != nil {
		return nil, fmt.Errorf("read WRENN_PUBLIC_URL: %w", err)
	}
	a.pattern = public.Scheme + "://{port}-%s." + c.Domain
	if p := public.Port(); p != "" {
		a.pattern += ":" + p
	}
	if a.mailPages, err = renderMailPages(c.PublicURL); err != nil {
		return nil, fmt.Errorf("render pages that mails link to: %w", err)
	}
	a.health.checks = c.Checks

	a.routes = newRouter(spec)
	r := chi.NewRouter()
	r.Use(a.audit, a.authorize, a.limit, a.stream, a.validate)
	rest.HandlerWithOptions(a, rest.ChiServerOptions{
		BaseRouter:       r,
		ErrorHandlerFunc: func(w http.ResponseWriter, r *http.Request, err error) { a.Fail(w, r, unbound(err)) },
	})
	a.chi = r
	return a, nil
}

// Handler returns the API's handler.
func (a *API) Handler() http.Handler { return a.observe(a.recover(a.BoundAddresses(a.route(a.chi)))) }

// maxBody limits a JSON body, in bytes, unless the document says otherwise.
const maxBody = 1 << 20

// streams reports whether an operation streams its body on. All operations with bodies
// other than JSON do.
func streams(op *openapi3.Operation) bool {
	return op.RequestBody != nil && !isJSON(op.RequestBody.Value.Content)
}

// answersStream reports whether an operation's response can be of any length: all but JSON
// are passed on as they come.
func answersStream(op *openapi3.Operation) bool {
	for status, r := range op.Responses.Map() {
		if status == "101" || strings.HasPrefix(status, "2") && !isJSON(r.Value.Content) {
			return true
		}
	}
	return false
}

// isJSON reports whether content has no media type except JSON. It may have none.
func isJSON(content openapi3.Content) bool {
	for kind := range content {
		if kind != jsonType {
			return false
		}
	}
	return true
}

// limit bounds the caller's requests in flight, and the size of bodies that are not
// streamed. It opens the request's memory account, for the team's owner or for the
// address of a caller without a team. Rows that the request reads from the database count
// for it.
func (a *API) limit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := caller(r)
		if who.ID() != uuid.Nil {
			leave, err := a.InFlight.Enter(who.ID(), who.Payer)
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
		o.held = a.Memory.Reserve(owner)
		defer o.held.Release()
		r = r.WithContext(store.Metered(r.Context(), o.held.GrowForRow))
		op := routed(r).op
		if streams(op) {
			patience.Stream(r)
			next.ServeHTTP(w, r)
			return
		}
		most := propertiesOf(op).maxBody
		if most > maxBody {
			patience.Stream(r)
		}
		if r.ContentLength > most {
			a.Fail(w, r, tooLarge(most))
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, most)
		next.ServeHTTP(w, r)
	})
}

// stream counts what a response of any length takes of the memory while its client does
// not read.
func (a *API) stream(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !answersStream(routed(r).op) {
			next.ServeHTTP(w, r)
			return
		}
		s := observed(r).held.Stream(w, func(err error) { a.Fail(w, r, err) })
		next.ServeHTTP(s, r)
		s.Finish()
	})
}

func tooLarge(most int64) error {
	return fault.New(fault.PayloadTooLarge, "the body is longer than %d bytes", most)
}

// recover logs a panic and responds with an error.
func (a *API) recover(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			v := recover()
			if v == nil {
				return
			}
			//nolint:errorlint // The sentinel itself must be passed on.
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

// sandboxURL returns the URL of a sandbox's ports, with "{port}" in place of the port.
func (a *API) sandboxURL(wire string) string { return fmt.Sprintf(a.pattern, wire) }

// originAllowed reports whether a browser's page may open a WebSocket. Only pages of the
// service may.
func (a *API) originAllowed(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && (strings.EqualFold(u.Host, r.Host) || strings.EqualFold(u.Host, a.public.Host))
}
