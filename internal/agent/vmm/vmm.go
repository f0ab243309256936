// Package vmm defines the interface of virtual machine monitors. Its subfolders implement
// it.
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

// ErrGone means that a virtual machine has ended.
var ErrGone = errors.New("the virtual machine is gone")

// GuestEnd is the error of [VM.Err] for a machine that its guest ended.
type GuestEnd struct {
	// Off says that the guest shut down. Otherwise it restarted, as its kernel also does
	// after a panic, which ends the machine too.
	Off bool
	// Reason is the monitor's name for the reason.
	Reason string
}

func (e *GuestEnd) Error() string { return fmt.Sprintf("the guest shut down (%s)", e.Reason) }

// Spec describes a virtual machine to start or restore.
type Spec struct {
	ID  uuid.UUID
	Dir string // the sandbox's folder; the driver keeps its socket there

	Kernel, Initrd, Cmdline string

	VCPUs     int
	MemoryMiB int
	// Nested lets the guest of a booting machine run virtual machines itself, if the host's
	// processor can. A restored machine stays as it was saved.
	Nested bool

	// The guest's disk is Base, a raw image, below layers in the driver's format.
	// Only the highest layer, Overlay, is writable.
	Overlay string   // empty: no disk
	Layers  []string // between Base and Overlay, lowest first
	Base    string
	// Modules is a file system for the guest's second disk, which is read-only (empty: no
	// such disk). Machines with the same file share the host's page cache.
	Modules string
	// DiskBytes is the disk's size. It bounds the size of the overlay's file, and must be set
	// if there is an overlay.
	DiskBytes int64

	Rates rates.Rates // the driver applies those of the disk

	NetNS string   // path of the network namespace to run in (empty: the agent's)
	Tap   *os.File // the guest's network card (nil: none); the caller keeps it open and closes it
	MAC   string

	UID int // user and group to run as; must own the overlay
}

// Saved is the state from which a virtual machine is restored.
type Saved struct {
	// Memory is a sealed file with the base of the memory, which all machines restored from
	// it map privately. The caller closes it.
	Memory *os.File
	// Changed has the pages that differ from Memory (nil: none).
	Changed memory.Pages
	// Devices is the result of [VM.Devices].
	Devices []byte
	// Kind is the kind of the saved machine, from its [State] or [Driver] (empty: the present
	// driver's).
	Kind string
}

// The accelerators.
const (
	KVM = "kvm"
	TCG = "tcg" // emulation
)

// Config configures a driver.
type Config struct {
	// Dir is a folder for the driver only. Nothing in it needs to survive a reboot.
	Dir string
	// Kernel and Initrd are for [Monitor.Works], which boots them. Open does not need them.
	Kernel, Initrd string
	// Unfiltered turns off the driver's seccomp filter for monitors.
	Unfiltered bool
	// Processor is the monitor's name for the guests' processor (empty: the host's, without
	// features that guests must not have).
	Processor string
	// Balloon lets booting guests return memory that they free to the host. A restored machine
	// stays as it was saved.
	Balloon bool
	Log     *slog.Logger
}

// Monitor opens a driver with one accelerator. Package drivers lists them all.
type Monitor interface {
	// Name and Accelerator are like those of [Driver].
	Name() string
	Accelerator() string
	// Works returns nil if guests can run on this host, or the reason why not. It may boot a
	// guest to find out. Unless again is set, it may return an earlier result.
	Works(ctx context.Context, c Config, again bool) error
	// Open opens the driver, whether or not guests can run.
	Open(c Config) (Driver, error)
}

