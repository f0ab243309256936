// Package builds turns recipes into templates. It queues builds, runs their steps in
// sandboxes of their own, and has hosts capture the results.
//
// PostgreSQL is the source of truth for builds. Redis only wakes workers. A server owns a
// build as long as it renews its lease.
package builds

import (
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
	"github.com/wrenn-dev/wrenn/internal/recipe"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/page"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/spool"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
	"github.com/wrenn-dev/wrenn/internal/settings"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

// State is the state of a build.
type State string

// The states of a build.
const (
	Queued    State = "queued"
	Running   State = "running"
	Succeeded State = "succeeded"
	Failed    State = "failed"
	Cancelled State = "cancelled"
)

// Ended reports whether the state is final.
func (s State) Ended() bool { return s != Queued && s != Running }

// Settings configures builds. [New] replaces zeros with the defaults.
type Settings struct {
	Workers         int           `env:"WRENN_BUILD_WORKERS" envDefault:"3" help:"builds that one server runs at once; one owner's may be all but one of them"`
	TeamRunning     int           `env:"WRENN_BUILD_TEAM_RUNNING" envDefault:"2" help:"builds that may run at once for all teams of one owner"`
	TeamOpen        int           `env:"WRENN_BUILD_TEAM_OPEN" envDefault:"20" help:"builds of one team that may run or wait"`
	StepTimeout     time.Duration `env:"WRENN_BUILD_STEP_TIMEOUT" envDefault:"30s" help:"time for one step of a recipe, unless the build says otherwise"`
	PhaseTimeout    time.Duration `env:"WRENN_BUILD_PHASE_TIMEOUT" envDefault:"10m" help:"time for each of the phases before and after the recipe, unless the build says otherwise"`
	Timeout         time.Duration `env:"WRENN_BUILD_TIMEOUT" envDefault:"1h" help:"time for one attempt at a whole build"`
	Lease           time.Duration `env:"WRENN_BUILD_LEASE" envDefault:"30s" help:"time after which another server takes over a build whose server is silent"`
	ArchiveMiB      int64         `env:"WRENN_BUILD_ARCHIVE_MIB" envDefault:"512" help:"size in MiB of one folder that a recipe copies from"`
	TeamArchivesMiB int64         `env:"WRENN_BUILD_TEAM_ARCHIVES_MIB" envDefault:"2048" help:"size in MiB of all such folders that a team has uploaded"`
	ArchivesLast    time.Duration `env:"WRENN_BUILD_ARCHIVES_LAST" envDefault:"24h" help:"time without use after which an uploaded folder is deleted"`
	Layers          int           `env:"WRENN_BUILD_LAYERS" envDefault:"40" help:"layers of one team that are kept for later builds"`
	LayersLast      time.Duration `env:"WRENN_BUILD_LAYERS_LAST" envDefault:"168h" help:"time without use after which a layer is deleted"`
	Sweep           time.Duration `env:"WRENN_BUILD_SWEEP" envDefault:"30s" help:"interval at which the server deletes what builds no longer need"`
}

// Config configures a [Service].
type Config struct {
	Settings
	Store     *store.Store
	Redis     *redis.Client
	Hosts     *hosts.Registry
	Sandboxes *sandboxes.Service
	Templates *templates.Service
	// Spool buffers folders during an upload.
	Spool *spool.Spool
	// Secret encrypts registry credentials until the build has ended.
	Secret []byte
	// Trace continues the traces of the requests that started builds; nil: no tracing.
	Trace *tracing.Tracer
	Log   *slog.Logger
}

// Service manages the builds of all teams.
type Service struct {
	Config
	// queue is a separate client, because only closing its connections ends a blocking
	// pop early, and because pops must not use up the other client's connections.
	queue *redis.Client
	// keeping limits how many archives are written to the database at once.
	keeping chan struct{}

	mu sync.Mutex
	// waiting has the builds that somebody follows.
	waiting map[uuid.UUID]*followed
}

// New returns a service. [Service.Run] executes the builds.
func New(c Config) *Service {
	settings.Default(&c.Settings)
	// Copy the options before the other client is used, because that changes them.
	options := *c.Redis.Options()
	options.PoolSize, options.MaxRetries = c.Workers, -1
	return &Service{Config: c, queue: redis.NewClient(&options), keeping: make(chan struct{}, 2), waiting: make(map[uuid.UUID]*followed)}
}

// followed is a build that somebody follows. changed is closed at its next change.
type followed struct {
	changed chan struct{}
	by      int
}

// Request describes a build to start.
type Request struct {
	Name    string
	Tags    []string // none: latest
	Recipe  string
	Archive string // digest of the uploaded folder; empty: none
	// Registry is the credentials for the registry of FROM oci:; nil: anonymous.
	Registry *Registry
	Options  Options
}

// Options configures one build.
type Options struct {
	VCPUs     int32 `json:"vcpus,omitempty"`
	MemoryMiB int32 `json:"memory_mib,omitempty"`
	DiskMiB   int32 `json:"disk_mib,omitempty"`
	// NoCache runs every step, even if a layer for it exists.
	NoCache bool `json:"no_cache,omitempty"`
	// SkipPrePost skips the phases before and after the recipe.
	SkipPrePost bool `json:"skip_pre_post,omitempty"`
	// Timeouts in seconds (0: the server's setting).
	StepTimeout  int32 `json:"step_timeout,omitempty"`
	PhaseTimeout int32 `json:"phase_timeout,omitempty"`
}

// seconds converts a build's timeout. It returns otherwise if n is 0.
func seconds(n int32, otherwise time.Duration) time.Duration {
	if n == 0 {
		return otherwise
	}
	return time.Duration(n) * time.Second
}

// Start queues a build. It fails with invalid_argument and a list of all mistakes if the
// recipe is wrong, and with unprocessable if the recipe copies from a folder that was not
// uploaded.
func (s *Service) Start(ctx context.Context, team uuid.UUID, r Request) (db.Build, error) {
	if err := templates.CheckName(r.Name); err != nil {
		return db.Build{}, err
	}
	if len(r.Tags) == 0 {
		r.Tags = []string{templates.Latest}
	}
	parsed, err := recipe.Parse(r.Recipe)
	if err != nil {
		return db.Build{}, fault.New(fault.InvalidArgument, "recipe: %v", err)
	}
	copies := slices.ContainsFunc(parsed.Steps, func(s recipe.Step) bool { _, is := s.(*recipe.Copy); return is })
	var archive *string
	switch {
	case copies && r.Archive == "":
		return db.Build{}, fault.New(fault.InvalidArgument, "archive: the recipe copies files, so it needs the folder")
	case copies:
		archive = &r.Archive
		n, err := s.Store.UseArchive(ctx, db.UseArchiveParams{TeamID: team, Digest: r.Archive})
		if err != nil {
			return db.Build{}, fmt.Errorf("look up archive: %w", err)
		}
		if n == 0 {
			return db.Build{}, fault.New(fault.Unprocessable, "archive %.100q does not exist: upload it first", r.Archive)
		}
	}
	steps := len(outline(parsed, r.Options.SkipPrePost))
	if steps > maxSteps {
		return db.Build{}, fault.New(fault.InvalidArgument, "recipe: the build would have %d steps, but the limit is %d", steps, maxSteps)
	}
	options, err := json.Marshal(r.Options)
	if err != nil {
		return db.Build{}, err
	}
	build := uuid.New()
	var sealed []byte
	switch {
	case r.Registry == nil:
	case parsed.From.Image == "":
		return db.Build{}, fault.New(fault.InvalidArgument, "registry: only recipes with FROM oci: can have credentials")
	default:
		if sealed, err = s.sealRegistry(build, *r.Registry); err != nil {
			return db.Build{}, err
		}
	}
	var row db.Build
	err = s.Store.InTx(ctx, func(q *db.Queries) error {
		if err := q.LockLimit(ctx, db.LockLimitParams{What: "builds", TeamID: team}); err != nil {
			return err
		}
		var err error
		row, err = q.InsertBuild(ctx, db.InsertBuildParams{
			ID: build, TeamID: team, Name: r.Name, Tags: r.Tags, Recipe: r.Recipe, Archive: archive, Options: options, Registry: sealed,
			TotalSteps: int32(steps), CreatedAt: time.Now().UTC().Truncate(time.Microsecond), Most: int64(s.TeamOpen), Trace: tracing.Parent(ctx),
		})
		return err
	})
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.Conflict, "the team has %d queued or running builds, which is the limit", s.TeamOpen)
	}
	if err != nil {
		return row, fmt.Errorf("insert build: %w", err)
	}
	s.wake(ctx)
	return row, nil
}

