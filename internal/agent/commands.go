package agent

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/agent/guest"
	"github.com/wrenn-dev/wrenn/internal/cork"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

// command checks and converts a request's command.
func command(c *pb.Command) (guest.Command, error) {
	cmd := guest.Command{
		Cmd: c.GetCmd(), Args: c.GetArgs(), Envs: c.GetEnvs(), Dir: c.GetCwd(), User: c.GetUser(),
		Timeout: time.Duration(c.GetTimeoutSeconds()) * time.Second,
	}
	if cmd.Cmd == "" {
		return cmd, invalid("cmd: must not be empty")
	}
	size := len(cmd.Cmd)
	for _, a := range cmd.Args {
		size += len(a) + 1
		if strings.ContainsRune(a, 0) {
			return cmd, invalid("args: must not contain a NUL byte")
		}
	}
	if strings.ContainsRune(cmd.Cmd, 0) {
		return cmd, invalid("cmd: must not contain a NUL byte")
	}
	if size > maxArguments {
		return cmd, invalid("args: %d bytes are more than %d", size, maxArguments)
	}
	if err := checkEnvs(cmd.Envs, maxArguments-size); err != nil {
		return cmd, err
	}
	if strings.ContainsRune(cmd.Dir, 0) || len(cmd.Dir) > maxPath {
		return cmd, invalid("cwd: must have at most %d bytes and no NUL byte", maxPath)
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
		return nil, s.fault(ctx, "exec", callError(use, err))
	}
	return connect.NewResponse(&pb.ExecResponse{
		Stdout: r.Stdout, Stderr: r.Stderr, ExitCode: r.Code, Error: r.Exit.Error, TimedOut: r.TimedOut, Truncated: r.Truncated,
	}), nil
}

// Run implements hostagentv1connect.HostAgentHandler. If the client disconnects, the
// guest kills the command.
func (s *service) Run(ctx context.Context, req *connect.Request[pb.RunRequest], stream *connect.ServerStream[pb.RunResponse]) error {
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
		err = relay(p, func(out guest.Output) error {
			m := &pb.RunResponse{}
			switch {
			case out.Exit != nil:
				cork.Set(ctx, true) // The exit leaves together with the end of the stream.
				m.Message = &pb.RunResponse_Exited{Exited: exited(out.Exit)}
			case len(out.Stdout) > 0:
				m.Message = &pb.RunResponse_Stdout{Stdout: out.Stdout}
			case len(out.Stderr) > 0:
				m.Message = &pb.RunResponse_Stderr{Stderr: out.Stderr}
			default:
				return nil
			}
			return stream.Send(m)
		})
	}
	return s.fault(ctx, "exec", callError(use, err))
}

// ExecStream implements hostagentv1connect.HostAgentHandler. If the client disconnects,
// the guest kills the command.
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
		return s.fault(ctx, "exec", callError(use, err))
	}
	defer p.Close()

	fed := make(chan struct{})
	go func() {
		defer close(fed)
		if err := feed(stream, p, terminal != nil || start.GetStdin()); err != nil {
			cancel(err)
		}
	}()
	err = stream.Send(&pb.ExecStreamResponse{Message: &pb.ExecStreamResponse_Started_{Started: &pb.ExecStreamResponse_Started{Pid: p.PID}}})
	if err == nil {
		err = relay(p, func(out guest.Output) error {
			m := &pb.ExecStreamResponse{}
			switch {
			case out.Exit != nil:
				m.Message = &pb.ExecStreamResponse_Exited_{Exited: exited(out.Exit)}
			case len(out.Stdout) > 0:
				m.Message = &pb.ExecStreamResponse_Stdout{Stdout: out.Stdout}
			case len(out.Stderr) > 0:
				m.Message = &pb.ExecStreamResponse_Stderr{Stderr: out.Stderr}
			case len(out.Terminal) > 0:
				m.Message = &pb.ExecStreamResponse_Terminal{Terminal: out.Terminal}
			default:
				return nil
			}
			return stream.Send(m)
		})
	}
	if err != nil {
		p.Close()
		if cause := context.Cause(run); cause != nil && !errors.Is(cause, context.Canceled) {
			err = cause // the input failed first
		}
	}
	cancel(nil)
	endReceiving(ctx)
	<-fed
	return s.fault(ctx, "exec", callError(use, err))
}

func size(t *pb.TerminalSize) (*guest.Terminal, error) {
	if t.GetCols() > 0xffff || t.GetRows() > 0xffff {
		return nil, invalid("terminal: %d columns and %d rows exceed 65535", t.GetCols(), t.GetRows())
	}
	return &guest.Terminal{Cols: t.GetCols(), Rows: t.GetRows()}, nil
}

// feed forwards the client's messages to p until the client closes its stream, which
// closes the standard input too. open says whether p has a standard input.
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
				return invalid("the command's standard input is not open")
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
			return invalid("unknown kind of message")
		}
		if err != nil {
			return err
		}
	}
}

// relay passes a process's output and its exit to send.
func relay(p *guest.Process, send func(guest.Output) error) error {
	for {
		out, err := p.Next()
		if err != nil {
			return err
		}
		if out.Exit != nil {
			// Close before send, after which the client may cancel the call: the connection to
			// the guest can be reused only if its response was read to the end.
			p.Close()
		}
		if err := send(out); err != nil || out.Exit != nil {
			return err
		}
	}
}

func exited(e *guest.Exit) *pb.ExecStreamResponse_Exited {
	return &pb.ExecStreamResponse_Exited{ExitCode: e.Code, Error: e.Error, TimedOut: e.TimedOut}
}
