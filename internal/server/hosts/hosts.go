// Package hosts registers hosts, tracks whether they are reachable, and calls their
// agents.
package hosts

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/pki"
	"github.com/wrenn-dev/wrenn/internal/requestid"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/tracing"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// maxAnswer bounds one message of an agent. A command's two outputs can have 16 MiB each.
const maxAnswer = 48 << 20

// maxHeader bounds the header of a proxied response: at most 1 MiB of the guest's, and
// the agent's own.
const maxHeader = 1<<20 + 64<<10

// Host is a machine with an agent.
type Host struct {
	ID  uuid.UUID
	URL string
	// Agent calls the host's agent.
	Agent hostagentv1connect.HostAgentClient
	// Runner is Agent for calls without a client stream. If connections are cheap, it
	// uses one per call, because HTTP/2 takes more CPU time.
	Runner hostagentv1connect.HostAgentClient

	token     string
	epoch     int32
	transport *upstream.Transport
	client    *http.Client
	trust     trust

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

// Transport returns the transport for plain HTTP/1.1 requests to the agent. Requests use
// the scheme http even if the connection uses TLS.
func (h *Host) Transport() http.RoundTripper { return h.transport }

// Authorize adds the agent's token to a header.
func (h *Host) Authorize(header http.Header) { header.Set("Authorization", "Bearer "+h.token) }

// dials makes the host close the transport's connections when it is closed.
func (h *Host) dials(t *http.Transport) *http.Transport {
	dial := t.DialContext
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.closed {
			return nil, errors.Join(errors.New("the host was removed"), conn.Close())
		}
		h.conns[conn] = struct{}{}
		return &tracked{conn, h}, nil
	}
	return t
}

// tracked is a connection that its host closes.
type tracked struct {
	net.Conn
	host *Host
}

// NetConn returns the underlying connection.
func (c *tracked) NetConn() net.Conn { return c.Conn }

func (c *tracked) Close() error {
	c.host.mu.Lock()
	delete(c.host.conns, c.Conn)
	c.host.mu.Unlock()
	return c.Conn.Close()
}

// close closes every connection, including active streams, and refuses new ones.
func (h *Host) close() {
	h.mu.Lock()
	h.closed = true
	conns := h.conns
	h.conns = nil
	h.mu.Unlock()
	for c := range conns {
		_ = c.Close()
	}
	h.transport.Close()
	h.client.CloseIdleConnections()
}

// newHost returns the host of a row with a URL. An https URL needs an authority.
func (r *Registry) newHost(row db.Host, token string) *Host {
	url := *row.URL
	h := &Host{ID: row.ID, URL: url, token: token, epoch: row.Epoch, conns: make(map[net.Conn]struct{})}
	dial := h.dials(netaddr.Transport(url, false)).DialContext
	h.transport = &upstream.Transport{
		Dial:        func(ctx context.Context, addr string) (net.Conn, error) { return dial(ctx, "tcp", addr) },
		IdleTimeout: 90 * time.Second, // The agent's is two minutes.
		OnceIdle:    upstream.HopOnceIdle,
		MaxIdle:     512, MaxIdlePerHost: 512,
		MaxHeaderBytes: maxHeader,
	}
	scheme := "http"
	if address, ok := secure(url); ok {
		scheme = "https"
		c := r.caller.TLS(row.ID, address, func(leaf *x509.Certificate) error { return h.trust.check(r.Store, row.ID, leaf) })
		h.client = &http.Client{Transport: h.dials(netaddr.TLSTransport(url, true, c.Clone()))}
		c.NextProtos = []string{"http/1.1"}
		plain := h.transport.Dial
		h.transport.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			conn, err := plain(ctx, addr)
			if err != nil {
				return nil, err
			}
			over := tls.Client(conn, c)
			shake, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			if err := over.HandshakeContext(shake); err != nil {
				return nil, errors.Join(err, conn.Close())
			}
			return over, nil
		}
	} else {
		h.client = &http.Client{Transport: h.dials(netaddr.Transport(url, true))}
	}
	_, address := netaddr.Split(url)
	if strings.HasPrefix(url, "unix:") {
		address = "localhost"
	}
	options := connect.WithClientOptions(
		connect.WithInterceptors(bearer(token)),
		connect.WithReadMaxBytes(maxAnswer),
		// Both ends are close together: compression costs more than it saves.
		connect.WithAcceptCompression("gzip", nil, nil),
	)
	h.Agent = hostagentv1connect.NewHostAgentClient(h.client, scheme+"://"+address, options)
	h.Runner = h.Agent
	if scheme == "http" { // no handshake
		h.Runner = hostagentv1connect.NewHostAgentClient(plain{h.transport}, "http://"+address, options)
	}
	return h
}

