// Package boot brings a guest up: Initrd from the first instruction in user
// space to the root file system, Init from there to the guest daemon.
//
// Both are other names of the daemon's own binary, so that a guest needs no
// shell, no network tools and no second program to start.
package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Main boots and does not return when this program was started as the
// initial program of an initrd ("init") or of a root file system
// ("wrenn-init"); under any other name it returns at once.
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
		fmt.Fprintln(os.Stderr, "wrenn-init: only for the first process of a guest")
		os.Exit(2)
	}
	err := step()
	// A machine that cannot come up must end, so that whoever waits for it is
	// told at once; the kernel's console has the reason.
	say("cannot start: %v", err)
	time.Sleep(100 * time.Millisecond) // lets the console drain
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	os.Exit(1)
}

// say writes to the console.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "wrenn-init: "+format+"\n", args...)
}

// options are the words of a kernel command line that hold a "=".
func options(cmdline string) map[string]string {
	o := map[string]string{}
	for word := range strings.FieldsSeq(cmdline) {
		if k, v, ok := strings.Cut(word, "="); ok {
			o[k] = v
		}
	}
	return o
}

// kernelOptions are those of the running kernel; /proc must be mounted.
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
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := syscall.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s at %s: %w", m.fstype, m.target, err)
	}
	return nil
}
