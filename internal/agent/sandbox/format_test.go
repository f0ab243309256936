package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/disk"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// otherFormat is another driver's format: qcow2 under another name.
type otherFormat struct{ disk.Format }

func (otherFormat) Name() string { return "other" }

// TestDiskFormat checks that a sandbox's disk keeps the format of the driver that created
// it, even under an agent whose driver has another.
func TestDiskFormat(t *testing.T) {
	w := newWorld(t, 1)
	w.format = otherFormat{disk.Qcow2}
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	id := h.create(t, nil)
	h.counts(t, id)
	snapshot := func() error {
		_, err := h.Snapshot(t.Context(), id, uuid.New(), "snapshot", nil)
		return err
	}
	if err := snapshot(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Pause(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	h.close()
	files := []string{"disk-0.other", "disk-1.other", "origin/layer-0.other"}
	look := func() {
		t.Helper()
		for _, name := range files {
			if _, err := os.Stat(filepath.Join(dir.Sandbox(id), name)); err != nil {
				t.Error(err)
			}
		}
		if found, err := filepath.Glob(filepath.Join(dir.Sandbox(id), "*.qcow2")); err != nil || len(found) > 0 {
			t.Errorf("the folder has %q, %v", found, err)
		}
	}
	look()

	w.format = nil
	h = w.open(dir)
	look()
	if err := snapshot(); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "format other") {
		t.Errorf("snapshot under another driver: %v", err)
	}
	h.close()
	look()

	w.format = otherFormat{disk.Qcow2}
	h = w.open(dir)
	defer h.close()
	if _, err := h.Resume(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	h.runs(t, id, 1)
	look()
	h.destroyAll()
}
