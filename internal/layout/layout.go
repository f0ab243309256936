// Package layout makes every path below $WRENN_DIR; no other package joins
// one by hand.
package layout

import (
	"fmt"
	"path/filepath"

	"github.com/google/uuid"
)

// DefaultDir is where Wrenn keeps its data unless $WRENN_DIR or --dir says otherwise.
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

// Sandboxes holds one folder a sandbox.
func (d Dir) Sandboxes() string { return d.join("sandboxes") }

// Sandbox holds the files of one sandbox: its record, its disks, what it began
// with, its saved state and the control socket of its machine. Its name is
// that of the machine, which was ready before it became the sandbox's.
func (d Dir) Sandbox(sandbox uuid.UUID) string { return d.join("sandboxes", sandbox.String()) }

// SandboxID is an empty file whose name says which sandbox the folder is of, in case its
// record cannot be read.
func (d Dir) SandboxID(home, sandbox uuid.UUID) string {
	return d.join("sandboxes", home.String(), SandboxIDPrefix+sandbox.String())
}

// SandboxIDPrefix begins the names of the files of [Dir.SandboxID].
const SandboxIDPrefix = "id-"

// SandboxRecord is what the agent knows of a sandbox, as JSON.
func (d Dir) SandboxRecord(sandbox uuid.UUID) string {
	return d.join("sandboxes", sandbox.String(), "sandbox.json")
}

// SandboxDisk is the n-th layer over what a sandbox began with, in the format of
// that name.
func (d Dir) SandboxDisk(sandbox uuid.UUID, n int, format string) string {
	return d.join("sandboxes", sandbox.String(), fmt.Sprintf("disk-%d.%s", n, format))
}

// SandboxModules are the kernel's modules of a sandbox that booted from its disk. Others
// have those of what they began with.
func (d Dir) SandboxModules(sandbox uuid.UUID) string {
	return d.join("sandboxes", sandbox.String(), Modules)
}

// Modules is the name of the file system with the kernel's modules, in the folders of
// sandboxes and captures. It is a link to the host's own, so it counts for nobody.
const Modules = "modules.ext4"

// SandboxOrigin holds links to the capture that a sandbox began with.
func (d Dir) SandboxOrigin(sandbox uuid.UUID) string {
	return d.join("sandboxes", sandbox.String(), "origin")
}

// SandboxSaved holds what a pause has saved of a sandbox.
func (d Dir) SandboxSaved(sandbox, saved uuid.UUID) string {
	return d.join("sandboxes", sandbox.String(), "state-"+saved.String())
}

// Captures holds the captures of a template, one folder each.
func (d Dir) Captures(team, template uuid.UUID) string {
	return d.join("images", "teams", team.String(), template.String(), "captures")
}

// Unreadable holds what the host agent found and could not read.
func (d Dir) Unreadable() string { return d.join("unreadable") }

// Forks holds captures of sandboxes while they are forked.
func (d Dir) Forks() string { return d.join("forks") }

// Run holds sockets, locks and other state of running processes.
func (d Dir) Run() string { return d.join("run") }

// AgentSocket is where the host agent listens under wrenn up.
func (d Dir) AgentSocket() string { return d.join("run", "agent.sock") }

// AgentLock is locked by the one host agent that runs on the data.
func (d Dir) AgentLock() string { return d.join("run", "agent.lock") }

// VMM holds what the virtual machine monitor's driver keeps while it runs.
func (d Dir) VMM() string { return d.join("run", "vmm") }

// ServerSocket is where the control plane listens under wrenn up.
func (d Dir) ServerSocket() string { return d.join("run", "server.sock") }

// Spool holds uploads that are under way to the control plane of wrenn up.
func (d Dir) Spool() string { return d.join("spool") }

// MetricsSocket is where the server of `wrenn up` serves its metrics.
func (d Dir) MetricsSocket() string { return d.join("run", "metrics.sock") }

// DebugSocket is where a program of `wrenn up` serves its profiles.
func (d Dir) DebugSocket(program string) string { return d.join("run", program+"-debug.sock") }

// Events is the host agent's journal of what it did on its own.
func (d Dir) Events() string { return d.join("events") }

// Postgres holds the private PostgreSQL cluster of wrenn up.
func (d Dir) Postgres() string { return d.join("postgres") }

// Redis holds the private Redis of wrenn up.
func (d Dir) Redis() string { return d.join("redis") }

// Credentials is the file that client commands read the first admin's API key from.
func (d Dir) Credentials() string { return d.join("credentials.json") }

// NetworkBlock remembers which block of network slots the host agent has.
func (d Dir) NetworkBlock() string { return d.join("run", "network-block") }

// Machine holds what all agents of one machine must agree on. It is empty after a
// boot, as the kernel's network state is.
const Machine = "/run/wrenn"

// NetworkBlocks holds a file for each block of network slots that is in use.
func NetworkBlocks() string { return filepath.Join(Machine, "blocks") }

// Forwarding is there if an agent turned IP forwarding on.
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

// Problems lists what is wrong with the host, as the agent that runs says.
func (d Dir) Problems() string { return d.join("run", "problems.json") }

// Logs holds the logs of the programs that wrenn up runs.
func (d Dir) Logs() string { return d.join("logs") }

// Secrets is the file of what an installation of wrenn up made up.
func (d Dir) Secrets() string { return d.join("secrets.json") }

// Enrollment is the file of what a host agent registered with a control plane as.
func (d Dir) Enrollment() string { return d.join("host.json") }
