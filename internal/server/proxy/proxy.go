// Package proxy forwards requests for {port}-{sandbox_id}.{domain} to the port in the
// sandbox.
package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	stdlog "log"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/duplex"
	"github.com/wrenn-dev/wrenn/internal/filesign"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/patience"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/tracing"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// Config configures a [Proxy].
type Config struct {
	// Domain is the domain of sandboxes' host names, for example "localhost".
	Domain string
	// ServiceDomain is the service's domain. It equals Domain unless sandboxes have their
	// own domain. Then all names below Domain belong to sandboxes, and sandboxes' names
	// below ServiceDomain are not found.
	ServiceDomain string

	Sandboxes *sandboxes.Service
	Hosts     *hosts.Registry
	Keys      *auth.Keys
	// Guard ends requests whose credentials were revoked.
	Guard  *auth.AccessGuard
	Tokens auth.Tokens
	// Memory bounds the memory of requests, InFlight each caller's requests in flight.
	Memory   *budget.Budget
	InFlight *budget.InFlight
	// Fail responds to a request with an error.
	Fail func(http.ResponseWriter, *http.Request, error)
	Log  *slog.Logger
}

// Proxy handles requests to sandboxes' host names.
type Proxy struct {
	Config
	cache    *sandboxes.Cache[target]
	errors   *stdlog.Logger // for upgraded connections
	requests *prometheus.CounterVec
	// forwarded is the counter of requests with the result "forwarded".
	forwarded prometheus.Counter
}

// New returns a proxy. It subscribes to changes of sandboxes and to revocations.
func New(c Config) *Proxy {
	p := &Proxy{
		Config: c, cache: sandboxes.NewCache[target](c.Sandboxes),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "wrenn_proxy_requests_total", Help: "Requests to sandboxes' ports, by result: forwarded, or the error's code."}, []string{"result"}),
	}
	p.forwarded = p.requests.WithLabelValues("forwarded")
	p.errors = slog.NewLogLogger(c.Log.Handler(), slog.LevelDebug)
	c.Guard.OnLostAccess(p.revoked)
	c.Guard.OnLostAccess(func(string) { c.Keys.Forget() })
	return p
}

// Collectors returns the proxy's Prometheus metrics.
func (p *Proxy) Collectors() []prometheus.Collector { return []prometheus.Collector{p.requests} }

// Match reports whether the proxy handles a request's host: a sandbox's name, well-formed
// or not, or any name in a domain that only sandboxes use.
func (p *Proxy) Match(host string) bool {
	name := netaddr.Hostname(host)
	if _, ok := label(name, p.ServiceDomain); ok {
		return true
	}
	return p.Domain != p.ServiceDomain && (name == p.Domain || strings.HasSuffix(name, "."+p.Domain))
}

// isPreflight reports whether a request is a CORS preflight for a signed URL. The
// response is the same for every URL, so nothing is looked up; the actual request needs a
// valid signature.
func (p *Proxy) isPreflight(r *http.Request) bool {
	label, ok := label(netaddr.Hostname(r.Host), p.Domain)
	port, _, _ := strings.Cut(label, "-")
	return ok && port == strconv.Itoa(hostwire.GuestPort) && r.Method == http.MethodOptions &&
		r.Header.Get("Access-Control-Request-Method") != "" && filesign.Signed(r.URL)
}

// label returns the part of a sandbox's host name before the domain.
func label(name, domain string) (string, bool) {
	label, ok := strings.CutSuffix(name, "."+domain)
	return label, ok && !strings.Contains(label, ".") && strings.Contains(label, "-"+string(id.Sandbox))
}

// ServeHTTP forwards a request to its sandbox.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) { duplex.Serve(w, r, p.serve) }

