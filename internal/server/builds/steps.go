package builds

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	"github.com/wrenn-dev/wrenn/internal/gen/db"
	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/recipe"
	"github.com/wrenn-dev/wrenn/internal/recipe/buildcontext"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
	"github.com/wrenn-dev/wrenn/internal/server/store"
	"github.com/wrenn-dev/wrenn/internal/server/templates"
	"github.com/wrenn-dev/wrenn/internal/tracing"
)

const (
	// idleTimeout ends a build's sandbox if its server died and no other took over.
	idleTimeout = 15 * time.Minute
	// callTimeout bounds quick calls to a host, captureTimeout calls that write a sandbox
	// to disk or boot it.
	callTimeout    = 15 * time.Second
	captureTimeout = 10 * time.Minute
	// answerGrace is how much longer than the command the call to the host may take.
	answerGrace = 30 * time.Second
	// writeEvery is how often a running step's output is written to the database.
	writeEvery = 300 * time.Millisecond
	// maxLayers bounds the layers of one build, because each adds an overlay to the disk.
	maxLayers = 40
)

// Defaults of HEALTHCHECK, as in Dockerfiles.
const (
	checkInterval = 30 * time.Second
	checkTimeout  = 30 * time.Second
	checkRetries  = 3
	// startInterval is the interval during the start period.
	startInterval = 5 * time.Second
)

// run executes the build, from the beginning or from its last existing layer, up to the
// captured template.
func (a *attempt) run(ctx context.Context) error {
	r, err := recipe.Parse(a.row.Recipe)
	if err != nil {
		return fault.New(fault.InvalidArgument, "recipe: %v", err)
	}
	for i, e := range outline(r, a.options.SkipPrePost) {
		a.steps = append(a.steps, Step{Number: i + 1, Phase: e.phase, Text: e.text, State: stepPending})
	}
	base, err := a.base(ctx, r.From)
	if err != nil {
		return err
	}
	defaults, err := a.defaults(ctx, base)
	if err != nil {
		return err
	}
	index, err := a.index(ctx, a.row)
	if err != nil {
		return err
	}
	named := fmt.Sprintf("%s %d %d %d %d", base.ID, base.CreatedAt.UnixMicro(), a.options.VCPUs, a.options.MemoryMiB, a.options.DiskMiB)
	p, err := makePlan(r, named, defaults, index, a.options.SkipPrePost)
	var wrong *recipe.Error
	if errors.As(err, &wrong) {
		return fault.New(fault.InvalidArgument, "recipe: %v", wrong)
	}
	if err != nil {
		return err
	}
	row, done, err := a.begin(ctx, base, p)
	if err != nil {
		return err
	}
	for i := range a.steps {
		if i < done {
			a.steps[i].State = stepCached
		}
		if err := a.write(ctx, &a.steps[i]); err != nil {
			return err
		}
	}
	b, err := a.builder(row)
	if err != nil {
		return err
	}
	layers := done
	for i := done; i < len(p.actions); i++ {
		if err := a.progress(ctx, i); err != nil {
			return err
		}
		act, step := &p.actions[i], &a.steps[i]
		if act.phase == phaseCapture {
			return a.capture(ctx, b, r, p, i)
		}
		err := a.step(ctx, step, a.limit(act), func(ctx context.Context, out *output) error { return b.do(ctx, act, step, out) })
		if err != nil {
			return err
		}
		if act.keeps && step.State == stepSucceeded && layers < maxLayers && !a.options.NoCache {
			layers++
			if err := a.layer(ctx, b, act); err != nil {
				return err
			}
		}
	}
	return nil
}

func (a *attempt) progress(ctx context.Context, done int) error {
	return a.Store.BuildProgress(ctx, db.BuildProgressParams{ID: a.row.ID, Worker: &a.Store.Server, DoneSteps: int32(done)})
}

func (a *attempt) limit(act *action) time.Duration {
	if act.phase == phaseRecipe {
		return seconds(a.options.StepTimeout, a.StepTimeout)
	}
	return seconds(a.options.PhaseTimeout, a.PhaseTimeout)
}

