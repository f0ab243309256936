// Package server is the control plane: the REST API, the proxy to sandboxes' ports, and
// the background work that keeps the database and the hosts in agreement.
package server

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/pki"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/server/audit"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/builds"
	"github.com/wrenn-dev/wrenn/internal/server/events"
	"github.com/wrenn-dev/wrenn/internal/server/github"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/idempotency"
	"github.com/wrenn-dev/wrenn/internal/server/mail"
	"github.com/wrenn-dev/wrenn/internal/server/metrics"
	"github.com/wrenn-dev/wrenn/internal/server/notify"
	"github.com/wrenn-dev/wrenn/internal/server/platform"
	"github.com/wrenn-dev/wrenn/internal/server/proxy"
	"github.com/wrenn-dev/wrenn/internal/server/ratelimit"
	"github.com/wrenn-dev/wrenn/internal/server/reconcile"
	"github.com/wrenn-dev/wrenn/internal/server/rest"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/spool"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/teams"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
	"github.com/wrenn-dev/wrenn/internal/server/usage"
	"github.com/wrenn-dev/wrenn/internal/server/users"
	"github.com/wrenn-dev/wrenn/internal/server/work"
	"github.com/wrenn-dev/wrenn/internal/settings"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

// The Redis client logs to standard error in its own format. Disable that, because it
// also returns the errors, and the server logs those.
func init() { logging.Disable() }

// minHeartbeat is the shortest allowed interval between heartbeats.
const minHeartbeat = 100 * time.Millisecond

// minRequestMemoryMiB is the minimum and default of [Config.RequestMemoryMiB]: an owner's
// share of it suffices for the longest body.
const minRequestMemoryMiB = 256

// defaultAtOnce is the default of [Config.RequestsAtOnce].
const defaultAtOnce = 1024

// otherMemoryMiB is a generous bound of the server's memory beside requests. It took 66
// to 74 MiB during a run of 360,000 requests.
const otherMemoryMiB = 256

// MemoryLimit is the server's soft memory limit in bytes (see
// runtime/debug.SetMemoryLimit).
func (c Config) MemoryLimit() int64 {
	return int64(cmp.Or(c.RequestMemoryMiB, minRequestMemoryMiB)+otherMemoryMiB) << 20
}

const (
	// flushWithin bounds the last messages to other servers.
	flushWithin = 2 * time.Second
	// forgetEvery is how often rows of crashed servers are deleted.
	forgetEvery = time.Hour
)

// sandboxOverheadMiB is added to each sandbox's memory. Agents add the same.
const sandboxOverheadMiB = 64

