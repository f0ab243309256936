package image

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// immovable creates a folder below root whose content not even root can remove.
func immovable(t *testing.T, root, name string) {
	t.Helper()
	dir := filepath.Join(root, name)
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("chattr", "+i", dir).CombinedOutput(); err != nil {
		t.Skipf("needs root and a file system with attributes: %v: %s", err, out)
	}
	// The test may have moved it.
	t.Cleanup(func() { _ = exec.Command("chattr", "-R", "-i", root).Run() })
}

// TestLeftoversOfBuilds checks that leftovers of a killed build that cannot be removed do
// not prevent another build.
func TestLeftoversOfBuilds(t *testing.T) {
	dir := t.TempDir()
	left := filepath.Join(dir, tmpPrefix+"old-home")
	immovable(t, dir, filepath.Base(left))
	var said string
	held, err := lock(t.Context(), dir, func(s string) { said = s })
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if !strings.Contains(said, left) {
		t.Errorf("its message is %q", said)
	}
	home := filepath.Join(dir, "home")
	for _, text := range []string{"1", "2"} {
		tmp := filepath.Join(dir, tmpPrefix+text)
		if err := errors.Join(os.Mkdir(tmp, 0o700), os.WriteFile(filepath.Join(tmp, "content"), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := publish(tmp, home); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(home, "content")); err != nil || string(b) != text {
			t.Errorf("published %q, %v, not %q", b, err, text)
		}
		immovable(t, dir, "home/locked")
	}
}
