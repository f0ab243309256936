package image

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// notAgainFor is how long an agent does not try again to make what it could not make
// a moment ago. A mirror that does not answer costs minutes each time, and the agent
// answers nobody before it has tried.
const notAgainFor = 10 * time.Minute

// failedFile is the name of the file that says which attempt failed last.
const failedFile = "failed"

// failure is an attempt to make something newer than what is there.
type failure struct {
	Inputs string `json:"inputs"`
	Reason string `json:"reason"`
}

// failedLately returns why making something of inputs has failed lately in dir, or nil
// if it has not.
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

// noteFailure has failedLately know of an attempt. If that fails, the next start tries
// again.
func noteFailure(dir, inputs string, cause error) {
	_ = atomicfile.WriteJSON(filepath.Join(dir, failedFile), failure{Inputs: inputs, Reason: cause.Error()})
}
