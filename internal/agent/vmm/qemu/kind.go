package qemu

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm/qmp"
)

// model is a version of the virtual hardware, in terms of QEMU's arguments that a guest or
// its saved state depends on. A model never changes, because saved machines depend on it.
type model struct {
	version  int
	machine  string // options of -machine besides those of all models
	accel    string
	cpu      string // the processor, unless the kind names another
	hidden   string // options that hide features from all guests
	nesting  string // options that hide features from guests that may not run virtual machines
	repaired bool   // see [redeliver]
	modules  bool   // guests have the kernel's modules as a second disk
	balloon  bool   // guests return memory that they free; every model has this variant
}

// nesting hides the features with which a guest can run virtual machines itself.
const nesting = ",svm=off,vmx=off"

// hidden hides performance counters and transactional memory, with which guests could spy on
// one another.
const hidden = ",pmu=off,perfctr-core=off,perfctr-nb=off,hle=off,rtm=off"

// models has the models of each accelerator. Machines boot as the first one. The others are
// for restoring machines that an earlier release saved.
var models = map[string][]model{
	TCG: {
		{version: 4, accel: tcgOption, cpu: "max", nesting: nesting, modules: true},
		{version: 3, accel: tcgOption, cpu: "max", nesting: nesting},
		// It let all guests use the SVM that TCG emulates.
		{version: 2, accel: tcgOption, cpu: "max"},
	},
	KVM: {
		// With a split irqchip, microvm's default, a stop can lose the end of a
		// level-triggered interrupt (see [redeliver]). With the kernel's I/O APIC it cannot.
		{
			version: 5, machine: ",ioapic2=off", accel: "kvm,kernel-irqchip=on", cpu: "host,migratable=on",
			hidden: hidden, nesting: nesting, modules: true,
		},
		{
			version: 4, machine: ",ioapic2=off", accel: "kvm,kernel-irqchip=on", cpu: "host,migratable=on",
			hidden: hidden, nesting: nesting,
		},
		{version: 3, machine: ",ioapic2=off", accel: "kvm,kernel-irqchip=on", cpu: "host", hidden: ",svm=off,vmx=off,pmu=off"},
		{version: 2, accel: "kvm", cpu: "host", repaired: true},
	},
}

var tcgOption = fmt.Sprintf("tcg,tb-size=%d", translationMiB)

// cpuOption returns the value of -cpu. If p has a name, QEMU fails to start on a host that
// lacks one of its features.
func (m model) cpuOption(p processor) string {
	cpu := m.cpu
	if p.name != "" {
		cpu = p.name + ",enforce"
	}
	cpu += m.hidden
	switch {
	case !p.nested:
		cpu += m.nesting
	case p.name != "":
		cpu += p.extension
	}
	return cpu
}

// model returns the model and the processor of a machine of the kind.
func (d *Driver) model(kind string) (model, processor, error) {
	saved, ok := parseKind(kind)
	for _, m := range models[d.accel] {
		m.balloon = saved.balloon
		if ok && m.name() == saved.machine {
			p := saved.cpu
			p.extension = d.processor.extension
			return m, p, nil
		}
	}
	return model{}, processor{}, fmt.Errorf("it was saved as %q, a machine that this release does not have", kind)
}

// boots returns the model of booting machines.
func (d *Driver) boots() model {
	m := models[d.accel][0]
	m.balloon = d.balloon
	return m
}

const balloonMark = "+balloon"

// name returns the first word of the model's kinds.
func (m model) name() string {
	s := fmt.Sprintf("qemu-%d", m.version)
	if m.balloon {
		s += balloonMark
	}
	return s
}

// kindAs returns the kind of a machine of the model with the processor.
func (d *Driver) kindAs(m model, p processor) string {
	return strings.Join(strings.Fields(fmt.Sprintf("%s %s %s %s", m.name(), d.version, d.accel, p)), " ")
}

// commands are the QMP commands that the driver needs.
var commands = []string{
	"add-fd", "block_resize", "block_set_io_throttle", "blockdev-add", "blockdev-del", "blockdev-snapshot", "cont", "migrate-incoming",
	"migrate-set-capabilities", "query-block", "query-fdsets", "query-status", "quit", "remove-fd", "ringbuf-read",
	"stop", "xen-save-devices-state",
}

type command struct {
	Name string `json:"name"`
}

// Kind implements vmm.Driver.
func (d *Driver) Kind(nested bool) string {
	p := d.processor
	p.nested = nested
	return d.kindAs(d.boots(), p)
}

