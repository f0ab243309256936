package sandbox

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// availableMemory returns the kernel's estimate of the memory for new processes, in MiB.
func availableMemory() (int, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("measure memory: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "MemAvailable:"); ok {
			kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(rest, "kB")))
			if err != nil {
				return 0, fmt.Errorf("measure memory: %w", err)
			}
			return kib >> 10, nil
		}
	}
	return 0, errors.New("measure memory: /proc/meminfo has no MemAvailable")
}
