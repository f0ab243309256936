package reconcile

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// world is a host and its rows in the database, from which views are made.
type world struct {
	r    *rand.Rand
	host uuid.UUID
	rows map[uuid.UUID]db.Sandbox
	has  map[uuid.UUID]*hostagentv1.Sandbox
	busy map[uuid.UUID]bool
}

// newWorld returns a world of n sandboxes in random pairs of states.
func newWorld(r *rand.Rand, n int) *world {
	w := &world{r: r, host: uuid.New(), rows: make(map[uuid.UUID]db.Sandbox), has: make(map[uuid.UUID]*hostagentv1.Sandbox), busy: make(map[uuid.UUID]bool)}
	states := slices.Sorted(maps.Keys(table))
	other := uuid.New()
	for range n {
		u := uuid.New()
		if state := states[r.IntN(len(states))]; state != NoRow {
			row := db.Sandbox{ID: u, State: string(state), HostID: &w.host}
			if r.IntN(10) == 0 {
				row.HostID = &other
			}
			w.rows[u] = row
		}
		// The extra value is a newer agent's state.
		if on := hostagentv1.SandboxState(r.IntN(hostStates + 1)); on != none {
			w.has[u] = &hostagentv1.Sandbox{State: on, Idle: durationpb.New(time.Duration(r.IntN(60)) * time.Second)}
			if r.IntN(2) == 0 {
				w.has[u].ExpiresAt = timestamppb.New(time.Unix(int64(r.IntN(1000)), 0))
			}
		}
		w.busy[u] = r.IntN(5) == 0
	}
	return w
}

// view returns what a server sees of the world.
func (w *world) view(draining bool) View {
	v := View{Host: w.host, Rows: make(map[uuid.UUID]db.Sandbox), Has: w.has, Busy: w.busy, Draining: draining, DrainIdle: 30 * time.Second}
	for u, row := range w.rows {
		mine := *row.HostID == w.host && !sandboxes.State(row.State).Ended()
		if _, there := w.has[u]; mine || there {
			v.Rows[u] = row
		}
	}
	return v
}

// does changes the world like a successful action.
func (w *world) does(a Action) {
	row := w.rows[a.ID]
	switch a.Kind {
	case Fail:
		row.State = string(sandboxes.Failed)
	case Lose:
		row.State = string(sandboxes.Stopped)
	case Adopt, Find, Refresh:
		row.State = string(sandboxes.Running)
		if w.has[a.ID].GetState() == paused {
			row.State = string(sandboxes.Paused)
		}
	case Drain:
		row.State, w.has[a.ID].State = string(sandboxes.Paused), paused
	case Stop:
		row.State = string(sandboxes.Stopped)
		delete(w.has, a.ID)
	case Destroy:
		delete(w.has, a.ID)
		return
	}
	w.rows[a.ID] = row
}

// agree reports whether nothing is left to do about a sandbox: it runs or is paused as
// its row says, its host works on it, or neither has it.
func (w *world) agree(u uuid.UUID) bool {
	p := w.view(false).pair(u)
	switch {
	case w.busy[u], p.host < 0, p.host >= hostStates:
		return true
	case p.host == none:
		return p.row == NoRow || p.row.Ended()
	case p.host == running:
		return p.row == sandboxes.Running
	case p.host == paused:
		return p.row == sandboxes.Paused
	}
	return p.row != NoRow && !p.row.Ended() && p.row != sandboxes.Stopping || p.host == hostagentv1.SandboxState_SANDBOX_STATE_STOPPING
}

