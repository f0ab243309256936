// Package sandbox runs sandboxes: it makes their parts, one after the other,
// and takes them apart again, whatever happens in between. Each sandbox has
// one goroutine that does all of that; others ask it.
package sandbox

import (
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/told"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// What can be wrong with a request. Errors wrap these; their text is meant for
// whoever asked.
var (
	ErrInvalid  = told.New("invalid request")
	ErrNotFound = told.New("not found")
	ErrExists   = told.New("it exists already")
	// ErrState is what a [StateError] is.
	ErrState = told.New("the sandbox is in the wrong state")
	// ErrInUse is why an idle sandbox was not paused.
	ErrInUse     = told.New("the sandbox is in use")
	ErrExhausted = told.New("this host has no room")
	// ErrCaptures is why a sandbox is not captured: it was as often as it can be.
	ErrCaptures = told.New("the sandbox has been captured as often as it can be")
	// ErrUnread is why it is not known whether the host has a sandbox.
	ErrUnread  = told.New("the host cannot read all of its sandboxes' records now")
	ErrClosing = told.New("the host agent is stopping")
	// ErrStart is wrapped by what went wrong while a sandbox was started.
	ErrStart = told.New("the sandbox did not start")
	// ErrGuest is wrapped instead if the sandbox's guest failed, and not the host.
	ErrGuest = told.New("the sandbox's guest did not start")
	// ErrSlow is wrapped instead if its guest took too long and did not say why.
	ErrSlow = told.New("the sandbox's guest did not start in time")
)

// failure is an error of one of the kinds above, with a text of its own for
// whoever asked.
type failure struct {
	error // a [told.Error] without the kind
	kind  error
}

func (f *failure) Unwrap() []error { return []error{f.error, f.kind} }

func fail(kind error, format string, args ...any) error {
	return &failure{told.New(format, args...), kind}
}

// failBecause is fail with a cause, which only the log has.
func failBecause(cause, kind error, format string, args ...any) error {
	return &failure{told.Because(cause, format, args...), kind}
}

// State is where a sandbox is in its life.
type State string

// The states. A sandbox that is gone has none.
const (
	Starting State = "starting"
	Running  State = "running"
	Pausing  State = "pausing"
	Paused   State = "paused"
	Resuming State = "resuming"
	Stopping State = "stopping"

	// waiting is a machine that is ready to become a sandbox.
	waiting State = "waiting"
)

// States are all states that a sandbox can be in.
func States() []State { return []State{Starting, Running, Pausing, Paused, Resuming, Stopping} }

// StateError says that a sandbox is not in the state that something needs. It
// is an [ErrState].
type StateError struct{ State State }

func (e *StateError) Error() string { return fmt.Sprintf("the sandbox is %s", e.State) }
func (e *StateError) Unwrap() error { return ErrState }

// Told returns the text, which is for clients.
func (e *StateError) Told() string { return e.Error() }

// Spec is a sandbox to create.
type Spec struct {
	ID       uuid.UUID `json:"id"`
	Team     uuid.UUID `json:"team"`
	Template uuid.UUID `json:"template"`
	// VCPUs and MemoryMiB may be 0 for a template that was captured from a
	// sandbox, and must be what this one had.
	VCPUs     int `json:"vcpus"`
	MemoryMiB int `json:"memory_mib"`
	// DiskMiB is the disk's size; 0: the template's.
	DiskMiB int `json:"disk_mib"`
	// Timeout is how long the sandbox lives without being used; 0: for ever.
	Timeout time.Duration `json:"timeout"`
	// PauseOnTimeout has it paused then, not destroyed.
	PauseOnTimeout bool `json:"pause_on_timeout,omitempty"`
	// Envs is the environment of every process.
	Envs map[string]string `json:"envs,omitempty"`
	// Token is what a client must show to the guest daemon.
	Token string `json:"token"`
}

// The bounds of a Spec, whatever the host.
const (
	MaxVCPUs     = 32
	MinMemoryMiB = 128
	MaxMemoryMiB = 16384
	MaxDiskMiB   = 1 << 20
	MaxTimeout   = 30 * 24 * time.Hour
)

func (s *Spec) check(t image.Template) error {
	if t.VCPUs > 0 {
		if s.VCPUs == 0 {
			s.VCPUs = t.VCPUs
		}
		if s.MemoryMiB == 0 {
			s.MemoryMiB = t.MemoryMiB
		}
		if s.VCPUs != t.VCPUs || s.MemoryMiB != t.MemoryMiB {
			return fail(ErrInvalid, "the template was captured from a sandbox with %d vcpus and %d MiB of memory, and takes no others", t.VCPUs, t.MemoryMiB)
		}
	}
	if s.DiskMiB == 0 {
		s.DiskMiB = t.DiskMiB
	}
	if s.DiskMiB < t.DiskMiB && s.DiskMiB > 0 {
		return fail(ErrInvalid, "disk_mib is %d, but the template's disk has %d", s.DiskMiB, t.DiskMiB)
	}
	between := func(name string, n, low, high int) error {
		if n < low || n > high {
			return fail(ErrInvalid, "%s is %d, not between %d and %d", name, n, low, high)
		}
		return nil
	}
	if err := between("vcpus", s.VCPUs, 1, MaxVCPUs); err != nil {
		return err
	}
	if err := between("memory_mib", s.MemoryMiB, MinMemoryMiB, MaxMemoryMiB); err != nil {
		return err
	}
	if err := between("disk_mib", s.DiskMiB, 0, MaxDiskMiB); err != nil {
		return err
	}
	if s.Timeout < 0 || s.Timeout > MaxTimeout {
		return fail(ErrInvalid, "the timeout of %v is not between 0 and %v", s.Timeout, MaxTimeout)
	}
	if s.Token == "" {
		return fail(ErrInvalid, "an access token is needed")
	}
	return nil
}

// Step is one step of a sandbox's start, and the time it took.
type Step struct {
	Name string
	Took time.Duration
}

// Info describes a sandbox.
type Info struct {
	ID, Team, Template        uuid.UUID
	State                     State
	VCPUs, MemoryMiB, DiskMiB int
	CreatedAt                 time.Time
	// ExpiresAt is when the sandbox ends, or is paused, unless it is used
	// before; zero: never, or it is paused.
	ExpiresAt      time.Time
	PauseOnTimeout bool
	// PausedAt is since when it is paused; zero: it is not, or that is not known.
	PausedAt time.Time
	// Condition is what is wrong with it; nil: nothing.
	Condition *condition.Condition
	// InFlight is how many requests are under way.
	InFlight int
	// Idle is for how long there was no use; 0: there is one.
	Idle time.Duration
	// Steps are those of its start so far, or of the last thing done with it.
	Steps []Step
}

// metadata is the document that a guest finds at its metadata address.
func (s *Spec) metadata() map[string]any {
	env := s.Envs
	if env == nil {
		env = map[string]string{}
	}
	return map[string]any{
		"sandbox_id":  id.Format(id.Sandbox, s.ID),
		"template_id": id.Format(id.Template, s.Template),
		"env":         env,
	}
}
