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

// TestDestroyHangs makes the removal of one sandbox hang. The controller still polls the
// host, an unrelated sandbox keeps running, and the loss of another is recorded.
func TestDestroyHangs(t *testing.T) {
	b := newBench(t, time.Second)
	stuck, other, lost := b.add(sandboxes.Stopping, running), b.add(sandboxes.Running, running), b.add(sandboxes.Running, none)
	g := newGate("destroy", id.Format(id.Sandbox, stuck))
	b.agent.hook(g.on)
	b.goes()
	g.wait(t)
	before := b.agent.count("host")
	// Twice the time after which a silent host is unreachable.
	b.eventually("the server polls the host", func() bool { return b.agent.count("host") >= before+8 })
	b.eventually("the unrelated sandbox runs", func() bool { return b.is(other) == sandboxes.Running })
	b.eventually("the loss is recorded", func() bool { return b.is(lost) == sandboxes.Stopped })
	if got := b.is(stuck); got != sandboxes.Stopping {
		t.Errorf("the sandbox being destroyed is %s", got)
	}
	host := id.Format(id.Host, b.host.ID)
	want := fmt.Sprintf("# HELP wrenn_reconcile_queue_depth Sandboxes and templates of a host with a queued or running action.\n# TYPE wrenn_reconcile_queue_depth gauge\nwrenn_reconcile_queue_depth{host=%q} 1\n", host)
	b.eventually("the metric has the queue's depth", func() bool { return gathers(b, want, "wrenn_reconcile_queue_depth") })
	close(g.open)
	b.eventually("it is destroyed", func() bool { return b.is(stuck) == sandboxes.Stopped && !b.agent.there(stuck) })
}

// gathers reports whether the controller has the wanted metrics.
func gathers(b *bench, want, name string) bool {
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(b.Collectors()...)
	return testutil.GatherAndCompare(r, strings.NewReader(want), name) == nil
}

// TestLag checks that the lag grows while the host's list cannot be read, and falls
// afterwards.
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
	// Four times the interval between lists.
	b.eventually("the lag grows", func() bool { return lag() > 2 })
	before := lag()
	broken.Store(false)
	b.eventually("the lag falls", func() bool { return lag() < before })
}

// TestDestroyFails makes the removal of one of nine sandboxes fail. The controller still
// records the loss of the eight others, which the host no longer has.
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
			t.Errorf("a sandbox that the host lost is %s", got)
		}
	}
	if got := b.is(stuck); got != sandboxes.Stopping {
		t.Errorf("the sandbox that cannot be destroyed is %s", got)
	}
	if n := testutil.ToFloat64(b.metrics.actions.WithLabelValues(string(Stop), "error")); n == 0 {
		t.Error("no failure was counted")
	}
	fails.Store(false)
	b.eventually("the removal is retried", func() bool { return b.is(stuck) == sandboxes.Stopped })
}

// TestActionPanics makes an action panic, in the controller's goroutine or in one of the
// sandboxes' service. The panic is counted, and the other actions are completed.
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
		t.Errorf("the sandbox that the host lost is %s", got)
	}
	if got := b.is(paused); got != sandboxes.Paused {
		t.Errorf("the sandbox that the host paused is %s", got)
	}
	for _, k := range []Kind{Lose, Refresh} {
		if n := testutil.ToFloat64(b.metrics.actions.WithLabelValues(string(k), "panic")); n == 0 {
			t.Errorf("no panic of %s was counted", k)
		}
	}
	calm.Store(true)
	b.eventually("the actions are retried", func() bool { n, _ := b.queue.depth(); return n == 0 })
	if b.Controller.Sandboxes.Busy(worse) {
		t.Error("the service is still at work on it")
	}
}

// TestListsApart checks that sandboxes are reconciled when the host cannot list its
// templates, and the other way round.
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
		t.Error("a failed list of templates is no error")
	}
	b.eventually("the sandbox is destroyed", func() bool { return b.is(stopping) == sandboxes.Stopped })
	b.agent.mu.Lock()
	failing = "list"
	wire := id.Format(id.Template, uuid.Nil)
	b.agent.templates[wire] = &hostagentv1.Template{TemplateId: wire, TeamId: id.Format(id.Team, uuid.Nil), Name: "minimal", SizeBytes: 1, CreatedAt: timestamppb.Now()}
	b.agent.mu.Unlock()
	if _, err := b.compare(time.Now()); err == nil {
		t.Error("a failed list of sandboxes is no error")
	}
	b.eventually("the template is known", func() bool {
		known, err := b.Templates.Known(t.Context(), b.host.ID)
		return err == nil && len(known) == 1
	})
}

// TestEvents checks that the event of a sandbox that this server still creates waits for
// the creation, and that neither it nor an event that the database refuses delays the
// others. An event is acknowledged only if it and all before it are recorded.
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
		b.follow(heard)
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
	b.eventually("the others' events are recorded", func() bool { return b.is(third) == sandboxes.Stopped })
	if got := b.agent.upTo(); got != 1 {
		t.Errorf("acknowledged up to %d, but event 2 is not recorded", got)
	}
	if got := b.is(refused); got != sandboxes.Running {
		t.Errorf("the sandbox whose event was refused is %s", got)
	}
	close(g.open)
	if err := <-created; err != nil {
		t.Fatal(err)
	}
	b.eventually("all are acknowledged", func() bool { return b.agent.upTo() == 4 })
	if row, err := b.Store.GetSandbox(ctx, creating); err != nil || row.State != string(sandboxes.Stopped) || row.Error != "while it was created" {
		t.Errorf("the sandbox that ended during its creation: %+v, %v", row, err)
	}
}

// TestEventHangs checks that a database write that hangs does not block a host's events
// for ever. The event is not acknowledged, and is recorded later.
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
		_, err := b.follow(ctx)
		broke <- err
	}()
	if err := await.Recv(t, "the events break off", broke); err == nil || !strings.Contains(err.Error(), "store event 1") {
		t.Errorf("they broke off with %v", err)
	}
	if got := b.agent.upTo(); got != 0 {
		t.Errorf("event %d is acknowledged but not recorded", got)
	}
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	b.Controller.writeWithin = await.Hang
	heard, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.follow(heard)
	}()
	defer func() { stop(); <-done }()
	b.eventually("it is acknowledged", func() bool {
		// Like an agent, send the unacknowledged event again. The broken stream may still
		// take one, and lose it.
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

// TestLedger checks that events are acknowledged in order, in whatever order they are
// recorded.
func TestLedger(t *testing.T) {
	l := newLedger(10)
	for seq := range uint64(5) {
		if err := l.begin(t.Context(), seq+1); err != nil {
			t.Fatal(err)
		}
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

// TestAdoptedByAnotherServer makes another server take this one for dead and adopt a sandbox or
// a fork that it creates. When the host responds, the sandbox is as requested, and is not
// destroyed.
func TestAdoptedByAnotherServer(t *testing.T) {
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