// Config configures the control plane. The tags declare its settings (see
// internal/settings).
type Config struct {
	DatabaseURL string `env:"DATABASE_URL,required,notEmpty" help:"PostgreSQL, postgres://user:password@host/database"`
	RedisURL    string `env:"REDIS_URL,required,notEmpty" help:"Redis, redis://host:port, rediss://… or unix:///path"`
	// Listen is for the caller, who serves Handler: New does not listen.
	Listen        string `env:"WRENN_LISTEN" envDefault:"localhost:8080" help:"address to listen on: host:port or unix:/path"`
	MetricsListen string `env:"WRENN_METRICS_LISTEN" help:"address of /metrics for Prometheus, which needs no credential there: host:port or unix:/path; empty: no metrics"`
	Domain        string `env:"WRENN_DOMAIN" envDefault:"localhost" help:"domain of the service; sandboxes' host names are below it, unless WRENN_SANDBOX_DOMAIN is set"`
	SandboxDomain string `env:"WRENN_SANDBOX_DOMAIN" help:"domain that only sandboxes use, which keeps their pages and cookies away from the service (security.md, Origins)"`
	PublicURL     string `env:"WRENN_PUBLIC_URL" envDefault:"http://localhost:8000" help:"URL at which clients reach the service"`
	Insecure      bool   `env:"WRENN_INSECURE" help:"let users log in over plain HTTP at names other than loopback"`
	SecretKey     string `env:"WRENN_SECRET_KEY,required,notEmpty" help:"at least 32 random bytes in hexadecimal, under which the database encrypts the installation's secret; with several keys, separated by commas, the first one encrypts (upgrade.md)"`
	AgentURL      string `env:"WRENN_AGENT_URL" help:"agent of a host on this machine, http://host:port or unix:/path; empty: all hosts register themselves"`
	AgentToken    string `env:"WRENN_AGENT_TOKEN" help:"token of the agent at WRENN_AGENT_URL"`
	CACert        string `env:"WRENN_CA_CERT" help:"certificate file of the authority that wrenn ca init makes; empty: hosts can only be on this machine"`
	CAKey         string `env:"WRENN_CA_KEY" help:"key file of that authority"`

	Heartbeat        time.Duration `env:"WRENN_HEARTBEAT" envDefault:"10s" help:"interval at which agents report; a host that misses two reports is unreachable"`
	OvercommitMemory float64       `env:"WRENN_OVERCOMMIT_MEMORY" envDefault:"1" help:"memory that sandboxes may be promised, as a multiple of the host's; 0: no limit"`
	OvercommitVCPUs  float64       `env:"WRENN_OVERCOMMIT_VCPUS" envDefault:"32" help:"processors that sandboxes may be promised, as a multiple of the host's; 0: no limit"`
	AuditRetention   time.Duration `env:"WRENN_AUDIT_RETENTION" envDefault:"2160h" help:"age at which audit records are deleted; 0: never"`
	DrainIdle        time.Duration `env:"WRENN_DRAIN_IDLE" envDefault:"30s" help:"time without use after which a draining host pauses a sandbox"`
	// deploy/systemd waits for this default and for the requests before it.
	StopTimeout time.Duration `env:"WRENN_STOP_TIMEOUT" envDefault:"75s" help:"time for creations, pauses and deletions under way when the server stops"`

	RequestMemoryMiB int `env:"WRENN_REQUEST_MEMORY_MIB" envDefault:"256" help:"memory in MiB for the bodies and results of all requests under way; the teams of one owner get a quarter of it"`
	RequestsAtOnce   int `env:"WRENN_REQUESTS_AT_ONCE" envDefault:"1024" help:"requests under way of one API key, user or sandbox token, streams included; an address, and the teams of one owner together, may have twice as many"`

	SMTPURL       string `env:"WRENN_SMTP_URL" help:"mail server, smtp://user:password@host:port or smtps://…; empty: mails go to the log (teams.md)"`
	MailFrom      string `env:"WRENN_MAIL_FROM" help:"sender of mails"`
	NotifyPrivate bool   `env:"WRENN_NOTIFY_PRIVATE" help:"let webhooks reach addresses that are not public"`

	GitHubClientID     string `env:"WRENN_GITHUB_CLIENT_ID" help:"client id of the OAuth application for log-in with GitHub"`
	GitHubClientSecret string `env:"WRENN_GITHUB_CLIENT_SECRET" help:"client secret of the OAuth application"`
	GitHubURL          string `env:"WRENN_GITHUB_URL" help:"site of a GitHub Enterprise server; empty: github.com"`
	GitHubAPIURL       string `env:"WRENN_GITHUB_API_URL" help:"API of the GitHub Enterprise server"`
	GitHubCallback     string `env:"WRENN_GITHUB_CALLBACK" help:"URL that GitHub sends browsers back to; empty: WRENN_PUBLIC_URL with /api/v1/auth/github/callback"`

	// Front doors on this machine are always trusted.
	TrustedProxies []netip.Prefix `env:"WRENN_TRUSTED_PROXIES" help:"networks of front doors on other machines whose X-Forwarded-For and X-Forwarded-Proto the server believes, in CIDR form"`

	AdminEmail    string `env:"WRENN_ADMIN_EMAIL" help:"address of the first admin, whom the server creates if there is no user"`
	AdminPassword string `env:"WRENN_ADMIN_PASSWORD" help:"password of the first admin"`
	AdminAPIKey   string `env:"WRENN_ADMIN_API_KEY" help:"API key of the first admin: wrn_ and 40 hexadecimal digits"`

	SpoolDir string `env:"WRENN_SPOOL_DIR" help:"directory for uploads until they are complete; empty: the one for temporary files"`
	SpoolMiB int64  `env:"WRENN_SPOOL_MIB" envDefault:"32768" help:"disk space in MiB for uploads under way; the teams of one owner get a quarter of it"`

	Rates  rest.Rates
	Builds builds.Settings

	// PasswordCost is the cost of password hashes, for tests that log in often.
	PasswordCost auth.Cost `env:"-"`

	// Trace records the traces of requests; nil: no tracing.
	Trace *tracing.Tracer `env:"-"`
	// Log is the server's log (slog.Default).
	Log *slog.Logger `env:"-"`
}

