package reconcile

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// TestReportedByAnother checks that nothing a host reports, in an event, a list or a
// response, changes another host's sandbox.
func TestReportedByAnother(t *testing.T) {
	b := newBench(t, time.Minute)
	owner, err := b.Hosts.Register(t.Context(), "unix:/nowhere", "token")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[pair]uuid.UUID)
	for row := range table {
		if row == NoRow {
			continue
		}
		for on := range hostStates {
			p := pair{row, hostagentv1.SandboxState(on)}
			all[p] = b.add(row, p.host)
			b.sql("UPDATE sandboxes SET host_id = $2, end_reason = CASE state WHEN 'stopped' THEN 'lost' END, expires_at = now() + interval '1 minute' WHERE id = $1", all[p], owner.ID)
		}
	}
	rows := func() map[uuid.UUID]string {
		is := make(map[uuid.UUID]string)
		for _, u := range all {
			row, err := b.Store.GetSandbox(t.Context(), u)
			if err != nil {
				t.Fatal(err)
			}
			is[u] = fmt.Sprintf("%+v", row.State) + fmt.Sprint(row.ExpiresAt, row.EndedAt, row.PausedAt, row.StartedAt, row.EndReason != nil, row.HostID, row.Error, row.DiskMiB)
		}
		return is
	}
	before := rows()
	check := func(when string) {
		t.Helper()
		after := rows()
		for p, u := range all {
			if after[u] != before[u] {
				t.Errorf("%s: row %q and another host's %v: %s became %s", when, p.row, p.host, before[u], after[u])
			}
		}
	}
	for _, u := range all {
		for kind := range hostagentv1.Event_Kind_name {
			e := &hostagentv1.Event{Kind: hostagentv1.Event_Kind(kind), SandboxId: id.Format(id.Sandbox, u), Time: timestamppb.New(time.Unix(1, 0)), Reason: "mine"}
			if err := b.apply(t.Context(), e); err != nil {
				t.Fatal(err)
			}
		}
	}
	check("events")
	now := time.Now()
	b.look(now)
	b.look(now.Add(strayAfter))
	check("comparison")

	// The database writes check this too, in case a sandbox moves between decision and
	// write.
	for _, u := range all {
		row, err := b.Store.GetSandbox(t.Context(), u)
		if err != nil {
			t.Fatal(err)
		}
		row.HostID = &b.host.ID
		has := &hostagentv1.Sandbox{State: running, ExpiresAt: timestamppb.New(now), CreatedAt: timestamppb.New(now), Idle: durationpb.New(time.Hour)}
		for _, k := range []Kind{Fail, Adopt, Find, Lose, Revive} {
			if err := b.do(t.Context(), Action{Kind: k, ID: u, Row: row, Has: has}); err != nil {
				t.Errorf("%s: %v", k, err)
			}
		}
		if err := b.Store.SandboxesExpire(t.Context(), db.SandboxesExpireParams{HostID: &b.host.ID, Ids: []uuid.UUID{u}, Ats: []time.Time{now}}); err != nil {
			t.Fatal(err)
		}
	}
	check("late actions")
}

