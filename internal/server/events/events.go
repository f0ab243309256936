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
	// Heard reports that another server changed a sandbox or a host.
	Heard(sandbox uuid.UUID)
	// Deaf(true) reports that changes may be lost from now on. Before Deaf(false), any
	// sandbox or host may have changed.
	Deaf(is bool)
}

// Run sends and receives changes until ctx is done.
func (b *Bus) Run(ctx context.Context, l Listener) {
	var wg sync.WaitGroup
	wg.Go(func() { b.tell(ctx) })
	wg.Go(func() { b.listen(ctx, l) })
	wg.Wait()
}

// tell sends pending changes and retries until it succeeds.
func (b *Bus) tell(ctx context.Context) {
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
	deaf, asked := true, false
	l.Deaf(true)
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
			asked = false
			switch m := message.(type) {
			case *redis.Subscription:
				// The first one, or one after a reconnect.
				again(l)
				if deaf {
					b.log.Info("receiving changes of other servers")
				}
				deaf = false
			case *redis.Message:
				b.heard([]byte(m.Payload), l)
			}
			continue
		}
		var quiet net.Error
		if !asked && errors.As(err, &quiet) && quiet.Timeout() && sub.Ping(ctx) == nil {
			asked = true // to tell a silent connection from a dead one
			continue
		}
		asked = false
		if !deaf {
			b.log.Warn("cannot receive changes of other servers; polling the database instead", "error", err)
			deaf = true
		}
		l.Deaf(true)
		t := time.NewTimer(200 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// again makes the listener read everything again.
func again(l Listener) {
	l.Deaf(true)
	l.Deaf(false)
}

// heard passes a message to the listener.
func (b *Bus) heard(payload []byte, l Listener) {
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
			l.Heard(sandbox)
			continue
		}
		again(l)
	}
}
