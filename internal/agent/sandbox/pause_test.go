package sandbox

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/clienterr"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/room"
)

func TestPauseAndResume(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	reserved, _ := h.Memory()
	for n := byte(1); n < 12; n++ { // often enough for more than one merge of its memory
		if got := h.counts(t, id); got != n {
			t.Fatalf("the sandbox counted to %d, not %d", got, n)
		}
		for range 2 { // the second has nothing to do
			i, err := h.Pause(t.Context(), id)
			if err != nil || i.State != Paused {
				t.Fatalf("%+v %v", i, err)
			}
		}
		if _, err := h.Use(t.Context(), id); !isState(err, Paused) {
			t.Fatalf("use of a paused sandbox: %v", err)
		}
		h.isReleased(t, id)
		if got, _ := h.Memory(); got >= reserved {
			t.Errorf("%d MiB are still reserved, before: %d", got, reserved)
		}
		for range 2 {
			i, err := h.Resume(t.Context(), id)
			if err != nil || i.State != Running {
				t.Fatalf("%+v %v", i, err)
			}
		}
	}
	if got, _ := h.Memory(); got != reserved {
		t.Errorf("%d MiB are reserved, before: %d", got, reserved)
	}
	if err := h.Destroy(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	h.nothingLeft()
}

// TestPauseIdle checks that a sandbox in use, or used a moment ago, is not paused.
func TestPauseIdle(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	use, err := h.Use(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.PauseIdle(t.Context(), id, time.Nanosecond); !errors.Is(err, ErrInUse) {
		t.Errorf("in use: %v", err)
	}
	if i, err := h.Get(id); err != nil || i.Idle != 0 {
		t.Errorf("in use: idle for %v (%v)", i.Idle, err)
	}
	use.Leave()
	if _, err := h.PauseIdle(t.Context(), id, time.Hour); !errors.Is(err, ErrInUse) {
		t.Errorf("used a moment ago: %v", err)
	}
	if use, err = h.Use(t.Context(), id); err != nil {
		t.Fatalf("use of the sandbox that was not paused: %v", err)
	}
	use.Leave()
	if i, err := h.Get(id); err != nil || i.Idle <= 0 || i.Idle > time.Hour {
		t.Errorf("idle for %v (%v)", i.Idle, err)
	}
	for range 2 { // the second has nothing to do
		if i, err := h.PauseIdle(t.Context(), id, time.Nanosecond); err != nil || i.State != Paused {
			t.Fatalf("%+v %v", i, err)
		}
	}
}

// TestResumedStandsAlone checks that a sandbox with more changed than shared memory gets its
// own base, so that the next pause compares and writes only what changed since.
func TestResumedStandsAlone(t *testing.T) {
	for _, test := range []struct {
		name        string
		tracks, low bool
		alone       bool
	}{
		{name: "alone", alone: true},
		{name: "tracked", tracks: true},
		{name: "no room", low: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, 1)
			w.tracks = test.tracks
			h := w.open(layout.Dir(t.TempDir()))
			id := h.create(t, nil)
			inst, err := h.find(id)
			if err != nil {
				t.Fatal(err)
			}
			shared := inst.base
			if test.low {
				h.mu.Lock()
				h.MemoryMiB = inst.rec.Spec.MemoryMiB + overheadMiB
				h.mu.Unlock()
			}
			for range 3 {
				n := h.counts(t, id)
				if _, err := h.Pause(t.Context(), id); err != nil {
					t.Fatal(err)
				}
				h.isReleased(t, id)
				if n := len(h.bases.known); n != 1 {
					t.Errorf("%d memory bases are left", n)
				}
				if _, err := h.Resume(t.Context(), id); err != nil {
					t.Fatal(err)
				}
				h.runs(t, id, n)
				if alone := inst.base != shared; alone != test.alone {
					t.Errorf("the sandbox has its own base: %v", alone)
				}
			}
			h.destroyAll()
			h.nothingLeft()
			h.close()
		})
	}
}

