package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/image/oci"
	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	"github.com/wrenn-dev/wrenn/internal/agent/told"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/id"
)

const (
	// maxFile bounds a file that is read or written in one message.
	maxFile = 32 << 20
	// chunk is how much of a stream is in one message.
	chunk = 256 << 10

	maxPath      = 4096
	maxName      = 256
	maxCopies    = 256
	maxUser      = 256
	maxToken     = 512
	maxArguments = 2 << 20 // bytes of a command's arguments and environment together
	maxEnvs      = 1 << 20
	maxCommand   = 30 * 24 * time.Hour
)

// service implements the Connect service HostAgent.
type service struct{ *Agent }

var _ hostagentv1connect.HostAgentHandler = (*service)(nil)

// fault is err as a Connect error.
func (s *service) fault(ctx context.Context, doing string, err error) error {
	if err == nil {
		return nil
	}
	var ce *connect.Error
	isConnect, notStarted := errors.As(err, &ce), errors.Is(err, sandbox.ErrGuest) || errors.Is(err, sandbox.ErrSlow)
	lost := notStarted || isConnect && (ce.Code() == connect.CodeDeadlineExceeded || ce.Code() == connect.CodeUnavailable)
	if lost && !guest.Said(err) && s.sandboxes.DiskFull() {
		// A machine that cannot write to its disk stops until it can: its guest
		// does not know why it does not answer.
		return connect.NewError(connect.CodeResourceExhausted, told.New("this host has no disk space left"))
	}
	if isConnect && !notStarted {
		return ce
	}
	code := connect.CodeInternal
	for _, k := range []struct {
		kind error
		code connect.Code
	}{
		{sandbox.ErrInvalid, connect.CodeInvalidArgument},
		{sandbox.ErrNotFound, connect.CodeNotFound},
		{sandbox.ErrExists, connect.CodeAlreadyExists},
		{sandbox.ErrState, connect.CodeFailedPrecondition},
		{sandbox.ErrInUse, connect.CodeAborted},
		{sandbox.ErrExhausted, connect.CodeResourceExhausted},
		{sandbox.ErrCaptures, connect.CodeFailedPrecondition},
		{sandbox.ErrUnread, connect.CodeUnavailable},
		{sandbox.ErrClosing, connect.CodeUnavailable},
		{sandbox.ErrStart, connect.CodeUnavailable},
		{sandbox.ErrGuest, connect.CodeUnavailable},
		{sandbox.ErrSlow, connect.CodeUnavailable},
		{oci.ErrRefused, connect.CodeInvalidArgument},
		{oci.ErrDenied, connect.CodePermissionDenied},
		{oci.ErrNotFound, connect.CodeNotFound},
		{context.Canceled, connect.CodeCanceled},
		{context.DeadlineExceeded, connect.CodeDeadlineExceeded},
		{journal.ErrClosed, connect.CodeUnavailable},
	} {
		if errors.Is(err, k.kind) {
			code = k.code
			break
		}
	}
	if code == connect.CodeInternal {
		s.log.ErrorContext(ctx, doing, "error", err)
	}
	ce = connect.NewError(code, err)
	switch {
	case errors.Is(err, sandbox.ErrCaptures):
		ce.Meta().Set(hostwire.ErrorReason, hostwire.CaptureLimit)
	case errors.Is(err, sandbox.ErrSlow):
		ce.Meta().Set(hostwire.ErrorReason, hostwire.GuestSlow)
	case notStarted:
		ce.Meta().Set(hostwire.ErrorReason, hostwire.GuestStart)
	}
	var state *sandbox.StateError
	if errors.As(err, &state) {
		ce.Meta().Set(stateHeader, string(state.State))
	}
	return ce
}

// stateHeader is, with an error, the state of a sandbox that is not running.
const stateHeader = "Wrenn-Sandbox-State"

func invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, told.New(format, args...))
}

func parse(k id.Kind, what, s string) (uuid.UUID, error) {
	u, err := id.Parse(k, s)
	if err != nil {
		return uuid.Nil, invalid("%s: %v", what, err)
	}
	return u, nil
}

// use begins a use of the sandbox that a request names.
func (s *service) use(ctx context.Context, sandboxID string) (*sandbox.Use, error) {
	u, err := parse(id.Sandbox, "sandbox_id", sandboxID)
	if err != nil {
		return nil, err
	}
	use, err := s.sandboxes.Use(ctx, u)
	return use, s.fault(ctx, "use sandbox", err)
}

// ofUse returns why the sandbox is no longer usable if that happened during the call,
// and err otherwise.
func ofUse(use *sandbox.Use, err error) error {
	if err != nil && use.Context.Err() != nil && errors.Is(context.Cause(use.Context), sandbox.ErrState) {
		return context.Cause(use.Context)
	}
	var ce *connect.Error
	if errors.As(err, &ce) && !guest.Said(err) && (ce.Code() == connect.CodeUnavailable || ce.Code() == connect.CodeDeadlineExceeded) {
		if silence := use.Silence(); silence != nil {
			return connect.NewError(ce.Code(), silence)
		}
	}
	return err
}

