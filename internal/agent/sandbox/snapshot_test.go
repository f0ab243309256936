package sandbox

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/room"
)

func TestSnapshot(t *testing.T) {
	for _, paused := range []bool{false, true} {
		h := newHost(t)
		id := h.create(t, nil)
		h.counts(t, id)
		if paused {
			if _, err := h.Pause(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		tpl := uuid.New()
		for range 2 { // the second returns the existing one
			got, err := h.Snapshot(t.Context(), id, tpl, "mine", nil)
			if err != nil || got.ID != tpl || got.MemoryMiB != 128 || got.VCPUs != 1 {
				t.Fatalf("%+v %v", got, err)
			}
		}
		if paused {
			if _, err := h.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		h.runs(t, id, 1)
		h.runs(t, id, 2)
		second := h.create(t, func(s *Spec) { s.Template = tpl })
		h.runs(t, second, 1)
		if err := h.DeleteTemplate(uuid.Nil, tpl); err != nil {
			t.Fatal(err)
		}
		if err := h.DeleteTemplate(uuid.Nil, tpl); err != nil {
			t.Fatal(err)
		}
		s := spec()
		s.Template = tpl
		if _, err := h.Create(t.Context(), s); !errors.Is(err, ErrNotFound) {
			t.Errorf("create from a template that was deleted: %v", err)
		}
		// Sandboxes that started from it continue, and can be paused, captured and
		// resumed.
		if _, err := h.Pause(t.Context(), second); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Resume(t.Context(), second); err != nil {
			t.Fatal(err)
		}
		h.runs(t, second, 2)
		third := uuid.New()
		if _, err := h.Snapshot(t.Context(), second, third, "", nil); err != nil {
			t.Fatal(err)
		}
		h.destroyAll()
		// The manager releases a memory base from which nothing can start any more.
		if n := len(h.bases.known); n > 2 {
			t.Errorf("%d memory bases are kept", n)
		}
		h.nothingLeft()
		fourth := h.create(t, func(s *Spec) { s.Template = third })
		h.runs(t, fourth, 3)
		h.destroyAll()
		h.nothingLeft()
	}
}

func TestFailedSnapshotLeavesNothing(t *testing.T) {
	for _, step := range []string{"hold", "devices", "pages", "divert"} {
		t.Run(step, func(t *testing.T) {
			h := newHost(t)
			id := h.create(t, nil)
			h.counts(t, id)
			tpl := uuid.New()
			h.w.setFailing(map[string]float64{step: 1})
			if _, err := h.Snapshot(t.Context(), id, tpl, "mine", nil); !errors.Is(err, errInjected) {
				t.Fatalf("snapshot: %v", err)
			}
			h.w.setFailing(nil)
			h.runs(t, id, 1)
			if _, err := image.Find(h.dir, uuid.Nil, tpl); err == nil {
				t.Error("the failed snapshot left a template")
			}
			h.noneHidden(t)
			if _, err := h.Snapshot(t.Context(), id, tpl, "mine", nil); err != nil {
				t.Fatal(err)
			}
			h.runs(t, id, 2)
			if _, err := h.Pause(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			if _, err := h.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			h.runs(t, id, 3)
		})
	}
}

// TestFlattenWaits checks that a sandbox can be destroyed while the flattening of its disk
// waits for that of another, which hangs.
func TestFlattenWaits(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	h.flattening <- struct{}{}
	done := make(chan error, 1)
	go func() {
		_, err := h.SnapshotDisk(context.Background(), id, uuid.New(), "mine", nil, nil)
		done <- err
	}()
	// Flattening is the next step after the disks are captured.
	await.Until(t, "the disks are captured", func() bool {
		return slices.ContainsFunc(h.info(id).Steps, func(s Step) bool { return s.Name == "disks" })
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := h.Destroy(ctx, id); err != nil {
		t.Errorf("destroy: %v", err)
	}
	if err := <-done; err == nil {
		t.Error("the snapshot of a destroyed sandbox succeeded")
	}
	<-h.flattening
	h.destroyAll()
	h.nothingLeft()
}

// TestSnapshotsTogether checks that no more snapshots start at once than the disk has
// room for, and that a failed snapshot releases its room.
func TestSnapshotsTogether(t *testing.T) {
	h := newHost(t)
	one, other := h.create(t, nil), h.create(t, nil)
	const free, reserve = 300 << 20, 100 << 20 // room for the memory of one, 128 MiB
	h.room = room.New(reserve, func() (int64, error) { return free, nil })
	begun, proceed := make(chan struct{}), make(chan struct{})
	var first sync.Once
	h.Hook = func(step string) {
		if step == "snapshot: captured" {
			first.Do(func() {
				close(begun)
				<-proceed
			})
		}
	}
	done := make(chan error, 1)
	go func() {
		_, err := h.Snapshot(t.Context(), one, uuid.New(), "x", nil)
		done <- err
	}()
	<-begun
	_, err := h.Snapshot(t.Context(), other, uuid.New(), "x", nil)
	if !errors.Is(err, ErrExhausted) {
		t.Errorf("a second snapshot, with room for one: %v", err)
	}
	if _, err := h.Pause(t.Context(), other); err != nil {
		t.Errorf("a pause during a snapshot: %v", err)
	}
	close(proceed)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if left, err := h.room.Left(); left != free-reserve || err != nil {
		t.Errorf("after all have ended, %d bytes are free, want %d, %v", left, free-reserve, err)
	}
	h.w.setFailing(map[string]float64{"hold": 1})
	if _, err := h.Snapshot(t.Context(), one, uuid.New(), "x", nil); err == nil {
		t.Error("the snapshot succeeded although Hold failed")
	}
	h.w.setFailing(nil)
	if _, err := h.Snapshot(t.Context(), one, uuid.New(), "x", nil); err != nil {
		t.Errorf("after a failed snapshot: %v", err)
	}
}