// Driver starts and restores virtual machines.
type Driver interface {
	// Name returns the name of the monitor, for example "qemu".
	Name() string
	// Accelerator returns what runs the guest's instructions: [KVM] or [TCG].
	Accelerator() string
	// Start boots a virtual machine. It returns when the guest's processors run. After an
	// error, nothing is left.
	Start(ctx context.Context, s Spec) (VM, error)
	// Restore makes a held virtual machine from a saved one. Until [VM.Run], the guest does
	// not run and nobody writes to its disk. s must have the processors and memory of the
	// saved machine, and Restores must accept its kind. After an error, nothing is left.
	Restore(ctx context.Context, s Spec, from Saved) (VM, error)
	// Disks returns the format of the layers of disks.
	Disks() disk.Format
	// TracksMemory reports whether [VM.Pages] of a restored machine leaves out pages of
	// [Saved.Changed] that the guest has not written to since.
	TracksMemory() bool
	// Kind names everything that a saved machine depends on: the monitor and its version,
	// the accelerator, and the features of the processor that the guest sees. nested is as
	// in [Spec].
	Kind(nested bool) string
	// Nested reports whether guests of machines of a kind can run virtual machines
	// themselves.
	Nested(kind string) bool
	// Restores returns nil if the driver can restore a machine of a kind, or the reason why
	// not. The kind need not be the driver's: a newer monitor reads an older one's state.
	Restores(kind string) error
	// Attach adopts a virtual machine, running or held, that outlived its agent. It returns
	// ErrGone only if the machine has ended or never ran. After another error, the caller
	// can try again.
	Attach(ctx context.Context, st State) (VM, error)
	// Lives reports whether a process of the machine with this id runs, even if its State is
	// lost.
	Lives(id uuid.UUID) (bool, error)
	// Reap kills a virtual machine, if it runs, and removes everything that is left of it.
	Reap(ctx context.Context, st State) error
	// Close releases the driver's resources. Virtual machines keep running.
	Close() error
}

// VM is a virtual machine.
type VM interface {
	// State returns what Attach and Reap need.
	State() State
	// PID returns the pid of the monitor.
	PID() int
	// Done returns a channel that is closed when the monitor's process has ended.
	Done() <-chan struct{}
	// Err returns why the machine ended, as far as it is known, after Done is closed.
	Err() error
	// Console returns the end of the output on the guest's serial console, at most 64 KiB.
	Console(ctx context.Context) ([]byte, error)
	// Memory returns the bytes of the host's memory that the machine takes.
	Memory() (int64, error)
	// Hold stops the guest's processors and flushes its disks. After it returns nil, neither
	// memory nor disks change until Run.
	Hold(ctx context.Context) error
	// Run continues a held machine. It does nothing if the machine runs.
	Run(ctx context.Context) error
	// Devices returns the state of a held machine's processors and devices: some kilobytes.
	Devices(ctx context.Context) ([]byte, error)
	// Pages yields the pages of a held machine's memory that may differ from its base:
	// [Saved.Memory] with [Saved.Changed] over it, or zeros if it booted. It leaves out pages
	// that the guest has freed and returned to the host (see [Config]).
	Pages() memory.Pages
	// Divert makes a held machine write to the new, empty overlay at path, above its present
	// one, which nobody writes to afterwards.
	Divert(ctx context.Context, path string) error
	// Grow makes the disk larger, and notifies the guest.
	Grow(ctx context.Context, bytes int64) error
	// Kill ends the machine. After it returns nil, the process is gone, and so is everything
	// that the driver made for it.
	Kill(ctx context.Context) error
}

// Confiner is implemented by drivers that limit a machine's process in a way that other
// software on the host could undo.
type Confiner interface {
	// Confine puts the process of a running machine back into its limits. repaired reports
	// whether that was necessary. It returns nil for a process that has ended. Of the spec,
	// it needs VCPUs and MemoryMiB.
	Confine(st State, s Spec) (repaired bool, err error)
}

// Yielder is implemented by drivers that can change a running machine's share of the
// host's processors.
type Yielder interface {
	// Yield reduces the share of a machine relative to others, while there are too few
	// processors for all, or makes it normal again. Of the spec, it needs VCPUs.
	Yield(st State, s Spec, yield bool) error
}

// State identifies a virtual machine across restarts of the agent, which stores it as
// JSON.
type State struct {
	ID        uuid.UUID `json:"id"`
	PID       int       `json:"pid"`
	StartTime uint64    `json:"start_time"` // field 22 of /proc/PID/stat, because pids are reused
	BootID    string    `json:"boot_id"`    // the host's boot to which PID and StartTime belong
	Socket    string    `json:"socket"`     // the monitor's control socket
	// Kind is the driver's kind when the machine was made, before any upgrade of the monitor
	// (empty: unknown).
	Kind string `json:"kind,omitempty"`

	// The file that the monitor maps privately as the guest's memory, and its size in bytes.
	// They identify the mapping in the monitor's process.
	MemoryDevice uint64 `json:"memory_device"`
	MemoryInode  uint64 `json:"memory_inode"`
	MemoryBytes  int64  `json:"memory_bytes"`
	// MemoryTracked says that the kernel has marked the pages that the machine writes to
	// since its restore.
	MemoryTracked bool `json:"memory_tracked,omitempty"`
}
