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
	// idleTimeout ends a build's sandbox that nobody uses: that of a build
	// whose server died, with no other there.
	idleTimeout = 15 * time.Minute
	// callTimeout bounds calls that a host answers from what it has at hand,
	// captureTimeout those that write a sandbox to its disk, or boot it.
	callTimeout    = 15 * time.Second
	captureTimeout = 10 * time.Minute
	// answerGrace is how much longer than a command its host may take.
	answerGrace = 30 * time.Second
	// writeEvery is how often what a running step prints is written down.
	writeEvery = 300 * time.Millisecond
	// maxLayers bounds the layers of one build: each is an overlay more.
	maxLayers = 40
)

// The Dockerfile's defaults of HEALTHCHECK.
const (
	checkInterval = 30 * time.Second
	checkTimeout  = 30 * time.Second
	checkRetries  = 3
	// startInterval is the interval in the start period.
	startInterval = 5 * time.Second
)

// run does the build from its beginning, or from the last layer that is there,
// to its template.
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
	box, done, err := a.begin(ctx, base, p)
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
	b, err := a.box(box)
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

// base finds what the build starts from.
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

// defaults asks a host what the processes of a template have by default.
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

// begin makes the build's sandbox: of the last of its layers that is there, or
// of what it starts from. done is how many steps that saves.
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
			// What it has, whatever was asked for: that is in its key.
			own := params
			own.VCPUs, own.MemoryMiB, own.DiskMiB = 0, 0, 0
			row, err := a.Sandboxes.CreateFor(ctx, a.row.TeamID, a.row.ID, *last, own)
			if err == nil {
				if err := a.Store.UseLayer(ctx, last.ID); err != nil {
					a.log.Warn("write that a layer was used", "error", err)
				}
				return row, done, nil
			}
			if ctx.Err() != nil {
				return row, 0, err
			}
			a.log.Warn("a layer cannot be begun with; all steps are run", "error", err)
		}
	}
	row, err = a.Sandboxes.CreateFor(ctx, a.row.TeamID, a.row.ID, base, params)
	return row, 0, err
}

// step does one step and writes down how that goes.
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
				a.log.Warn("write what a step prints", "error", err)
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
		return err // what becomes of it, close says
	}
	s.State, s.Error = stepFailed, told(err)
	return errors.Join(err, a.write(ctx, s))
}

// brief is a step's text as a message has it.
func brief(text string) string {
	const most = 60
	if r := []rune(text); len(r) > most {
		return string(r[:most]) + "…"
	}
	return text
}

// box is the build's sandbox, and its host.
type box struct {
	*attempt
	row  db.Sandbox
	host *hosts.Host
	wire string
}

func (a *attempt) box(row db.Sandbox) (*box, error) {
	host, err := a.Hosts.Get(row.HostID)
	return &box{attempt: a, row: row, host: host, wire: id.Format(id.Sandbox, row.ID)}, err
}

// do does what a step of a recipe, or of the phases around it, says.
func (b *box) do(ctx context.Context, act *action, step *Step, out *output) error {
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
	return fmt.Errorf("a step of type %T", act.step)
}

// empty writes a tar with nothing in it.
func empty(w io.Writer) error {
	_, err := w.Write(make([]byte, 1024))
	return err
}

// test says whether a line for the shell, run by root, succeeds. Where there is
// no shell nothing does.
func (b *box) test(ctx context.Context, line string, args ...string) (bool, error) {
	call, cancel := context.WithTimeout(ctx, callTimeout+answerGrace)
	defer cancel()
	// What the guest prints is dropped as it comes.
	exit, err := b.exec(call, append([]string{"/bin/sh", "-c", line, "sh"}, args...), surroundings{dir: "/", user: "root"}, callTimeout, io.Discard)
	switch {
	case err == nil:
		return exit.GetExitCode() == 0, nil
	case !connect.IsWireError(err):
		return false, err
	case connect.CodeOf(err) == connect.CodeNotFound || connect.CodeOf(err) == connect.CodeInvalidArgument:
		return false, nil
	}
	return false, hosts.Fault(err) // This command is not the recipe's.
}

