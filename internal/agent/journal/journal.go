// Package journal keeps what the agent did on its own until the control plane
// has acknowledged it: an append-only file of checksummed records.
package journal

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/agent/unreadable"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// Kind says what happened.
type Kind string

// The kinds of events.
const (
	// Expired: a sandbox's timeout ended and it was destroyed.
	Expired Kind = "expired"
	// Paused: a sandbox was paused: its timeout ended, or the agent was
	// terminated.
	Paused Kind = "paused"
	// Exited: a virtual machine ended by itself and was cleaned up.
	Exited Kind = "exited"
)

// Event is one thing that the agent did on its own.
type Event struct {
	// Seq counts events from 1; it never goes back.
	Seq     uint64    `json:"seq"`
	Kind    Kind      `json:"kind"`
	Sandbox uuid.UUID `json:"sandbox"`
	Time    time.Time `json:"time"`
	Reason  string    `json:"reason,omitempty"`
}

var (
	// ErrClosed says that the journal was closed.
	ErrClosed = errors.New("the journal is closed")

	// ErrFuture says that an event was acknowledged that has not happened yet.
	ErrFuture = errors.New("the event has not happened yet")

	errTorn = errors.New("torn record")
)

// A file is a magic word and records. A record is the length of its payload
// and its CRC-32C, both little-endian uint32, and the payload: a JSON entry.
const (
	magicWord = "wrnjrnl"       // the version's digit follows
	magic     = magicWord + "1" // [format.Journal]'s
	headLen   = 8
	maxRecord = 64 << 10 // bytes of one payload

	// compactAfter is how many dead bytes a file may hold.
	compactAfter = 64 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// entry is one record's payload: an event, or what is acknowledged up to.
type entry struct {
	Event *Event `json:"event,omitempty"`
	Ack   uint64 `json:"ack,omitempty"`
}

// Journal is safe for concurrent use.
type Journal struct {
	dir  layout.Dir
	path string

	mu      sync.Mutex
	closed  bool
	file    *os.File // nil: closed, or the last rewrite failed
	size    int64    // bytes of whole records
	dead    int64    // bytes that compaction would save
	last    uint64   // seq of the youngest event ever
	acked   uint64
	pending []Event       // not acknowledged, oldest first
	changed chan struct{} // closed and replaced at each change and at the end
	dropped int64
	damage  error // what is at path is damaged, and no copy is kept yet
	kept    *unreadable.Item
	full    error
}

// Open opens the journal of an installation, and creates it if there is none.
// It cuts off a record that an agent was killed while writing; see
// [Journal.Dropped]. It keeps a copy of a journal that is damaged in any other
// way as unreadable, and returns a [format.NewerError] if a later release
// wrote the journal. On a full disk it leaves the file as it is; see [Journal.Full].
func Open(dir layout.Dir) (*Journal, error) {
	path := dir.Events()
	if err := Check(path); err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	j := &Journal{dir: dir, path: path, changed: make(chan struct{})}
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	whole := j.load(data)
	j.dropped = int64(len(data) - whole)
	if len(data) > 0 && whole == 0 || !unfinished(data[whole:]) {
		j.damage = fmt.Errorf("the journal is damaged at byte %d of %d", whole, len(data))
	}
	// A file without anything dead or broken would do as it is, but a fresh
	// one is certain, and as small as it gets.
	err = j.rewrite()
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		// The file still has every event. The next write tries again.
		j.full = err
		return j, nil
	}
	if err != nil {
		return nil, err
	}
	return j, nil
}

// Check returns a [format.NewerError] if a later release wrote the journal
// at path. It changes nothing, and is nil for a journal that does not exist or
// that Open keeps as damaged.
func Check(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	var head [len(magic)]byte
	if _, err := io.ReadFull(f, head[:]); err != nil {
		return nil // shorter: Open decides
	}
	digits, ok := strings.CutPrefix(string(head[:]), magicWord)
	written, err := strconv.Atoi(digits)
	if !ok || err != nil || written <= format.Journal.Version {
		return nil
	}
	return format.Journal.Check(path, written)
}

