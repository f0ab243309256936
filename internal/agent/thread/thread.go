// Package thread runs functions on dedicated operating system threads.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Own runs f on a new thread and returns its error. The thread ends afterwards, so f
// may change its namespaces or its user without undoing that.
func Own(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// Not on the main thread: it cannot end, and /proc/self shows its namespaces.
			done <- Own(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}
