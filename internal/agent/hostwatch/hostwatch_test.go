package hostwatch

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWatch(t *testing.T) {
	changed := make(chan struct{}, 1)
	w, err := Open(false, func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	noticed := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-changed:
		case <-time.After(time.Minute):
			t.Fatalf("not noticed: %s", what)
		}
	}
	dir := filepath.Join(t.TempDir(), "a")
	for range 2 {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := w.Add(dir); err != nil {
			t.Fatal(err)
		}
		noticed("a new file", os.WriteFile(filepath.Join(dir, "f"), nil, 0o644))
		noticed("a name that changes", os.Rename(filepath.Join(dir, "f"), filepath.Join(dir, "g")))
		noticed("a file that goes", os.Remove(filepath.Join(dir, "g")))
		noticed("a folder that goes", os.Remove(dir))
	}
	if w.Add(dir) == nil {
		t.Error("watches a folder that is not there")
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

// TestExhausted checks that a watch of mounts opens even if other software uses every
// inotify instance.
func TestExhausted(t *testing.T) {
	real := inotifyInit
	inotifyInit = func(int) (int, error) { return -1, unix.EMFILE }
	defer func() { inotifyInit = real }()
	w, err := Open(true, func() {})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Add(t.TempDir()); !errors.Is(err, ErrExhausted) {
		t.Errorf("the folder is watched: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
}

func TestMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends in its namespace
		result <- func() error {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			changed := make(chan struct{}, 1)
			w, err := Open(true, func() {
				select {
				case changed <- struct{}{}:
				default:
				}
			})
			if err != nil {
				return err
			}
			defer w.Close()
			// Repeat it: each change must be reported once, to the first watch that reads
			// it.
			for range 50 {
				for _, change := range []func() error{
					func() error { return unix.Mount(dir, dir, "", unix.MS_BIND, "") },
					func() error { return unix.Unmount(dir, 0) },
				} {
					if err := change(); err != nil {
						return err
					}
					select {
					case <-changed:
					case <-time.After(time.Minute):
						return errors.New("a mount was not noticed")
					}
				}
			}
			return nil
		}()
	}()
	if err := <-result; err != nil {
		t.Fatal(err)
	}
}
