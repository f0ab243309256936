package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/problem"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// testdata/data-N.tar.gz is the data of an agent of an earlier release: a paused sandbox
// that counted to 3, one that ran, a template captured from the first, and an event.
// Before you change a format, write another one:
//
//	WRENN_FIXTURE=$PWD/internal/agent/sandbox/testdata/data-N.tar.gz go test -run TestWriteFixture ./internal/agent/sandbox
var (
	fixturePaused   = uuid.MustParse("00000000-0000-4000-8000-000000000001")
	fixtureRan      = uuid.MustParse("00000000-0000-4000-8000-000000000002")
	fixtureTemplate = uuid.MustParse("00000000-0000-4000-8000-000000000003")
)

func TestWriteFixture(t *testing.T) {
	out := os.Getenv("WRENN_FIXTURE")
	if out == "" {
		t.Skip("writes the file that WRENN_FIXTURE names")
	}
	dir := layout.Dir(t.TempDir())
	h := newWorld(t, 1).open(dir)
	h.create(t, func(s *Spec) {
		s.ID, s.Timeout, s.PauseOnTimeout, s.Envs = fixturePaused, time.Hour, true, map[string]string{"A": "b"}
	})
	h.create(t, func(s *Spec) { s.ID = fixtureRan })
	for range 3 {
		h.counts(t, fixturePaused)
	}
	if _, err := h.Pause(t.Context(), fixturePaused); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Snapshot(t.Context(), fixturePaused, fixtureTemplate, "snap", nil); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		e := journal.Event{Kind: journal.Paused, Sandbox: fixturePaused, Time: time.Date(2026, 11, 29, 12, 0, i, 0, time.UTC), Reason: "it was not used"}
		if _, err := h.Journal.Append(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Journal.Ack(1); err != nil {
		t.Fatal(err)
	}
	h.close()
	tar := exec.Command("tar", "-C", string(dir), "--sparse", "--sort=name", "--mtime=2026-11-29", "--owner=0", "--group=0", "--numeric-owner", "-czf", out, ".")
	if b, err := tar.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
}

// fixtures calls f with the unpacked data of each earlier release.
func fixtures(t *testing.T, f func(t *testing.T, dir layout.Dir)) {
	all, err := filepath.Glob("testdata/data-*.tar.gz")
	if err != nil || len(all) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	for _, name := range all {
		t.Run(filepath.Base(name), func(t *testing.T) {
			dir := t.TempDir()
			if b, err := exec.Command("tar", "-C", dir, "-xzf", name).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, b)
			}
			f(t, layout.Dir(dir))
		})
	}
}

// TestEarlierFormats starts an agent on each earlier release's data.
func TestEarlierFormats(t *testing.T) {
	fixtures(t, func(t *testing.T, dir layout.Dir) {
		if n := Newer(dir); len(n) != 0 {
			t.Fatalf("files of an earlier release count as a later one's: %v", n[0])
		}
		if damaged, err := image.Examine(dir); err != nil || len(damaged) != 0 {
			t.Fatalf("damaged images: %v, %v", damaged, err)
		}
		h := newWorld(t, 1).open(dir)
		defer h.close()
		pending := h.Journal.Pending()
		if len(pending) == 0 || pending[0].Seq != 2 || pending[0].Kind != journal.Paused || pending[0].Sandbox != fixturePaused {
			t.Errorf("the journal has %+v", pending)
		}
		i := h.info(fixturePaused)
		if i.State != Paused || !i.PauseOnTimeout || i.VCPUs != 1 || i.MemoryMiB != 128 || i.PausedAt.IsZero() {
			t.Errorf("the paused sandbox is %+v", i)
		}
		if _, err := h.Resume(t.Context(), fixturePaused); err != nil {
			t.Fatal(err)
		}
		h.runs(t, fixturePaused, 3)
		// The other sandbox's machine ended with its host. The disk is kept.
		if e := h.event(t, fixtureRan); e.Kind != journal.Paused {
			t.Errorf("the event is %+v", e)
		}
		if _, err := h.Resume(t.Context(), fixtureRan); err != nil {
			t.Errorf("boot from the disk: %v", err)
		}
		fromSnapshot := h.create(t, func(s *Spec) { s.Template, s.VCPUs, s.MemoryMiB = fixtureTemplate, 0, 0 })
		h.runs(t, fromSnapshot, 3)
		if items, err := unreadable.List(dir); err != nil || len(items) != 0 {
			t.Errorf("set aside %+v, %v", items, err)
		}
	})
}

