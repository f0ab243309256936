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

// Kind is what an action does.
type Kind string

// The kinds of actions. Each may be done twice: the second time changes nothing.
const (
	// Leave does nothing: the database and the host agree, or somebody is at work.
	Leave Kind = ""
	// Follow takes the host's word for when a running sandbox ends, and drains it.
	Follow Kind = "follow"

	Fail    Kind = "fail"    // write that the sandbox did not start
	Adopt   Kind = "adopt"   // write that it started, and is as the host has it
	Find    Kind = "find"    // write that it is no longer missing
	Lose    Kind = "lose"    // write that the host lost it
	Revive  Kind = "revive"  // write that it is paused after all
	Settle  Kind = "settle"  // ask the host which state it is in, and write that
	Stop    Kind = "stop"    // destroy it on the host and write that it has ended
	Destroy Kind = "destroy" // destroy it on the host: no row owns it there
	Drain   Kind = "drain"   // pause it, if it is still idle

	Learn   Kind = "learn"   // write that the host has a template that it may have
	Forget  Kind = "forget"  // write that the host no longer has it
	Ready   Kind = "ready"   // write that it was made
	Capture Kind = "capture" // capture it once more
	GiveUp  Kind = "give up" // write that its import failed
	Remove  Kind = "remove"  // remove it from its hosts and the database
)

const (
	// lostAfter is how long a difference must last if its explanation may be on
	// its way: an event of the host's, or another server's call.
	lostAfter = 3 * time.Second
	// strayAfter is how long a host must have a sandbox that no row owns there.
	strayAfter = 30 * time.Second
)

// rule is what a pair of states leads to, once it has lasted for the grace.
type rule struct {
	do    Kind
	grace time.Duration
}

// hostStates is how many states the protocol has. A newer agent may know
// more: those are left alone.
const hostStates = 7

const onHostPaused = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED

// NoRow stands in the table for a sandbox without a row, or one that another
// host has.
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
	sett = rule{do: Settle}
	late = rule{Settle, lostAfter}
)

// table holds, for what the database says of a sandbox (the rows) and what its
// host says (the columns, in the order of the protocol), what to do about it.
var table = map[sandboxes.State][hostStates]rule{
	//                  none  starting running stopping pausing paused resuming
	sandboxes.Pending:  {fail, ____, adop, ____, ____, adop, ____},
	sandboxes.Starting: {fail, ____, adop, ____, ____, adop, ____},
	sandboxes.Running:  {lose, ____, foll, ____, ____, sett, ____},
	sandboxes.Missing:  {lose, ____, find, ____, ____, sett, ____},
	sandboxes.Pausing:  {lose, ____, late, ____, ____, sett, ____},
	sandboxes.Paused:   {lose, ____, late, ____, ____, ____, ____},
	sandboxes.Resuming: {lose, ____, sett, ____, ____, late, ____},
	sandboxes.Stopping: {stop, stop, stop, stop, stop, stop, stop},
	sandboxes.Stopped:  {____, dest, dest, ____, dest, dest, dest},
	sandboxes.Failed:   {____, dest, dest, ____, dest, dest, dest},
	NoRow:              {____, stry, stry, ____, stry, stry, stry},
}

// pair is what the database and the host say of one sandbox.
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

// View is what the server knows of one host's sandboxes at one moment.
type View struct {
	Host uuid.UUID
	// Rows are those of the host's sandboxes that have not ended, and those of
	// every sandbox that the host has.
	Rows map[uuid.UUID]db.Sandbox
	// Has is the host's list, asked for after the host's rows were read.
	Has map[uuid.UUID]*hostagentv1.Sandbox
	// Incomplete says that the host may have more than its list: the sandboxes in
	// Unread, or any if that is empty. For these, a missing entry does not mean that
	// they have ended.
	Incomplete bool
	Unread     map[uuid.UUID]bool
	// Busy are the sandboxes that this server, or another living one, works on.
	Busy map[uuid.UUID]bool
	// Draining says that the host pauses what was idle for longer than DrainIdle.
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

// Seen holds the differences that have not lasted long enough, or whose action
// has not been done yet, and since when there were.
type Seen map[uuid.UUID]sighting

type sighting struct {
	pair  pair
	since time.Time
}

// Action is one thing to do about one sandbox or template.
type Action struct {
	Kind Kind
	ID   uuid.UUID
	// Row is the sandbox's; zero if there is none.
	Row db.Sandbox
	// Has is what the host says of the sandbox; nil if it does not have it.
	Has *hostagentv1.Sandbox
	// Template and HasTemplate are the same of a template.
	Template    db.Template
	HasTemplate *hostagentv1.Template
}

// Plan is what a view of a host leads to.
type Plan struct {
	// Actions has at most one for each sandbox, in the order of their ids.
	Actions []Action
	// Expire are the sandboxes whose end the host has moved.
	Expire db.SandboxesExpireParams
	// Conditions are the sandboxes whose condition differs from their row's.
	Conditions db.SandboxesConditionParams
	// Seen is for the next call.
	Seen Seen
	// Again is when the next grace is over; 0: there is none.
	Again time.Duration
}

// Sandboxes decides what to do about the sandboxes of a host. It only reads its
// arguments: seen is what the call before returned, now the time of the view.
func Sandboxes(v View, seen Seen, now time.Time) Plan {
	p := Plan{Expire: db.SandboxesExpireParams{HostID: &v.Host}, Conditions: db.SandboxesConditionParams{HostID: &v.Host}, Seen: make(Seen)}
	for _, sandbox := range ids(v.Rows, v.Has) {
		if v.Busy[sandbox] {
			continue
		}
		is := v.pair(sandbox)
		r, row, has := is.rule(), v.Rows[sandbox], v.Has[sandbox]
		if is == (pair{sandboxes.Stopped, onHostPaused}) && sandboxes.Unasked(row) {
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

// TemplateView is what the server knows of one host's templates at one moment.
type TemplateView struct {
	// Rows are the templates that the host has, is to have, or is to be rid of.
	Rows map[uuid.UUID]db.Template
	// Has is the host's list, asked for after the rows were read.
	Has map[uuid.UUID]*hostagentv1.Template
	// Busy are the templates that this server, or another living one, works on.
	Busy map[uuid.UUID]bool
}

// Templates decides what to do about the templates of a host. Like [Sandboxes],
// it only reads its arguments.
func Templates(v TemplateView) []Action {
	var actions []Action
	for _, template := range ids(v.Rows, v.Has) {
		row, known := v.Rows[template]
		t, there := v.Has[template]
		do := Leave
		switch state := templates.State(row.State); {
		case !known:
			do = Learn // The database may know that the host had lost it.
		case state == templates.Ready && !there:
			do = Forget
		case state == templates.Ready:
			if !templates.Same(row, t) {
				do = Learn
			}
		case v.Busy[template], state == templates.Pending && row.BuildID != nil:
			// Whoever works on the build sees to it, or who takes their place.
		case state == templates.Pending && there:
			do = Ready
		case state == templates.Pending && row.CapturedFrom != nil:
			do = Capture
		case state == templates.Pending:
			// What an import was made from is not written down.
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

// ids returns the keys of both maps in order.
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
