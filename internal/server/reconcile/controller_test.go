package reconcile

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/await"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
)

// TestDestroyHangs: the destroy of one sandbox hangs. Its host is asked how it
// is as ever, an unrelated sandbox runs on, and what the host lost is written.
func TestDestroyHangs(t *testing.T) {
	b := newBench(t, time.Second)
	stuck, other, lost := b.add(sandboxes.Stopping, running), b.add(sandboxes.Running, running), b.add(sandboxes.Running, none)
	g := newGate("destroy", id.Format(id.Sandbox, stuck))
	b.agent.hook(g.on)
	b.goes()
	g.wait(t)
	before := b.agent.count("host")
	// Twice the time after which a host that is not heard of is unreachable.
	b.eventually("the host is asked how it is", func() bool { return b.agent.count("host") >= before+8 })
	b.eventually("the unrelated sandbox runs", func() bool { return b.is(other) == sandboxes.Running })
	b.eventually("what the host lost is written", func() bool { return b.is(lost) == sandboxes.Stopped })
	if got := b.is(stuck); got != sandboxes.Stopping {
		t.Errorf("what is being destroyed is %s", got)
	}
	host := id.Format(id.Host, b.host.ID)
	want := fmt.Sprintf("# HELP wrenn_reconcile_queue_depth Sandboxes and templates of a host that wait to be reconciled, or are worked on.\n# TYPE wrenn_reconcile_queue_depth gauge\nwrenn_reconcile_queue_depth{host=%q} 1\n", host)
	b.eventually("the queue's depth is told", func() bool { return gathers(b, want, "wrenn_reconcile_queue_depth") })
	close(g.open)
	b.eventually("it is destroyed", func() bool { return b.is(stuck) == sandboxes.Stopped && !b.agent.there(stuck) })
}

// gathers says whether the controller's metrics are those wanted.
func gathers(b *bench, want, name string) bool {
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(b.Collectors()...)
	return testutil.GatherAndCompare(r, strings.NewReader(want), name) == nil
}

// TestLag: while a host's list cannot be read, the lag grows; once it can be, the lag
// falls.
func TestLag(t *testing.T) {
	b := newBench(t, time.Second)
	var broken atomic.Bool
	broken.Store(true)
	b.agent.hook(func(_ context.Context, call, _ string) error {
		if call == "list" && broken.Load() {
			return errors.New("the list cannot be read")
		}
		return nil
	})
	b.goes()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(b.Collectors()...)
	lag := func() float64 {
		families, err := r.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "wrenn_reconcile_lag_seconds" {
				return f.GetMetric()[0].GetGauge().GetValue()
			}
		}
		return 0 // No host is watched yet.
	}
	// Four times the interval between comparisons.
	b.eventually("the lag grows", func() bool { return lag() > 2 })
	before := lag()
	broken.Store(false)
	b.eventually("the lag falls", func() bool { return lag() < before })
}

// TestDestroyFails: the destroy of one of nine sandboxes fails. What has become
// of the eight others, which the host no longer has, is written all the same.
func TestDestroyFails(t *testing.T) {
	b := newBench(t, time.Minute)
	var lost []uuid.UUID
	for range 8 {
		lost = append(lost, b.add(sandboxes.Running, none))
	}
	stuck := b.add(sandboxes.Stopping, running)
	var fails atomic.Bool
	fails.Store(true)
	b.agent.hook(func(_ context.Context, call, _ string) error {
		if call == "destroy" && fails.Load() {
			return errors.New("no")
		}
		return nil
	})
	now := time.Now()
	b.look(now)
	b.look(now.Add(lostAfter))
	for _, u := range lost {
		if got := b.is(u); got != sandboxes.Stopped {
			t.Errorf("what the host lost is %s", got)
		}
	}
	if got := b.is(stuck); got != sandboxes.Stopping {
		t.Errorf("what cannot be destroyed is %s", got)
	}
	if n := testutil.ToFloat64(b.metrics.actions.WithLabelValues(string(Stop), "error")); n == 0 {
		t.Error("no failure was counted")
	}
	fails.Store(false)
	b.eventually("it is tried again", func() bool { return b.is(stuck) == sandboxes.Stopped })
}

