// Package doctor checks what a machine needs to run sandboxes, and suggests fixes.
package doctor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent"
	"github.com/wrenn-dev/wrenn/internal/agent/cgroup"
	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/network"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/drivers"
	"github.com/wrenn-dev/wrenn/internal/flock"
	"github.com/wrenn-dev/wrenn/internal/inplace"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/programs"
	"github.com/wrenn-dev/wrenn/internal/settings"
	"github.com/wrenn-dev/wrenn/internal/settings/all"
)

// What a fresh installation with a few sandboxes needs.
const (
	minDiskMiB   = 6 << 10
	minMemoryMiB = 2 << 10
)

// Finding is the result of one check.
type Finding struct {
	Name     string `json:"name"`
	OK       bool   `json:"ok"`
	Required bool   `json:"required"` // sandboxes cannot run without it
	Detail   string `json:"detail,omitempty"`
	Fix      string `json:"fix,omitempty"`
	Package  string `json:"package,omitempty"` // Debian package to install
}

// errFindings reports that something required is missing.
var errFindings = errors.New("this machine lacks what wrenn needs")

// Command is `wrenn doctor`.
func Command(out io.Writer) *cobra.Command {
	var dir, format string
	var agent bool
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check this machine and suggest fixes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			set, findings := configured(agent)
			data := cmp.Or(dir, os.Getenv("WRENN_DIR"), layout.DefaultDir)
			if agent { // `wrenn up` does not take its directory from the file
				data = cmp.Or(dir, set["WRENN_DIR"], layout.DefaultDir)
			}
			findings = append(Examine(cmd.Context(), layout.Dir(data), set["WRENN_ENVD"], agent), findings...)
			if err := report(out, format, findings); err != nil {
				return err
			}
			for _, f := range findings {
				if f.Required && !f.OK {
					return errFindings
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "data directory (default $WRENN_DIR, with --agent also dir in the settings file, else "+layout.DefaultDir+")")
	cmd.Flags().BoolVar(&agent, "agent", false, "check only what a host agent needs, without PostgreSQL, Redis and Caddy")
	cmd.Flags().StringVarP(&format, "output", "o", "table", "table or json")
	return cmd
}

// configured returns the agent's settings from the environment and the settings file, and
// what is wrong with the file. It reads the server's section only if agent is false.
func configured(agent bool) (settings.Values, []Finding) {
	set, warnings, err := all.AgentProgram.Read(os.Environ())
	if err == nil && !agent {
		var more []string
		_, more, err = all.ServerProgram.Read(os.Environ())
		warnings = append(warnings, more...)
	}
	if err != nil {
		return nil, []Finding{{Name: "settings", Required: true, Detail: err.Error(), Fix: "correct the settings file (docs/configuration.md)"}}
	}
	var findings []Finding
	for _, w := range append(warnings, settings.UnknownSections(os.Environ(), all.ServerProgram, all.AgentProgram)...) {
		findings = append(findings, Finding{Name: "settings", Detail: w, Fix: "correct or remove it in the settings file (docs/configuration.md)"})
	}
	return set, findings
}

func report(out io.Writer, format string, findings []Finding) error {
	if format == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(findings)
	}
	var missing []string
	for _, f := range findings {
		mark := "ok     "
		switch {
		case !f.OK && f.Required:
			mark = "MISSING"
		case !f.OK:
			mark = "note   "
		}
		fmt.Fprintf(out, "%s  %-15s %s\n", mark, f.Name, f.Detail)
		if !f.OK && f.Fix != "" {
			fmt.Fprintf(out, "%25s fix: %s\n", "", f.Fix)
		}
		if !f.OK && f.Package != "" {
			missing = append(missing, f.Package)
		}
	}
	if len(missing) > 0 {
		fmt.Fprintf(out, "\nTo install every missing package:\n\n    apt-get update && apt-get install -y --no-install-recommends %s\n", strings.Join(missing, " "))
	}
	return nil
}

// check is one check. It returns a detail to show, or an error that says what is wrong.
type check struct {
	name     string
	required bool
	fix      string
	do       func(context.Context, layout.Dir) (string, error)
}

