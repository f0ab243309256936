package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
)

// ways are the functions that write a file, with the steps of each.
var ways = []struct {
	name  string
	write func(string, []byte, fs.FileMode) error
	steps []string
}{
	{"Write", Write, []string{"write", "sync", "rename", "sync directory"}},
	{"WriteNoSync", WriteNoSync, []string{"write", "rename"}},
	{"Create", Create, []string{"write", "sync", "link", "sync directory"}},
}

func setFault(t *testing.T, f func(step string) error) {
	t.Helper()
	old := fault
	fault = f
	t.Cleanup(func() { fault = old })
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestWrites(t *testing.T) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			var steps []string
			setFault(t, func(step string) error { steps = append(steps, step); return nil })
			path := filepath.Join(t.TempDir(), "file")
			if way.name != "Create" {
				if err := os.WriteFile(path, []byte("old and longer"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if err := way.write(path, []byte("new"), 0o600); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(path)
			if err != nil || string(b) != "new" {
				t.Fatalf("the file holds %q, %v", b, err)
			}
			if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
				t.Fatalf("the file's mode is %v, %v", info.Mode(), err)
			}
			if got := names(t, filepath.Dir(path)); len(got) != 1 {
				t.Fatalf("beside the file: %q", got)
			}
			if got, want := strings.Join(steps, ", "), strings.Join(way.steps, ", "); got != want {
				t.Fatalf("steps %s, not %s", got, want)
			}
		})
	}
}

func TestCreateOverwritesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Create(path, []byte("new"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("the error is %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "old" {
		t.Fatalf("the file holds %q", b)
	}
	if got := names(t, filepath.Dir(path)); len(got) != 1 {
		t.Fatalf("beside the file: %q", got)
	}
}

// TestEachStepFails makes each step fail in turn: the file is complete, and no temporary
// file remains.
func TestEachStepFails(t *testing.T) {
	injected := errors.New("injected")
	for _, way := range ways {
		for _, failing := range way.steps {
			t.Run(way.name+"/"+failing, func(t *testing.T) {
				setFault(t, func(step string) error {
					if step == failing {
						return injected
					}
					return nil
				})
				path := filepath.Join(t.TempDir(), "file")
				want := "old"
				if way.name == "Create" {
					want = ""
				} else if err := os.WriteFile(path, []byte(want), 0o600); err != nil {
					t.Fatal(err)
				}
				if way.name == "Write" && failing == "sync directory" {
					want = "new" // the file has its name already
				}
				if err := way.write(path, []byte("new"), 0o600); !errors.Is(err, injected) {
					t.Fatalf("the error is %v", err)
				}
				b, err := os.ReadFile(path)
				if want == "" {
					if !errors.Is(err, fs.ErrNotExist) {
						t.Fatalf("the file exists: %q, %v", b, err)
					}
				} else if err != nil || string(b) != want {
					t.Fatalf("the file holds %q, %v, not %q", b, err, want)
				}
				for _, name := range names(t, filepath.Dir(path)) {
					if name != "file" {
						t.Fatalf("%s remains", name)
					}
				}
			})
		}
	}
}

// TestWriterDies ends the writer before each step: the file is complete, and any other
// file is recognized as temporary.
func TestWriterDies(t *testing.T) {
	for _, way := range ways {
		for _, at := range way.steps {
			t.Run(way.name+"/"+at, func(t *testing.T) {
				setFault(t, func(step string) error {
					if step == at {
						runtime.Goexit()
					}
					return nil
				})
				path := filepath.Join(t.TempDir(), "file")
				if way.name != "Create" {
					if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				var wg sync.WaitGroup
				wg.Go(func() { _ = way.write(path, []byte("new"), 0o600) })
				wg.Wait()
				b, err := os.ReadFile(path)
				if s := string(b); err == nil && s != "old" && s != "new" {
					t.Fatalf("the file holds %q", s)
				}
				if err != nil && way.name != "Create" {
					t.Fatal(err)
				}
				for _, name := range names(t, filepath.Dir(path)) {
					if name != "file" && !IsTemporary(name) {
						t.Fatalf("%s is not recognized as temporary", name)
					}
				}
			})
		}
	}
}

// TestConcurrentWriters checks that concurrent writers disturb neither each other nor a
// reader.
func TestConcurrentWriters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	contents := []string{strings.Repeat("a", 1<<16), strings.Repeat("b", 1<<10)}
	if err := Write(path, []byte(contents[0]), 0o600); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, content := range contents {
		wg.Go(func() {
			for range 100 {
				if err := WriteNoSync(path, []byte(content), 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 200 {
		b, err := os.ReadFile(path)
		if err != nil || string(b) != contents[0] && string(b) != contents[1] {
			t.Fatalf("read %d bytes, %v", len(b), err)
		}
	}
	wg.Wait()
	if got := names(t, filepath.Dir(path)); len(got) != 1 {
		t.Fatalf("beside the file: %q", got)
	}
}

func TestIsTemporary(t *testing.T) {
	for name, want := range map[string]bool{
		".sandbox.json.tmp-123": true, ".x.tmp-": true, "sandbox.json": false, "sandbox.json.tmp-1": false, ".hidden": false,
	} {
		if IsTemporary(name) != want {
			t.Errorf("IsTemporary(%q) is %v", name, !want)
		}
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := Sweep(filepath.Join(dir, "none", "file")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", ".file.tmp-1", ".file.tmp-2", ".file.old.tmp-1", ".other.tmp-1", ".hidden"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// A file that cannot be removed does not keep the others.
	if err := os.MkdirAll(filepath.Join(dir, ".file.tmp-0", "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(path); err == nil {
		t.Error("the error does not name what is left")
	}
	if got, want := strings.Join(names(t, dir), " "), ".file.old.tmp-1 .file.tmp-0 .hidden .other.tmp-1 file"; got != want {
		t.Errorf("left %s, not %s", got, want)
	}
	if err := errors.Join(os.RemoveAll(filepath.Join(dir, ".file.tmp-0")), SweepDir(dir)); err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(names(t, dir), " "), ".hidden file"; got != want {
		t.Errorf("left %s, not %s", got, want)
	}
}