func (p *Proxy) serve(w http.ResponseWriter, r *http.Request) {
	if p.isPreflight(r) {
		allowPages(w.Header())
		requestid.Pass(r.Context(), w.Header(), requestid.Header)
		w.WriteHeader(http.StatusNoContent)
		return
	}
	mark := p.Guard.Mark()
	target, err := p.resolve(r)
	if span := tracing.Of(r.Context()); span.On() {
		span.Name("proxy")
		if err == nil {
			span.Set("wrenn.sandbox_id", id.Format(id.Sandbox, target.sandbox))
			span.Set("wrenn.team_id", id.Format(id.Team, target.team))
			span.SetInt("wrenn.port", target.port)
		}
	}
	if err == nil && target.who.HasKey() {
		ctx, done := p.Guard.While(r.Context(), target.who, mark, func(ctx context.Context) error {
			now, err := p.Keys.Again(ctx, r.Header.Get("X-API-Key"), target.who)
			if err == nil {
				err = use.Check(now)
			}
			return err
		})
		defer done()
		r = r.WithContext(ctx)
	} else if err == nil {
		ctx, done := p.Guard.WhileToken(r.Context(), target.team, target.sandbox, mark, func(ctx context.Context) error {
			row, err := p.Sandboxes.Lookup(ctx, target.sandbox)
			if err == nil && row.TokenEpoch != target.epoch {
				err = errRevoked
			}
			if err == nil {
				err = p.Sandboxes.TeamIs(ctx, target.team)
			}
			return err
		})
		defer done()
		r = r.WithContext(ctx)
	}
	if err == nil {
		var leave func()
		if leave, err = p.InFlight.Enter(target.principal(), target.payer); err == nil {
			defer leave()
		}
	}
	var held *budget.Reservation
	if err == nil {
		held = p.Memory.Reserve(target.payer.String())
		defer held.Release()
		err = p.buffer(r, &target, held)
	}
	if err != nil {
		p.fail(w, r, err)
		return
	}
	answer := held.Stream(w, func(err error) { p.fail(w, r, err) })
	defer func() {
		// The proxy breaks off what it could not write, but that was a refusal.
		//nolint:errorlint // The sentinel itself is what was panicked with.
		if v := recover(); v != nil && (v != http.ErrAbortHandler || !answer.Refused()) {
			panic(v)
		}
	}()
	p.forward(answer, r, target)
	answer.Finish()
}

// fail responds to a request that does not reach its sandbox.
func (p *Proxy) fail(w http.ResponseWriter, r *http.Request, err error) {
	var f *fault.Error
	code := fault.Internal
	if errors.As(err, &f) {
		code = f.Code
	}
	p.requests.WithLabelValues(string(code)).Inc()
	tracing.Of(r.Context()).Fail(string(code))
	if code == fault.Unavailable {
		w.Header().Set("Retry-After", "1")
	}
	w.Header().Set(requestid.Header, requestid.From(r.Context()))
	p.Fail(w, r, err)
}

// maxBuffered is the longest body that is buffered for a retry, in bytes.
const maxBuffered = 64 << 10

