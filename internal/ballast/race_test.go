//go:build race

package ballast

// race says that the race detector runs, which has memory for every byte of the heap.
const race = true
