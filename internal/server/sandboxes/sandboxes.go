// Package sandboxes holds the rules of sandboxes: how they come to be, what
// may be done to them in which state, and how the table and the hosts are
// kept in agreement.
//
// The database is written before a host is asked and put right when the host
// fails, so that whoever compares the two never mistakes a sandbox in transit.
package sandboxes

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/page"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
)

// State is where a sandbox is in its life.
type State string

// The states of a sandbox.
const (
	Pending  State = "pending"
	Starting State = "starting"
	Running  State = "running"
	// Missing is what ran when its host was last heard of.
	Missing  State = "missing"
	Pausing  State = "pausing"
	Paused   State = "paused"
	Resuming State = "resuming"
	Stopping State = "stopping"
	Stopped  State = "stopped"
	Failed   State = "error"
)

// Ended says whether nothing of the sandbox is left but its row.
func (s State) Ended() bool { return s == Stopped || s == Failed }

// Bounds of what the service does on its own once it was asked.
const (
	createTimeout  = 5 * time.Minute
	destroyTimeout = time.Minute
	persistTimeout = 30 * time.Second
	// shortCall bounds calls that a host answers from what it has at hand.
	shortCall = 15 * time.Second
	// lookAgain is how long another server's word is waited for before the table
	// is looked at all the same.
	lookAgain = 2 * time.Second
	// keysLast is how long an idempotency key is remembered.
	keysLast = 24 * time.Hour
)

// Config is what a Service works with.
type Config struct {
	Store     *store.Store
	Hosts     *hosts.Registry
	Templates *templates.Service
	Tokens    auth.Tokens
	// Tell tells the other servers that a sandbox changed; nil: there are none.
	// It must not block.
	Tell func(sandbox uuid.UUID)
	// Ended is told that a sandbox has ended, by the server that wrote it down;
	// nil: nobody is.
	Ended func(ctx context.Context, sandbox uuid.UUID) error
	Log   *slog.Logger
}

// Service is every team's sandboxes.
type Service struct {
	Config
	metrics metrics

	// ctx ends when the service is closed; what was asked for runs on it and
	// not on the context of whoever asked.
	ctx    context.Context
	cancel context.CancelFunc

	mu     sync.Mutex
	closed bool
	work   sync.WaitGroup
	// creating are the creations that this process works on.
	creating map[uuid.UUID]*creation
	// deleting counts the deletions that this process works on.
	deleting map[uuid.UUID]int
	// turns are the other things that it does to sandboxes.
	turns map[uuid.UUID]*turn
	// templates counts the captures and removals of templates that it works on.
	templates map[uuid.UUID]int
	// importing counts the images that it imports for each team.
	importing map[uuid.UUID]int
	// waiting are closed when the sandbox's row changes.
	waiting map[uuid.UUID]chan struct{}
	hooks   []func(uuid.UUID)
	// deafness is told whether other servers' changes can be missed.
	deafness []func(bool)
}

// creation is a sandbox on its way. row and err are set before done is closed.
type creation struct {
	done chan struct{}
	row  db.Sandbox
	err  error
}

