package flock

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestLock(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{dir, filepath.Join(dir, "file")} {
		f, err := TryLock(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := TryLock(path); !errors.Is(err, ErrLocked) {
			t.Errorf("locked twice: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		waiting := make(chan error, 1)
		go func() {
			_, err := Lock(ctx, path)
			waiting <- err
		}()
		cancel()
		if err := <-waiting; !errors.Is(err, context.Canceled) {
			t.Errorf("it waited, and got %v", err)
		}
		got := make(chan *os.File, 1)
		go func() {
			f, err := Lock(t.Context(), path)
			if err != nil {
				t.Error(err)
			}
			got <- f
		}()
		select {
		case <-got:
			t.Fatal("locked twice")
		default:
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		// Neither a cancelled waiter nor one that waits keeps the lock.
		if err := (<-got).Close(); err != nil {
			t.Fatal(err)
		}
		last, err := Lock(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		last.Close()
	}
}

func TestKeepsContent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := TryLock(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := os.ReadFile(path); err != nil || string(b) != "content" {
		t.Errorf("the file holds %q, %v", b, err)
	}
}

// TestProcessDies checks that a lock ends with its process.
func TestProcessDies(t *testing.T) {
	path := os.Getenv("FLOCK_TEST")
	if path != "" { // this is the process
		if _, err := TryLock(path); err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("locked\n")
		select {}
	}
	path = filepath.Join(t.TempDir(), "file")
	cmd := exec.Command(os.Args[0], "-test.run=^TestProcessDies$")
	cmd.Env = append(os.Environ(), "FLOCK_TEST="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	if _, err := out.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	if _, err := TryLock(path); !errors.Is(err, ErrLocked) {
		t.Fatalf("locked twice: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	f, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

func TestHeld(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	held := func(want bool) {
		t.Helper()
		if got, err := Held(path); err != nil || got != want {
			t.Errorf("held: %v, %v", got, err)
		}
	}
	held(false)
	f, err := TryLock(path)
	if err != nil {
		t.Fatal(err)
	}
	held(true)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	held(false)
}