// Get returns a team's build, or fails with not_found.
func (s *Service) Get(ctx context.Context, team, build uuid.UUID) (db.Build, error) {
	row, err := s.Store.GetTeamBuild(ctx, db.GetTeamBuildParams{ID: build, TeamID: team})
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no such build")
	}
	if err != nil {
		return row, fmt.Errorf("look up build: %w", err)
	}
	return row, nil
}

// Steps returns a build's steps, once it has begun.
func (s *Service) Steps(ctx context.Context, build uuid.UUID) ([]Step, error) {
	rows, err := s.Store.ListBuildSteps(ctx, build)
	if err != nil {
		return nil, fmt.Errorf("list build's steps: %w", err)
	}
	steps := make([]Step, len(rows))
	for i, row := range rows {
		if err := json.Unmarshal(row.Log, &steps[i]); err != nil {
			return nil, fmt.Errorf("read build's step: %w", err)
		}
	}
	return steps, nil
}

// List returns a page of a team's builds without their recipes, newest first, and the
// cursor of the next page ("" on the last).
func (s *Service) List(ctx context.Context, team uuid.UUID, cursor string, limit int) ([]db.Build, string, error) {
	at, before, err := page.Newest(cursor)
	if err != nil {
		return nil, "", err
	}
	rows, err := s.Store.ListBuilds(ctx, db.ListBuildsParams{TeamID: team, BeforeAt: at, BeforeID: before, MaxRows: int32(limit) + 1})
	if err != nil {
		return nil, "", fmt.Errorf("list builds: %w", err)
	}
	rows, next := page.Cut(rows, limit, func(b db.ListBuildsRow) string { return page.Time(b.CreatedAt, b.ID) })
	list := make([]db.Build, len(rows))
	for i, r := range rows {
		list[i] = db.Build{
			ID: r.ID, TeamID: r.TeamID, Name: r.Name, Version: r.Version, Tags: r.Tags, State: r.State, Error: r.Error, TotalSteps: r.TotalSteps, DoneSteps: r.DoneSteps,
			Attempts: r.Attempts, TemplateID: r.TemplateID, CreatedAt: r.CreatedAt, StartedAt: r.StartedAt, EndedAt: r.EndedAt,
		}
	}
	return list, next, nil
}

