package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/condition"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

func TestNextAgentTakesBack(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	keep, lost := spec(), spec()
	keep.Timeout = time.Hour
	for _, s := range []Spec{keep, lost} {
		if _, err := h.Create(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	before := h.info(keep.ID)
	if slots := h.close(); len(slots) != 2 {
		t.Errorf("slots %v are in use", slots)
	}
	w.vms[lost.ID].die()
	// A killed agent can leave folders like these.
	bare := uuid.New()
	if err := os.Mkdir(dir.Sandbox(bare), 0o700); err != nil {
		t.Fatal(err)
	}
	torn := uuid.New()
	if err := os.Mkdir(dir.Sandbox(torn), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir.SandboxRecord(torn), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}

	h = w.open(dir)
	defer h.close()
	for _, id := range []uuid.UUID{bare, torn} {
		h.awaitGone(t, id)
	}
	if e := h.event(t, lost.ID); e.Kind != journal.Paused {
		t.Errorf("event %+v", e)
	}
	if i := h.info(lost.ID); i.State != Paused || i.Condition == nil || i.Condition.Reason != condition.Killed {
		t.Errorf("the sandbox whose machine ended is %+v", i)
	}
	after := h.info(keep.ID)
	if after.State != Running || after.ID != before.ID || after.MemoryMiB != before.MemoryMiB || !after.CreatedAt.Equal(before.CreatedAt) || after.ExpiresAt.IsZero() {
		t.Errorf("taken back as %+v, before: %+v", after, before)
	}
	u, err := h.Use(t.Context(), keep.ID)
	if err != nil {
		t.Fatal(err)
	}
	u.End()
	h.destroyAll()
	h.nothingLeft()
}

func TestNextAgentTakesBackPaused(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	paused, held := h.create(t, nil), h.create(t, nil)
	h.counts(t, paused)
	h.counts(t, held)
	if _, err := h.Pause(t.Context(), paused); err != nil {
		t.Fatal(err)
	}
	h.close()
	vm := w.vms[held]
	_ = vm.Hold(t.Context()) // like an agent that was killed in a pause
	stray := filepath.Join(dir.Sandbox(paused), "saved-"+uuid.NewString())
	if err := os.Mkdir(stray, 0o700); err != nil {
		t.Fatal(err)
	}
	h = w.open(dir)
	defer h.close()
	h.runs(t, held, 1)
	if _, err := os.Stat(stray); err == nil {
		t.Error("a killed agent's unfinished files are left")
	}
	if got := h.info(paused).State; got != Paused {
		t.Fatalf("the paused sandbox is %s", got)
	}
	if _, err := h.Resume(t.Context(), paused); err != nil {
		t.Fatal(err)
	}
	h.runs(t, paused, 1)
	h.destroyAll()
	h.nothingLeft()
}

func TestTerminatePauses(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	id := h.create(t, nil)
	h.counts(t, id)
	if err := h.Terminate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if e := h.event(t, id); e.Kind != journal.Paused {
		t.Errorf("event %+v", e)
	}
	if _, err := h.Resume(t.Context(), id); !errors.Is(err, ErrClosing) {
		t.Errorf("resume of a host that shuts down: %v", err)
	}
	if len(w.vms) != 0 || len(w.slots) != 0 {
		t.Errorf("machines %v and slots %v are left", w.vms, w.slots)
	}
	h.close()
	h = w.open(dir)
	defer h.close()
	if _, err := h.Resume(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	h.runs(t, id, 1)
}

// TestTerminateDuringDestroy shuts the host down while a caller destroys a sandbox. The
// sandbox's failed pause must not be an error then.
func TestTerminateDuringDestroy(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	h.w.setFailing(map[string]float64{"devices": 1}) // the pause fails too
	ended := make(chan error, 1)
	h.Hook = func(step string) {
		if step != "pause: held" {
			return
		}
		go func() { ended <- h.Destroy(context.Background(), id) }()
		await.Until(t, "the sandbox is stopping", func() bool { return h.info(id).State == Stopping })
	}
	if err := h.Terminate(t.Context()); err != nil {
		t.Errorf("terminate: %v", err)
	}
	if err := <-ended; err != nil {
		t.Errorf("destroy: %v", err)
	}
	h.nothingLeft()
}
