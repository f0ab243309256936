package qemu

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// underNewer is set in the environment of the tests that TestNewerQEMU runs.
const underNewer = "WRENN_NEWER_QEMU"

// TestNewerQEMU runs the tests that do most with the QEMU of the distribution's
// backports, which is what the distribution's next release has.
func TestNewerQEMU(t *testing.T) {
	if os.Getenv(underNewer) != "" {
		t.Skip("it is what TestNewerQEMU starts")
	}
	open(t) // skips where no machine can be started, and makes what they start from
	const tests = "^(TestBootBoundsAttachKill|TestGuestThatEndsLeavesItsConsole|TestSaveRestoreDivert)$"
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "../../../../.ci/newer-qemu", self, "-test.v", "-test.run", tests)
	cmd.Env = append(os.Environ(), underNewer+"=1")
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
