package builds

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/each"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/store"
)

const (
	// maxAttempts is how often a build is begun whose workers die.
	maxAttempts = 3
	// cleanTimeout bounds the removal of what a build leaves behind.
	cleanTimeout = 90 * time.Second
	// sweeps is how many removals of one kind run at once, and sweepWithin bounds
	// all of a sweep.
	sweeps      = 4
	sweepWithin = 10 * time.Minute
)

// Why an attempt is broken off.
var (
	errCancelled = errors.New("the build was cancelled")
	errLost      = errors.New("the build is another server's by now")
)

// Run works on builds until ctx is done. What is under way then is left to
// others, or to the next server.
func (s *Service) Run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { _ = s.queue.Close() })
	defer func() {
		if stop() {
			_ = s.queue.Close()
		}
	}()

	var wg sync.WaitGroup
	wg.Go(func() { s.listen(ctx) })
	wg.Go(func() { s.sweep(ctx) })
	for range s.Workers {
		wg.Go(func() { s.work(ctx, s.queue) })
	}
	wg.Wait()
}

// work works on one build after the other.
func (s *Service) work(ctx context.Context, queue *redis.Client) {
	for ctx.Err() == nil {
		row, err := s.claim(ctx)
		switch {
		case err == nil:
			s.attempt(ctx, row)
			s.wake(ctx) // The team may have another that waits for this one's end.
		case ctx.Err() != nil:
			return
		default:
			if !errors.Is(err, store.ErrNoRows) {
				s.Log.Error("look for a build", "error", err)
			}
			s.wait(ctx, queue)
		}
	}
}

// wait returns when there may be something to do: somebody says so, or a lease
// may have ended.
func (s *Service) wait(ctx context.Context, queue *redis.Client) {
	err := queue.BLPop(ctx, s.Lease/2, queueKey).Err()
	if err == nil || errors.Is(err, redis.Nil) || ctx.Err() != nil {
		return
	}
	t := time.NewTimer(lookAgain)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (s *Service) claim(ctx context.Context) (row db.Build, err error) {
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockBuilds(ctx); err != nil {
			return err
		}
		row, err = q.ClaimBuild(ctx, db.ClaimBuildParams{Worker: &s.Store.Server, Lease: s.Lease.Seconds(), Most: int64(s.TeamRunning), Own: int64(max(1, s.Workers-1))})
		return err
	})
	return row, err
}

// attempt does a build that this server has claimed, and writes how it ended
// once nothing of the attempt is left.
func (s *Service) attempt(ctx context.Context, row db.Build) {
	log := s.Log.With("build_id", id.Format(id.Build, row.ID), "name", row.Name)
	log.Info("build begins", "attempt", row.Attempts)
	begun := time.Now()
	ctx, span := s.Trace.Continue(ctx, row.Trace, "build")
	defer span.End()
	if span.On() {
		span.Set("wrenn.build_id", id.Format(id.Build, row.ID))
		span.Set("wrenn.team_id", id.Format(id.Team, row.TeamID))
		span.SetInt("wrenn.attempt", int(row.Attempts))
	}
	run, cancel := context.WithCancelCause(ctx)
	held, let := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { s.hold(held, row, cancel) })
	late := time.AfterFunc(s.Settings.Timeout, func() {
		cancel(fault.New(fault.Timeout, "the build did not end within %v", s.Settings.Timeout))
	})
	defer late.Stop()
	defer func() { let(); wg.Wait(); cancel(nil) }()
	s.changed(ctx, row.ID)

	a := &attempt{Service: s, row: row, log: log}
	err := a.afresh(run)
	if err == nil && row.Attempts > maxAttempts {
		err = fault.New(fault.Unavailable, "the servers that worked on it died, %d times", maxAttempts)
	}
	if err == nil {
		err = fault.Guard(log, func() error { return a.run(run) })
	}
	if cause := context.Cause(run); err != nil && cause != nil {
		err = cause
	}
	span.Failed(err)
	if errors.Is(err, errLost) {
		log.Warn("build goes on elsewhere")
		return
	}
	// What is another's by now must not be removed under it.
	_, renewErr := s.Store.Vital.RenewBuild(context.WithoutCancel(ctx), db.RenewBuildParams{ID: row.ID, Worker: &s.Store.Server, Attempts: row.Attempts, Lease: s.Lease.Seconds()})
	if err != nil && errors.Is(renewErr, store.ErrNoRows) {
		log.Warn("build goes on elsewhere")
		return
	}
	if cleanErr := s.clean(context.WithoutCancel(ctx), row.ID); cleanErr != nil {
		// It is tried again in a while: see sweep.
		log.Error("remove what the build leaves", "error", cleanErr)
	}
	state := Failed
	switch {
	case err == nil:
		log.Info("build succeeded", "took", time.Since(begun))
		s.changed(ctx, row.ID)
		return // that is written
	case errors.Is(err, errCancelled):
		state = Cancelled
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		log.Info("build is left to another server")
		err := persist(ctx, func(ctx context.Context) error {
			return s.Store.ReleaseBuild(ctx, db.ReleaseBuildParams{ID: row.ID, Worker: &s.Store.Server})
		})
		if err != nil {
			log.Error("write that the build waits again", "error", err)
		}
		s.wake(ctx)
		s.changed(ctx, row.ID)
		return
	}
	a.close(state)
	why := told(err)
	if state == Cancelled {
		why = ""
	}
	writeErr := persist(ctx, func(ctx context.Context) error {
		_, err := s.Store.BuildEnds(ctx, db.BuildEndsParams{ID: row.ID, Worker: &s.Store.Server, State: string(state), Error: why})
		return err
	})
	if writeErr != nil && !errors.Is(writeErr, store.ErrNoRows) {
		log.Error("write how the build ended", "error", writeErr)
	}
	log.Info("build ended", "state", state, "error", err, "took", time.Since(begun))
	s.changed(ctx, row.ID)
}

