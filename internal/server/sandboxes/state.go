package sandboxes

import (
	"maps"
	"slices"
)

// State is where a sandbox is in its life.
type State string

// The states of a sandbox.
const (
	Pending  State = "pending"
	Starting State = "starting"
	Running  State = "running"
	// Missing is what ran when its host was last heard of.
	Missing  State = "missing"
	Pausing  State = "pausing"
	Paused   State = "paused"
	Resuming State = "resuming"
	Stopping State = "stopping"
	Stopped  State = "stopped"
	Failed   State = "error"
)

// set is a set of states that are treated alike, in Go or in SQL.
type set uint8

const (
	// live: it has not ended.
	live set = 1 << iota
	// starting: it is being created.
	starting
	// usesHost: it counts for its host's memory and processors, and its team's.
	usesHost
	// billed: its time counts as its team's use.
	billed
	// hasImage: its memory is on disk, or on the way there or back.
	hasImage
	// inTransit: a server works on it.
	inTransit
)

// sets is the table of the states. The database has each set as a function and all
// states as a constraint, and the API document has them as an enum (TestStates).
var sets = map[State]set{
	Pending:  live | starting | usesHost | inTransit,
	Starting: live | starting | usesHost | inTransit,
	Running:  live | usesHost | billed,
	Missing:  live | usesHost | billed,
	Pausing:  live | usesHost | billed | hasImage | inTransit,
	Paused:   live | hasImage,
	Resuming: live | usesHost | hasImage | inTransit,
	Stopping: live | usesHost | inTransit,
	Stopped:  0,
	Failed:   0,
}

// States returns all states of a sandbox, sorted.
func States() []State { return slices.Sorted(maps.Keys(sets)) }

// is says whether the state is in a set.
func (s State) is(in set) bool { return sets[s]&in != 0 }

// Ended says whether nothing of the sandbox is left but its row.
func (s State) Ended() bool { return !s.is(live) }

// ends says whether the sandbox has ended, or is about to.
func (s State) ends() bool { return s == Stopping || s.Ended() }