// plain is a Connect client's HTTP client without the overhead of [http.Client].
type plain struct{ *upstream.Transport }

// Do implements [connect.HTTPClient].
func (p plain) Do(r *http.Request) (*http.Response, error) { return p.RoundTrip(r) }

// secure returns the host part of an https URL.
func secure(url string) (address string, ok bool) {
	rest, ok := strings.CutPrefix(url, "https://")
	if !ok {
		return "", false
	}
	address, _, err := net.SplitHostPort(rest)
	return address, err == nil
}

// trust caches which certificate of a host the database trusts.
type trust struct {
	mu   sync.Mutex
	good string // serial number of the last trusted certificate
}

// check fails if a valid certificate was revoked.
func (t *trust) check(s *store.Store, host uuid.UUID, leaf *x509.Certificate) error {
	serial := pki.Serial(leaf)
	t.mu.Lock()
	known := t.good == serial
	t.mu.Unlock()
	if known {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	ok, err := s.TrustsHostCertificate(ctx, db.TrustsHostCertificateParams{Serial: serial, HostID: host})
	if err != nil {
		return fmt.Errorf("look up the host's certificate: %w", err)
	}
	if !ok {
		return errors.New("the host's certificate was revoked")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.good = serial
	return nil
}

// bearer is an interceptor that adds the agent's token, the request id and the trace to
// every call. For streams, only the agent records a span.
type bearer string

func (b bearer) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		req.Header().Set("Authorization", "Bearer "+string(b))
		requestid.Pass(ctx, req.Header(), hostwire.RequestID)
		ctx, span := tracing.Step(ctx, "call host", procedure(req.Spec()))
		if !span.On() {
			return next(ctx, req)
		}
		tracing.Pass(ctx, req.Header(), hostwire.Trace)
		resp, err := next(ctx, req)
		if err != nil {
			span.Fail(connect.CodeOf(err).String())
		}
		span.End()
		return resp, err
	}
}

// procedure returns a call's name without the service.
func procedure(s connect.Spec) string { return s.Procedure[strings.LastIndexByte(s.Procedure, '/')+1:] }

func (b bearer) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		conn.RequestHeader().Set("Authorization", "Bearer "+string(b))
		requestid.Pass(ctx, conn.RequestHeader(), hostwire.RequestID)
		tracing.Pass(ctx, conn.RequestHeader(), hostwire.Trace)
		return conn
	}
}

func (b bearer) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// DefaultHeartbeat is the default interval between heartbeats.
const DefaultHeartbeat = 10 * time.Second

// missedBeats is how many heartbeats a host may miss before it is unreachable.
const missedBeats = 2

// Config configures a [Registry].
type Config struct {
	Store  *store.Store
	Tokens auth.Tokens
	// Authority signs hosts' certificates. Without it, the server calls hosts in clear,
	// on its own machine only.
	Authority *pki.Authority
	// Heartbeat is the interval at which agents report and the server polls them (0:
	// [DefaultHeartbeat]).
	Heartbeat time.Duration
	// Policy limits how far hosts are filled.
	Policy scheduler.Policy
	// Announce tells the other servers that a host changed; nil: there are none. It must
	// not block.
	Announce func(host uuid.UUID)
	Log      *slog.Logger
}

// Registry manages all hosts of the control plane.
type Registry struct {
	Config
	caller *pki.Caller

	mu    sync.RWMutex
	hosts map[uuid.UUID]*Host
	// static maps hosts from the configuration to their tokens.
	static map[uuid.UUID]string
}

