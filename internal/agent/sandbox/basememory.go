package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/memory"
	"github.com/wrenn-dev/wrenn/internal/agent/sparse"
	"github.com/wrenn-dev/wrenn/internal/atomicfile"
)

// maxIdleBases is the number of unused memories to keep.
const maxIdleBases = 4

// bases are the memories of captures, as files in RAM. All machines of a capture map the
// same file.
type bases struct {
	mu    sync.Mutex
	known map[uuid.UUID]*base
	clock int // counts uses
}

// base is one of them.
type base struct {
	id    uuid.UUID // the capture's
	ready chan struct{}
	err   error         // set before ready is closed, like the fields below
	image *memory.Image // the content of file; nil: only one machine uses it
	file  *os.File
	bytes int64 // RAM that file takes

	refs     int  // guarded by bases.mu, like the fields below
	used     int  // clock at the last release
	unwanted bool // close it when nobody uses it
}

// acquire returns the memory of a capture, and loads it if necessary. The caller must
// release it.
func (s *bases) acquire(ctx context.Context, c *image.Capture) (*base, error) {
	s.mu.Lock()
	b := s.known[c.ID]
	first := b == nil
	if first {
		b = &base{id: c.ID, ready: make(chan struct{})}
		if s.known == nil {
			s.known = map[uuid.UUID]*base{}
		}
		s.known[c.ID] = b
	}
	b.refs++
	s.mu.Unlock()
	if first {
		// Without ctx's end, because other callers may wait for it.
		b.err = b.open(context.WithoutCancel(ctx), c)
		close(b.ready)
	}
	select {
	case <-b.ready:
	case <-ctx.Done():
		s.release(b)
		return nil, context.Cause(ctx)
	}
	if b.err != nil {
		s.release(b)
		return nil, b.err
	}
	return b, nil
}

// share adds a user to a memory. It returns false if nobody uses the memory, which may be
// closed then. Otherwise the caller must release it.
func (s *bases) share(b *base) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.refs == 0 {
		return false
	}
	b.refs++
	return true
}

func (b *base) open(ctx context.Context, c *image.Capture) error {
	m, err := memory.Open(c.Memory())
	if err != nil {
		return fmt.Errorf("read the captured memory: %w", err)
	}
	if err := b.materialize(ctx, m); err != nil {
		return errors.Join(err, m.Close())
	}
	b.image = m
	return nil
}

func (b *base) materialize(ctx context.Context, m *memory.Image) error {
	f, err := m.Materialize(ctx, "wrenn-"+b.id.String())
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	b.file, b.bytes = f, sparse.Allocated(info)
	return nil
}

// own makes a memory with m's content for only one machine. It does not keep m. The caller
// must release it.
func (s *bases) own(ctx context.Context, m *memory.Image) (*base, error) {
	b := &base{id: uuid.New(), ready: make(chan struct{}), refs: 1, unwanted: true}
	if err := b.materialize(ctx, m); err != nil {
		return nil, err
	}
	close(b.ready)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = map[uuid.UUID]*base{}
	}
	s.known[b.id] = b
	return b, nil
}

func (b *base) close() {
	if b.file != nil {
		_ = b.file.Close()
	}
	if b.image != nil {
		_ = b.image.Close()
	}
}

// release removes a user from a memory.
func (s *bases) release(b *base) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.refs--
	s.clock++
	b.used = s.clock
	if b.refs == 0 && (b.unwanted || b.failed()) {
		delete(s.known, b.id)
		b.close()
		return
	}
	s.shrink(maxIdleBases)
}

// forget closes the memory of a deleted capture as soon as no machine uses it. Until then,
// the capture's open files take space.
func (s *bases) forget(capture uuid.UUID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.known[capture]
	if b == nil {
		return
	}
	b.unwanted = true
	if b.refs == 0 {
		delete(s.known, b.id)
		b.close()
	}
}

func (b *base) failed() bool {
	select {
	case <-b.ready:
		return b.err != nil
	default:
		return false
	}
}

// shrink closes unused memories, least recently used first, until at most n are left. The
// caller holds mu.
func (s *bases) shrink(n int) {
	for {
		var oldest *base
		idle := 0
		for _, b := range s.known {
			if b.refs > 0 {
				continue
			}
			idle++
			if oldest == nil || b.used < oldest.used {
				oldest = b
			}
		}
		if idle <= n {
			return
		}
		delete(s.known, oldest.id)
		oldest.close()
	}
}

// drop closes all unused memories.
func (s *bases) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shrink(0)
}

// mib returns the RAM that all memories take, in MiB.
func (s *bases) mib() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	var sum int64
	for _, b := range s.known {
		select {
		case <-b.ready:
			sum += b.bytes
		default:
		}
	}
	return int(sum >> 20)
}

// saveDevices saves the state of a held machine's devices to a new file.
func (inst *instance) saveDevices(ctx context.Context, name string) error {
	devices, err := inst.vm.Devices(ctx)
	if err != nil {
		return err
	}
	return writeDevices(name, devices)
}

// writeDevices writes a state of devices to a new file and syncs it.
func writeDevices(name string, devices []byte) error {
	if err := atomicfile.Create(name, devices, 0o400); err != nil {
		return fmt.Errorf("write devices: %w", err)
	}
	return nil
}
