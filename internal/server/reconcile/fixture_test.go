package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/scheduler"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/store/storetest"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
	"github.com/wrenn-dev/wrenn/internal/server/work"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// lister is a fake agent that only lists its objects: it speaks the real protocol over a
// socket, and a test decides what is on the host.
type lister struct {
	hostagentv1connect.UnimplementedHostAgentHandler
	mu        sync.Mutex
	has       map[string]*hostagentv1.Sandbox
	templates map[string]*hostagentv1.Template
	// on decides the result of a call about an object; nil means success.
	on     func(ctx context.Context, call, object string) error
	calls  map[string]int
	events chan *hostagentv1.Event
	acked  uint64
}

// called counts a call and returns its result.
func (l *lister) called(ctx context.Context, call, object string) error {
	l.mu.Lock()
	l.calls[call]++
	on := l.on
	l.mu.Unlock()
	if on == nil {
		return nil
	}
	return on(ctx, call, object)
}

func (l *lister) count(call string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.calls[call]
}

func (l *lister) hook(on func(ctx context.Context, call, object string) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.on = on
}

func (l *lister) there(sandbox uuid.UUID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.has[id.Format(id.Sandbox, sandbox)] != nil
}

// set puts a sandbox into a state on the host, or removes it.
func (l *lister) set(sandbox uuid.UUID, on hostagentv1.SandboxState) {
	wire := id.Format(id.Sandbox, sandbox)
	l.mu.Lock()
	defer l.mu.Unlock()
	if on == none {
		delete(l.has, wire)
		return
	}
	sb := &hostagentv1.Sandbox{SandboxId: wire, State: on, CreatedAt: timestamppb.Now()}
	if on != paused {
		sb.ExpiresAt = timestamppb.New(time.Now().Add(time.Hour))
	}
	l.has[wire] = sb
}

func (l *lister) Get(_ context.Context, req *connect.Request[hostagentv1.GetRequest]) (*connect.Response[hostagentv1.GetResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if sb := l.has[req.Msg.SandboxId]; sb != nil {
		return connect.NewResponse(&hostagentv1.GetResponse{Sandbox: proto.CloneOf(sb)}), nil
	}
	return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
}

func (l *lister) Create(ctx context.Context, req *connect.Request[hostagentv1.CreateRequest]) (*connect.Response[hostagentv1.CreateResponse], error) {
	if err := l.called(ctx, "create", req.Msg.SandboxId); err != nil {
		return nil, err
	}
	sb := &hostagentv1.Sandbox{SandboxId: req.Msg.SandboxId, State: running, CreatedAt: timestamppb.Now()}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.has[sb.SandboxId] = sb
	return connect.NewResponse(&hostagentv1.CreateResponse{Sandbox: proto.CloneOf(sb)}), nil
}

func (l *lister) Ping(_ context.Context, req *connect.Request[hostagentv1.PingRequest]) (*connect.Response[hostagentv1.PingResponse], error) {
	return connect.NewResponse(&hostagentv1.PingResponse{Sandbox: &hostagentv1.Sandbox{SandboxId: req.Msg.SandboxId, State: running}}), nil
}

func (l *lister) Fork(ctx context.Context, req *connect.Request[hostagentv1.ForkRequest]) (*connect.Response[hostagentv1.ForkResponse], error) {
	var r hostagentv1.ForkResponse
	for _, c := range req.Msg.Copies {
		if err := l.called(ctx, "fork", c.SandboxId); err != nil {
			return nil, err
		}
		sb := &hostagentv1.Sandbox{SandboxId: c.SandboxId, State: running, CreatedAt: timestamppb.Now()}
		l.mu.Lock()
		l.has[c.SandboxId] = sb
		l.mu.Unlock()
		r.Sandboxes = append(r.Sandboxes, proto.CloneOf(sb))
	}
	return connect.NewResponse(&r), nil
}

func (l *lister) Pause(ctx context.Context, req *connect.Request[hostagentv1.PauseRequest]) (*connect.Response[hostagentv1.PauseResponse], error) {
	if err := l.called(ctx, "pause", req.Msg.SandboxId); err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostagentv1.PauseResponse{}), nil
}

