package sandbox

import (
	"sync"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// TestWarm: machines wait, become sandboxes, make room, and end.
func TestWarm(t *testing.T) {
	w := newWorld(t, 1)
	w.warm = 2
	h := w.open(layout.Dir(t.TempDir()))
	defer h.close()
	first := h.create(t, nil)
	h.waits(t, 2)
	reserved, _ := h.Memory()
	started := w.count()
	second := h.create(t, nil)
	for _, s := range h.info(second).Steps {
		if s.Name == "restore" {
			t.Error("it was restored though a machine waited")
		}
	}
	if got := h.counts(t, second); got != 1 {
		t.Errorf("it counted to %d", got)
	}
	h.waits(t, 2)
	if got := w.count(); got != started+1 {
		t.Errorf("%d machines were made after one was taken", got-started)
	}
	if got, _ := h.Memory(); got != reserved+128+overheadMiB {
		t.Errorf("%d MiB are reserved, %d were before", got, reserved)
	}
	// What was a machine that waited is paused and resumed like any other.
	if _, err := h.Pause(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Resume(t.Context(), second); err != nil {
		t.Fatal(err)
	}
	// One that is large takes the room of those that wait.
	_, total := h.Memory()
	reserved, _ = h.Memory()
	large := h.create(t, func(s *Spec) { s.MemoryMiB = total - reserved - overheadMiB })
	h.waits(t, 0)
	if err := h.Destroy(t.Context(), large); err != nil {
		t.Fatal(err)
	}
	h.waits(t, 2)
	if err := h.Destroy(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if err := h.Terminate(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.destroyAll()
	h.nothingLeft()
}

// TestWarmBesideDefault has the capture that most sandboxes will begin with take
// long: machines of other captures wait all the same.
func TestWarmBesideDefault(t *testing.T) {
	w := newWorld(t, 1)
	w.warm, w.usual = 1, 192
	held := make(chan struct{})
	let := sync.OnceFunc(func() { close(held) })
	w.onStart = func(s vmm.Spec) {
		if s.MemoryMiB == w.usual {
			<-held
		}
	}
	h := w.open(layout.Dir(t.TempDir()))
	defer h.close()
	defer let()
	h.create(t, nil)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		h.mu.Lock()
		n := len(h.warm.ready)
		h.mu.Unlock()
		if n == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Error("no machine waits")
			break
		}
	}
	let()
	h.destroyAll()
}
