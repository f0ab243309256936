// Package guest is the agent's client for the daemon in a virtual machine.
package guest

import "strings"

// The guest's network, the same in every slot.
const (
	Address = "169.254.0.21/30"
	Gateway = "169.254.0.22"
	MAC     = "02:57:52:4e:00:01"
)

// modules is the guest's device with the kernel's modules.
const modules = "/dev/vdb"

// Cmdline returns the kernel command line of a guest with the given host name. Parameters
// with the prefix "wrenn." are for wrenn-init.
func Cmdline(hostname string) string {
	return strings.Join([]string{
		"console=ttyS0", "loglevel=4", "reboot=t", "panic=-1",
		// Skip the kernel's checks of clock and interrupt controller, which take seconds
		// under emulation.
		"tsc=reliable", "no_timer_check", "noreplace-smp",
		"random.trust_cpu=on",
		// Do not write unused inode tables.
		"root=/dev/vda", "rw", "rootflags=noinit_itable",
		"wrenn.modules=" + modules,
		"wrenn.ip=" + Address, "wrenn.gw=" + Gateway, "wrenn.dns=" + Gateway, "wrenn.ntp=" + Gateway,
		"wrenn.hostname=" + hostname,
	}, " ")
}
