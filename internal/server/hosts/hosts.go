// Package hosts knows the machines that sandboxes run on and how to call
// their agents.
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

// maxAnswer bounds one message of an agent: a command's two outputs at their
// bound of 16 MiB, and room to spare.
const maxAnswer = 48 << 20

// maxHeader bounds the header of a response that the agent carries: a guest's,
// of at most a mebibyte, and the agent's own.
const maxHeader = 1<<20 + 64<<10

// Host is a machine with an agent.
type Host struct {
	ID  uuid.UUID
	URL string
	// Agent calls the host's agent.
	Agent hostagentv1connect.HostAgentClient
	// Runner is Agent for calls whose client sends no stream. Where a connection costs
	// little, each call has one, because HTTP/2 takes more processor time.
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

// Transport carries plain HTTP/1.1 requests to the agent, bytes untouched. A
// request's URL is http, whatever the connection is.
func (h *Host) Transport() http.RoundTripper { return h.transport }

// Authorize adds to a request's header what the agent asks for.
func (h *Host) Authorize(header http.Header) { header.Set("Authorization", "Bearer "+h.token) }

// dials makes a transport's connections ones that end with the host.
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

// tracked is a connection that its host knows of.
type tracked struct {
	net.Conn
	host *Host
}

// NetConn returns the connection itself.
func (c *tracked) NetConn() net.Conn { return c.Conn }

func (c *tracked) Close() error {
	c.host.mu.Lock()
	delete(c.host.conns, c.Conn)
	c.host.mu.Unlock()
	return c.Conn.Close()
}

// close ends every connection, streams under way too, and allows no other.
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

// newHost is the host of a row that has a URL. One that asks for TLS is called
// with certificates, which takes an authority.
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
		// Both ends are near each other: compressing costs more than it saves.
		connect.WithAcceptCompression("gzip", nil, nil),
	)
	h.Agent = hostagentv1connect.NewHostAgentClient(h.client, scheme+"://"+address, options)
	h.Runner = h.Agent
	if scheme == "http" { // Without a handshake.
		h.Runner = hostagentv1connect.NewHostAgentClient(plain{h.transport}, "http://"+address, options)
	}
	return h
}

// plain sends a Connect client's requests over a transport, without what
// [http.Client] adds for other servers.
type plain struct{ *upstream.Transport }

// Do implements [connect.HTTPClient].
func (p plain) Do(r *http.Request) (*http.Response, error) { return p.RoundTrip(r) }

// secure returns the address, an IP address or a name, of a URL that asks for TLS.
func secure(url string) (address string, ok bool) {
	rest, ok := strings.CutPrefix(url, "https://")
	if !ok {
		return "", false
	}
	address, _, err := net.SplitHostPort(rest)
	return address, err == nil
}

// trust remembers which of a host's leaves the database trusts.
type trust struct {
	mu   sync.Mutex
	good string // the serial number of the last one that was
}

// check says what is wrong with a leaf that is otherwise in order.
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

// bearer is an interceptor that shows the agent's token in every call, and passes the
// request's id and trace on. A span of a stream is the agent's to record.
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

// procedure returns the name of a call without its service's.
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

// DefaultHeartbeat is how often agents say that they are there.
const DefaultHeartbeat = 10 * time.Second

// missedBeats is after how many heartbeats that did not come a host is
// unreachable.
const missedBeats = 2

// Config is what a Registry works with.
type Config struct {
	Store  *store.Store
	Tokens auth.Tokens
	// Authority signs hosts' certificates; nil: hosts are called in clear, on
	// this machine alone.
	Authority *pki.Authority
	// Heartbeat is how often agents say that they are there, and are asked;
	// 0: [DefaultHeartbeat].
	Heartbeat time.Duration
	// Policy is how far hosts are filled.
	Policy scheduler.Policy
	// Tell is called with a host that other servers must look at again; nil: there
	// are none. It must not block.
	Tell func(host uuid.UUID)
	Log  *slog.Logger
}