// base returns the template that the build starts from.
func (a *attempt) base(ctx context.Context, from recipe.From) (db.Template, error) {
	if from.Image == "" {
		return a.Templates.Resolve(ctx, a.row.TeamID, from.Template+":"+cmp.Or(from.Tag, templates.Latest))
	}
	as, err := a.openRegistry(a.row)
	if err != nil {
		return db.Template{}, err
	}
	return a.Templates.ImportLayer(ctx, a.row.TeamID, a.row.ID, templates.Image{Reference: from.Image, Username: as.Username, Password: as.Password, DiskMiB: a.options.DiskMiB})
}

// defaults asks a host for the defaults of a template's processes.
func (a *attempt) defaults(ctx context.Context, t db.Template) (*hostagentv1.Defaults, error) {
	on, err := a.Store.ListTemplateHosts(ctx, t.ID)
	if err != nil {
		return nil, fmt.Errorf("list template's hosts: %w", err)
	}
	why := error(fault.New(fault.NoCapacity, "no host has template %q", t.Name))
	for _, h := range on {
		host, err := a.Hosts.Get(&h)
		if err != nil {
			why = err
			continue
		}
		ask, cancel := context.WithTimeout(ctx, callTimeout)
		has, err := host.Agent.Templates(ask, connect.NewRequest(&hostagentv1.TemplatesRequest{}))
		cancel()
		if err != nil {
			why = hosts.Fault(err)
			continue
		}
		for _, is := range has.Msg.GetTemplates() {
			if is.GetTemplateId() == id.Format(id.Template, t.ID) {
				return is.GetDefaults(), nil
			}
		}
	}
	return nil, why
}

// begin creates the build's sandbox from the last existing layer, or from base. done is
// how many steps the layer saves.
func (a *attempt) begin(ctx context.Context, base db.Template, p *plan) (row db.Sandbox, done int, err error) {
	params := sandboxes.CreateParams{VCPUs: a.options.VCPUs, MemoryMiB: a.options.MemoryMiB, DiskMiB: a.options.DiskMiB, TimeoutSeconds: int32(idleTimeout / time.Second)}
	if !a.options.NoCache {
		at := map[string]int{}
		var keys [][]byte
		for i := range p.actions {
			if act := &p.actions[i]; act.keeps {
				at[string(act.key[:])] = i
				keys = append(keys, act.key[:])
			}
		}
		layers, err := a.Store.FindLayers(ctx, db.FindLayersParams{TeamID: a.row.TeamID, Keys: keys})
		if err != nil {
			return row, 0, fmt.Errorf("look for layers: %w", err)
		}
		var last *db.Template
		for i := range layers {
			if n := at[string(layers[i].LayerKey)] + 1; n > done {
				done, last = n, &layers[i]
			}
		}
		if last != nil {
			// The layer's key includes the size, so its own is right.
			own := params
			own.VCPUs, own.MemoryMiB, own.DiskMiB = 0, 0, 0
			row, err := a.Sandboxes.CreateFor(ctx, a.row.TeamID, a.row.ID, *last, own)
			if err == nil {
				if err := a.Store.UseLayer(ctx, last.ID); err != nil {
					a.log.Warn("mark layer used", "error", err)
				}
				return row, done, nil
			}
			if ctx.Err() != nil {
				return row, 0, err
			}
			a.log.Warn("cannot start from a layer; running all steps", "error", err)
		}
	}
	row, err = a.Sandboxes.CreateFor(ctx, a.row.TeamID, a.row.ID, base, params)
	return row, 0, err
}

// step runs one step and writes its progress and result.
func (a *attempt) step(ctx context.Context, s *Step, limit time.Duration, do func(context.Context, *output) error) (failed error) {
	// A step's text is the recipe's, so it stays out of the span.
	ctx, span := tracing.Step(ctx, "build", s.Phase)
	defer func() { span.EndWith(failed) }()
	span.SetInt("wrenn.step", s.Number)
	begun := time.Now()
	at := begun.UTC()
	s.State, s.StartedAt = stepRunning, &at
	if err := a.write(ctx, s); err != nil {
		return err
	}
	late := fault.New(fault.Timeout, "step %d (%s) did not end within %v", s.Number, brief(s.Text), limit)
	within, cancel := context.WithTimeoutCause(ctx, limit+answerGrace, late)
	defer cancel()
	out := newOutput(a.steps)
	ended := make(chan error, 1)
	go func() { ended <- do(within, out) }()
	var err error
	for running := true; running; {
		select {
		case err = <-ended:
			running = false
		case <-out.fresh:
			out.fill(s)
			if err := a.write(ctx, s); err != nil {
				a.log.Warn("write a step's output", "error", err)
			}
			pause := time.NewTimer(writeEvery)
			select {
			case err = <-ended:
				running = false
			case <-pause.C:
			}
			pause.Stop()
		}
	}
	out.fill(s)
	s.DurationMS = time.Since(begun).Milliseconds()
	if err == nil {
		if s.State == stepRunning {
			s.State = stepSucceeded
		}
		return a.write(ctx, s)
	}
	if within.Err() != nil && ctx.Err() == nil {
		err = late
	}
	if ctx.Err() != nil {
		return err // attempt.close sets the state.
	}
	s.State, s.Error = stepFailed, told(err)
	return errors.Join(err, a.write(ctx, s))
}

