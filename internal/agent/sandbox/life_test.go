package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/told"
	"github.com/wrenn-dev/wrenn/internal/agent/vmm"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/room"
)

func (h *host) create(t testing.TB, change func(*Spec)) uuid.UUID {
	t.Helper()
	s := spec()
	if change != nil {
		change(&s)
	}
	if _, err := h.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	return s.ID
}

// counts counts once in a sandbox.
func (h *host) counts(t testing.TB, id uuid.UUID) byte {
	t.Helper()
	u, err := h.Use(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer u.End()
	n, ok := u.VM.(*worldVM).count()
	if !ok {
		t.Fatal("its machine has ended")
	}
	return n
}

// runs checks that a sandbox goes on counting after n.
func (h *host) runs(t testing.TB, id uuid.UUID, n byte) {
	t.Helper()
	if got := h.info(id).State; got != Running {
		t.Fatalf("it is %s", got)
	}
	if got := h.counts(t, id); got != n+1 {
		t.Errorf("it counted to %d, before to %d", got, n)
	}
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	for _, vm := range h.w.vms {
		if vm.held() {
			t.Errorf("the machine of slot %s is held", vm.spec.NetNS)
		}
	}
}

// files are what is in a sandbox's folder.
func (h *host) files(t testing.TB, id uuid.UUID) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(h.dir.Sandbox(id), func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			rel, _ := filepath.Rel(h.dir.Sandbox(id), path)
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, "\n")
}

func TestPauseAndResume(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	reserved, _ := h.Memory()
	for n := byte(1); n < 12; n++ { // more than one merge of its memory
		if got := h.counts(t, id); got != n {
			t.Fatalf("it counted to %d, not %d", got, n)
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
		h.settles(t, id)
		if got, _ := h.Memory(); got >= reserved {
			t.Errorf("%d MiB stay reserved, %d were", got, reserved)
		}
		for range 2 {
			i, err := h.Resume(t.Context(), id)
			if err != nil || i.State != Running {
				t.Fatalf("%+v %v", i, err)
			}
		}
	}
	if got, _ := h.Memory(); got != reserved {
		t.Errorf("%d MiB are reserved, %d were", got, reserved)
	}
	if err := h.Destroy(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	h.nothingLeft()
}

// TestPauseIdle: one that is in use, or was a moment ago, is left alone.
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
		t.Fatalf("use of what was not paused: %v", err)
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

// TestResumedStandsAlone: a sandbox whose changes outweigh what it shares gets
// a memory of its own, so that the next pause writes and compares no more than
// what changed since.
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
			b, err := h.find(id)
			if err != nil {
				t.Fatal(err)
			}
			shared := b.base
			if test.low {
				h.mu.Lock()
				h.MemoryMiB = b.rec.Spec.MemoryMiB + overheadMiB
				h.mu.Unlock()
			}
			for range 3 {
				n := h.counts(t, id)
				if _, err := h.Pause(t.Context(), id); err != nil {
					t.Fatal(err)
				}
				h.settles(t, id)
				if n := len(h.bases.known); n != 1 {
					t.Errorf("%d memories are left", n)
				}
				if _, err := h.Resume(t.Context(), id); err != nil {
					t.Fatal(err)
				}
				h.runs(t, id, n)
				if alone := b.base != shared; alone != test.alone {
					t.Errorf("it stands alone: %v", alone)
				}
			}
			h.destroyAll()
			h.nothingLeft()
			h.close()
		})
	}
}

func isState(err error, s State) bool {
	var state *StateError
	return errors.As(err, &state) && state.State == s
}