// ofCall is ofUse for a call that changes something. If a pause cut the call off, the
// error leaves out the state, because the control plane would then call again.
func ofCall(use *sandbox.Use, err error) error {
	err = ofUse(use, err)
	var state *sandbox.StateError
	if errors.As(err, &state) && state.State != sandbox.Stopping {
		return connect.NewError(connect.CodeFailedPrecondition, told.New("the sandbox is %s, and was before the call ended: it may have been carried out", state.State))
	}
	return err
}

func message(i sandbox.Info) *pb.Sandbox {
	m := &pb.Sandbox{
		SandboxId: id.Format(id.Sandbox, i.ID), TemplateId: id.Format(id.Template, i.Template), TeamId: id.Format(id.Team, i.Team),
		Vcpus: int32(i.VCPUs), MemoryMib: int32(i.MemoryMiB), DiskMib: int32(i.DiskMiB), CreatedAt: timestamppb.New(i.CreatedAt),
		PauseOnTimeout: i.PauseOnTimeout,
	}
	m.State = map[sandbox.State]pb.SandboxState{
		sandbox.Starting: pb.SandboxState_SANDBOX_STATE_STARTING, sandbox.Running: pb.SandboxState_SANDBOX_STATE_RUNNING,
		sandbox.Pausing: pb.SandboxState_SANDBOX_STATE_PAUSING, sandbox.Paused: pb.SandboxState_SANDBOX_STATE_PAUSED,
		sandbox.Resuming: pb.SandboxState_SANDBOX_STATE_RESUMING, sandbox.Stopping: pb.SandboxState_SANDBOX_STATE_STOPPING,
	}[i.State]
	if !i.ExpiresAt.IsZero() {
		m.ExpiresAt = timestamppb.New(i.ExpiresAt)
	}
	if !i.PausedAt.IsZero() {
		m.PausedAt = timestamppb.New(i.PausedAt)
	}
	if i.State == sandbox.Running {
		m.Idle = durationpb.New(i.Idle)
	}
	if c := i.Condition; c != nil {
		m.Condition = &pb.Condition{Reason: string(c.Reason), Detail: c.Detail, Since: timestamppb.New(c.Since)}
	}
	return m
}

// Create implements hostagentv1connect.HostAgentHandler.
func (s *service) Create(ctx context.Context, req *connect.Request[pb.CreateRequest]) (*connect.Response[pb.CreateResponse], error) {
	m := req.Msg
	spec := sandbox.Spec{
		VCPUs: int(m.GetVcpus()), MemoryMiB: int(m.GetMemoryMib()), DiskMiB: int(m.GetDiskMib()),
		Timeout: time.Duration(m.GetTimeoutSeconds()) * time.Second, PauseOnTimeout: m.GetPauseOnTimeout(),
		Envs: m.GetEnvs(), Token: m.GetAccessToken(),
	}
	var err error
	if spec.ID, err = parse(id.Sandbox, "sandbox_id", m.GetSandboxId()); err != nil {
		return nil, err
	}
	if spec.Team, err = parse(id.Team, "team_id", m.GetTeamId()); err != nil {
		return nil, err
	}
	if spec.Template, err = parse(id.Template, "template_id", m.GetTemplateId()); err != nil {
		return nil, err
	}
	if err := checkEnvs(spec.Envs, maxEnvs); err != nil {
		return nil, err
	}
	if err := checkToken(spec.Token); err != nil {
		return nil, err
	}
	i, err := s.sandboxes.Create(ctx, spec)
	if err != nil {
		return nil, s.fault(ctx, "create sandbox", err)
	}
	return connect.NewResponse(&pb.CreateResponse{Sandbox: message(i)}), nil
}

func checkToken(token string) error {
	if len(token) > maxToken || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return invalid("access_token: must be at most %d printable characters", maxToken)
	}
	return nil
}

