package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/backoff"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

const (
	// steadyAfter is how long a stream of events must last before a failure is retried at
	// once.
	steadyAfter = 5 * time.Second
	// writeWithin bounds one attempt to store an event.
	writeWithin = 15 * time.Second
	// ackWithin bounds an acknowledgement.
	ackWithin = 10 * time.Second
	// eventRetries is how often the watch retries to store an event that the database
	// rejects, before it relies on the comparison.
	eventRetries = 3
	// maxOpen bounds the events of a host that are not acknowledged, most of which wait for
	// an earlier one. A hostile host could send any number meanwhile.
	maxOpen = 4096
)

// listen stores and acknowledges the events of what the host did by itself.
func (w *watch) listen() {
	waits := backoff.New(200*time.Millisecond, 5*time.Second)
	down := false
	for {
		heard, err := w.follow(w.ctx)
		if w.ctx.Err() != nil {
			return
		}
		if heard {
			waits.Reset()
			down = false
		}
		if !down {
			w.log.Warn("stream of host's events failed", "error", err)
			down = true
			w.compareSoon()
		}
		if waits.Wait(w.ctx) != nil {
			return
		}
	}
}

// follow handles the host's events until the stream ends. heard reports whether the
// stream worked: it delivered an event or lasted for steadyAfter.
func (w *watch) follow(ctx context.Context) (heard bool, err error) {
	if err := w.Hosts.Contact(ctx, w.host); err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var later sync.WaitGroup
	defer later.Wait()
	defer cancel(nil)
	begun := time.Now()
	stream, err := w.host.Agent.Events(ctx, connect.NewRequest(&hostagentv1.EventsRequest{}))
	if err != nil {
		return false, err
	}
	defer stream.Close()
	w.log.Info("following host's events")
	w.compareSoon()
	open := newLedger(maxOpen)
	for stream.Receive() {
		e := stream.Msg().GetEvent()
		if err := open.begin(ctx, e.GetSeq()); err != nil {
			return heard, err
		}
		created := w.created(e)
		if created == nil {
			if err := w.handle(ctx, open, e); err != nil {
				return heard, err
			}
			heard = true
			continue
		}
		// This server is still creating the sandbox and may not have marked it running.
		// Later events do not wait for that.
		later.Go(func() {
			select {
			case <-created:
				if err := w.handle(ctx, open, e); err != nil {
					cancel(err)
				}
			case <-ctx.Done():
			}
		})
	}
	if cause := context.Cause(ctx); cause != nil {
		return heard, cause
	}
	return heard || time.Since(begun) > steadyAfter, stream.Err()
}

// created returns a channel that is closed when this server has finished creating the
// event's sandbox; nil if it is not creating it.
func (w *watch) created(e *hostagentv1.Event) <-chan struct{} {
	u, err := id.Parse(id.Sandbox, e.GetSandboxId())
	if err != nil {
		return nil
	}
	return w.Sandboxes.Created(u)
}

// handle stores an event and acknowledges all events up to the first that is not stored.
func (w *watch) handle(ctx context.Context, open *ledger, e *hostagentv1.Event) error {
	var err error
	away := false // the database is unreachable
	waits := backoff.New(50*time.Millisecond, time.Second)
	for range 1 + eventRetries {
		err = fault.Guard(w.log, func() error {
			ctx, cancel := context.WithTimeout(ctx, w.writeWithin)
			defer cancel()
			return w.apply(ctx, e)
		})
		away = store.Unreachable(err) || errors.Is(err, context.DeadlineExceeded)
		if err == nil || away || waits.Wait(ctx) != nil {
			break
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if away {
		return fmt.Errorf("store event %d: %w", e.GetSeq(), err)
	}
	if err != nil {
		// Unacknowledged, this event would block all later ones. The comparison finds its
		// result, though not its reason.
		w.log.Error("cannot store host's event", "seq", e.GetSeq(), "sandbox_id", e.GetSandboxId(), "kind", e.GetKind(), "error", err)
		w.compareSoon()
	}
	seq, ok := open.end(e.GetSeq())
	if !ok {
		return nil
	}
	ack, cancel := context.WithTimeout(ctx, ackWithin)
	defer cancel()
	if _, err := w.host.Agent.AckEvents(ack, connect.NewRequest(&hostagentv1.AckEventsRequest{Seq: seq})); err != nil {
		return fmt.Errorf("acknowledge event %d: %w", seq, err)
	}
	return nil
}

// ledger tracks up to which event all are stored.
type ledger struct {
	room chan struct{} // has an element for each entry in open
	mu   sync.Mutex
	// open has the events that are not stored, in order, and the stored ones after them.
	open []entry
}

type entry struct {
	seq  uint64
	done bool
}

// newLedger returns an empty ledger for at most most events.
func newLedger(most int) *ledger { return &ledger{room: make(chan struct{}, most)} }

// begin adds an event. It waits until there is room for it.
func (l *ledger) begin(ctx context.Context, seq uint64) error {
	select {
	case l.room <- struct{}{}:
	default:
		select {
		case l.room <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open = append(l.open, entry{seq: seq})
	return nil
}

// end marks an event stored. If that extends the sequence of stored events, it returns
// the last one of it.
func (l *ledger) end(seq uint64) (last uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := slices.IndexFunc(l.open, func(e entry) bool { return e.seq == seq }); i >= 0 {
		l.open[i].done = true
	}
	for len(l.open) > 0 && l.open[0].done {
		last, ok = l.open[0].seq, true
		l.open = l.open[1:]
		<-l.room
	}
	return last, ok
}

// apply stores an event's effect on its sandbox.
func (w *watch) apply(ctx context.Context, e *hostagentv1.Event) error {
	sandbox, err := id.Parse(id.Sandbox, e.GetSandboxId())
	if err != nil {
		w.log.Error("host sent an event with a malformed id", "seq", e.GetSeq())
		return nil
	}
	// PostgreSQL's text has no NUL.
	why := hosts.Text(strings.ReplaceAll(e.GetReason(), "\x00", ""))
	at := time.Now()
	if e.GetTime() != nil {
		at = e.GetTime().AsTime()
	}
	switch e.Kind {
	case hostagentv1.Event_KIND_EXPIRED:
		return w.Sandboxes.HostEnded(ctx, w.host.ID, sandbox, "expired", "", at)
	case hostagentv1.Event_KIND_EXITED:
		if why == "" {
			why = "the virtual machine exited by itself"
		}
		return w.Sandboxes.HostEnded(ctx, w.host.ID, sandbox, "exited", why, at)
	case hostagentv1.Event_KIND_PAUSED:
		// The event may be old and the sandbox resumed since, so compare with the host's
		// list.
		w.log.Debug("host paused sandbox", "sandbox_id", e.SandboxId, "reason", why)
		w.compareSoon()
		return nil
	case hostagentv1.Event_KIND_UNSPECIFIED:
	}
	w.log.Warn("host sent an event of an unknown kind", "kind", e.Kind)
	return nil
}
