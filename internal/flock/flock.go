// Package flock locks files and directories against other processes with flock(2). The
// kernel releases a lock when its file is closed or its process ends.
package flock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrLocked means that another process, or another file of this one, has the
// lock.
var ErrLocked = errors.New("locked by another process")

// TryLock opens path, or creates a file there, and locks it. If path is locked, the error
// is [ErrLocked]. Closing the file releases the lock.
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

// Lock is like [TryLock], but waits while path is locked, until ctx is done.
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
		// flock cannot be interrupted, so the file is closed when it gets the lock.
		go func() { <-got; f.Close() }()
		return nil, fmt.Errorf("lock %s: %w", path, context.Cause(ctx))
	}
}

// Held reports whether some process has a lock on path. It does not try to lock it,
// which could keep another process from doing so.
func Held(path string) (bool, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("check lock on %s: %w", path, err)
	}
	all, err := os.ReadFile("/proc/locks")
	if err != nil {
		return false, fmt.Errorf("check lock on %s: %w", path, err)
	}
	// The device is left out: for some file systems it is not that of stat(2).
	inode := ":" + strconv.FormatUint(st.Ino, 10)
	for line := range strings.Lines(string(all)) {
		// 1: FLOCK ADVISORY WRITE 123 fe:00:456 0 EOF
		f := strings.Fields(line)
		if len(f) > 5 && f[1] == "FLOCK" && strings.HasSuffix(f[5], inode) {
			return true, nil
		}
	}
	return false, nil
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