// brief shortens a step's text for a message.
func brief(text string) string {
	const most = 60
	if r := []rune(text); len(r) > most {
		return string(r[:most]) + "…"
	}
	return text
}

// builder is the build's sandbox and its host.
type builder struct {
	*attempt
	row  db.Sandbox
	host *hosts.Host
	wire string
}

func (a *attempt) builder(row db.Sandbox) (*builder, error) {
	host, err := a.Hosts.Get(row.HostID)
	return &builder{attempt: a, row: row, host: host, wire: id.Format(id.Sandbox, row.ID)}, err
}

// do executes a step of the recipe or of the phases around it.
func (b *builder) do(ctx context.Context, act *action, step *Step, out *output) error {
	switch s := act.step.(type) {
	case nil:
		has, err := b.test(ctx, "command -v apt-get")
		if err != nil {
			return err
		}
		if !has {
			out.skipped()
			_, _ = fmt.Fprintln(out, "skipped: there is no apt-get")
			return nil
		}
		return b.command(ctx, recipe.Command{Shell: act.text}, act, step, out)
	case *recipe.Run:
		return b.command(ctx, s.Command, act, step, out)
	case *recipe.Env:
		return nil
	case *recipe.Workdir:
		return b.unpack(ctx, act.dir, "root", "", empty)
	case *recipe.User:
		return b.unpack(ctx, "/", userOf(act.user), "", empty)
	case *recipe.Copy:
		return b.copy(ctx, act)
	}
	return fmt.Errorf("unknown step type %T", act.step)
}

// empty writes a tar with nothing in it.
func empty(w io.Writer) error {
	_, err := w.Write(make([]byte, 1024))
	return err
}

// test reports whether root's shell runs a line successfully. It is false if the guest
// has no shell.
func (b *builder) test(ctx context.Context, line string, args ...string) (bool, error) {
	call, cancel := context.WithTimeout(ctx, callTimeout+answerGrace)
	defer cancel()
	// Discard what the guest prints.
	exit, err := b.exec(call, append([]string{"/bin/sh", "-c", line, "sh"}, args...), surroundings{dir: "/", user: "root"}, callTimeout, io.Discard)
	switch {
	case err == nil:
		return exit.GetExitCode() == 0, nil
	case !connect.IsWireError(err):
		return false, err
	case connect.CodeOf(err) == connect.CodeNotFound || connect.CodeOf(err) == connect.CodeInvalidArgument:
		return false, nil
	}
	return false, hosts.Fault(err) // Do not blame the recipe: this command is ours.
}

// command runs a command and fails unless it exits with code 0.
func (b *builder) command(ctx context.Context, c recipe.Command, act *action, step *Step, out *output) error {
	limit := b.limit(act)
	exit, err := b.exec(ctx, c.Args(), act.surroundings, limit, out)
	if err != nil {
		return err
	}
	out.exited(exit.GetExitCode())
	switch {
	case exit.GetTimedOut():
		return fault.New(fault.Timeout, "step %d (%s) did not end within %v", step.Number, brief(step.Text), limit)
	case exit.GetExitCode() != 0:
		return fault.New(fault.Unprocessable, "step %d (%s) ended with exit code %d", step.Number, brief(step.Text), exit.GetExitCode())
	}
	return nil
}

