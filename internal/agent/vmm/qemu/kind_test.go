package qemu

import (
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

// known describes the tests' QEMU.
var known = about{
	version:    "7.2.22 Debian 1:7.2+dfsg-7+deb12u18+b3",
	processors: map[string]string{"EPYC": "EPYC-v1", "EPYC-v1": "EPYC-v1", "EPYC-v3": "EPYC-v3"},
	others:     map[string][]string{"EPYC-Milan-v1": {"pku", "vaes"}},
}

func TestRestores(t *testing.T) {
	const host = "0123456789abcdef"
	driver := func(accel string, p processor) *Driver {
		return &Driver{accel: accel, about: known, host: host, processor: p}
	}
	emulated, real := driver(TCG, processor{host: host}), driver(KVM, processor{host: host})
	named := driver(KVM, processor{name: "EPYC-v3"})
	balloons := driver(KVM, processor{host: host})
	balloons.balloon, balloons.balloons = true, true
	for _, c := range []struct {
		driver     *Driver
		kind, want string
	}{
		{emulated, emulated.Kind(false), ""},
		{emulated, emulated.Kind(true), ""},
		{emulated, "qemu-4 7.2.15 Debian 1:7.2+dfsg-7+deb12u12 tcg " + host, ""},
		{emulated, "qemu-3 7.2.30 tcg " + host, ""},
		{emulated, "qemu-3 6.9.1 tcg " + host, ""},
		{emulated, "qemu-3 7.10.0 tcg " + host, "newer than 7.2"},
		{emulated, "qemu-3 10.0.2 tcg " + host, "newer than 7.2"},
		{emulated, "qemu-3 7.2.22 kvm " + host, "it ran on kvm"},
		{emulated, "qemu-3 7.2.22 tcg fedcba9876543210", "another model"},
		{emulated, "qemu-1 7.2.22 tcg " + host, "this release does not have"},
		{emulated, "qemu-5 7.2.22 tcg " + host, "this release does not have"},
		{emulated, "qemu-3 seven tcg " + host, "not a kind of machine"},
		{emulated, "firecracker", "not a kind of machine"},
		{emulated, "", "not a kind of machine"},
		{real, real.Kind(false), ""},
		{real, real.Kind(true), ""},
		// A machine saved by an earlier release can be restored.
		{emulated, "qemu-3 7.2.22 tcg " + host, ""},
		{emulated, "qemu-2 7.2.22 tcg " + host, ""},
		{real, "qemu-4 7.2.22 kvm " + host, ""},
		{real, "qemu-3 7.2.22 kvm " + host, ""},
		{real, "qemu-2 7.2.22 kvm " + host, ""},
		{real, "qemu-2 7.2.22 kvm fedcba9876543210", "another model"},
		{real, "qemu-6 7.2.22 kvm " + host, "this release does not have"},
		// A named processor is the same on each host that has it. An emulated one still
		// depends on its host, because its clock does.
		// So can one with a balloon, if QEMU loads the library.
		{balloons, "qemu-5+balloon 7.2.22 kvm " + host, ""},
		{balloons, balloons.Kind(false), ""},
		{balloons, real.Kind(false), ""},
		{real, balloons.Kind(false), "cannot return memory"},
		{real, "qemu-6+balloon 7.2.22 kvm " + host, "this release does not have"},
		{named, named.Kind(false), ""},
		{named, named.Kind(true), ""},
		{named, "qemu-4 7.2.22 kvm EPYC-v1", ""},
		{named, "qemu-4 7.2.22 kvm EPYC-v1+nested", ""},
		{named, "qemu-4 7.2.22 kvm " + host, ""},
		{named, "qemu-4 7.2.22 kvm fedcba9876543210", "another model"},
		{real, "qemu-4 7.2.22 kvm EPYC-v3", ""},
		{real, "qemu-4 7.2.22 kvm EPYC-Milan-v1", "the processor EPYC-Milan-v1, which this host does not have"},
		{emulated, "qemu-3 7.2.22 tcg EPYC-v1:" + host, ""},
		{emulated, "qemu-3 7.2.22 tcg EPYC-v1:fedcba9876543210", "another model"},
		{emulated, "qemu-3 7.2.22 tcg EPYC-Milan-v1:" + host, "does not have"},
	} {
		err := c.driver.Restores(c.kind)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.kind, err, c.want)
		}
		if got, want := c.driver.Nested(c.kind), strings.HasSuffix(c.kind, "+nested"); got != want {
			t.Errorf("%q: nested is %v", c.kind, got)
		}
	}
	// A machine that was restored as an earlier model is saved as that model.
	for _, kind := range []string{"qemu-2 7.2.22 kvm " + host, "qemu-5+balloon 7.2.22 kvm " + host, "qemu-4 7.2.22 kvm EPYC-v1+nested", "qemu-4 7.2.22 kvm " + host + "+nested"} {
		m, p, err := real.model(kind)
		if got := real.kindAs(m, p); err != nil || got != strings.Replace(kind, "7.2.22", known.version, 1) {
			t.Errorf("%q is saved as %q, %v", kind, got, err)
		}
	}
}

