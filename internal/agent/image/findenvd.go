package image

import (
	"fmt"
	"os"
	"path/filepath"
)

// FindDaemon returns the path of the guest daemon's binary: set, the value of the setting
// WRENN_ENVD, or envd beside this program if set is empty.
func FindDaemon(set string) (string, error) {
	if set != "" {
		return set, nil
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