// Nested implements vmm.Driver.
func (d *Driver) Nested(kind string) bool {
	k, ok := parseKind(kind)
	return ok && k.cpu.nested
}

// about describes a QEMU.
type about struct {
	version string
	// processors has the processors that guests can have on this host. It maps each name and
	// alias to the name of a version.
	processors map[string]string
	// others has the features that this host lacks for each of the other processors.
	others map[string][]string
	// balloons says that QEMU loads our library, which [model.balloon] needs.
	balloons bool
}

// ask runs QEMU with the library (nil: without) to find out its version and its processors.
// It fails if QEMU lacks a command that the driver needs, because distributions build it
// differently.
func ask(accel string, library *os.File) (a about, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return a, fmt.Errorf("ask QEMU: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "qmp"), os.NewFile(uintptr(pair[1]), "qmp")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return a, fmt.Errorf("ask QEMU: %w", err)
	}
	defer conn.Close()
	cmd := Program.CommandContext(ctx, "-machine", "none", "-accel", accel, "-nodefaults", "-no-user-config", "-display", "none", "-S",
		"-global", "migration.send-configuration=off",
		"-chardev", "socket,id=control,fd=3", "-mon", "chardev=control,mode=control")
	cmd.ExtraFiles = []*os.File{theirs}
	if library != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, library)
		cmd.Env = append(os.Environ(), preload(2+len(cmd.ExtraFiles)))
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return a, fmt.Errorf("ask QEMU: %w", err)
	}
	theirs.Close() // so that NewConn fails when QEMU ends
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err != nil {
			err = fmt.Errorf("ask QEMU: %w: %s", err, strings.TrimSpace(stderr.String()))
		}
	}()
	q, err := qmp.NewConn(ctx, conn)
	if err != nil {
		return a, err
	}
	defer q.Close()
	if a.balloons, err = hasLibrary(cmd.Process.Pid); err != nil {
		return a, err
	}

	var have []command
	if err := q.Execute(ctx, "query-commands", nil, &have); err != nil {
		return a, err
	}
	var missing []string
	for _, name := range commands {
		if !slices.Contains(have, command{name}) {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return a, fmt.Errorf("this build lacks %s", strings.Join(missing, ", "))
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
		return a, err
	}
	v := version.QEMU
	a.version = fmt.Sprintf("%d.%d.%d %s", v.Major, v.Minor, v.Micro, version.Package)
	var definitions []struct {
		Name    string   `json:"name"`
		AliasOf string   `json:"alias-of"`
		Lacks   []string `json:"unavailable-features"`
		Safe    bool     `json:"migration-safe"`
	}
	if err := q.Execute(ctx, "query-cpu-definitions", nil, &definitions); err != nil {
		return a, err
	}
	a.processors, a.others = map[string]string{}, map[string][]string{}
	for _, p := range definitions {
		lacks := slices.DeleteFunc(p.Lacks, needless)
		switch {
		case !p.Safe: // its features depend on the host
		case len(lacks) > 0:
			a.others[p.Name] = lacks
		default:
			a.processors[p.Name] = cmp.Or(p.AliasOf, p.Name)
		}
	}
	return a, nil
}

// processor is a guest's processor.
type processor struct {
	// host is a digest of what the guest sees of the host's processor (empty: nothing).
	host string
	// name is QEMU's name for it. It is empty for the host's processor and, under emulation,
	// for one with everything that QEMU can emulate.
	name string
	// nested says that the guest can run virtual machines itself.
	nested bool
	// extension has the option for nested if the processor has a name. It is not part of a
	// kind.
	extension string
}

const nestedMark = "+nested"

// String returns the processor's word in kinds: the digest, the name, or both with a colon
// in between.
func (p processor) String() string {
	s := p.name
	switch {
	case s == "":
		s = p.host
	case p.host != "":
		s += ":" + p.host
	}
	if p.nested {
		s += nestedMark
	}
	return s
}

var hostDigest = regexp.MustCompile(`^[0-9a-f]{16}$`)

func parseProcessor(s string) (p processor) {
	s, p.nested = strings.CutSuffix(s, nestedMark)
	name, host, both := strings.Cut(s, ":")
	switch {
	case both:
		p.name, p.host = name, host
	case hostDigest.MatchString(s):
		p.host = s
	default:
		p.name = s
	}
	return p
}