// Server is a control plane.
type Server struct {
	log       *slog.Logger
	store     *store.Store
	redis     *redis.Client
	hosts     *hosts.Registry
	bus       *events.Bus
	keys      *auth.Keys
	sessions  *auth.Sessions
	guard     *auth.AccessGuard
	users     *users.Service
	teams     *teams.Service
	mail      *mail.Sender
	work      *work.Group
	sandboxes *sandboxes.Service
	memory    *budget.Budget // of requests
	reconcile *reconcile.Controller
	usage     *usage.Service
	audit     *audit.Log
	channels  *notify.Service
	builds    *builds.Service
	handler   http.Handler
	metrics   http.Handler
	toPort    func(host string) bool

	stopTimeout time.Duration
	// lingering waits for the goroutine of Linger, which ends when finish is called.
	lingering sync.WaitGroup
	linger    func()
	finish    context.CancelFunc
	stop      sync.Once
}

// New connects to the database, which must be reachable, migrates it, creates the first
// admin if there are no users, and registers the configured host. Redis and the host's
// agent can become reachable later. The caller must call [Server.Run] and serve
// [Server.Handler].
func New(ctx context.Context, c Config) (*Server, error) {
	if c.Log == nil {
		c.Log = slog.Default()
	}
	ring, err := auth.ParseRing(c.SecretKey)
	if err != nil {
		return nil, err
	}
	if (c.AgentURL == "") != (c.AgentToken == "") {
		return nil, errors.New("WRENN_AGENT_URL and WRENN_AGENT_TOKEN go together")
	}
	settings.Default(&c.Rates)
	c.RequestMemoryMiB = cmp.Or(c.RequestMemoryMiB, minRequestMemoryMiB)
	if c.RequestMemoryMiB < minRequestMemoryMiB {
		return nil, fmt.Errorf("WRENN_REQUEST_MEMORY_MIB must be at least %d, for one command with the longest input", minRequestMemoryMiB)
	}
	if c.RequestsAtOnce < 0 {
		return nil, errors.New("WRENN_REQUESTS_AT_ONCE must not be negative")
	}
	if c.Heartbeat < 0 || c.Heartbeat > 0 && c.Heartbeat < minHeartbeat {
		return nil, fmt.Errorf("WRENN_HEARTBEAT must be at least %v", minHeartbeat)
	}
	if c.OvercommitMemory < 0 || c.OvercommitVCPUs < 0 {
		return nil, errors.New("WRENN_OVERCOMMIT_MEMORY and WRENN_OVERCOMMIT_VCPUS must not be negative")
	}
	var authority *pki.Authority
	switch {
	case (c.CACert == "") != (c.CAKey == ""):
		return nil, errors.New("WRENN_CA_CERT and WRENN_CA_KEY go together")
	case c.CACert != "":
		if authority, err = pki.LoadAuthority(c.CACert, c.CAKey); err != nil {
			return nil, err
		}
	}
	redisOptions, err := redis.ParseURL(c.RedisURL)
	if err != nil {
		// Do not wrap err: it may contain the password.
		return nil, errors.New("read REDIS_URL: want redis://, rediss:// or unix://")
	}
	if err := c.setDomains(); err != nil {
		return nil, err
	}
	if c.StopTimeout < 0 {
		return nil, errors.New("WRENN_STOP_TIMEOUT must not be negative")
	}
	s := &Server{log: c.Log, stopTimeout: c.StopTimeout}
	defer func() {
		if s.handler == nil {
			s.release()
		}
	}()
	if s.store, err = store.Open(ctx, c.DatabaseURL); err != nil {
		return nil, err
	}
	// Do this before Bootstrap creates a user, because Secret takes a database with users
	// for an old installation.
	secret, err := ring.Secret(ctx, s.store)
	if err != nil {
		return nil, err
	}
	redisOptions.DialerRetries = 1
	s.redis = redis.NewClient(redisOptions)
	made, err := auth.Bootstrap(ctx, s.store, auth.FirstAdmin{Email: c.AdminEmail, Password: c.AdminPassword, APIKey: c.AdminAPIKey, PasswordCost: c.PasswordCost})
	if err != nil {
		return nil, err
	}
	if made {
		s.log.Info("created the first admin", "email", c.AdminEmail)
	}
	tokens := auth.NewTokens(secret)
	s.bus = events.New(s.redis, s.store.Server, s.log)
	s.hosts, err = hosts.Open(hosts.Config{
		Store: s.store, Tokens: tokens, Authority: authority, Heartbeat: c.Heartbeat, Log: s.log,
		Policy:   scheduler.Policy{MemoryFactor: c.OvercommitMemory, VCPUFactor: c.OvercommitVCPUs, OverheadMiB: sandboxOverheadMiB},
		Announce: s.bus.Changed,
	})
	if err != nil {
		return nil, err
	}
	checks := map[string]func(context.Context) error{
		"database": s.store.Ping,
		"redis":    func(ctx context.Context) error { return s.redis.Ping(ctx).Err() },
	}
	if c.AgentURL != "" {
		host, err := s.hosts.Register(ctx, c.AgentURL, c.AgentToken)
		if err != nil {
			return nil, err
		}
		checks["agent"] = func(ctx context.Context) error {
			_, err := host.Agent.Host(ctx, connect.NewRequest(&hostagentv1.HostRequest{}))
			return err
		}
	}
	if _, err := s.hosts.Refresh(ctx); err != nil {
		return nil, err
	}
	// Write the first heartbeat before the server works on anything, or others would take
	// its work for a dead server's.
	if err := s.store.ServerAlive(ctx, s.store.Server); err != nil {
		return nil, fmt.Errorf("write server's heartbeat: %w", err)
	}
	s.keys = auth.NewKeys(s.store, s.log)
	s.work = work.New(s.log)
	catalog := templates.NewCatalog(s.store, s.hosts, s.log)
	history := metrics.New(s.redis, s.store.ListHostSandboxIDs, s.log)
	s.sandboxes = sandboxes.New(sandboxes.Config{Store: s.store, Hosts: s.hosts, Templates: catalog, Tokens: tokens, Work: s.work, Announce: s.bus.Changed, Ended: history.Forget, Log: s.log})
	uploads, err := spool.New(cmp.Or(c.SpoolDir, os.TempDir()), cmp.Or(c.SpoolMiB, spool.DefaultMiB))
	if err != nil {
		return nil, err
	}
	tpl := templates.New(catalog, templates.Config{Store: s.store, Hosts: s.hosts, Sandboxes: s.sandboxes, Spool: uploads, Work: s.work, Log: s.log})
	s.reconcile = reconcile.New(reconcile.Config{Store: s.store, Hosts: s.hosts, Sandboxes: s.sandboxes, Templates: tpl, DrainIdle: c.DrainIdle, Watching: history.Collect, Log: s.log})
	finishing, finish := context.WithCancel(context.Background())
	s.finish = finish
	s.linger = sync.OnceFunc(func() { s.lingering.Go(func() { s.reconcile.Linger(finishing) }) })
	s.usage = usage.New(s.store, s.log)
	s.audit = audit.New(s.store, c.AuditRetention, s.log)
	if s.mail, err = mail.New(c.SMTPURL, c.MailFrom, s.log); err != nil {
		return nil, err
	}
	limiter := ratelimit.New(s.redis, s.log)
	s.channels, err = notify.New(notify.Config{Store: s.store, Secret: secret, Mail: s.mail, Limiter: limiter, PublicURL: c.PublicURL, Private: c.NotifyPrivate, Log: s.log})
	if err != nil {
		return nil, err
	}
	s.sessions = auth.NewSessions(s.store, secret, s.log)
	s.guard = auth.NewAccessGuard(s.store, s.log)
	// All servers of an installation derive the same token.
	first := "wrf_" + hex.EncodeToString(auth.Derive(secret, "first sign-up"))[:40]
	s.users = users.New(users.Config{FirstToken: first, Store: s.store, Sessions: s.sessions, Limiter: limiter, Mail: s.mail, PublicURL: c.PublicURL, PasswordCost: c.PasswordCost, Log: s.log})
	if nobody, err := s.users.NobodyYet(ctx); err != nil {
		return nil, err
	} else if nobody {
		s.log.Info("there is no user yet: whoever signs up with this token becomes the admin", "token", first)
	}
	s.teams = teams.New(teams.Config{Store: s.store, Sandboxes: s.sandboxes, Templates: tpl, Log: s.log})
	var hub *github.Client
	if c.GitHubClientID != "" {
		if c.GitHubCallback == "" {
			c.GitHubCallback = strings.TrimSuffix(c.PublicURL, "/") + "/api/v1/auth/github/callback"
		}
		hub = github.New(github.Config{ClientID: c.GitHubClientID, ClientSecret: c.GitHubClientSecret, URL: c.GitHubURL, APIURL: c.GitHubAPIURL, Callback: c.GitHubCallback})
	}

	s.builds = builds.New(builds.Config{Settings: c.Builds, Secret: secret, Store: s.store, Redis: s.redis, Hosts: s.hosts, Sandboxes: s.sandboxes, Templates: tpl, Spool: uploads, Trace: c.Trace, Log: s.log})

	memory := budget.New(int64(c.RequestMemoryMiB) << 20)
	s.memory = memory
	watched := newObservers(memory, s.parts()...)
	inFlight := budget.NewInFlight(cmp.Or(c.RequestsAtOnce, defaultAtOnce))
	api, err := rest.New(rest.Config{
		Sandboxes: s.sandboxes, Templates: tpl, Builds: s.builds, Usage: s.usage, Audit: s.audit, History: history, Channels: s.channels, Keys: s.keys, Tokens: tokens,
		Sessions: s.sessions, Guard: s.guard, Users: s.users, Teams: s.teams, Platform: platform.New(s.store), Hosts: s.hosts,
		GitHub: hub, GitHubKey: auth.Derive(secret, "github"), Limiter: limiter, Rates: c.Rates, TrustedProxies: c.TrustedProxies,
		PublicURL: c.PublicURL, Domain: c.SandboxDomain, Insecure: c.Insecure, Log: s.log,
		Memory: memory, InFlight: inFlight, Checks: checks,
		Observe: watched.observe,
	})
	if err != nil {
		return nil, err
	}
	px := proxy.New(proxy.Config{Domain: c.SandboxDomain, ServiceDomain: c.Domain, Sandboxes: s.sandboxes, Hosts: s.hosts, Keys: s.keys, Guard: s.guard, Tokens: tokens, Memory: memory, InFlight: inFlight, Fail: api.Fail, Log: s.log})
	watched.registry.MustRegister(px.Collectors()...)
	// If the database is down, the metrics that need it must not hide the others.
	metrics := http.NewServeMux()
	metrics.Handle("GET /metrics", promhttp.HandlerFor(watched.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	s.metrics, s.toPort = metrics, px.Match
	rest := api.Handler()
	ports := api.BoundAddresses(px)
	s.handler = requestid.Handler(c.Trace.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if px.Match(r.Host) {
			ports.ServeHTTP(w, r)
			return
		}
		rest.ServeHTTP(w, r)
	})))
	return s, nil
}