// Cancel cancels a build. A queued build has ended when Cancel returns. A running build
// ends as soon as its current work is interrupted and cleaned up. Cancelling a finished
// build is not an error.
func (s *Service) Cancel(ctx context.Context, team, build uuid.UUID) (db.Build, error) {
	row, err := s.Store.CancelBuild(ctx, db.CancelBuildParams{ID: build, TeamID: team})
	if errors.Is(err, store.ErrNoRows) {
		return s.Get(ctx, team, build)
	}
	if err != nil {
		return row, fmt.Errorf("cancel build: %w", err)
	}
	s.changed(ctx, build)
	return row, nil
}

// The Redis list on which workers block, and the channel that announces changes of
// builds.
const (
	queueKey = "wrenn:builds"
	channel  = "wrenn:builds:changed"
)

// redisTimeout bounds a message to Redis. Nothing depends on the message's arrival.
const redisTimeout = 2 * time.Second

// wake makes one worker of any server look for a build.
func (s *Service) wake(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), redisTimeout)
	defer cancel()
	// Bound the list for the case that no server is running.
	pipe := s.Redis.Pipeline()
	pipe.LPush(ctx, queueKey, "look")
	pipe.LTrim(ctx, queueKey, 0, 1023)
	if _, err := pipe.Exec(ctx); err != nil {
		s.Log.Debug("wake a worker", "error", err)
	}
}