// Registry is every host that the control plane knows.
type Registry struct {
	Config
	caller *pki.Caller

	mu    sync.RWMutex
	hosts map[uuid.UUID]*Host
	// static are the tokens of hosts that the configuration names.
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

// Run keeps the control plane's own certificate fresh until ctx is done.
func (r *Registry) Run(ctx context.Context) {
	if r.caller != nil {
		r.caller.Run(ctx, r.Log)
	}
}

// within is how old the last sign of a host may be, in seconds.
func (r *Registry) within() float64 { return (missedBeats * r.Heartbeat).Seconds() }

// Register adds the host whose agent listens at url ("unix:/path" or
// "http://host:port"); the same URL is the same host for ever.
func (r *Registry) Register(ctx context.Context, url, token string) (*Host, error) {
	if _, tls := secure(url); tls {
		return nil, errors.New("register host: one that is called over TLS registers itself")
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

// Refresh makes the hosts that are known those of the table, and returns them.
// A host that was deleted, revoked or registered anew loses its connections.
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
			continue // Never in clear.
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

// moved has every server look at a host again, this one before it returns:
// what it had until now opens nothing any more.
func (r *Registry) moved(ctx context.Context, host uuid.UUID) error {
	r.tell(host)
	_, err := r.Refresh(ctx)
	return err
}

func (r *Registry) tell(host uuid.UUID) {
	if r.Tell != nil {
		r.Tell(host)
	}
}

// Knows says whether there is a way to a host with the id.
func (r *Registry) Knows(host uuid.UUID) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	_, ok := r.hosts[host]
	return ok
}

// Close drops every connection.
func (r *Registry) Close() {
	for _, h := range r.All() {
		h.close()
	}
}

// All returns every host that can be called.
func (r *Registry) All() []*Host {
	r.mu.RLock()
	defer r.mu.RUnlock()
	all := make([]*Host, 0, len(r.hosts))
	for _, h := range r.hosts {
		all = append(all, h)
	}
	return all
}

// Get returns the host with the id, or a fault: host_unreachable when there is
// no way to it.
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

// contactWithin bounds the question how a host is, and writing the answer down.
const contactWithin = 5 * time.Second

// Contact asks the host how it is and writes the answer down, both within a
// bound. That it did not answer is written down by [Registry.Sweep], once it is
// too long ago that it did.
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

// Sweep writes down which hosts have not been heard of for too long, and that
// what ran on them is missing. It returns the sandboxes that are so now.
func (r *Registry) Sweep(ctx context.Context) ([]uuid.UUID, error) {
	gone, err := r.Store.Vital.HostsUnreachable(ctx, r.within())
	if err != nil {
		return nil, fmt.Errorf("look for hosts that are gone: %w", err)
	}
	for _, h := range gone {
		r.Log.Warn("host is unreachable", "host_id", id.Format(id.Host, h.ID), "name", h.Name)
	}
	missing, err := r.Store.SandboxesMissing(ctx)
	if err != nil {
		return nil, fmt.Errorf("look for sandboxes that are missing: %w", err)
	}
	return missing, nil
}

// Fault turns an agent's error into one for the caller. The agent's own
// messages are shown where they are about what the caller asked for; what is
// internal to the agent is not.
func Fault(err error) error {
	if err == nil {
		return nil
	}
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return fault.Because(err, fault.HostUnreachable, "the sandbox's host does not answer")
	}
	message := ce.Message()
	if !connect.IsWireError(err) {
		switch ce.Code() {
		case connect.CodeCanceled:
			// A host that goes away cancels the stream too, but not our context.
			if errors.Is(err, context.Canceled) {
				return fault.Because(err, fault.Timeout, "the call was given up")
			}
		case connect.CodeDeadlineExceeded:
			return fault.Because(err, fault.Timeout, "the sandbox's host did not answer in time")
		case connect.CodeResourceExhausted:
			return fault.Because(err, fault.Internal, "the host's answer is too long")
		}
		return fault.Because(err, fault.HostUnreachable, "the sandbox's host does not answer")
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