// New returns the service of a store.
func New(c Config) *Service {
	s := &Service{
		Config: c, metrics: newMetrics(c.Store),
		creating: make(map[uuid.UUID]*creation), deleting: make(map[uuid.UUID]int),
		turns: make(map[uuid.UUID]*turn), templates: make(map[uuid.UUID]int), importing: make(map[uuid.UUID]int), waiting: make(map[uuid.UUID]chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Collectors are the service's Prometheus metrics.
func (s *Service) Collectors() []prometheus.Collector { return s.metrics.collectors() }

// OnChange has f called after every change of a sandbox's state, by whichever
// server it was changed. Call it before the service is used; f must not block.
func (s *Service) OnChange(f func(sandbox uuid.UUID)) { s.hooks = append(s.hooks, f) }

// Run forgets idempotency keys that are old enough until ctx is done.
func (s *Service) Run(ctx context.Context) {
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

// Close waits for creations and deletions under way until ctx is done, then
// gives up on them; the next server finds out how they ended.
func (s *Service) Close(ctx context.Context) {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		s.work.Wait()
	}()
	select {
	case <-idle:
	case <-ctx.Done():
	}
	s.cancel()
	<-idle
	// Others need not wait to see whether this server is dead.
	bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := s.Store.ServerLeaves(bye, s.Store.Server); err != nil {
		s.Log.Debug("say that this server goes", "error", err)
	}
}

// begin registers work of the service's own; finish ends it.
func (s *Service) begin(register func()) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fault.New(fault.Unavailable, "the server is stopping")
	}
	s.work.Add(1)
	register()
	return nil
}

func (s *Service) finish(unregister func()) {
	s.mu.Lock()
	unregister()
	s.mu.Unlock()
	s.work.Done()
}

// less takes one away from a count, which is there while it is not 0.
func less(counts map[uuid.UUID]int, of uuid.UUID) {
	if counts[of]--; counts[of] == 0 {
		delete(counts, of)
	}
}

// changed tells everybody who waits or caches that the sandbox changed, here
// and in other servers.
func (s *Service) changed(sandbox uuid.UUID) {
	s.Heard(sandbox)
	if s.Tell != nil {
		s.Tell(sandbox)
	}
}

// Changed is for those who changed sandboxes by other means than the service's.
func (s *Service) Changed(sandboxes ...uuid.UUID) {
	for _, sandbox := range sandboxes {
		s.changed(sandbox)
	}
}

// Heard tells everybody here who waits or caches that another server changed
// the sandbox.
func (s *Service) Heard(sandbox uuid.UUID) {
	s.mu.Lock()
	if c, ok := s.waiting[sandbox]; ok {
		close(c)
		delete(s.waiting, sandbox)
	}
	s.mu.Unlock()
	for _, f := range s.hooks {
		f(sandbox)
	}
}

// Deaf tells everybody here whether other servers' changes can be missed from
// now on; before they cannot, anything may have changed.
func (s *Service) Deaf(is bool) {
	s.mu.Lock()
	all := s.waiting
	s.waiting = make(map[uuid.UUID]chan struct{})
	s.mu.Unlock()
	for _, c := range all {
		close(c)
	}
	for _, f := range s.deafness {
		f(is)
	}
}

// OnDeaf has f called as [Service.Deaf] is. Call it before the service is used.
func (s *Service) OnDeaf(f func(bool)) { s.deafness = append(s.deafness, f) }

// change returns a channel that is closed at the sandbox's next change.
func (s *Service) change(sandbox uuid.UUID) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.waiting[sandbox]
	if !ok {
		c = make(chan struct{})
		s.waiting[sandbox] = c
	}
	return c
}

// persist runs f, which writes what has already happened, until it works or
// the time for it is over; the reconciler sets right what could not be written.
func (s *Service) persist(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, persistTimeout)
	defer cancel()
	return store.Persist(ctx, f)
}

// What a sandbox has unless it, or its template, says otherwise.
const (
	defaultVCPUs     = 1
	defaultMemoryMiB = 512
)

// What becomes of a sandbox that was not used for its timeout.
const (
	DestroyOnTimeout = "destroy"
	PauseOnTimeout   = "pause"
)

// CreateParams is what a sandbox is asked to be.
type CreateParams struct {
	// Template is a name or an id.
	Template       string
	VCPUs          int32 // 0: the template's, else 1
	MemoryMiB      int32 // 0: the template's, else 512
	DiskMiB        int32 // 0: the template's
	TimeoutSeconds int32 // 0: never
	Envs           map[string]string
	Metadata       map[string]string
	// HostTags are tags that the sandbox's host must have.
	HostTags []string `json:",omitempty"`
	// OnTimeout is DestroyOnTimeout or PauseOnTimeout; empty: the former.
	OnTimeout string
	// AutoResume lets calls and requests resume the sandbox; nil: if it is
	// paused when its timeout ends.
	AutoResume *bool

	build *uuid.UUID // it is made for
}

// normal returns p with what is left open said, where that does not depend on
// the template.
func (p CreateParams) normal() CreateParams {
	p.OnTimeout = cmp.Or(p.OnTimeout, DestroyOnTimeout)
	if p.AutoResume == nil {
		auto := p.OnTimeout == PauseOnTimeout
		p.AutoResume = &auto
	}
	return p
}

// asked is what is asked for, however it was said.
func (p CreateParams) asked() CreateParams {
	p = p.normal()
	p.VCPUs, p.MemoryMiB = cmp.Or(p.VCPUs, defaultVCPUs), cmp.Or(p.MemoryMiB, defaultMemoryMiB)
	return p
}