// hold renews the lease, and breaks the attempt off when the build is to be
// cancelled or is this server's no more.
func (s *Service) hold(ctx context.Context, row db.Build, off context.CancelCauseFunc) {
	until := time.Now().Add(s.Lease)
	for {
		change := s.change(row.ID)
		cancelling, err := s.Store.Vital.RenewBuild(ctx, db.RenewBuildParams{ID: row.ID, Worker: &s.Store.Server, Attempts: row.Attempts, Lease: s.Lease.Seconds()})
		switch {
		case ctx.Err() != nil:
			return
		case err == nil && cancelling:
			off(errCancelled)
			until = time.Now().Add(s.Lease)
		case err == nil:
			until = time.Now().Add(s.Lease)
		case errors.Is(err, store.ErrNoRows), time.Now().After(until):
			off(errLost)
			return
		}
		t := time.NewTimer(s.Lease / 4)
		select {
		case <-change:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
}

// clean removes the sandbox of a build, and then what it began to capture: in
// this order, so that no capture of it ends later.
func (s *Service) clean(ctx context.Context, build uuid.UUID) error {
	ctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	boxes, err := s.Store.ListBuildSandboxes(ctx, &build)
	if err != nil {
		return fmt.Errorf("list build's sandboxes: %w", err)
	}
	err = each.Do(ctx, s.Log, sweeps, cleanTimeout, boxes, func(ctx context.Context, row db.Sandbox) error {
		return s.Sandboxes.End(ctx, row, "its build")
	})
	if err != nil {
		return fmt.Errorf("end build's sandboxes: %w", err)
	}
	half, err := s.Store.BuildTemplatesGo(ctx, db.BuildTemplatesGoParams{BuildID: &build, Worker: &s.Store.Server})
	if err != nil {
		return fmt.Errorf("list build's templates: %w", err)
	}
	if err := each.Do(ctx, s.Log, sweeps, cleanTimeout, half, s.Templates.Remove); err != nil {
		return fmt.Errorf("remove partial captures: %w", err)
	}
	return nil
}

// sweep removes, now and then, what builds that have ended could not, versions
// that nothing names or uses, layers and archives that nobody needs.
func (s *Service) sweep(ctx context.Context) {
	tick := time.NewTicker(s.Settings.Sweep)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
			s.Log.Warn("remove what builds leave", "error", err)
		}
	}
}