func TestFailedPauseLeavesItRunning(t *testing.T) {
	for _, step := range []string{"hold", "devices", "pages", "disk"} {
		t.Run(step, func(t *testing.T) {
			h := newHost(t)
			id := h.create(t, nil)
			h.counts(t, id)
			if _, err := h.Pause(t.Context(), id); err != nil { // a layer that must not change
				t.Fatal(err)
			}
			if _, err := h.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			h.counts(t, id)
			before := h.files(t, id)
			h.w.setFailing(map[string]float64{step: 1})
			if step == "disk" {
				denyFiles(t, h.dir.Sandbox(id))
			}
			_, err := h.Pause(t.Context(), id)
			if step == "disk" && err == nil || step != "disk" && !errors.Is(err, errInjected) {
				t.Fatalf("pause: %v", err)
			}
			h.w.setFailing(nil)
			h.runs(t, id, 2)
			if after := h.files(t, id); after != before {
				t.Errorf("its files before:\n%s\nafter:\n%s", before, after)
			}
			allowFiles(t, h.dir.Sandbox(id))
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

func TestFailedResumeLeavesItPaused(t *testing.T) {
	for _, step := range []string{"acquire", "tap", "restore", "init"} {
		t.Run(step, func(t *testing.T) {
			h := newHost(t)
			id := h.create(t, nil)
			h.counts(t, id)
			if _, err := h.Pause(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			h.w.setFailing(map[string]float64{step: 1})
			if i, err := h.Resume(t.Context(), id); err == nil || i.State != Paused {
				t.Fatalf("%s %v", i.State, err)
			}
			h.isReleased(t, id)
			if reserved, _ := h.Memory(); reserved > h.bases.mib() {
				t.Errorf("%d MiB are reserved", reserved)
			}
			h.w.setFailing(nil)
			if _, err := h.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			h.runs(t, id, 1)
			if err := h.Destroy(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			h.nothingLeft()
		})
	}
}

// TestCaptureLimit checks that a sandbox can be captured exactly as often as documented,
// and keeps running.
func TestCaptureLimit(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, nil)
	for i := range maxDisks {
		template := uuid.New()
		tpl, err := h.Snapshot(t.Context(), sandbox, template, "x", nil)
		if err != nil {
			t.Fatalf("capture %d: %v", i+1, err)
		}
		if err := h.DeleteTemplate(tpl.Team, template); err != nil {
			t.Fatal(err)
		}
	}
	_, err := h.Snapshot(t.Context(), sandbox, uuid.New(), "x", nil)
	if text, ok := clienterr.Text(err); !errors.Is(err, ErrCaptures) || errors.Is(err, ErrExhausted) || !ok || !strings.Contains(text, "64 times") {
		t.Errorf("capture %d: %v, with the message %q", maxDisks+1, err, text)
	}
	h.runs(t, sandbox, 0)
}

// TestCapturesTakeBoundedSpace checks that a guest that rewrites its disk between
// captures can be captured only while the layers take at most twice the disk's size. That
// includes sandboxes that start from such a capture.
func TestCapturesTakeBoundedSpace(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, func(s *Spec) { s.DiskMiB = 64 })
	var taken int64
	for n := 1; n < 10; n++ {
		h.mu.Lock()
		inst := h.sandboxes[sandbox]
		h.mu.Unlock()
		// Write as the guest does, through its machine.
		f, err := os.OpenFile(inst.rec.disk(h.dir, inst.rec.Disks-1), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(make([]byte, 64<<20))
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		taken += 64
		template := uuid.New()
		tpl, err := h.Snapshot(t.Context(), sandbox, template, "x", nil)
		if taken >= 128 { // plus the overlays' own data
			if text, _ := clienterr.Text(err); !errors.Is(err, ErrCaptures) || !strings.Contains(text, "while they take 128") {
				t.Fatalf("capture %d: %v, with the message %q", n, err, text)
			}
			return
		}
		if err != nil {
			t.Fatalf("capture %d: %v", n, err)
		}
		sandbox = h.create(t, func(s *Spec) { s.Template, s.DiskMiB = template, 0 })
		if err := h.DeleteTemplate(tpl.Team, template); err != nil {
			t.Fatal(err)
		}
	}
	t.Error("no capture was refused")
}

// TestUpgradedMonitor checks that a later version of the monitor starts the sandboxes and
// snapshots of an earlier one. An earlier version must refuse and keep those of a later one.
func TestUpgradedMonitor(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	w.version = "1"
	h := w.open(dir)
	paused, runs, tpl := h.create(t, nil), h.create(t, nil), uuid.New()
	h.counts(t, paused)
	h.counts(t, runs)
	if _, err := h.Snapshot(t.Context(), paused, tpl, "first", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Pause(t.Context(), paused); err != nil {
		t.Fatal(err)
	}
	h.close()

	w.version = "2"
	h = w.open(dir)
	if _, err := h.Resume(t.Context(), paused); err != nil {
		t.Fatal(err)
	}
	h.runs(t, paused, 1)
	of := func(template uuid.UUID) func(*Spec) { return func(s *Spec) { s.Template = template } }
	h.runs(t, h.create(t, of(tpl)), 1)
	later := uuid.New()
	if _, err := h.Snapshot(t.Context(), paused, later, "second", nil); err != nil {
		t.Fatal(err)
	}
	// This sandbox still runs under the former version.
	before := uuid.New()
	if _, err := h.Snapshot(t.Context(), runs, before, "third", nil); err != nil {
		t.Fatal(err)
	}
	for _, id := range []uuid.UUID{paused, runs} {
		if _, err := h.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		h.isReleased(t, id)
	}
	h.close()

	w.version = "1"
	h = w.open(dir)
	if i, err := h.Resume(t.Context(), paused); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "a later world") || i.State != Paused {
		t.Fatalf("%s %v", i.State, err)
	}
	if _, err := h.Resume(t.Context(), runs); err != nil {
		t.Fatal(err)
	}
	h.runs(t, runs, 1)
	h.runs(t, h.create(t, of(before)), 1)
	s := spec()
	s.Template = later
	if _, err := h.Create(t.Context(), s); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "a later world") {
		t.Fatal(err)
	}
	h.close()

	w.version = "3"
	h = w.open(dir)
	defer h.close()
	if _, err := h.Resume(t.Context(), paused); err != nil {
		t.Fatal(err)
	}
	h.runs(t, paused, 2)
	h.destroyAll()
	h.nothingLeft()
}

func TestUnusedSandboxIsPaused(t *testing.T) {
	h := newHost(t)
	id := h.create(t, func(s *Spec) { s.Timeout, s.PauseOnTimeout = 200*time.Millisecond, true })
	if e := h.event(t, id); e.Kind != journal.Paused || !strings.Contains(e.Reason, "200ms") {
		t.Errorf("event %+v", e)
	}
	if i := h.info(id); i.State != Paused || !i.ExpiresAt.IsZero() {
		t.Errorf("%+v", i)
	}
	if n := len(h.Journal.Pending()); n != 1 {
		t.Errorf("%d events", n)
	}
}

// TestDiskReserve checks that on a nearly full disk nothing that writes to it may start,
// except pauses of running sandboxes.
func TestDiskReserve(t *testing.T) {
	w := newWorld(t, 1)
	h := w.open(layout.Dir(t.TempDir()))
	runs, sleeps := h.create(t, nil), h.create(t, nil)
	if _, err := h.Pause(t.Context(), sleeps); err != nil {
		t.Fatal(err)
	}
	h.room = room.New(1<<60, room.Of(string(h.dir)))
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), "disk") {
			t.Errorf("%s on a full disk: %v", what, err)
		}
	}
	_, err := h.Create(t.Context(), spec())
	refused("create", err)
	_, err = h.Snapshot(t.Context(), runs, uuid.New(), "x", nil)
	refused("snapshot", err)
	_, err = h.Fork(t.Context(), runs, []Copy{{ID: uuid.New()}})
	refused("fork", err)
	_, err = h.Resume(t.Context(), sleeps)
	refused("resume", err)
	if _, err := h.Pause(t.Context(), runs); err != nil {
		t.Errorf("pause on a full disk: %v", err)
	}
	h.room = nil
	for _, id := range []uuid.UUID{runs, sleeps} {
		if _, err := h.Resume(t.Context(), id); err != nil {
			t.Errorf("resume once there is room: %v", err)
		}
	}
	h.destroyAll()
	h.close()
	h.nothingLeft()
}