// ToPort reports whether the handler sends a request to a sandbox's port.
func (s *Server) ToPort(r *http.Request) bool { return s.toPort(r.Host) }

// Handler returns the handler of the REST API and of sandboxes' ports.
func (s *Server) Handler() http.Handler { return s.handler }

// Metrics returns the handler of /metrics. It needs no credentials, so it is not part of
// [Server.Handler].
func (s *Server) Metrics() http.Handler { return s.metrics }

// listener receives other servers' changes.
type listener struct {
	*sandboxes.Service
	server *Server
}

// ChangedElsewhere makes the reconciler reload the hosts if one of them changed.
func (l listener) ChangedElsewhere(changed uuid.UUID) {
	if l.server.hosts.Knows(changed) {
		l.server.reconcile.Look()
		return
	}
	l.Service.ChangedElsewhere(changed)
}

// checkRedis warns if Redis can use all memory of its machine, or refuses writes when it
// is full. It fails if Redis does not respond.
func checkRedis(ctx context.Context, client *redis.Client, log *slog.Logger) error {
	info, err := client.Info(ctx, "memory").Result()
	if err != nil {
		return client.Ping(ctx).Err() // Redis may only refuse INFO.
	}
	switch fields := strings.Fields(info); {
	case slices.Contains(fields, "maxmemory:0"):
		log.Warn("Redis has no maxmemory, so it can use all memory of its machine: set maxmemory and maxmemory-policy allkeys-lru")
	case slices.Contains(fields, "maxmemory_policy:noeviction"):
		log.Warn("Redis refuses writes when it is full, and then each server counts rate limits by itself: set maxmemory-policy allkeys-lru")
	}
	return nil
}

