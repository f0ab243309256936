package sandboxes

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// lister is a host's agent that only knows what it has: it speaks the real
// protocol, over a socket, and lets a test say what is on the host.
type lister struct {
	hostagentv1connect.UnimplementedHostAgentHandler
	mu  sync.Mutex
	has map[string]*hostagentv1.Sandbox
}

func (l *lister) List(context.Context, *connect.Request[hostagentv1.ListRequest]) (*connect.Response[hostagentv1.ListResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var r hostagentv1.ListResponse
	for _, sb := range l.has {
		r.Sandboxes = append(r.Sandboxes, sb)
	}
	return connect.NewResponse(&r), nil
}

func (l *lister) Destroy(_ context.Context, req *connect.Request[hostagentv1.DestroyRequest]) (*connect.Response[hostagentv1.DestroyResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.has, req.Msg.SandboxId)
	return connect.NewResponse(&hostagentv1.DestroyResponse{}), nil
}

func (l *lister) Templates(context.Context, *connect.Request[hostagentv1.TemplatesRequest]) (*connect.Response[hostagentv1.TemplatesResponse], error) {
	return connect.NewResponse(&hostagentv1.TemplatesResponse{}), nil
}

func (l *lister) Host(context.Context, *connect.Request[hostagentv1.HostRequest]) (*connect.Response[hostagentv1.HostResponse], error) {
	return connect.NewResponse(&hostagentv1.HostResponse{}), nil
}

// TestCompare is every pair of what the table says of a sandbox and what the
// host does, and what becomes of it: at first sight, and after the grace.
func TestCompare(t *testing.T) {
	ctx := context.Background()
	url := pgtest.New(t)
	st, err := store.Open(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(ctx) })
	agent := &lister{has: make(map[string]*hostagentv1.Sandbox)}
	addr := "unix:" + filepath.Join(t.TempDir(), "a.sock")
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
	registry, err := hosts.Open(hosts.Config{Store: st, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(registry.Close)
	host, err := registry.Register(ctx, addr, "token")
	if err != nil {
		t.Fatal(err)
	}
	s := New(Config{Store: st, Hosts: registry, Templates: templates.New(st, log), Tokens: auth.NewTokens([]byte("secret")), Log: log})
	t.Cleanup(func() { s.Close(ctx) })

	const (
		none     = hostagentv1.SandboxState_SANDBOX_STATE_UNSPECIFIED
		starting = hostagentv1.SandboxState_SANDBOX_STATE_STARTING
		running  = hostagentv1.SandboxState_SANDBOX_STATE_RUNNING
		stopping = hostagentv1.SandboxState_SANDBOX_STATE_STOPPING
	)
	const absent = State("no row")
	tests := []struct {
		row  State
		host hostagentv1.SandboxState
		// What the table says and whether the host has it after one look …
		first     State
		firstHas  bool
		later     State // … and after the grace.
		laterHas  bool
		endReason string
	}{
		{row: Pending, host: none, first: Pending, later: Failed, endReason: "failed"},
		{row: Starting, host: none, first: Starting, later: Failed, endReason: "failed"},
		{row: Running, host: none, first: Running, later: Stopped, endReason: "lost"},
		{row: Stopping, host: none, first: Stopped, later: Stopped, endReason: "deleted"},
		{row: Missing, host: none, first: Missing, later: Stopped, endReason: "lost"},
		{row: Stopped, host: none, first: Stopped, later: Stopped},
		{row: Failed, host: none, first: Failed, later: Failed},

		{row: Starting, host: starting, first: Starting, firstHas: true, later: Starting, laterHas: true},
		{row: Missing, host: starting, first: Missing, firstHas: true, later: Missing, laterHas: true},
		{row: Running, host: starting, first: Running, firstHas: true, later: Running, laterHas: true},
		{row: Stopping, host: starting, first: Stopped, later: Stopped, endReason: "deleted"},
		{row: Stopped, host: starting, first: Stopped, later: Stopped},
		{row: Failed, host: starting, first: Failed, later: Failed},
		{row: absent, host: starting, first: absent, firstHas: true, later: absent},

		{row: Starting, host: running, first: Running, firstHas: true, later: Running, laterHas: true},
		{row: Running, host: running, first: Running, firstHas: true, later: Running, laterHas: true},
		{row: Missing, host: running, first: Running, firstHas: true, later: Running, laterHas: true},
		{row: Stopping, host: running, first: Stopped, later: Stopped, endReason: "deleted"},
		{row: Stopped, host: running, first: Stopped, later: Stopped},
		{row: Failed, host: running, first: Failed, later: Failed},
		{row: absent, host: running, first: absent, firstHas: true, later: absent},

		{row: Starting, host: stopping, first: Starting, firstHas: true, later: Starting, laterHas: true},
		{row: Running, host: stopping, first: Running, firstHas: true, later: Running, laterHas: true},
		{row: Missing, host: stopping, first: Missing, firstHas: true, later: Missing, laterHas: true},
		{row: Stopping, host: stopping, first: Stopped, later: Stopped, endReason: "deleted"},
		{row: Stopped, host: stopping, first: Stopped, firstHas: true, later: Stopped, laterHas: true},
		{row: absent, host: stopping, first: absent, firstHas: true, later: absent, laterHas: true},
	}
	add := func(row State, on hostagentv1.SandboxState) uuid.UUID {
		u := uuid.New()
		wire := id.Format(id.Sandbox, u)
		if row != absent {
			if _, err := st.InsertSandbox(ctx, db.InsertSandboxParams{ID: u, TeamID: uuid.Nil, HostID: &host.ID, TemplateName: "minimal", VCPUs: 1, MemoryMiB: 128, Metadata: map[string]string{}, CreatedAt: time.Now()}); err != nil {
				t.Fatal(err)
			}
			// Straight to the state, past the rules that lead there.
			if _, err := conn.Exec(ctx, "UPDATE sandboxes SET state = $2 WHERE id = $1", u, string(row)); err != nil {
				t.Fatal(err)
			}
		}
		if on != none {
			agent.has[wire] = &hostagentv1.Sandbox{SandboxId: wire, State: on, CreatedAt: timestamppb.Now(), ExpiresAt: timestamppb.New(time.Now().Add(time.Hour))}
		}
		return u
	}
	ids := make([]uuid.UUID, len(tests))
	for i, tt := range tests {
		ids[i] = add(tt.row, tt.host)
	}
	// What this process is at work on is none of the reconciler's business.
	busy := add(Starting, none)
	s.creating[busy] = &creation{done: make(chan struct{})}
	// Nor is what another living server is at work on; a dead one's is.
	living, dead := uuid.New(), uuid.New()
	othersWork, leftWork := add(Starting, none), add(Starting, none)
	// A sandbox that is another host's is a stray on this one.
	elsewhere, err := registry.Register(ctx, "unix:/nowhere", "token")
	if err != nil {
		t.Fatal(err)
	}
	moved := add(Running, running)
	for _, sql := range []string{
		fmt.Sprintf("INSERT INTO servers VALUES ('%s', now()), ('%s', now() - interval '1 minute')", living, dead),
		fmt.Sprintf("UPDATE sandboxes SET worker = '%s' WHERE id = '%s'", living, othersWork),
		fmt.Sprintf("UPDATE sandboxes SET worker = '%s' WHERE id = '%s'", dead, leftWork),
		fmt.Sprintf("UPDATE sandboxes SET host_id = '%s' WHERE id = '%s'", elsewhere.ID, moved),
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}

	w := &watch{Service: s, host: host, log: log, poke: make(chan struct{}, 1), missing: map[uuid.UUID]time.Time{}, stray: map[uuid.UUID]time.Time{}}
	check := func(when string, want func(int) (State, bool)) {
		t.Helper()
		for i, tt := range tests {
			state, reason := absent, ""
			if row, err := st.GetSandbox(ctx, ids[i]); err == nil {
				state = State(row.State)
				if row.EndReason != nil {
					reason = *row.EndReason
				}
			}
			agent.mu.Lock()
			has := agent.has[id.Format(id.Sandbox, ids[i])] != nil
			agent.mu.Unlock()
			wantState, wantHas := want(i)
			if state != wantState || has != wantHas {
				t.Errorf("%s: row %q and host %v became %q and on the host: %v; want %q and %v", when, tt.row, tt.host, state, has, wantState, wantHas)
			}
			if state.Ended() && reason != tt.endReason {
				t.Errorf("%s: row %q and host %v ended as %q, want %q", when, tt.row, tt.host, reason, tt.endReason)
			}
		}
		if row, err := st.GetSandbox(ctx, busy); err != nil || row.State != string(Starting) {
			t.Errorf("%s: the sandbox being created became %q, %v", when, row.State, err)
		}
	}
	if err := w.compare(ctx); err != nil {
		t.Fatal(err)
	}
	check("at first sight", func(i int) (State, bool) { return tests[i].first, tests[i].firstHas })
	for _, seen := range []map[uuid.UUID]time.Time{w.missing, w.stray} {
		for u, at := range seen {
			seen[u] = at.Add(-strayAfter)
		}
	}
	if err := w.compare(ctx); err != nil {
		t.Fatal(err)
	}
	check("after the grace", func(i int) (State, bool) { return tests[i].later, tests[i].laterHas })
	for i, tt := range tests {
		row, err := st.GetSandbox(ctx, ids[i])
		if err == nil && tt.later == Running && tt.host != none && row.ExpiresAt == nil {
			t.Errorf("row %q and host %v: expires_at is not the host's", tt.row, tt.host)
		}
	}
	delete(s.creating, busy)
	for what, want := range map[uuid.UUID]State{othersWork: Starting, leftWork: Failed, moved: Running} {
		if row, err := st.GetSandbox(ctx, what); err != nil || State(row.State) != want {
			t.Errorf("another server's or host's sandbox became %q, %v; want %q", row.State, err, want)
		}
	}
	if agent.has[id.Format(id.Sandbox, moved)] != nil {
		t.Error("the host still has what is another's")
	}
}