func TestNewProcessor(t *testing.T) {
	host, err := hostProcessor(TCG)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ accel, name, want, err string }{
		{KVM, "EPYC", "EPYC-v1", ""},
		{KVM, "EPYC-v3", "EPYC-v3", ""},
		{KVM, "EPYC-Milan-v1", "", "lacks features of EPYC-Milan-v1: pku, vaes"},
		{KVM, "EPYC,svm=on", "", "has no processor"},
		{KVM, "host", "", "has no processor"},
	} {
		p, err := newProcessor(c.accel, c.name, known, host)
		if p.String() != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %v", c.name, p, err)
		}
	}
	p, err := newProcessor(TCG, "EPYC", known, host)
	if err != nil || p.name != "EPYC-v1" || !hostDigest.MatchString(p.host) || parseProcessor(p.String()).host != p.host {
		t.Errorf("emulated: %q, %v", p, err)
	}
}

func TestNeedless(t *testing.T) {
	for feature, want := range map[string]bool{
		"svm": true, "npt": true, "vmx": true, "vmx-ept": true, "rtm": true, "perfctr-core": true,
		"avx2": false, "off": false, "": false, "pclmulqdq": false,
	} {
		if needless(feature) != want {
			t.Errorf("%q: %v", feature, !want)
		}
	}
}

// TestCPUOption checks that no guest gets virtualization features unless it may, and that
// old machines keep their options.
func TestCPUOption(t *testing.T) {
	for accel, all := range models {
		now := all[0]
		if got := now.cpuOption(processor{}); !strings.HasSuffix(got, ",svm=off,vmx=off") {
			t.Errorf("%s: %s", accel, got)
		}
		if got := now.cpuOption(processor{nested: true}); strings.Contains(got, "svm") || strings.Contains(got, "vmx") {
			t.Errorf("%s, nested: %s", accel, got)
		}
		if got := now.cpuOption(processor{name: "EPYC-v3"}); !strings.HasPrefix(got, "EPYC-v3,enforce") || !strings.HasSuffix(got, ",svm=off,vmx=off") {
			t.Errorf("%s, named: %s", accel, got)
		}
		if got := now.cpuOption(processor{name: "EPYC-v3", nested: true, extension: ",svm=on"}); !strings.HasSuffix(got, ",svm=on") || strings.Contains(got, "vmx") {
			t.Errorf("%s, named and nested: %s", accel, got)
		}
		versions := map[int]bool{}
		for _, m := range all {
			if versions[m.version] || m.version > now.version {
				t.Errorf("%s: version %d is listed twice, or newer than the newest", accel, m.version)
			}
			versions[m.version] = true
		}
	}
	for got, want := range map[string]string{
		models[TCG][1].cpuOption(processor{}): "max,svm=off,vmx=off",
		models[TCG][2].cpuOption(processor{}): "max",
		models[KVM][1].cpuOption(processor{}): "host,migratable=on,pmu=off,perfctr-core=off,perfctr-nb=off,hle=off,rtm=off,svm=off,vmx=off",
		models[KVM][2].cpuOption(processor{}): "host,svm=off,vmx=off,pmu=off",
		models[KVM][3].cpuOption(processor{}): "host",
	} {
		if got != want {
			t.Errorf("an earlier release had %q, and this one has %q", want, got)
		}
	}
}

// hostNests reports whether the host's KVM gives guests virtualization.
func hostNests(t *testing.T) bool {
	t.Helper()
	for _, module := range []string{"kvm_amd", "kvm_intel"} {
		b, err := os.ReadFile("/sys/module/" + module + "/parameters/nested")
		if err == nil && strings.ContainsAny(string(b), "1Y") {
			return true
		}
	}
	return false
}

// TestProcessors boots guests and reads their processors' features. Only guests that may nest
// must have virtualization.
func TestProcessors(t *testing.T) {
	subject.Open(t) // skips where virtual machines cannot run
	for name, test := range map[string]struct {
		processor string
		nested    bool
	}{"the host's": {}, "named and nested": {processor: "qemu64", nested: true}} {
		t.Run(name, func(t *testing.T) {
			if test.nested && vmmtest.Accelerator() == KVM && !hostNests(t) {
				t.Skip("needs nested virtualization on the host")
			}
			s := subject
			s.New = func(dir string, log *slog.Logger) (vmm.Driver, error) {
				return Open(vmmtest.Accelerator(), vmm.Config{Dir: dir, Processor: test.processor, Log: log})
			}
			b := s.NewBench(t)
			b.Spec.Nested = test.nested
			b.Boot("token")
			flags := strings.Fields(b.Sh("grep -m1 ^flags /proc/cpuinfo"))
			has := slices.Contains(flags, "svm") || slices.Contains(flags, "vmx")
			st := b.VM.State()
			if has != test.nested || b.Driver.Nested(st.Kind) != test.nested || st.Kind != b.Driver.Kind(test.nested) {
				t.Errorf("the guest has virtualization: %v; its kind is %q", has, st.Kind)
			}
			if test.processor != "" && !strings.Contains(st.Kind, test.processor+"-v1") {
				t.Errorf("the machine's kind is %q", st.Kind)
			}
		})
	}
}