// Examine checks the machine for `wrenn up`, or only for a host agent. envd is the setting
// WRENN_ENVD. Examine writes nothing to the data directory dir except the result of the KVM
// probe.
func Examine(ctx context.Context, dir layout.Dir, envd string, agent bool) []Finding {
	checks := []check{
		{"root", true, "run as root: sudo wrenn …", isRoot},
		{"tun", true, "modprobe tun, or a kernel with CONFIG_TUN", hasTun},
		{"namespaces", true, "a kernel with network, mount and IPC namespaces, and permission to use them", hasNamespaces},
		{"nftables", true, "a kernel with CONFIG_NF_TABLES, and NAT", hasNftables},
		{"cgroups", true, "mount control groups (version 2, or version 1 with memory, cpu and pids)", hasCgroups},
		{"KVM", false, "without it guests are emulated, about 10 times slower: enable virtualization in the firmware, or nested virtualization in the hypervisor", kvmCheck(envd)},
		{"disk", true, fmt.Sprintf("free %d MiB, or choose another directory with --dir", minDiskMiB), hasDisk},
		{"memory", true, fmt.Sprintf("free at least %d MiB", minMemoryMiB), hasMemory},
		{"firewall", false, "let the other firewall forward from interfaces named wrenn-veth-*", noObstacles},
	}
	if !agent {
		checks = append(checks, check{"Caddy", true, "make build, and put bin/caddy beside wrenn", hasCaddy},
			check{"full disk", false, "PostgreSQL will stop if the disk is full: move its data, as docs/sharing.md says", overwrites})
	}
	findings := make([]Finding, 0, len(checks))
	for _, c := range checks {
		detail, err := c.do(ctx, dir)
		f := Finding{Name: c.name, OK: err == nil, Required: c.required, Detail: detail}
		if err != nil {
			f.Detail, f.Fix = err.Error(), c.fix
		}
		findings = append(findings, f)
	}
	return slices.Concat(findings, installed(agent), kept(dir), reported(dir))
}

// kept lists the data that the agent could not read and set aside, and says if data of a
// later release keeps the agent from starting. No agent need run.
func kept(dir layout.Dir) []Finding {
	var findings []Finding
	var newer *format.NewerError
	if err := agent.CheckFormats(dir); errors.As(err, &newer) {
		findings = append(findings, Finding{Name: "formats", Required: true, Detail: err.Error(), Fix: "install the release that wrote the data, or a later one: see docs/upgrade.md"})
	}
	items, err := unreadable.List(dir)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		findings = append(findings, Finding{Name: "unreadable", Detail: err.Error(), Fix: "repair the directory"})
	}
	for _, i := range items {
		findings = append(findings, Finding{
			Name: "unreadable", Detail: fmt.Sprintf("the agent could not read a %s and keeps it in %s: %s", i.Kind, i.Path, i.Reason),
			Fix: fmt.Sprintf("stop the agent, repair it and move it back to %s; or delete it", i.From),
		})
	}
	return findings
}

// reported lists the problems that the agent reports, apart from those that [kept]
// lists. If the agent was killed, its last list is still there.
func reported(dir layout.Dir) []Finding {
	problems, err := problem.Read(dir.Problems())
	if err != nil {
		return []Finding{{Name: "problems", Detail: err.Error()}}
	}
	runs, err := agentRuns(dir)
	if err != nil {
		return []Finding{{Name: "agent", Detail: err.Error()}}
	}
	var findings []Finding
	says := "reported by the agent since %s: %s"
	if info, err := os.Stat(dir.Problems()); err == nil && !runs {
		findings = append(findings, Finding{
			Name: "agent", Detail: fmt.Sprintf("no agent runs, and the last one was killed: its list of problems dates from %s, %s ago", info.ModTime().Format(time.DateTime), time.Since(info.ModTime()).Round(time.Second)),
			Fix: "start the agent, which takes back the sandboxes whose machines run",
		})
		says = "reported since %s by the agent that was killed: %s"
	}
	for _, p := range problems {
		if p.Kind == problem.Unreadable && slices.Contains(unreadable.Kinds(), unreadable.Kind(p.Object)) {
			continue
		}
		findings = append(findings, Finding{Name: string(p.Kind), Detail: fmt.Sprintf(says, p.Since.Local().Format(time.DateTime), p.Message)})
	}
	return findings
}

// agentRuns reports whether an agent runs on dir.
func agentRuns(dir layout.Dir) (bool, error) { return flock.Held(dir.AgentLock()) }

// installed checks for every program in the table, one finding per package.
func installed(agent bool) []Finding {
	var findings []Finding
	for _, p := range programs.All() {
		if agent && p.UpOnly {
			continue
		}
		i := slices.IndexFunc(findings, func(f Finding) bool { return f.Name == p.Package })
		if i < 0 {
			findings = append(findings, Finding{Name: p.Package, OK: true, Required: true})
			i = len(findings) - 1
		}
		f := &findings[i]
		path, err := p.Find()
		switch {
		case err != nil:
			f.OK, f.Detail, f.Package = false, "no program "+p.File, p.Package
			f.Fix = "apt-get install " + p.Package
		case f.OK:
			f.Detail = strings.TrimSpace(f.Detail + " " + path)
		}
	}
	return findings
}