// unfinished reports whether b, the end of a journal, can be a record that was
// being written when the agent or the machine died: no whole record follows.
func unfinished(b []byte) bool {
	for i := 1; i < len(b); i++ {
		if _, _, err := decode(b[i:]); err == nil {
			return false
		}
	}
	return true
}

// keep keeps a copy of a damaged journal.
func keep(dir layout.Dir, path string, damage error) (*unreadable.Item, error) {
	copied := path + ".damaged"
	// A link is a copy: the journal is never written over, but replaced.
	if err := os.Remove(copied); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("keep damaged journal: %w", err)
	}
	if err := os.Link(path, copied); err != nil {
		return nil, fmt.Errorf("keep damaged journal: %w", err)
	}
	item, err := unreadable.Move(dir, unreadable.Journal, copied, damage)
	if err != nil {
		return nil, err
	}
	return &item, nil
}

// Full returns why the journal's file could not be written when it was opened,
// because the disk is full, or nil. Nothing is lost, and writing is tried again with
// the next event or acknowledgement.
func (j *Journal) Full() error { return j.full }

// Dropped is how many bytes were unreadable when the journal was opened.
func (j *Journal) Dropped() int64 { return j.dropped }

// Damaged returns the copy of the journal that was opened, if it was damaged,
// or nil. On a full disk there is none yet.
func (j *Journal) Damaged() *unreadable.Item {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.kept
}

// load takes over what a file says and returns how much of it is whole.
func (j *Journal) load(data []byte) int {
	if !bytes.HasPrefix(data, []byte(magic)) {
		return 0
	}
	whole := len(magic)
	for {
		e, n, err := decode(data[whole:])
		if err != nil {
			return whole
		}
		j.apply(e)
		whole += n
	}
}

// decode reads the record that b begins with and returns its length.
func decode(b []byte) (entry, int, error) {
	var e entry
	if len(b) < headLen {
		return e, 0, errTorn
	}
	n := binary.LittleEndian.Uint32(b)
	if n == 0 || n > maxRecord || int(n) > len(b)-headLen {
		return e, 0, errTorn
	}
	payload := b[headLen : headLen+int(n)]
	if crc32.Checksum(payload, castagnoli) != binary.LittleEndian.Uint32(b[4:]) {
		return e, 0, errTorn
	}
	if err := json.Unmarshal(payload, &e); err != nil {
		return e, 0, errTorn
	}
	return e, headLen + int(n), nil
}

func encode(e entry) ([]byte, error) {
	payload, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode journal record: %w", err)
	}
	if len(payload) > maxRecord {
		return nil, fmt.Errorf("journal record of %d bytes is longer than %d", len(payload), maxRecord)
	}
	b := make([]byte, headLen, headLen+len(payload))
	binary.LittleEndian.PutUint32(b, uint32(len(payload)))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(payload, castagnoli))
	return append(b, payload...), nil
}

// apply does to the state in memory what a record says.
func (j *Journal) apply(e entry) {
	if e.Event != nil && e.Event.Seq > j.last {
		j.last = e.Event.Seq
		j.pending = append(j.pending, *e.Event)
	}
	if e.Ack > 0 {
		j.acked = max(j.acked, e.Ack)
		j.last = max(j.last, e.Ack)
	}
	n, _ := slices.BinarySearchFunc(j.pending, j.acked, func(p Event, seq uint64) int {
		if p.Seq <= seq {
			return -1
		}
		return 1
	})
	j.pending = slices.Delete(j.pending, 0, n)
}

