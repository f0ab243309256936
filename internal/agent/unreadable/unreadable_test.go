package unreadable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/layout"
)

func TestMove(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	if got, err := List(dir); err != nil || len(got) != 0 {
		t.Fatalf("an installation without such data has %v, %v", got, err)
	}
	from := filepath.Join(string(dir), "thing")
	for range 2 { // two with one name
		if err := os.MkdirAll(filepath.Join(from, "inside"), 0o700); err != nil {
			t.Fatal(err)
		}
		item, err := Move(dir, Sandbox, from, errors.New("broken"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(item.Path, "inside")); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(from); err == nil {
			t.Fatal("it is still where it was")
		}
	}
	got, err := List(dir)
	if err != nil || len(got) != 2 || got[0].Path == got[1].Path {
		t.Fatalf("listed %+v, %v", got, err)
	}
	for _, i := range got {
		if i.Kind != Sandbox || i.From != from || i.Reason != "broken" || i.Time.IsZero() {
			t.Errorf("listed %+v", i)
		}
	}
	// A damaged note hides nothing.
	if err := os.WriteFile(got[0].Path+noteSuffix, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if again, err := List(dir); err != nil || len(again) != 2 || again[0].Kind != Sandbox {
		t.Fatalf("listed %+v, %v", again, err)
	}
}

func TestMoveNothing(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	if _, err := Move(dir, Template, filepath.Join(string(dir), "none"), errors.New("broken")); err == nil {
		t.Fatal("moved what does not exist")
	}
	if entries, err := os.ReadDir(dir.Unreadable()); err != nil || len(entries) != 0 {
		t.Fatalf("left %v, %v", entries, err)
	}
}

// TestPassing: only some errors of reading say something about what is on disk.
func TestPassing(t *testing.T) {
	for err, want := range map[error]bool{
		syscall.EMFILE: true, syscall.ENFILE: true, syscall.EIO: true, syscall.ENOMEM: true, syscall.EACCES: true,
		syscall.ENOENT: false, syscall.EISDIR: false, syscall.ENOTDIR: false, errors.New("it is torn"): false,
	} {
		if got := Passing(fmt.Errorf("read: %w", &fs.PathError{Op: "read", Path: "x", Err: err})); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}
