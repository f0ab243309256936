// Package guest is the agent's side of what runs in a virtual machine.
package guest

import "strings"

// The guest's network, the same in every slot.
const (
	Address = "169.254.0.21/30"
	Gateway = "169.254.0.22"
	MAC     = "02:57:52:4e:00:01"
)

// modules is the guest's name for the disk with the kernel's modules.
const modules = "/dev/vdb"

// Cmdline is the kernel command line of a guest with the given host name.
// What begins with "wrenn." is read by wrenn-init.
func Cmdline(hostname string) string {
	return strings.Join([]string{
		"console=ttyS0", "loglevel=4", "reboot=t", "panic=-1",
		// The clock and the interrupt controller of a microVM are known to be
		// right; finding that out takes seconds under emulation.
		"tsc=reliable", "no_timer_check", "noreplace-smp",
		"random.trust_cpu=on",
		// Tables of inodes that were never used need not be written to.
		"root=/dev/vda", "rw", "rootflags=noinit_itable",
		"wrenn.modules=" + modules,
		"wrenn.ip=" + Address, "wrenn.gw=" + Gateway, "wrenn.dns=" + Gateway, "wrenn.ntp=" + Gateway,
		"wrenn.hostname=" + hostname,
	}, " ")
}
