// Package condition names the faults that a sandbox can have beside its state. Agent and
// server share the names; clients see them in a sandbox's condition.
package condition

import "time"

// Kind is the kind of a fault.
type Kind string

const (
	// Unresponsive is the condition of a running sandbox whose guest does not answer.
	Unresponsive Kind = "unresponsive"
	// MemoryLost is the condition of a paused sandbox whose VM ended without being saved.
	// It boots from its disk when it is resumed.
	MemoryLost Kind = "memory_lost"
)

// Reason is the cause of a condition. It is stable between releases.
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

// reasons has the kind and the text of each reason.
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

// Kind returns the kind of condition that r belongs to, or "" if r is not a reason.
func (r Reason) Kind() Kind { return reasons[r].kind }

// Text returns a short description of r.
func (r Reason) Text() string { return reasons[r].text }

// Condition is a fault of one sandbox.
type Condition struct {
	Reason Reason `json:"reason"`
	// Detail is further information, such as the kernel's last line, or empty. It can be
	// text of the guest.
	Detail string    `json:"detail,omitempty"`
	Since  time.Time `json:"since"`
}

// Text describes the condition in a sentence.
func (c Condition) Text() string {
	if c.Detail == "" {
		return c.Reason.Text()
	}
	return c.Reason.Text() + ": " + c.Detail
}