// edit replaces old in an existing file.
func edit(t *testing.T, path, old, new string) {
	t.Helper()
	if err := replace(path, old, new); err != nil {
		t.Fatal(err)
	}
}

func replace(path, old, new string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), old) {
		return fmt.Errorf("%s has no %q", path, old)
	}
	// Write a new file, because others are links to this one.
	return errors.Join(os.Remove(path), os.WriteFile(path, []byte(strings.Replace(string(b), old, new, 1)), 0o600))
}

// TestNewerFormats checks that the manager finds every file of a later release.
func TestNewerFormats(t *testing.T) {
	fixtures(t, func(t *testing.T, dir layout.Dir) {
		rec, err := load(dir, fixturePaused)
		if err != nil {
			t.Fatal(err)
		}
		origin := filepath.Join(dir.SandboxOrigin(fixtureRan), "capture.json")
		header := filepath.Join(dir.SandboxSaved(fixturePaused, *rec.Saved), "memory", "header")
		originHeader := filepath.Join(dir.SandboxOrigin(fixtureRan), "memory", "header")
		edit(t, header, "WRNMEMH\x00\x01", "WRNMEMH\x00\x02")
		edit(t, originHeader, "WRNMEMH\x00\x01", "WRNMEMH\x00\x03")
		edit(t, origin, `"version": 1`, `"version": 7`)
		got := map[string]int{}
		for _, e := range Newer(dir) {
			got[e.Path] = e.Version
		}
		if len(got) != 3 || got[header] != 2 || got[origin] != 7 || got[originHeader] != 3 {
			t.Errorf("the files of a later release are %v", got)
		}
		record := dir.SandboxRecord(fixturePaused)
		edit(t, record, `"version": 2`, `"version": 3, "disks": {"new": "shape"}, "old": 0`)
		if all := Newer(dir); len(all) != 3 || all[0].Path != record || all[0].Version != 3 || all[0].Known != format.Sandbox.Version {
			t.Errorf("the files of a later release are %v", all)
		}
	})
}

