package sandbox

import (
	"sync"
	"testing"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// TestWarm checks that warm machines start, become sandboxes, make room for others, and
// end.
func TestWarm(t *testing.T) {
	w := newWorld(t, 1)
	w.warm = 2
	h := w.open(layout.Dir(t.TempDir()))
	defer h.close()
	first := h.create(t, nil)
	h.awaitWarm(t, 2)
	reserved, _ := h.Memory()
	started := w.count()
	second := h.create(t, nil)
	for _, s := range h.info(second).Steps {
		if s.Name == "restore" {
			t.Error("the sandbox was restored although a warm machine was ready")
		}
	}
	if got := h.counts(t, second); got != 1 {
		t.Errorf("the sandbox counted to %d", got)
	}
	h.awaitWarm(t, 2)
	if got := w.count(); got != started+1 {
		t.Errorf("%d machines were started after one was taken", got-started)
	}
	if got, _ := h.Memory(); got != reserved+128+overheadMiB {
		t.Errorf("%d MiB are reserved, before: %d", got, reserved)
	}
	// A sandbox from a warm machine is paused and resumed like any other.
	if _, err := h.Pause(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Resume(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	// A large sandbox takes the room of warm machines.
	_, total := h.Memory()
	reserved, _ = h.Memory()
	large := h.create(t, func(s *Spec) { s.MemoryMiB = total - reserved - overheadMiB })
	h.awaitWarm(t, 0)
	if err := h.Destroy(t.Context(), large); err != nil {
		t.Fatal(err)
	}
	h.awaitWarm(t, 2)
	if err := h.Destroy(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if err := h.Terminate(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.destroyAll()
	h.nothingLeft()
}

// TestWarmBesideDefault checks that warm machines of other captures start while the
// capture for most sandboxes takes long.
func TestWarmBesideDefault(t *testing.T) {
	w := newWorld(t, 1)
	w.warm, w.usual = 1, 192
	gate := make(chan struct{})
	release := sync.OnceFunc(func() { close(gate) })
	w.onStart = func(s vmm.Spec) {
		if s.MemoryMiB == w.usual {
			<-gate
		}
	}
	h := w.open(layout.Dir(t.TempDir()))
	defer h.close()
	defer release()
	h.create(t, nil)
	h.awaitWarm(t, 1)
	release()
	h.destroyAll()
}
