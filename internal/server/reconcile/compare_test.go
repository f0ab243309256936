package reconcile

import (
	"context"
	"errors"
	"regexp"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// TestTable checks that the table has a row for every state of the database, a column for
// every state that a host can report, and a lane for every kind.
func TestTable(t *testing.T) {
	b := newBench(t, time.Minute)
	var check string
	if err := b.conn.QueryRow(t.Context(), "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'sandboxes_state_check'").Scan(&check); err != nil {
		t.Fatal(err)
	}
	states := map[sandboxes.State]bool{NoRow: true}
	for _, m := range regexp.MustCompile(`'(\w+)'`).FindAllStringSubmatch(check, -1) {
		states[sandboxes.State(m[1])] = true
	}
	for state := range states {
		if _, ok := table[state]; !ok {
			t.Errorf("the table has no row for %q", state)
		}
	}
	for state, rules := range table {
		if !states[state] {
			t.Errorf("the database does not accept %q", state)
		}
		for _, r := range rules {
			if r.do != Leave && r.do != Follow && lanes[r.do] == nil {
				t.Errorf("%s is in no lane", r.do)
			}
		}
	}
	if len(hostagentv1.SandboxState_name) != hostStates {
		t.Errorf("hosts can report %d states, the table has %d", len(hostagentv1.SandboxState_name), hostStates)
	}
	for on := range hostagentv1.SandboxState_name {
		if on < 0 || on >= hostStates {
			t.Errorf("the table has no column for %d", on)
		}
	}
	if r := (pair{sandboxes.Running, hostStates}).rule(); r != ____ {
		t.Errorf("a newer agent's state leads to %+v", r)
	}
}

// outcome is the result for a pair.
type outcome struct {
	state  sandboxes.State
	has    bool
	reason string
}

// outcome returns the result for a pair by its rule.
func (p pair) outcome(t *testing.T, late bool) outcome {
	is := outcome{p.row, p.host != none, ""}
	r := p.rule()
	if r.grace > 0 && !late {
		return is
	}
	switch r.do {
	case Leave, Follow:
	case Adopt, Find, Refresh:
		is.state = map[hostagentv1.SandboxState]sandboxes.State{running: sandboxes.Running, paused: sandboxes.Paused}[p.host]
	case Fail:
		is = outcome{sandboxes.Failed, false, "failed"}
	case Lose:
		is = outcome{sandboxes.Stopped, false, "lost"}
	case Stop:
		is = outcome{sandboxes.Stopped, false, "deleted"}
	case Destroy:
		is.has = false
	default:
		t.Fatalf("%+v leads to %s", p, r.do)
	}
	return is
}

// TestCompare checks for each pair of a sandbox's states in the database and on the host
// that the controller does what it should, at first sight and after the grace period.
func TestCompare(t *testing.T) {
	b := newBench(t, time.Minute)
	ctx := context.Background()
	b.offer()
	all := make(map[pair]uuid.UUID)
	for row := range table {
		for on := range hostStates {
			p := pair{row, hostagentv1.SandboxState(on)}
			all[p] = b.add(p.row, p.host)
		}
	}
	// The controller leaves alone what this server works on.
	moving := b.add(sandboxes.Running, running)
	creation, pause := newGate("create", ""), newGate("pause", "")
	b.agent.hook(func(ctx context.Context, call, object string) error {
		return errors.Join(creation.on(ctx, call, object), pause.on(ctx, call, object))
	})
	ended := make(chan error, 2)
	go func() {
		_, _, err := b.Controller.Sandboxes.Create(ctx, uuid.Nil, sandboxes.CreateParams{Template: "minimal"}, "")
		ended <- err
	}()
	go func() {
		_, err := b.Controller.Sandboxes.Pause(ctx, uuid.Nil, moving)
		ended <- err
	}()
	busy, err := id.Parse(id.Sandbox, creation.wait(t))
	if err != nil {
		t.Fatal(err)
	}
	pause.wait(t)
	// It also leaves alone what another living server works on, but not what a dead one
	// did.
	living, dead := uuid.New(), uuid.New()
	othersWork, othersPause, leftWork := b.add(sandboxes.Starting, none), b.add(sandboxes.Pausing, running), b.add(sandboxes.Starting, none)
	// Another host's sandbox is a stray on this one.
	elsewhere, err := b.Hosts.Register(ctx, "unix:/nowhere", "token")
	if err != nil {
		t.Fatal(err)
	}
	moved := b.add(sandboxes.Running, running)
	b.sql("INSERT INTO servers VALUES ($1, now()), ($2, now() - interval '10 minutes')", living, dead)
	b.sql("UPDATE sandboxes SET worker = $1 WHERE id IN ($2, $3)", living, othersWork, othersPause)
	b.sql("UPDATE sandboxes SET worker = $1 WHERE id = $2", dead, leftWork)
	b.sql("UPDATE sandboxes SET host_id = $1 WHERE id = $2", elsewhere.ID, moved)

	check := func(when string, late bool) {
		t.Helper()
		for p, u := range all {
			got := outcome{state: NoRow}
			if row, err := b.Store.GetSandbox(ctx, u); err == nil {
				got.state = sandboxes.State(row.State)
				if row.EndReason != nil {
					got.reason = *row.EndReason
				}
				if (got.state == sandboxes.Paused) == (row.PausedAt == nil) && p.row != sandboxes.Paused {
					t.Errorf("%s: row %q and host %v: %q with paused_at %v", when, p.row, p.host, got.state, row.PausedAt)
				}
				if p.host == running && got.state == sandboxes.Running && row.ExpiresAt == nil {
					t.Errorf("%s: row %q and host %v: expires_at is not the host's", when, p.row, p.host)
				}
			}
			got.has = b.agent.there(u)
			if want := p.outcome(t, late); got != want {
				t.Errorf("%s: row %q and host %v became %+v, want %+v", when, p.row, p.host, got, want)
			}
		}
		for u, want := range map[uuid.UUID]sandboxes.State{busy: sandboxes.Starting, moving: sandboxes.Pausing} {
			if got := b.is(u); got != want {
				t.Errorf("%s: the sandbox that this server works on became %q; want %q", when, got, want)
			}
		}
	}
	first := time.Now()
	b.look(first)
	check("at first sight", false)
	b.look(first.Add(strayAfter))
	check("after the grace", true)
	for what, want := range map[uuid.UUID]sandboxes.State{othersWork: sandboxes.Starting, othersPause: sandboxes.Pausing, leftWork: sandboxes.Failed, moved: sandboxes.Running} {
		if got := b.is(what); got != want {
			t.Errorf("another server's or host's sandbox became %q; want %q", got, want)
		}
	}
	if b.agent.there(moved) {
		t.Error("the host still has another host's sandbox")
	}
	close(creation.open)
	close(pause.open)
	for range 2 {
		if err := <-ended; err != nil {
			t.Errorf("the operation in progress: %v", err)
		}
	}
}

// TestCompareTemplates checks every pair of a template's states in the database and on
// the host.
func TestCompareTemplates(t *testing.T) {
	b := newBench(t, time.Minute)
	ctx := context.Background()
	team := uuid.New()
	if err := b.Store.InsertTeam(ctx, db.InsertTeamParams{ID: team, Name: "team"}); err != nil {
		t.Fatal(err)
	}
	live := b.add(sandboxes.Running, running)
	add := func(state templates.State, owner uuid.UUID, on bool, from uuid.UUID, name string) uuid.UUID {
		t.Helper()
		u := uuid.New()
		if state != "" {
			b.sql(`INSERT INTO templates (id, team_id, name, size_bytes, created_at, state, captured_from) VALUES ($1, $2, $3, 0, now(), $4, $5)`, u, owner, name, string(state), from)
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
		{"new", "", team, true, uuid.Nil, dropped, true},
		{"new-of-platform", "", uuid.Nil, true, uuid.Nil, dropped, true},
		{"new-of-nobody", "", uuid.New(), true, uuid.Nil, dropped, true},
	}
	ids := make([]uuid.UUID, len(tests))
	for i, tt := range tests {
		ids[i] = add(tt.state, tt.owner, tt.on, tt.from, tt.name)
	}
	// The server was killed after the last host had removed it.
	nowhere := add(templates.Deleting, team, false, live, "deleting-nowhere")
	b.sql("DELETE FROM host_templates WHERE template_id = $1", nowhere)
	// An unreadable id does not keep the controller from the other templates.
	b.agent.templates["x"] = &hostagentv1.Template{TemplateId: "x", Name: "x"}
	// The controller leaves alone what this server, or another living one, works on.
	living := uuid.New()
	others := add(templates.Deleting, team, true, live, "others")
	b.sql("INSERT INTO servers VALUES ($1, now())", living)
	b.sql("UPDATE templates SET worker = $1 WHERE id = $2", living, others)
	busy := add(templates.Ready, team, true, live, "busy")
	removal := newGate("delete template", id.Format(id.Template, busy))
	b.agent.hook(removal.on)
	row, err := b.Store.GetTemplate(ctx, busy)
	if err != nil {
		t.Fatal(err)
	}
	removed := make(chan error, 1)
	go func() { removed <- b.Templates.Remove(ctx, row) }()
	removal.wait(t)

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
	// Reconcile twice: the second pass sees the first one's results.
	for range 2 {
		b.look(time.Now())
	}
	for i, tt := range tests {
		b.agent.mu.Lock()
		has := b.agent.templates[id.Format(id.Template, ids[i])] != nil
		b.agent.mu.Unlock()
		if got := state(ids[i]); got != tt.want || has != tt.has {
			t.Errorf("%s: became %q and on the host: %v; want %q and %v", tt.name, got, has, tt.want, tt.has)
		}
		row, err := b.Store.GetTemplate(ctx, ids[i])
		measured := row.VCPUs == 2 && row.MemoryMiB == 256 && row.DiskMiB == 1024 || tt.state == templates.Ready // as it was created
		if tt.on && tt.want == templates.Ready && (err != nil || row.Name != tt.name || row.TeamID != tt.owner || row.SizeBytes != 7 || !measured) {
			t.Errorf("%s: the row is %+v, %v", tt.name, row, err)
		}
	}
	if got := state(nowhere); got != "" {
		t.Errorf("the template that no host has any more is %q", got)
	}
	if got := state(others); got != templates.Deleting {
		t.Errorf("the template that another server removes became %q", got)
	}
	if n := b.agent.count("delete template"); n != 3 {
		t.Errorf("the host was asked %d times to remove a template, want 3 times, and once for the one in progress", n)
	}
	close(removal.open)
	if err := <-removed; err != nil {
		t.Errorf("remove: %v", err)
	}

	// If a capture may have succeeded, the host is asked again; if it failed for good, it
	// is dropped.
	unsure := add(templates.Pending, team, false, live, "unsure")
	b.agent.hook(func(_ context.Context, call, _ string) error {
		if call == "snapshot" {
			return connect.NewError(connect.CodeDeadlineExceeded, errors.New("slow"))
		}
		return nil
	})
	b.look(time.Now())
	if got := state(unsure); got != templates.Pending {
		t.Errorf("the capture that may have succeeded became %q", got)
	}
	b.agent.hook(func(_ context.Context, call, _ string) error {
		if call == "snapshot" {
			return connect.NewError(connect.CodeResourceExhausted, errors.New("no space"))
		}
		return nil
	})
	b.eventually("the failed capture is dropped", func() bool { return state(unsure) == "" })
}

// TestRevive checks that a sandbox that its host had lost or ended, and that is paused
// there again because somebody repaired its files, is paused and has new tokens. One that a
// client ended is destroyed.
func TestRevive(t *testing.T) {
	b := newBench(t, time.Minute)
	all := make(map[string]uuid.UUID)
	for _, reason := range []string{"exited", "lost", "deleted", "expired"} {
		all[reason] = b.add(sandboxes.Stopped, paused)
		b.sql("UPDATE sandboxes SET end_reason = $2, error = 'why', ended_at = now() WHERE id = $1", all[reason], reason)
	}
	first := time.Now()
	b.look(first)
	for reason, u := range all {
		if is, there := b.is(u), b.agent.there(u); is != sandboxes.Stopped || there != (reason == "exited" || reason == "lost") {
			t.Errorf("at first sight the sandbox in state %s is %s, on its host: %v", reason, is, there)
		}
	}
	b.look(first.Add(lostAfter))
	for _, reason := range []string{"exited", "lost"} {
		row, err := b.Store.GetSandbox(t.Context(), all[reason])
		if err != nil || row.State != string(sandboxes.Paused) || row.PausedAt == nil || row.EndedAt != nil || row.EndReason != nil || row.Error != "" || row.TokenEpoch != 1 || !b.agent.there(row.ID) {
			t.Errorf("the sandbox in state %s is %+v, %v", reason, row, err)
		}
	}
}