// fit returns p with the sizes that a sandbox of the template gets, or fails
// with invalid_argument where it cannot have those that are asked for.
func (p CreateParams) fit(t db.Template) (CreateParams, error) {
	for _, size := range []struct {
		name           string
		asked          *int32
		has, otherwise int32
	}{
		{"vcpus", &p.VCPUs, t.VCPUs, defaultVCPUs},
		{"memory_mib", &p.MemoryMiB, t.MemoryMiB, defaultMemoryMiB},
	} {
		if size.has != 0 && *size.asked != 0 && *size.asked != size.has {
			return p, fault.New(fault.InvalidArgument, "%s: template %q was captured with %d and takes no other", size.name, t.Name, size.has)
		}
		*size.asked = cmp.Or(*size.asked, size.has, size.otherwise)
	}
	if p.DiskMiB != 0 && p.DiskMiB < t.DiskMiB {
		return p, fault.New(fault.InvalidArgument, "disk_mib: template %q has %d, which is the least", t.Name, t.DiskMiB)
	}
	p.DiskMiB = cmp.Or(p.DiskMiB, t.DiskMiB)
	return p, nil
}

func (p CreateParams) check() error {
	if err := checkText("template", p.Template); err != nil {
		return err
	}
	if err := CheckEnvs(p.Envs); err != nil {
		return err
	}
	return checkMetadata(p.Metadata)
}

// CheckEnvs fails with invalid_argument for what cannot be an environment.
func CheckEnvs(envs map[string]string) error {
	for k, v := range envs {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.Contains(v, "\x00") || !utf8.ValidString(k) || !utf8.ValidString(v) {
			return fault.New(fault.InvalidArgument, "envs: %q is no environment variable: names are not empty and have no '=', nothing has NUL", k)
		}
	}
	return nil
}

func checkMetadata(m map[string]string) error {
	for k, v := range m {
		if k == "" || len(k) > 128 || strings.ContainsAny(k, "=\x00") || strings.Contains(v, "\x00") || !utf8.ValidString(k) || !utf8.ValidString(v) {
			return fault.New(fault.InvalidArgument, "metadata: %q cannot be an entry: keys have 1 to 128 bytes without '=', nothing has NUL", k)
		}
	}
	return nil
}

func checkText(name, s string) error {
	if strings.Contains(s, "\x00") || !utf8.ValidString(s) {
		return fault.New(fault.InvalidArgument, "%s: must be UTF-8 without NUL", name)
	}
	return nil
}

// Create makes a sandbox of a team and returns when it runs. It goes on when
// ctx ends before. With a key, the sandbox that the same key made before is
// returned, and replayed is true.
func (s *Service) Create(ctx context.Context, team uuid.UUID, p CreateParams, key string) (row db.Sandbox, replayed bool, err error) {
	if err := p.check(); err != nil {
		return row, false, err
	}
	o, err := onceFor(team, key, p.asked())
	if err != nil {
		return row, false, err
	}
	p = p.normal()
	for {
		rows, found, err := s.replay(ctx, o)
		if err != nil {
			return row, found, err
		}
		if found {
			return rows[0], true, nil
		}
		row, err = s.create(ctx, team, p, o)
		if !errors.Is(err, errTaken) {
			return row, false, err
		}
	}
}

func (s *Service) create(ctx context.Context, team uuid.UUID, p CreateParams, o once) (db.Sandbox, error) {
	template, err := s.resolve(ctx, team, p.Template)
	if err != nil {
		return db.Sandbox{}, err
	}
	return s.createFrom(ctx, team, template, p, o)
}

// CreateFor makes a sandbox of a template, which need not have a name, for a
// build, and returns when it runs. It is nobody's but the build's, and counts as
// any other of the team's. It goes on when ctx ends before: see [Service.End].
func (s *Service) CreateFor(ctx context.Context, team, build uuid.UUID, template db.Template, p CreateParams) (db.Sandbox, error) {
	p = p.normal()
	p.build = &build
	return s.createFrom(ctx, team, template, p, once{})
}

