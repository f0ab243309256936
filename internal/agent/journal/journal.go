// Package journal stores events, which are what the agent did on its own, until the
// control plane acknowledges them, in an append-only file of checksummed records.
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

// Kind is a kind of event.
type Kind string

// The kinds of events.
const (
	// Expired means that the agent destroyed a sandbox after its timeout.
	Expired Kind = "expired"
	// Paused means that the agent paused a sandbox, after its timeout or because the agent
	// was terminated.
	Paused Kind = "paused"
	// Exited means that a virtual machine ended by itself and the agent cleaned it up.
	Exited Kind = "exited"
)

// Event is something that the agent did on its own.
type Event struct {
	// Seq numbers events from 1. It never decreases.
	Seq     uint64    `json:"seq"`
	Kind    Kind      `json:"kind"`
	Sandbox uuid.UUID `json:"sandbox"`
	Time    time.Time `json:"time"`
	Reason  string    `json:"reason,omitempty"`
}

var (
	// ErrClosed means that the journal is closed.
	ErrClosed = errors.New("the journal is closed")

	// ErrFuture means that a caller acknowledged an event that has not happened yet.
	ErrFuture = errors.New("the event has not happened yet")

	errTorn = errors.New("torn record")
)

// A file is the magic and records. A record is the length of its payload and the
// payload's CRC-32C, both little-endian uint32, and the payload, which is a JSON entry.
const (
	magicWord = "wrnjrnl"       // followed by the version's digit
	magic     = magicWord + "1" // the version of [format.Journal]
	headLen   = 8
	maxRecord = 64 << 10 // bytes of one payload

	// compactAfter is the number of dead bytes after which the file is rewritten.
	compactAfter = 64 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// entry is a record's payload: an event, or the seq up to which events are acknowledged.
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
	size    int64    // bytes up to the end of the last whole record
	dead    int64    // bytes that compaction would save
	last    uint64   // seq of the latest event ever
	acked   uint64
	pending []Event       // not acknowledged, oldest first
	changed chan struct{} // closed at each change, and replaced except by Close
	dropped int64
	damage  error // the file at path is damaged, and rewrite must keep a copy
	kept    *unreadable.Item
	full    error
}

// Open opens the journal in dir, and creates it if there is none. It cuts off the torn
// record of a killed agent; see [Journal.Dropped]. If the journal is damaged in another
// way, Open keeps a copy with the unreadable data. It returns a [format.NewerError] if a
// later release wrote the journal. On a full disk it does not change the file; see
// [Journal.Full].
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
	// Always rewrite: a fresh file is certainly valid and as small as possible.
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

// Check returns a [format.NewerError] if a later release wrote the journal at path. It
// returns nil for a missing journal, and for a damaged one, which is Open's business.
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
		return nil // too short
	}
	digits, ok := strings.CutPrefix(string(head[:]), magicWord)
	written, err := strconv.Atoi(digits)
	if !ok || err != nil || written <= format.Journal.Version {
		return nil
	}
	return format.Journal.Check(path, written)
}

// unfinished reports whether b, the end of a journal, can be a torn write, which means
// that no whole record follows.
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
	// A link is enough of a copy, because rewrite replaces the file.
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

// Full returns the error if Open could not rewrite the file because the disk was full,
// and nil otherwise. No event is lost. The next event or acknowledgement tries again.
func (j *Journal) Full() error { return j.full }

// Dropped returns the number of bytes at the file's end that Open could not read.
func (j *Journal) Dropped() int64 { return j.dropped }

// Damaged returns the copy of the file if it was damaged when it was opened, or nil. On
// a full disk there is no copy yet.
func (j *Journal) Damaged() *unreadable.Item {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.kept
}

// load applies the records of a file up to the first torn one, and returns their length.
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

// decode decodes the record at the beginning of b and returns its length.
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
		return nil, fmt.Errorf("encode journal record: %d bytes exceed %d", len(payload), maxRecord)
	}
	b := make([]byte, headLen, headLen+len(payload))
	binary.LittleEndian.PutUint32(b, uint32(len(payload)))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(payload, castagnoli))
	return append(b, payload...), nil
}

// apply applies a record to the state in memory.
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

// rewrite replaces the file by one without dead records. The caller holds mu, or nobody
// else has the journal yet.
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
	// Close it first: if a step below fails, the open file may have lost its name to the
	// new one.
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

// write appends a record and returns its length. After an error, the file is unchanged.
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
		// A torn record would hide later ones.
		return 0, errors.Join(fmt.Errorf("append to journal: %w", err), j.file.Truncate(j.size))
	}
	j.size += int64(len(b))
	return int64(len(b)), nil
}

// Append stores an event durably and returns it with its Seq.
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

// tell wakes those who wait for a change. The caller holds mu.
func (j *Journal) tell() {
	close(j.changed)
	j.changed = make(chan struct{})
}

// Ack removes the events up to and including seq. It does not sync, because a lost
// acknowledgement only makes the agent send the events again.
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
	// An estimate: the acknowledgement, and each event with the acknowledgement's size.
	j.dead += n + n*int64(seq-j.acked)
	j.apply(entry{Ack: seq})
	j.tell()
	if j.dead > compactAfter || (len(j.pending) == 0 && j.size > compactAfter) {
		return j.rewrite()
	}
	return nil
}

// Pending returns the unacknowledged events, oldest first.
func (j *Journal) Pending() []Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.pending)
}

// Follow calls f with each unacknowledged event, oldest first, and then with each new
// one. It returns an error when ctx is done, the journal is closed or f fails.
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

// WaitAcknowledged waits until every event is acknowledged, ctx is done or the journal is
// closed.
func (j *Journal) WaitAcknowledged(ctx context.Context) {
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

// Close closes the journal and ends every Follow. It is idempotent.
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