// TestReportedTimes checks that times that a host reports are kept within plausible
// bounds.
func TestReportedTimes(t *testing.T) {
	b := newBench(t, time.Minute)
	ancient, distant := timestamppb.New(time.Unix(1, 0)), timestamppb.New(time.Now().AddDate(1000, 0, 0))
	for _, at := range []*timestamppb.Timestamp{ancient, distant} {
		begun := time.Now().Add(-time.Minute)
		ended, slept, started := b.add(sandboxes.Running, none), b.add(sandboxes.Running, paused), b.add(sandboxes.Starting, running)
		b.agent.mu.Lock()
		for _, u := range []uuid.UUID{slept, started} {
			sb := b.agent.has[id.Format(id.Sandbox, u)]
			sb.CreatedAt, sb.PausedAt, sb.ExpiresAt = at, at, at
		}
		b.agent.mu.Unlock()
		if err := b.apply(t.Context(), &hostagentv1.Event{Kind: hostagentv1.Event_KIND_EXITED, SandboxId: id.Format(id.Sandbox, ended), Time: at}); err != nil {
			t.Fatal(err)
		}
		b.look(time.Now())
		b.look(time.Now())
		for what, of := range map[string]func() *time.Time{
			"ended":   func() *time.Time { r, _ := b.Store.GetSandbox(t.Context(), ended); return r.EndedAt },
			"paused":  func() *time.Time { r, _ := b.Store.GetSandbox(t.Context(), slept); return r.PausedAt },
			"started": func() *time.Time { r, _ := b.Store.GetSandbox(t.Context(), started); return r.StartedAt },
		} {
			if got := of(); got == nil || got.Before(begun) || got.After(time.Now().Add(time.Minute)) {
				t.Errorf("a host says %v: %s at %v", at.AsTime(), what, got)
			}
		}
		r, err := b.Store.GetSandbox(t.Context(), started)
		if err != nil || r.ExpiresAt == nil || r.ExpiresAt.Before(begun) || r.ExpiresAt.After(time.Now().Add(2*time.Hour)) {
			t.Errorf("a host says %v: it ends at %v, %v", at.AsTime(), r.ExpiresAt, err)
		}
	}
}

// TestReportedText checks that the database stores only a bounded part of the reason that
// a host reports, for which the team pays.
func TestReportedText(t *testing.T) {
	b := newBench(t, time.Minute)
	u := b.add(sandboxes.Running, none)
	long := strings.Repeat("é", 1<<20)
	if err := b.apply(t.Context(), &hostagentv1.Event{Kind: hostagentv1.Event_KIND_EXITED, SandboxId: id.Format(id.Sandbox, u), Reason: long}); err != nil {
		t.Fatal(err)
	}
	row, err := b.Store.GetSandbox(t.Context(), u)
	if err != nil || row.State != string(sandboxes.Stopped) || row.Error == "" || len(row.Error) > 8<<10 || !strings.HasPrefix(long, row.Error) {
		t.Errorf("the sandbox is %s with an error of %d bytes, %v", row.State, len(row.Error), err)
	}
}

// TestLedgerIsBounded checks that a host cannot have more events in memory than the ledger
// has room for, however long the first one waits.
func TestLedgerIsBounded(t *testing.T) {
	l := newLedger(3)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	for seq := range uint64(3) {
		if err := l.begin(over, seq); err != nil {
			t.Fatalf("event %d: %v", seq, err)
		}
	}
	if _, ok := l.end(1); ok {
		t.Error("an event was acknowledged before an earlier one")
	}
	if err := l.begin(over, 3); err == nil {
		t.Error("there was room for a fourth event")
	}
	if last, ok := l.end(0); !ok || last != 1 {
		t.Errorf("events up to %d are stored, %v", last, ok)
	}
	for seq := range uint64(2) {
		if err := l.begin(over, 3+seq); err != nil {
			t.Errorf("event %d: %v", 3+seq, err)
		}
	}
	if err := l.begin(over, 5); err == nil {
		t.Error("there was room for another event")
	}
}