// TestUnknownMembersAreKept checks that an agent that was rolled back keeps the members of
// a record that it does not know, so that the later release finds them again.
func TestUnknownMembersAreKept(t *testing.T) {
	fixtures(t, func(t *testing.T, dir layout.Dir) {
		path := dir.SandboxRecord(fixturePaused)
		edit(t, path, `"version": 2,`, `"version": 2, "later": {"reason": ["x"]},`)
		edit(t, path, `"spec": {`, `"spec": {"later_too": 7,`)
		w := newWorld(t, 1)
		for range 2 {
			h := w.open(dir)
			if _, err := h.Resume(t.Context(), fixturePaused); err != nil {
				t.Fatal(err)
			}
			if _, err := h.Pause(t.Context(), fixturePaused); err != nil {
				t.Fatal(err)
			}
			h.close()
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var r struct {
			Later map[string][]string
			Spec  struct {
				LaterToo int `json:"later_too"`
				Token    string
			}
			State State
		}
		if err := json.Unmarshal(b, &r); err != nil {
			t.Fatal(err)
		}
		if len(r.Later["reason"]) != 1 || r.Spec.LaterToo != 7 || r.Spec.Token == "" || r.State != Paused {
			t.Errorf("the record is %s", b)
		}
		if rec, err := load(dir, fixturePaused); err != nil || len(rec.later) != 1 || len(rec.laterSpec) != 1 {
			t.Errorf("read again: %+v, %v", rec, err)
		}
	})
}

// damages make a record unreadable for good, each in another way.
var damages = map[string]func(path string) error{
	"torn":            func(path string) error { return os.WriteFile(path, []byte(`{"version": 2,`), 0o600) },
	"empty":           func(path string) error { return os.Truncate(path, 0) },
	"gone":            os.Remove,
	"an old version":  func(path string) error { return os.WriteFile(path, []byte(`{"version": 1}`), 0o600) },
	"unknown state":   func(path string) error { return replace(path, `"state": "`, `"state": "un`) },
	"of no sandbox":   func(path string) error { return os.WriteFile(path, []byte(`{"version": 2}`), 0o600) },
	"not even a file": func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
}

// TestUnreadableSandboxIsKept checks that an agent keeps files that it cannot read, and
// that the machine runs until it ends by itself or its sandbox is deleted.
func TestUnreadableSandboxIsKept(t *testing.T) {
	for name, damage := range damages {
		for _, end := range []string{"deleted", "dies", "has no machine"} {
			t.Run(name+", "+end, func(t *testing.T) { testUnreadable(t, damage, end) })
		}
	}
}

func testUnreadable(t *testing.T, damage func(path string) error, end string) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	paused, running := h.create(t, nil), h.create(t, nil)
	if _, err := h.Pause(t.Context(), paused); err != nil {
		t.Fatal(err)
	}
	h.close()
	w.mu.Lock()
	vm := w.vms[running]
	w.mu.Unlock()
	before := map[uuid.UUID]map[string]int64{}
	for _, sandbox := range []uuid.UUID{paused, running} {
		if err := damage(dir.SandboxRecord(sandbox)); err != nil {
			t.Fatal(err)
		}
		before[sandbox] = sizes(t, dir.Sandbox(sandbox))
	}
	if end == "has no machine" {
		vm.die()
	}
	h = w.open(dir)
	if end != "has no machine" {
		h.awaitGone(t, paused)
		for range 2 { // The second time under the next agent.
			if all := h.Problems.All(); len(all) != 1 || all[0].Kind != problem.Sandbox || !strings.Contains(all[0].Message, id.Format(id.Sandbox, running)) {
				t.Errorf("the problems are %+v", all)
			}
			if _, err := h.Use(t.Context(), running); !errors.Is(err, ErrUnread) {
				t.Errorf("used: %v", err)
			}
			h.mayHave(t, running)
			h.close()
			h = w.open(dir)
		}
		select {
		case <-vm.done:
			t.Fatal("its machine has ended because of the record")
		default:
		}
	}
	defer func() { h.close() }()
	switch end {
	case "deleted":
		if err := h.Destroy(t.Context(), running); err != nil {
			t.Fatal(err)
		}
	case "dies":
		vm.die()
	}
	await.Until(t, "every record is read", func() bool { return len(h.unreadSandboxes()) == 0 })
	for id := range before {
		h.awaitGone(t, id)
		if e := h.event(t, id); e.Kind != journal.Exited || strings.Contains(e.Reason, string(dir)) {
			t.Errorf("the event is %+v", e)
		}
	}
	items := map[string]unreadable.Item{}
	all, err := unreadable.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range all {
		items[i.From] = i
	}
	for id, want := range before {
		i, ok := items[dir.Sandbox(id)]
		if !ok || i.Kind != unreadable.Sandbox || i.Reason == "" {
			t.Fatalf("set aside %+v", all)
		}
		got := sizes(t, i.Path)
		for name, size := range want {
			if got[name] != size {
				t.Errorf("%s has %d bytes, before %d", name, got[name], size)
			}
		}
	}
	await.Until(t, "no problem is left", func() bool { return len(h.Problems.All()) == 0 })
	h.close()
	h = w.open(dir) // Only the next agent frees the network slot of a machine without a record.
	h.nothingLeft()
}

// unreadSandboxes returns the sandboxes that the host may have but does not list.
func (h *host) unreadSandboxes() []uuid.UUID {
	incomplete, which := h.Incomplete()
	if incomplete && len(which) == 0 {
		return []uuid.UUID{uuid.Nil}
	}
	return which
}

// mayHave checks which sandboxes the host may have besides those that it lists.
func (h *host) mayHave(t *testing.T, want ...uuid.UUID) {
	t.Helper()
	if got := h.unreadSandboxes(); !slices.Equal(got, want) {
		t.Errorf("the list may lack %v, not %v", got, want)
	}
	if _, err := h.Get(uuid.New()); !errors.Is(err, ErrNotFound) {
		t.Errorf("another sandbox: %v", err)
	}
}

