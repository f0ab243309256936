package sandboxes

import (
	"bytes"
	"context"
	"errors"
	"io"

	"connectrpc.com/connect"
	"github.com/google/uuid"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
)

const (
	// maxOutput bounds the output of each stream of a command, in bytes.
	maxOutput = 16 << 20
	// outputCost is the memory per byte of output: once in blocks and once joined.
	outputCost = 2
	// inputChunk is the size of a message of input, in bytes.
	inputChunk = 64 << 10
)

// Exec runs a command in a team's sandbox until it exits. Its output takes memory from
// held, except for the first [budget.Free] bytes of each stream. Output that finds no
// memory there, or exceeds 16 MiB of a stream, is dropped, because the command has
// already run. Exec calls begin, which must not block, each time before it sends the
// command to a host.
func (s *Service) Exec(ctx context.Context, team, sandbox uuid.UUID, c *hostagentv1.Command, stdin []byte, held *budget.Reservation, begin func()) (*hostagentv1.ExecResponse, error) {
	stdout, stderr := kept{held: held}, kept{held: held}
	var exited *hostagentv1.ExecStreamResponse_Exited
	err := s.call(ctx, team, sandbox, func(host *hosts.Host) (err error) {
		begin()
		name := id.Format(id.Sandbox, sandbox)
		take := func(m output) bool {
			stdout.add(m.GetStdout())
			stderr.add(m.GetStderr())
			exited = m.GetExited()
			return exited == nil
		}
		if len(stdin) == 0 {
			err = run(ctx, host.Runner, &hostagentv1.RunRequest{SandboxId: name, Command: c}, take)
			if connect.CodeOf(err) != connect.CodeUnimplemented {
				return err
			}
			// The agent has the previous release.
		}
		return exec(ctx, host.Agent, &hostagentv1.ExecStreamRequest_Start{SandboxId: name, Command: c, Stdin: len(stdin) > 0}, stdin, take)
	})
	if err != nil {
		return nil, err
	}
	return &hostagentv1.ExecResponse{
		Stdout: stdout.joined(), Stderr: stderr.joined(), Truncated: stdout.dropped || stderr.dropped,
		ExitCode: exited.ExitCode, Error: exited.Error, TimedOut: exited.TimedOut,
	}, nil
}

// output is a message of a command, with or without input.
type output interface {
	GetStdout() []byte
	GetStderr() []byte
	GetExited() *hostagentv1.ExecStreamResponse_Exited
}

// run runs a command without input. It calls take with the agent's messages until take
// returns false.
func run(ctx context.Context, agent hostagentv1connect.HostAgentClient, command *hostagentv1.RunRequest, take func(output) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := agent.Run(ctx, connect.NewRequest(command))
	if err != nil {
		return err
	}
	// Close the stream before cancel runs, so that the connection can serve the next
	// call.
	defer func() { _ = stream.Close() }()
	more := true
	for stream.Receive() {
		more = more && take(stream.Msg())
	}
	if !more {
		return nil
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return io.ErrUnexpectedEOF // The agent closed the stream before the command ended.
}

// exec is run for a command with input.
func exec(ctx context.Context, agent hostagentv1connect.HostAgentClient, start *hostagentv1.ExecStreamRequest_Start, stdin []byte, take func(output) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	stream := agent.ExecStream(ctx)
	fed := make(chan struct{})
	go func() {
		defer close(fed)
		feed(stream, start, stdin)
	}()
	defer func() {
		cancel()
		_ = stream.CloseRequest() // Over HTTP/2, the agent notices a cancelled call only when its request body ends.
		<-fed
		_ = stream.CloseResponse()
	}()
	for {
		m, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF // The agent closed the stream before the command ended.
		}
		if err != nil {
			return err
		}
		if !take(m) {
			return nil
		}
	}
}

// feed starts the command and sends its input. It ignores errors, because the stream's
// receiver gets them.
func feed(stream *connect.BidiStreamForClient[hostagentv1.ExecStreamRequest, hostagentv1.ExecStreamResponse], start *hostagentv1.ExecStreamRequest_Start, stdin []byte) {
	err := stream.Send(&hostagentv1.ExecStreamRequest{Message: &hostagentv1.ExecStreamRequest_Start_{Start: start}})
	if len(stdin) == 0 {
		return
	}
	for len(stdin) > 0 && err == nil {
		n := min(len(stdin), inputChunk)
		err = stream.Send(&hostagentv1.ExecStreamRequest{Message: &hostagentv1.ExecStreamRequest_Stdin{Stdin: stdin[:n]}})
		stdin = stdin[n:]
	}
	if err == nil {
		_ = stream.Send(&hostagentv1.ExecStreamRequest{Message: &hostagentv1.ExecStreamRequest_CloseStdin_{CloseStdin: &hostagentv1.ExecStreamRequest_CloseStdin{}}})
	}
}

// kept is the stored output of a stream. It stores blocks, because a guest can send tiny
// pieces.
type kept struct {
	held    *budget.Reservation
	blocks  [][]byte
	bytes   int
	dropped bool
}

// block is the size of a block after the first, which has [budget.Free] bytes.
const block = 64 << 10

func (k *kept) add(piece []byte) {
	if k.dropped {
		return
	}
	if room := maxOutput - k.bytes; len(piece) > room {
		piece, k.dropped = piece[:room], true
	}
	for len(piece) > 0 {
		last := len(k.blocks) - 1
		if last < 0 || len(k.blocks[last]) == cap(k.blocks[last]) {
			size := block
			if last < 0 {
				size = budget.Free
			} else if k.held.Grow(outputCost*block) != nil {
				k.dropped = true
				return
			}
			k.blocks, last = append(k.blocks, make([]byte, 0, size)), last+1
		}
		to := &k.blocks[last]
		n := min(len(piece), cap(*to)-len(*to))
		*to = append(*to, piece[:n]...)
		piece, k.bytes = piece[n:], k.bytes+n
	}
}

func (k *kept) joined() []byte { return bytes.Join(k.blocks, nil) }
