package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
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
	mu        sync.Mutex
	has       map[string]*hostagentv1.Sandbox
	templates map[string]*hostagentv1.Template
	captured  []string
	// fails is what Snapshot and DeleteTemplate fail with.
	fails error
}

func (l *lister) Get(_ context.Context, req *connect.Request[hostagentv1.GetRequest]) (*connect.Response[hostagentv1.GetResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if sb := l.has[req.Msg.SandboxId]; sb != nil {
		return connect.NewResponse(&hostagentv1.GetResponse{Sandbox: sb}), nil
	}
	return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
}

func (l *lister) Snapshot(_ context.Context, req *connect.Request[hostagentv1.SnapshotRequest]) (*connect.Response[hostagentv1.SnapshotResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := req.Msg
	l.captured = append(l.captured, m.TemplateId)
	if l.fails != nil {
		return nil, l.fails
	}
	if l.has[m.SandboxId] == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	t := &hostagentv1.Template{TemplateId: m.TemplateId, TeamId: id.Format(id.Team, uuid.Nil), Name: m.Name, CreatedAt: timestamppb.Now()}
	l.templates[m.TemplateId] = t
	return connect.NewResponse(&hostagentv1.SnapshotResponse{Template: t}), nil
}

func (l *lister) DeleteTemplate(_ context.Context, req *connect.Request[hostagentv1.DeleteTemplateRequest]) (*connect.Response[hostagentv1.DeleteTemplateResponse], error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fails != nil {
		return nil, l.fails
	}
	delete(l.templates, req.Msg.TemplateId)
	return connect.NewResponse(&hostagentv1.DeleteTemplateResponse{}), nil
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
	l.mu.Lock()
	defer l.mu.Unlock()
	var r hostagentv1.TemplatesResponse
	for _, t := range l.templates {
		r.Templates = append(r.Templates, t)
	}
	return connect.NewResponse(&r), nil
}

func (l *lister) Host(context.Context, *connect.Request[hostagentv1.HostRequest]) (*connect.Response[hostagentv1.HostResponse], error) {
	return connect.NewResponse(&hostagentv1.HostResponse{}), nil
}

// bench is a service with one host, of which a test says what it has.
type bench struct {
	*testing.T
	*watch
	agent *lister
	conn  *pgx.Conn
}

func newBench(t *testing.T) *bench {
	ctx := context.Background()
	url := pgtest.New(t)
	st, err := store.Open(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.Close)
	agent := &lister{has: make(map[string]*hostagentv1.Sandbox), templates: make(map[string]*hostagentv1.Template)}
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
	registry, err := hosts.Open(hosts.Config{Store: st, Log: log, Heartbeat: time.Minute})
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
	w := &watch{Service: s, host: host, log: log, poke: make(chan struct{}, 1), missing: map[uuid.UUID]time.Time{}, stray: map[uuid.UUID]time.Time{}}
	return &bench{T: t, watch: w, agent: agent, conn: pgtest.Connect(t, url)}
}

const (
	none     = hostagentv1.SandboxState_SANDBOX_STATE_UNSPECIFIED
	starting = hostagentv1.SandboxState_SANDBOX_STATE_STARTING
	running  = hostagentv1.SandboxState_SANDBOX_STATE_RUNNING
	stopping = hostagentv1.SandboxState_SANDBOX_STATE_STOPPING
	pausing  = hostagentv1.SandboxState_SANDBOX_STATE_PAUSING
	paused   = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED
	resuming = hostagentv1.SandboxState_SANDBOX_STATE_RESUMING

	absent = State("(no-row)")
)

// add puts a sandbox into the table and on the host, past the rules that lead
// there.
func (b *bench) add(row State, on hostagentv1.SandboxState) uuid.UUID {
	b.Helper()
	ctx := context.Background()
	u := uuid.New()
	wire := id.Format(id.Sandbox, u)
	if row != absent {
		if _, err := b.Store.InsertSandbox(ctx, db.InsertSandboxParams{ID: u, TeamID: uuid.Nil, HostID: &b.host.ID, TemplateName: "minimal", VCPUs: 1, MemoryMiB: 128, Metadata: map[string]string{}, CreatedAt: time.Now(), OnTimeout: DestroyOnTimeout}); err != nil {
			b.Fatal(err)
		}
		if _, err := b.conn.Exec(ctx, "UPDATE sandboxes SET state = $2 WHERE id = $1", u, string(row)); err != nil {
			b.Fatal(err)
		}
	}
	if on != none {
		sb := &hostagentv1.Sandbox{SandboxId: wire, State: on, CreatedAt: timestamppb.Now()}
		if on != paused {
			sb.ExpiresAt = timestamppb.New(time.Now().Add(time.Hour))
		}
		b.agent.mu.Lock()
		b.agent.has[wire] = sb
		b.agent.mu.Unlock()
	}
	return u
}

// outcome is what becomes of a pair, and after which look.
type outcome struct {
	state  State
	has    bool
	reason string
}

// outcomes is every pair of what the table says of a sandbox (the rows) and
// what its host does (the columns), and what becomes of it:
//
//	=            nothing
//	a state      that is written
//	lost failed  its end is written, with that reason
//	deleted      it is destroyed on the host, and its end is written
//	gone         it is destroyed on the host
//
// With a ~ only when it still is so after the grace: what explains it may be on
// its way.
const outcomes = `
          none     starting  running   stopping  pausing   paused    resuming
pending   failed~  =         running   =         =         paused    =
starting  failed~  =         running   =         =         paused    =
running   lost~    =         =         =         =         paused    =
missing   lost~    =         running   =         =         paused    =
pausing   lost~    =         running~  =         =         paused    =
paused    lost~    =         running~  =         =         =         =
resuming  lost~    =         running   =         =         paused~   =
stopping  deleted  deleted   deleted   deleted   deleted   deleted   deleted
stopped   =        gone      gone      =         gone      gone      gone
error     =        gone      gone      =         gone      gone      gone
(no-row)  =        gone~     gone~     =         gone~     gone~     gone~
`

// pair is what the table says of a sandbox and what its host does.
type pair struct {
	row State
	on  hostagentv1.SandboxState
}

// table reads outcomes, which must have every state that the database takes
// and every one that a host can say: what becomes at first sight, and after
// the grace.
func table(t *testing.T, conn *pgx.Conn) (atOnce, later map[pair]outcome) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(outcomes), "\n")
	var onHost []hostagentv1.SandboxState
	for _, name := range strings.Fields(lines[0]) {
		if name == "none" {
			name = "unspecified"
		}
		on, ok := hostagentv1.SandboxState_value["SANDBOX_STATE_"+strings.ToUpper(name)]
		if !ok {
			t.Fatalf("no host says %q", name)
		}
		onHost = append(onHost, hostagentv1.SandboxState(on))
	}
	for on, name := range hostagentv1.SandboxState_name {
		if !slices.Contains(onHost, hostagentv1.SandboxState(on)) {
			t.Errorf("outcomes have no column for %s", name)
		}
	}
	var check string
	if err := conn.QueryRow(t.Context(), "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'sandboxes_state_check'").Scan(&check); err != nil {
		t.Fatal(err)
	}
	states := map[State]bool{absent: true}
	for _, m := range regexp.MustCompile(`'(\w+)'`).FindAllStringSubmatch(check, -1) {
		states[State(m[1])] = true
	}
	atOnce, later = make(map[pair]outcome), make(map[pair]outcome)
	for _, line := range lines[1:] {
		cells := strings.Fields(line)
		row := State(cells[0])
		if !states[row] {
			t.Fatalf("the database takes no %q", row)
		}
		delete(states, row)
		if len(cells) != len(onHost)+1 {
			t.Fatalf("%d cells in the row of %q", len(cells)-1, row)
		}
		for i, on := range onHost {
			p, is := pair{row, on}, outcome{row, on != none, ""}
			cell, waits := strings.CutSuffix(cells[i+1], "~")
			becomes := is
			switch cell {
			case "=":
			case "lost":
				becomes = outcome{Stopped, false, "lost"}
			case "failed":
				becomes = outcome{Failed, false, "failed"}
			case "deleted":
				becomes = outcome{Stopped, false, "deleted"}
			case "gone":
				becomes.has = false
			default:
				becomes.state = State(cell)
			}
			atOnce[p], later[p] = becomes, becomes
			if waits {
				atOnce[p] = is
			}
		}
	}
	for row := range states {
		t.Errorf("outcomes have no row for %q", row)
	}
	return atOnce, later
}

