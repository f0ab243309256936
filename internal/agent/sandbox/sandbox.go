// Package sandbox runs sandboxes. Each sandbox has one goroutine that creates, pauses,
// resumes and removes it. Other goroutines send it orders.
package sandbox

import (
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/id"
)

// The kinds of errors of requests. Errors wrap these and have a text for clients.
var (
	ErrInvalid  = clienterr.New("invalid request")
	ErrNotFound = clienterr.New("not found")
	ErrExists   = clienterr.New("already exists")
	// ErrState is wrapped by [StateError].
	ErrState = clienterr.New("the sandbox is in the wrong state")
	// ErrInUse means that PauseIdle did not pause a sandbox because it is in use.
	ErrInUse     = clienterr.New("the sandbox is in use")
	ErrExhausted = clienterr.New("this host has no room")
	// ErrCaptures means that a sandbox has reached the limit of captures.
	ErrCaptures = clienterr.New("the sandbox has been captured as often as it can be")
	// ErrUnread means that the host cannot tell whether it has a sandbox.
	ErrUnread  = clienterr.New("the host cannot read all of its sandboxes' records now")
	ErrClosing = clienterr.New("the host agent is stopping")
	// ErrStart means that the start of a sandbox failed.
	ErrStart = clienterr.New("the sandbox did not start")
	// ErrGuest means that the start failed because of the guest, not the host.
	ErrGuest = clienterr.New("the sandbox's guest did not start")
	// ErrSlow means that the guest took too long to start, for an unknown reason.
	ErrSlow = clienterr.New("the sandbox's guest did not start in time")
)

// failure is an error of one of the kinds above, with its own text for clients.
type failure struct {
	error // a [clienterr.Error] without the kind
	kind  error
}

func (f *failure) Unwrap() []error { return []error{f.error, f.kind} }

func fail(kind error, format string, args ...any) error {
	return &failure{clienterr.New(format, args...), kind}
}

// failBecause is fail with a cause for the log.
func failBecause(cause, kind error, format string, args ...any) error {
	return &failure{clienterr.Because(cause, format, args...), kind}
}

// State is the state of a sandbox.
type State string

// The states.
const (
	Starting State = "starting"
	Running  State = "running"
	Pausing  State = "pausing"
	Paused   State = "paused"
	Resuming State = "resuming"
	Stopping State = "stopping"

	// waiting is the state of a warm machine.
	waiting State = "waiting"
)

// States returns all states of sandboxes.
func States() []State { return []State{Starting, Running, Pausing, Paused, Resuming, Stopping} }

// StateError means that an operation is not possible in the sandbox's state. It wraps
// [ErrState].
type StateError struct{ State State }

func (e *StateError) Error() string { return fmt.Sprintf("the sandbox is %s", e.State) }
func (e *StateError) Unwrap() error { return ErrState }

// ForClients returns the text, which is for clients.
func (e *StateError) ForClients() string { return e.Error() }

// Spec describes a sandbox to create.
type Spec struct {
	ID       uuid.UUID `json:"id"`
	Team     uuid.UUID `json:"team"`
	Template uuid.UUID `json:"template"`
	// VCPUs and MemoryMiB must equal those of the template if it was captured from a sandbox;
	// 0 means the template's.
	VCPUs     int `json:"vcpus"`
	MemoryMiB int `json:"memory_mib"`
	// DiskMiB is the disk's size (0: the template's).
	DiskMiB int `json:"disk_mib"`
	// Timeout is the idle time after which the agent destroys the sandbox (0: never).
	Timeout time.Duration `json:"timeout"`
	// PauseOnTimeout makes the agent pause it instead.
	PauseOnTimeout bool `json:"pause_on_timeout,omitempty"`
	// Envs is the environment of every process.
	Envs map[string]string `json:"envs,omitempty"`
	// Token is the access token of the guest daemon.
	Token string `json:"token"`
}

// The bounds of a Spec on any host.
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
			return fail(ErrInvalid, "the template was captured from a sandbox with %d vcpus and %d MiB of memory, and needs the same", t.VCPUs, t.MemoryMiB)
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
		return fail(ErrInvalid, "an access token is required")
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
	// ExpiresAt is the time at which the agent destroys or pauses the sandbox unless it is
	// used before. It is zero without a timeout and while the sandbox is paused.
	ExpiresAt      time.Time
	PauseOnTimeout bool
	// PausedAt is the time of the last pause. It is zero if the sandbox is not paused or the
	// time is unknown.
	PausedAt time.Time
	// Condition says what is wrong with it (nil: nothing).
	Condition *condition.Condition
	// InFlight is the number of requests in flight.
	InFlight int
	// Idle is the time since the last use, or 0 while it is in use.
	Idle time.Duration
	// Steps are the steps of its last operation so far.
	Steps []Step
}

// metadata returns the document at the guest's metadata address.
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