func hasCaddy(ctx context.Context, _ layout.Dir) (string, error) {
	p, err := programs.FindCaddy(ctx)
	return p.File, err
}

func isRoot(context.Context, layout.Dir) (string, error) {
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("this is user %d", os.Geteuid())
	}
	return "", nil
}

func hasTun(context.Context, layout.Dir) (string, error) {
	const device = "/dev/net/tun"
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", device, err)
	}
	return device, unix.Close(fd)
}

func hasNamespaces(context.Context, layout.Dir) (string, error) {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with its namespaces
		result <- unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS)
	}()
	if err := <-result; err != nil {
		return "", fmt.Errorf("make namespaces: %w", err)
	}
	return "", nil
}

func hasNftables(context.Context, layout.Dir) (string, error) {
	c, err := nftables.New()
	if err != nil {
		return "", err
	}
	if _, err := c.ListTables(); err != nil {
		return "", fmt.Errorf("list tables: %w", err)
	}
	return "", nil
}

func hasCgroups(context.Context, layout.Dir) (string, error) { return "", cgroup.Available() }

// kvmCheck returns a check that boots a kernel under KVM. If no agent has prepared a
// kernel, the check prepares one, with the guest daemon envd.
func kvmCheck(envd string) func(context.Context, layout.Dir) (string, error) {
	return func(ctx context.Context, dir layout.Dir) (string, error) { return hasKVM(ctx, dir, envd) }
}

func hasKVM(ctx context.Context, dir layout.Dir, envd string) (string, error) {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return "", err
	}
	kernels, err := filepath.Glob(filepath.Join(dir.Kernels(), "*", "vmlinux"))
	if err != nil || len(kernels) == 0 {
		if os.Geteuid() != 0 {
			return "", errors.New("/dev/kvm exists; only root can check whether it works")
		}
		// The probe needs a kernel to boot.
		envd, err := image.FindDaemon(envd)
		if err != nil {
			return "", fmt.Errorf("check whether /dev/kvm works: %w", err)
		}
		k, err := image.Kernel(ctx, dir, envd, func(string) {})
		if err != nil {
			return "", fmt.Errorf("check whether /dev/kvm works: %w", err)
		}
		kernels = []string{k.Vmlinux}
	}
	kernel := kernels[len(kernels)-1]
	// The agent keeps its own result there, too, and reuses this one.
	if err := os.MkdirAll(dir.VMM(), 0o700); err != nil {
		return "", err
	}
	monitor, err := drivers.Probe(ctx, vmm.KVM, vmm.Config{
		Dir: dir.VMM(), Kernel: kernel, Initrd: filepath.Join(filepath.Dir(kernel), "initrd"), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return "", err
	}
	return "a kernel boots under " + monitor, nil
}

// existing returns path, or the nearest folder above it that exists.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}

func hasDisk(_ context.Context, dir layout.Dir) (string, error) {
	var st unix.Statfs_t
	at := existing(string(dir))
	if err := unix.Statfs(at, &st); err != nil {
		return "", fmt.Errorf("read free space: %w", err)
	}
	free := int64(st.Bavail) * st.Bsize >> 20
	detail := fmt.Sprintf("%d MiB free at %s", free, at)
	if free < minDiskMiB {
		return "", errors.New(detail)
	}
	return detail, nil
}

// overwrites returns an error if the file system does not overwrite PostgreSQL's log in
// place, because PostgreSQL then stops when the disk is full.
func overwrites(_ context.Context, dir layout.Dir) (string, error) {
	log := filepath.Join(dir.Postgres(), "data", "pg_wal")
	if _, err := os.Stat(log); err != nil { // it does not exist yet, or this user may not see it
		return "", inplace.Possible(existing(dir.Postgres()))
	}
	return "", inplace.Check(log)
}

func hasMemory(context.Context, layout.Dir) (string, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(string(b), "MemAvailable:")
	var kib int64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		return "", fmt.Errorf("read free memory: %w", err)
	}
	detail := fmt.Sprintf("%d MiB free", kib>>10)
	if kib>>10 < minMemoryMiB {
		return "", errors.New(detail)
	}
	return detail, nil
}

// noObstacles guesses from other programs' firewall rules whether guests' packets pass.
// If an agent runs, it leaves that to the agent, which sends test packets.
func noObstacles(_ context.Context, dir layout.Dir) (string, error) {
	if runs, err := agentRuns(dir); err == nil && runs {
		return "the running agent checks whether guests' packets pass", nil
	}
	if o := network.Obstacles(); len(o) > 0 {
		return "", fmt.Errorf("guests may not reach the internet: %s", strings.Join(o, "; "))
	}
	return "", nil
}