// TestActionPanics: what is done about one sandbox panics, whether in the
// controller's goroutine or in one of the sandboxes' service. It is counted, and
// the others are done.
func TestActionPanics(t *testing.T) {
	b := newBench(t, time.Minute)
	bad, worse, lost, paused := b.add(sandboxes.Running, none), b.add(sandboxes.Running, paused), b.add(sandboxes.Running, none), b.add(sandboxes.Running, paused)
	var calm atomic.Bool
	b.Controller.Sandboxes.OnChange(func(u uuid.UUID) {
		if (u == bad || u == worse) && !calm.Load() {
			panic("no")
		}
	})
	now := time.Now()
	b.look(now)
	b.look(now.Add(lostAfter))
	if got := b.is(lost); got != sandboxes.Stopped {
		t.Errorf("what the host lost is %s", got)
	}
	if got := b.is(paused); got != sandboxes.Paused {
		t.Errorf("what the host paused is %s", got)
	}
	for _, k := range []Kind{Lose, Settle} {
		if n := testutil.ToFloat64(b.metrics.actions.WithLabelValues(string(k), "panic")); n == 0 {
			t.Errorf("no panic of %s was counted", k)
		}
	}
	calm.Store(true)
	b.eventually("they are tried again", func() bool { n, _ := b.queue.depth(); return n == 0 })
	if b.Controller.Sandboxes.Busy(worse) {
		t.Error("the service is still at work on it")
	}
}

// TestListsApart: a host that cannot list its templates has its sandboxes
// reconciled all the same, and the other way round.
func TestListsApart(t *testing.T) {
	b := newBench(t, time.Minute)
	stopping := b.add(sandboxes.Stopping, running)
	failing := "templates"
	b.agent.hook(func(_ context.Context, call, _ string) error {
		if call == failing {
			return errors.New("no")
		}
		return nil
	})
	if _, err := b.compare(time.Now()); err == nil {
		t.Error("that templates cannot be listed is no error")
	}
	b.eventually("the sandbox is destroyed", func() bool { return b.is(stopping) == sandboxes.Stopped })
	b.agent.mu.Lock()
	failing = "list"
	wire := id.Format(id.Template, uuid.Nil)
	b.agent.templates[wire] = &hostagentv1.Template{TemplateId: wire, TeamId: id.Format(id.Team, uuid.Nil), Name: "minimal", SizeBytes: 1, CreatedAt: timestamppb.Now()}
	b.agent.mu.Unlock()
	if _, err := b.compare(time.Now()); err == nil {
		t.Error("that sandboxes cannot be listed is no error")
	}
	b.eventually("the template is known", func() bool {
		known, err := b.Templates.Known(t.Context(), b.host.ID)
		return err == nil && len(known) == 1
	})
}

// TestEvents: the event of a sandbox that this server still creates waits until
// it has, and keeps no other from being written; nor does one that the database
// refuses. Only what is written, with all before it, is acknowledged.
func TestEvents(t *testing.T) {
	b := newBench(t, time.Minute)
	ctx := t.Context()
	b.offer()
	other, refused, third := b.add(sandboxes.Running, running), b.add(sandboxes.Running, running), b.add(sandboxes.Running, running)
	g := newGate("create", "")
	b.agent.hook(g.on)
	created := make(chan error, 1)
	go func() {
		_, _, err := b.Controller.Sandboxes.Create(ctx, uuid.Nil, sandboxes.CreateParams{Template: "minimal"}, "")
		created <- err
	}()
	wire := g.wait(t)
	creating, err := id.Parse(id.Sandbox, wire)
	if err != nil {
		t.Fatal(err)
	}
	b.sql(`CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.error = 'refused' THEN RAISE EXCEPTION 'no'; END IF; RETURN NEW; END $$`)
	b.sql(`CREATE TRIGGER refuse BEFORE UPDATE ON sandboxes FOR EACH ROW EXECUTE FUNCTION refuse()`)
	heard, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.hear(heard)
	}()
	defer func() { stop(); <-done }()
	send := func(seq uint64, sandbox uuid.UUID, reason string) {
		b.agent.events <- &hostagentv1.Event{Seq: seq, SandboxId: id.Format(id.Sandbox, sandbox), Kind: hostagentv1.Event_KIND_EXITED, Reason: reason, Time: timestamppb.Now()}
	}
	send(1, other, "first")
	b.eventually("it is acknowledged", func() bool { return b.agent.upTo() == 1 })
	send(2, creating, "while it was created")
	send(3, refused, "refused")
	send(4, third, "N\x00UL")
	b.eventually("the others' are written", func() bool { return b.is(third) == sandboxes.Stopped })
	if got := b.agent.upTo(); got != 1 {
		t.Errorf("acknowledged up to %d, and event 2 is not written", got)
	}
	if got := b.is(refused); got != sandboxes.Running {
		t.Errorf("what was refused is %s", got)
	}
	close(g.open)
	if err := <-created; err != nil {
		t.Fatal(err)
	}
	b.eventually("all are acknowledged", func() bool { return b.agent.upTo() == 4 })
	if row, err := b.Store.GetSandbox(ctx, creating); err != nil || row.State != string(sandboxes.Stopped) || row.Error != "while it was created" {
		t.Errorf("what ended while it was created: %+v, %v", row, err)
	}
}

