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
	// maxAttempts is how often a build is started if its workers die.
	maxAttempts = 3
	// cleanTimeout bounds the cleanup after a build.
	cleanTimeout = 90 * time.Second
	// sweeps is how many objects of one kind a sweep removes at once. sweepWithin bounds
	// a sweep.
	sweeps      = 4
	sweepWithin = 10 * time.Minute
)

// Reasons to abort an attempt.
var (
	errCancelled = errors.New("the build was cancelled")
	errLost      = errors.New("another server took over the build")
)

// Run executes builds until ctx is done. Then it leaves unfinished builds to other
// servers.
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

// work executes one build after another.
func (s *Service) work(ctx context.Context, queue *redis.Client) {
	for ctx.Err() == nil {
		row, err := s.claim(ctx)
		switch {
		case err == nil:
			s.attempt(ctx, row)
			s.wake(ctx) // The team may have another build that waits for a free place.
		case ctx.Err() != nil:
			return
		default:
			if !errors.Is(err, store.ErrNoRows) {
				s.Log.Error("claim a build", "error", err)
			}
			s.wait(ctx, queue)
		}
	}
}

// wait blocks until there may be a build to claim: somebody woke a worker, or a lease may
// have expired.
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

// attempt executes a build that this server has claimed, cleans up, and then writes the
// result.
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
	renewing, stopRenewing := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { s.renewLease(renewing, row, cancel) })
	late := time.AfterFunc(s.Settings.Timeout, func() {
		cancel(fault.New(fault.Timeout, "the build did not end within %v", s.Settings.Timeout))
	})
	defer late.Stop()
	defer func() { stopRenewing(); wg.Wait(); cancel(nil) }()
	s.changed(ctx, row.ID)

	a := &attempt{Service: s, row: row, log: log}
	err := a.afresh(run)
	if err == nil && row.Attempts > maxAttempts {
		err = fault.New(fault.Unavailable, "the server that ran the build died %d times", maxAttempts)
	}
	if err == nil {
		err = fault.Guard(log, func() error { return a.run(run) })
	}
	if cause := context.Cause(run); err != nil && cause != nil {
		err = cause
	}
	span.Failed(err)
	if errors.Is(err, errLost) {
		log.Warn("another server took over the build")
		return
	}
	// Do not clean up if another server has taken over.
	_, renewErr := s.Store.Vital.RenewBuild(context.WithoutCancel(ctx), db.RenewBuildParams{ID: row.ID, Worker: &s.Store.Server, Attempts: row.Attempts, Lease: s.Lease.Seconds()})
	if err != nil && errors.Is(renewErr, store.ErrNoRows) {
		log.Warn("another server took over the build")
		return
	}
	if cleanErr := s.clean(context.WithoutCancel(ctx), row.ID); cleanErr != nil {
		// A sweep retries this.
		log.Error("clean up after build", "error", cleanErr)
	}
	state := Failed
	switch {
	case err == nil:
		log.Info("build succeeded", "took", time.Since(begun))
		s.changed(ctx, row.ID)
		return // succeed has written it.
	case errors.Is(err, errCancelled):
		state = Cancelled
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		log.Info("build released for another server")
		err := persist(ctx, func(ctx context.Context) error {
			return s.Store.ReleaseBuild(ctx, db.ReleaseBuildParams{ID: row.ID, Worker: &s.Store.Server})
		})
		if err != nil {
			log.Error("requeue build", "error", err)
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
		log.Error("write the build's result", "error", writeErr)
	}
	log.Info("build ended", "state", state, "error", err, "took", time.Since(begun))
	s.changed(ctx, row.ID)
}

// renewLease renews the lease. It aborts the attempt if the build was cancelled or the
// lease is lost.
func (s *Service) renewLease(ctx context.Context, row db.Build, off context.CancelCauseFunc) {
	until := time.Now().Add(s.Lease)
	_ = s.atChanges(ctx, row.ID, s.Lease/4, func() (lost bool, _ error) { // It fails only when ctx is done.
		cancelling, err := s.Store.Vital.RenewBuild(ctx, db.RenewBuildParams{ID: row.ID, Worker: &s.Store.Server, Attempts: row.Attempts, Lease: s.Lease.Seconds()})
		switch {
		case ctx.Err() != nil:
		case err == nil:
			if cancelling {
				off(errCancelled)
			}
			until = time.Now().Add(s.Lease)
		case errors.Is(err, store.ErrNoRows), time.Now().After(until):
			off(errLost)
			return true, nil
		}
		return false, nil
	})
}

// clean removes a build's sandboxes first, so that no capture can complete, and then its
// partial captures.
func (s *Service) clean(ctx context.Context, build uuid.UUID) error {
	ctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	sandboxes, err := s.Store.ListBuildSandboxes(ctx, &build)
	if err != nil {
		return fmt.Errorf("list build's sandboxes: %w", err)
	}
	err = each.Do(ctx, s.Log, sweeps, cleanTimeout, sandboxes, func(ctx context.Context, row db.Sandbox) error {
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

// sweep calls [Service.Sweep] at intervals.
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
			s.Log.Warn("sweep builds", "error", err)
		}
	}
}

// Sweep removes leftovers of finished builds, unused versions and layers, and expired
// archives, and trims teams' old builds. The parts run independently.
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
				return fmt.Errorf("delete expired archives: %w", err)
			}
			return nil
		},
		s.trimBuilds,
	}, func(ctx context.Context, part func(context.Context) error) error { return part(ctx) })
}

// trimBuilds measures the logs of finished builds and deletes the oldest builds of teams
// that exceed their limit.
func (s *Service) trimBuilds(ctx context.Context) error {
	const batch = 100
	for {
		teams, err := s.Store.MeasureBuildLogs(ctx, batch)
		if err != nil {
			return fmt.Errorf("measure builds' logs: %w", err)
		}
		n := len(teams)
		slices.SortFunc(teams, func(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) })
		for _, team := range slices.Compact(teams) {
			if err := s.Store.ForgetBuilds(ctx, db.ForgetBuildsParams{TeamID: team, Most: mostBuilds, MostBytes: mostBuildBytes}); err != nil {
				return fmt.Errorf("delete old builds: %w", err)
			}
		}
		if n < batch {
			return nil
		}
	}
}

// remove removes unneeded templates.
func (s *Service) remove(ctx context.Context, templates []db.Template) error {
	return each.Do(ctx, s.Log, sweeps, cleanTimeout, templates, func(ctx context.Context, t db.Template) error {
		s.Log.Info("removing unused template", "template_id", id.Format(id.Template, t.ID), "kind", t.Kind, "name", t.Name, "version", t.Version)
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

// afresh cleans up after the previous attempt.
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

// write stores a step.
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

// close sets the final state of the steps that did not end.
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
