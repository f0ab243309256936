// Package vmm says what a virtual machine monitor does for a sandbox; its
// subfolders do it.
package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
)

// ErrGone is returned by Attach for a virtual machine that has ended.
var ErrGone = errors.New("the virtual machine is gone")

// GuestEnd is the error of [VM.Err] for a machine that its guest ended.
type GuestEnd struct {
	// Off says that the guest shut down. Otherwise it restarted, as its kernel also
	// does after a panic; machines do not run on after that.
	Off bool
	// Reason is the monitor's word.
	Reason string
}

func (e *GuestEnd) Error() string { return fmt.Sprintf("the guest shut down (%s)", e.Reason) }

// Spec is one virtual machine to start.
type Spec struct {
	ID  uuid.UUID
	Dir string // the sandbox's folder; the driver keeps its socket there

	Kernel, Initrd, Cmdline string

	VCPUs     int
	MemoryMiB int
	// Nested lets the guest of a machine that boots run virtual machines of its own,
	// if the host's processor can. A restored machine is as it was saved.
	Nested bool

	// The guest's disk is Base, a raw image, below layers in the driver's format.
	// Only the highest layer, Overlay, is writable.
	Overlay string   // empty: no disk
	Layers  []string // between the two, the lowest first
	Base    string
	// Modules is a file system that the guest has as a second disk, for reading; empty:
	// none. All machines that have the same share what the host's page cache holds of it.
	Modules string
	// DiskBytes is the disk's size. It bounds how large the overlay's file can
	// become, and must be set if there is an overlay.
	DiskBytes int64

	Rates rates.Rates // the driver applies those of the disk

	NetNS string   // path of the network namespace to run in; empty: the agent's
	Tap   *os.File // the guest's network card; nil: none. Stays the caller's.
	MAC   string

	UID int // user and group to run as; owns the overlay
}

// Saved is what a virtual machine goes on from.
type Saved struct {
	// Memory is the memory as it was at first: a sealed file, mapped by every
	// machine that goes on from it and written to by none. Stays the caller's.
	Memory *os.File
	// Changed is laid over it; nil: nothing.
	Changed memory.Pages
	// Devices is what [VM.Devices] gave.
	Devices []byte
	// Kind is the saved machine's, from its [State] or its [Driver]; empty: the
	// present driver's.
	Kind string
}

// The accelerators.
const (
	KVM = "kvm"
	TCG = "tcg" // emulation
)

// Config configures a driver.
type Config struct {
	// Dir is a folder of the driver's own. Nothing in it must survive a reboot.
	Dir string
	// Kernel and Initrd are what [Monitor.Works] boots. Open does not need them.
	Kernel, Initrd string
	// Unfiltered runs monitors without the driver's own seccomp filter.
	Unfiltered bool
	// Processor is the monitor's name for the guests' processor; empty: the host's
	// own, without what guests do not need.
	Processor string
	Log       *slog.Logger
}

// Monitor opens a driver with one accelerator. Package drivers lists them all.
type Monitor interface {
	// Name and Accelerator are those of the driver.
	Name() string
	Accelerator() string
	// Works returns nil if guests can run on this host, or the reason why not.
	// It may boot a guest to find out. Unless again is set, it may return the
	// answer of an earlier time.
	Works(ctx context.Context, c Config, again bool) error
	// Open opens the driver, whether or not guests can run.
	Open(c Config) (Driver, error)
}

// Driver makes virtual machines.
type Driver interface {
	// Name is the monitor's, for example "qemu".
	Name() string
	// Accelerator is what runs the guest's instructions: [KVM] or [TCG].
	Accelerator() string
	// Start boots a virtual machine. It returns when the guest's processors
	// run; when it fails nothing is left.
	Start(ctx context.Context, s Spec) (VM, error)
	// Restore makes a virtual machine that is held where another was when it
	// was saved: until [VM.Run] nothing of the guest's runs and nothing is
	// written to its disk. When it fails nothing is left. What s says of
	// processors and memory must be as it was for the other, and Restores must
	// have nothing against its kind.
	Restore(ctx context.Context, s Spec, from Saved) (VM, error)
	// Disks is the format of the layers of machines' disks.
	Disks() disk.Format
	// TracksMemory says whether [VM.Pages] of a restored machine leaves out those
	// of [Saved.Changed] that were not written to since.
	TracksMemory() bool
	// Kind names all that a saved machine depends on: monitor and its version,
	// accelerator, and, where the guest sees them, the processor's features. nested
	// is as in [Spec].
	Kind(nested bool) string
	// Nested reports whether the guest of a machine that was saved under a kind can
	// run virtual machines of its own.
	Nested(kind string) bool
	// Restores says why a machine that was saved under a kind cannot be restored
	// under this one. That it is another need be no reason: a newer version reads
	// what an older one has saved.
	Restores(kind string) error
	// Attach takes back a virtual machine, running or held, that outlived the
	// agent which started it. It fails with ErrGone only if the machine has ended or
	// never ran; after another error it can be called again.
	Attach(ctx context.Context, st State) (VM, error)
	// Lives reports whether a process of the machine with the id runs, even if nothing
	// else is known of the machine.
	Lives(id uuid.UUID) (bool, error)
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
	// Hold stops the guest's processors and flushes its disks; once it returns
	// nil neither memory nor disks change until Run.
	Hold(ctx context.Context) error
	// Run lets a held machine go on. That it runs already is no error.
	Run(ctx context.Context) error
	// Devices saves the state of a held machine's processors and devices: some
	// kilobytes.
	Devices(ctx context.Context) ([]byte, error)
	// Pages are the pages of a held machine's memory that may differ from those
	// that it began with: [Saved.Memory] with [Saved.Changed] over it, or zeros
	// when it was booted.
	Pages() memory.Pages
	// Divert makes a held machine write to the new, empty overlay at path from
	// now on, above its present one, which is not written to any more.
	Divert(ctx context.Context, path string) error
	// Grow makes the disk larger. The guest hears of it.
	Grow(ctx context.Context, bytes int64) error
	// Kill ends the machine. When it returns nil the process is gone, and all
	// that the driver made for it.
	Kill(ctx context.Context) error
}

// Confiner is implemented by drivers that bound what a machine's process takes
// of the host in a way that other software on the host could undo.
type Confiner interface {
	// Confine puts the process of a machine that runs back into its bounds, and
	// says whether it was out of them. A process that has ended is no error. Of
	// the spec it needs VCPUs and MemoryMiB.
	Confine(st State, s Spec) (repaired bool, err error)
}

// State identifies a virtual machine across restarts of the agent. It is kept
// as JSON.
type State struct {
	ID        uuid.UUID `json:"id"`
	PID       int       `json:"pid"`
	StartTime uint64    `json:"start_time"` // field 22 of /proc/PID/stat: pids are used again
	BootID    string    `json:"boot_id"`    // the host's boot in which the above holds
	Socket    string    `json:"socket"`     // the monitor's control socket
	// Kind is the driver's when the machine was made: the monitor may have been
	// upgraded since. Empty: not known.
	Kind string `json:"kind,omitempty"`

	// The file that the guest's memory is a private mapping of, and its size
	// in bytes: how the memory is found in the monitor's process.
	MemoryDevice uint64 `json:"memory_device"`
	MemoryInode  uint64 `json:"memory_inode"`
	MemoryBytes  int64  `json:"memory_bytes"`
	// MemoryTracked says that the kernel marks what the machine writes to since
	// it was restored.
	MemoryTracked bool `json:"memory_tracked,omitempty"`
}