// Run does the background work until ctx is done.
func (s *Server) Run(ctx context.Context) error {
	if err := checkRedis(ctx, s.redis, s.log); err != nil && ctx.Err() == nil {
		s.log.Error("Redis does not respond: continuing without it", "error", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.forgetServers(ctx) })
	wg.Go(func() { s.keys.Run(ctx) })
	wg.Go(func() { s.hosts.Run(ctx) })
	wg.Go(func() { s.bus.Run(ctx, listener{s.sandboxes, s}) })
	wg.Go(func() { idempotency.Forget(ctx, s.store, s.log) })
	wg.Go(func() { s.reconcile.Run(ctx) })
	wg.Go(func() { s.builds.Run(ctx) })
	wg.Go(func() { s.usage.Run(ctx) })
	wg.Go(func() { s.audit.Run(ctx) })
	wg.Go(func() { s.channels.Run(ctx) })
	wg.Go(func() { s.sessions.Run(ctx) })
	wg.Go(func() { s.guard.Run(ctx) })
	wg.Go(func() { s.users.Run(ctx) })
	wg.Go(func() { s.teams.Run(ctx) })
	wg.Go(func() { s.mail.Run(ctx) })
	wg.Wait()
	return nil
}

// Linger writes this server's heartbeat until Close returns. Call it when Run's context
// is done: requests in flight continue, and other servers must not take over their
// sandboxes.
func (s *Server) Linger() { s.linger() }

