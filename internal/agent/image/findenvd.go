package image

import (
	"fmt"
	"os"
	"path/filepath"
)

// FindDaemon returns the path of the guest daemon's binary: $WRENN_ENVD if set,
// otherwise envd beside this program.
func FindDaemon() (string, error) {
	if p := os.Getenv("WRENN_ENVD"); p != "" {
		return p, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find guest daemon: %w", err)
	}
	p := filepath.Join(filepath.Dir(self), "envd")
	if _, err := os.Stat(p); err != nil {
		return "", fmt.Errorf("find guest daemon beside %s (or set $WRENN_ENVD): %w", self, err)
	}
	return p, nil
}
