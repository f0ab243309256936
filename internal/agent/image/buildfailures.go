package image

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// notAgainFor is the time until the agent retries a failed attempt. A mirror that does not
// respond delays the agent's start by minutes.
const notAgainFor = 10 * time.Minute

// failedFile is the name of the file that records the last failed attempt.
const failedFile = "failed"

// failure records a failed attempt to build something newer than what dir has.
type failure struct {
	Inputs string `json:"inputs"`
	Reason string `json:"reason"`
}

// failedLately returns the error of an attempt to build inputs in dir that failed within
// notAgainFor, or nil if there was none.
func failedLately(dir, inputs string) error {
	path := filepath.Join(dir, failedFile)
	info, err := os.Stat(path)
	if err != nil {
		return nil
	}
	age := time.Since(info.ModTime())
	if age < 0 || age > notAgainFor {
		return nil
	}
	var f failure
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &f) != nil || f.Inputs != inputs {
		return nil
	}
	return fmt.Errorf("failed %v ago, next attempt %v after that: %s", age.Round(time.Second), notAgainFor, f.Reason)
}

// noteFailure records a failed attempt for failedLately. It ignores errors: without the
// record, the next start tries again.
func noteFailure(dir, inputs string, cause error) {
	_ = atomicfile.WriteJSON(filepath.Join(dir, failedFile), failure{Inputs: inputs, Reason: cause.Error()})
}
