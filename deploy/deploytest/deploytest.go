// Package deploytest gives tests the front door's Caddy.
package deploytest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// caddy builds bin/caddy, unless it is built, and returns its folder.
var caddy = sync.OnceValues(func() (string, error) {
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find the source tree: %w", err)
	}
	dir := strings.TrimSpace(string(root))
	if out, err := exec.Command("make", "-s", "-C", dir, "bin/caddy").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build Caddy: %w: %s", err, out)
	}
	return filepath.Join(dir, "bin"), nil
})

// Caddy puts the front door's Caddy first on the test's PATH.
func Caddy(t testing.TB) {
	t.Helper()
	dir, err := caddy()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
}
