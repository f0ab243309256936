package reconcile

import (
	"bytes"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// Kind is the kind of an action.
type Kind string

// The kinds of actions. All are idempotent.
const (
	// Leave does nothing: the database and the host agree, or somebody works on the
	// sandbox.
	Leave Kind = ""
	// Follow copies a running sandbox's expiry and condition from the host, and drains
	// the sandbox if its host drains.
	Follow Kind = "follow"

	Fail    Kind = "fail"    // mark it failed: it did not start
	Adopt   Kind = "adopt"   // mark it started, with the host's state
	Find    Kind = "find"    // mark it no longer missing
	Lose    Kind = "lose"    // mark it lost by the host
	Revive  Kind = "revive"  // mark it paused after all
	Refresh Kind = "refresh" // ask the host for its state and store that
	Stop    Kind = "stop"    // destroy it on the host and mark it stopped
	Destroy Kind = "destroy" // destroy it on the host, where no row owns it
	Drain   Kind = "drain"   // pause it, if it is still idle

	Learn   Kind = "learn"   // record that the host has the template
	Forget  Kind = "forget"  // record that the host no longer has it
	Ready   Kind = "ready"   // mark it ready
	Capture Kind = "capture" // capture it again
	GiveUp  Kind = "give up" // mark its import failed
	Remove  Kind = "remove"  // remove it from its hosts and the database
)

const (
	// lostAfter is how long a difference must last if an event of the host or another
	// server's call may still explain it.
	lostAfter = 3 * time.Second
	// strayAfter is how long a host must have an orphan before it is destroyed.
	strayAfter = 30 * time.Second
)

// rule is the action for a pair of states that has lasted for the grace period.
type rule struct {
	do    Kind
	grace time.Duration
}

// hostStates is the number of states in the protocol. Unknown states of a newer agent are
// left alone.
const hostStates = 7

const onHostPaused = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED

// NoRow is the state of a sandbox without a row, or with one that belongs to another
// host.
const NoRow sandboxes.State = "(no row)"

// The table's cells.
var (
	____ = rule{}
	foll = rule{do: Follow}
	adop = rule{do: Adopt}
	find = rule{do: Find}
	stop = rule{do: Stop}
	dest = rule{do: Destroy}
	stry = rule{Destroy, strayAfter}
	fail = rule{Fail, lostAfter}
	lose = rule{Lose, lostAfter}
	rfsh = rule{do: Refresh}
	late = rule{Refresh, lostAfter}
)

// table maps a sandbox's state in the database (rows) and on its host (columns, in the
// protocol's order) to a rule.
var table = map[sandboxes.State][hostStates]rule{
	//                  none  starting running stopping pausing paused resuming
	sandboxes.Pending:  {fail, ____, adop, ____, ____, adop, ____},
	sandboxes.Starting: {fail, ____, adop, ____, ____, adop, ____},
	sandboxes.Running:  {lose, ____, foll, ____, ____, rfsh, ____},
	sandboxes.Missing:  {lose, ____, find, ____, ____, rfsh, ____},
	sandboxes.Pausing:  {lose, ____, late, ____, ____, rfsh, ____},
	sandboxes.Paused:   {lose, ____, late, ____, ____, ____, ____},
	sandboxes.Resuming: {lose, ____, rfsh, ____, ____, late, ____},
	sandboxes.Stopping: {stop, stop, stop, stop, stop, stop, stop},
	sandboxes.Stopped:  {____, dest, dest, ____, dest, dest, dest},
	sandboxes.Failed:   {____, dest, dest, ____, dest, dest, dest},
	NoRow:              {____, stry, stry, ____, stry, stry, stry},
}

// pair is a sandbox's state in the database and on the host.
type pair struct {
	row  sandboxes.State
	host hostagentv1.SandboxState
}

func (p pair) rule() rule {
	if p.host < 0 || p.host >= hostStates {
		return ____
	}
	return table[p.row][p.host]
}

// View is a snapshot of one host's sandboxes in the database and on the host.
type View struct {
	Host uuid.UUID
	// Rows has the host's sandboxes that have not ended and every sandbox in Has.
	Rows map[uuid.UUID]db.Sandbox
	// Has is the host's list, read after the host's rows.
	Has map[uuid.UUID]*hostagentv1.Sandbox
	// Incomplete reports that the host may have more sandboxes than it lists: those in
	// Unread, or any if that is empty. Their absence from the list does not mean that
	// they have ended.
	Incomplete bool
	Unread     map[uuid.UUID]bool
	// Busy has the sandboxes that this or another live server works on.
	Busy map[uuid.UUID]bool
	// Draining reports that sandboxes which were idle for longer than DrainIdle must be
	// paused.
	Draining  bool
	DrainIdle time.Duration
}

func (v View) pair(sandbox uuid.UUID) pair {
	p := pair{NoRow, v.Has[sandbox].GetState()}
	if row, ok := v.Rows[sandbox]; ok && row.HostID != nil && *row.HostID == v.Host {
		p.row = sandboxes.State(row.State)
	}
	return p
}

// mayHave reports whether the host may have a sandbox that it does not list.
func (v View) mayHave(sandbox uuid.UUID) bool {
	return v.Incomplete && (len(v.Unread) == 0 || v.Unread[sandbox])
}

// Seen maps objects to differences that have not outlasted their grace period, or whose
// action has not completed.
type Seen map[uuid.UUID]sighting

type sighting struct {
	pair  pair
	since time.Time
}

// Action is one step to reconcile one sandbox or template.
type Action struct {
	Kind Kind
	ID   uuid.UUID
	// Row is the sandbox's row; zero if there is none.
	Row db.Sandbox
	// Has is the sandbox on the host; nil if the host does not have it.
	Has *hostagentv1.Sandbox
	// Template and HasTemplate are the same for a template.
	Template    db.Template
	HasTemplate *hostagentv1.Template
}

// Plan is the result of comparing a [View].
type Plan struct {
	// Actions has at most one action per sandbox, sorted by id.
	Actions []Action
	// Expire has the sandboxes whose expiry differs on the host.
	Expire db.SandboxesExpireParams
	// Conditions has the sandboxes whose condition differs on the host.
	Conditions db.SandboxesConditionParams
	// Seen is the argument for the next call.
	Seen Seen
	// Again is how long until the next grace period ends; 0: none runs.
	Again time.Duration
}

// Sandboxes decides how to reconcile the sandboxes of a host. It only reads its
// arguments. seen is the previous call's Plan.Seen, now the time of the view.
func Sandboxes(v View, seen Seen, now time.Time) Plan {
	p := Plan{Expire: db.SandboxesExpireParams{HostID: &v.Host}, Conditions: db.SandboxesConditionParams{HostID: &v.Host}, Seen: make(Seen)}
	for _, sandbox := range ids(v.Rows, v.Has) {
		if v.Busy[sandbox] {
			continue
		}
		is := v.pair(sandbox)
		r, row, has := is.rule(), v.Rows[sandbox], v.Has[sandbox]
		if is == (pair{sandboxes.Stopped, onHostPaused}) && sandboxes.MayRevive(row) {
			r = rule{Revive, lostAfter}
		}
		if v.mayHave(sandbox) && has == nil && r.do != Stop {
			continue
		}
		switch r.do {
		case Leave:
			continue
		case Follow:
			if ends := sandboxes.Expiry(row, has, now); ends != nil && (row.ExpiresAt == nil || !row.ExpiresAt.Equal(*ends)) {
				p.Expire.Ids, p.Expire.Ats = append(p.Expire.Ids, sandbox), append(p.Expire.Ats, *ends)
			}
			if c, news := sandboxes.Silence(row, has); news {
				p.Conditions.Ids, p.Conditions.Reasons = append(p.Conditions.Ids, sandbox), append(p.Conditions.Reasons, string(c.Reason))
				p.Conditions.Details, p.Conditions.Sinces = append(p.Conditions.Details, c.Detail), append(p.Conditions.Sinces, c.Since)
			}
			if !v.Draining || has.GetIdle().AsDuration() <= v.DrainIdle {
				continue
			}
			r.do = Drain
		default:
		}
		if r.grace > 0 {
			s, ok := seen[sandbox]
			if !ok || s.pair != is {
				s = sighting{is, now}
			}
			p.Seen[sandbox] = s
			if rest := r.grace - now.Sub(s.since); rest > 0 {
				if p.Again == 0 || rest < p.Again {
					p.Again = rest
				}
				continue
			}
		}
		p.Actions = append(p.Actions, Action{Kind: r.do, ID: sandbox, Row: row, Has: has})
	}
	return p
}

// TemplateView is a snapshot of one host's templates in the database and on the host.
type TemplateView struct {
	// Rows has the templates that the host has, is creating, or must remove.
	Rows map[uuid.UUID]db.Template
	// Has is the host's list, read after the rows.
	Has map[uuid.UUID]*hostagentv1.Template
	// Busy has the templates that this or another live server works on.
	Busy map[uuid.UUID]bool
}

// Templates decides how to reconcile the templates of a host. It only reads its
// arguments.
func Templates(v TemplateView) []Action {
	var actions []Action
	for _, template := range ids(v.Rows, v.Has) {
		row, known := v.Rows[template]
		t, there := v.Has[template]
		do := Leave
		switch state := templates.State(row.State); {
		case !known:
			do = Learn // The database may say that the host has lost it.
		case state == templates.Ready && !there:
			do = Forget
		case state == templates.Ready:
			if !templates.Same(row, t) {
				do = Learn
			}
		case v.Busy[template], state == templates.Pending && row.BuildID != nil:
			// The server that works on the build handles it.
		case state == templates.Pending && there:
			do = Ready
		case state == templates.Pending && row.CapturedFrom != nil:
			do = Capture
		case state == templates.Pending:
			// The database does not store an import's source.
			do = GiveUp
		case state == templates.Deleting:
			do = Remove
		}
		if do != Leave {
			actions = append(actions, Action{Kind: do, ID: template, Template: row, HasTemplate: t})
		}
	}
	return actions
}

// ids returns the keys of both maps, sorted.
func ids[A, B any](a map[uuid.UUID]A, b map[uuid.UUID]B) []uuid.UUID {
	all := slices.Collect(maps.Keys(a))
	for u := range b {
		if _, ok := a[u]; !ok {
			all = append(all, u)
		}
	}
	slices.SortFunc(all, func(x, y uuid.UUID) int { return bytes.Compare(x[:], y[:]) })
	return all
}
