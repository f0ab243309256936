package agent

import (
	"context"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

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

// Settle implements hostagentv1connect.HostAgentHandler.
func (s *service) Settle(ctx context.Context, req *connect.Request[pb.SettleRequest]) (*connect.Response[pb.SettleResponse], error) {
	use, err := s.use(ctx, req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	if err := use.Guest.Settle(use.Context); err != nil {
		return nil, s.fault(ctx, "quiesce guest", useError(use, err))
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
				return nil, invalid("copies: two have the same id")
			}
		}
		if copies[i].Token = c.GetAccessToken(); copies[i].Token == "" {
			return nil, invalid("copies: access_token is required")
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
	// Before List, so that a sandbox that is read in between is in the list.
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

// Metrics implements hostagentv1connect.HostAgentHandler.
func (s *service) Metrics(ctx context.Context, req *connect.Request[pb.MetricsRequest]) (*connect.Response[pb.MetricsResponse], error) {
	use, err := s.use(ctx, req.Msg.GetSandboxId())
	if err != nil {
		return nil, err
	}
	defer use.End()
	m, err := use.Guest.Metrics(use.Context)
	if err != nil {
		return nil, s.fault(ctx, "read metrics", useError(use, err))
	}
	host, err := use.VM.Memory()
	if err != nil {
		return nil, s.fault(ctx, "measure the virtual machine", useError(use, err))
	}
	return connect.NewResponse(&pb.MetricsResponse{
		Time: timestamppb.New(m.Time), CpuCount: int32(m.CPUs), CpuUsedPct: m.CPUUsedPct,
		MemoryTotalBytes: m.MemoryTotal, MemoryUsedBytes: m.MemoryUsed,
		DiskTotalBytes: m.DiskTotal, DiskUsedBytes: m.DiskUsed, HostMemoryBytes: host,
	}), nil
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
