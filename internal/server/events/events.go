// Package events tells every server on one Redis what changed. It is a means
// to be quick and nothing rests on it: what is told may be told twice or, with
// Redis away, not at all, and whoever hears then looks at the database. While
// a server cannot hear, it knows.
package events

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
	"github.com/sethvargo/go-retry"
)

// channel carries the ids of sandboxes that changed, 16 bytes each, many in a
// message, after the 16 of the server that sends it.
const channel = "wrenn:sandboxes"

const (
	// maxPending bounds what waits to be sent. Beyond it nothing is told one
	// by one: everybody looks at everything again.
	maxPending = 16384
	// pingEvery is how often a silent Redis is asked whether it is there.
	pingEvery = 3 * time.Second
)

// Bus tells and hears.
type Bus struct {
	redis *redis.Client
	self  uuid.UUID
	log   *slog.Logger

	mu sync.Mutex
	// pending are the sandboxes to tell of, and at which count they changed last.
	pending map[uuid.UUID]uint64
	count   uint64
	flood   bool
	wake    chan struct{}
}

// New returns a bus of the server self. Run must run for anything to be told or heard.
func New(client *redis.Client, self uuid.UUID, log *slog.Logger) *Bus {
	return &Bus{redis: client, self: self, log: log, pending: make(map[uuid.UUID]uint64), wake: make(chan struct{}, 1)}
}

// Changed tells the other servers that a sandbox changed, or a host. It does
// not block.
func (b *Bus) Changed(sandbox uuid.UUID) {
	b.mu.Lock()
	if len(b.pending) >= maxPending && b.pending[sandbox] == 0 {
		b.flood = true
		clear(b.pending)
	}
	if !b.flood {
		b.count++
		b.pending[sandbox] = b.count
	}
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
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
		backoff := retry.WithCappedDuration(2*time.Second, retry.NewExponential(50*time.Millisecond))
		_ = retry.Do(ctx, backoff, func(ctx context.Context) error {
			return retry.RetryableError(b.send(ctx))
		})
	}
}

// send sends what is pending now.
func (b *Bus) send(ctx context.Context) error {
	message := append([]byte{}, b.self[:]...)
	b.mu.Lock()
	sent := make([]uuid.UUID, 0, len(b.pending))
	for sandbox := range b.pending {
		sent = append(sent, sandbox)
	}
	flood, until := b.flood, b.count
	b.mu.Unlock()
	if len(sent) == 0 && !flood {
		return nil
	}
	if flood {
		sent = []uuid.UUID{uuid.Nil} // Which stands for all.
	}
	for _, sandbox := range sent {
		message = append(message, sandbox[:]...)
	}
	if err := b.redis.Publish(ctx, channel, message).Err(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if flood {
		b.flood = false
	}
	for _, sandbox := range sent {
		if b.pending[sandbox] <= until { // It has not changed again meanwhile.
			delete(b.pending, sandbox)
		}
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
		if sandbox := uuid.UUID(payload[:n]); sandbox != uuid.Nil {
			l.Heard(sandbox)
			continue
		}
		again(l)
	}
}
