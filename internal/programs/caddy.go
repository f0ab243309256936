package programs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The oldest Caddy that can be the front door. Older ones end a truncated response as if
// it were complete, and break bidirectional streams.
const (
	minCaddyMajor = 2
	minCaddyMinor = 11
)

// caddyModules are Wrenn's own, which deploy/Caddyfile uses.
var caddyModules = []string{"caddy.listeners.bounded", "caddy.listeners.linger", "caddy.listeners.ports", "http.handlers.control_plane", "http.handlers.full_duplex"}

// FindCaddy returns the Caddy beside this program, or else the one on PATH. It fails if
// that one is too old or lacks Wrenn's modules. Caddy is not in the table, because the
// distribution's package has no such modules.
func FindCaddy(ctx context.Context) (Program, error) {
	var path string
	if self, err := os.Executable(); err == nil {
		path = filepath.Join(filepath.Dir(self), "caddy")
	}
	if _, err := os.Stat(path); err != nil {
		if path, err = exec.LookPath("caddy"); err != nil {
			return Program{}, errors.New("no caddy beside wrenn or on PATH: `make build` builds bin/caddy")
		}
	}
	return Program{File: path}, checkCaddy(ctx, path)
}

// checkCaddy returns an error unless path is a Caddy that is new enough and has Wrenn's
// modules.
func checkCaddy(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "version").Output()
	if err != nil {
		return fmt.Errorf("ask %s for its version: %w", path, err)
	}
	if len(out) > 0 && out[0] == 'v' {
		out = out[1:] // Debian's has none.
	}
	var major, minor, patch int
	if _, err := fmt.Sscanf(string(out), "%d.%d.%d", &major, &minor, &patch); err != nil {
		return fmt.Errorf("%s does not say which version of Caddy it is: it printed %.40q", path, out)
	}
	if major < minCaddyMajor || major == minCaddyMajor && minor < minCaddyMinor {
		return fmt.Errorf("%s is Caddy %d.%d.%d, which is too old: Wrenn needs %d.%d or newer, such as bin/caddy, which `make build` builds",
			path, major, minor, patch, minCaddyMajor, minCaddyMinor)
	}
	if out, err = exec.CommandContext(ctx, path, "list-modules").Output(); err != nil {
		return fmt.Errorf("ask %s for its modules: %w", path, err)
	}
	has := strings.Fields(string(out))
	for _, module := range caddyModules {
		if !slices.Contains(has, module) {
			return fmt.Errorf("%s lacks the module %s, which Wrenn's Caddyfile uses: use bin/caddy, which `make build` builds", path, module)
		}
	}
	return nil
}