// newProcessor returns the guests' processor: QEMU's of that name, or host if name is empty.
func newProcessor(accel, name string, a about, host processor) (processor, error) {
	if name == "" {
		return host, nil
	}
	version, ok := a.processors[name]
	if lacks := a.others[name]; !ok && len(lacks) > 0 {
		return processor{}, fmt.Errorf("this host's processor lacks features of %s: %s", name, strings.Join(lacks, ", "))
	}
	if !ok {
		return processor{}, fmt.Errorf("QEMU has no processor %q that is the same on each host; \"qemu-system-x86_64 -cpu help\" lists its processors", name)
	}
	p := host
	p.name = version
	if accel == KVM {
		p.host = "" // guests see nothing else of the host's processor
	}
	return p, nil
}

// svmFeatures are the features that only processors with SVM have.
var svmFeatures = strings.Fields("npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists " +
	"pause-filter pfthreshold avic v-vmsave-vmload vgif svme-addr-chk vnmi")

// needless reports whether a host may lack a feature of its guests' processor, because no
// guests get it, or only those that may run virtual machines.
func needless(feature string) bool {
	return strings.HasPrefix(feature, "vmx") || slices.Contains(svmFeatures, feature) ||
		slices.ContainsFunc(models[KVM], func(m model) bool { return strings.Contains(m.hidden+m.nesting, ","+feature+"=off") })
}

// kindOf has the parts of a kind that matter for a restore.
type kindOf struct {
	machine      string // with the balloon's mark
	balloon      bool
	major, minor int
	accel        string
	cpu          processor
}

func parseKind(kind string) (k kindOf, ok bool) {
	f := strings.Fields(kind)
	if len(f) < 4 {
		return kindOf{}, false
	}
	k = kindOf{machine: f[0], balloon: strings.HasSuffix(f[0], balloonMark), accel: f[len(f)-2], cpu: parseProcessor(f[len(f)-1])}
	n, _ := fmt.Sscanf(f[1], "%d.%d.", &k.major, &k.minor)
	return k, n == 2
}

// Restores implements vmm.Driver. QEMU reads the state that an older QEMU saved, but not
// always that of a newer one.
func (d *Driver) Restores(kind string) error {
	if kind == d.Kind(false) {
		return nil
	}
	saved, ok := parseKind(kind)
	if !ok {
		return fmt.Errorf("it was saved as %q, which is not a kind of machine", kind)
	}
	here, _ := parseKind(d.Kind(false))
	if saved.accel != here.accel {
		return fmt.Errorf("it ran on %s, but this host uses %s", saved.accel, here.accel)
	}
	if _, _, err := d.model(kind); err != nil {
		return err
	}
	switch {
	case saved.balloon && !d.balloons:
		return errNoBalloon
	case saved.cpu.host != "" && saved.cpu.host != d.host:
		return errors.New("it ran on a processor of another model or with other features")
	case saved.cpu.name != "" && d.processors[saved.cpu.name] == "":
		return fmt.Errorf("it ran on the processor %s, which this host does not have", saved.cpu.name)
	case saved.major > here.major || saved.major == here.major && saved.minor > here.minor:
		return fmt.Errorf("it was saved by QEMU %d.%d, which is newer than %d.%d on this host", saved.major, saved.minor, here.major, here.minor)
	}
	return nil
}

// hostProcessor returns the host's processor. Its digest covers what a guest sees: under KVM
// all features, under emulation the rate of the time stamp counter, which the model
// determines.
func hostProcessor(accel string) (p processor, err error) {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return p, err
	}
	defer f.Close()
	p.extension = ",svm=on" // TCG emulates no other
	keys := []string{"vendor_id", "cpu family", "model", "model name", "stepping"}
	if accel == KVM {
		keys = append(keys, "flags")
	}
	sum := sha256.New()
	found := 0
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() && s.Text() != "" { // only the first processor, because all are alike
		key, value, _ := strings.Cut(s.Text(), ":")
		if key = strings.TrimSpace(key); slices.Contains(keys, key) {
			fmt.Fprintf(sum, "%s:%s\n", key, value)
			found++
		}
		if key == "flags" && accel == KVM && slices.Contains(strings.Fields(value), "vmx") {
			p.extension = ",vmx=on"
		}
	}
	if err := s.Err(); err != nil {
		return p, err
	}
	if found == 0 {
		return p, errors.New("/proc/cpuinfo names no processor")
	}
	p.host = fmt.Sprintf("%x", sum.Sum(nil)[:8])
	return p, nil
}