// Open returns a registry without hosts.
func Open(c Config) (*Registry, error) {
	if c.Heartbeat == 0 {
		c.Heartbeat = DefaultHeartbeat
	}
	r := &Registry{Config: c, hosts: make(map[uuid.UUID]*Host), static: make(map[uuid.UUID]string)}
	if c.Authority != nil {
		var err error
		if r.caller, err = pki.NewCaller(c.Authority); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Run renews the control plane's client certificate until ctx is done.
func (r *Registry) Run(ctx context.Context) {
	if r.caller != nil {
		r.caller.Run(ctx, r.Log)
	}
}

// within is how many seconds ago a reachable host reported at most.
func (r *Registry) within() float64 { return (missedBeats * r.Heartbeat).Seconds() }

// Register adds the host whose agent listens on url ("unix:/path" or "http://host:port").
// The same URL always means the same host.
func (r *Registry) Register(ctx context.Context, url, token string) (*Host, error) {
	if _, tls := secure(url); tls {
		return nil, errors.New("register host: a host with an https URL must register itself")
	}
	row, err := r.Store.UpsertHost(ctx, db.UpsertHostParams{ID: uuid.New(), URL: &url})
	if err != nil {
		return nil, fmt.Errorf("register host: %w", err)
	}
	if row.Enrolled {
		return nil, fmt.Errorf("register host: the host at %s registers itself", url)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.static[row.ID] = token
	h := r.newHost(row, token)
	r.hosts[h.ID] = h
	return h, nil
}

// Refresh loads the hosts from the database and returns them. It closes the connections
// of hosts that were deleted, revoked or registered again.
func (r *Registry) Refresh(ctx context.Context) ([]db.Host, error) {
	rows, err := r.Store.Vital.ListHosts(ctx)
	if err != nil {
		return nil, fmt.Errorf("list hosts: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	is := make(map[uuid.UUID]bool, len(rows))
	for _, row := range rows {
		token, static := r.static[row.ID]
		if row.Enrolled {
			if row.RefreshHash == nil {
				continue
			}
			token = r.Tokens.Agent(row.ID, row.Epoch)
		} else if !static {
			continue // Another server's configuration names it.
		}
		if row.URL == nil {
			continue
		}
		if _, tls := secure(*row.URL); tls && r.caller == nil {
			continue // A host with TLS is never called in clear.
		}
		is[row.ID] = true
		old := r.hosts[row.ID]
		if old != nil && old.URL == *row.URL && old.epoch == row.Epoch {
			continue
		}
		if old != nil {
			old.close()
		}
		r.hosts[row.ID] = r.newHost(row, token)
	}
	for id, h := range r.hosts {
		if !is[id] {
			h.close()
			delete(r.hosts, id)
		}
	}
	return rows, nil
}

// moved makes every server reload a host, this one before it returns. The old credentials
// are useless afterwards.
func (r *Registry) moved(ctx context.Context, host uuid.UUID) error {
	r.announce(host)
	_, err := r.Refresh(ctx)
	return err
}

func (r *Registry) announce(host uuid.UUID) {
	if r.Announce != nil {
		r.Announce(host)
	}
}

// Knows reports whether the server can call the host.
func (r *Registry) Knows(host uuid.UUID) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	_, ok := r.hosts[host]
	return ok
}

// Close closes every connection.
func (r *Registry) Close() {
	for _, h := range r.All() {
		h.close()
	}
}

// All returns every host that the server can call.
func (r *Registry) All() []*Host {
	r.mu.RLock()
	defer r.mu.RUnlock()
	all := make([]*Host, 0, len(r.hosts))
	for _, h := range r.hosts {
		all = append(all, h)
	}
	return all
}

// Get returns a host, or fails with host_unreachable if the server cannot call it.
func (r *Registry) Get(id *uuid.UUID) (*Host, error) {
	if id != nil {
		r.mu.RLock()
		defer r.mu.RUnlock()
		if h, ok := r.hosts[*id]; ok {
			return h, nil
		}
	}
	return nil, fault.New(fault.HostUnreachable, "the sandbox's host is not connected")
}

// contactWithin bounds each of the two steps of [Registry.Contact].
const contactWithin = 5 * time.Second

// Contact asks a host for its status and writes it to the database. If the host does not
// respond, [Registry.Sweep] marks it unreachable later.
func (r *Registry) Contact(ctx context.Context, h *Host) error {
	ask, cancel := context.WithTimeout(ctx, contactWithin)
	defer cancel()
	answer, err := h.Agent.Host(ask, connect.NewRequest(&hostagentv1.HostRequest{}))
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	m := answer.Msg
	write, stop := context.WithTimeout(ctx, contactWithin)
	defer stop()
	_, err = r.Store.Vital.HostSeen(write, db.HostSeenParams{
		ID: h.ID, Within: r.within(), Version: m.Version, VMM: m.Vmm, Accelerator: m.Accelerator, CPUs: m.Cpus, MemoryBytes: m.MemoryBytes, DiskBytes: m.DiskBytes,
		CapacityMib: m.MemoryLimitMib, Slots: m.Slots, NetworkBlock: m.NetworkBlock,
		Sandboxes: m.Sandboxes, UsedMemoryMib: m.MemoryUsedMib, UsedVcpus: m.VcpusUsed, DiskFreeBytes: m.DiskFreeBytes,
		Problems: encodeProblems(m.Problems, time.Now()),
	})
	if errors.Is(err, store.ErrNoRows) {
		return errors.New("the host was removed")
	}
	if err != nil {
		return fmt.Errorf("write host's status: %w", err)
	}
	return nil
}

// Sweep marks silent hosts unreachable and their sandboxes missing. It returns the
// sandboxes that it marked.
func (r *Registry) Sweep(ctx context.Context) ([]uuid.UUID, error) {
	gone, err := r.Store.Vital.HostsUnreachable(ctx, r.within())
	if err != nil {
		return nil, fmt.Errorf("mark hosts unreachable: %w", err)
	}
	for _, h := range gone {
		r.Log.Warn("host is unreachable", "host_id", id.Format(id.Host, h.ID), "name", h.Name)
	}
	missing, err := r.Store.SandboxesMissing(ctx)
	if err != nil {
		return nil, fmt.Errorf("mark sandboxes missing: %w", err)
	}
	return missing, nil
}

// Fault converts an agent's error for the caller. It keeps messages about the request and
// hides the agent's internal errors.
func Fault(err error) error {
	if err == nil {
		return nil
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return fault.Because(err, fault.HostUnreachable, "the sandbox's host does not respond")
	}
	message := Message(err)
	if !connect.IsWireError(err) {
		switch ce.Code() {
		case connect.CodeCanceled:
			// A host that stops also cancels the stream, but not our context.
			if errors.Is(err, context.Canceled) {
				return fault.Because(err, fault.Timeout, "the call was cancelled")
			}
		case connect.CodeDeadlineExceeded:
			return fault.Because(err, fault.Timeout, "the sandbox's host did not respond in time")
		case connect.CodeResourceExhausted:
			return fault.Because(err, fault.Internal, "the host's response is too long")
		}
		return fault.Because(err, fault.HostUnreachable, "the sandbox's host does not respond")
	}
	switch ce.Meta().Get(hostwire.ErrorReason) {
	case hostwire.CaptureLimit:
		return fault.Because(err, fault.CaptureLimit, "%s", message)
	case hostwire.CommandNotFound:
		return fault.Because(err, fault.CommandNotFound, "%s", message)
	case hostwire.CommandNotExecutable:
		return fault.Because(err, fault.NotExecutable, "%s", message)
	}
	var code fault.Code
	switch ce.Code() {
	case connect.CodeInvalidArgument:
		code = fault.InvalidArgument
	case connect.CodeNotFound:
		code = fault.NotFound
	case connect.CodeAlreadyExists, connect.CodeFailedPrecondition, connect.CodeAborted:
		code = fault.Conflict
	case connect.CodePermissionDenied:
		code = fault.PermissionDenied
	case connect.CodeResourceExhausted:
		code = fault.NoCapacity
	case connect.CodeOutOfRange:
		code = fault.RangeNotSatisfiable
	case connect.CodeUnavailable:
		code = fault.Unavailable
	case connect.CodeDeadlineExceeded:
		code = fault.Timeout
	case connect.CodeUnimplemented:
		return fault.Because(err, fault.Unimplemented, "the agent of the sandbox's host cannot do this: it is older than the control plane")
	case connect.CodeUnauthenticated:
		return fault.Because(err, fault.Internal, "the host refused the control plane")
	default:
		return fault.Because(err, fault.Internal, "the host failed")
	}
	if message == "" {
		message = string(code)
	}
	return fault.Because(err, code, "%s", message)
}
