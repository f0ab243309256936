package sandbox

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/layout"
)

// modules returns the path of the kernel modules that a sandbox's machine has.
func (h *host) modules(t *testing.T, sandbox uuid.UUID) string {
	t.Helper()
	h.mu.Lock()
	home := h.sandboxes[sandbox].rec.Home
	h.mu.Unlock()
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	return h.w.vms[home].spec.Modules
}

// TestModules checks that a machine has the modules of the kernel in its saved memory,
// even if the host has another kernel by now, and that the file belongs to the host.
func TestModules(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	same := func(what, path, want string) {
		t.Helper()
		a, err := os.Stat(path)
		b, e := os.Stat(want)
		if err := errors.Join(err, e); err != nil || !os.SameFile(a, b) {
			t.Errorf("%s has other modules: %v", what, err)
		}
	}
	kernel := func(name string) string {
		path := filepath.Join(dir.Kernels(), name)
		if err := errors.Join(os.MkdirAll(dir.Kernels(), 0o755), os.WriteFile(path, bytes.Repeat([]byte(name), 1<<20), 0o444)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pauseAndResume := func(h *host, id uuid.UUID) {
		t.Helper()
		if _, err := h.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}

	// An earlier release had no modules.
	h := w.open(dir)
	none := h.create(t, nil)
	h.close()

	old := kernel("old")
	w.modules = old
	h = w.open(dir)
	pauseAndResume(h, none)
	if got := h.modules(t, none); got != "" {
		t.Errorf("a sandbox of a release without modules has the modules %s", got)
	}
	first := h.create(t, nil)
	same("a sandbox", h.modules(t, first), old)
	for _, s := range h.Samples() {
		if s.DiskBytes >= 1<<20 {
			t.Errorf("a sandbox takes %d bytes, so the modules count for it", s.DiskBytes)
		}
	}
	snapshot, err := h.Snapshot(t.Context(), first, uuid.New(), "snapshot", nil)
	if err != nil {
		t.Fatal(err)
	}
	if snapshot.SizeBytes >= 3<<20 {
		t.Errorf("a snapshot takes %d bytes, so the modules count for it", snapshot.SizeBytes)
	}
	h.close()

	// Install a newer kernel; the host removes the older one's files.
	kept := filepath.Join(string(dir), "kept")
	if err := os.Rename(old, kept); err != nil {
		t.Fatal(err)
	}
	w.modules = kernel("new")
	h = w.open(dir)
	defer h.close()
	pauseAndResume(h, first)
	same("a sandbox with the old kernel", h.modules(t, first), kept)
	team := h.info(first).Team
	same("a sandbox of a snapshot with the old kernel", h.modules(t, h.create(t, func(s *Spec) {
		s.Team, s.Template, s.VCPUs, s.MemoryMiB = team, snapshot.ID, 0, 0
	})), kept)
	fork := Copy{ID: uuid.New(), Token: "fork"}
	if _, err := h.Fork(t.Context(), first, []Copy{fork}); err != nil {
		t.Fatal(err)
	}
	same("a fork of a sandbox with the old kernel", h.modules(t, fork.ID), kept)
	same("a new sandbox", h.modules(t, h.create(t, nil)), w.modules)

	h.destroyAll()
}
