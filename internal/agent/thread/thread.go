// Package thread runs functions on operating system threads of their own.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Own runs f on a thread that ends afterwards, with whatever f did to it, such as
// to its namespaces or its user.
func Own(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and /proc/self shows its namespaces.
			done <- Own(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}
