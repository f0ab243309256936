package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// TestExpiry checks that a sandbox that is used expires when its timeout has passed since
// the use, and not earlier.
func TestExpiry(t *testing.T) {
	h := newHost(t)
	s := spec()
	s.Timeout = time.Hour
	begun := time.Now()
	info, err := h.Create(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if at := info.ExpiresAt; at.Before(begun.Add(s.Timeout)) || at.After(time.Now().Add(s.Timeout)) {
		t.Errorf("the sandbox expires at %v, created between %v and now", at, begun)
	}
	u, err := h.Use(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	// An order makes the sandbox's goroutine look at its expiry again.
	inst := h.instance(t, s.ID)
	look := func() error { return inst.order(t.Context(), func(context.Context) error { return nil }) }
	inst.tracker.lastUsed(2 * s.Timeout)
	for range 2 { // the second order begins after the look that the first one caused
		if err := look(); err != nil {
			t.Fatal(err)
		}
	}
	if u.Context.Err() != nil || h.info(s.ID).State != Running {
		t.Fatal("the sandbox expired while it was in use")
	}
	ended := time.Now()
	u.End()
	if at := h.info(s.ID).ExpiresAt; at.Before(ended.Add(s.Timeout)) {
		t.Errorf("after a use that ended at %v the sandbox expires at %v", ended, at)
	}
	if err := look(); err != nil {
		t.Fatal(err)
	}
	inst.tracker.lastUsed(s.Timeout)
	_ = look() // the sandbox may end before it obeys
	e := h.event(t, s.ID)
	if e.Kind != journal.Expired || !strings.Contains(e.Reason, s.Timeout.String()) {
		t.Errorf("event %+v", e)
	}
	h.awaitGone(t, s.ID)
	h.nothingLeft()
}

// TestUnusedExpires checks that a sandbox that nobody uses expires without another call.
func TestUnusedExpires(t *testing.T) {
	h := newHost(t)
	s := spec()
	s.Timeout = 20 * time.Millisecond
	begun := time.Now()
	if _, err := h.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	e := h.event(t, s.ID)
	if e.Kind != journal.Expired || e.Time.Before(begun.Add(s.Timeout)) {
		t.Errorf("created at %v, event %+v", begun, e)
	}
	h.awaitGone(t, s.ID)
	h.nothingLeft()
}

// TestGuestShutsDown checks that a sandbox ends when its guest shuts down.
func TestGuestShutsDown(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	h.machine(id).dieWith(&vmm.GuestEnd{Off: true, Reason: "guest-shutdown"}, "")
	if e := h.event(t, id); e.Kind != journal.Exited || e.Reason != "the guest shut down (guest-shutdown)" {
		t.Errorf("event %+v", e)
	}
	h.awaitGone(t, id)
	h.nothingLeft()
}

func TestRemovalIsRetried(t *testing.T) {
	for _, step := range []string{"kill", "release"} {
		t.Run(step, func(t *testing.T) {
			h := newHost(t)
			s := spec()
			if _, err := h.Create(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			h.w.setFailing(map[string]float64{step: 1})
			if err := h.Destroy(t.Context(), s.ID); !errors.Is(err, errInjected) {
				t.Fatalf("destroy: %v", err)
			}
			if h.info(s.ID).State != Stopping {
				t.Error("the sandbox is not stopping")
			}
			h.w.setFailing(nil)
			err := h.Destroy(t.Context(), s.ID)
			if errors.Is(err, errInjected) { // the result of an attempt that began before
				err = h.Destroy(t.Context(), s.ID)
			}
			if err != nil {
				t.Fatal(err)
			}
			h.nothingLeft()
		})
	}
}

// TestLeftoversAreRetried checks that an agent starts even if it cannot remove the files that
// a killed agent left. It must report a problem until the removal succeeds.
func TestLeftoversAreRetried(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	w.open(dir).close()
	left := []string{filepath.Join(dir.Forks(), "x"), filepath.Join(dir.Images(), ".tmp-x")}
	for _, path := range left {
		if err := errors.Join(os.MkdirAll(path, 0o700), os.WriteFile(filepath.Join(path, "file"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		denyFiles(t, path)
	}
	h := w.open(dir)
	defer h.close()
	if all := h.Problems.All(); len(all) != 1 || all[0].Kind != problem.Leftover || !strings.Contains(all[0].Message, left[0]) {
		t.Errorf("the problems are %+v", all)
	}
	id := h.create(t, nil)
	other := filepath.Join(dir.Forks(), "in use")
	if err := os.MkdirAll(other, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range left {
		allowFiles(t, path)
	}
	await.Until(t, "the leftovers are removed", func() bool { return len(h.Problems.All()) == 0 })
	for _, path := range left {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("a later file was removed too: %v", err)
	}
	h.runs(t, id, 0)
	h.destroyAll()
	h.nothingLeft()
}
