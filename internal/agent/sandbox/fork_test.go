package sandbox

import (
	"fmt"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/layout"
)

func TestFork(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	h.counts(t, id)
	copies := []Copy{{uuid.New(), "a"}, {uuid.New(), "b"}, {uuid.New(), "c"}}
	infos, err := h.Fork(t.Context(), id, copies)
	if err != nil || len(infos) != 3 {
		t.Fatalf("%v %v", infos, err)
	}
	h.runs(t, id, 1)
	for i, c := range copies {
		if infos[i].ID != c.ID || infos[i].State != Running {
			t.Errorf("%+v", infos[i])
		}
		h.runs(t, c.ID, 1)
	}
	h.noneHidden(t)
	// A fork is an ordinary sandbox.
	if err := h.Destroy(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Pause(t.Context(), copies[0].ID); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Resume(t.Context(), copies[0].ID); err != nil {
		t.Fatal(err)
	}
	h.runs(t, copies[0].ID, 2)
	// Fork creates all copies or none.
	h.w.setFailing(map[string]float64{"restore": .5})
	for range 8 {
		more := []Copy{{uuid.New(), "d"}, {uuid.New(), "e"}, {uuid.New(), "f"}}
		_, err := h.Fork(t.Context(), copies[0].ID, more)
		for _, c := range more {
			if _, e := h.Get(c.ID); (e == nil) != (err == nil) {
				t.Errorf("Fork returned %v, but Get of a copy returned %v", err, e)
			}
			_ = h.Destroy(t.Context(), c.ID)
		}
	}
	h.w.setFailing(nil)
	h.noneHidden(t)
	h.runs(t, copies[0].ID, 3)
	h.destroyAll()
	h.nothingLeft()
}

// TestForkShares checks that forks share the memory layers below the sandbox, unless one
// new memory image for all of them takes less space.
func TestForkShares(t *testing.T) {
	for _, test := range []struct {
		name    string
		tracks  bool
		changed bool
		copies  int
		shares  bool
	}{
		{name: "unchanged", copies: 3, shares: true},
		{name: "changed, one copy", tracks: true, changed: true, copies: 1, shares: true},
		{name: "changed, one copy, not tracked", changed: true, copies: 1},
		{name: "changed, three copies", tracks: true, changed: true, copies: 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, 1)
			w.tracks = test.tracks
			h := w.open(layout.Dir(t.TempDir()))
			id := h.create(t, nil)
			var n byte
			if test.changed { // adds three times as many pages as the template has
				n = h.counts(t, id)
			}
			copies := make([]Copy, test.copies)
			for i := range copies {
				copies[i] = Copy{uuid.New(), fmt.Sprint(i)}
			}
			if _, err := h.Fork(t.Context(), id, copies); err != nil {
				t.Fatal(err)
			}
			parent, err := h.find(id)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range copies {
				inst, err := h.find(c.ID)
				if err != nil {
					t.Fatal(err)
				}
				if shares := inst.base == parent.base; shares != test.shares {
					t.Errorf("a fork shares its origin's memory: %v", shares)
				}
				h.runs(t, c.ID, n)
			}
			if err := h.Destroy(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			// The shared memory survives the origin's end, and the fork can be paused.
			for _, c := range copies {
				n := h.counts(t, c.ID)
				if _, err := h.Pause(t.Context(), c.ID); err != nil {
					t.Fatal(err)
				}
				if _, err := h.Resume(t.Context(), c.ID); err != nil {
					t.Fatal(err)
				}
				h.runs(t, c.ID, n)
			}
			h.destroyAll()
			h.nothingLeft()
			h.close()
		})
	}
}
