package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/each"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

const (
	// listWithin bounds a call that lists a host's objects.
	listWithin = 10 * time.Second
	// compareWithin bounds a comparison: listing, and the database calls.
	compareWithin = listWithin + roundWithin
)

// watch reconciles one host with the database.
type watch struct {
	*Controller
	host   *hosts.Host
	log    *slog.Logger
	queue  *queue
	ctx    context.Context
	cancel context.CancelFunc
	// poke triggers a comparison.
	poke chan struct{}
	// agreed is when the last successful comparison began; initially, when the watch
	// began.
	agreed atomic.Pointer[time.Time]
	// seen is the last comparison's Plan.Seen. Only compareLoop uses it.
	seen Seen
}

func newWatch(ctx context.Context, c *Controller, h *hosts.Host) *watch {
	w := &watch{Controller: c, host: h, log: c.Log.With("host", h.URL), poke: make(chan struct{}, 1)}
	w.ctx, w.cancel = context.WithCancel(ctx)
	begun := time.Now()
	w.agreed.Store(&begun)
	w.queue = newQueue(w.ctx, w.do, c.metrics, w.log)
	return w
}

// run watches the host until the watch is cancelled.
func (w *watch) run() {
	var loops sync.WaitGroup
	loops.Go(w.live)
	loops.Go(w.listen)
	loops.Go(w.compareLoop)
	if w.Watching != nil {
		loops.Go(func() { w.Watching(w.ctx, w.host) })
	}
	<-w.ctx.Done()
	w.queue.close()
	loops.Wait()
}

// live polls whether the host is reachable. [hosts.Registry.Sweep] marks the host
// unreachable if it is not for too long.
func (w *watch) live() {
	// Twice per heartbeat, so that one late response does not matter.
	tick := time.NewTicker(w.Hosts.Heartbeat / 2)
	defer tick.Stop()
	there := false
	for {
		err := w.Hosts.Contact(w.ctx, w.host)
		if w.ctx.Err() != nil {
			return
		}
		if err == nil && !there {
			w.compareSoon()
		}
		there = err == nil
		select {
		case <-tick.C:
		case <-w.ctx.Done():
			return
		}
	}
}

func (w *watch) compareSoon() {
	select {
	case w.poke <- struct{}{}:
	default:
	}
}

func (w *watch) compareLoop() {
	failing := false
	for {
		again, err := w.compare(time.Now())
		if w.ctx.Err() != nil {
			return
		}
		if err != nil && !failing {
			w.log.Warn("compare host with database", "error", err)
		}
		failing = err != nil
		wait := w.Hosts.Heartbeat / 2
		if again > 0 {
			wait = min(wait, again)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-w.poke:
			t.Stop()
		case <-w.ctx.Done():
			t.Stop()
			return
		}
	}
}

// compare reads the lists of the database and the host and queues the actions that
// reconcile them. again is how long until the next grace period ends (0: none runs). A
// failure for templates does not affect sandboxes, and vice versa.
func (w *watch) compare(now time.Time) (again time.Duration, err error) {
	begun := time.Now()
	defer func() {
		w.metrics.compared(err, time.Since(begun))
		if err == nil {
			w.agreed.Store(&begun)
		}
	}()
	err = each.Do(w.ctx, w.log, 2, compareWithin, []func(context.Context) error{
		w.compareTemplates,
		func(ctx context.Context) (err error) {
			again, err = w.compareSandboxes(ctx, now)
			return err
		},
	}, func(ctx context.Context, part func(context.Context) error) error { return part(ctx) })
	return again, err
}

func (w *watch) compareTemplates(ctx context.Context) error {
	mark := w.queue.mark()
	v, err := w.viewTemplates(ctx)
	if err != nil {
		return err
	}
	w.queue.want(template, mark, Templates(v))
	return nil
}

// viewTemplates reads the database before the host's list, so that a template which the
// database says exists must be in the list.
func (w *watch) viewTemplates(ctx context.Context) (v TemplateView, err error) {
	known, err := w.Templates.Known(ctx, w.host.ID)
	if err != nil {
		return v, err
	}
	ask, stop := context.WithTimeout(ctx, listWithin)
	defer stop()
	list, err := w.host.Agent.Templates(ask, connect.NewRequest(&hostagentv1.TemplatesRequest{}))
	if err != nil {
		return v, fmt.Errorf("list host's templates: %w", err)
	}
	others, err := w.Store.ListTemplatesAtWork(ctx, db.ListTemplatesAtWorkParams{Server: w.Store.Server, Within: w.Hosts.Heartbeat.Seconds()})
	if err != nil {
		return v, fmt.Errorf("list templates that other servers work on: %w", err)
	}
	v = TemplateView{Rows: make(map[uuid.UUID]db.Template), Has: make(map[uuid.UUID]*hostagentv1.Template), Busy: set(others)}
	for _, row := range known {
		v.Rows[row.ID] = row
		if w.Templates.Busy(row.ID) {
			v.Busy[row.ID] = true
		}
	}
	for _, t := range list.Msg.Templates {
		u, err := id.Parse(id.Template, t.TemplateId)
		if err != nil {
			w.log.Error("host has a template with a malformed id", "template_id", t.TemplateId)
			continue
		}
		v.Has[u] = t
	}
	return v, nil
}

