package sandbox

import (
	"maps"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// limited checks the rates of a sandbox's machine and network.
func (h *host) limited(t *testing.T, when string, sandbox uuid.UUID, want rates.Rates) {
	t.Helper()
	h.mu.Lock()
	home := h.sandboxes[sandbox].rec.Home
	h.mu.Unlock()
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	vm := h.w.vms[home]
	if vm == nil {
		t.Fatalf("%s: the sandbox has no machine", when)
	}
	if vm.spec.Rates != want {
		t.Errorf("%s: its machine has the rates %+v, not %+v", when, vm.spec.Rates, want)
	}
	for _, s := range h.w.slots {
		if s.NetNS() == vm.spec.NetNS && s.rates != want {
			t.Errorf("%s: its network has the rates %+v, not %+v", when, s.rates, want)
		}
	}
}

// limitedForLife pauses, resumes, forks and captures a sandbox, and restarts the agent.
// It checks that the sandbox and its fork always have the rates own, and that a sandbox of
// the snapshot has the rates ofSnapshot. It closes the host.
func (h *host) limitedForLife(t *testing.T, sandbox uuid.UUID, own, ofSnapshot rates.Rates) {
	t.Helper()
	if _, err := h.Pause(t.Context(), sandbox); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Resume(t.Context(), sandbox); err != nil {
		t.Fatal(err)
	}
	h.limited(t, "resumed", sandbox, own)
	fork := Copy{ID: uuid.New(), Token: "fork"}
	if _, err := h.Fork(t.Context(), sandbox, []Copy{fork}); err != nil {
		t.Fatal(err)
	}
	h.limited(t, "forked", sandbox, own)
	h.limited(t, "a fork", fork.ID, own)
	template, err := h.Snapshot(t.Context(), sandbox, uuid.New(), "snapshot", nil)
	if err != nil {
		t.Fatal(err)
	}
	h.close()
	h = h.w.open(h.dir)
	h.limited(t, "taken back", sandbox, own)
	h.limited(t, "a fork, taken back", fork.ID, own)
	other := h.create(t, func(s *Spec) { s.Team, s.Template = template.Team, template.ID })
	h.limited(t, "of a snapshot", other, ofSnapshot)
	h.destroyAll()
	h.close()
}

// TestTemplateRates checks that a sandbox keeps the rates of its template, or the host's,
// for life: after a pause and the agent's restart, as a fork and as a snapshot's sandbox.
func TestTemplateRates(t *testing.T) {
	for _, warm := range []int{0, 1} {
		w := newWorld(t, 1)
		w.warm = warm
		w.rates = rates.Rates{DiskOps: 100, NetPackets: 1000, Burst: time.Second}
		w.special = rates.Templates{uuid.Nil: {"disk_ops": 7}}
		own := w.rates
		own.DiskOps = 7
		h := w.open(layout.Dir(t.TempDir()))
		var first uuid.UUID
		for range 2 { // the second may get a warm machine
			first = h.create(t, nil)
			h.limited(t, "created", first, own)
		}
		h.limitedForLife(t, first, own, w.rates)
	}
}

// TestLimits checks that a template's limits, within the host's, apply for life to its
// sandboxes, to their forks and to the sandboxes of their snapshots.
func TestLimits(t *testing.T) {
	for _, warm := range []int{0, 1} {
		w := newWorld(t, 1)
		w.warm = warm
		w.rates = rates.Rates{DiskOps: 100, NetPackets: 1000, NetBytes: 5, Burst: time.Second}
		own := w.rates
		own.DiskBytes, own.DiskOps = 6, 7
		h := w.open(layout.Dir(t.TempDir()))
		limits := rates.Limits{"disk_bytes": 6, "disk_ops": 7, "net_bytes": 8}
		plain := h.create(t, nil)
		template, err := h.Snapshot(t.Context(), plain, uuid.New(), "limited", &image.Defaults{Limits: limits})
		if err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(template.Defaults.Limits, limits) {
			t.Errorf("the template has the limits %v", template.Defaults.Limits)
		}
		h.limited(t, "the sandbox that was captured", plain, w.rates)
		var first uuid.UUID
		for range 2 { // the second may get a warm machine
			first = h.create(t, func(s *Spec) { s.Team, s.Template = template.Team, template.ID })
			h.limited(t, "created", first, own)
		}
		h.limitedForLife(t, first, own, own)
	}
}
