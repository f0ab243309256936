package qemu

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qmp"
	"github.com/wrenn-dev/wrenn/internal/programs"
)

// model is a version of the machine that guests see: what QEMU's arguments make
// of it, as far as a guest or the state of its devices can notice. A model never
// changes, because saved machines depend on it.
type model struct {
	version  int
	machine  string // options of -machine beside those that all models have
	accel    string
	cpu      string
	repaired bool // see [redeliver]
}

// models are each accelerator's: machines boot as the first; the others restore
// what an earlier release saved.
var models = map[string][]model{
	TCG: {
		{version: 2, accel: fmt.Sprintf("tcg,tb-size=%d", translationMiB), cpu: "max"},
	},
	KVM: {
		// With a split irqchip, microvm's default, a stop can lose the end of a
		// level-triggered interrupt: see [redeliver]. The kernel's I/O APIC cannot.
		// Guests get no nested virtualization and no performance counters.
		{version: 3, machine: ",ioapic2=off", accel: "kvm,kernel-irqchip=on", cpu: "host,svm=off,vmx=off,pmu=off"},
		{version: 2, accel: "kvm", cpu: "host", repaired: true},
	},
}

// model returns the model that a machine of the kind was saved as. An empty kind
// stands for the present one.
func (d *Driver) model(kind string) (model, error) {
	of := models[d.accel]
	if kind == "" {
		return of[0], nil
	}
	saved, ok := parseKind(kind)
	for _, m := range of {
		if ok && m.name() == saved.machine {
			return m, nil
		}
	}
	return model{}, fmt.Errorf("it was saved as %q, a machine that this release does not have", kind)
}

// name is the first part of the model's kind.
func (m model) name() string { return fmt.Sprintf("qemu-%d", m.version) }

// kindAs is the kind of a machine of the model.
func (d *Driver) kindAs(m model) string {
	_, rest, _ := strings.Cut(d.kind, " ")
	return m.name() + " " + rest
}

// commands are those of QEMU's that the driver cannot do without.
var commands = []string{
	"add-fd", "block_resize", "block_set_io_throttle", "blockdev-add", "blockdev-del", "blockdev-snapshot", "cont", "migrate-incoming",
	"migrate-set-capabilities", "query-block", "query-fdsets", "query-status", "quit", "remove-fd", "ringbuf-read",
	"stop", "xen-save-devices-state",
}

type command struct {
	Name string `json:"name"`
}

// Kind implements vmm.Driver.
func (d *Driver) Kind() string { return d.kind }

// kind asks QEMU for its version, and whether it can do all that the driver
// needs: distributions build it with more or less.
func kind(accel string) (_ string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("ask QEMU: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "qmp"), os.NewFile(uintptr(pair[1]), "qmp")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return "", fmt.Errorf("ask QEMU: %w", err)
	}
	defer conn.Close()
	cmd := programs.QEMU.CommandContext(ctx, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S",
		"-global", "migration.send-configuration=off",
		"-chardev", "socket,id=control,fd=3", "-mon", "chardev=control,mode=control")
	cmd.ExtraFiles = []*os.File{theirs}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("ask QEMU: %w", err)
	}
	theirs.Close() // so that QEMU's end ends the wait for its answers
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err != nil {
			err = fmt.Errorf("ask QEMU: %w: %s", err, strings.TrimSpace(stderr.String()))
		}
	}()
	q, err := qmp.NewConn(ctx, conn)
	if err != nil {
		return "", err
	}
	defer q.Close()

	var have []command
	if err := q.Execute(ctx, "query-commands", nil, &have); err != nil {
		return "", err
	}
	var missing []string
	for _, name := range commands {
		if !slices.Contains(have, command{name}) {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return "", fmt.Errorf("this build lacks %s", strings.Join(missing, ", "))
	}
	var version struct {
		QEMU struct {
			Major int `json:"major"`
			Minor int `json:"minor"`
			Micro int `json:"micro"`
		} `json:"qemu"`
		Package string `json:"package"`
	}
	if err := q.Execute(ctx, "query-version", nil, &version); err != nil {
		return "", err
	}
	cpu, err := processor(accel)
	if err != nil {
		return "", err
	}
	v := version.QEMU
	return strings.Join(strings.Fields(fmt.Sprintf("%s %d.%d.%d %s %s %s",
		models[accel][0].name(), v.Major, v.Minor, v.Micro, version.Package, accel, cpu)), " "), nil
}

// kindOf are the parts of a kind that matter to a restore.
type kindOf struct {
	machine      string
	major, minor int
	accel, cpu   string
}

func parseKind(kind string) (k kindOf, ok bool) {
	f := strings.Fields(kind)
	if len(f) < 4 {
		return kindOf{}, false
	}
	k = kindOf{machine: f[0], accel: f[len(f)-2], cpu: f[len(f)-1]}
	n, _ := fmt.Sscanf(f[1], "%d.%d.", &k.major, &k.minor)
	return k, n == 2
}

// Restores implements vmm.Driver. QEMU reads what an older one has saved of
// these devices; what a newer one has it may not know.
func (d *Driver) Restores(kind string) error {
	if kind == d.kind {
		return nil
	}
	saved, ok := parseKind(kind)
	if !ok {
		return fmt.Errorf("it was saved as %q, which is no kind of machine", kind)
	}
	here, _ := parseKind(d.kind)
	if saved.accel != here.accel {
		return fmt.Errorf("it ran by %s, and machines here by %s", saved.accel, here.accel)
	}
	if _, err := d.model(kind); err != nil {
		return err
	}
	switch {
	case saved.cpu != here.cpu:
		return errors.New("it ran on another model of processor, or one that has other features")
	case saved.major > here.major || saved.major == here.major && saved.minor > here.minor:
		return fmt.Errorf("it was saved by QEMU %d.%d, which is newer than %d.%d here", saved.major, saved.minor, here.major, here.minor)
	}
	return nil
}

// processor is a digest of what a guest sees of the host's processor: under
// KVM all its features; under emulation the rate of its time stamp counter,
// which goes with its model.
func processor(accel string) (string, error) {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	keys := []string{"vendor_id", "cpu family", "model", "model name", "stepping"}
	if accel == KVM {
		keys = append(keys, "flags")
	}
	sum := sha256.New()
	found := 0
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() && s.Text() != "" { // the first processor's: they are alike
		key, value, _ := strings.Cut(s.Text(), ":")
		if key = strings.TrimSpace(key); slices.Contains(keys, key) {
			fmt.Fprintf(sum, "%s:%s\n", key, value)
			found++
		}
	}
	if err := s.Err(); err != nil {
		return "", err
	}
	if found == 0 {
		return "", errors.New("/proc/cpuinfo names no processor")
	}
	return fmt.Sprintf("%x", sum.Sum(nil)[:8]), nil
}