// TestTemplateComesBack checks that a team's lost template returns unchanged when its
// host has it again, and that another host's report does not bring it back.
func TestTemplateComesBack(t *testing.T) {
	b := newBench(t, time.Minute)
	team, u := uuid.New(), uuid.New()
	if err := b.Store.InsertTeam(t.Context(), db.InsertTeamParams{ID: team, Name: "team"}); err != nil {
		t.Fatal(err)
	}
	b.sql("INSERT INTO templates (id, team_id, name, size_bytes, created_at, version, vcpus) VALUES ($1, $2, 'mine', 7, now(), 3, 2)", u, team)
	b.sql("INSERT INTO template_tags VALUES ($2, 'mine', 'latest', $1)", u, team)
	b.sql("INSERT INTO host_templates VALUES ($1, $2)", b.host.ID, u)
	there := func() bool {
		row, err := b.Templates.Resolve(t.Context(), team, "mine")
		return err == nil && row.ID == u && row.VCPUs == 2
	}
	if !there() {
		t.Fatal("the template does not exist at the start")
	}
	b.look(time.Now())
	if there() {
		t.Fatal("the template exists although its host lost it")
	}
	other, err := b.Hosts.Register(t.Context(), "unix:/nowhere", "token")
	if err != nil {
		t.Fatal(err)
	}
	wire := id.Format(id.Template, u)
	again := &hostagentv1.Template{TemplateId: wire, TeamId: id.Format(id.Team, uuid.New()), Name: "another", SizeBytes: 7, CreatedAt: timestamppb.Now()}
	if err := b.Templates.Learn(t.Context(), other.ID, again); err != nil || there() {
		t.Errorf("another host's report: %v, and it exists: %v", err, there())
	}
	// The team has since created another one of the same name and version.
	b.sql("INSERT INTO templates (id, team_id, name, size_bytes, created_at, version) VALUES ($1, $2, 'mine', 7, now(), 3)", uuid.New(), team)
	b.agent.mu.Lock()
	b.agent.templates[wire] = again
	b.agent.mu.Unlock()
	b.look(time.Now())
	if row, err := b.Templates.Resolve(t.Context(), team, "mine"); err != nil || !there() || row.Version != 4 {
		t.Errorf("the template came back as %+v, %v", row, err)
	}
	if row, err := b.Templates.Resolve(t.Context(), team, "another"); err == nil {
		t.Errorf("the host renamed it: %+v", row)
	}
}

// TestMadeElsewhere checks that a host can neither report the creation of a template that
// another host creates, nor the size of one that another host has.
func TestMadeElsewhere(t *testing.T) {
	b := newBench(t, time.Minute)
	owner, err := b.Hosts.Register(t.Context(), "unix:/nowhere", "token")
	if err != nil {
		t.Fatal(err)
	}
	pending, ready := uuid.New(), uuid.New()
	for u, state := range map[uuid.UUID]templates.State{pending: templates.Pending, ready: templates.Ready} {
		b.sql("INSERT INTO templates (id, team_id, name, size_bytes, created_at, state) VALUES ($1, $2, $3, 7, now(), $4)", u, uuid.Nil, string(state), string(state))
		b.sql("INSERT INTO host_templates VALUES ($1, $2)", owner.ID, u)
		wire := id.Format(id.Template, u)
		b.agent.templates[wire] = &hostagentv1.Template{TemplateId: wire, TeamId: id.Format(id.Team, uuid.Nil), Name: "mine", SizeBytes: 1 << 40}
	}
	row, err := b.Store.GetTemplate(t.Context(), pending)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Templates.Made(t.Context(), b.host.ID, row, b.agent.templates[id.Format(id.Template, pending)]); err != nil {
		t.Errorf("made: %v", err)
	}
	b.look(time.Now())
	for u, state := range map[uuid.UUID]templates.State{pending: templates.Pending, ready: templates.Ready} {
		row, err := b.Store.GetTemplate(t.Context(), u)
		on, _ := b.Store.ListTemplateHosts(t.Context(), u)
		if err != nil || row.State != string(state) || row.SizeBytes != 7 || row.Name != string(state) || len(on) != 1 {
			t.Errorf("another host's report changed it to %+v on %v, %v", row, on, err)
		}
	}
}

// TestBuiltinDisk checks that no host decides the disk size of the built-in template,
// which is the least that every sandbox of it gets.
func TestBuiltinDisk(t *testing.T) {
	b := newBench(t, time.Minute)
	wire := id.Format(id.Template, uuid.Nil)
	for _, says := range []int32{0, 1, 1 << 20} {
		b.agent.mu.Lock()
		b.agent.templates[wire] = &hostagentv1.Template{TemplateId: wire, TeamId: id.Format(id.Team, uuid.Nil), Name: "minimal", SizeBytes: 1 << 29, DiskMib: says, CreatedAt: timestamppb.Now()}
		b.agent.mu.Unlock()
		b.look(time.Now())
		if row, err := b.Store.GetTemplate(t.Context(), uuid.Nil); err != nil || row.DiskMiB != hostwire.DefaultDiskMiB || row.SizeBytes != 1<<29 {
			t.Errorf("a host reports %d MiB: %+v, %v", says, row, err)
		}
	}
}