// TestCompare is that each pair of what the table says of a sandbox and what
// the host does becomes what it should, at first sight and after the grace.
func TestCompare(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	atOnce, later := table(t, b.conn)
	if t.Failed() {
		t.FailNow()
	}
	t.Logf("%d pairs", len(later))
	ids := make(map[pair]uuid.UUID)
	for p := range later {
		ids[p] = b.add(p.row, p.on)
	}
	// What this process is at work on is none of the reconciler's business.
	busy, moving := b.add(Starting, none), b.add(Pausing, running)
	b.creating[busy] = &creation{done: make(chan struct{})}
	b.turns[moving] = &turn{to: Paused, done: make(chan struct{})}
	// Nor is what another living server is at work on; a dead one's is.
	living, dead := uuid.New(), uuid.New()
	othersWork, othersPause, leftWork := b.add(Starting, none), b.add(Pausing, running), b.add(Starting, none)
	// A sandbox that is another host's is a stray on this one.
	elsewhere, err := b.Hosts.Register(ctx, "unix:/nowhere", "token")
	if err != nil {
		t.Fatal(err)
	}
	moved := b.add(Running, running)
	for _, sql := range []string{
		fmt.Sprintf("INSERT INTO servers VALUES ('%s', now()), ('%s', now() - interval '10 minutes')", living, dead),
		fmt.Sprintf("UPDATE sandboxes SET worker = '%s' WHERE id IN ('%s', '%s')", living, othersWork, othersPause),
		fmt.Sprintf("UPDATE sandboxes SET worker = '%s' WHERE id = '%s'", dead, leftWork),
		fmt.Sprintf("UPDATE sandboxes SET host_id = '%s' WHERE id = '%s'", elsewhere.ID, moved),
	} {
		if _, err := b.conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	check := func(when string, want map[pair]outcome) {
		t.Helper()
		for p, u := range ids {
			got := outcome{state: absent}
			if row, err := b.Store.GetSandbox(ctx, u); err == nil {
				got.state = State(row.State)
				if row.EndReason != nil {
					got.reason = *row.EndReason
				}
				if (got.state == Paused) == (row.PausedAt == nil) && p.row != Paused {
					t.Errorf("%s: row %q and host %v: %q with paused_at %v", when, p.row, p.on, got.state, row.PausedAt)
				}
				if p.on == running && got.state == Running && row.ExpiresAt == nil {
					t.Errorf("%s: row %q and host %v: expires_at is not the host's", when, p.row, p.on)
				}
			}
			b.agent.mu.Lock()
			got.has = b.agent.has[id.Format(id.Sandbox, u)] != nil
			b.agent.mu.Unlock()
			if w := want[p]; got != w {
				t.Errorf("%s: row %q and host %v became %+v, want %+v", when, p.row, p.on, got, w)
			}
		}
		for u, want := range map[uuid.UUID]State{busy: Starting, moving: Pausing} {
			if row, err := b.Store.GetSandbox(ctx, u); err != nil || row.State != string(want) {
				t.Errorf("%s: what is worked on became %q, %v; want %q", when, row.State, err, want)
			}
		}
	}
	if err := b.compare(ctx); err != nil {
		t.Fatal(err)
	}
	check("at first sight", atOnce)
	for _, seen := range []map[uuid.UUID]time.Time{b.missing, b.stray} {
		for u, at := range seen {
			seen[u] = at.Add(-strayAfter)
		}
	}
	if err := b.compare(ctx); err != nil {
		t.Fatal(err)
	}
	check("after the grace", later)
	delete(b.creating, busy)
	delete(b.turns, moving)
	for what, want := range map[uuid.UUID]State{othersWork: Starting, othersPause: Pausing, leftWork: Failed, moved: Running} {
		if row, err := b.Store.GetSandbox(ctx, what); err != nil || State(row.State) != want {
			t.Errorf("another server's or host's sandbox became %q, %v; want %q", row.State, err, want)
		}
	}
	if b.agent.has[id.Format(id.Sandbox, moved)] != nil {
		t.Error("the host still has what is another's")
	}
}

// TestCompareTemplates is every pair of what the table says of a template and
// what the host does.
func TestCompareTemplates(t *testing.T) {
	b := newBench(t)
	ctx := context.Background()
	team := uuid.New()
	if err := b.Store.InsertTeam(ctx, db.InsertTeamParams{ID: team, Name: "team"}); err != nil {
		t.Fatal(err)
	}
	live := b.add(Running, running)
	add := func(state templates.State, owner uuid.UUID, on bool, from uuid.UUID, name string) uuid.UUID {
		t.Helper()
		u := uuid.New()
		if state != "" {
			if _, err := b.conn.Exec(ctx, `INSERT INTO templates (id, team_id, name, size_bytes, created_at, state, captured_from) VALUES ($1, $2, $3, 0, now(), $4, $5)`, u, owner, name, string(state), from); err != nil {
				t.Fatal(err)
			}
			if err := b.Store.AddHostTemplate(ctx, db.AddHostTemplateParams{HostID: b.host.ID, TemplateID: u}); err != nil {
				t.Fatal(err)
			}
		}
		if on {
			wire := id.Format(id.Template, u)
			b.agent.templates[wire] = &hostagentv1.Template{TemplateId: wire, TeamId: id.Format(id.Team, owner), Name: name, SizeBytes: 7, Vcpus: 2, MemoryMib: 256, DiskMib: 1024, CreatedAt: timestamppb.Now()}
		}
		return u
	}
	const dropped = templates.State("")
	tests := []struct {
		name  string
		state templates.State
		owner uuid.UUID
		on    bool
		from  uuid.UUID
		want  templates.State
		has   bool
	}{
		{"pending", templates.Pending, team, true, live, templates.Ready, true},
		{"pending-not-there", templates.Pending, team, false, live, templates.Ready, true},
		{"pending-without-sandbox", templates.Pending, team, false, uuid.New(), dropped, false},
		{"ready", templates.Ready, team, true, live, templates.Ready, true},
		{"ready-lost", templates.Ready, team, false, live, dropped, false},
		{"platform-lost", templates.Ready, uuid.Nil, false, live, templates.Ready, false},
		{"deleting", templates.Deleting, team, true, live, dropped, false},
		{"deleting-not-there", templates.Deleting, team, false, live, dropped, false},
		{"new", "", team, true, uuid.Nil, templates.Ready, true},
		{"new-of-platform", "", uuid.Nil, true, uuid.Nil, templates.Ready, true},
		{"new-of-nobody", "", uuid.New(), true, uuid.Nil, dropped, true},
	}
	ids := make([]uuid.UUID, len(tests))
	for i, tt := range tests {
		ids[i] = add(tt.state, tt.owner, tt.on, tt.from, tt.name)
	}
	// Of two of one name the one in the table keeps it.
	second := add("", team, true, uuid.Nil, "ready")
	// What this process, or another living one, is at work on is left alone.
	living := uuid.New()
	others := add(templates.Deleting, team, true, live, "others")
	for _, sql := range []string{
		fmt.Sprintf("INSERT INTO servers VALUES ('%s', now())", living),
		fmt.Sprintf("UPDATE templates SET worker = '%s' WHERE id = '%s'", living, others),
	} {
		if _, err := b.conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	busy := add(templates.Pending, team, false, live, "busy")
	b.templates[busy]++
	state := func(u uuid.UUID) templates.State {
		row, err := b.Store.GetTemplate(ctx, u)
		if errors.Is(err, store.ErrNoRows) {
			return ""
		}
		if err != nil {
			t.Fatal(err)
		}
		return templates.State(row.State)
	}
	// Twice: what comes to be at the first look is new at the second.
	for range 2 {
		if err := b.compare(ctx); err != nil {
			t.Fatal(err)
		}
		settled(b, busy)
	}
	for i, tt := range tests {
		b.agent.mu.Lock()
		has := b.agent.templates[id.Format(id.Template, ids[i])] != nil
		b.agent.mu.Unlock()
		if got := state(ids[i]); got != tt.want || has != tt.has {
			t.Errorf("%s: became %q and on the host: %v; want %q and %v", tt.name, got, has, tt.want, tt.has)
		}
		row, err := b.Store.GetTemplate(ctx, ids[i])
		if tt.on && tt.want == templates.Ready && (err != nil || row.VCPUs != 2 || row.MemoryMiB != 256 || row.DiskMiB != 1024 || row.SizeBytes != 7) {
			t.Errorf("%s: the row is %+v, %v", tt.name, row, err)
		}
	}
	if got := state(second); got != "" {
		t.Errorf("a second template of one name is %q", got)
	}
	if got := state(busy); got != templates.Pending {
		t.Errorf("what is being captured became %q", got)
	}
	if got := state(others); got != templates.Deleting {
		t.Errorf("what another server removes became %q", got)
	}
	b.templates[busy]--
	// What fails for good is dropped, what may have come to be is asked for again.
	b.agent.mu.Lock()
	b.agent.fails = connect.NewError(connect.CodeDeadlineExceeded, errors.New("slow"))
	b.agent.mu.Unlock()
	if err := b.compare(ctx); err != nil {
		t.Fatal(err)
	}
	settled(b, uuid.Nil)
	if got := state(busy); got != templates.Pending {
		t.Errorf("what may have been captured became %q", got)
	}
	b.agent.mu.Lock()
	b.agent.fails = connect.NewError(connect.CodeResourceExhausted, errors.New("no space"))
	b.agent.mu.Unlock()
	if err := b.compare(ctx); err != nil {
		t.Fatal(err)
	}
	settled(b, uuid.Nil)
	if got := state(busy); got != "" {
		t.Errorf("what could not be captured became %q", got)
	}
}

// settled waits until nothing but one template is worked on.
func settled(b *bench, but uuid.UUID) {
	b.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b.mu.Lock()
		n := 0
		for u, count := range b.templates {
			if u != but {
				n += count
			}
		}
		b.mu.Unlock()
		if n == 0 {
			return
		}
		if time.Now().After(deadline) {
			b.Fatal("templates are still worked on")
		}
	}
}