// settles checks that a paused sandbox has no machine and no network.
func (h *host) settles(t testing.TB, id uuid.UUID) {
	t.Helper()
	b, err := h.find(id)
	if err != nil {
		t.Fatal(err)
	}
	// It takes orders once its machine is gone.
	if err := b.order(t.Context(), func(context.Context) error { return nil }); err != nil {
		t.Fatal(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.vm != nil || b.slot != nil {
		t.Errorf("a paused sandbox has machine %v and slot %v", b.vm, b.slot)
	}
}

func TestFailedPauseLeavesItRunning(t *testing.T) {
	for _, step := range []string{"hold", "devices", "pages", "disk"} {
		t.Run(step, func(t *testing.T) {
			h := newHost(t)
			id := h.create(t, nil)
			h.counts(t, id)
			if _, err := h.Pause(t.Context(), id); err != nil { // a layer that is to stay as it is
				t.Fatal(err)
			}
			if _, err := h.Resume(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			h.counts(t, id)
			before := h.files(t, id)
			h.w.setFailing(map[string]float64{step: 1})
			if step == "disk" {
				noFiles(t, h.dir.Sandbox(id))
			}
			_, err := h.Pause(t.Context(), id)
			if step == "disk" && err == nil || step != "disk" && !errors.Is(err, errInjected) {
				t.Fatalf("pause: %v", err)
			}
			h.w.setFailing(nil)
			h.runs(t, id, 2)
			if after := h.files(t, id); after != before {
				t.Errorf("its files were\n%s\nand are\n%s", before, after)
			}
			yesFiles(t, h.dir.Sandbox(id))
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
			h.settles(t, id)
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

// TestCaptureLimit checks that a sandbox can be captured as often as is
// documented and no more, and goes on.
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
	if text, ok := told.Text(err); !errors.Is(err, ErrCaptures) || errors.Is(err, ErrExhausted) || !ok || !strings.Contains(text, "64 times") {
		t.Errorf("capture %d: %v, told %q", maxDisks+1, err, text)
	}
	h.runs(t, sandbox, 0)
}

// TestCapturesTakeBoundedSpace: a guest that writes all of its disk between captures
// can be captured only while the layers take no more than twice the disk's size. That
// holds for sandboxes that began with such a capture too.
func TestCapturesTakeBoundedSpace(t *testing.T) {
	h := newHost(t)
	sandbox := h.create(t, func(s *Spec) { s.DiskMiB = 64 })
	var taken int64
	for n := 1; n < 10; n++ {
		h.mu.Lock()
		b := h.boxes[sandbox]
		h.mu.Unlock()
		// As the guest does, through its machine.
		f, err := os.OpenFile(b.rec.disk(h.dir, b.rec.Disks-1), os.O_WRONLY|os.O_APPEND, 0)
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
		if taken >= 128 { // and what the overlays themselves take
			if text, _ := told.Text(err); !errors.Is(err, ErrCaptures) || !strings.Contains(text, "while they take 128") {
				t.Fatalf("capture %d: %v, told %q", n, err, text)
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

// TestUpgradedMonitor: what runs, is paused or was captured under a monitor
// goes on under a later one, and is refused, and kept, by an earlier one.
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
	// One that began under the former still runs under it.
	before := uuid.New()
	if _, err := h.Snapshot(t.Context(), runs, before, "third", nil); err != nil {
		t.Fatal(err)
	}
	for _, id := range []uuid.UUID{paused, runs} {
		if _, err := h.Pause(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		h.settles(t, id)
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
		for range 2 { // the second returns what there is
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
		// Who began with it goes on, is paused, captured and resumed.
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
		// A memory that nothing can begin with any more is let go of.
		if n := len(h.bases.known); n > 2 {
			t.Errorf("%d memories are kept", n)
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
				t.Error("there is a template")
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

// noneHidden checks that nothing is left that was not published.
func (h *host) noneHidden(t testing.TB) {
	t.Helper()
	for _, dir := range []string{h.dir.Forks(), h.dir.Images()} {
		all, err := filepath.Glob(filepath.Join(dir, "*"))
		for _, name := range all {
			if strings.HasPrefix(filepath.Base(name), ".") || dir == h.dir.Forks() {
				t.Errorf("%s is left", name)
			}
		}
		if err != nil {
			t.Error(err)
		}
	}
}

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
	// A copy is a sandbox like any other.
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
	// All or none.
	h.w.setFailing(map[string]float64{"restore": .5})
	for range 8 {
		more := []Copy{{uuid.New(), "d"}, {uuid.New(), "e"}, {uuid.New(), "f"}}
		_, err := h.Fork(t.Context(), copies[0].ID, more)
		for _, c := range more {
			if _, e := h.Get(c.ID); (e == nil) != (err == nil) {
				t.Errorf("fork: %v, and a copy: %v", err, e)
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

// TestForkShares: copies have the memory that lies under the sandbox under
// theirs too, as long as a whole new one for all of them would take more.
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
			if test.changed { // three times as much as its template has
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
				b, err := h.find(c.ID)
				if err != nil {
					t.Fatal(err)
				}
				if shares := b.base == parent.base; shares != test.shares {
					t.Errorf("a copy shares its origin's memory: %v", shares)
				}
				h.runs(t, c.ID, n)
			}
			if err := h.Destroy(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			// What it shared outlives it, and a pause.
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

func TestNextAgentTakesPausedBack(t *testing.T) {
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
	_ = vm.Hold(t.Context()) // as an agent that was killed in a pause leaves it
	stray := filepath.Join(dir.Sandbox(paused), "saved-"+uuid.NewString())
	if err := os.Mkdir(stray, 0o700); err != nil {
		t.Fatal(err)
	}
	h = w.open(dir)
	defer h.close()
	h.runs(t, held, 1)
	if _, err := os.Stat(stray); err == nil {
		t.Error("what a killed agent was writing is left")
	}
	if got := h.info(paused).State; got != Paused {
		t.Fatalf("it is %s", got)
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

// waits waits until n machines of the host wait to become sandboxes.
func (h *host) waits(t *testing.T, n int) {
	t.Helper()
	await.Until(t, fmt.Sprintf("%d machines wait", n), func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.warm.ready) == n
	})
}

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

// TestTerminateWhileItEnds shuts the host down while somebody ends a sandbox: its pause
// fails, and that it ends is no error.
func TestTerminateWhileItEnds(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	h.w.setFailing(map[string]float64{"devices": 1}) // so does the pause
	ended := make(chan error, 1)
	h.Hook = func(step string) {
		if step != "pause: held" {
			return
		}
		go func() { ended <- h.Destroy(context.Background(), id) }()
		await.Until(t, "the sandbox is to end", func() bool { return h.info(id).State == Stopping })
	}
	if err := h.Terminate(t.Context()); err != nil {
		t.Errorf("terminate: %v", err)
	}
	if err := <-ended; err != nil {
		t.Errorf("destroy: %v", err)
	}
	h.nothingLeft()
}

// TestFlattenWaits has the work on a file system hang: a sandbox whose own waits
// for it is ended all the same.
func TestFlattenWaits(t *testing.T) {
	h := newHost(t)
	id := h.create(t, nil)
	h.flattening <- struct{}{}
	done := make(chan error, 1)
	go func() {
		_, err := h.SnapshotDisk(context.Background(), id, uuid.New(), "mine", nil, nil)
		done <- err
	}()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if slices.ContainsFunc(h.info(id).Steps, func(s Step) bool { return s.Name == "disks" }) {
			break // What comes next is the work.
		}
		if time.Now().After(deadline) {
			t.Fatal("the sandbox is not captured")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := h.Destroy(ctx, id); err != nil {
		t.Errorf("destroy: %v", err)
	}
	if err := <-done; err == nil {
		t.Error("it was captured")
	}
	<-h.flattening
	h.destroyAll()
	h.nothingLeft()
}

// lives is what is known of how far sandboxes have counted.
type lives struct {
	mu    sync.Mutex
	known map[uuid.UUID]life
}

type life struct {
	born   time.Time
	count  byte
	deaths int // of its machines, before it counted
}

// use counts in a sandbox: it must go on where it was, or begin again if a machine of
// it ended by itself since.
func (l *lives) use(h *host, u *Use) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h.w.mu.Lock()
	deaths := h.w.deaths[u.ID]
	h.w.mu.Unlock()
	n, ok := u.VM.(*worldVM).count()
	if !ok {
		return
	}
	last, ok := l.known[u.ID]
	if lost := deaths > last.deaths && n == 1; ok && last.born.Equal(u.CreatedAt) && n != last.count+1 && !lost {
		h.w.t.Errorf("%s counted to %d, before to %d", u.ID, n, last.count)
	}
	l.known[u.ID] = life{u.CreatedAt, n, deaths}
}

// change does something at random that saves a sandbox, or goes on from what
// was saved.
func (h *host) change(ctx context.Context, n int, id, template uuid.UUID) {
	switch n {
	case 0, 1:
		_, _ = h.Pause(ctx, id)
	case 2, 3:
		_, _ = h.Resume(ctx, id)
	case 4:
		_, _ = h.Snapshot(ctx, id, template, "", nil)
	case 5:
		_ = h.DeleteTemplate(uuid.Nil, template)
	case 6:
		copies := []Copy{{uuid.New(), "x"}, {uuid.New(), "y"}}
		if _, err := h.Fork(ctx, id, copies); err == nil {
			for _, c := range copies {
				if err := h.Destroy(context.Background(), c.ID); err != nil && !errors.Is(err, errInjected) {
					h.w.t.Errorf("destroy a copy: %v", err)
				}
			}
		}
	}
}

// noFiles makes that nothing can be made in a folder, also by root: it is a
// file system without room.
func noFiles(t testing.TB, dir string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	immutable(t, dir, true)
	t.Cleanup(func() { immutable(t, dir, false) })
}

func yesFiles(t testing.TB, dir string) { immutable(t, dir, false) }

// immutable sets or clears the attribute that keeps a folder as it is (FS_IMMUTABLE_FL of ioctl_iflags(2)).
func immutable(t testing.TB, dir string, on bool) {
	t.Helper()
	f, err := os.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		t.Skipf("no attributes of files here: %v", err)
	}
	const immutable = 0x10
	flags &^= immutable
	if on {
		flags |= immutable
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags); err != nil {
		t.Skipf("no attributes of files here: %v", err)
	}
}

// TestLeftoversAreTriedAgain: what a killed agent left and cannot be removed keeps
// no agent from starting. It is a problem until it is removed.
func TestLeftoversAreTriedAgain(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	w.open(dir).close()
	left := []string{filepath.Join(dir.Forks(), "x"), filepath.Join(dir.Images(), ".tmp-x")}
	for _, path := range left {
		if err := errors.Join(os.MkdirAll(path, 0o700), os.WriteFile(filepath.Join(path, "file"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		noFiles(t, path)
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
		yesFiles(t, path)
	}
	await.Until(t, "the leftovers are removed", func() bool { return len(h.Problems.All()) == 0 })
	for _, path := range left {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("what was made since was removed too: %v", err)
	}
	h.runs(t, id, 0)
	h.destroyAll()
	h.nothingLeft()
}

// TestSnapshotsTogether: of snapshots that begin at once no more begin than the
// disk has room for, and one that fails leaves its room to the next.
func TestSnapshotsTogether(t *testing.T) {
	h := newHost(t)
	one, other := h.create(t, nil), h.create(t, nil)
	const free, reserve = 300 << 20, 100 << 20 // for the memory of one, 128 MiB
	h.room = room.New(reserve, func() (int64, error) { return free, nil })
	begun, goOn := make(chan struct{}), make(chan struct{})
	var first sync.Once
	h.Hook = func(step string) {
		if step == "snapshot: captured" {
			first.Do(func() {
				close(begun)
				<-goOn
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
		t.Errorf("a second snapshot where there is room for one: %v", err)
	}
	if _, err := h.Pause(t.Context(), other); err != nil {
		t.Errorf("a pause beside it: %v", err)
	}
	close(goOn)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if left, err := h.room.Left(); left != free-reserve || err != nil {
		t.Errorf("when all have ended %d bytes are left, want %d, %v", left, free-reserve, err)
	}
	h.w.setFailing(map[string]float64{"hold": 1})
	if _, err := h.Snapshot(t.Context(), one, uuid.New(), "x", nil); err == nil {
		t.Error("a snapshot of a machine that is not held")
	}
	h.w.setFailing(nil)
	if _, err := h.Snapshot(t.Context(), one, uuid.New(), "x", nil); err != nil {
		t.Errorf("after one that failed: %v", err)
	}
}

// TestDiskReserve: on a host whose disk is nearly full nothing begins that writes
// to it but the pause of what runs.
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
