package server_test

import (
	"context"
	"crypto/subtle"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/duplex"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

const agentToken = "agent-token-of-the-test"

// agent is a fake host agent without machines. It speaks the real protocol over a real
// socket, keeps sandboxes and files in memory, and knows a handful of commands. It lets a
// test reach what is slow or rare with VMs: creations that hang, hosts that vanish,
// streams that break. The tests in test/ run the real agent.
type agent struct {
	hostagentv1connect.UnimplementedHostAgentHandler

	socket  string
	address string // TCP address, if newTCPAgent made it
	token   string
	// saw is called with each authenticated request, if it is set.
	saw atomic.Pointer[func(*http.Request)]
	// onCreate decides the result of a creation; nil means success.
	onCreate func(context.Context, *hostagentv1.CreateRequest) error
	// onDestroy decides the result of a removal; nil means success.
	onDestroy func(context.Context, *hostagentv1.DestroyRequest) error
	// imports is called with each template before it is stored, if it is set.
	imports func(*hostagentv1.Template)
	// payer is called with the payer of each import, if it is set.
	payer func(string)
	// digest is the digest that a registry reports for an image.
	digest string
	// on decides the results of pauses, resumes, snapshots, forks and removals of
	// templates, by the name of the call; nil means success.
	on func(ctx context.Context, call string) error
	// guest answers requests to sandboxes' ports.
	guest http.Handler
	// before makes it an agent of the previous release.
	before atomic.Bool

	mu        sync.Mutex
	sandboxes map[string]*hostagentv1.Sandbox
	creates   []*hostagentv1.CreateRequest
	templates map[string]*hostagentv1.Template
	calls     map[string]int
	files     map[string][]byte
	events    []*hostagentv1.Event
	acked     uint64
	news      chan struct{}
	resized   []string
	ran       []string // shell lines that streams have run

	server *http.Server
	// serving is held for reading by every call in progress.
	serving sync.RWMutex
}

func newAgent(t testing.TB) *agent {
	a := &agent{
		socket:    filepath.Join(t.TempDir(), "agent.sock"),
		token:     agentToken,
		sandboxes: make(map[string]*hostagentv1.Sandbox), files: make(map[string][]byte), news: make(chan struct{}),
		calls: make(map[string]int), templates: map[string]*hostagentv1.Template{minimal.TemplateId: minimal},
		guest: http.NotFoundHandler(),
	}
	a.serve(t)
	t.Cleanup(a.close)
	return a
}

// newTCPAgent returns an agent that listens on loopback, for hosts that register
// themselves.
func newTCPAgent(t testing.TB, l net.Listener, token string) *agent {
	a := &agent{
		address: l.Addr().String(), token: token,
		calls: make(map[string]int), templates: map[string]*hostagentv1.Template{minimal.TemplateId: minimal},
		sandboxes: make(map[string]*hostagentv1.Sandbox), files: make(map[string][]byte), news: make(chan struct{}),
		guest: http.NotFoundHandler(),
	}
	a.serveOn(l)
	t.Cleanup(a.close)
	return a
}

func (a *agent) url() string { return "unix:" + a.socket }

func (a *agent) serve(t testing.TB) {
	t.Helper()
	l, err := netaddr.Listen(context.Background(), a.url(), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	a.serveOn(l)
}

func (a *agent) serveOn(l net.Listener) {
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentHandler(a))
	s := netaddr.Server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.serving.RLock()
		defer a.serving.RUnlock()
		if subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), []byte("Bearer "+a.token)) != 1 {
			http.Error(w, "bad token", http.StatusUnauthorized)
			return
		}
		if saw := a.saw.Load(); saw != nil {
			(*saw)(r)
		}
		// Not by the mux, which tidies paths.
		if strings.HasPrefix(r.URL.Path, "/proxy/") {
			if state := a.held(strings.Split(r.URL.Path, "/")[2]); state != "" {
				w.Header().Set("X-Wrenn-Error", state)
				http.Error(w, state, http.StatusServiceUnavailable)
				return
			}
			// Like the real agent: the server notices at once that a guest breaks off a
			// response.
			duplex.Serve(w, r, a.guest.ServeHTTP)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	a.server = s
	go s.Serve(l)
}