// changed notifies all followers of the build, on this server and others.
func (s *Service) changed(ctx context.Context, build uuid.UUID) {
	s.heard(build)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), redisTimeout)
	defer cancel()
	if err := s.Redis.Publish(ctx, channel, build[:]).Err(); err != nil {
		s.Log.Debug("publish a build's change", "error", err)
	}
}

func (s *Service) heard(build uuid.UUID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.waiting[build]; ok {
		close(f.changed)
		delete(s.waiting, build)
	}
}

// follow returns a channel that is closed when something changes about the build. The
// caller must call stop.
func (s *Service) follow(build uuid.UUID) (changed <-chan struct{}, stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.waiting[build]
	if !ok {
		f = &followed{changed: make(chan struct{})}
		s.waiting[build] = f
	}
	f.by++
	return f.changed, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if f.by--; f.by == 0 && s.waiting[build] == f {
			delete(s.waiting, build)
		}
	}
}

// listen receives other servers' changes. The client reconnects by itself, and followers
// poll in case a message is lost.
func (s *Service) listen(ctx context.Context) {
	sub := s.Redis.Subscribe(ctx, channel)
	defer sub.Close()
	messages := sub.Channel()
	for {
		select {
		case m, ok := <-messages:
			if !ok {
				return
			}
			if build, err := uuid.FromBytes([]byte(m.Payload)); err == nil {
				s.heard(build)
			}
		case <-ctx.Done():
			return
		}
	}
}

// lookAgain is how often followers and idle workers poll the table if Redis sends
// nothing.
const lookAgain = 2 * time.Second

// Follow calls see with a team's build and its steps, at once and after each change,
// until the build has ended, see fails or ctx is done.
func (s *Service) Follow(ctx context.Context, team, build uuid.UUID, see func(db.Build, []Step) error) error {
	return s.atChanges(ctx, build, lookAgain, func() (ended bool, err error) { return s.look(ctx, team, build, see) })
}

// atChanges calls f at once, at each change of the build, and at the latest every most,
// until f is done or fails, or ctx is done.
func (s *Service) atChanges(ctx context.Context, build uuid.UUID, most time.Duration, f func() (done bool, err error)) error {
	for {
		changed, stop := s.follow(build)
		done, err := f()
		if !done && err == nil {
			t := time.NewTimer(most)
			select {
			case <-changed:
			case <-t.C:
			case <-ctx.Done():
				err = ctx.Err()
			}
			t.Stop()
		}
		stop()
		if done || err != nil {
			return err
		}
	}
}

// look calls see once for [Service.Follow].
func (s *Service) look(ctx context.Context, team, build uuid.UUID, see func(db.Build, []Step) error) (ended bool, err error) {
	row, err := s.Get(ctx, team, build)
	if err != nil {
		return false, err
	}
	steps, err := s.Steps(ctx, build)
	if err != nil {
		return false, err
	}
	return State(row.State).Ended(), see(row, steps)
}

// persistTimeout bounds the attempts to write a result.
const persistTimeout = 30 * time.Second

// persist retries f, which writes a result, until it succeeds or persistTimeout has
// passed. The end of ctx does not stop it.
func persist(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), persistTimeout)
	defer cancel()
	return store.Persist(ctx, f)
}

// told returns the message of an error for the build's owner.
func told(err error) string {
	var f *fault.Error
	if errors.As(err, &f) {
		return f.Message
	}
	if why, over := store.OverQuota(err); over {
		return why
	}
	switch {
	case store.TeamGone(err):
		return "the team is being deleted"
	case errors.Is(err, context.Canceled):
		return "the server stopped"
	}
	return "internal error; the server's log has more"
}
