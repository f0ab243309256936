// Package flock keeps other processes out of a file or a directory with
// flock(2). The kernel removes a lock when its file is closed, or its process
// ends.
package flock

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrLocked means that another process, or another file of this one, has the
// lock.
var ErrLocked = errors.New("locked by another process")

// TryLock opens path, creates a file if nothing exists, and locks it. If it is
// locked, the error is an [ErrLocked]. Closing the file removes the lock.
func TryLock(path string) (*os.File, error) {
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	err = lock(f, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrLocked
	}
	return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
}

// Lock is [TryLock], but waits while path is locked, until ctx is done.
func Lock(ctx context.Context, path string) (*os.File, error) {
	f, err := TryLock(path)
	if !errors.Is(err, ErrLocked) {
		return f, err
	}
	if f, err = open(path); err != nil {
		return nil, err
	}
	got := make(chan error, 1)
	go func() { got <- lock(f, unix.LOCK_EX) }()
	select {
	case err = <-got:
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		return f, nil
	case <-ctx.Done():
		// Nothing interrupts flock: the file is closed once it has the lock.
		go func() { <-got; f.Close() }()
		return nil, fmt.Errorf("lock %s: %w", path, context.Cause(ctx))
	}
}

func open(path string) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return os.Open(path)
	}
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
}

func lock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
