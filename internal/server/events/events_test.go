package events

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/server/events/redistest"
)

// recorder is a listener that passes on its calls.
type recorder struct {
	changed      chan uuid.UUID
	disconnected chan bool
}

func (r *recorder) ChangedElsewhere(id uuid.UUID) { r.changed <- id }
func (r *recorder) Disconnected(is bool)          { r.disconnected <- is }

func newBus(t *testing.T, socket string) (*Bus, *recorder) {
	t.Helper()
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket, DialerRetries: 1})
	b := New(client, uuid.New(), slog.New(slog.DiscardHandler))
	e := &recorder{changed: make(chan uuid.UUID, 100), disconnected: make(chan bool, 1000)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); b.Run(ctx, e) }()
	t.Cleanup(func() { cancel(); <-done; client.Close() })
	return b, e
}

// until reads calls of Disconnected until one has the value want.
func (e *recorder) until(t *testing.T, want bool) {
	t.Helper()
	timeout := time.After(await.Hang)
	for {
		select {
		case is := <-e.disconnected:
			if is == want && len(e.disconnected) == 0 {
				return
			}
		case <-timeout:
			t.Fatalf("Disconnected was never called with %v", want)
		}
	}
}

func (e *recorder) wantChange(t *testing.T, want uuid.UUID) {
	t.Helper()
	if got := await.Recv(t, "a change of a sandbox", e.changed); got != want {
		t.Fatalf("the listener got a change of %v, want %v", got, want)
	}
}

// TestBus lets two servers notify each other, while Redis is killed and restarted.
func TestBus(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "r.sock")
	stop := redistest.Start(t, socket)
	a, onA := newBus(t, socket)
	b, onB := newBus(t, socket)
	onA.until(t, false)
	onB.until(t, false)
	one, two, three := uuid.New(), uuid.New(), uuid.New()
	a.Changed(one)
	onB.wantChange(t, one)
	b.Changed(two)
	onA.wantChange(t, two)
	if len(onB.changed) > 0 {
		t.Error("a server gets its own message")
	}
	stop()
	onA.until(t, true)
	onB.until(t, true)
	a.Changed(three)
	os.Remove(socket)
	redistest.Start(t, socket)
	onB.until(t, false)
	// A message sent in between either arrives late, or the listener learned that it was
	// disconnected. Here either may happen.
	b.Changed(one)
	a.Changed(one)
	for await.Recv(t, "a change after Redis came back", onB.changed) != one {
	}
}

// TestFlood reports more changes than are sent one by one.
func TestFlood(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "r.sock")
	redistest.Start(t, socket)
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket})
	defer client.Close()
	a := New(client, uuid.New(), slog.New(slog.DiscardHandler))
	for range maxPending + 1 {
		a.Changed(uuid.New())
	}
	if len(a.pending) > maxPending {
		t.Fatalf("%d changes wait", len(a.pending))
	}
	_, e := newBus(t, socket)
	e.until(t, false)
	if err := a.send(context.Background()); err != nil {
		t.Fatal(err)
	}
	e.until(t, false)
	if len(e.changed) > 0 {
		t.Error("the changes were sent one by one")
	}
	a.Changed(uuid.UUID{15: 1})
	if err := a.send(context.Background()); err != nil {
		t.Fatal(err)
	}
	e.wantChange(t, uuid.UUID{15: 1})
}

// published is a hook of a Redis client: after is called when a message has been
// published, before the publisher knows.
type published struct{ after func() error }

func (p published) DialHook(next redis.DialHook) redis.DialHook { return next }

func (p published) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (p published) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if err := next(ctx, cmd); err != nil || cmd.Name() != "publish" {
			return err
		}
		err := p.after()
		cmd.SetErr(err)
		return err
	}
}

// TestChangeWhileSent changes sandboxes after Redis has a message and before the sender
// gets the reply. The next message must name them, whatever the first named.
func TestChangeWhileSent(t *testing.T) {
	for name, flood := range map[string]int{"a few": 3, "a burst": maxPending + 1} {
		for end, failure := range map[string]error{"published": nil, "failed": errors.New("connection broke")} {
			t.Run(name+", "+end, func(t *testing.T) {
				socket := filepath.Join(t.TempDir(), "r.sock")
				redistest.Start(t, socket)
				client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket, MaxRetries: -1})
				defer client.Close()
				a := New(client, uuid.New(), slog.New(slog.DiscardHandler))
				again, late := uuid.New(), uuid.New()
				first := true
				client.AddHook(published{func() error {
					if !first {
						return nil
					}
					first = false
					a.Changed(again)
					a.Changed(late)
					return failure
				}})
				a.Changed(again)
				for range flood - 1 {
					a.Changed(uuid.New())
				}
				if err := a.send(t.Context()); !errors.Is(err, failure) {
					t.Fatalf("send: %v", err)
				}
				// A listener from here on has missed the first message.
				_, e := newBus(t, socket)
				e.until(t, false)
				if err := a.send(t.Context()); err != nil {
					t.Fatal(err)
				}
				if failure != nil && flood > maxPending {
					e.until(t, false)
					return // The message means every sandbox.
				}
				want := map[uuid.UUID]bool{again: true, late: true}
				for timeout := time.After(await.Hang); len(want) > 0; {
					select {
					case sandbox := <-e.changed:
						delete(want, sandbox)
					case <-timeout:
						t.Fatalf("%d changes were not sent", len(want))
					}
				}
			})
		}
	}
}

// TestFlush sends changes after Run has ended.
func TestFlush(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "r.sock")
	redistest.Start(t, socket)
	_, e := newBus(t, socket)
	e.until(t, false)
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket})
	defer client.Close()
	a := New(client, uuid.New(), slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a.Run(ctx, &recorder{changed: make(chan uuid.UUID, 1), disconnected: make(chan bool, 10)})
	last := uuid.New()
	a.Changed(last)
	if err := a.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	e.wantChange(t, last)
}