func (s *Service) createFrom(ctx context.Context, team uuid.UUID, template db.Template, p CreateParams, o once) (db.Sandbox, error) {
	var err error
	if p, err = p.fit(template); err != nil {
		return db.Sandbox{}, err
	}
	places, err := s.places(ctx, template.ID, p)
	if err != nil {
		return db.Sandbox{}, err
	}
	sandbox, c := uuid.New(), &creation{done: make(chan struct{})}
	// Registered before the row is there, or the reconciler would take it for
	// one that an earlier server left behind.
	if err := s.begin(func() { s.creating[sandbox] = c }); err != nil {
		return db.Sandbox{}, err
	}
	metadata := p.Metadata
	if metadata == nil {
		metadata = map[string]string{}
	}
	var row db.Sandbox
	insert := func(q *db.Queries) error {
		host := places[0].ID
		if err := s.Hosts.Reserve(ctx, q, host, p.needs()); err != nil {
			return err
		}
		var err error
		row, err = q.InsertSandbox(ctx, db.InsertSandboxParams{
			ID: sandbox, TeamID: team, HostID: &host, TemplateID: template.ID, TemplateName: template.Name,
			VCPUs: p.VCPUs, MemoryMiB: p.MemoryMiB, DiskMiB: p.DiskMiB, TimeoutSeconds: p.TimeoutSeconds,
			Metadata: metadata, CreatedAt: now(), OnTimeout: p.OnTimeout, AutoResume: *p.AutoResume, BuildID: p.build,
		})
		if err != nil {
			return err
		}
		return o.claim(ctx, q, db.ClaimIdempotencyKeyParams{SandboxID: &sandbox})
	}
	// A host that others filled meanwhile is passed over.
	for err = s.Store.InTx(ctx, insert); fault.Is(err, fault.NoCapacity) && len(places) > 1; err = s.Store.InTx(ctx, insert) {
		places = places[1:]
	}
	if err != nil {
		c.err = err
		close(c.done)
		s.finish(func() { delete(s.creating, sandbox) })
		if errors.Is(err, errTaken) || fault.Is(err, fault.NoCapacity) {
			return db.Sandbox{}, err
		}
		return db.Sandbox{}, fmt.Errorf("write sandbox: %w", err)
	}
	go func() {
		defer s.finish(func() { delete(s.creating, sandbox) })
		defer s.changed(sandbox)
		defer close(c.done)
		c.err = fault.Guard(s.Log, func() (err error) {
			c.row, err = s.startOn(row, places, p)
			return err
		})
	}()
	select {
	case <-c.done:
		return c.row, c.err
	case <-ctx.Done():
		return db.Sandbox{}, ctx.Err()
	}
}

// start asks the host for the sandbox of a row that is starting and writes
// down how that went. Unless the host is the last to be tried, it leaves the
// row as it is and fails with elsewhere where another host may do.
func (s *Service) start(row db.Sandbox, host *hosts.Host, envs map[string]string, last bool) (db.Sandbox, error) {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, row.ID), "host", host.URL)
	ctx, cancel := context.WithTimeout(s.ctx, createTimeout)
	defer cancel()
	begun := time.Now()
	answer, err := host.Agent.Create(ctx, connect.NewRequest(&hostagentv1.CreateRequest{
		SandboxId: id.Format(id.Sandbox, row.ID), TeamId: id.Format(id.Team, row.TeamID), TemplateId: id.Format(id.Template, row.TemplateID),
		Vcpus: row.VCPUs, MemoryMib: row.MemoryMiB, DiskMib: row.DiskMiB, TimeoutSeconds: row.TimeoutSeconds,
		Envs: envs, AccessToken: s.Tokens.Access(row.ID), PauseOnTimeout: row.OnTimeout == PauseOnTimeout,
	}))
	took := time.Since(begun)
	if s.ctx.Err() != nil {
		// The server stops: the row stays as it is, the next one looks.
		return row, fault.New(fault.Unavailable, "the server is stopping")
	}
	if err != nil && !last && mayElsewhere(err) {
		log.Warn("create sandbox; another host is tried", "error", err)
		if !connect.IsWireError(err) {
			// It may have got the call. What this does not reach is a stray there.
			_ = s.destroy(s.ctx, row.ID, host, log)
		}
		return row, &elsewhere{hosts.Fault(err)}
	}
	if err != nil {
		return row, s.startFailed(row, host, err, log)
	}
	made := answer.Msg.GetSandbox()
	ms, at := took.Milliseconds(), now()
	var running db.Sandbox
	err = s.persist(s.ctx, func(ctx context.Context) error {
		var err error
		running, err = s.Store.SandboxRunning(ctx, db.SandboxRunningParams{
			ID: row.ID, StartedAt: &at, ExpiresAt: Expiry(made), DiskMiB: max(made.GetDiskMib(), row.DiskMiB), StartMs: &ms,
		})
		return err
	})
	switch {
	case errors.Is(err, store.ErrNoRows):
		// Deleted meanwhile. The deletion's own call may have come before ours.
		s.destroy(s.ctx, row.ID, host, log)
		s.metrics.created("deleted", took)
		return row, fault.New(fault.Conflict, "the sandbox was deleted while it started")
	case err != nil:
		log.Error("write that sandbox runs", "error", err)
		return row, err
	}
	s.metrics.created("ok", took)
	log.Info("sandbox runs", "template", row.TemplateName, "took", took)
	return running, nil
}