// TestPlan checks the plan's invariants on random worlds.
func TestPlan(t *testing.T) {
	for _, state := range sandboxes.States() {
		if _, ok := table[state]; !ok {
			t.Errorf("the plan does not have the state %q", state)
		}
	}
	for seed := range uint64(200) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			w := newWorld(r, 1+r.IntN(30))
			draining := r.IntN(2) == 0
			now, seen := time.Unix(1000, 0), Seen(nil)
			since := make(map[uuid.UUID]time.Time)
			for range 20 {
				v := w.view(draining)
				before := copied(v)
				p := Sandboxes(v, seen, now)
				if again := Sandboxes(v, maps.Clone(seen), now); !reflect.DeepEqual(p, again) {
					t.Fatal("the second plan differs")
				}
				if !reflect.DeepEqual(copied(v), before) {
					t.Fatal("it changed the view")
				}
				acted := make(map[uuid.UUID]bool)
				for _, a := range p.Actions {
					if acted[a.ID] {
						t.Fatalf("two actions about %s", a.ID)
					}
					acted[a.ID] = true
					check(t, v, a, now, since)
					// An action depends on its own sandbox only.
					alone := only(v, a.ID)
					if q := Sandboxes(alone, seen, now); len(q.Actions) != 1 || q.Actions[0].Kind != a.Kind {
						t.Fatalf("%s of %v depends on other sandboxes: alone it is %v", a.Kind, v.pair(a.ID), q.Actions)
					}
				}
				if p.Again < 0 || p.Again > strayAfter {
					t.Fatalf("next look in %v", p.Again)
				}
				for u := range p.Seen {
					if _, ok := since[u]; !ok {
						since[u] = now
					}
				}
				// Some actions succeed; the others are left for the next plan.
				for _, a := range p.Actions {
					if r.IntN(3) > 0 {
						w.does(a)
						delete(since, a.ID)
					}
				}
				seen, now = p.Seen, now.Add(time.Duration(r.IntN(10_000))*time.Millisecond)
			}
			// When every action succeeds and the grace periods are over, database and
			// host agree.
			for range 5 {
				p := Sandboxes(w.view(draining), seen, now)
				for _, a := range p.Actions {
					w.does(a)
				}
				seen, now = p.Seen, now.Add(strayAfter)
			}
			for _, u := range ids(w.rows, w.has) {
				if !w.agree(u) {
					t.Errorf("%+v is never resolved", w.view(draining).pair(u))
				}
			}
			if p := Sandboxes(w.view(draining), seen, now); len(p.Actions) > 0 {
				t.Errorf("%v is planned although database and host agree", p.Actions)
			}
		})
	}
}

// check checks the invariants of an action. since tells when its difference was first
// seen.
func check(t *testing.T, v View, a Action, now time.Time, since map[uuid.UUID]time.Time) {
	t.Helper()
	row, known := v.Rows[a.ID]
	state := sandboxes.State(row.State)
	mine := known && *row.HostID == v.Host
	has, there := v.Has[a.ID]
	lasted := time.Duration(0)
	if at, ok := since[a.ID]; ok {
		lasted = now.Sub(at)
	}
	switch {
	case v.Busy[a.ID]:
		t.Fatalf("%s of a sandbox that a server works on", a.Kind)
	case a.Kind == Destroy && mine && !state.Ended():
		t.Fatalf("destroys a sandbox whose row says %s", state)
	case a.Kind == Destroy && !mine && lasted < strayAfter:
		t.Fatalf("destroys a stray after %v", lasted)
	case a.Kind == Stop && (!mine || state != sandboxes.Stopping):
		t.Fatalf("stops a sandbox whose row says %s", state)
	case (a.Kind == Lose || a.Kind == Fail) && (there || !mine || lasted < lostAfter):
		t.Fatalf("%s after %v; the host has it: %v", a.Kind, lasted, there)
	case a.Kind == Drain && (!v.Draining || has.GetState() != running || has.GetIdle().AsDuration() <= v.DrainIdle):
		t.Fatalf("drains %v", has)
	case has.GetState() >= hostStates && a.Kind != Leave:
		t.Fatalf("%s of a sandbox in an unknown state", a.Kind)
	case !reflect.DeepEqual(a.Row, row) || a.Has != has:
		t.Fatal("the action is about another object")
	}
}