// TestUnreadableWithoutLabel checks that the list of sandboxes counts as incomplete if an
// unreadable folder, of the previous release, does not name its sandbox.
func TestUnreadableWithoutLabel(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	w := newWorld(t, 1)
	h := w.open(dir)
	sandbox := h.create(t, nil)
	h.close()
	if err := errors.Join(os.Remove(dir.SandboxID(sandbox, sandbox)), os.Truncate(dir.SandboxRecord(sandbox), 0)); err != nil {
		t.Fatal(err)
	}
	h = w.open(dir)
	defer func() { h.close() }()
	if got := h.unreadSandboxes(); !slices.Equal(got, []uuid.UUID{uuid.Nil}) {
		t.Errorf("the list may lack %v", got)
	}
	if _, err := h.Get(uuid.New()); !errors.Is(err, ErrUnread) {
		t.Errorf("another sandbox: %v", err)
	}
	if err := h.Destroy(t.Context(), sandbox); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "every record is read", func() bool { return len(h.unreadSandboxes()) == 0 })
}

// TestUnreadableWarm damages the record of a sandbox that started from a warm machine,
// whose folder has another name than the sandbox.
func TestUnreadableWarm(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	w := newWorld(t, 1)
	w.warm = 1
	h := w.open(dir)
	h.create(t, nil)
	h.awaitWarm(t, 1)
	sandbox := h.create(t, nil)
	inst, err := h.find(sandbox)
	if err != nil {
		t.Fatal(err)
	}
	home := inst.rec.Home
	if home == sandbox {
		t.Fatal("the sandbox did not start from a warm machine")
	}
	h.close()
	w.warm = 0
	if err := os.Truncate(dir.SandboxRecord(home), 0); err != nil {
		t.Fatal(err)
	}
	h = w.open(dir)
	defer func() { h.close() }()
	h.mayHave(t, sandbox)
	if all := h.Problems.All(); len(all) != 1 || !strings.Contains(all[0].Message, id.Format(id.Sandbox, sandbox)) {
		t.Errorf("the problems are %+v", all)
	}
	if err := h.Destroy(t.Context(), sandbox); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "every record is read", func() bool { return len(h.unreadSandboxes()) == 0 })
	if e := h.event(t, sandbox); e.Kind != journal.Exited {
		t.Errorf("the event is %+v", e)
	}
}

// TestEarlierFolderIsLabelled checks that the next agent labels the folder of a previous
// release's sandbox.
func TestEarlierFolderIsLabelled(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	w := newWorld(t, 1)
	h := w.open(dir)
	sandbox := h.create(t, nil)
	h.close()
	if err := os.Remove(dir.SandboxID(sandbox, sandbox)); err != nil {
		t.Fatal(err)
	}
	h = w.open(dir)
	h.close()
	if err := os.Truncate(dir.SandboxRecord(sandbox), 0); err != nil {
		t.Fatal(err)
	}
	h = w.open(dir)
	defer func() { h.close() }()
	h.mayHave(t, sandbox)
	if err := h.Destroy(t.Context(), sandbox); err != nil {
		t.Fatal(err)
	}
}

// TestDamagedRecordIsRepaired checks that the agent takes a sandbox back as it was, once
// somebody has repaired its damaged record.
func TestDamagedRecordIsRepaired(t *testing.T) {
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1)
			dir := layout.Dir(t.TempDir())
			h := w.open(dir)
			id := h.create(t, nil)
			h.counts(t, id)
			h.close()
			right, err := os.ReadFile(dir.SandboxRecord(id))
			if err != nil {
				t.Fatal(err)
			}
			if err := damage(dir.SandboxRecord(id)); err != nil {
				t.Fatal(err)
			}
			h = w.open(dir)
			defer h.close()
			if err := errors.Join(os.RemoveAll(dir.SandboxRecord(id)), os.WriteFile(dir.SandboxRecord(id), right, 0o600)); err != nil {
				t.Fatal(err)
			}
			await.Until(t, "it is taken back", func() bool { i, err := h.Get(id); return err == nil && i.State == Running })
			h.runs(t, id, 1)
			h.destroyAll()
			await.Until(t, "no problem is left", func() bool { return len(h.Problems.All()) == 0 && len(h.unreadSandboxes()) == 0 })
			h.nothingLeft()
		})
	}
}

