package agent

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
}

// TestRefusesNewerData checks that an agent does not start on data of a later release,
// and changes nothing.
func TestRefusesNewerData(t *testing.T) {
	const newer = `{"version": 1000, "other": {"new": "shape"}}`
	team, template, home := uuid.New(), uuid.New(), uuid.New()
	for name, path := range map[string]func(layout.Dir) string{
		"sandbox":  func(d layout.Dir) string { return d.SandboxRecord(home) },
		"origin":   func(d layout.Dir) string { return filepath.Join(d.SandboxOrigin(home), "capture.json") },
		"template": func(d layout.Dir) string { return filepath.Join(d.Template(team, template), "template.json") },
		"journal":  func(d layout.Dir) string { return d.Events() },
	} {
		t.Run(name, func(t *testing.T) {
			dir := layout.Dir(t.TempDir())
			text := newer
			if name == "journal" {
				text = "wrnjrnl2"
			}
			put(t, path(dir), text)
			// Unreadable data must stay too, until somebody decides what to do.
			put(t, dir.SandboxRecord(uuid.New()), "{")
			before := list(t, dir)
			_, err := New(t.Context(), Config{Dir: dir, Token: "token", Log: slog.New(slog.DiscardHandler)})
			var e *format.NewerError
			if !errors.As(err, &e) || e.Path != path(dir) || e.Version <= e.Known {
				t.Fatalf("the error is %v", err)
			}
			for _, says := range []string{e.Path, "nothing was changed", "docs/upgrade.md"} {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("%q does not say %q", err, says)
				}
			}
			if after := list(t, dir); after != before {
				t.Errorf("before: %s, after: %s", before, after)
			}
		})
	}
}

// list lists all files, except those of running processes.
func list(t *testing.T, dir layout.Dir) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(string(dir), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path == dir.Run() {
			return fs.SkipDir
		}
		text := ""
		if !d.IsDir() {
			var content []byte
			content, err = os.ReadFile(path)
			text = string(content)
		}
		b.WriteString(path + " " + text + "\n")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestUnreadableIsReported checks that the agent reports an unreadable template for as
// long as it keeps it.
func TestUnreadableIsReported(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	log := slog.New(slog.DiscardHandler)
	path := filepath.Join(t.TempDir(), "problems")
	problems := problem.Open(path, log)
	a := &Agent{cfg: Config{Dir: dir}, log: log, problems: problems}
	broken := dir.Template(uuid.New(), uuid.New())
	put(t, filepath.Join(broken, "template.json"), "{")

	// A running agent leaves it where it is.
	if all, err := a.templates(); err != nil || len(all) != 0 {
		t.Fatalf("the templates are %v, %v", all, err)
	}
	reported := problems.All()
	if len(reported) != 1 || reported[0].Kind != problem.Unreadable || !strings.Contains(reported[0].Message, broken) {
		t.Errorf("reported %+v", reported)
	}
	// The next start sets it aside. If that fails, the agent starts anyway.
	put(t, dir.Unreadable(), "a file")
	if err := errors.Join(a.setAside(), os.Remove(dir.Unreadable())); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.setAside(), a.reportUnreadable()); err != nil {
		t.Fatal(err)
	}
	if _, err := a.templates(); err != nil {
		t.Fatal(err)
	}
	reported = problems.All()
	if len(reported) != 1 || reported[0].Object != string(unreadable.Template) || !strings.Contains(reported[0].Message, dir.Unreadable()) {
		t.Errorf("then reported %+v", reported)
	}
	items, err := unreadable.List(dir)
	if err != nil || len(items) != 1 || items[0].From != broken {
		t.Fatalf("set aside %+v, %v", items, err)
	}
	if err := errors.Join(os.RemoveAll(items[0].Path), a.reportUnreadable()); err != nil {
		t.Fatal(err)
	}
	if reported := problems.All(); len(reported) != 0 {
		t.Errorf("at last reported %+v", reported)
	}
}

// TestSweep checks that an agent removes the temporary files of a killed one, and nothing
// else.
func TestSweep(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	a := &Agent{cfg: Config{Dir: dir}, log: slog.New(slog.DiscardHandler)}
	var all []string
	for _, path := range []string{dir.Events(), dir.Problems(), dir.NetworkBlock(), dir.Enrollment(), filepath.Join(dir.Unreadable(), "sandbox-x.note")} {
		put(t, path, "")
		all = append(all, path, filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".tmp-1"))
		put(t, all[len(all)-1], "")
	}
	other := filepath.Join(string(dir), ".secrets.json.tmp-1") // another program may be writing it
	put(t, other, "")
	a.sweep()
	for i, path := range append(all, other) {
		if _, err := os.Stat(path); (err == nil) != (i%2 == 0) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestUnreadableForNow checks that the agent does not move a template that it cannot read
// at the moment, for example because of a failing disk.
func TestUnreadableForNow(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	log := slog.New(slog.DiscardHandler)
	problems := problem.Open(filepath.Join(t.TempDir(), "problems"), log)
	a := &Agent{cfg: Config{Dir: dir}, log: log, problems: problems}
	path := filepath.Join(dir.Template(uuid.New(), uuid.New()), "template.json")
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.Symlink(path, path)); err != nil {
		t.Fatal(err)
	}
	if err := a.setAside(); err != nil {
		t.Fatal(err)
	}
	if items, err := unreadable.List(dir); err != nil || len(items) != 0 {
		t.Errorf("set aside %+v, %v", items, err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
	if _, err := a.templates(); err != nil || len(problems.All()) != 1 {
		t.Errorf("the problems are %+v, %v", problems.All(), err)
	}
}