func (l *lister) Snapshot(ctx context.Context, req *connect.Request[hostagentv1.SnapshotRequest]) (*connect.Response[hostagentv1.SnapshotResponse], error) {
	m := req.Msg
	if err := l.called(ctx, "snapshot", m.TemplateId); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.has[m.SandboxId] == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	t := &hostagentv1.Template{TemplateId: m.TemplateId, TeamId: id.Format(id.Team, uuid.Nil), Name: m.Name, CreatedAt: timestamppb.Now()}
	l.templates[m.TemplateId] = t
	return connect.NewResponse(&hostagentv1.SnapshotResponse{Template: t}), nil
}

func (l *lister) DeleteTemplate(ctx context.Context, req *connect.Request[hostagentv1.DeleteTemplateRequest]) (*connect.Response[hostagentv1.DeleteTemplateResponse], error) {
	if err := l.called(ctx, "delete template", req.Msg.TemplateId); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.templates, req.Msg.TemplateId)
	return connect.NewResponse(&hostagentv1.DeleteTemplateResponse{}), nil
}

func (l *lister) List(ctx context.Context, _ *connect.Request[hostagentv1.ListRequest]) (*connect.Response[hostagentv1.ListResponse], error) {
	if err := l.called(ctx, "list", ""); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var r hostagentv1.ListResponse
	for _, sb := range l.has {
		r.Sandboxes = append(r.Sandboxes, proto.CloneOf(sb))
	}
	return connect.NewResponse(&r), nil
}

func (l *lister) Destroy(ctx context.Context, req *connect.Request[hostagentv1.DestroyRequest]) (*connect.Response[hostagentv1.DestroyResponse], error) {
	if err := l.called(ctx, "destroy", req.Msg.SandboxId); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.has, req.Msg.SandboxId)
	return connect.NewResponse(&hostagentv1.DestroyResponse{}), nil
}

func (l *lister) Templates(ctx context.Context, _ *connect.Request[hostagentv1.TemplatesRequest]) (*connect.Response[hostagentv1.TemplatesResponse], error) {
	if err := l.called(ctx, "templates", ""); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var r hostagentv1.TemplatesResponse
	for _, t := range l.templates {
		r.Templates = append(r.Templates, proto.CloneOf(t))
	}
	return connect.NewResponse(&r), nil
}

func (l *lister) Host(ctx context.Context, _ *connect.Request[hostagentv1.HostRequest]) (*connect.Response[hostagentv1.HostResponse], error) {
	if err := l.called(ctx, "host", ""); err != nil {
		return nil, err
	}
	return connect.NewResponse(&hostagentv1.HostResponse{Cpus: 8, MemoryLimitMib: 1 << 16, Slots: 1000}), nil
}

