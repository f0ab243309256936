package boot

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
)

func TestOptions(t *testing.T) {
	got := options("console=ttyS0 quiet root=/dev/vda wrenn.ip=169.254.0.21/30 a=b=c\n")
	for k, want := range map[string]string{"console": "ttyS0", "root": "/dev/vda", "wrenn.ip": "169.254.0.21/30", "a": "b=c", "quiet": ""} {
		if got[k] != want {
			t.Errorf("%s is %q, not %q", k, got[k], want)
		}
	}
}

// TestReap runs reap in its own process, which adopts orphans.
func TestReap(t *testing.T) {
	if os.Getenv("WRENN_TEST_REAP") != "" {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			t.Fatal(err)
		}
		// The orphan ends before the program, which waits until reap has reaped it. real time:
		// the orphan ends after its parent.
		const script = `p=$(sh -c 'sleep 0.01 & echo $!'); while [ -e /proc/$p ]; do sleep 0.01; done; exit 3`
		err := reap([]string{"/bin/sh", "-c", script}, os.Environ())
		if err == nil || !strings.Contains(err.Error(), "0x300") {
			t.Fatalf("reap: %v", err)
		}
		return
	}
	cmd := exec.CommandContext(await.Context(t), os.Args[0], "-test.run=^TestReap$")
	cmd.Env = append(os.Environ(), "WRENN_TEST_REAP=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func FuzzOptions(f *testing.F) {
	f.Add("a=b c")
	f.Fuzz(func(_ *testing.T, s string) { options(s) })
}

func TestAwaitFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vda")
	if err := awaitFile(path, 10*time.Millisecond); err == nil {
		t.Error("it found a file that does not exist")
	}
	done := make(chan error, 1)
	go func() { done <- awaitFile(path, await.Hang) }()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
