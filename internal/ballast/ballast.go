// Package ballast makes a program collect garbage less often.
//
// A Go program whose live heap is small collects garbage whenever it has allocated a
// few MiB: with some thousand requests a second, several times a second. Each collection
// delays the requests that are under way.
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
	runtime.KeepAlive(ballast) // Linters take what nobody reads for unused.
	debug.SetMemoryLimit(raised(debug.SetMemoryLimit(-1)))
}

// raised returns a memory limit that leaves the ballast out.
func raised(limit int64) int64 {
	if limit > 1<<62 { // There is none.
		return limit
	}
	return limit + Bytes
}