// copied returns a deep copy of a view.
func copied(v View) View {
	v.Rows, v.Busy, v.Has = maps.Clone(v.Rows), maps.Clone(v.Busy), maps.Clone(v.Has)
	for u, sb := range v.Has {
		v.Has[u] = proto.CloneOf(sb)
	}
	return v
}

// only returns a view of one sandbox.
func only(v View, u uuid.UUID) View {
	is := View{Host: v.Host, Rows: make(map[uuid.UUID]db.Sandbox), Has: make(map[uuid.UUID]*hostagentv1.Sandbox), Draining: v.Draining, DrainIdle: v.DrainIdle}
	if row, ok := v.Rows[u]; ok {
		is.Rows[u] = row
	}
	if sb, ok := v.Has[u]; ok {
		is.Has[u] = sb
	}
	return is
}

// TestPlanIncomplete checks that while a host cannot list everything that it has, nothing
// ends because it is missing from the list.
func TestPlanIncomplete(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 0))
	w := newWorld(r, 300)
	v := w.view(false)
	v.Incomplete = true
	ends := map[Kind]bool{}
	for now, seen := time.Unix(1000, 0), Seen(nil); now.Unix() < 1100; now = now.Add(strayAfter) {
		p := Sandboxes(v, seen, now)
		seen = p.Seen
		for _, a := range p.Actions {
			ends[a.Kind] = true
			if a.Has == nil && a.Kind != Stop {
				t.Errorf("%s of %v", a.Kind, v.pair(a.ID))
			}
		}
	}
	if ends[Lose] || ends[Fail] || !ends[Stop] || !ends[Adopt] || !ends[Destroy] {
		t.Errorf("the actions are %v", ends)
	}
}

// TestPlanUnread checks that exactly the sandboxes that a host cannot read are kept.
func TestPlanUnread(t *testing.T) {
	host, unread, lost := uuid.New(), uuid.New(), uuid.New()
	v := View{Host: host, Incomplete: true, Unread: map[uuid.UUID]bool{unread: true}, Rows: map[uuid.UUID]db.Sandbox{}}
	for _, u := range []uuid.UUID{unread, lost} {
		v.Rows[u] = db.Sandbox{ID: u, HostID: &host, State: string(sandboxes.Running)}
	}
	now := time.Unix(1000, 0)
	p := Sandboxes(v, nil, now)
	p = Sandboxes(v, p.Seen, now.Add(lostAfter))
	if len(p.Actions) != 1 || p.Actions[0].ID != lost || p.Actions[0].Kind != Lose {
		t.Errorf("the actions are %+v", p.Actions)
	}
}

// TestPlanFollows checks that a running sandbox's end follows the host's report, and is
// written only then.
func TestPlanFollows(t *testing.T) {
	host, u := uuid.New(), uuid.New()
	ends := time.Unix(2000, 0).UTC()
	row := db.Sandbox{ID: u, State: string(sandboxes.Running), HostID: &host, TimeoutSeconds: 1200}
	v := View{Host: host, Rows: map[uuid.UUID]db.Sandbox{u: row}, Has: map[uuid.UUID]*hostagentv1.Sandbox{u: {State: running, ExpiresAt: timestamppb.New(ends)}}}
	p := Sandboxes(v, nil, time.Unix(1000, 0))
	if !slices.Equal(p.Expire.Ids, []uuid.UUID{u}) || !p.Expire.Ats[0].Equal(ends) || len(p.Actions) > 0 {
		t.Errorf("it leads to %+v", p)
	}
	row.ExpiresAt = &ends
	v.Rows[u] = row
	if p := Sandboxes(v, nil, time.Unix(1000, 0)); len(p.Expire.Ids) > 0 {
		t.Errorf("what is already recorded is written again: %+v", p.Expire)
	}
}

