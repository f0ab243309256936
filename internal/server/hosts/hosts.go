// Package hosts knows the machines that sandboxes run on and how to call
// their agents.
package hosts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

// maxAnswer bounds one message of an agent: a command's two outputs at their
// bound of 16 MiB, and room to spare.
const maxAnswer = 48 << 20

// Host is a machine with an agent.
type Host struct {
	ID  uuid.UUID
	URL string
	// Agent calls the host's agent.
	Agent hostagentv1connect.HostAgentClient

	token     string
	transport *http.Transport
	client    *http.Client
}

// Transport carries plain HTTP/1.1 requests to the agent, bytes untouched.
func (h *Host) Transport() http.RoundTripper { return h.transport }

// Authorize adds to a request's header what the agent asks for.
func (h *Host) Authorize(header http.Header) { header.Set("Authorization", "Bearer "+h.token) }

func newHost(id uuid.UUID, url, token string) *Host {
	client, base := netaddr.HTTPClient(url)
	h := &Host{ID: id, URL: url, token: token, client: client, transport: netaddr.Transport(url, false)}
	h.transport.DisableCompression = true
	h.Agent = hostagentv1connect.NewHostAgentClient(client, base,
		connect.WithInterceptors(bearer(token)),
		connect.WithReadMaxBytes(maxAnswer),
		// Both ends are near each other: compressing costs more than it saves.
		connect.WithAcceptCompression("gzip", nil, nil),
	)
	return h
}

// bearer is an interceptor that shows the agent's token in every call.
type bearer string

func (b bearer) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		req.Header().Set("Authorization", "Bearer "+string(b))
		return next(ctx, req)
	}
}

func (b bearer) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		conn.RequestHeader().Set("Authorization", "Bearer "+string(b))
		return conn
	}
}

func (b bearer) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// Registry is every host that the control plane knows.
type Registry struct {
	store *store.Store
	log   *slog.Logger

	mu    sync.RWMutex
	hosts map[uuid.UUID]*Host
}

// Open returns a registry without hosts.
func Open(s *store.Store, log *slog.Logger) *Registry {
	return &Registry{store: s, log: log, hosts: make(map[uuid.UUID]*Host)}
}

// Register adds the host whose agent listens at url ("unix:/path" or
// "http://host:port"); the same URL is the same host for ever.
func (r *Registry) Register(ctx context.Context, url, token string) (*Host, error) {
	row, err := r.store.UpsertHost(ctx, db.UpsertHostParams{ID: uuid.New(), URL: url})
	if err != nil {
		return nil, fmt.Errorf("register host: %w", err)
	}
	h := newHost(row.ID, url, token)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hosts[h.ID] = h
	return h, nil
}

// Close drops idle connections.
func (r *Registry) Close() {
	for _, h := range r.All() {
		h.transport.CloseIdleConnections()
		h.client.CloseIdleConnections()
	}
}

// All returns every host.
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

// Pick chooses the host of a new sandbox, or fails with no_capacity.
func (r *Registry) Pick() (*Host, error) {
	for _, h := range r.All() {
		return h, nil
	}
	return nil, fault.New(fault.NoCapacity, "no host is connected")
}

// Contact asks the host how it is and writes the answer, or its absence, down.
func (r *Registry) Contact(ctx context.Context, h *Host) error {
	ask, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	answer, err := h.Agent.Host(ask, connect.NewRequest(&hostagentv1.HostRequest{}))
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		if err := r.store.HostUnreachable(ctx, h.ID); err != nil {
			r.log.Warn("write host's status", "host", h.URL, "error", err)
		}
		return err
	}
	m := answer.Msg
	if err := r.store.HostSeen(ctx, db.HostSeenParams{
		ID: h.ID, Version: m.Version, VMM: m.Vmm, Accelerator: m.Accelerator, CPUs: m.Cpus, MemoryBytes: m.MemoryBytes, DiskBytes: m.DiskBytes,
	}); err != nil {
		return fmt.Errorf("write host's status: %w", err)
	}
	return nil
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
			return fault.Because(err, fault.Timeout, "the call was given up")
		case connect.CodeDeadlineExceeded:
			return fault.Because(err, fault.Timeout, "the sandbox's host did not answer in time")
		case connect.CodeResourceExhausted:
			return fault.Because(err, fault.Internal, "the host's answer is too long")
		}
		return fault.Because(err, fault.HostUnreachable, "the sandbox's host does not answer")
	}
	code := fault.Internal
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