// buffer reads a request's body, so that the request can be sent again if the host
// refuses it because the sandbox is paused. If the body is too long or held has no room
// for it, buffer resumes a paused sandbox now.
func (p *Proxy) buffer(r *http.Request, d *destination, held *budget.Reservation) error {
	if r.Body == nil || r.Body == http.NoBody || r.ContentLength == 0 {
		return nil
	}
	if r.ContentLength < 0 || r.ContentLength > maxBuffered || held.GrowFor(int(r.ContentLength), 1) != nil {
		patience.Idle(r) // Some bodies last as long as a person types.
		// Use keeps the sandbox from being paused for idleness.
		host, err := p.Sandboxes.Use(r.Context(), d.team, d.sandbox)
		d.host = host
		return err
	}
	body := make([]byte, r.ContentLength)
	if _, err := io.ReadFull(r.Body, body); err != nil {
		return fault.Body(err)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	return nil
}

// destination is the resolved target of a request.
type destination struct {
	caller
	host    *hosts.Host
	team    uuid.UUID
	payer   uuid.UUID
	sandbox uuid.UUID
	port    int
}

// principal returns the API key or, for a sandbox's token, the sandbox, which the request
// counts for.
func (d *destination) principal() uuid.UUID {
	if d.who.HasKey() {
		return d.who.Key
	}
	return d.sandbox
}

// caller is the credentials of a request.
type caller struct {
	// who is the holder of the API key; zero if the request has a token of the sandbox.
	// The sandbox must belong to who's team.
	who auth.Principal
	// signed reports a signed URL, which resolve checks.
	signed bool
	// epoch is the epoch of the request's token. For signed URLs, it is the sandbox's
	// current one.
	epoch int32
}

var errRevoked = fault.New(fault.Unauthenticated, "the sandbox's tokens were revoked: get the sandbox again for new ones")

// use is the access that an API key needs for requests to ports.
var use = auth.Access{Role: auth.Member, Scopes: []auth.Scope{auth.Sandboxes}}

// resolve authenticates a request and finds its sandbox and host.
func (p *Proxy) resolve(r *http.Request) (destination, error) {
	var none destination
	label, ok := label(netaddr.Hostname(r.Host), p.Domain)
	if !ok {
		return none, fault.New(fault.NotFound, "no sandbox has this name: the name of a sandbox's port is PORT-SANDBOX.%s", p.Domain)
	}
	portText, sandboxText, _ := strings.Cut(label, "-")
	port, err := strconv.Atoi(portText)
	if err != nil || port < 1 || port > 65535 || strconv.Itoa(port) != portText {
		return none, fault.New(fault.InvalidArgument, "port: must be a number from 1 to 65535")
	}
	sandbox, err := id.Parse(id.Sandbox, sandboxText)
	if err != nil {
		return none, fault.New(fault.InvalidArgument, "sandbox id: %v", err)
	}
	if !strings.HasPrefix(r.URL.Path, "/") {
		return none, fault.New(fault.InvalidArgument, "path: must begin with /")
	}
	shown, err := p.authorize(r, sandbox, port)
	if err != nil {
		return none, err
	}
	t, err := p.cache.Get(r.Context(), sandbox, p.lookup)
	if err != nil {
		return none, err
	}
	if team := shown.who.Team; team != uuid.Nil && team != t.team {
		return none, fault.New(fault.NotFound, "no such sandbox")
	}
	switch {
	case shown.signed:
		shown.epoch = t.epoch
		if err := p.checkSignature(r, sandbox, t.epoch); err != nil {
			return none, err
		}
	case !shown.who.HasKey() && shown.epoch != t.epoch:
		return none, errRevoked
	}
	d := destination{caller: shown, team: t.team, payer: t.payer, sandbox: sandbox, port: port}
	switch t.state {
	case sandboxes.Running:
		d.host, err = p.Hosts.Get(&t.host)
	case sandboxes.Pausing, sandboxes.Paused, sandboxes.Resuming:
		_, d.host, err = p.Sandboxes.Wake(r.Context(), t.team, sandbox)
	case sandboxes.Missing:
		err = fault.New(fault.HostUnreachable, "the sandbox's host is unreachable")
	case sandboxes.Pending, sandboxes.Starting:
		err = fault.New(fault.Unavailable, "the sandbox is starting")
	default:
		err = fault.New(fault.NotFound, "the sandbox has ended")
	}
	return d, err
}

// authorize checks a request's credentials.
func (p *Proxy) authorize(r *http.Request, sandbox uuid.UUID, port int) (caller, error) {
	var none caller
	if port == hostwire.GuestPort {
		if strings.HasPrefix(strings.ToLower(r.URL.Path), "/init") {
			return none, fault.New(fault.NotFound, "no such path")
		}
		token := r.Header.Get(hostwire.AccessToken)
		signed := token == "" && filesign.Signed(r.URL)
		epoch, ok := p.Tokens.AccessEpoch(sandbox, token)
		if signed || ok {
			return caller{signed: signed, epoch: epoch}, nil
		}
		return none, fault.New(fault.Unauthenticated, "port %d needs the sandbox's access token in X-Access-Token", hostwire.GuestPort)
	}
	if token := r.Header.Get("X-Traffic-Token"); token != "" {
		if epoch, ok := p.Tokens.TrafficEpoch(sandbox, token); ok {
			return caller{epoch: epoch}, nil
		}
		return none, fault.New(fault.Unauthenticated, "invalid traffic token")
	}
	if key := r.Header.Get("X-API-Key"); key != "" {
		who, err := p.holder(r.Context(), key)
		return caller{who: who}, err
	}
	return none, fault.New(fault.Unauthenticated, "send the team's API key in X-API-Key, or the sandbox's traffic token in X-Traffic-Token")
}

// checkSignature checks the signature of a file URL, which the client made with the
// epoch's access token. It signs r again for envd, which knows no epochs, and normalizes
// the query.
func (p *Proxy) checkSignature(r *http.Request, sandbox uuid.UUID, epoch int32) error {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return fault.Because(err, fault.InvalidArgument, "query: malformed")
	}
	if err := filesign.Check(r.Method, q, p.Tokens.Access(sandbox, epoch), time.Now()); err != nil {
		return fault.New(fault.Unauthenticated, "%v", err)
	}
	filesign.Resign(r.Method, q, p.Tokens.Guest(sandbox))
	r.URL.RawQuery = q.Encode()
	return nil
}

