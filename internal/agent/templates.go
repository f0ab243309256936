package agent

import (
	"context"
	"errors"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/agent/image"
	"github.com/wrenn-dev/wrenn/internal/agent/rates"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

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

// defaultsOf checks and converts a template's defaults. It returns nil if m is nil.
func defaultsOf(m *pb.Defaults) (*image.Defaults, error) {
	if m == nil {
		return nil, nil
	}
	if err := checkEnvs(m.GetEnvs(), maxEnvs); err != nil {
		return nil, err
	}
	name, group, ok := strings.Cut(m.GetUser(), ":")
	if err := errors.Join(checkUser(name), checkUser(group)); err != nil || ok && (name == "" || group == "") {
		return nil, invalid("defaults: %.100q is not a user name, optionally with :group", m.GetUser())
	}
	if w := m.GetWorkdir(); w != "" && w[0] != '/' || len(w) > maxPath || strings.ContainsRune(w, 0) {
		return nil, invalid("defaults: working directory %.100q is not an absolute path", w)
	}
	limits := rates.Limits(m.GetLimits())
	if err := limits.Check(); err != nil {
		return nil, invalid("defaults: %v", err)
	}
	return &image.Defaults{Envs: m.GetEnvs(), User: m.GetUser(), Workdir: m.GetWorkdir(), Limits: limits}, nil
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
	// A running import would publish the template after its deletion.
	if err := s.imports.end(ctx, template); err != nil {
		return nil, s.fault(ctx, "delete template", err)
	}
	if err := s.sandboxes.DeleteTemplate(team, template); err != nil {
		return nil, s.fault(ctx, "delete template", err)
	}
	return connect.NewResponse(&pb.DeleteTemplateResponse{}), nil
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
