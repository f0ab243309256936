package image

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// notAgainFor is how long the agent waits before it retries a failed attempt. A mirror
// that does not answer costs minutes, during which the agent does not serve yet.
const notAgainFor = 10 * time.Minute

// failedFile is the name of the file that says which attempt failed last.
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
	return fmt.Errorf("not tried again for %v: it failed %v ago: %s", notAgainFor, age.Round(time.Second), f.Reason)
}

// noteFailure records a failed attempt for failedLately. If it cannot, the next start
// tries again.
func noteFailure(dir, inputs string, cause error) {
	_ = atomicfile.WriteJSON(filepath.Join(dir, failedFile), failure{Inputs: inputs, Reason: cause.Error()})
}
