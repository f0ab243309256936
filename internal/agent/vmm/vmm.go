// Package vmm says what a virtual machine monitor does for a sandbox; its
// subfolders do it.
package vmm

import (
	"context"
	"errors"
	"os"

	"github.com/google/uuid"
)

// ErrGone is returned by Attach for a virtual machine that has ended.
var ErrGone = errors.New("the virtual machine is gone")

// Spec is one virtual machine to start.
type Spec struct {
	ID  uuid.UUID
	Dir string // the sandbox's folder; the driver keeps its socket there

	Kernel, Initrd, Cmdline string

	VCPUs     int
	MemoryMiB int

	Overlay string // qcow2 image without a backing file of its own
	Base    string // raw image below it, never written to

	NetNS string   // path of the network namespace to run in; empty: the agent's
	Tap   *os.File // the guest's network card; nil: none. Stays the caller's.
	MAC   string

	UID int // user and group to run as; owns the overlay
}

// Driver makes virtual machines.
type Driver interface {
	// Name is the monitor's, for example "qemu".
	Name() string
	// Accelerator is what runs the guest's instructions: "kvm" or "tcg".
	Accelerator() string
	// Start boots a virtual machine. It returns when the guest's processors
	// run; when it fails nothing is left.
	Start(ctx context.Context, s Spec) (VM, error)
	// Attach takes back a virtual machine that outlived the agent which
	// started it, or fails with ErrGone.
	Attach(ctx context.Context, st State) (VM, error)
	// Reap removes all that is left of a virtual machine, running or not.
	Reap(ctx context.Context, st State) error
	// Close gives back what the driver itself holds. Virtual machines go on.
	Close() error
}

// VM is a virtual machine.
type VM interface {
	// State is what Attach and Reap need to know of it.
	State() State
	// PID is the monitor's process.
	PID() int
	// Done is closed when the monitor's process has ended.
	Done() <-chan struct{}
	// Err says why the machine ended, as far as it is known, once Done is closed.
	Err() error
	// Console is the end of what the guest printed on its serial console, 64 KiB at most.
	Console(ctx context.Context) ([]byte, error)
	// Memory is how many bytes of the host's memory the machine takes.
	Memory() (int64, error)
	// Kill ends the machine. When it returns nil the process is gone, and all
	// that the driver made for it.
	Kill(ctx context.Context) error
}

// State identifies a virtual machine across restarts of the agent. It is kept
// as JSON.
type State struct {
	ID        uuid.UUID `json:"id"`
	PID       int       `json:"pid"`
	StartTime uint64    `json:"start_time"` // field 22 of /proc/PID/stat: pids are used again
	BootID    string    `json:"boot_id"`    // the host's boot in which the above holds
	Socket    string    `json:"socket"`     // the monitor's control socket
}