// Pause implements hostagentv1connect.HostAgentHandler.
func (s *service) Pause(ctx context.Context, req *connect.Request[pb.PauseRequest]) (*connect.Response[pb.PauseResponse], error) {
	u, err := parse(id.Sandbox, "sandbox_id", req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	i, err := s.sandboxes.PauseIdle(ctx, u, req.Msg.GetIdle().AsDuration())
	if err != nil {
		return nil, s.fault(ctx, "pause sandbox", err)
	}
	return connect.NewResponse(&pb.PauseResponse{Sandbox: message(i)}), nil
}

// Resume implements hostagentv1connect.HostAgentHandler.
func (s *service) Resume(ctx context.Context, req *connect.Request[pb.ResumeRequest]) (*connect.Response[pb.ResumeResponse], error) {
	u, err := parse(id.Sandbox, "sandbox_id", req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	i, err := s.sandboxes.Resume(ctx, u)
	if err != nil {
		return nil, s.fault(ctx, "resume sandbox", err)
	}
	return connect.NewResponse(&pb.ResumeResponse{Sandbox: message(i)}), nil
}

// Reboot implements hostagentv1connect.HostAgentHandler.
func (s *service) Reboot(ctx context.Context, req *connect.Request[pb.RebootRequest]) (*connect.Response[pb.RebootResponse], error) {
	u, err := parse(id.Sandbox, "sandbox_id", req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	i, err := s.sandboxes.Reboot(ctx, u)
	if err != nil {
		return nil, s.fault(ctx, "reboot sandbox", err)
	}
	return connect.NewResponse(&pb.RebootResponse{Sandbox: message(i)}), nil
}

// Snapshot implements hostagentv1connect.HostAgentHandler.
func (s *service) Snapshot(ctx context.Context, req *connect.Request[pb.SnapshotRequest]) (*connect.Response[pb.SnapshotResponse], error) {
	u, err := parse(id.Sandbox, "sandbox_id", req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	template, err := parse(id.Template, "template_id", req.Msg.GetTemplateId())
	if err != nil {
		return nil, err
	}
	if name := req.Msg.GetName(); name == "" || len(name) > maxName {
		return nil, invalid("name: must have 1 to %d bytes", maxName)
	}
	defaults, err := defaultsOf(req.Msg.GetDefaults())
	if err != nil {
		return nil, err
	}
	var t image.Template
	if req.Msg.GetDiskOnly() {
		t, err = s.sandboxes.SnapshotDisk(ctx, u, template, req.Msg.GetName(), defaults, req.Msg.GetStart())
	} else {
		t, err = s.sandboxes.Snapshot(ctx, u, template, req.Msg.GetName(), defaults)
	}
	if err != nil {
		return nil, s.fault(ctx, "capture sandbox", err)
	}
	return connect.NewResponse(&pb.SnapshotResponse{Template: templateMessage(t)}), nil
}

// defaultsOf checks a template's defaults; nil: none are given.
func defaultsOf(m *pb.Defaults) (*image.Defaults, error) {
	if m == nil {
		return nil, nil
	}
	if err := checkEnvs(m.GetEnvs(), maxEnvs); err != nil {
		return nil, err
	}
	name, group, ok := strings.Cut(m.GetUser(), ":")
	if err := errors.Join(checkUser(name), checkUser(group)); err != nil || ok && (name == "" || group == "") {
		return nil, invalid("defaults: %.100q is no user", m.GetUser())
	}
	if w := m.GetWorkdir(); w != "" && w[0] != '/' || len(w) > maxPath || strings.ContainsRune(w, 0) {
		return nil, invalid("defaults: %.100q is no absolute path of a working directory", w)
	}
	limits := rates.Limits(m.GetLimits())
	if err := limits.Check(); err != nil {
		return nil, invalid("defaults: %v", err)
	}
	return &image.Defaults{Envs: m.GetEnvs(), User: m.GetUser(), Workdir: m.GetWorkdir(), Limits: limits}, nil
}

// Settle implements hostagentv1connect.HostAgentHandler.
func (s *service) Settle(ctx context.Context, req *connect.Request[pb.SettleRequest]) (*connect.Response[pb.SettleResponse], error) {
	use, err := s.use(ctx, req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	if err := use.Guest.Settle(use.Context); err != nil {
		return nil, s.fault(ctx, "settle sandbox", ofUse(use, err))
	}
	return connect.NewResponse(&pb.SettleResponse{}), nil
}

// Fork implements hostagentv1connect.HostAgentHandler.
func (s *service) Fork(ctx context.Context, req *connect.Request[pb.ForkRequest]) (*connect.Response[pb.ForkResponse], error) {
	u, err := parse(id.Sandbox, "sandbox_id", req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	wanted := req.Msg.GetCopies()
	if len(wanted) == 0 || len(wanted) > maxCopies {
		return nil, invalid("copies: must be 1 to %d", maxCopies)
	}
	copies := make([]sandbox.Copy, len(wanted))
	for i, c := range wanted {
		if copies[i].ID, err = parse(id.Sandbox, "copies: sandbox_id", c.GetSandboxId()); err != nil {
			return nil, err
		}
		for _, other := range copies[:i] {
			if other.ID == copies[i].ID {
				return nil, invalid("copies: two have one id")
			}
		}
		if copies[i].Token = c.GetAccessToken(); copies[i].Token == "" {
			return nil, invalid("copies: an access token is needed")
		}
		if err := checkToken(copies[i].Token); err != nil {
			return nil, err
		}
	}
	infos, err := s.sandboxes.Fork(ctx, u, copies)
	if err != nil {
		return nil, s.fault(ctx, "fork sandbox", err)
	}
	res := &pb.ForkResponse{}
	for _, i := range infos {
		res.Sandboxes = append(res.Sandboxes, message(i))
	}
	return connect.NewResponse(res), nil
}

// DeleteTemplate implements hostagentv1connect.HostAgentHandler.
func (s *service) DeleteTemplate(ctx context.Context, req *connect.Request[pb.DeleteTemplateRequest]) (*connect.Response[pb.DeleteTemplateResponse], error) {
	team, err := parse(id.Team, "team_id", req.Msg.GetTeamId())
	if err != nil {
		return nil, err
	}
	template, err := parse(id.Template, "template_id", req.Msg.GetTemplateId())
	if err != nil {
		return nil, err
	}
	// What is being made would be there after all.
	if err := s.imports.end(ctx, template); err != nil {
		return nil, s.fault(ctx, "delete template", err)
	}
	if err := s.sandboxes.DeleteTemplate(team, template); err != nil {
		return nil, s.fault(ctx, "delete template", err)
	}
	return connect.NewResponse(&pb.DeleteTemplateResponse{}), nil
}

// Destroy implements hostagentv1connect.HostAgentHandler.
func (s *service) Destroy(ctx context.Context, req *connect.Request[pb.DestroyRequest]) (*connect.Response[pb.DestroyResponse], error) {
	u, err := parse(id.Sandbox, "sandbox_id", req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	if err := s.sandboxes.Destroy(ctx, u); err != nil {
		return nil, s.fault(ctx, "destroy sandbox", err)
	}
	return connect.NewResponse(&pb.DestroyResponse{}), nil
}

// List implements hostagentv1connect.HostAgentHandler.
func (s *service) List(context.Context, *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	// Asked before the list is made: what is read meanwhile is in it.
	incomplete, unread := s.sandboxes.Incomplete()
	res := &pb.ListResponse{Incomplete: incomplete}
	for _, u := range unread {
		res.Unread = append(res.Unread, id.Format(id.Sandbox, u))
	}
	for _, i := range s.sandboxes.List() {
		res.Sandboxes = append(res.Sandboxes, message(i))
	}
	return connect.NewResponse(res), nil
}

// Get implements hostagentv1connect.HostAgentHandler.
func (s *service) Get(ctx context.Context, req *connect.Request[pb.GetRequest]) (*connect.Response[pb.GetResponse], error) {
	u, err := parse(id.Sandbox, "sandbox_id", req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	i, err := s.sandboxes.Get(u)
	if err != nil {
		return nil, s.fault(ctx, "get sandbox", err)
	}
	return connect.NewResponse(&pb.GetResponse{Sandbox: message(i)}), nil
}

// Ping implements hostagentv1connect.HostAgentHandler.
func (s *service) Ping(ctx context.Context, req *connect.Request[pb.PingRequest]) (*connect.Response[pb.PingResponse], error) {
	use, err := s.use(ctx, req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	return connect.NewResponse(&pb.PingResponse{Sandbox: message(use.Info)}), nil
}

func checkEnvs(envs map[string]string, most int) error {
	size := 0
	for k, v := range envs {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.ContainsRune(v, 0) {
			return invalid("envs: %.100q cannot be set", k)
		}
		size += len(k) + len(v) + 2
	}
	if size > most {
		return invalid("envs: %d bytes are more than %d", size, most)
	}
	return nil
}

func checkUser(user string) error {
	if len(user) > maxUser || strings.ContainsFunc(user, func(r rune) bool { return r < ' ' || r == ':' || r == 0x7f }) {
		return invalid("user: %.100q is no user's name", user)
	}
	return nil
}

// command checks what is to be run.
func command(c *pb.Command) (guest.Command, error) {
	cmd := guest.Command{
		Cmd: c.GetCmd(), Args: c.GetArgs(), Envs: c.GetEnvs(), Dir: c.GetCwd(), User: c.GetUser(),
		Timeout: time.Duration(c.GetTimeoutSeconds()) * time.Second,
	}
	if cmd.Cmd == "" {
		return cmd, invalid("cmd: a command is needed")
	}
	size := len(cmd.Cmd)
	for _, a := range cmd.Args {
		size += len(a) + 1
		if strings.ContainsRune(a, 0) {
			return cmd, invalid("args: a NUL byte cannot be passed")
		}
	}
	if strings.ContainsRune(cmd.Cmd, 0) {
		return cmd, invalid("cmd: a NUL byte cannot be passed")
	}
	if size > maxArguments {
		return cmd, invalid("args: %d bytes are more than %d", size, maxArguments)
	}
	if err := checkEnvs(cmd.Envs, maxArguments-size); err != nil {
		return cmd, err
	}
	if strings.ContainsRune(cmd.Dir, 0) || len(cmd.Dir) > maxPath {
		return cmd, invalid("cwd: must have at most %d bytes, none of them NUL", maxPath)
	}
	if cmd.Timeout < 0 || cmd.Timeout > maxCommand {
		return cmd, invalid("timeout_seconds: must be between 0 and %d", int(maxCommand.Seconds()))
	}
	return cmd, checkUser(cmd.User)
}

// Exec implements hostagentv1connect.HostAgentHandler.
func (s *service) Exec(ctx context.Context, req *connect.Request[pb.ExecRequest]) (*connect.Response[pb.ExecResponse], error) {
	cmd, err := command(req.Msg.GetCommand())
	if err != nil {
		return nil, err
	}
	use, err := s.use(ctx, req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	r, err := use.Guest.Exec(use.Context, cmd, req.Msg.GetStdin())
	if err != nil {
		return nil, s.fault(ctx, "exec", ofCall(use, err))
	}
	return connect.NewResponse(&pb.ExecResponse{
		Stdout: r.Stdout, Stderr: r.Stderr, ExitCode: r.Code, Error: r.Exit.Error, TimedOut: r.TimedOut, Truncated: r.Truncated,
	}), nil
}

// Run implements hostagentv1connect.HostAgentHandler. When the client goes, the command
// is killed.
func (s *service) Run(ctx context.Context, req *connect.Request[pb.RunRequest], stream *connect.ServerStream[pb.ExecStreamResponse]) error {
	cmd, err := command(req.Msg.GetCommand())
	if err != nil {
		return err
	}
	use, err := s.use(ctx, req.Msg.GetSandboxId())
	if err != nil {
		return err
	}
	defer use.End()
	p, err := use.Guest.StartForOutcome(use.Context, cmd)
	if err == nil {
		defer p.Close()
		err = relay(stream, p)
	}
	return s.fault(ctx, "exec", ofCall(use, err))
}

// ExecStream implements hostagentv1connect.HostAgentHandler. When the client
// goes, the command is killed.
func (s *service) ExecStream(ctx context.Context, stream *connect.BidiStream[pb.ExecStreamRequest, pb.ExecStreamResponse]) error {
	first, err := stream.Receive()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return invalid("the first message must be start")
		}
		return err
	}
	start := first.GetStart()
	if start == nil {
		return invalid("the first message must be start")
	}
	cmd, err := command(start.GetCommand())
	if err != nil {
		return err
	}
	var terminal *guest.Terminal
	if t := start.GetTerminal(); t != nil {
		if terminal, err = size(t); err != nil {
			return err
		}
	}
	use, err := s.use(ctx, start.GetSandboxId())
	if err != nil {
		return err
	}
	defer use.End()
	run, cancel := context.WithCancelCause(use.Context)
	defer cancel(nil)
	p, err := use.Guest.Start(run, cmd, terminal, start.GetStdin())
	if err != nil {
		return s.fault(ctx, "exec", ofCall(use, err))
	}
	defer p.Close()

	fed := make(chan struct{})
	go func() {
		defer close(fed)
		if err := feed(stream, p, terminal != nil || start.GetStdin()); err != nil {
			cancel(err)
		}
	}()
	err = relay(stream, p)
	if err != nil {
		p.Close()
		if cause := context.Cause(run); cause != nil && !errors.Is(cause, context.Canceled) {
			err = cause // what broke the input
		}
	}
	cancel(nil)
	endReceiving(ctx)
	<-fed
	return s.fault(ctx, "exec", ofCall(use, err))
}

func size(t *pb.TerminalSize) (*guest.Terminal, error) {
	if t.GetCols() > 0xffff || t.GetRows() > 0xffff {
		return nil, invalid("terminal: %d columns and %d rows are too many", t.GetCols(), t.GetRows())
	}
	return &guest.Terminal{Cols: t.GetCols(), Rows: t.GetRows()}, nil
}

// feed passes on what the client sends until it sends no more. The end of its
// stream is the end of the input too.
func feed(stream *connect.BidiStream[pb.ExecStreamRequest, pb.ExecStreamResponse], p *guest.Process, open bool) error {
	for {
		m, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			if !open {
				return nil
			}
			return p.CloseStdin()
		}
		if err != nil {
			return err
		}
		switch m := m.GetMessage().(type) {
		case *pb.ExecStreamRequest_Stdin:
			if !open {
				return invalid("the command has no open standard input")
			}
			err = p.Write(m.Stdin)
		case *pb.ExecStreamRequest_CloseStdin_:
			if open {
				open = false
				err = p.CloseStdin()
			}
		case *pb.ExecStreamRequest_Resize:
			var t *guest.Terminal
			if t, err = size(m.Resize); err == nil {
				err = p.Resize(*t)
			}
		case *pb.ExecStreamRequest_Signal:
			if m.Signal < 1 || m.Signal > 64 {
				return invalid("signal: %d is not between 1 and 64", m.Signal)
			}
			err = p.Signal(m.Signal)
		default:
			return invalid("a message of no known kind")
		}
		if err != nil {
			return err
		}
	}
}

// relay passes on a process's start, if that is known, its output, and its end.
func relay(stream interface {
	Send(*pb.ExecStreamResponse) error
}, p *guest.Process,
) error {
	if p.PID != 0 {
		if err := stream.Send(&pb.ExecStreamResponse{Message: &pb.ExecStreamResponse_Started_{Started: &pb.ExecStreamResponse_Started{Pid: p.PID}}}); err != nil {
			return err
		}
	}
	for {
		out, err := p.Next()
		if err != nil {
			return err
		}
		m := &pb.ExecStreamResponse{}
		switch {
		case out.Exit != nil:
			// Before the client hears of it, and ends the call: the connection to the guest
			// serves the next request only if its answer was read whole.
			p.Close()
			m.Message = &pb.ExecStreamResponse_Exited_{Exited: &pb.ExecStreamResponse_Exited{ExitCode: out.Exit.Code, Error: out.Exit.Error, TimedOut: out.Exit.TimedOut}}
		case len(out.Stdout) > 0:
			m.Message = &pb.ExecStreamResponse_Stdout{Stdout: out.Stdout}
		case len(out.Stderr) > 0:
			m.Message = &pb.ExecStreamResponse_Stderr{Stderr: out.Stderr}
		case len(out.Terminal) > 0:
			m.Message = &pb.ExecStreamResponse_Terminal{Terminal: out.Terminal}
		default:
			continue
		}
		if err := stream.Send(m); err != nil || out.Exit != nil {
			return err
		}
	}
}

// file checks which file a request names.
func file(f *pb.FileRef) error {
	path := f.GetPath()
	switch {
	case path == "":
		return invalid("path: a path is needed")
	case len(path) > maxPath:
		return invalid("path: is longer than %d bytes", maxPath)
	case strings.ContainsRune(path, 0):
		return invalid("path: has a NUL byte")
	}
	for part := range strings.SplitSeq(path, "/") {
		if part == ".." {
			return invalid("path: must not contain \"..\"")
		}
	}
	return checkUser(f.GetUser())
}

func fileInfo(i guest.FileInfo) *pb.FileInfo {
	return &pb.FileInfo{Path: i.Path, Name: i.Name, Size: i.Size}
}

// WriteFile implements hostagentv1connect.HostAgentHandler.
func (s *service) WriteFile(ctx context.Context, req *connect.Request[pb.WriteFileRequest]) (*connect.Response[pb.WriteFileResponse], error) {
	f, content := req.Msg.GetFile(), req.Msg.GetContent()
	if err := file(f); err != nil {
		return nil, err
	}
	use, err := s.use(ctx, f.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	i, err := use.Guest.Write(use.Context, f.GetUser(), f.GetPath(), bytes.NewReader(content), int64(len(content)))
	if err != nil {
		return nil, s.fault(ctx, "write file", ofCall(use, err))
	}
	return connect.NewResponse(&pb.WriteFileResponse{File: fileInfo(i)}), nil
}

// ReadFile implements hostagentv1connect.HostAgentHandler.
func (s *service) ReadFile(ctx context.Context, req *connect.Request[pb.ReadFileRequest]) (*connect.Response[pb.ReadFileResponse], error) {
	f := req.Msg.GetFile()
	if err := file(f); err != nil {
		return nil, err
	}
	use, err := s.use(ctx, f.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	body, _, err := use.Guest.Read(use.Context, f.GetUser(), f.GetPath(), 0, 0)
	if err != nil {
		return nil, s.fault(ctx, "read file", ofUse(use, err))
	}
	defer body.Close()
	content, err := io.ReadAll(io.LimitReader(body, maxFile+1))
	if err != nil {
		return nil, s.fault(ctx, "read file", ofUse(use, err))
	}
	if len(content) > maxFile {
		return nil, connect.NewError(connect.CodeResourceExhausted, told.New("the file is larger than the %d MiB that are read at once; read it as a stream", maxFile>>20))
	}
	return connect.NewResponse(&pb.ReadFileResponse{Content: content}), nil
}

// WriteFileStream implements hostagentv1connect.HostAgentHandler.
func (s *service) WriteFileStream(ctx context.Context, stream *connect.ClientStream[pb.WriteFileStreamRequest]) (*connect.Response[pb.WriteFileStreamResponse], error) {
	if !stream.Receive() {
		if err := stream.Err(); err != nil {
			return nil, err
		}
		return nil, invalid("the first message must be start")
	}
	start := stream.Msg().GetStart()
	if start == nil {
		return nil, invalid("the first message must be start")
	}
	f, archive := start.GetFile(), start.GetArchive()
	if err := file(f); err != nil {
		return nil, err
	}
	if err := checkUser(strings.Replace(start.GetOwner(), ":", "", 1)); err != nil {
		return nil, err
	}
	use, err := s.use(ctx, f.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()

	r, w := io.Pipe()
	var broken error
	received := make(chan struct{})
	go func() {
		defer close(received)
		broken = receive(stream, w)
		w.CloseWithError(broken) // nil: the end of the content
	}()
	res := &pb.WriteFileStreamResponse{}
	if archive {
		err = use.Guest.Unpack(use.Context, f.GetUser(), f.GetPath(), start.GetOwner(), r)
		res.File = &pb.FileInfo{Path: f.GetPath()}
	} else {
		var i guest.FileInfo
		i, err = use.Guest.Write(use.Context, f.GetUser(), f.GetPath(), r, -1)
		res.File = fileInfo(i)
	}
	r.CloseWithError(errEnough)
	if err != nil {
		endReceiving(ctx)
	}
	<-received
	if err != nil {
		if broken != nil && !errors.Is(broken, errEnough) && !errors.Is(broken, os.ErrDeadlineExceeded) && !guest.Said(err) {
			err = broken // the content broke off, and so did the writing
		}
		return nil, s.fault(ctx, "write file", ofCall(use, err))
	}
	return connect.NewResponse(res), nil
}

// errEnough says that a stream's content is not needed any more.
var errEnough = errors.New("no more content is needed")

// receive writes a stream's chunks to w until the stream ends.
func receive(stream *connect.ClientStream[pb.WriteFileStreamRequest], w io.Writer) error {
	for stream.Receive() {
		c, ok := stream.Msg().GetMessage().(*pb.WriteFileStreamRequest_Chunk)
		if !ok {
			return invalid("every message after the first must be a chunk")
		}
		if _, err := w.Write(c.Chunk); err != nil {
			return err
		}
	}
	return stream.Err()
}

// ReadFileStream implements hostagentv1connect.HostAgentHandler.
func (s *service) ReadFileStream(ctx context.Context, req *connect.Request[pb.ReadFileStreamRequest], stream *connect.ServerStream[pb.ReadFileStreamResponse]) error {
	m := req.Msg
	f := m.GetFile()
	if err := file(f); err != nil {
		return err
	}
	if m.GetOffset() < 0 || m.GetLength() < 0 || m.GetOffset()+m.GetLength() < 0 {
		return invalid("offset and length: must not be negative, nor their sum too large")
	}
	if m.GetArchive() && (m.GetOffset() > 0 || m.GetLength() > 0) {
		return invalid("offset and length: not for archives")
	}
	use, err := s.use(ctx, f.GetSandboxId())
	if err != nil {
		return err
	}
	defer use.End()
	var body io.ReadCloser
	total := int64(-1)
	if m.GetArchive() {
		body, err = use.Guest.Pack(use.Context, f.GetUser(), f.GetPath())
	} else {
		body, total, err = use.Guest.Read(use.Context, f.GetUser(), f.GetPath(), m.GetOffset(), m.GetLength())
	}
	if err != nil {
		return s.fault(ctx, "read file", ofUse(use, err))
	}
	defer body.Close()
	err = stream.Send(&pb.ReadFileStreamResponse{Message: &pb.ReadFileStreamResponse_Start_{Start: &pb.ReadFileStreamResponse_Start{Size: total}}})
	if err != nil {
		return err
	}
	buf := make([]byte, chunk)
	for {
		n, err := io.ReadFull(body, buf)
		if n > 0 {
			if err := stream.Send(&pb.ReadFileStreamResponse{Message: &pb.ReadFileStreamResponse_Chunk{Chunk: buf[:n]}}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return s.fault(ctx, "read file", ofUse(use, err))
		}
	}
}

// Metrics implements hostagentv1connect.HostAgentHandler.
func (s *service) Metrics(ctx context.Context, req *connect.Request[pb.MetricsRequest]) (*connect.Response[pb.MetricsResponse], error) {
	use, err := s.use(ctx, req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	m, err := use.Guest.Metrics(use.Context)
	if err != nil {
		return nil, s.fault(ctx, "read metrics", ofUse(use, err))
	}
	host, err := use.VM.Memory()
	if err != nil {
		return nil, s.fault(ctx, "measure the virtual machine", ofUse(use, err))
	}
	return connect.NewResponse(&pb.MetricsResponse{
		Time: timestamppb.New(m.Time), CpuCount: int32(m.CPUs), CpuUsedPct: m.CPUUsedPct,
		MemoryTotalBytes: m.MemoryTotal, MemoryUsedBytes: m.MemoryUsed,
		DiskTotalBytes: m.DiskTotal, DiskUsedBytes: m.DiskUsed, HostMemoryBytes: host,
	}), nil
}

// Samples implements hostagentv1connect.HostAgentHandler.
func (s *service) Samples(context.Context, *connect.Request[pb.SamplesRequest]) (*connect.Response[pb.SamplesResponse], error) {
	r := &pb.SamplesResponse{Time: timestamppb.Now()}
	for _, sample := range s.sandboxes.Samples() {
		r.Samples = append(r.Samples, &pb.SamplesResponse_Sample{
			SandboxId: id.Format(id.Sandbox, sample.ID), Vcpus: int32(sample.VCPUs), CpuUs: sample.CPU.Microseconds(), MemoryBytes: sample.MemoryBytes, DiskBytes: sample.DiskBytes,
		})
	}
	return connect.NewResponse(r), nil
}

// Console implements hostagentv1connect.HostAgentHandler.
func (s *service) Console(ctx context.Context, req *connect.Request[pb.ConsoleRequest]) (*connect.Response[pb.ConsoleResponse], error) {
	u, err := parse(id.Sandbox, "sandbox_id", req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	out, err := s.sandboxes.Console(ctx, u)
	if err != nil {
		return nil, s.fault(ctx, "read console", err)
	}
	return connect.NewResponse(&pb.ConsoleResponse{Output: out}), nil
}

func templateMessage(t image.Template) *pb.Template {
	return &pb.Template{
		TemplateId: id.Format(id.Template, t.ID), TeamId: id.Format(id.Team, t.Team), Name: t.Name, SizeBytes: t.SizeBytes,
		CreatedAt: timestamppb.New(t.CreatedAt), DiskMib: int32(t.DiskMiB), Vcpus: int32(t.VCPUs), MemoryMib: int32(t.MemoryMiB),
		Defaults: &pb.Defaults{Envs: t.Defaults.Envs, User: t.Defaults.User, Workdir: t.Defaults.Workdir, Limits: t.Defaults.Limits},
	}
}

// Templates implements hostagentv1connect.HostAgentHandler.
func (s *service) Templates(ctx context.Context, _ *connect.Request[pb.TemplatesRequest]) (*connect.Response[pb.TemplatesResponse], error) {
	all, err := s.templates()
	if err != nil {
		return nil, s.fault(ctx, "list templates", err)
	}
	res := &pb.TemplatesResponse{}
	for _, t := range all {
		res.Templates = append(res.Templates, templateMessage(t))
	}
	return connect.NewResponse(res), nil
}

// Host implements hostagentv1connect.HostAgentHandler.
func (s *service) Host(ctx context.Context, _ *connect.Request[pb.HostRequest]) (*connect.Response[pb.HostResponse], error) {
	m, err := s.Describe()
	if err != nil {
		return nil, s.fault(ctx, "describe host", err)
	}
	return connect.NewResponse(m), nil
}

// Events implements hostagentv1connect.HostAgentHandler.
func (s *service) Events(ctx context.Context, _ *connect.Request[pb.EventsRequest], stream *connect.ServerStream[pb.EventsResponse]) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan struct{})
	defer func() { cancel(nil); <-ended }()
	go func() {
		defer close(ended)
		select {
		case <-s.stopping:
			cancel(sandbox.ErrClosing)
		case <-ctx.Done():
		}
	}()
	s.listeners.Add(1)
	defer s.listeners.Add(-1)
	// The headers at once: who listens knows that it is heard.
	if err := stream.Send(nil); err != nil {
		return err
	}
	err := s.journal.Follow(ctx, func(e journal.Event) error {
		m := &pb.Event{Seq: e.Seq, SandboxId: id.Format(id.Sandbox, e.Sandbox), Time: timestamppb.New(e.Time), Reason: e.Reason}
		switch e.Kind {
		case journal.Expired:
			m.Kind = pb.Event_KIND_EXPIRED
		case journal.Paused:
			m.Kind = pb.Event_KIND_PAUSED
		case journal.Exited:
			m.Kind = pb.Event_KIND_EXITED
		}
		return stream.Send(&pb.EventsResponse{Event: m})
	})
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return s.fault(ctx, "send events", err)
}

// AckEvents implements hostagentv1connect.HostAgentHandler.
func (s *service) AckEvents(ctx context.Context, req *connect.Request[pb.AckEventsRequest]) (*connect.Response[pb.AckEventsResponse], error) {
	err := s.journal.Ack(req.Msg.GetSeq())
	if errors.Is(err, journal.ErrFuture) {
		return nil, invalid("seq: %v", err)
	}
	if err != nil {
		return nil, s.fault(ctx, "acknowledge events", err)
	}
	return connect.NewResponse(&pb.AckEventsResponse{}), nil
}

// Terminate implements hostagentv1connect.HostAgentHandler.
func (s *service) Terminate(ctx context.Context, _ *connect.Request[pb.TerminateRequest]) (*connect.Response[pb.TerminateResponse], error) {
	s.log.InfoContext(ctx, "terminating: every sandbox that runs is paused")
	if err := s.sandboxes.Terminate(ctx); err != nil {
		return nil, s.fault(ctx, "terminate", err)
	}
	if s.listeners.Load() > 0 {
		heard, cancel := context.WithTimeout(ctx, lastEventsTimeout)
		s.journal.Drained(heard)
		cancel()
	}
	s.terminate()
	return connect.NewResponse(&pb.TerminateResponse{}), nil
}