// close makes the host unreachable; its sandboxes stay. Calls in progress may continue.
func (a *agent) close() { a.server.Close() }

// vanish is like close, but returns when every call has ended, so that none changes a
// sandbox afterwards.
func (a *agent) vanish() {
	a.close()
	a.serving.Lock()
	defer a.serving.Unlock()
}

func (a *agent) Create(ctx context.Context, req *connect.Request[hostagentv1.CreateRequest]) (*connect.Response[hostagentv1.CreateResponse], error) {
	m := req.Msg
	a.mu.Lock()
	a.creates = append(a.creates, m)
	hook := a.onCreate
	a.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, m); err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(&hostagentv1.CreateResponse{Sandbox: a.made(m)}), nil
}

// made adds the sandbox of a request.
func (a *agent) made(m *hostagentv1.CreateRequest) *hostagentv1.Sandbox {
	a.add(m.SandboxId, m.TimeoutSeconds)
	a.mu.Lock()
	defer a.mu.Unlock()
	sb := a.sandboxes[m.SandboxId]
	sb.TeamId, sb.TemplateId, sb.Vcpus, sb.MemoryMib, sb.DiskMib = m.TeamId, m.TemplateId, m.Vcpus, m.MemoryMib, max(m.DiskMib, sb.DiskMib)
	sb.PauseOnTimeout = m.PauseOnTimeout
	return proto.CloneOf(sb)
}

// minimal is the template that every host has.
var minimal = &hostagentv1.Template{
	TemplateId: id.Format(id.Template, uuid.Nil), TeamId: id.Format(id.Team, uuid.Nil), Name: "minimal", SizeBytes: 1 << 29, CreatedAt: timestamppb.New(time.Unix(1700000000, 0)),
}

// states names the states in which nobody can use a sandbox.
var states = map[hostagentv1.SandboxState]string{
	hostagentv1.SandboxState_SANDBOX_STATE_PAUSING: "pausing", hostagentv1.SandboxState_SANDBOX_STATE_PAUSED: "paused", hostagentv1.SandboxState_SANDBOX_STATE_RESUMING: "resuming",
}

// held returns the name of the state that keeps clients from using a sandbox, or "".
func (a *agent) held(sandbox string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return states[a.sandboxes[sandbox].GetState()]
}

// usable returns the real agent's error for a sandbox that cannot be used now.
func (a *agent) usable(sandbox string) error {
	state := a.held(sandbox)
	if state == "" {
		return nil
	}
	err := connect.NewError(connect.CodeFailedPrecondition, errors.New("the sandbox is "+state))
	err.Meta().Set("Wrenn-Sandbox-State", state)
	return err
}

// set changes a sandbox's state without a call.
func (a *agent) set(sandbox string, state hostagentv1.SandboxState) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sandboxes[sandbox].State = state
}

// unused sets how long a sandbox has been idle.
func (a *agent) unused(sandbox string, idle time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.sandboxes[sandbox].Idle = durationpb.New(idle)
}

func (a *agent) stateOf(sandbox string) hostagentv1.SandboxState {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sandboxes[sandbox].GetState()
}

// called returns how often the server made a call: those of on, and "get", "list" and
// "samples".
func (a *agent) called(call string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.calls[call]
}

func (a *agent) hook(on func(context.Context, string) error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.on = on
}

// decide counts a call and returns the result that the test chose for it.
func (a *agent) decide(ctx context.Context, call string) error {
	a.mu.Lock()
	a.calls[call]++
	on := a.on
	a.mu.Unlock()
	if on == nil {
		return nil
	}
	return on(ctx, call)
}

// turn moves a sandbox from one state through a second to a third.
func (a *agent) turn(ctx context.Context, sandbox, call string, from, by, to hostagentv1.SandboxState) (*hostagentv1.Sandbox, error) {
	a.mu.Lock()
	sb := a.sandboxes[sandbox]
	if sb == nil {
		a.mu.Unlock()
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	if sb.State != from && sb.State != to {
		a.mu.Unlock()
		return nil, a.usable(sandbox)
	}
	if sb.State == from {
		sb.State = by
	}
	a.mu.Unlock()
	err := a.decide(ctx, call)
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		sb.State = from
		return nil, err
	}
	sb.State = to
	sb.ExpiresAt, sb.Condition = nil, nil
	if to == hostagentv1.SandboxState_SANDBOX_STATE_RUNNING {
		sb.ExpiresAt = timestamppb.New(time.Now().Add(time.Hour))
	}
	return proto.CloneOf(sb), nil
}