// startFailed undoes a creation that failed with err, and returns what the
// caller is told.
func (s *Service) startFailed(row db.Sandbox, host *hosts.Host, err error, log *slog.Logger) error {
	log.Error("create sandbox", "error", err)
	if !connect.IsWireError(err) {
		// The host may have got the call and still be at it.
		s.destroy(s.ctx, row.ID, host, log)
	}
	told := hosts.Fault(err)
	if fault.Is(told, fault.NotFound) {
		told = fault.Because(err, fault.NoCapacity, "the host no longer has template %q", row.TemplateName)
	}
	var f *fault.Error
	errors.As(told, &f)
	var wire *connect.Error
	switch {
	case errors.As(err, &wire) && connect.IsWireError(err) && wire.Code() == connect.CodeAborted:
		// The virtual machine did not make it, and the host says why in words
		// that are for the caller.
		f = fault.Because(err, fault.Internal, "the sandbox did not start: %s", wire.Message())
	case f.Code == fault.Internal:
		f = fault.Because(err, fault.Internal, "the host could not start the sandbox")
	}
	s.metrics.created(string(f.Code), 0)
	if err := s.fail(s.ctx, row.ID, f.Message); err != nil && !errors.Is(err, store.ErrNoRows) {
		log.Error("write that sandbox failed", "error", err)
	}
	return f
}

// fail writes that a sandbox did not start and frees its idempotency key.
func (s *Service) fail(ctx context.Context, sandbox uuid.UUID, why string) error {
	return s.persist(ctx, func(ctx context.Context) error {
		return s.Store.InTx(ctx, func(q *db.Queries) error {
			if err := q.FreeIdempotencyKeys(ctx, &sandbox); err != nil {
				return err
			}
			_, err := q.SandboxFailed(ctx, db.SandboxFailedParams{ID: sandbox, Error: why})
			return err
		})
	})
}

// destroy asks the host to end a sandbox; that it could not is logged, and
// found out by the reconciler.
func (s *Service) destroy(ctx context.Context, sandbox uuid.UUID, host *hosts.Host, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, destroyTimeout)
	defer cancel()
	_, err := host.Agent.Destroy(ctx, connect.NewRequest(&hostagentv1.DestroyRequest{SandboxId: id.Format(id.Sandbox, sandbox)}))
	if connect.CodeOf(err) == connect.CodeNotFound && connect.IsWireError(err) {
		err = nil
	}
	if err != nil {
		log.Error("destroy sandbox", "error", err)
	}
	return err
}

// Get returns a team's sandbox, or fails with not_found.
func (s *Service) Get(ctx context.Context, team, sandbox uuid.UUID) (db.Sandbox, error) {
	return found(s.Store.GetTeamSandbox(ctx, db.GetTeamSandboxParams{ID: sandbox, TeamID: team}))
}

// Lookup returns any team's sandbox, or fails with not_found.
func (s *Service) Lookup(ctx context.Context, sandbox uuid.UUID) (db.Sandbox, error) {
	return found(s.Store.GetSandbox(ctx, sandbox))
}

// found is what a query for one sandbox came to.
func found(row db.Sandbox, err error) (db.Sandbox, error) {
	if errors.Is(err, store.ErrNoRows) {
		return row, fault.New(fault.NotFound, "no such sandbox")
	}
	if err != nil {
		return row, fmt.Errorf("look up sandbox: %w", err)
	}
	return row, nil
}

// Filter says which sandboxes a list has.
type Filter struct {
	// States that are listed; empty: every one that has not ended.
	States []State
	// Metadata that a sandbox has at least.
	Metadata map[string]string
	// Cursor of the page, as the page before it gave; empty: the first.
	Cursor string
	// Limit is the most that are listed.
	Limit int
}

