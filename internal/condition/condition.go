// Package condition names what can be wrong with a sandbox beside its state. Agent
// and server share the names; clients see them in a sandbox's condition.
package condition

import "time"

// Kind is what is wrong.
type Kind string

const (
	// Unresponsive is the condition of a running sandbox whose guest does not answer.
	Unresponsive Kind = "unresponsive"
	// MemoryLost is the condition of a paused sandbox whose virtual machine ended
	// without being saved. It starts from its disk when it is resumed.
	MemoryLost Kind = "memory_lost"
)

// Reason is why, as a word that stays the same between releases.
type Reason string

// The reasons.
const (
	OOM       Reason = "oom"
	Crashed   Reason = "crashed"
	Restarted Reason = "restarted"
	Killed    Reason = "killed"
	Reboot    Reason = "reboot"
	NoAnswer  Reason = "no_answer"
	NoSpace   Reason = "no_space"
)

// reasons has the kind that each reason belongs to, and what it says.
var reasons = map[Reason]struct {
	kind Kind
	text string
}{
	OOM:       {MemoryLost, "the guest ran out of memory"},
	Crashed:   {MemoryLost, "the guest crashed"},
	Restarted: {MemoryLost, "the guest restarted itself"},
	Killed:    {MemoryLost, "its virtual machine was killed"},
	Reboot:    {MemoryLost, "it did not start again when it was rebooted"},
	NoAnswer:  {Unresponsive, "its guest daemon does not answer"},
	NoSpace:   {Unresponsive, "it waits for space on its host's disk"},
}

// Reasons returns every reason of a kind.
func Reasons(k Kind) []Reason {
	var all []Reason
	for r, is := range reasons {
		if is.kind == k {
			all = append(all, r)
		}
	}
	return all
}

// Kind returns the kind that r is a reason of; empty: r is none.
func (r Reason) Kind() Kind { return reasons[r].kind }

// Text says in a few words what r means.
func (r Reason) Text() string { return reasons[r].text }

// Condition is what is wrong with one sandbox.
type Condition struct {
	Reason Reason `json:"reason"`
	// Detail is what more is known, such as the kernel's last line; may be empty. It
	// can be the guest's own text.
	Detail string    `json:"detail,omitempty"`
	Since  time.Time `json:"since"`
}

// Text says what is wrong.
func (c Condition) Text() string {
	if c.Detail == "" {
		return c.Reason.Text()
	}
	return c.Reason.Text() + ": " + c.Detail
}