// Close waits for running operations, for at most the configured time, and releases
// everything. Call it after Run has returned and requests have ended.
func (s *Server) Close() error {
	s.stop.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), s.stopTimeout)
		s.linger()
		s.work.Close(ctx)
		cancel()
		s.finish()
		s.lingering.Wait()
		ctx, cancel = context.WithTimeout(context.Background(), flushWithin)
		defer cancel()
		if err := s.bus.Flush(ctx); err != nil {
			s.log.Warn("publish last changes to other servers", "error", err)
		}
		// Other servers can then take over without waiting for a missed heartbeat.
		if err := s.store.ServerLeaves(ctx, s.store.Server); err != nil {
			s.log.Debug("delete server's heartbeat", "error", err)
		}
		s.release()
	})
	return nil
}

// forgetServers deletes the rows of crashed servers until ctx is done.
func (s *Server) forgetServers(ctx context.Context) {
	tick := time.NewTicker(forgetEvery)
	defer tick.Stop()
	for {
		if err := s.store.ForgetServers(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("delete rows of crashed servers", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// release closes what New opened.
func (s *Server) release() {
	if s.hosts != nil {
		s.hosts.Close()
	}
	if s.redis != nil {
		if err := s.redis.Close(); err != nil {
			s.log.Warn("close Redis", "error", err)
		}
	}
	if s.store != nil {
		s.store.Close()
	}
}
