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
	"github.com/wrenn-dev/wrenn/internal/agent/vmm/vmmtest"
)

// underNewer is set in the environment of the tests that TestNewerQEMU starts.
const underNewer = "WRENN_NEWER_QEMU"

// older is the environment variable for the folder with a machine that an older QEMU
// saved.
const older = "WRENN_OLDER_QEMU"

// saved is the JSON file in such a folder, beside the machine's memory and devices.
type saved struct {
	Spec vmm.Spec
	Kind string
}

// TestRestoreOfOlder restores what TestNewerQEMU saved with an older QEMU.
func TestRestoreOfOlder(t *testing.T) {
	dir := os.Getenv(older)
	if dir == "" {
		t.Skip("TestNewerQEMU starts it")
	}
	b := subject.NewBench(t)
	text, err := os.ReadFile(filepath.Join(dir, "saved.json"))
	b.Must(err)
	var s saved
	b.Must(json.Unmarshal(text, &s))
	if s.Kind == b.Driver.Kind(false) {
		t.Fatalf("both QEMUs have the kind %s", s.Kind)
	}
	b.Must(b.Driver.Restores(s.Kind))
	image, err := memory.Open(filepath.Join(dir, "memory"))
	b.Must(err)
	defer image.Close()
	ram, err := image.Materialize(t.Context(), "older")
	b.Must(err)
	defer ram.Close()
	devices, err := os.ReadFile(filepath.Join(dir, "devices"))
	b.Must(err)
	b.Spec.Base, b.Spec.Overlay = s.Spec.Base, s.Spec.Overlay
	b.Resume(vmm.Saved{Memory: ram, Devices: devices}, "first", "second")
	before := b.Number("cat /dev/shm/count")
	b.Sh("sha256sum -c /dev/shm/sum; cat /root/mark; echo more >/root/more; sync")
	b.Sh(fmt.Sprintf("until [ $(cat /dev/shm/count) -gt %d ]; do sleep 0.1; done", before))
	// The newer QEMU can also restore what it saves itself.
	again, devices := b.Save(image)
	b.Kill()
	b.Fresh(b.Spec.Overlay)
	b.Resume(vmm.Saved{Memory: ram, Changed: again.ChangedFrom(image), Devices: devices}, "second", "third")
	b.Sh("sha256sum -c /dev/shm/sum; cat /root/mark /root/more")
}

// saveForNewer saves a machine in dir.
func saveForNewer(t *testing.T, dir string) {
	t.Helper()
	b := subject.NewBench(t)
	b.Boot("first")
	b.Sh(vmmtest.Counting + "; echo mark >/root/mark; sync")
	b.Must(b.VM.Hold(t.Context()))
	devices, err := b.VM.Devices(t.Context())
	b.Must(err)
	b.Must(os.WriteFile(filepath.Join(dir, "devices"), devices, 0o600))
	b.Must(os.Mkdir(filepath.Join(dir, "memory"), 0o700))
	image, err := memory.Create(t.Context(), filepath.Join(dir, "memory"), int64(b.Spec.MemoryMiB)<<20, b.VM.Pages())
	b.Must(err)
	b.Must(image.Close())
	text, err := json.Marshal(saved{b.Spec, b.Driver.Kind(false)})
	b.Must(err)
	b.Must(os.WriteFile(filepath.Join(dir, "saved.json"), text, 0o600))
	b.Kill()
}

// TestNewerQEMU runs the most important tests with the QEMU of the distribution's
// backports, which the distribution's next release will have.
func TestNewerQEMU(t *testing.T) {
	if os.Getenv(underNewer) != "" {
		t.Skip("this is the run that TestNewerQEMU started")
	}
	dir := t.TempDir()
	saveForNewer(t, dir)
	tests := []string{"TestBarriersAreKept", "TestConformance", "TestRestoreOfOlder"}
	const parts = "boot|console|save|rates" // parts of Conformance
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "../../../../.ci/newer-qemu", self, "-test.v", "-test.run", fmt.Sprintf("^(%s)$/^(%s)$", strings.Join(tests, "|"), parts))
	cmd.Env = append(os.Environ(), underNewer+"=1", older+"="+dir)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 75 {
		t.Skipf("%s", out)
	}
	if err != nil || strings.Count(string(out), "\n--- PASS: ") != len(tests) ||
		strings.Count(string(out), "\n    --- PASS: ") != strings.Count(parts, "|")+1 {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(strings.TrimSpace(line), "--- ") {
			t.Log(strings.TrimSpace(line))
		}
	}
}