// exec runs a command until it exits (limit 0: without a time limit). If the guest
// refuses it, the error blames the recipe (see [refused]).
func (b *builder) exec(ctx context.Context, args []string, in surroundings, limit time.Duration, out io.Writer) (*hostagentv1.ExecStreamResponse_Exited, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := b.host.Agent.ExecStream(ctx)
	// Over HTTP/2, the host notices a cancelled call only when its request body ends.
	stop := context.AfterFunc(ctx, func() { _ = stream.CloseRequest() })
	defer stop()
	err := stream.Send(&hostagentv1.ExecStreamRequest{Message: &hostagentv1.ExecStreamRequest_Start_{Start: &hostagentv1.ExecStreamRequest_Start{
		SandboxId: b.wire,
		Command: &hostagentv1.Command{
			Cmd: args[0], Args: args[1:], Envs: in.envs, Cwd: in.dir, User: userOf(in.user), TimeoutSeconds: int32((limit + time.Second - 1) / time.Second),
		},
	}}})
	if err == nil || errors.Is(err, io.EOF) {
		err = nil
	}
	defer func() { _ = stream.CloseRequest(); _ = stream.CloseResponse() }()
	for err == nil {
		var m *hostagentv1.ExecStreamResponse
		if m, err = stream.Receive(); err != nil {
			break
		}
		switch m := m.GetMessage().(type) {
		case *hostagentv1.ExecStreamResponse_Stdout:
			_, err = out.Write(m.Stdout)
		case *hostagentv1.ExecStreamResponse_Stderr:
			_, err = out.Write(m.Stderr)
		case *hostagentv1.ExecStreamResponse_Exited_:
			return m.Exited, nil
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if errors.Is(err, io.EOF) {
		return nil, fault.New(fault.Unavailable, "the host closed the connection before the command ended")
	}
	return nil, refused(err)
}

// refused converts a host's error. What the guest refuses, such as an unknown user or
// program, is the recipe's fault.
func refused(err error) error {
	var wire *connect.Error
	if errors.As(err, &wire) && connect.IsWireError(err) {
		switch wire.Code() {
		case connect.CodeInvalidArgument, connect.CodeNotFound, connect.CodePermissionDenied, connect.CodeAlreadyExists, connect.CodeResourceExhausted, connect.CodeUnauthenticated:
			return fault.Because(err, fault.Unprocessable, "%s", hosts.Message(err))
		}
	}
	return hosts.Fault(err)
}

// copy writes a COPY's files to the guest.
func (b *builder) copy(ctx context.Context, act *action) error {
	s, dir, name := act.files, act.files.target, ""
	if !s.folder {
		is, err := b.test(ctx, `test -d "$1"`, s.target)
		if err != nil {
			return err
		}
		if !is {
			dir, name = path.Dir(s.target), path.Base(s.target)
		}
	}
	return b.unpack(ctx, dir, "root", act.owner, func(w io.Writer) error {
		return s.write(ctx, w, b.archive(ctx, b.attempt.row), buildcontext.Digest(*b.attempt.row.Archive), b.limits(), name)
	})
}

// unpack has the guest unpack the tar that write writes.
func (b *builder) unpack(ctx context.Context, dir, user, owner string, write func(io.Writer) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := b.host.Agent.WriteFileStream(ctx)
	err := stream.Send(&hostagentv1.WriteFileStreamRequest{Message: &hostagentv1.WriteFileStreamRequest_Start_{Start: &hostagentv1.WriteFileStreamRequest_Start{
		File: &hostagentv1.FileRef{SandboxId: b.wire, Path: dir, User: user}, Archive: true, Owner: owner,
	}}})
	if err == nil {
		err = write(chunks{stream})
	}
	if err != nil && !errors.Is(err, io.EOF) {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return err
	}
	// io.EOF means that the host has already responded with an error.
	if _, err := stream.CloseAndReceive(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return refused(err)
	}
	return nil
}

// chunks is a writer that sends to a stream.
type chunks struct {
	stream *connect.ClientStreamForClient[hostagentv1.WriteFileStreamRequest, hostagentv1.WriteFileStreamResponse]
}

func (c chunks) Write(p []byte) (int, error) {
	const most = 256 << 10
	for rest := p; len(rest) > 0; {
		n := min(len(rest), most)
		if err := c.stream.Send(&hostagentv1.WriteFileStreamRequest{Message: &hostagentv1.WriteFileStreamRequest_Chunk{Chunk: rest[:n]}}); err != nil {
			return 0, err
		}
		rest = rest[n:]
	}
	return len(p), nil
}

// settle kills the processes that steps left running and syncs the disk.
func (b *builder) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, captureTimeout)
	defer cancel()
	if _, err := b.host.Agent.Settle(ctx, connect.NewRequest(&hostagentv1.SettleRequest{SandboxId: b.wire})); err != nil {
		return refused(err)
	}
	return nil
}

