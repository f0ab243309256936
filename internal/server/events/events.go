// Package events tells every server on one Redis what changed. It is a means
// to be quick and nothing rests on it: what is told may be told twice or, with
// Redis away, not at all, and whoever hears then looks at the database. While
// a server cannot hear, it knows.
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

// channel carries the ids of sandboxes that changed, 16 bytes each, many in a
// message, after the 16 of the server that sends it.
const channel = "wrenn:sandboxes"

const (
	// maxPending bounds what waits to be sent. Beyond it the bus sends everything
	// instead, and every server looks at everything again.
	maxPending = 16384
	// pingEvery is how often a silent Redis is asked whether it is there.
	pingEvery = 3 * time.Second
)

// everything stands for all sandboxes and hosts in a message.
var everything = uuid.Nil

// Bus tells and hears.
type Bus struct {
	redis *redis.Client
	self  uuid.UUID
	log   *slog.Logger

	wake chan struct{}

	mu sync.Mutex
	// pending are the changes that no message has yet, at most maxPending;
	// everything stands alone.
	pending map[uuid.UUID]struct{}
}

// New returns a bus of the server self. Run must run for anything to be told or heard.
func New(client *redis.Client, self uuid.UUID, log *slog.Logger) *Bus {
	return &Bus{redis: client, self: self, log: log, pending: make(map[uuid.UUID]struct{}), wake: make(chan struct{}, 1)}
}

// Changed tells the other servers that a sandbox changed, or a host. It does
// not block.
func (b *Bus) Changed(sandbox uuid.UUID) {
	b.add(sandbox)
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// add adds changes to those that are pending.
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

// take returns the pending changes and leaves none.
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

// Listener is what hears. Its methods are called one after another.
type Listener interface {
	// Heard is told that a sandbox, or a host, changed.
	Heard(sandbox uuid.UUID)
	// Deaf is told whether changes can be missed from now on. After they could,
	// and before Deaf(false), anything may have changed.
	Deaf(is bool)
}

// Run tells and hears until ctx is done.
func (b *Bus) Run(ctx context.Context, l Listener) {
	var wg sync.WaitGroup
	wg.Go(func() { b.tell(ctx) })
	wg.Go(func() { b.listen(ctx, l) })
	wg.Wait()
}

// tell sends what is pending, as often as it takes.
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

// send publishes the pending changes. Changes that come meanwhile are another
// message's: whoever reads this one may look at the database before them.
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

// Flush publishes the changes that Run had no time for before it ended.
func (b *Bus) Flush(ctx context.Context) error {
	if err := b.send(ctx); err != nil {
		return fmt.Errorf("publish changes: %w", err)
	}
	return nil
}

// listen hears what the others tell.
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
				// At first, and after every time that the connection broke.
				again(l)
				if deaf {
					b.log.Info("hears of what other servers change")
				}
				deaf = false
			case *redis.Message:
				b.heard([]byte(m.Payload), l)
			}
			continue
		}
		var quiet net.Error
		if !asked && errors.As(err, &quiet) && quiet.Timeout() && sub.Ping(ctx) == nil {
			asked = true // Whether this is silence or a dead connection.
			continue
		}
		asked = false
		if !deaf {
			b.log.Warn("does not hear what other servers change; going on without", "error", err)
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

// again has everything looked at anew.
func again(l Listener) {
	l.Deaf(true)
	l.Deaf(false)
}

// heard passes on what a message says.
func (b *Bus) heard(payload []byte, l Listener) {
	const n = len(uuid.UUID{})
	if len(payload) < n || len(payload)%n != 0 {
		b.log.Warn("message of a wrong length", "bytes", len(payload))
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