func (a *agent) Pause(ctx context.Context, req *connect.Request[hostagentv1.PauseRequest]) (*connect.Response[hostagentv1.PauseResponse], error) {
	if least := req.Msg.GetIdle(); least != nil {
		a.mu.Lock()
		is := a.sandboxes[req.Msg.SandboxId].GetIdle().AsDuration()
		a.mu.Unlock()
		if is < least.AsDuration() {
			return nil, connect.NewError(connect.CodeAborted, errors.New("the sandbox is in use"))
		}
	}
	sb, err := a.turn(ctx, req.Msg.SandboxId, "pause", hostagentv1.SandboxState_SANDBOX_STATE_RUNNING, hostagentv1.SandboxState_SANDBOX_STATE_PAUSING, hostagentv1.SandboxState_SANDBOX_STATE_PAUSED)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostagentv1.PauseResponse{Sandbox: sb}), nil
}

func (a *agent) Resume(ctx context.Context, req *connect.Request[hostagentv1.ResumeRequest]) (*connect.Response[hostagentv1.ResumeResponse], error) {
	sb, err := a.turn(ctx, req.Msg.SandboxId, "resume", hostagentv1.SandboxState_SANDBOX_STATE_PAUSED, hostagentv1.SandboxState_SANDBOX_STATE_RESUMING, hostagentv1.SandboxState_SANDBOX_STATE_RUNNING)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostagentv1.ResumeResponse{Sandbox: sb}), nil
}

func (a *agent) Reboot(ctx context.Context, req *connect.Request[hostagentv1.RebootRequest]) (*connect.Response[hostagentv1.RebootResponse], error) {
	a.mu.Lock()
	from := a.sandboxes[req.Msg.SandboxId].GetState()
	a.mu.Unlock()
	sb, err := a.turn(ctx, req.Msg.SandboxId, "reboot", from, hostagentv1.SandboxState_SANDBOX_STATE_RESUMING, hostagentv1.SandboxState_SANDBOX_STATE_RUNNING)
	if err != nil {
		a.mu.Lock()
		defer a.mu.Unlock()
		if sb := a.sandboxes[req.Msg.SandboxId]; sb.GetCondition() != nil { // The memory is lost.
			sb.State = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED
		}
		return nil, err
	}
	a.condition(req.Msg.SandboxId, "")
	return connect.NewResponse(&hostagentv1.RebootResponse{Sandbox: sb}), nil
}

// condition sets a sandbox's condition; an empty reason clears it.
func (a *agent) condition(sandbox, reason string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sandboxes[sandbox].Condition = nil; reason != "" {
		a.sandboxes[sandbox].Condition = &hostagentv1.Condition{Reason: reason, Detail: "more", Since: timestamppb.Now()}
	}
}