// holder returns the holder of an API key that may send requests to ports.
func (p *Proxy) holder(ctx context.Context, key string) (auth.Principal, error) {
	who, err := p.Keys.CheckRecent(ctx, key)
	if err == nil {
		err = use.Check(who)
	}
	return who, err
}

// revoked drops a sandbox that somebody lost access to, or all sandboxes if whose is
// another id or none.
func (p *Proxy) revoked(whose string) {
	if sandbox, err := uuid.Parse(whose); err == nil {
		p.cache.Drop(sandbox)
		return
	}
	p.cache.Clear()
}

// lookup finds a target, which is remembered while it runs.
func (p *Proxy) lookup(ctx context.Context, sandbox uuid.UUID) (found target, keep bool, err error) {
	row, payer, err := p.Sandboxes.LookupPayer(ctx, sandbox)
	if err != nil {
		return target{}, false, err
	}
	t := target{team: row.TeamID, payer: payer, epoch: row.TokenEpoch, state: sandboxes.State(row.State)}
	if row.HostID != nil {
		t.host = *row.HostID
	}
	return t, t.state == sandboxes.Running, nil
}

// forwarded is the headers that the front door sets.
var forwarded = []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"}

func (p *Proxy) forward(w http.ResponseWriter, r *http.Request, d destination) {
	prefix := hostwire.ProxyPath(id.Format(id.Sandbox, d.sandbox), d.port)
	filter := filterPort(netaddr.Hostname(r.Host))
	finish := func(*http.Response) {}
	if d.port == hostwire.GuestPort {
		filter = filterDaemon
		finish = confine
		if d.signed {
			finish = func(resp *http.Response) { confine(resp); allowPages(resp.Header) }
		}
		// envd speaks no other protocol, and nothing would bound an upgraded connection.
		r.Header.Del("Upgrade")
	}
	rp := upstream.Proxy{
		Transport:      &waker{p, d, r.GetBody},
		Filter:         filter,
		ModifyResponse: func(resp *http.Response) { finish(resp); p.answered(r.Context(), d, resp) },
		ErrorLog:       p.errors,
		Rewrite: func(pr *httputil.ProxyRequest) {
			u := pr.Out.URL
			u.Scheme, u.Host = "http", "agent"
			if u.RawPath != "" {
				u.RawPath = prefix + u.RawPath
			}
			u.Path = prefix + u.Path
			// Keep the query unchanged, even if Go cannot parse it.
			u.RawQuery = pr.In.URL.RawQuery
			h := pr.Out.Header
			if pr.In.Header.Get(forwarded[0]) == "" {
				pr.SetXForwarded()
			} else {
				for _, name := range forwarded {
					if v := pr.In.Header[name]; v != nil {
						h[name] = v
					}
				}
			}
			for name := range h {
				if strings.HasPrefix(name, hostwire.Private) {
					h.Del(name)
				}
			}
			requestid.Pass(pr.In.Context(), h, hostwire.RequestID)
			tracing.Pass(pr.In.Context(), h, hostwire.Trace)
			h.Del("X-API-Key")
			h.Del("X-Traffic-Token")
			dropOurCookies(h)
			if d.port == hostwire.GuestPort {
				h.Del("Cookie")
				if h.Get(hostwire.AccessToken) != "" {
					h.Set(hostwire.AccessToken, p.Tokens.Guest(d.sandbox))
				}
			}
			if own, ok := h["Authorization"]; ok {
				h[hostwire.Authorization] = own
			}
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			var f *fault.Error
			if r.Context().Err() != nil {
				if !errors.As(context.Cause(r.Context()), &f) {
					panic(http.ErrAbortHandler) // The client is gone.
				}
				err = f
			}
			if errors.As(err, &f) {
				p.fail(w, r, err)
				return
			}
			if errors.Is(err, upstream.ErrBody) {
				p.fail(w, r, fault.Body(err))
				return
			}
			p.fail(w, r, fault.Because(err, fault.HostUnreachable, "the sandbox's host does not respond"))
		},
	}
	rp.ServeHTTP(w, r)
}

