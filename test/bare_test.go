package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestBareMachine follows the README on machines with only what a plain Debian has, plus
// git and make. It tests the last commit, which it clones.
func TestBareMachine(t *testing.T) {
	if os.Getenv("WRENN_SLOW") == "" {
		t.Skip("takes more than five minutes to install and build everything on four bare machines: make test WRENN_SLOW=1")
	}
	mod, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(strings.TrimSpace(string(mod)), ".ci", "bare"), "start", "machine", "release")
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // lets it clean up
	cmd.WaitDelay = time.Minute
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 75 {
		t.Skip(".ci/bare cannot run here: see its output above")
	}
	if err != nil {
		t.Fatal(err)
	}
}
