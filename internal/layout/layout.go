// Package layout builds every path below $WRENN_DIR. No other package joins such paths.
package layout

import (
	"fmt"
	"path/filepath"

	"github.com/google/uuid"
)

// DefaultDir is the default of $WRENN_DIR and --dir.
const DefaultDir = "/var/lib/wrenn"

// Dir is the root of one installation's data.
type Dir string

func (d Dir) join(parts ...string) string {
	return filepath.Join(append([]string{string(d)}, parts...)...)
}

// Kernels holds extracted kernels and built initrds.
func (d Dir) Kernels() string { return d.join("kernels") }

// Images holds every template's files.
func (d Dir) Images() string { return d.join("images", "teams") }

// Template holds one template's files; the all-zeros team and template are
// the platform team and the built-in minimal template.
func (d Dir) Template(team, template uuid.UUID) string {
	return d.join("images", "teams", team.String(), template.String())
}

// Sandboxes holds one folder per sandbox.
func (d Dir) Sandboxes() string { return d.join("sandboxes") }

// Sandbox holds the files of one sandbox: its record, its disks, its origin, its saved
// state and the control socket of its VM. Its name is the UUID of the VM, which is not
// the sandbox's if the VM was a warm machine.
func (d Dir) Sandbox(sandbox uuid.UUID) string { return d.join("sandboxes", sandbox.String()) }

// SandboxID is an empty file whose name tells to which sandbox the folder belongs, in
// case its record cannot be read.
func (d Dir) SandboxID(home, sandbox uuid.UUID) string {
	return d.join("sandboxes", home.String(), SandboxIDPrefix+sandbox.String())
}

// SandboxIDPrefix is the prefix of the names that [Dir.SandboxID] returns.
const SandboxIDPrefix = "id-"

// SandboxRecord is the agent's record of a sandbox, in JSON.
func (d Dir) SandboxRecord(sandbox uuid.UUID) string {
	return d.join("sandboxes", sandbox.String(), "sandbox.json")
}

// SandboxDisk is the n-th disk layer above the origin of a sandbox. format is the name of
// its format, such as qcow2.
func (d Dir) SandboxDisk(sandbox uuid.UUID, n int, format string) string {
	return d.join("sandboxes", sandbox.String(), fmt.Sprintf("disk-%d.%s", n, format))
}

// SandboxModules is the file system with the kernel's modules of a sandbox that booted
// from its disk. Other sandboxes use the one in their origin.
func (d Dir) SandboxModules(sandbox uuid.UUID) string {
	return d.join("sandboxes", sandbox.String(), Modules)
}

// Modules is the name of the file system with the kernel's modules in the folders of
// sandboxes and captures. It is a link to the host's file, so it counts for no team.
const Modules = "modules.ext4"

// SandboxOrigin holds links to the files of the capture that a sandbox started from.
func (d Dir) SandboxOrigin(sandbox uuid.UUID) string {
	return d.join("sandboxes", sandbox.String(), "origin")
}

// SandboxSaved holds the memory and the devices that a pause saved.
func (d Dir) SandboxSaved(sandbox, saved uuid.UUID) string {
	return d.join("sandboxes", sandbox.String(), "state-"+saved.String())
}

// Captures holds the captures of a template, one folder each.
func (d Dir) Captures(team, template uuid.UUID) string {
	return d.join("images", "teams", team.String(), template.String(), "captures")
}

// Unreadable holds data that the host agent could not read and set aside.
func (d Dir) Unreadable() string { return d.join("unreadable") }

// Forks holds captures of sandboxes while they are forked.
func (d Dir) Forks() string { return d.join("forks") }

// Run holds sockets, locks and other state of running processes.
func (d Dir) Run() string { return d.join("run") }

// AgentSocket is where the host agent listens under wrenn up.
func (d Dir) AgentSocket() string { return d.join("run", "agent.sock") }

// AgentLock is the file that the host agent locks, so that only one runs on the data.
func (d Dir) AgentLock() string { return d.join("run", "agent.lock") }

// VMM holds the run-time files of the VM driver.
func (d Dir) VMM() string { return d.join("run", "vmm") }

// ServerSocket is where the control plane listens under wrenn up.
func (d Dir) ServerSocket() string { return d.join("run", "server.sock") }

// Spool holds uploads that are under way to the control plane of wrenn up.
func (d Dir) Spool() string { return d.join("spool") }

// MetricsSocket is where the server of `wrenn up` serves its metrics.
func (d Dir) MetricsSocket() string { return d.join("run", "metrics.sock") }

// AgentMetricsSocket is where the agent of `wrenn up` serves its metrics.
func (d Dir) AgentMetricsSocket() string { return d.join("run", "agent-metrics.sock") }

// DebugSocket is where a program of `wrenn up` serves its profiles.
func (d Dir) DebugSocket(program string) string { return d.join("run", program+"-debug.sock") }

// Events is the host agent's journal of events.
func (d Dir) Events() string { return d.join("events") }

// Postgres holds the private PostgreSQL cluster of wrenn up.
func (d Dir) Postgres() string { return d.join("postgres") }

// Redis holds the private Redis of wrenn up.
func (d Dir) Redis() string { return d.join("redis") }

// Credentials is the file that client commands read the first admin's API key from.
func (d Dir) Credentials() string { return d.join("credentials.json") }

// NetworkBlock remembers which block of network slots the host agent has.
func (d Dir) NetworkBlock() string { return d.join("run", "network-block") }

// Machine holds the state that all agents of one machine share. Like the kernel's network
// state, it is empty after a boot.
const Machine = "/run/wrenn"

// NetworkBlocks holds a file for each block of network slots that is in use.
func NetworkBlocks() string { return filepath.Join(Machine, "blocks") }

// Forwarding is a file that exists if an agent turned on IP forwarding.
func Forwarding() string { return filepath.Join(Machine, "ip_forward") }

// Namespaces holds the names of the network namespaces of slots. It is a folder
// of Wrenn's own because ip netns mounts /run/netns over itself, which hides
// what other programs have mounted there.
func Namespaces() string { return filepath.Join(Machine, "netns") }

// Namespace is the name of a slot's network namespace.
func Namespace(slot int) string {
	return filepath.Join(Namespaces(), fmt.Sprintf("wrenn-ns-%d", slot))
}

// OldNamespaces is where earlier versions kept the names.
const OldNamespaces = "/run/netns"

// Problems is the file in which the running agent lists the host's problems.
func (d Dir) Problems() string { return d.join("run", "problems.json") }

// Logs holds the logs of the programs that wrenn up runs.
func (d Dir) Logs() string { return d.join("logs") }

// Secrets is the file with the secrets that `wrenn up` generated.
func (d Dir) Secrets() string { return d.join("secrets.json") }

// Enrollment is the file with the host agent's credentials for the control plane.
func (d Dir) Enrollment() string { return d.join("host.json") }
