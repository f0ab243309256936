// Package format has the format versions of everything that an agent keeps on disk.
// docs/upgrade.md has the rules for changing one.
package format

import (
	"encoding/json"
	"fmt"
)

// Format is one format and its versions. 0 is data without a version.
type Format struct {
	// Name names the data, File its file.
	Name, File string
	// Oldest is the oldest version that this release reads. Version is the newest, and
	// the one that it writes.
	Oldest, Version int
}

// The formats.
var (
	Sandbox     = Format{"sandbox", "sandboxes/HOME/sandbox.json", 2, 2}
	Capture     = Format{"capture", "capture.json", 1, 1}
	Template    = Format{"template", "template.json", 0, 1} // 0: written without a version
	Memory      = Format{"memory image", "memory/header", 1, 1}
	Journal     = Format{"journal", "events", 1, 1}
	Credentials = Format{"credentials of a host", "host.json", 0, 1} // 0: written without a version
)

// All returns every format.
func All() []Format {
	return []Format{Sandbox, Capture, Template, Memory, Journal, Credentials}
}

// NewerError means that a later release wrote the data at Path. The data is not damaged,
// so it stays where it is, but this release must not use it.
type NewerError struct {
	Path string
	// Version is the version of the data, Known the newest that this release reads.
	Version, Known int
}

// Error says what the operator can do.
func (e *NewerError) Error() string {
	return fmt.Sprintf("%s has format version %d, and this release of Wrenn reads versions up to %d: a later release wrote it; nothing was changed; install that release again, see docs/upgrade.md", e.Path, e.Version, e.Known)
}

// Check returns a [NewerError] if this release is too old to read the version of the
// data at path, and another error if it is too new.
func (f Format) Check(path string, version int) error {
	if version > f.Version {
		return &NewerError{path, version, f.Version}
	}
	if version < f.Oldest {
		return fmt.Errorf("%s has format version %d, and this release of Wrenn reads versions from %d to %d", path, version, f.Oldest, f.Version)
	}
	return nil
}

// CheckJSON is [Format.Check] of the member "version" of a JSON object. Call it
// before decoding the rest, which may have another shape.
func (f Format) CheckJSON(path string, b []byte) error {
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return f.Check(path, v.Version)
}