func (w *watch) compareSandboxes(ctx context.Context, now time.Time) (again time.Duration, err error) {
	mark := w.queue.mark()
	v, err := w.viewSandboxes(ctx)
	if err != nil {
		return 0, err
	}
	p := Sandboxes(v, w.seen, now)
	w.seen = p.Seen
	w.queue.want(sandbox, mark, p.Actions)
	if len(p.Expire.Ids) > 0 {
		if err := w.Store.SandboxesExpire(ctx, p.Expire); err != nil {
			return p.Again, fmt.Errorf("update sandboxes' expiry: %w", err)
		}
	}
	if len(p.Conditions.Ids) > 0 {
		if err := w.Sandboxes.WriteConditions(ctx, p.Conditions); err != nil {
			return p.Again, fmt.Errorf("update sandboxes' conditions: %w", err)
		}
	}
	return p.Again, nil
}

// viewSandboxes reads the database, then the host's list, and last which sandboxes are
// busy, so that it notices work whose half-done result the database or the list shows.
func (w *watch) viewSandboxes(ctx context.Context) (v View, err error) {
	if err := w.Sandboxes.ExpireDrained(ctx, w.host.ID); err != nil {
		return v, err
	}
	host, err := w.Store.GetHost(ctx, w.host.ID)
	if err != nil {
		return v, fmt.Errorf("look up host: %w", err)
	}
	rows, err := w.Store.ListHostSandboxes(ctx, &w.host.ID)
	if err != nil {
		return v, fmt.Errorf("list host's rows: %w", err)
	}
	ask, stop := context.WithTimeout(ctx, listWithin)
	defer stop()
	list, err := w.host.Agent.List(ask, connect.NewRequest(&hostagentv1.ListRequest{}))
	if err != nil {
		return v, fmt.Errorf("list host's sandboxes: %w", err)
	}
	v = View{
		Host: w.host.ID, Draining: host.Draining, DrainIdle: w.DrainIdle, Incomplete: list.Msg.GetIncomplete(),
		Rows: make(map[uuid.UUID]db.Sandbox, len(rows)), Has: make(map[uuid.UUID]*hostagentv1.Sandbox, len(list.Msg.Sandboxes)),
	}
	for _, row := range rows {
		v.Rows[row.ID] = row
	}
	if v.Unread, err = unread(list.Msg.GetUnread()); err != nil {
		w.log.Error("malformed id in host's list of unreadable sandboxes", "error", err)
	}
	for _, sb := range list.Msg.Sandboxes {
		u, err := id.Parse(id.Sandbox, sb.SandboxId)
		if err != nil {
			w.log.Error("host has a sandbox with a malformed id", "sandbox_id", sb.SandboxId)
			continue
		}
		v.Has[u] = sb
		if _, ok := v.Rows[u]; ok {
			continue
		}
		// It has ended, belongs to another host, or was created after the rows were read.
		row, err := w.Store.GetSandbox(ctx, u)
		if err == nil {
			v.Rows[u] = row
		} else if !errors.Is(err, store.ErrNoRows) {
			return v, fmt.Errorf("look up sandbox: %w", err)
		}
	}
	others, err := w.Store.ListAtWork(ctx, db.ListAtWorkParams{HostID: &w.host.ID, Server: w.Store.Server, Within: w.Hosts.Heartbeat.Seconds()})
	if err != nil {
		return v, fmt.Errorf("list what other servers work on: %w", err)
	}
	v.Busy = set(others)
	for _, u := range ids(v.Rows, v.Has) {
		if w.Sandboxes.Busy(u) {
			v.Busy[u] = true
		}
	}
	return v, nil
}

// unread parses the ids of sandboxes that a list may lack. If it fails, the list may lack
// any.
func unread(wire []string) (map[uuid.UUID]bool, error) {
	all := make(map[uuid.UUID]bool, len(wire))
	for _, s := range wire {
		u, err := id.Parse(id.Sandbox, s)
		if err != nil {
			return nil, err
		}
		all[u] = true
	}
	return all, nil
}

func set(ids []uuid.UUID) map[uuid.UUID]bool {
	all := make(map[uuid.UUID]bool, len(ids))
	for _, u := range ids {
		all[u] = true
	}
	return all
}

// do executes an action, unless this server has begun to work on the object since the
// comparison. That work stores the current state.
func (w *watch) do(ctx context.Context, a Action) error {
	if w.Sandboxes.Busy(a.ID) || w.Templates.Busy(a.ID) {
		return nil
	}
	switch a.Kind {
	case Fail:
		return w.Sandboxes.Abandon(ctx, a.Row)
	case Adopt:
		return w.Sandboxes.Adopt(ctx, a.Row, a.Has)
	case Find:
		return w.Sandboxes.Found(ctx, a.Row, a.Has)
	case Lose:
		return w.Sandboxes.HostEnded(ctx, w.host.ID, a.ID, "lost", "the host no longer has the sandbox", time.Now())
	case Revive:
		return w.Sandboxes.Revive(ctx, a.Row, a.Has)
	case Refresh:
		return w.Sandboxes.Refresh(ctx, a.ID)
	case Stop:
		return w.Sandboxes.StopAgain(ctx, a.Row)
	case Destroy:
		return w.Sandboxes.DestroyStray(ctx, a.ID, w.host)
	case Drain:
		return w.Sandboxes.Drain(ctx, a.Row, w.DrainIdle)
	case Learn:
		return w.Templates.Learn(ctx, w.host.ID, a.HasTemplate)
	case Forget:
		return w.Templates.Forget(ctx, w.host.ID, a.ID)
	case Ready:
		return w.Templates.Made(ctx, w.host.ID, a.Template, a.HasTemplate)
	case Capture:
		return w.Templates.CaptureAgain(ctx, a.Template)
	case GiveUp:
		return w.Templates.GiveUp(ctx, a.Template)
	case Remove:
		return w.Templates.RemoveAgain(ctx, a.Template)
	case Leave, Follow: // Sandboxes returns no actions of these kinds.
	}
	return fmt.Errorf("no such action: %q", a.Kind)
}