// TestPlanOfOthers checks the table with another host's reports: only that host's copy is
// ever touched, and not before the longest grace period.
func TestPlanOfOthers(t *testing.T) {
	owner, reporter := uuid.New(), uuid.New()
	for row := range table {
		if row == NoRow {
			continue
		}
		for on := range hostagentv1.SandboxState(hostStates + 1) {
			u := uuid.New()
			has := &hostagentv1.Sandbox{State: on, ExpiresAt: timestamppb.New(time.Unix(1, 0)), Idle: durationpb.New(time.Hour)}
			v := View{
				Host: reporter, Draining: true,
				Rows: map[uuid.UUID]db.Sandbox{u: {ID: u, State: string(row), HostID: &owner, TimeoutSeconds: 60}}, Has: map[uuid.UUID]*hostagentv1.Sandbox{u: has},
			}
			now := time.Unix(1000, 0)
			first := Sandboxes(v, nil, now)
			late := Sandboxes(v, first.Seen, now.Add(strayAfter))
			if len(first.Actions) > 0 || len(first.Expire.Ids)+len(late.Expire.Ids) > 0 {
				t.Errorf("%s and %s: %+v at first sight, then %+v", row, on, first, late)
			}
			for _, a := range late.Actions {
				if a.Kind != Destroy {
					t.Errorf("%s and %s of another host lead to %s", row, on, a.Kind)
				}
			}
		}
	}
}

// TestPlanTemplates checks every pair of a template's row and its presence on the host.
func TestPlanTemplates(t *testing.T) {
	const absent = templates.State("")
	build := uuid.New()
	at := timestamppb.New(time.Unix(1000, 0))
	is := func(state templates.State) db.Template {
		return db.Template{ID: uuid.New(), State: string(state), TeamID: uuid.New(), SizeBytes: 7}
	}
	captured := is(templates.Pending)
	captured.CapturedFrom = &build
	tests := []struct {
		name  string
		row   db.Template
		on    *hostagentv1.Template
		busy  bool
		wants Kind
	}{
		{"unknown", is(absent), &hostagentv1.Template{Name: "a"}, false, Learn},
		{"as it was", is(templates.Ready), &hostagentv1.Template{SizeBytes: 7}, false, Leave},
		{"another name, owner and time", is(templates.Ready), &hostagentv1.Template{Name: "b", TeamId: "x", CreatedAt: at, SizeBytes: 7}, false, Leave},
		{"another size", is(templates.Ready), &hostagentv1.Template{CreatedAt: at, SizeBytes: 8}, false, Learn},
		{"gone", is(templates.Ready), nil, false, Forget},
		{"made", is(templates.Pending), &hostagentv1.Template{}, false, Ready},
		{"not captured", captured, nil, false, Capture},
		{"not imported", is(templates.Pending), nil, false, GiveUp},
		{"being made", is(templates.Pending), nil, true, Leave},
		{"a build's", db.Template{State: string(templates.Pending), BuildID: &build}, nil, false, Leave},
		{"a build's, made", db.Template{State: string(templates.Pending), BuildID: &build}, &hostagentv1.Template{}, false, Leave},
		{"going", is(templates.Deleting), &hostagentv1.Template{}, false, Remove},
		{"going, and gone", is(templates.Deleting), nil, false, Remove},
		{"being removed", is(templates.Deleting), &hostagentv1.Template{}, true, Leave},
	}
	for _, tt := range tests {
		u := uuid.New()
		v := TemplateView{Rows: map[uuid.UUID]db.Template{}, Has: map[uuid.UUID]*hostagentv1.Template{}, Busy: map[uuid.UUID]bool{u: tt.busy}}
		if tt.row.State != "" {
			v.Rows[u] = tt.row
		}
		if tt.on != nil {
			v.Has[u] = tt.on
		}
		got := Leave
		if actions := Templates(v); len(actions) > 0 {
			got = actions[0].Kind
		}
		if got != tt.wants {
			t.Errorf("%s leads to %q, want %q", tt.name, got, tt.wants)
		}
	}
}