// answered gives a response the request's id, unless the program in the sandbox has set
// one, and logs the response at debug level.
func (p *Proxy) answered(ctx context.Context, d destination, resp *http.Response) {
	if _, ok := resp.Header[requestid.Header]; !ok {
		requestid.Pass(ctx, resp.Header, requestid.Header)
	}
	if p.Log.Enabled(ctx, slog.LevelDebug) {
		p.Log.DebugContext(ctx, "request forwarded", "request_id", requestid.From(ctx), "sandbox_id", id.Format(id.Sandbox, d.sandbox), "port", d.port, "status", resp.StatusCode)
	}
}

// waker sends a request to a sandbox's host. If the host refuses it because the sandbox
// is paused, waker resumes the sandbox and sends the request again.
type waker struct {
	*Proxy
	to destination
	// body returns a new reader of the request's body; nil: there is no body, or it was
	// not buffered.
	body func() (io.ReadCloser, error)
}

// RoundTrip implements [http.RoundTripper].
func (k *waker) RoundTrip(req *http.Request) (*http.Response, error) {
	for try := 1; ; try++ {
		k.to.host.Authorize(req.Header)
		resp, err := k.to.host.Transport().RoundTrip(req)
		if err != nil {
			return nil, err
		}
		state, refused := sandboxes.RefusedAs(resp)
		if !refused {
			k.forwarded.Inc()
			tracing.Of(req.Context()).SetInt("http.response.status_code", resp.StatusCode)
			return resp, nil
		}
		resp.Body.Close()
		again := req.Body == nil || req.Body == http.NoBody || k.body != nil
		if try == sandboxes.Tries || !again {
			return nil, fault.New(fault.Conflict, "the sandbox is %s", state)
		}
		if _, k.to.host, err = k.Sandboxes.Refused(req.Context(), k.to.team, k.to.sandbox); err != nil {
			return nil, err
		}
		if k.body != nil {
			req = req.Clone(req.Context())
			if req.Body, err = k.body(); err != nil {
				return nil, err
			}
		}
	}
}

// target is a sandbox's host, owner and state.
type target struct {
	team, host uuid.UUID
	payer      uuid.UUID // of the team
	state      sandboxes.State
	epoch      int32 // of its tokens
}