// command runs a command to its end, which must be exit code 0.
func (b *box) command(ctx context.Context, c recipe.Command, act *action, step *Step, out *output) error {
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

// exec runs a command to its end. limit 0: without one. Its errors blame the recipe for
// what the guest refuses (see [refused]).
func (b *box) exec(ctx context.Context, args []string, in surroundings, limit time.Duration, out io.Writer) (*hostagentv1.ExecStreamResponse_Exited, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream := b.host.Agent.ExecStream(ctx)
	// HTTP/2 notices that a call was given up only when its body ends.
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
		return nil, fault.New(fault.Unavailable, "the command's end is not known: its host broke off")
	}
	return nil, refused(err)
}

// refused is what a host's refusal to do a step says. What the guest says, that
// there is no such user or program, is the recipe's fault.
func refused(err error) error {
	var wire *connect.Error
	if errors.As(err, &wire) && connect.IsWireError(err) {
		switch wire.Code() {
		case connect.CodeInvalidArgument, connect.CodeNotFound, connect.CodePermissionDenied, connect.CodeAlreadyExists, connect.CodeResourceExhausted, connect.CodeUnauthenticated:
			return fault.Because(err, fault.Unprocessable, "%s", wire.Message())
		}
	}
	return hosts.Fault(err)
}

// copy puts what a COPY takes into the guest.
func (b *box) copy(ctx context.Context, act *action) error {
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

// unpack has what write writes, a tar, unpacked in the guest.
func (b *box) unpack(ctx context.Context, dir, user, owner string, write func(io.Writer) error) error {
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
	// io.EOF: the host has said why.
	if _, err := stream.CloseAndReceive(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		return refused(err)
	}
	return nil
}

// chunks sends what is written to it.
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

// settle ends what steps left running, and has all they wrote on the disk.
func (b *box) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, captureTimeout)
	defer cancel()
	if _, err := b.host.Agent.Settle(ctx, connect.NewRequest(&hostagentv1.SettleRequest{SandboxId: b.wire})); err != nil {
		return refused(err)
	}
	return nil
}

// layer keeps what the steps so far have made.
func (a *attempt) layer(ctx context.Context, b *box, act *action) error {
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
		return fmt.Errorf("write that layer is ready: %w", err)
	}
	a.log.Debug("layer kept", "took", time.Since(begun), "bytes", answer.GetSizeBytes())
	return nil
}

// snapshot claims a row and has the sandbox captured for it.
func (b *box) snapshot(ctx context.Context, kind string, key []byte, req *hostagentv1.SnapshotRequest) (claimed db.Template, _ *hostagentv1.Template, err error) {
	template := uuid.New()
	name := b.attempt.row.Name
	req.SandboxId, req.TemplateId, req.Name = b.wire, id.Format(id.Template, template), name
	if kind == "layer" {
		req.Name = templates.LayerPrefix + name
	}
	err = b.Store.InTx(ctx, func(q *db.Queries) (err error) {
		// Of two builds of one name that end at once each gets a version of its own.
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
		return claimed, nil, fmt.Errorf("write template: %w", err)
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

// capture starts what is to run in the template, waits until it is well, and
// has it captured. The build has succeeded when this returns nil.
func (a *attempt) capture(ctx context.Context, b *box, r *recipe.Recipe, p *plan, at int) error {
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
		ended := make(chan error, 1) // what was started ended, and not well
		if r.Start != nil {
			// It is followed for as long as it is not captured.
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
			case ctx.Err() != nil: // what becomes of it, close says
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

// checkLimit is how long a health check may go on in all.
func (a *attempt) checkLimit(h *recipe.HealthCheck) time.Duration {
	retries := time.Duration(cmp.Or(h.Retries, checkRetries))
	return h.StartPeriod + (retries+1)*(cmp.Or(h.Interval, checkInterval)+cmp.Or(h.Timeout, checkTimeout))
}

// healthy checks until what was started is ready.
func (b *box) healthy(ctx context.Context, h *recipe.HealthCheck, in surroundings, ended <-chan error, out *output) error {
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
			return fault.New(fault.Unprocessable, "the health check failed %d times, with exit code %d at last", failures, exit.GetExitCode())
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

// succeed makes the template what its name and tags mean, and the build
// succeeded: both, or neither.
func (a *attempt) succeed(ctx context.Context, host uuid.UUID, claimed db.Template, answer *hostagentv1.Template) error {
	err := persist(ctx, func(ctx context.Context) error {
		return a.Store.InTx(ctx, func(q *db.Queries) error {
			// First, because others take this lock before those that follow.
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
		return errCancelled // or lost: then nobody is told
	}
	if err != nil {
		return fmt.Errorf("write that the build succeeded: %w", err)
	}
	return nil
}
