package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
)

// underNewer is set in the environment of the tests that TestNewerQEMU runs.
const underNewer = "WRENN_NEWER_QEMU"

// older has, in the environment, the folder with a machine that an older QEMU
// has saved.
const older = "WRENN_OLDER_QEMU"

// saved is a machine in such a folder, beside its memory and its devices.
type saved struct {
	Spec vmm.Spec
	Kind string
}

// TestRestoreOfOlder restores what TestNewerQEMU has saved with an older QEMU.
func TestRestoreOfOlder(t *testing.T) {
	dir := os.Getenv(older)
	if dir == "" {
		t.Skip("it is what TestNewerQEMU starts")
	}
	b := newBench(t)
	text, err := os.ReadFile(filepath.Join(dir, "saved.json"))
	b.must(err)
	var s saved
	b.must(json.Unmarshal(text, &s))
	if s.Kind == b.d.Kind() {
		t.Fatalf("both have %s", s.Kind)
	}
	b.must(b.d.Restores(s.Kind))
	image, err := memory.Open(filepath.Join(dir, "memory"))
	b.must(err)
	defer image.Close()
	ram, err := image.Materialize(t.Context(), "older")
	b.must(err)
	defer ram.Close()
	devices, err := os.ReadFile(filepath.Join(dir, "devices"))
	b.must(err)
	b.spec.Base, b.spec.Overlay = s.Spec.Base, s.Spec.Overlay
	b.run(&vmm.Saved{Memory: ram, Devices: devices}, "first", "second")
	before := b.number("cat /dev/shm/count")
	b.sh("sha256sum -c /dev/shm/sum; cat /root/mark; echo more >/root/more; sync")
	b.sh(fmt.Sprintf("for i in 1 2 3 4 5 6 7 8 9; do [ $(cat /dev/shm/count) -gt %d ] && exit; sleep 0.2; done; exit 1", before))
	// And what this one saves, it restores.
	again, devices := b.save(image)
	b.kill()
	b.fresh(b.spec.Overlay)
	b.run(&vmm.Saved{Memory: ram, Changed: again.ChangedFrom(image), Devices: devices}, "second", "third")
	b.sh("sha256sum -c /dev/shm/sum; cat /root/mark /root/more")
}

// saveForNewer saves a machine in dir.
func saveForNewer(t *testing.T, dir string) {
	t.Helper()
	b := newBench(t)
	b.run(nil, "", "first")
	b.sh(count + "; echo mark >/root/mark; sync")
	b.must(b.vm.Hold(t.Context()))
	devices, err := b.vm.Devices(t.Context())
	b.must(err)
	b.must(os.WriteFile(filepath.Join(dir, "devices"), devices, 0o600))
	b.must(os.Mkdir(filepath.Join(dir, "memory"), 0o700))
	image, err := memory.Create(t.Context(), filepath.Join(dir, "memory"), int64(b.spec.MemoryMiB)<<20, b.vm.Pages())
	b.must(err)
	b.must(image.Close())
	text, err := json.Marshal(saved{b.spec, b.d.Kind()})
	b.must(err)
	b.must(os.WriteFile(filepath.Join(dir, "saved.json"), text, 0o600))
	b.kill()
}

// TestNewerQEMU runs the tests that do most with the QEMU of the distribution's
// backports, which is what the distribution's next release has.
func TestNewerQEMU(t *testing.T) {
	if os.Getenv(underNewer) != "" {
		t.Skip("it is what TestNewerQEMU starts")
	}
	dir := t.TempDir()
	saveForNewer(t, dir)
	const tests = "^(TestBarriersAreKept|TestBootBoundsAttachKill|TestGuestThatEndsLeavesItsConsole|TestSaveRestoreDivert|TestDiskRates|TestRestoreOfOlder)$"
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "../../../../.ci/newer-qemu", self, "-test.v", "-test.run", tests)
	cmd.Env = append(os.Environ(), underNewer+"=1", older+"="+dir)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 75 {
		t.Skipf("%s", out)
	}
	if err != nil || strings.Count(string(out), "\n--- PASS: ") != strings.Count(tests, "Test") {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "--- ") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

func TestRestores(t *testing.T) {
	tcg := &Driver{accel: TCG, kind: "qemu-2 7.2.22 Debian 1:7.2+dfsg-7+deb12u18+b3 tcg 0123456789abcdef"}
	kvm := &Driver{accel: KVM, kind: "qemu-3 7.2.22 kvm 0123456789abcdef"}
	for _, c := range []struct {
		driver     *Driver
		kind, want string
	}{
		{tcg, tcg.kind, ""},
		{tcg, "qemu-2 7.2.15 Debian 1:7.2+dfsg-7+deb12u12 tcg 0123456789abcdef", ""},
		{tcg, "qemu-2 7.2.30 tcg 0123456789abcdef", ""},
		{tcg, "qemu-2 6.9.1 tcg 0123456789abcdef", ""},
		{tcg, "qemu-2 7.10.0 tcg 0123456789abcdef", "newer than 7.2"},
		{tcg, "qemu-2 10.0.2 tcg 0123456789abcdef", "newer than 7.2"},
		{tcg, "qemu-2 7.2.22 kvm 0123456789abcdef", "it ran by kvm"},
		{tcg, "qemu-2 7.2.22 tcg fedcba9876543210", "another model"},
		{tcg, "qemu-1 7.2.22 tcg 0123456789abcdef", "this release does not have"},
		{tcg, "qemu-3 7.2.22 tcg 0123456789abcdef", "this release does not have"},
		{tcg, "qemu-2 seven tcg 0123456789abcdef", "no kind of machine"},
		{tcg, "firecracker", "no kind of machine"},
		{tcg, "", "no kind of machine"},
		{kvm, kvm.kind, ""},
		// What an earlier release saved goes on.
		{kvm, "qemu-2 7.2.22 kvm 0123456789abcdef", ""},
		{kvm, "qemu-2 7.2.22 kvm fedcba9876543210", "another model"},
		{kvm, "qemu-4 7.2.22 kvm 0123456789abcdef", "this release does not have"},
	} {
		err := c.driver.Restores(c.kind)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.kind, err, c.want)
		}
	}
	// A machine that was restored as an earlier model is saved as that model.
	if m, err := kvm.model("qemu-2 7.2.22 kvm 0123456789abcdef"); err != nil || kvm.kindAs(m) != "qemu-2 7.2.22 kvm 0123456789abcdef" {
		t.Errorf("the model is %+v, %v", m, err)
	}
}