func (l *lister) Events(ctx context.Context, _ *connect.Request[hostagentv1.EventsRequest], s *connect.ServerStream[hostagentv1.EventsResponse]) error {
	for {
		select {
		case e := <-l.events:
			if err := s.Send(&hostagentv1.EventsResponse{Event: e}); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (l *lister) AckEvents(_ context.Context, req *connect.Request[hostagentv1.AckEventsRequest]) (*connect.Response[hostagentv1.AckEventsResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.acked = max(l.acked, req.Msg.Seq)
	return connect.NewResponse(&hostagentv1.AckEventsResponse{}), nil
}

func (l *lister) upTo() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acked
}

// bench is a controller that watches one fake host. Nothing runs unless the test calls
// it.
type bench struct {
	*testing.T
	*watch
	agent *lister
	conn  *pgx.Conn
}

func newBench(t *testing.T, heartbeat time.Duration) *bench {
	ctx := context.Background()
	url := storetest.New(t)
	st, err := store.Open(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	agent := &lister{
		has: make(map[string]*hostagentv1.Sandbox), templates: make(map[string]*hostagentv1.Template), calls: make(map[string]int),
		events: make(chan *hostagentv1.Event, 100),
	}
	addr := "unix:" + filepath.Join(t.TempDir(), "agent")
	l, err := netaddr.Listen(ctx, addr, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentHandler(agent))
	web := netaddr.Server(mux)
	go web.Serve(l)
	t.Cleanup(func() { web.Close() })
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("WRENN_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	registry, err := hosts.Open(hosts.Config{Store: st, Log: log, Heartbeat: heartbeat, Policy: scheduler.Policy{MemoryFactor: 1, VCPUFactor: 100}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(registry.Close)
	host, err := registry.Register(ctx, addr, "token")
	if err != nil {
		t.Fatal(err)
	}
	jobs := work.New(log)
	t.Cleanup(func() {
		over, cancel := context.WithCancel(ctx)
		cancel()
		jobs.Close(over)
	})
	catalog := templates.NewCatalog(st, registry, log)
	s := sandboxes.New(sandboxes.Config{Store: st, Hosts: registry, Templates: catalog, Tokens: auth.NewTokens([]byte("secret")), Work: jobs, Log: log})
	tpl := templates.New(catalog, templates.Config{Store: st, Hosts: registry, Sandboxes: s, Work: jobs, Log: log})
	w := newWatch(ctx, New(Config{Store: st, Hosts: registry, Sandboxes: s, Templates: tpl, Log: log}), host)
	t.Cleanup(func() { w.cancel(); w.queue.close() })
	return &bench{T: t, watch: w, agent: agent, conn: pgtest.Connect(t, url)}
}

// goes runs the controller with its background work.
func (b *bench) goes() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.Controller.Run(ctx)
	}()
	b.Cleanup(func() { cancel(); <-done })
}

const (
	none    = hostagentv1.SandboxState_SANDBOX_STATE_UNSPECIFIED
	running = hostagentv1.SandboxState_SANDBOX_STATE_RUNNING
	paused  = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED
)

// add adds a sandbox to the database and the host, bypassing the rules for that.
func (b *bench) add(row sandboxes.State, on hostagentv1.SandboxState) uuid.UUID {
	b.Helper()
	ctx := context.Background()
	u := uuid.New()
	if row != NoRow {
		if _, err := b.Store.InsertSandbox(ctx, db.InsertSandboxParams{ID: u, TeamID: uuid.Nil, HostID: &b.host.ID, TemplateName: "minimal", VCPUs: 1, MemoryMiB: 128, Metadata: map[string]string{}, CreatedAt: time.Now(), TimeoutSeconds: 3600, OnTimeout: sandboxes.DestroyOnTimeout}); err != nil {
			b.Fatal(err)
		}
		b.sql("UPDATE sandboxes SET state = $2 WHERE id = $1", u, string(row))
	}
	b.agent.set(u, on)
	return u
}

func (b *bench) sql(query string, args ...any) {
	b.Helper()
	if _, err := b.conn.Exec(context.Background(), query, args...); err != nil {
		b.Fatalf("%s: %v", query, err)
	}
}

// is returns the state of a sandbox in the database.
func (b *bench) is(sandbox uuid.UUID) sandboxes.State {
	b.Helper()
	row, err := b.Store.GetSandbox(context.Background(), sandbox)
	if errors.Is(err, store.ErrNoRows) {
		return NoRow
	}
	if err != nil {
		b.Fatal(err)
	}
	return sandboxes.State(row.State)
}

// eventually waits until ok.
func (b *bench) eventually(what string, ok func() bool) {
	b.Helper()
	await.Until(b, what, ok)
}

// look reconciles at a time, and waits until the resulting work is done or waits for a
// retry.
func (b *bench) look(now time.Time) {
	b.Helper()
	if _, err := b.compare(now); err != nil {
		b.Fatal(err)
	}
	b.eventually("the queue is idle", func() bool {
		b.queue.mu.Lock()
		defer b.queue.mu.Unlock()
		for _, t := range b.queue.tasks {
			if t.running || t.failures == 0 {
				return false
			}
		}
		return true
	})
}

// offer adds the built-in template to the host, so that sandboxes can be created.
func (b *bench) offer() {
	b.Helper()
	wire := id.Format(id.Template, uuid.Nil)
	b.agent.mu.Lock()
	b.agent.templates[wire] = &hostagentv1.Template{TemplateId: wire, TeamId: id.Format(id.Team, uuid.Nil), Name: "minimal", SizeBytes: 1, CreatedAt: timestamppb.Now()}
	b.agent.mu.Unlock()
	if err := b.Hosts.Contact(context.Background(), b.host); err != nil {
		b.Fatal(err)
	}
	b.look(time.Now())
}

// gate blocks a call of the host about an object until the test opens it.
type gate struct {
	call, object string // object "" means any
	held         chan string
	open         chan struct{}
}

func newGate(call, object string) *gate {
	return &gate{call: call, object: object, held: make(chan string, 100), open: make(chan struct{})}
}

func (g *gate) on(ctx context.Context, call, object string) error {
	if call != g.call || g.object != "" && object != g.object {
		return nil
	}
	g.held <- object
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// wait waits until the gate blocks a call, and returns its object.
func (g *gate) wait(t testing.TB) string {
	t.Helper()
	return await.Recv(t, "a call to "+g.call, g.held)
}