func (a *agent) Snapshot(ctx context.Context, req *connect.Request[hostagentv1.SnapshotRequest]) (*connect.Response[hostagentv1.SnapshotResponse], error) {
	m := req.Msg
	a.mu.Lock()
	sb, made := proto.CloneOf(a.sandboxes[m.SandboxId]), a.templates[m.TemplateId]
	a.mu.Unlock()
	if made != nil {
		return connect.NewResponse(&hostagentv1.SnapshotResponse{Template: made}), nil
	}
	if sb == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	if err := a.decide(ctx, "snapshot"); err != nil {
		return nil, err
	}
	t := &hostagentv1.Template{
		TemplateId: m.TemplateId, TeamId: sb.TeamId, Name: m.Name, SizeBytes: 1 << 20, CreatedAt: timestamppb.Now(), DiskMib: sb.DiskMib, Vcpus: sb.Vcpus, MemoryMib: sb.MemoryMib,
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if t.Defaults = m.Defaults; t.Defaults == nil {
		t.Defaults = a.templates[sb.TemplateId].GetDefaults()
	}
	a.templates[m.TemplateId] = t
	return connect.NewResponse(&hostagentv1.SnapshotResponse{Template: t}), nil
}

func (a *agent) Fork(ctx context.Context, req *connect.Request[hostagentv1.ForkRequest]) (*connect.Response[hostagentv1.ForkResponse], error) {
	m := req.Msg
	if err := a.usable(m.SandboxId); err != nil {
		return nil, err
	}
	if err := a.decide(ctx, "fork"); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var r hostagentv1.ForkResponse
	for _, c := range m.Copies {
		sb := proto.CloneOf(a.sandboxes[m.SandboxId])
		sb.SandboxId = c.SandboxId
		a.sandboxes[c.SandboxId] = sb
		r.Sandboxes = append(r.Sandboxes, proto.CloneOf(sb))
	}
	return connect.NewResponse(&r), nil
}

func (a *agent) DeleteTemplate(ctx context.Context, req *connect.Request[hostagentv1.DeleteTemplateRequest]) (*connect.Response[hostagentv1.DeleteTemplateResponse], error) {
	if err := a.decide(ctx, "delete template"); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if t := a.templates[req.Msg.TemplateId]; t != nil && t.TeamId != req.Msg.TeamId {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("another team's"))
	}
	delete(a.templates, req.Msg.TemplateId)
	return connect.NewResponse(&hostagentv1.DeleteTemplateResponse{}), nil
}

func (a *agent) hasTemplate(template string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.templates[template] != nil
}

func (a *agent) Get(_ context.Context, req *connect.Request[hostagentv1.GetRequest]) (*connect.Response[hostagentv1.GetResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls["get"]++
	sb := a.sandboxes[req.Msg.SandboxId]
	if sb == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	return connect.NewResponse(&hostagentv1.GetResponse{Sandbox: proto.CloneOf(sb)}), nil
}

// add adds a running sandbox.
func (a *agent) add(sandbox string, timeout int32) *hostagentv1.Sandbox {
	a.mu.Lock()
	defer a.mu.Unlock()
	sb := &hostagentv1.Sandbox{SandboxId: sandbox, State: hostagentv1.SandboxState_SANDBOX_STATE_RUNNING, DiskMib: hostwire.DefaultDiskMiB, CreatedAt: timestamppb.Now()}
	if timeout > 0 {
		sb.ExpiresAt = timestamppb.New(time.Now().Add(time.Duration(timeout) * time.Second))
	}
	a.sandboxes[sandbox] = sb
	return proto.CloneOf(sb)
}

func (a *agent) has(sandbox string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sandboxes[sandbox] != nil
}

func (a *agent) forget(sandbox string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.sandboxes, sandbox)
}

func (a *agent) created() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.creates)
}

func (a *agent) Destroy(ctx context.Context, req *connect.Request[hostagentv1.DestroyRequest]) (*connect.Response[hostagentv1.DestroyResponse], error) {
	a.mu.Lock()
	hook := a.onDestroy
	a.mu.Unlock()
	if hook != nil {
		if err := hook(ctx, req.Msg); err != nil {
			return nil, err
		}
	}
	a.forget(req.Msg.SandboxId)
	return connect.NewResponse(&hostagentv1.DestroyResponse{}), nil
}