// List returns a page of a team's sandboxes, newest first, and the cursor of
// the next page ("" on the last).
func (s *Service) List(ctx context.Context, team uuid.UUID, f Filter) ([]db.Sandbox, string, error) {
	if err := checkMetadata(f.Metadata); err != nil {
		return nil, "", err
	}
	at, before, err := page.Newest(f.Cursor)
	if err != nil {
		return nil, "", err
	}
	metadata := []byte("{}")
	if len(f.Metadata) > 0 {
		if metadata, err = json.Marshal(f.Metadata); err != nil {
			return nil, "", err
		}
	}
	var rows []db.Sandbox
	if len(f.States) == 0 {
		rows, err = s.Store.ListLiveSandboxes(ctx, db.ListLiveSandboxesParams{TeamID: team, Metadata: metadata, BeforeAt: at, BeforeID: before, MaxRows: int32(f.Limit) + 1})
	} else {
		states := make([]string, len(f.States))
		for i, st := range f.States {
			states[i] = string(st)
		}
		rows, err = s.Store.ListSandboxes(ctx, db.ListSandboxesParams{TeamID: team, States: states, Metadata: metadata, BeforeAt: at, BeforeID: before, MaxRows: int32(f.Limit) + 1})
	}
	if err != nil {
		return nil, "", fmt.Errorf("list sandboxes: %w", err)
	}
	rows, next := page.Cut(rows, f.Limit, func(row db.Sandbox) string { return page.Time(row.CreatedAt, row.ID) })
	return rows, next, nil
}

// Delete ends a team's sandbox and returns when nothing of it is left. It goes
// on when ctx ends before, and again when the host was unreachable and is back.
func (s *Service) Delete(ctx context.Context, team, sandbox uuid.UUID) error {
	row, err := s.Get(ctx, team, sandbox)
	if err != nil || State(row.State).Ended() {
		return err
	}
	return s.End(ctx, row)
}

// End is Delete for any sandbox that has not ended.
func (s *Service) End(ctx context.Context, row db.Sandbox) error {
	sandbox := row.ID
	if err := s.begin(func() { s.deleting[sandbox]++ }); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer s.finish(func() { less(s.deleting, sandbox) })
		done <- fault.Guard(s.Log, func() error { return s.stop(s.ctx, row) })
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stop writes that the sandbox is to end, has its host end it, and writes that.
func (s *Service) stop(ctx context.Context, row db.Sandbox) error {
	log := s.Log.With("sandbox_id", id.Format(id.Sandbox, row.ID))
	err := s.persist(ctx, func(ctx context.Context) error {
		_, err := s.Store.SandboxStopping(ctx, row.ID)
		return err
	})
	if errors.Is(err, store.ErrNoRows) {
		return nil // It ended meanwhile.
	}
	if err != nil {
		return fmt.Errorf("write that sandbox stops: %w", err)
	}
	s.changed(row.ID)
	if row.HostID != nil {
		host, err := s.Hosts.Get(row.HostID)
		if err != nil {
			return err
		}
		if err := s.destroy(ctx, row.ID, host, log); err != nil {
			return hosts.Fault(err)
		}
	}
	err = s.persist(ctx, func(ctx context.Context) error {
		_, err := s.Store.SandboxStopped(ctx, row.ID)
		return err
	})
	if err != nil && !errors.Is(err, store.ErrNoRows) {
		return fmt.Errorf("write that sandbox stopped: %w", err)
	}
	s.changed(row.ID)
	s.over(row.ID)
	log.Info("sandbox deleted")
	return nil
}

// over drops what is kept beside the table of a sandbox that has ended, and
// does not wait for it. What this does not reach goes by itself when it is old.
func (s *Service) over(sandbox uuid.UUID) {
	if s.Ended == nil || s.begin(func() {}) != nil {
		return
	}
	go func() {
		defer s.finish(func() {})
		ctx, cancel := context.WithTimeout(s.ctx, 2*time.Second)
		defer cancel()
		if err := s.Ended(ctx, sandbox); err != nil {
			s.Log.Debug("drop what was kept of an ended sandbox", "sandbox_id", id.Format(id.Sandbox, sandbox), "error", err)
		}
	}()
}

// Expiry is when the host will end the sandbox; nil: never.
func Expiry(sb *hostagentv1.Sandbox) *time.Time {
	if sb.GetExpiresAt() == nil {
		return nil
	}
	t := sb.ExpiresAt.AsTime().Truncate(time.Microsecond)
	return &t
}