// TestEventHangs: a write that hangs in the database does not hold up a host's
// events for ever. The event is not acknowledged, and written later.
func TestEventHangs(t *testing.T) {
	b := newBench(t, time.Minute)
	b.Controller.writeWithin = 200 * time.Millisecond
	ctx := t.Context()
	held := b.add(sandboxes.Running, running)
	event := &hostagentv1.Event{Seq: 1, SandboxId: id.Format(id.Sandbox, held), Kind: hostagentv1.Event_KIND_EXITED, Reason: "held", Time: timestamppb.Now()}
	tx, err := b.conn.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, "SELECT 1 FROM sandboxes WHERE id = $1 FOR UPDATE", held); err != nil {
		t.Fatal(err)
	}
	b.agent.events <- event
	broke := make(chan error, 1)
	go func() {
		_, err := b.hear(ctx)
		broke <- err
	}()
	if err := await.Recv(t, "the events break off", broke); err == nil || !strings.Contains(err.Error(), "write event 1 down") {
		t.Errorf("they broke off with %v", err)
	}
	if got := b.agent.upTo(); got != 0 {
		t.Errorf("event %d is acknowledged, and not written", got)
	}
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	b.Controller.writeWithin = await.Hang
	heard, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.hear(heard)
	}()
	defer func() { stop(); <-done }()
	b.eventually("it is acknowledged", func() bool {
		// As an agent does with what is not acknowledged. The stream that broke off may
		// still take one, and lose it.
		select {
		case b.agent.events <- event:
		default:
		}
		return b.agent.upTo() == 1
	})
	if row, err := b.Store.GetSandbox(ctx, held); err != nil || row.State != string(sandboxes.Stopped) || row.Error != "held" {
		t.Errorf("the sandbox is %+v, %v", row, err)
	}
}

// TestLedger is that events are acknowledged in order, whenever they are done.
func TestLedger(t *testing.T) {
	var l ledger
	for seq := range uint64(5) {
		l.begin(seq + 1)
	}
	for _, step := range []struct {
		end, last uint64
		ok        bool
	}{{2, 0, false}, {1, 2, true}, {4, 0, false}, {5, 0, false}, {3, 5, true}} {
		if last, ok := l.end(step.end); last != step.last || ok != step.ok {
			t.Errorf("after %d: %d, %v; want %d, %v", step.end, last, ok, step.last, step.ok)
		}
	}
}

// TestAdoptedMeanwhile: another server takes this one for dead and adopts a
// sandbox that it creates, or a copy. When the host answers, the sandbox is what
// was asked for, and is not destroyed.
func TestAdoptedMeanwhile(t *testing.T) {
	for call, ask := range map[string]func(context.Context, *sandboxes.Service, uuid.UUID) (sandboxes.State, error){
		"create": func(ctx context.Context, s *sandboxes.Service, _ uuid.UUID) (sandboxes.State, error) {
			row, _, err := s.Create(ctx, uuid.Nil, sandboxes.CreateParams{Template: "minimal"}, "")
			return sandboxes.State(row.State), err
		},
		"fork": func(ctx context.Context, s *sandboxes.Service, of uuid.UUID) (sandboxes.State, error) {
			rows, _, err := s.Fork(ctx, uuid.Nil, of, 1, "")
			if err != nil {
				return "", err
			}
			return sandboxes.State(rows[0].State), nil
		},
	} {
		t.Run(call, func(t *testing.T) {
			b := newBench(t, time.Minute)
			b.offer()
			of := b.add(sandboxes.Running, running)
			g := newGate(call, "")
			b.agent.hook(g.on)
			type answer struct {
				state sandboxes.State
				err   error
			}
			answers := make(chan answer, 1)
			go func() {
				state, err := ask(t.Context(), b.Controller.Sandboxes, of)
				answers <- answer{state, err}
			}()
			made, err := id.Parse(id.Sandbox, g.wait(t))
			if err != nil {
				t.Fatal(err)
			}
			b.sql("UPDATE sandboxes SET state = 'running', started_at = now() WHERE id = $1", made)
			close(g.open)
			if a := <-answers; a.err != nil || a.state != sandboxes.Running {
				t.Errorf("it is %q, %v", a.state, a.err)
			}
			if b.agent.count("destroy") > 0 || !b.agent.there(made) {
				t.Error("it was destroyed")
			}
		})
	}
}