// layer captures the result of the steps so far as a layer.
func (a *attempt) layer(ctx context.Context, b *builder, act *action) error {
	if err := b.settle(ctx); err != nil {
		return err
	}
	begun := time.Now()
	claimed, answer, err := b.snapshot(ctx, "layer", act.key[:], &hostagentv1.SnapshotRequest{})
	if err != nil {
		return err
	}
	err = persist(ctx, func(ctx context.Context) error {
		_, err := a.Store.TemplateReady(ctx, templates.Measured(b.host.ID, claimed, answer))
		return err
	})
	if err != nil {
		return fmt.Errorf("mark layer ready: %w", err)
	}
	a.log.Debug("layer captured", "took", time.Since(begun), "bytes", answer.GetSizeBytes())
	return nil
}

// snapshot inserts a template and has the host capture the sandbox for it.
func (b *builder) snapshot(ctx context.Context, kind string, key []byte, req *hostagentv1.SnapshotRequest) (claimed db.Template, _ *hostagentv1.Template, err error) {
	template := uuid.New()
	name := b.attempt.row.Name
	req.SandboxId, req.TemplateId, req.Name = b.wire, id.Format(id.Template, template), name
	if kind == "layer" {
		req.Name = templates.LayerPrefix + name
	}
	err = b.Store.InTx(ctx, func(q *db.Queries) (err error) {
		// Two builds of one name that end at once get different versions.
		if err := q.LockBuilds(ctx); err != nil {
			return err
		}
		claimed, err = q.ClaimBuilt(ctx, db.ClaimBuiltParams{
			ID: template, TeamID: b.row.TeamID, Name: name, CreatedAt: time.Now(), Kind: kind,
			VCPUs: b.row.VCPUs, MemoryMiB: b.row.MemoryMiB, DiskMiB: b.row.DiskMiB, CapturedFrom: &b.row.ID, Worker: &b.Store.Server,
			BuildID: &b.attempt.row.ID, LayerKey: key,
		})
		if err != nil {
			return err
		}
		return q.AddHostTemplate(ctx, db.AddHostTemplateParams{HostID: b.host.ID, TemplateID: template})
	})
	if err != nil {
		return claimed, nil, fmt.Errorf("insert template: %w", err)
	}
	call, cancel := context.WithTimeout(ctx, captureTimeout)
	defer cancel()
	answer, err := b.host.Agent.Snapshot(call, connect.NewRequest(req))
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return claimed, nil, cause
		}
		return claimed, nil, refused(err)
	}
	return claimed, answer.Msg.GetTemplate(), nil
}