// Sweep does so once. What of it fails or takes long holds up nothing else.
func (s *Service) Sweep(ctx context.Context) error {
	return each.Do(ctx, s.Log, 4, sweepWithin, []func(context.Context) error{
		func(ctx context.Context) error {
			left, err := s.Store.ListBuildLeftovers(ctx)
			if err != nil {
				return fmt.Errorf("list leftovers: %w", err)
			}
			return each.Do(ctx, s.Log, sweeps, cleanTimeout, left, s.clean)
		},
		func(ctx context.Context) error {
			unused, err := s.Store.ListUnusedVersions(ctx)
			if err != nil {
				return fmt.Errorf("list unused versions: %w", err)
			}
			return s.remove(ctx, unused)
		},
		func(ctx context.Context) error {
			layers, err := s.Store.ListUnusedLayers(ctx, db.ListUnusedLayersParams{Before: time.Now().Add(-s.LayersLast), Most: int64(s.Layers)})
			if err != nil {
				return fmt.Errorf("list unused layers: %w", err)
			}
			return s.remove(ctx, layers)
		},
		func(ctx context.Context) error {
			if err := s.Store.ForgetArchives(ctx, time.Now().Add(-s.ArchivesLast)); err != nil {
				return fmt.Errorf("forget archives: %w", err)
			}
			return nil
		},
		s.settle,
	}, func(ctx context.Context, part func(context.Context) error) error { return part(ctx) })
}

// settle measures the logs of builds that have ended, and forgets the oldest builds of
// teams that have more than they keep.
func (s *Service) settle(ctx context.Context) error {
	const batch = 100
	for {
		teams, err := s.Store.SettleBuilds(ctx, batch)
		if err != nil {
			return fmt.Errorf("measure builds' logs: %w", err)
		}
		n := len(teams)
		slices.SortFunc(teams, func(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) })
		for _, team := range slices.Compact(teams) {
			if err := s.Store.ForgetBuilds(ctx, db.ForgetBuildsParams{TeamID: team, Most: mostBuilds, MostBytes: mostBuildBytes}); err != nil {
				return fmt.Errorf("forget builds: %w", err)
			}
		}
		if n < batch {
			return nil
		}
	}
}

// remove removes templates that nothing needs.
func (s *Service) remove(ctx context.Context, templates []db.Template) error {
	return each.Do(ctx, s.Log, sweeps, cleanTimeout, templates, func(ctx context.Context, t db.Template) error {
		s.Log.Info("template is removed: nothing needs it", "template_id", id.Format(id.Template, t.ID), "kind", t.Kind, "name", t.Name, "version", t.Version)
		return s.Templates.Remove(ctx, t)
	})
}

// attempt is one attempt at a build.
type attempt struct {
	*Service
	row     db.Build
	options Options
	log     *slog.Logger
	steps   []Step
}

// afresh removes what an attempt before this one left.
func (a *attempt) afresh(ctx context.Context) error {
	if err := json.Unmarshal(a.row.Options, &a.options); err != nil {
		return fmt.Errorf("read build's options: %w", err)
	}
	if a.row.Attempts > 1 {
		if err := a.clean(ctx, a.row.ID); err != nil {
			return err
		}
	}
	return a.Store.ClearBuildSteps(ctx, a.row.ID)
}

// write writes down a step as it is now.
func (a *attempt) write(ctx context.Context, s *Step) error {
	log, err := json.Marshal(s)
	if err != nil {
		return err
	}
	err = persist(ctx, func(ctx context.Context) error {
		return a.Store.WriteBuildStep(ctx, db.WriteBuildStepParams{BuildID: a.row.ID, Number: int32(s.Number), Log: log})
	})
	if err != nil {
		return fmt.Errorf("write build's step: %w", err)
	}
	a.changed(ctx, a.row.ID)
	return nil
}

// close says of the steps that did not come to their end what became of them.
func (a *attempt) close(state State) {
	for i := range a.steps {
		s := &a.steps[i]
		switch {
		case s.State == stepRunning && state == Cancelled:
			s.State = stepCancelled
		case s.State == stepRunning:
			s.State = stepFailed
		case s.State == stepPending:
			s.State = stepSkipped
		default:
			continue
		}
		if err := a.write(context.Background(), s); err != nil {
			a.log.Error("write build's step", "error", err)
		}
	}
}
