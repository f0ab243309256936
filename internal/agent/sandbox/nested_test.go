package sandbox

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// nests reports whether a sandbox's machine lets its guest run VMs.
func (h *host) nests(t *testing.T, sandbox uuid.UUID) bool {
	t.Helper()
	h.mu.Lock()
	home := h.sandboxes[sandbox].rec.Home
	h.mu.Unlock()
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	return h.w.Nested(h.w.vms[home].kind)
}

// TestNestedTeams checks that only guests of the configured teams may run VMs, that this never
// changes for a sandbox, and that its saved state starts only while its team may run VMs.
func TestNestedTeams(t *testing.T) {
	ours, theirs := uuid.New(), uuid.New()
	w := newWorld(t, 1)
	w.warm, w.nested = 1, []Team{Team(ours)}
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	of := func(team uuid.UUID) func(*Spec) { return func(s *Spec) { s.Team = team } }
	var first, other uuid.UUID
	for range 2 { // the second may take a warm machine
		other, first = h.create(t, of(theirs)), h.create(t, of(ours))
		if h.nests(t, other) || !h.nests(t, first) {
			t.Errorf("nested: %v for the other team, %v for the configured one", h.nests(t, other), h.nests(t, first))
		}
	}
	if _, err := h.Pause(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Resume(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	fork := Copy{ID: uuid.New(), Token: "fork"}
	if _, err := h.Fork(t.Context(), first, []Copy{fork}); err != nil {
		t.Fatal(err)
	}
	if !h.nests(t, first) || !h.nests(t, fork.ID) {
		t.Error("a resumed sandbox, or its fork, has another kind of machine")
	}
	template, err := h.Snapshot(t.Context(), first, uuid.New(), "snapshot", nil)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := h.Snapshot(t.Context(), other, uuid.New(), "plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	ofTemplate := func(team, template uuid.UUID) func(*Spec) {
		return func(s *Spec) { s.Team, s.Template, s.VCPUs, s.MemoryMiB = team, template, 0, 0 }
	}
	if !h.nests(t, h.create(t, ofTemplate(ours, template.ID))) || h.nests(t, h.create(t, ofTemplate(theirs, plain.ID))) {
		t.Error("a snapshot's sandbox has another kind of machine")
	}
	if _, err := h.Pause(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	h.close()

	// Once the host no longer allows nesting, no sandbox with it starts again.
	w.nested = nil
	h = w.open(dir)
	if _, err := h.Resume(t.Context(), first); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "nested") {
		t.Errorf("resume without nesting: %v", err)
	}
	s := spec()
	ofTemplate(ours, template.ID)(&s)
	if _, err := h.Create(t.Context(), s); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "nested") {
		t.Errorf("create without nesting: %v", err)
	}
	if h.nests(t, h.create(t, of(ours))) {
		t.Error("a new sandbox may run VMs")
	}
	h.close()

	w.nested = []Team{Team(ours)}
	h = w.open(dir)
	defer h.close()
	if _, err := h.Resume(t.Context(), first); err != nil {
		t.Error(err)
	}
	h.destroyAll()
}

func TestTeamSetting(t *testing.T) {
	want := uuid.New()
	var got Team
	if err := got.UnmarshalText([]byte(id.Format(id.Team, want))); err != nil || uuid.UUID(got) != want {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", want.String(), id.Format(id.Sandbox, want)} {
		if err := got.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q was accepted as a team", bad)
		}
	}
}
