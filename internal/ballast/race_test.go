//go:build race

package ballast

// race reports that the race detector runs, which needs memory for every byte of the
// heap.
const race = true
