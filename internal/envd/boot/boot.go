// Package boot boots a guest: as the init of the initrd up to the root file system, and
// as wrenn-init from there to the guest daemon.
//
// Both are names of the daemon's own binary, so that a guest needs no shell, no network
// tools and no other program to start.
package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Main boots the guest and does not return, if this program was started as the first
// program of an initrd ("init") or of a root file system ("wrenn-init"). Under any other
// name it returns at once.
func Main() {
	var step func() error
	switch filepath.Base(os.Args[0]) {
	case "init":
		step = switchRoot
	case "wrenn-init":
		step = bringUp
	default:
		return
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "wrenn-init: must be the first process of a guest")
		os.Exit(2)
	}
	err := step()
	// A guest that cannot boot must end, so that the agent notices at once. The console has
	// the reason.
	say("cannot start: %v", err)
	time.Sleep(100 * time.Millisecond) // flushes the console
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	os.Exit(1)
}

// say writes to the console.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "wrenn-init: "+format+"\n", args...)
}

// options returns the words of a kernel command line that have a "=".
func options(cmdline string) map[string]string {
	o := map[string]string{}
	for word := range strings.FieldsSeq(cmdline) {
		if k, v, ok := strings.Cut(word, "="); ok {
			o[k] = v
		}
	}
	return o
}

// kernelOptions returns the options of the running kernel. /proc must be mounted.
func kernelOptions() (map[string]string, error) {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, fmt.Errorf("read kernel command line: %w", err)
	}
	return options(string(b)), nil
}

// mount is one file system to mount.
type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func (m mount) do() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return fmt.Errorf("create mount point: %w", err)
	}
	if err := syscall.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", m.fstype, m.target, err)
	}
	return nil
}