func (a *agent) List(context.Context, *connect.Request[hostagentv1.ListRequest]) (*connect.Response[hostagentv1.ListResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls["list"]++
	var r hostagentv1.ListResponse
	for _, sb := range a.sandboxes {
		r.Sandboxes = append(r.Sandboxes, proto.CloneOf(sb))
	}
	return connect.NewResponse(&r), nil
}

func (a *agent) Templates(context.Context, *connect.Request[hostagentv1.TemplatesRequest]) (*connect.Response[hostagentv1.TemplatesResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var r hostagentv1.TemplatesResponse
	for _, t := range a.templates {
		r.Templates = append(r.Templates, t)
	}
	return connect.NewResponse(&r), nil
}

func (a *agent) Host(context.Context, *connect.Request[hostagentv1.HostRequest]) (*connect.Response[hostagentv1.HostResponse], error) {
	a.mu.Lock()
	a.calls["host"]++
	a.mu.Unlock()
	return connect.NewResponse(&hostagentv1.HostResponse{Version: "test", Cpus: 2, Vmm: "none", Accelerator: "none", MemoryLimitMib: 4096}), nil
}

// Samples reports that each running sandbox has used one second since the last call.
func (a *agent) Samples(context.Context, *connect.Request[hostagentv1.SamplesRequest]) (*connect.Response[hostagentv1.SamplesResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.calls["samples"]++
	// Include a sandbox id that nobody can parse: the server must still take the others.
	r := &hostagentv1.SamplesResponse{Time: timestamppb.Now(), Samples: []*hostagentv1.SamplesResponse_Sample{{SandboxId: "malformed"}}}
	for name, sb := range a.sandboxes {
		if sb.State == hostagentv1.SandboxState_SANDBOX_STATE_RUNNING {
			r.Samples = append(r.Samples, &hostagentv1.SamplesResponse_Sample{SandboxId: name, Vcpus: 2, CpuUs: int64(a.calls["samples"]) * 1e6, MemoryBytes: 1 << 28, DiskBytes: 1 << 20})
		}
	}
	return connect.NewResponse(r), nil
}

// happened adds an event to the journal.
func (a *agent) happened(kind hostagentv1.Event_Kind, sandbox, reason string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if kind == hostagentv1.Event_KIND_PAUSED {
		a.sandboxes[sandbox].State = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED
	} else {
		delete(a.sandboxes, sandbox)
	}
	a.events = append(a.events, &hostagentv1.Event{Seq: uint64(len(a.events) + 1), Kind: kind, SandboxId: sandbox, Time: timestamppb.Now(), Reason: reason})
	close(a.news)
	a.news = make(chan struct{})
}

func (a *agent) Events(ctx context.Context, _ *connect.Request[hostagentv1.EventsRequest], s *connect.ServerStream[hostagentv1.EventsResponse]) error {
	if err := s.Send(nil); err != nil { // The header tells the server that the call has begun.
		return err
	}
	a.mu.Lock()
	next := a.acked
	a.mu.Unlock()
	for {
		a.mu.Lock()
		todo, news := a.events[next:], a.news
		a.mu.Unlock()
		for _, e := range todo {
			if err := s.Send(&hostagentv1.EventsResponse{Event: e}); err != nil {
				return err
			}
			next = e.Seq
		}
		select {
		case <-news:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *agent) AckEvents(_ context.Context, req *connect.Request[hostagentv1.AckEventsRequest]) (*connect.Response[hostagentv1.AckEventsResponse], error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.acked = max(a.acked, req.Msg.Seq)
	return connect.NewResponse(&hostagentv1.AckEventsResponse{}), nil
}

func (a *agent) Ping(_ context.Context, req *connect.Request[hostagentv1.PingRequest]) (*connect.Response[hostagentv1.PingResponse], error) {
	if err := a.usable(req.Msg.SandboxId); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	sb := a.sandboxes[req.Msg.SandboxId]
	if sb == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	sb.ExpiresAt = timestamppb.New(time.Now().Add(time.Hour))
	return connect.NewResponse(&hostagentv1.PingResponse{Sandbox: proto.CloneOf(sb)}), nil
}

func (a *agent) Metrics(_ context.Context, req *connect.Request[hostagentv1.MetricsRequest]) (*connect.Response[hostagentv1.MetricsResponse], error) {
	if err := a.usable(req.Msg.SandboxId); err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostagentv1.MetricsResponse{Time: timestamppb.Now(), CpuCount: 1, CpuUsedPct: 12.5, MemoryTotalBytes: 512 << 20}), nil
}

func (a *agent) Console(_ context.Context, req *connect.Request[hostagentv1.ConsoleRequest]) (*connect.Response[hostagentv1.ConsoleResponse], error) {
	if err := a.usable(req.Msg.SandboxId); err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostagentv1.ConsoleResponse{Output: []byte("[    0.000000] Linux version\xff\n")}), nil
}

func (a *agent) Settle(ctx context.Context, req *connect.Request[hostagentv1.SettleRequest]) (*connect.Response[hostagentv1.SettleResponse], error) {
	if err := a.usable(req.Msg.SandboxId); err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostagentv1.SettleResponse{}), a.decide(ctx, "settle")
}

// left returns how many sandboxes and templates the host has.
func (a *agent) left() (sandboxes, templates int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.sandboxes), len(a.templates)
}
