// Package events announces changes to all servers on one Redis. It only makes them react
// sooner: messages can be repeated or lost, so receivers read the database. A server
// knows when it cannot receive messages.
package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/internal/backoff"
)

// channel carries messages of the sender's id (16 bytes), then the ids of the changed
// sandboxes or hosts (16 bytes each).
const channel = "wrenn:sandboxes"

const (
	// maxPending bounds the unsent changes. Beyond it the bus sends everything, which
	// makes every server read all sandboxes and hosts again.
	maxPending = 16384
	// pingEvery is how long Redis may be silent before the bus pings it.
	pingEvery = 3 * time.Second
)

// everything stands for all sandboxes and hosts in a message.
var everything = uuid.Nil

// Bus sends and receives changes. It is safe for concurrent use.
type Bus struct {
	redis *redis.Client
	self  uuid.UUID
	log   *slog.Logger

	wake chan struct{}

	mu sync.Mutex
	// pending is the unsent changes, at most maxPending. It contains everything only
	// alone.
	pending map[uuid.UUID]struct{}
}

// New returns a bus for the server self. It works while [Bus.Run] runs.
func New(client *redis.Client, self uuid.UUID, log *slog.Logger) *Bus {
	return &Bus{redis: client, self: self, log: log, pending: make(map[uuid.UUID]struct{}), wake: make(chan struct{}, 1)}
}

// Changed announces a change of a sandbox or a host to the other servers. It does not
// block.
func (b *Bus) Changed(sandbox uuid.UUID) {
	b.add(sandbox)
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// add adds changes to pending.
func (b *Bus) add(changed ...uuid.UUID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, sandbox := range changed {
		if _, ok := b.pending[everything]; ok {
			return
		}
		b.pending[sandbox] = struct{}{}
		if sandbox == everything || len(b.pending) > maxPending {
			b.pending = map[uuid.UUID]struct{}{everything: {}}
		}
	}
}

// take returns the pending changes and clears them.
func (b *Bus) take() []uuid.UUID {
	b.mu.Lock()
	defer b.mu.Unlock()
	taken := make([]uuid.UUID, 0, len(b.pending))
	for sandbox := range b.pending {
		taken = append(taken, sandbox)
	}
	clear(b.pending)
	return taken
}

// Listener receives changes. The bus does not call its methods concurrently.
type Listener interface {
	// ChangedElsewhere reports that another server changed a sandbox or a host.
	ChangedElsewhere(id uuid.UUID)
	// Disconnected(true) reports that changes may be lost from now on. Before
	// Disconnected(false), any sandbox or host may have changed.
	Disconnected(is bool)
}

// Run sends and receives changes until ctx is done.
func (b *Bus) Run(ctx context.Context, l Listener) {
	var wg sync.WaitGroup
	wg.Go(func() { b.publishLoop(ctx) })
	wg.Go(func() { b.listen(ctx, l) })
	wg.Wait()
}

// publishLoop sends pending changes and retries until it succeeds.
func (b *Bus) publishLoop(ctx context.Context) {
	for {
		select {
		case <-b.wake:
		case <-ctx.Done():
			return
		}
		waits := backoff.New(50*time.Millisecond, 2*time.Second)
		for b.send(ctx) != nil && waits.Wait(ctx) == nil {
		}
	}
}

// send publishes the pending changes. Changes that arrive during the call go into the
// next message, because receivers of this one may read the database before them.
func (b *Bus) send(ctx context.Context) error {
	changed := b.take()
	if len(changed) == 0 {
		return nil
	}
	message := append([]byte{}, b.self[:]...)
	for _, sandbox := range changed {
		message = append(message, sandbox[:]...)
	}
	err := b.redis.Publish(ctx, channel, message).Err()
	if err != nil {
		b.add(changed...)
	}
	return err
}

// Flush publishes the changes that Run left unsent when it ended.
func (b *Bus) Flush(ctx context.Context) error {
	if err := b.send(ctx); err != nil {
		return fmt.Errorf("publish changes: %w", err)
	}
	return nil
}

// listen receives the other servers' changes.
func (b *Bus) listen(ctx context.Context, l Listener) {
	disconnected, pinged := true, false
	l.Disconnected(true)
	sub := b.redis.Subscribe(ctx, channel)
	stop := context.AfterFunc(ctx, func() { _ = sub.Close() })
	defer func() {
		if stop() {
			_ = sub.Close()
		}
	}()
	for {
		message, err := sub.ReceiveTimeout(ctx, pingEvery)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			pinged = false
			switch m := message.(type) {
			case *redis.Subscription:
				// The first one, or one after a reconnect.
				resync(l)
				if disconnected {
					b.log.Info("receiving changes of other servers")
				}
				disconnected = false
			case *redis.Message:
				b.deliver([]byte(m.Payload), l)
			}
			continue
		}
		var quiet net.Error
		if !pinged && errors.As(err, &quiet) && quiet.Timeout() && sub.Ping(ctx) == nil {
			pinged = true // to tell a silent connection from a dead one
			continue
		}
		pinged = false
		if !disconnected {
			b.log.Warn("cannot receive changes of other servers; polling the database instead", "error", err)
			disconnected = true
		}
		l.Disconnected(true)
		t := time.NewTimer(200 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// resync makes the listener read everything again.
func resync(l Listener) {
	l.Disconnected(true)
	l.Disconnected(false)
}

// deliver passes a message to the listener.
func (b *Bus) deliver(payload []byte, l Listener) {
	const n = len(uuid.UUID{})
	if len(payload) < n || len(payload)%n != 0 {
		b.log.Warn("malformed message from another server", "bytes", len(payload))
		return
	}
	if uuid.UUID(payload[:n]) == b.self {
		return
	}
	for payload = payload[n:]; len(payload) > 0; payload = payload[n:] {
		if sandbox := uuid.UUID(payload[:n]); sandbox != everything {
			l.ChangedElsewhere(sandbox)
			continue
		}
		resync(l)
	}
}
