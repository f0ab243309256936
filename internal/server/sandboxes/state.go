package sandboxes

import (
	"maps"
	"slices"
)

// State is the state of a sandbox.
type State string

// The states of a sandbox.
const (
	Pending  State = "pending"
	Starting State = "starting"
	Running  State = "running"
	// Missing is a sandbox that ran when its host was last reachable.
	Missing  State = "missing"
	Pausing  State = "pausing"
	Paused   State = "paused"
	Resuming State = "resuming"
	Stopping State = "stopping"
	Stopped  State = "stopped"
	Failed   State = "error"
)

// set is a set of states, for use in Go and in SQL.
type set uint8

const (
	// live: the sandbox has not ended.
	live set = 1 << iota
	// starting: the sandbox is being created.
	starting
	// usesHost: the sandbox counts towards memory and CPUs of its host and its team.
	usesHost
	// billed: the time counts as use of the team.
	billed
	// hasImage: the memory is on disk, or being saved or loaded.
	hasImage
	// inTransit: a server works on the sandbox.
	inTransit
)

// sets maps each state to its sets. The database has each set as a function and all
// states as a constraint, and the API document has the states as an enum (TestStates).
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

// is reports whether the state is in a set.
func (s State) is(in set) bool { return sets[s]&in != 0 }

// Ended reports whether only the row of the sandbox is left.
func (s State) Ended() bool { return !s.is(live) }

// ends reports whether the sandbox has ended or is stopping.
func (s State) ends() bool { return s == Stopping || s.Ended() }
