// Package ballast makes a program collect garbage less often.
//
// A Go program with a small live heap collects garbage whenever it has allocated a few
// MiB, which at some thousand requests a second means several times a second. Each
// collection delays the requests under way.
package ballast

import (
	"runtime"
	"runtime/debug"
)

// Bytes is how much more a program with ballast allocates between collections.
const Bytes = 64 << 20

var ballast []byte

// Load allocates Bytes that nobody ever touches. They count as live, but take no
// memory. A memory limit allows for them if it was set before. Call Load once.
func Load() {
	ballast = make([]byte, Bytes)
	runtime.KeepAlive(ballast) // otherwise linters report it as unused
	debug.SetMemoryLimit(raised(debug.SetMemoryLimit(-1)))
}

// raised returns a memory limit that leaves the ballast out.
func raised(limit int64) int64 {
	if limit > 1<<62 { // no limit
		return limit
	}
	return limit + Bytes
}