// rewrite replaces the file by one with nothing dead in it. The caller holds
// the lock, or nobody else has the journal yet.
func (j *Journal) rewrite() error {
	content := []byte(magic)
	entries := make([]entry, 0, len(j.pending)+1)
	if j.acked > 0 {
		entries = append(entries, entry{Ack: j.acked})
	}
	for i := range j.pending {
		entries = append(entries, entry{Event: &j.pending[i]})
	}
	for _, e := range entries {
		b, err := encode(e)
		if err != nil {
			return err
		}
		content = append(content, b...)
	}
	if j.damage != nil {
		var err error
		if j.kept, err = keep(j.dir, j.path, j.damage); err != nil {
			return err
		}
		j.damage = nil
	}
	// Should a step below fail, the file may have its new content or the old
	// one, so the one that is open may have no name any more.
	if j.file != nil {
		j.file.Close()
		j.file = nil
	}
	if err := atomicfile.Write(j.path, content, 0o600); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	f, err := os.OpenFile(j.path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	j.file, j.size, j.dead = f, int64(len(content)), 0
	return nil
}

// write appends a record; with an error the file is as before.
func (j *Journal) write(e entry, durable bool) (int64, error) {
	if j.closed {
		return 0, ErrClosed
	}
	b, err := encode(e)
	if err != nil {
		return 0, err
	}
	if j.file == nil {
		if err := j.rewrite(); err != nil {
			return 0, err
		}
	}
	_, err = j.file.WriteAt(b, j.size)
	if err == nil && durable {
		err = j.file.Sync()
	}
	if err != nil {
		// Half a record would hide those written after it.
		return 0, errors.Join(fmt.Errorf("append to journal: %w", err), j.file.Truncate(j.size))
	}
	j.size += int64(len(b))
	return int64(len(b)), nil
}

// Append adds an event, durably, and returns it with its number.
func (j *Journal) Append(e Event) (Event, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e.Seq = j.last + 1
	if _, err := j.write(entry{Event: &e}, true); err != nil {
		return Event{}, err
	}
	j.apply(entry{Event: &e})
	j.tell()
	return e, nil
}

// tell wakes whoever waits for a change.
func (j *Journal) tell() {
	close(j.changed)
	j.changed = make(chan struct{})
}

// Ack forgets the events up to and including seq. One that is lost by a crash
// only makes them come again.
func (j *Journal) Ack(seq uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if seq > j.last {
		return fmt.Errorf("acknowledge event %d: %w", seq, ErrFuture)
	}
	if seq <= j.acked {
		return nil
	}
	n, err := j.write(entry{Ack: seq}, false)
	if err != nil {
		return err
	}
	// At least the acknowledgement and one event of about its size or more.
	j.dead += n + n*int64(seq-j.acked)
	j.apply(entry{Ack: seq})
	j.tell()
	if j.dead > compactAfter || (len(j.pending) == 0 && j.size > compactAfter) {
		return j.rewrite()
	}
	return nil
}

// Pending is every event that is not acknowledged, oldest first.
func (j *Journal) Pending() []Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.pending)
}

// Follow calls f with each event that is not acknowledged, oldest first, and
// goes on with new ones until ctx is done, the journal is closed or f fails;
// it returns that reason.
func (j *Journal) Follow(ctx context.Context, f func(Event) error) error {
	var told uint64
	for {
		j.mu.Lock()
		changed, closed := j.changed, j.closed
		var fresh []Event
		for _, e := range j.pending {
			if e.Seq > told {
				fresh = append(fresh, e)
			}
		}
		j.mu.Unlock()
		if closed {
			return ErrClosed
		}
		for _, e := range fresh {
			if err := f(e); err != nil {
				return err
			}
			told = e.Seq
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Drained returns when every event is acknowledged, ctx is done or the journal
// is closed.
func (j *Journal) Drained(ctx context.Context) {
	for {
		j.mu.Lock()
		changed, done := j.changed, j.closed || len(j.pending) == 0
		j.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// Close ends every Follow.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return nil
	}
	j.closed = true
	close(j.changed)
	if j.file == nil {
		return nil
	}
	err := errors.Join(j.file.Sync(), j.file.Close())
	j.file = nil
	return err
}