// sizes returns the size of each file below a folder.
func sizes(t *testing.T, dir string) map[string]int64 {
	t.Helper()
	all := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		all[name] = info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestNotTakenBackKeepsRunning checks that a machine keeps running while the agent cannot take
// back the machine, its network or its record. The agent must start, report that, and retry.
func TestNotTakenBackKeepsRunning(t *testing.T) {
	for _, step := range []string{"attach", "run", "reclaim", "record"} {
		for _, end := range []string{"taken back", "taken back by the next agent", "destroyed", "dies"} {
			t.Run(step+", "+end, func(t *testing.T) { testNotTakenBack(t, step, end) })
		}
	}
}

func testNotTakenBack(t *testing.T, step, end string) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	id := h.create(t, nil)
	h.counts(t, id)
	h.close()
	w.mu.Lock()
	vm := w.vms[id]
	w.mu.Unlock()
	record := dir.SandboxRecord(id)
	fails := func(now bool) {
		switch {
		case step != "record" && now:
			w.setFailing(map[string]float64{step: 1})
		case step != "record":
			w.setFailing(nil)
		case now: // a link to itself fails to read, like a bad block
			if err := errors.Join(os.Rename(record, record+".kept"), os.Symlink(record, record)); err != nil {
				t.Fatal(err)
			}
		default:
			if err := os.Rename(record+".kept", record); err != nil {
				t.Fatal(err)
			}
		}
	}
	fails(true)
	for range 2 { // the first agent ends before it succeeds
		h = w.open(dir)
		if all := h.Problems.All(); len(all) != 1 || all[0].Kind != problem.Sandbox {
			t.Errorf("the problems are %+v", all)
		}
		if step == "record" {
			h.mayHave(t, id)
		} else {
			h.mayHave(t)
		}
		var state *StateError
		_, err := h.Use(t.Context(), id)
		switch {
		case step == "record":
			if !errors.Is(err, ErrUnread) {
				t.Errorf("used: %v", err)
			}
			if err := h.Destroy(t.Context(), id); !errors.Is(err, ErrUnread) {
				t.Errorf("destroyed: %v", err)
			}
		case !errors.As(err, &state) || state.State != Resuming || h.info(id).State != Resuming:
			t.Errorf("used: %v", err)
		}
		if err := h.Terminate(t.Context()); err == nil || !strings.Contains(err.Error(), "running") {
			t.Errorf("terminated: %v", err)
		}
		slots := h.close()
		if want := min(1, len(h.List())); len(slots) != want {
			t.Errorf("slots %v are in use", slots)
		}
		select {
		case <-vm.done:
			t.Fatal("its machine has ended")
		default:
		}
	}
	h = w.open(dir)
	switch end {
	case "taken back":
		fails(false)
	case "taken back by the next agent":
		h.close()
		fails(false)
		h = w.open(dir)
	case "destroyed":
		if step == "record" {
			fails(false)
		}
		await.Until(t, "it can be destroyed", func() bool { return h.Destroy(t.Context(), id) == nil })
		w.setFailing(nil)
	case "dies":
		vm.die()
		if step == "record" || step == "attach" {
			fails(false)
		}
		await.Until(t, "it is paused", func() bool { i, err := h.Get(id); return err == nil && i.State == Paused && i.Condition != nil })
		if e := h.event(t, id); e.Kind != journal.Paused {
			t.Errorf("the event is %+v", e)
		}
		w.setFailing(nil)
		if _, err := h.Resume(t.Context(), id); err != nil {
			t.Errorf("boot from the disk: %v", err)
		}
		h.destroyAll()
	}
	defer func() { h.close() }()
	if end != "destroyed" && end != "dies" {
		await.Until(t, "it is taken back", func() bool { i, err := h.Get(id); return err == nil && i.State == Running })
		h.runs(t, id, 1)
		if w.vms[id] != vm {
			t.Error("the sandbox has another machine")
		}
		h.destroyAll()
	}
	await.Until(t, "no problem is left", func() bool { return len(h.Problems.All()) == 0 && len(h.unreadSandboxes()) == 0 })
	if items, err := unreadable.List(dir); err != nil || len(items) != 0 {
		t.Errorf("set aside %+v, %v", items, err)
	}
	h.nothingLeft()
}

// TestKeptByEarlierAgent starts an agent on files of the previous release, whose agent killed
// a machine that it could not take back and was killed before it set the files aside.
func TestKeptByEarlierAgent(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	id := h.create(t, nil)
	h.close()
	rec, err := load(dir, id)
	if err != nil {
		t.Fatal(err)
	}
	rec.Ending, rec.Keep = &ending{journal.Exited, "it could not be taken back", time.Now().UTC()}, "a reason"
	if err := rec.save(dir); err != nil {
		t.Fatal(err)
	}
	want := sizes(t, dir.Sandbox(id))
	h = w.open(dir)
	defer h.close()
	h.awaitGone(t, id)
	items, err := unreadable.List(dir)
	if err != nil || len(items) != 1 {
		t.Fatalf("set aside %+v, %v", items, err)
	}
	if got := sizes(t, items[0].Path); !maps.Equal(got, want) {
		t.Errorf("kept %v of %v", got, want)
	}
	h.nothingLeft()
}