// capture runs START, waits until the health check succeeds, and captures the template.
// When it returns nil, the build has succeeded.
func (a *attempt) capture(ctx context.Context, b *builder, r *recipe.Recipe, p *plan, at int) error {
	if err := b.settle(ctx); err != nil {
		return err
	}
	in := p.actions[at].surroundings
	req := &hostagentv1.SnapshotRequest{Defaults: p.defaults, DiskOnly: true}
	if r.Start != nil {
		req.Start = r.Start.Command.Args()
	}
	if checked(r) {
		req.DiskOnly, req.Start = false, nil
		ended := make(chan error, 1) // START failed
		if r.Start != nil {
			// Watch START until the capture.
			follow, stop := context.WithCancel(ctx)
			over := make(chan struct{})
			defer func() { stop(); <-over }()
			out := newOutput(a.steps)
			step := &a.steps[at]
			go func() {
				defer close(over)
				exit, err := b.exec(follow, r.Start.Command.Args(), in, 0, out)
				switch {
				case err != nil:
					ended <- err
				case exit.GetExitCode() != 0:
					ended <- fault.New(fault.Unprocessable, "START ended with exit code %d before the template was ready", exit.GetExitCode())
				}
			}()
			begun := time.Now().UTC()
			step.State, step.StartedAt = stepRunning, &begun
			if err := a.write(ctx, step); err != nil {
				return err
			}
			check := &a.steps[at+1]
			err := a.step(ctx, check, a.checkLimit(r.HealthCheck), func(ctx context.Context, log *output) error {
				return b.healthy(ctx, r.HealthCheck, in, ended, log)
			})
			out.fill(step)
			step.DurationMS = time.Since(begun).Milliseconds()
			switch {
			case ctx.Err() != nil: // attempt.close sets the state.
			case err != nil:
				step.State = stepFailed
				err = errors.Join(err, a.write(ctx, step))
			default:
				step.State = stepSucceeded
				err = a.write(ctx, step)
			}
			if err != nil {
				return err
			}
			at += 2
		} else {
			check := &a.steps[at]
			err := a.step(ctx, check, a.checkLimit(r.HealthCheck), func(ctx context.Context, log *output) error {
				return b.healthy(ctx, r.HealthCheck, in, ended, log)
			})
			if err != nil {
				return err
			}
			at++
		}
	}
	if err := a.progress(ctx, at); err != nil {
		return err
	}
	step := &a.steps[at]
	var claimed db.Template
	var answer *hostagentv1.Template
	err := a.step(ctx, step, captureTimeout, func(ctx context.Context, out *output) (err error) {
		claimed, answer, err = b.snapshot(ctx, "template", nil, req)
		if err == nil {
			what := "running"
			if req.DiskOnly {
				what = "its disk"
			}
			_, _ = fmt.Fprintf(out, "captured %s: %d MiB\n", what, answer.GetSizeBytes()>>20)
		}
		return err
	})
	if err != nil {
		return err
	}
	return a.succeed(ctx, b.host.ID, claimed, answer)
}

// checkLimit bounds all attempts of a health check together.
func (a *attempt) checkLimit(h *recipe.HealthCheck) time.Duration {
	retries := time.Duration(cmp.Or(h.Retries, checkRetries))
	return h.StartPeriod + (retries+1)*(cmp.Or(h.Interval, checkInterval)+cmp.Or(h.Timeout, checkTimeout))
}

// healthy repeats the health check until it succeeds, START ends, or the retries are used
// up.
func (b *builder) healthy(ctx context.Context, h *recipe.HealthCheck, in surroundings, ended <-chan error, out *output) error {
	interval, timeout, retries := cmp.Or(h.Interval, checkInterval), cmp.Or(h.Timeout, checkTimeout), cmp.Or(h.Retries, checkRetries)
	begun := time.Now()
	for failures := 0; ; {
		exit, err := b.exec(ctx, h.Command.Args(), in, timeout, out)
		if err != nil {
			return err
		}
		out.exited(exit.GetExitCode())
		if exit.GetExitCode() == 0 && !exit.GetTimedOut() {
			return nil
		}
		wait := interval
		if time.Since(begun) < h.StartPeriod {
			wait = min(interval, startInterval)
		} else if failures++; failures >= retries {
			return fault.New(fault.Unprocessable, "the health check failed %d times, the last time with exit code %d", failures, exit.GetExitCode())
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case err := <-ended:
			t.Stop()
			return err
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

// succeed publishes the template under its name and tags and marks the build succeeded,
// in one transaction.
func (a *attempt) succeed(ctx context.Context, host uuid.UUID, claimed db.Template, answer *hostagentv1.Template) error {
	err := persist(ctx, func(ctx context.Context) error {
		return a.Store.InTx(ctx, func(q *db.Queries) error {
			// Other transactions take this lock first too.
			if err := q.LockLimit(ctx, db.LockLimitParams{What: "tags", TeamID: a.row.TeamID}); err != nil {
				return err
			}
			ready, err := q.TemplateReady(ctx, templates.Measured(host, claimed, answer))
			if err != nil {
				return err
			}
			for _, tag := range a.row.Tags {
				if _, err := q.SetTag(ctx, db.SetTagParams{ID: claimed.ID, Tag: tag}); err != nil {
					return err
				}
			}
			_, err = q.BuildSucceeds(ctx, db.BuildSucceedsParams{ID: a.row.ID, Worker: &a.Store.Server, TemplateID: &claimed.ID, Version: &ready.Version})
			return err
		})
	})
	if errors.Is(err, store.ErrNoRows) {
		return errCancelled // or lost, in which case the error is not used
	}
	if err != nil {
		return fmt.Errorf("mark build succeeded: %w", err)
	}
	return nil
}
