package sandboxes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/sethvargo/go-retry"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

const (
	// lostAfter is how long a host must not have a sandbox before it is given
	// up: the host's own word on what happened may be on its way.
	lostAfter = 3 * time.Second
	// steadyAfter is how long events must have been followed for the next
	// attempt to come at once when they break off.
	steadyAfter = 5 * time.Second
	// strayAfter is how long a host may have a sandbox that the table does not
	// know before it is destroyed.
	strayAfter = 30 * time.Second
)

// forgetKeys drops idempotency keys that are old enough.
func (s *Service) forgetKeys(ctx context.Context) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		if err := s.Store.ForgetIdempotencyKeys(ctx, time.Now().Add(-keysLast)); err != nil && ctx.Err() == nil {
			s.Log.Warn("forget old idempotency keys", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// watch keeps one host and the table in agreement.
type watch struct {
	*Service
	host *hosts.Host
	log  *slog.Logger
	// poke asks for a comparison now.
	poke chan struct{}
	// missing are sandboxes of the table that the host did not have, or not in
	// the state that they should be in, stray are the host's that the table did
	// not know, and since when. Only the
	// goroutine that compares touches them.
	missing, stray map[uuid.UUID]time.Time
	// idle are the sandboxes that nothing has used lately, where the host drains.
	idle chan []db.Sandbox
}

// listen hears what the host did on its own, writes it down and acknowledges it.
func (w *watch) listen(ctx context.Context) {
	fresh := func() retry.Backoff {
		return retry.WithCappedDuration(5*time.Second, retry.NewExponential(200*time.Millisecond))
	}
	backoff := fresh()
	down := false
	for ctx.Err() == nil {
		heard, err := w.hear(ctx)
		if ctx.Err() != nil {
			return
		}
		if heard {
			backoff, down = fresh(), false
		}
		if !down {
			w.log.Warn("host's events broke off", "error", err)
			down = true
			w.compareSoon()
		}
		wait, _ := backoff.Next()
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
}

// hear follows the host's events until they break off. heard says whether
// that went on for long enough that the host can be said to have been there.
func (w *watch) hear(ctx context.Context) (heard bool, err error) {
	if err := w.Hosts.Contact(ctx, w.host); err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begun := time.Now()
	stream, err := w.host.Agent.Events(ctx, connect.NewRequest(&hostagentv1.EventsRequest{}))
	if err != nil {
		return false, err
	}
	defer stream.Close()
	w.log.Info("host is there")
	w.compareSoon()
	for stream.Receive() {
		e := stream.Msg().GetEvent()
		if err := w.apply(ctx, e); err != nil {
			return heard, fmt.Errorf("write event %d down: %w", e.GetSeq(), err)
		}
		if _, err := w.host.Agent.AckEvents(ctx, connect.NewRequest(&hostagentv1.AckEventsRequest{Seq: e.GetSeq()})); err != nil {
			return heard, fmt.Errorf("acknowledge event %d: %w", e.GetSeq(), err)
		}
		heard = true
	}
	return heard || time.Since(begun) > steadyAfter, stream.Err()
}

// apply writes an event into the table.
func (w *watch) apply(ctx context.Context, e *hostagentv1.Event) error {
	sandbox, err := id.Parse(id.Sandbox, e.GetSandboxId())
	if err != nil {
		w.log.Error("host sent an event with a malformed id", "seq", e.GetSeq())
		return nil
	}
	var reason, why string
	switch e.Kind {
	case hostagentv1.Event_KIND_EXPIRED:
		reason = "expired"
	case hostagentv1.Event_KIND_EXITED:
		reason, why = "exited", e.Reason
		if why == "" {
			why = "the virtual machine ended by itself"
		}
	case hostagentv1.Event_KIND_PAUSED:
		return w.paused(ctx, sandbox, e.Reason)
	default:
		w.log.Warn("host sent an event of an unknown kind", "kind", e.Kind)
		return nil
	}
	if err := w.created(ctx, sandbox); err != nil {
		return err
	}
	at := time.Now()
	if e.GetTime() != nil {
		at = e.GetTime().AsTime()
	}
	return w.ended(ctx, sandbox, reason, why, at)
}

// created waits while this process creates the sandbox: it may not have
// written yet that the sandbox ran.
func (w *watch) created(ctx context.Context, sandbox uuid.UUID) error {
	w.mu.Lock()
	c := w.creating[sandbox]
	w.mu.Unlock()
	if c == nil {
		return nil
	}
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// paused writes that the host paused a sandbox by itself. The event may be
// old, and the sandbox resumed since: what is so now, the host says.
func (w *watch) paused(ctx context.Context, sandbox uuid.UUID, reason string) error {
	if err := w.created(ctx, sandbox); err != nil {
		return err
	}
	w.log.Debug("host paused sandbox", "sandbox_id", id.Format(id.Sandbox, sandbox), "reason", reason)
	if w.current(sandbox) != nil {
		// That will write what is so; what it may not, the comparison does.
		w.compareSoon()
		return nil
	}
	return unlessGone(w.settle(ctx, sandbox, false))
}

// unlessGone drops the error that the sandbox has ended: of that there is
// other news.
func unlessGone(err error) error {
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	return err
}

// ended writes that a running sandbox ended without being asked to.
func (w *watch) ended(ctx context.Context, sandbox uuid.UUID, reason, why string, at time.Time) error {
	_, err := w.Store.SandboxEnded(ctx, db.SandboxEndedParams{ID: sandbox, EndReason: reason, Error: why, EndedAt: at})
	if errors.Is(err, store.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	w.changed(sandbox)
	w.over(sandbox)
	w.log.Info("sandbox ended", "sandbox_id", id.Format(id.Sandbox, sandbox), "reason", reason, "error", why)
	return nil
}

func (w *watch) compareSoon() {
	select {
	case w.poke <- struct{}{}:
	default:
	}
}

func (w *watch) compareLoop(ctx context.Context) {
	failing := false
	for {
		err := w.compare(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil && !failing {
			w.log.Warn("compare host with table", "error", err)
		}
		failing = err != nil
		// Twice a heartbeat, so that one answer that is late costs nothing.
		wait := w.Hosts.Heartbeat / 2
		if len(w.missing) > 0 {
			wait = min(wait, lostAfter)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-w.poke:
			t.Stop()
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// What a host says of a sandbox, where it matters here.
const (
	onHostRunning = hostagentv1.SandboxState_SANDBOX_STATE_RUNNING
	onHostPaused  = hostagentv1.SandboxState_SANDBOX_STATE_PAUSED
)

// compare sets right what the table and the host disagree on. What this
// process is at work on is left alone.
func (w *watch) compare(ctx context.Context) error {
	if err := w.Hosts.Contact(ctx, w.host); err != nil {
		return err
	}
	ask, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	// The table first: what it says is there was on the host before the host is asked.
	known, err := w.Templates.Known(ctx, w.host.ID)
	if err != nil {
		return err
	}
	templates, err := w.host.Agent.Templates(ask, connect.NewRequest(&hostagentv1.TemplatesRequest{}))
	if err != nil {
		return fmt.Errorf("list host's templates: %w", err)
	}
	if err := w.Templates.Sync(ctx, w.host.ID, known, templates.Msg.Templates); err != nil {
		return err
	}
	if err := w.settleTemplates(ctx, known, templates.Msg.Templates); err != nil {
		return err
	}
	if err := w.expireDrained(ctx); err != nil {
		return err
	}
	rows, err := w.Store.ListHostSandboxes(ctx, &w.host.ID)
	if err != nil {
		return fmt.Errorf("list host's rows: %w", err)
	}
	elsewhere, err := w.atWorkElsewhere(ctx)
	if err != nil {
		return err
	}
	list, err := w.host.Agent.List(ask, connect.NewRequest(&hostagentv1.ListRequest{}))
	if err != nil {
		return fmt.Errorf("list host's sandboxes: %w", err)
	}
	has := make(map[uuid.UUID]*hostagentv1.Sandbox, len(list.Msg.Sandboxes))
	for _, sb := range list.Msg.Sandboxes {
		if u, err := id.Parse(id.Sandbox, sb.SandboxId); err == nil {
			has[u] = sb
		}
	}
	at := time.Now()
	missing := make(map[uuid.UUID]time.Time)
	// patient says whether what is odd about a sandbox is to be looked at again
	// before anything is done: what explains it may be on its way.
	patient := func(sandbox uuid.UUID) bool {
		since, seen := w.missing[sandbox]
		if !seen {
			since = at
		}
		if at.Sub(since) >= lostAfter {
			return false
		}
		missing[sandbox] = since
		return true
	}
	var expire db.SandboxesExpireParams
	var idle []db.Sandbox
	inTable := make(map[uuid.UUID]bool, len(rows))
	for _, row := range rows {
		inTable[row.ID] = true
		if w.busy(row.ID) || elsewhere[row.ID] {
			continue
		}
		sb, there := has[row.ID]
		is := sb.GetState()
		state := State(row.State)
		if !there && state != Stopping && patient(row.ID) {
			continue
		}
		var err error
		switch state {
		case Pending, Starting:
			switch {
			case !there:
				err = w.abandoned(row)
			case is == onHostRunning || is == onHostPaused:
				err = w.adopt(ctx, row, sb)
			}
		case Running, Pausing, Paused, Resuming:
			switch {
			case !there:
				err = w.ended(ctx, row.ID, "lost", "the host no longer has the sandbox", at)
			case is == onHostPaused && state == Paused:
			case is == onHostPaused && state != Resuming, is == onHostRunning && state == Resuming:
				// The host paused it by itself, or did what it was asked for.
				err = unlessGone(w.settleLeft(ctx, row.ID))
			case is == onHostPaused || is == onHostRunning && state != Running:
				// The host did not do that, or not yet: another server may be about
				// to ask it.
				if !patient(row.ID) {
					err = unlessGone(w.settleLeft(ctx, row.ID))
				}
			case is == onHostRunning:
				if sb.GetIdle().AsDuration() > w.DrainIdle {
					idle = append(idle, row)
				}
				if ends := expiry(sb); ends != nil && (row.ExpiresAt == nil || !row.ExpiresAt.Equal(*ends)) {
					expire.Ids, expire.Ats = append(expire.Ids, row.ID), append(expire.Ats, *ends)
				}
			}
		case Missing:
			if !there {
				err = w.ended(ctx, row.ID, "lost", "the host no longer has the sandbox", at)
			} else if is == onHostRunning {
				err = w.found(ctx, row, sb)
			} else if is == onHostPaused {
				err = unlessGone(w.settleLeft(ctx, row.ID))
			}
		case Stopping:
			err = w.stopAgain(row)
		}
		if err != nil {
			return err
		}
	}
	w.missing = missing
	if len(expire.Ids) > 0 {
		if err := w.Store.SandboxesExpire(ctx, expire); err != nil {
			return fmt.Errorf("write when sandboxes end: %w", err)
		}
	}
	if err := w.drainSoon(ctx, idle); err != nil {
		return err
	}
	return w.removeStrays(ctx, has, inTable, at)
}

// busy says whether this process is at work on the sandbox.
func (s *Service) busy(sandbox uuid.UUID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.creating[sandbox] != nil || s.deleting[sandbox] > 0 || s.turns[sandbox] != nil
}

// adopt takes over a sandbox that an earlier server asked for and the host made.
func (w *watch) adopt(ctx context.Context, row db.Sandbox, sb *hostagentv1.Sandbox) error {
	at := sb.GetCreatedAt().AsTime()
	_, err := w.Store.SandboxRunning(ctx, db.SandboxRunningParams{ID: row.ID, StartedAt: &at, ExpiresAt: expiry(sb), DiskMiB: max(sb.DiskMib, row.DiskMiB)})
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return fmt.Errorf("take over sandbox: %w", err)
	}
	if sb.State == onHostPaused {
		if err := unlessGone(w.settleLeft(ctx, row.ID)); err != nil {
			return err
		}
	}
	w.changed(row.ID)
	w.log.Info("took over sandbox that an earlier server began", "sandbox_id", id.Format(id.Sandbox, row.ID))
	return nil
}

// abandoned gives up a sandbox that an earlier server asked for and the host
// does not have.
func (w *watch) abandoned(row db.Sandbox) error {
	if err := w.fail(row.ID, "the server was restarted while the sandbox started"); err != nil && !errors.Is(err, store.ErrNoRows) {
		return fmt.Errorf("give up sandbox: %w", err)
	}
	w.changed(row.ID)
	w.log.Info("gave up sandbox that an earlier server began", "sandbox_id", id.Format(id.Sandbox, row.ID))
	return nil
}

// stopAgain finishes a deletion that was begun.
func (w *watch) stopAgain(row db.Sandbox) error {
	if err := w.begin(func() { w.deleting[row.ID]++ }); err != nil {
		return err
	}
	defer w.finish(func() { less(w.deleting, row.ID) })
	return w.stop(row)
}

// removeStrays destroys what the host has and nobody owns.
func (w *watch) removeStrays(ctx context.Context, has map[uuid.UUID]*hostagentv1.Sandbox, known map[uuid.UUID]bool, now time.Time) error {
	stray := make(map[uuid.UUID]time.Time)
	for sandbox, sb := range has {
		if known[sandbox] || sb.State == hostagentv1.SandboxState_SANDBOX_STATE_STOPPING || w.busy(sandbox) {
			continue
		}
		log := w.log.With("sandbox_id", sb.SandboxId)
		row, err := w.Store.GetSandbox(ctx, sandbox)
		// It may have been tried here before it started on another host.
		others := err == nil && (row.HostID == nil || *row.HostID != w.host.ID)
		switch {
		case errors.Is(err, store.ErrNoRows) || others:
			since, seen := w.stray[sandbox]
			if !seen {
				since = now
				log.Warn("host has a sandbox that the table does not know there")
			}
			if now.Sub(since) < strayAfter {
				stray[sandbox] = since
				continue
			}
		case err != nil:
			return fmt.Errorf("look up sandbox: %w", err)
		case !State(row.State).Ended():
			continue // It came after the table was read.
		}
		log.Warn("destroy sandbox that is nobody's")
		if err := w.destroy(sandbox, w.host, log); err != nil {
			return err
		}
	}
	w.stray = stray
	return nil
}