// TestStoppedWhileItStarts checks that an agent that is stopped during its start kills no
// machine.
func TestStoppedWhileItStarts(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	id := h.create(t, nil)
	h.close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Recover(ctx, dir, w, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("the agent did not stop")
	}
	h = w.open(dir)
	defer h.close()
	h.runs(t, id, 0)
	h.destroyAll()
	h.nothingLeft()
}

// TestSetAsideIsRetried checks that the agent sets files aside only once their machine has
// ended, and retries until then.
func TestSetAsideIsRetried(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	h := w.open(dir)
	id := h.create(t, nil)
	h.close()
	if err := os.Truncate(dir.SandboxRecord(id), 0); err != nil {
		t.Fatal(err)
	}
	w.setFailing(map[string]float64{"kill": 1})
	h = w.open(dir)
	if err := h.Destroy(t.Context(), id); err == nil {
		t.Error("the sandbox was destroyed while its machine runs")
	}
	if items, err := unreadable.List(dir); err != nil || len(items) != 0 {
		t.Errorf("set aside while the machine runs: %+v, %v", items, err)
	}
	h.close()
	w.setFailing(nil)
	h = w.open(dir)
	if err := h.Destroy(t.Context(), id); err != nil { // The control plane retries.
		t.Error(err)
	}
	if items, err := unreadable.List(dir); err != nil || len(items) != 1 {
		t.Errorf("set aside %+v, %v", items, err)
	}
	h.close()
	h = w.open(dir)
	defer h.close()
	h.nothingLeft()
}

// TestUnendedMachineKeepsItsSlot checks that a machine that cannot be killed keeps its
// network slot, and so its user, until it has ended.
func TestUnendedMachineKeepsItsSlot(t *testing.T) {
	for name, change := range map[string]func(*record){
		"ending":  func(r *record) { r.Ending = &ending{Reason: "it was destroyed", Time: time.Now().UTC()} },
		"paused":  func(r *record) { r.State, r.Slot, r.VM, r.Saved = Paused, nil, nil, new(uuid.UUID) },
		"waiting": func(r *record) { r.State = waiting },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1)
			dir := layout.Dir(t.TempDir())
			h := w.open(dir)
			id := h.create(t, nil)
			h.close()
			rec, err := load(dir, id)
			if err != nil {
				t.Fatal(err)
			}
			slot := *rec.Slot
			change(&rec)
			if err := rec.save(dir); err != nil {
				t.Fatal(err)
			}
			w.setFailing(map[string]float64{"kill": 1})
			kept := func() bool {
				w.mu.Lock()
				defer w.mu.Unlock()
				return w.slots[slot] != nil
			}
			for range 2 { // the agent after the next one keeps the slot too
				h = w.open(dir)
				if !kept() {
					t.Fatal("another machine can get the slot of a running one")
				}
				h.close()
			}
			w.setFailing(nil)
			h = w.open(dir)
			defer h.close()
			if err := h.Destroy(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			h.nothingLeft()
		})
	}
}

// TestKilledBeforeRecord checks that an agent removes a sandbox that a killed one had not
// yet recorded.
func TestKilledBeforeRecord(t *testing.T) {
	w := newWorld(t, 1)
	dir := layout.Dir(t.TempDir())
	w.open(dir).close()
	for _, name := range []string{"", ".sandbox.json.tmp-1", "record-1"} {
		home := dir.Sandbox(uuid.New())
		if err := os.Mkdir(home, 0o700); err != nil {
			t.Fatal(err)
		}
		if name == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(home, name), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h := w.open(dir)
	defer h.close()
	for _, i := range h.List() {
		h.awaitGone(t, i.ID)
	}
	h.nothingLeft()
	if items, err := unreadable.List(dir); err != nil || len(items) != 0 {
		t.Errorf("set aside %+v, %v", items, err)
	}
}
