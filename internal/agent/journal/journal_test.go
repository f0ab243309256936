package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

func open(t testing.TB, dir layout.Dir) *Journal {
	t.Helper()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	return j
}

func add(t testing.TB, j *Journal, reason string) Event {
	t.Helper()
	e, err := j.Append(Event{Kind: Expired, Sandbox: uuid.New(), Time: time.Now().UTC(), Reason: reason})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestEventsSurviveRestart(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	j := open(t, dir)
	want := []Event{add(t, j, "a"), add(t, j, "b"), add(t, j, "c")}
	// Leave the first journal open, like an agent that was killed.
	j2 := open(t, dir)
	if got := j2.Pending(); !slices.EqualFunc(got, want, func(a, b Event) bool {
		return a.Seq == b.Seq && a.Kind == b.Kind && a.Sandbox == b.Sandbox && a.Time.Equal(b.Time) && a.Reason == b.Reason
	}) {
		t.Errorf("read %v, want %v", got, want)
	}
	if err := j2.Ack(2); err != nil {
		t.Fatal(err)
	}
	if err := j2.Ack(1); err != nil {
		t.Fatal(err)
	}
	if err := j2.Ack(4); err == nil {
		t.Error("an event that does not exist yet was acknowledged")
	}
	if err := j2.Ack(3); err != nil {
		t.Fatal(err)
	}
	if err := j2.Close(); err != nil {
		t.Fatal(err)
	}
	j3 := open(t, dir)
	if got := j3.Pending(); len(got) != 0 {
		t.Errorf("acknowledged events are still pending: %v", got)
	}
	if e := add(t, j3, "d"); e.Seq != 4 {
		t.Errorf("the next event has the number %d, want 4", e.Seq)
	}
	if _, err := j2.Append(Event{}); !errors.Is(err, ErrClosed) {
		t.Errorf("append after close: %v", err)
	}
}

// TestTornAnywhere truncates a journal at each byte, and damages each byte. Open must keep
// all events before that byte, and the journal must stay usable.
func TestTornAnywhere(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	path := dir.Events()
	j := open(t, dir)
	var ends []int64
	for range 3 {
		add(t, j, "reason")
		ends = append(ends, j.size)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	try := func(data []byte, at int, damaged bool) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		j := open(t, dir)
		if (j.Damaged() != nil) != damaged {
			t.Fatalf("broken at byte %d: the file set aside is %v", at, j.Damaged())
		}
		want := 0
		for _, e := range ends {
			if int64(at) >= e {
				want++
			}
		}
		if got := len(j.Pending()); got != want {
			t.Fatalf("broken at byte %d: %d events, want %d", at, got, want)
		}
		add(t, j, "more")
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
		if got := len(open(t, dir).Pending()); got != want+1 {
			t.Fatalf("broken at byte %d: %d events after one more, want %d", at, got, want+1)
		}
	}
	for at := range data {
		// A truncated record was being written when the agent died, so nobody relies on
		// it. Anything else is damage.
		try(slices.Clone(data[:at]), at, 0 < at && at < len(magic))
		flipped := slices.Clone(data)
		flipped[at] ^= 0x41
		try(flipped, at, int64(at) < ends[1])
	}
}

// TestRewriteFails makes a compaction fail after the file lost its name. Append must refuse
// events until it can store them under that name again.
func TestRewriteFails(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	path := dir.Events()
	j := open(t, dir)
	add(t, j, "a")
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil { // no file can replace the folder
		t.Fatal(err)
	}
	if err := j.rewrite(); err == nil {
		t.Fatal("the rewrite did not fail")
	}
	if e, err := j.Append(Event{Kind: Expired, Reason: "refused"}); err == nil {
		t.Fatalf("an event was acknowledged but not stored: %v", e)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	add(t, j, "b")
	var got []string
	for _, e := range open(t, dir).Pending() {
		got = append(got, e.Reason)
	}
	if !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("the next agent finds %q", got)
	}
}

// TestFullDisk opens a journal on a full disk. It must lose no event and refuse an event that
// it cannot write, and it must copy a damaged file before it replaces it.
func TestFullDisk(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		t.Run(fmt.Sprintf("damaged %v", damaged), func(t *testing.T) {
			dir := layout.Dir(t.TempDir())
			if err := unix.Mount("tmpfs", string(dir), "tmpfs", 0, "size=64k"); err != nil {
				t.Skip("needs to mount a file system:", err)
			}
			defer unix.Unmount(string(dir), unix.MNT_DETACH)
			j := open(t, dir)
			add(t, j, "a")
			whole := j.size
			add(t, j, "b")
			add(t, j, "c")
			if err := j.Close(); err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(dir.Events())
			if err != nil {
				t.Fatal(err)
			}
			want := []string{"a", "b", "c"}
			if damaged {
				want = want[:1]
				data[whole+headLen] ^= 1
				if err := os.WriteFile(dir.Events(), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			filler := filepath.Join(string(dir), "filler")
			if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
				t.Fatalf("the disk is not full: %v", err)
			}
			has := func(j *Journal, want ...string) {
				t.Helper()
				var got []string
				for _, e := range j.Pending() {
					got = append(got, e.Reason)
				}
				if !slices.Equal(got, want) {
					t.Errorf("the journal has %q, not %q", got, want)
				}
			}
			for range 2 {
				j = open(t, dir)
				has(j, want...)
				if !errors.Is(j.Full(), unix.ENOSPC) || j.Damaged() != nil {
					t.Errorf("on a full disk, Full is %v and Damaged is %v", j.Full(), j.Damaged())
				}
				if _, err := j.Append(Event{Kind: Expired, Reason: "refused"}); !errors.Is(err, unix.ENOSPC) {
					t.Errorf("adding an event: %v", err)
				}
				if err := j.Ack(1); !errors.Is(err, unix.ENOSPC) {
					t.Errorf("acknowledging: %v", err)
				}
				has(j, want...)
				if now, err := os.ReadFile(dir.Events()); err != nil || !bytes.Equal(now, data) {
					t.Fatalf("the file has changed: %v", err)
				}
			}
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			add(t, j, "d")
			has(open(t, dir), append(want, "d")...)
			if (j.Damaged() != nil) != damaged {
				t.Fatalf("Damaged is %v", j.Damaged())
			}
			if damaged {
				if kept, err := os.ReadFile(j.Damaged().Path); err != nil || !bytes.Equal(kept, data) {
					t.Errorf("the copy differs: %v", err)
				}
			}
		})
	}
}

// TestDamagedJournalIsKept checks that a copy of a damaged journal is kept unchanged.
func TestDamagedJournalIsKept(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	j := open(t, dir)
	add(t, j, "a")
	add(t, j, "b")
	data, err := os.ReadFile(dir.Events())
	if err != nil {
		t.Fatal(err)
	}
	data[len(magic)+headLen] ^= 1
	if err := os.WriteFile(dir.Events(), data, 0o600); err != nil {
		t.Fatal(err)
	}
	j = open(t, dir)
	add(t, j, "c")
	items, err := unreadable.List(dir)
	if err != nil || len(items) != 1 || items[0].Kind != unreadable.Journal || *j.Damaged() != items[0] {
		t.Fatalf("kept %+v, %v; the journal says %+v", items, err, j.Damaged())
	}
	if kept, err := os.ReadFile(items[0].Path); err != nil || !bytes.Equal(kept, data) {
		t.Errorf("the copy differs: %v", err)
	}
}

// TestNewerJournal checks that the agent does not touch a journal of a later release.
func TestNewerJournal(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	data := []byte(magicWord + "2and whatever it holds")
	if err := os.WriteFile(dir.Events(), data, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(dir)
	var newer *format.NewerError
	if !errors.As(err, &newer) || newer.Version != 2 || newer.Known != format.Journal.Version || newer.Path != dir.Events() {
		t.Fatalf("the error is %v", err)
	}
	if now, err := os.ReadFile(dir.Events()); err != nil || !bytes.Equal(now, data) {
		t.Errorf("the journal has changed: %v", err)
	}
}

func TestCompacts(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	path := dir.Events()
	j := open(t, dir)
	var biggest int64
	for range 2000 {
		e := add(t, j, "the virtual machine ended by itself")
		if err := j.Ack(e.Seq); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		biggest = max(biggest, info.Size())
	}
	if biggest > 4*compactAfter {
		t.Errorf("the file grew to %d bytes", biggest)
	}
	if e := add(t, j, ""); e.Seq != 2001 {
		t.Errorf("seq %d after compaction", e.Seq)
	}
}

func TestFollow(t *testing.T) {
	j := open(t, layout.Dir(t.TempDir()))
	add(t, j, "old")
	got := make(chan Event)
	ctx, cancel := context.WithCancel(t.Context())
	var ended sync.WaitGroup
	var followErr error
	ended.Go(func() {
		followErr = j.Follow(ctx, func(e Event) error { got <- e; return nil })
	})
	for i, reason := range []string{"old", "new", "newer"} {
		if i > 0 {
			add(t, j, reason)
		}
		if e := <-got; e.Reason != reason || e.Seq != uint64(i+1) {
			t.Errorf("got %v, want %s", e, reason)
		}
	}
	cancel()
	ended.Wait()
	if !errors.Is(followErr, context.Canceled) {
		t.Error(followErr)
	}
	ended.Go(func() { followErr = j.Follow(t.Context(), func(Event) error { return nil }) })
	_ = j.Close()
	ended.Wait()
	if !errors.Is(followErr, ErrClosed) {
		t.Error(followErr)
	}
}

func FuzzOpen(f *testing.F) {
	dir := layout.Dir(f.TempDir())
	path := dir.Events()
	j := open(f, dir)
	add(f, j, "reason")
	_ = j.Ack(1)
	add(f, j, "reason")
	data, _ := os.ReadFile(path)
	f.Add(data)
	f.Add([]byte(magic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		j := &Journal{}
		whole := j.load(data)
		for i, e := range j.pending {
			if e.Seq <= j.acked || e.Seq > j.last || (i > 0 && e.Seq <= j.pending[i-1].Seq) {
				t.Fatalf("events out of order: %v", j.pending)
			}
		}
		again := &Journal{}
		if again.load(data[:whole]) != whole || len(again.pending) != len(j.pending) {
			t.Fatal("the intact part alone has other events")
		}
	})
}
