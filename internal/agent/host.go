package agent

import (
	"context"
	"errors"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/internal/agent/journal"
	"github.com/wrenn-dev/wrenn/internal/agent/sandbox"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
)

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
	// Send the headers now, so that the caller knows that the stream is open.
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
	s.log.InfoContext(ctx, "terminating: pausing all running sandboxes")
	if err := s.sandboxes.Terminate(ctx); err != nil {
		return nil, s.fault(ctx, "terminate", err)
	}
	if s.listeners.Load() > 0 {
		heard, cancel := context.WithTimeout(ctx, lastEventsTimeout)
		s.journal.WaitAcknowledged(heard)
		cancel()
	}
	s.terminate()
	return connect.NewResponse(&pb.TerminateResponse{}), nil
}
