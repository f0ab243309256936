package guest

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/backoff"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/text"
)

// MaxOutput is the number of bytes of each output stream that [Client.Exec] keeps.
const MaxOutput = 16 << 20

const (
	inputChunk = 256 << 10 // bytes of input in one request
	// patience is the time after a command's timeout until the agent gives up on it. The
	// guest should kill the command and report that before.
	patience = 15 * time.Second
	// killTimeout bounds the kill of a command.
	killTimeout = 10 * time.Second
	// startsWithin is the time in which a guest may start a requested process.
	startsWithin = 2 * time.Second
	// streamEndTimeout bounds the wait for the end of a stream after the command's exit.
	streamEndTimeout = time.Second
)

// Command is a command to run in a guest.
type Command struct {
	Cmd     string
	Args    []string
	Envs    map[string]string
	Dir     string        // empty: the user's home
	User    string        // empty: the guest's default
	Timeout time.Duration // after which the guest kills it with its descendants; 0: none
}

// Exit says how a command ended.
type Exit struct {
	Code     int32
	Error    string // the reason if it did not exit by itself
	TimedOut bool
}

// timedOut is the guest's error for a command that exceeded its timeout.
const timedOut = "timed out"

// Terminal is a terminal's size in characters.
type Terminal struct{ Cols, Rows uint32 }

func (t *Terminal) pty() *pb.PTY {
	if t == nil {
		return nil
	}
	return &pb.PTY{Size: &pb.PTY_Size{Cols: t.Cols, Rows: t.Rows}}
}

// Process is a command that runs in the guest.
type Process struct {
	// PID is the command's process id in the guest, or 0 after [Client.StartForOutcome].
	PID uint32

	c        *Client
	tag      string
	terminal bool
	stream   *connect.ServerStreamForClient[pb.StartResponse]
	ctx      context.Context
	cancel   context.CancelFunc
	started  bool // the guest reported the start
	ended    bool // Close need not kill it
	exited   bool // the guest reported the exit, but its response has not ended
	deadline bool // the command has a timeout
}

// Output is a piece of a process's output, or its exit. Exactly one field is set.
type Output struct {
	Stdout, Stderr, Terminal []byte
	Exit                     *Exit
}

// Start starts a command, with a terminal unless terminal is nil. stdin opens its
// standard input, which is empty otherwise. The caller must call [Process.Close].
func (c *Client) Start(ctx context.Context, cmd Command, terminal *Terminal, stdin bool) (*Process, error) {
	p, err := c.request(ctx, cmd, terminal, stdin, false)
	if err != nil {
		return nil, err
	}
	for p.stream.Receive() {
		switch e := p.stream.Msg().GetEvent().GetEvent().(type) {
		case *pb.ProcessEvent_Start:
			p.PID, p.started = e.Start.GetPid(), true
			return p, nil
		case *pb.ProcessEvent_Keepalive:
		default:
			p.Close()
			return nil, unreadable(ctx, errors.New("a process's first event is not its start"))
		}
	}
	err = p.broken()
	p.Close()
	return nil, err
}

// StartForOutcome starts a command without input, and does not wait for the guest to
// report the start. If the command cannot start, [Process.Next] returns the error. The
// caller must call [Process.Close].
func (c *Client) StartForOutcome(ctx context.Context, cmd Command) (*Process, error) {
	return c.request(ctx, cmd, nil, false, true)
}

// request asks the guest to start a command. With hold, the guest reports the start
// together with the next event.
func (c *Client) request(ctx context.Context, cmd Command, terminal *Terminal, stdin, hold bool) (*Process, error) {
	p := &Process{c: c, tag: "agent-" + uuid.NewString(), terminal: terminal != nil, deadline: cmd.Timeout > 0}
	if cmd.Timeout > 0 {
		p.ctx, p.cancel = context.WithTimeout(ctx, cmd.Timeout+patience)
	} else {
		p.ctx, p.cancel = context.WithCancel(ctx)
	}
	config := &pb.ProcessConfig{Cmd: cmd.Cmd, Args: cmd.Args, Envs: cmd.Envs}
	if cmd.Dir != "" {
		config.Cwd = &cmd.Dir
	}
	req := connect.NewRequest(&pb.StartRequest{Process: config, Pty: terminal.pty(), Tag: &p.tag, Stdin: &stdin})
	// Always set, because the guest otherwise uses the request's deadline as the timeout.
	req.Header().Set(hostwire.ProcessTimeout, strconv.FormatFloat(cmd.Timeout.Seconds(), 'f', 3, 64))
	if hold {
		req.Header().Set(hostwire.HoldStart, "1")
	}
	if cmd.User != "" {
		req.Header().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(cmd.User+":")))
	}
	// Without a deadline, which the Connect client would send and the guest would apply to
	// the command.
	sctx := withoutDeadline{p.ctx}
	stream, err := c.processes.Start(sctx, req)
	if err != nil {
		defer p.cancel()
		// The guest may have started it although the call failed.
		if !connect.IsWireError(err) {
			p.kill()
		}
		return nil, fromConnect(p.ctx, err)
	}
	p.stream = stream
	return p, nil
}

// broken returns the error with which the stream ended before the exit.
func (p *Process) broken() error {
	err := p.stream.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	err = fromConnect(p.ctx, err)
	if !p.started && Said(err) {
		p.ended = true // the guest refused, so nothing runs
	}
	return err
}

// withoutDeadline is a context that ends with its parent but hides the deadline.
type withoutDeadline struct{ context.Context }

func (withoutDeadline) Deadline() (time.Time, bool) { return time.Time{}, false }

// Next returns the next piece of output. The last one is the exit, after which Next
// returns io.EOF.
func (p *Process) Next() (Output, error) {
	if p.ended {
		return Output{}, io.EOF
	}
	for p.stream.Receive() {
		p.started = true
		switch e := p.stream.Msg().GetEvent().GetEvent().(type) {
		case *pb.ProcessEvent_Data:
			switch d := e.Data.GetOutput().(type) {
			case *pb.ProcessEvent_DataEvent_Stdout:
				return Output{Stdout: d.Stdout}, nil
			case *pb.ProcessEvent_DataEvent_Stderr:
				return Output{Stderr: d.Stderr}, nil
			case *pb.ProcessEvent_DataEvent_Pty:
				return Output{Terminal: d.Pty}, nil
			}
		case *pb.ProcessEvent_End:
			p.ended, p.exited = true, true
			exit := &Exit{Code: exitCode(e.End), Error: text.Clean(e.End.GetError(), maxError)}
			exit.TimedOut = p.deadline && exit.Error == timedOut
			return Output{Exit: exit}, nil
		}
	}
	if p.deadline && errors.Is(p.ctx.Err(), context.DeadlineExceeded) {
		// The guest did not report in time that it killed the command.
		p.kill()
		p.ended = true
		return Output{Exit: &Exit{Code: 128 + int32(unix.SIGKILL), Error: timedOut, TimedOut: true}}, nil
	}
	return Output{}, p.broken()
}

// exitCode returns the exit code as a shell reports it: for a process that a signal
// ended, 128 plus the signal's number, of which the daemon sends only the name.
func exitCode(e *pb.ProcessEvent_EndEvent) int32 {
	if e.GetExited() {
		return e.GetExitCode()
	}
	name, _ := strings.CutSuffix(e.GetStatus(), " (core dumped)")
	for n := unix.Signal(1); n <= 64; n++ {
		if name == "signal: "+n.String() {
			return 128 + int32(n)
		}
	}
	return e.GetExitCode()
}

func (p *Process) selector() *pb.ProcessSelector {
	// By tag, which unlike a pid is never reused.
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: p.tag}}
}

// Write writes to the process's standard input or terminal, and returns when the guest
// has passed everything on. Calls must not be concurrent. It returns nil if the process
// takes no more input.
func (p *Process) Write(data []byte) error {
	// One request per piece instead of a stream: over HTTP/1.1, the error of a server that
	// refuses the rest of a stream may get lost.
	for len(data) > 0 {
		n := min(len(data), inputChunk)
		in := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: data[:n]}}
		if p.terminal {
			in.Input = &pb.ProcessInput_Pty{Pty: data[:n]}
		}
		if _, err := p.c.processes.SendInput(p.ctx, connect.NewRequest(&pb.SendInputRequest{Process: p.selector(), Input: in})); err != nil {
			return p.inputEnd(err)
		}
		data = data[n:]
	}
	return nil
}

// inputEnd returns nil if err means that the process takes no more input.
func (p *Process) inputEnd(err error) error {
	switch connect.CodeOf(err) {
	case connect.CodeFailedPrecondition, connect.CodeNotFound: // the input is closed, or the process ended
		return nil
	}
	return fromConnect(p.ctx, err)
}

// CloseStdin closes the standard input after everything written. A terminal gets an
// end-of-file character instead.
func (p *Process) CloseStdin() error {
	if p.terminal {
		return p.Write([]byte{0x04})
	}
	_, err := p.c.processes.CloseStdin(p.ctx, connect.NewRequest(&pb.CloseStdinRequest{Process: p.selector()}))
	return p.inputEnd(err)
}

// Resize changes the terminal's size.
func (p *Process) Resize(t Terminal) error {
	_, err := p.c.processes.Update(p.ctx, connect.NewRequest(&pb.UpdateRequest{Process: p.selector(), Pty: t.pty()}))
	return p.inputEnd(err)
}

// Signal sends a signal to the process and its group. SIGKILL goes to all its
// descendants.
func (p *Process) Signal(number int32) error {
	_, err := p.c.processes.SendSignal(p.ctx, connect.NewRequest(&pb.SendSignalRequest{Process: p.selector(), Signal: pb.Signal(number)}))
	return p.inputEnd(err)
}

// kill kills the process and its descendants, even after the request that started it has
// ended.
func (p *Process) kill() {
	ctx, cancel := context.WithTimeout(p.c.life, killTimeout)
	defer cancel()
	attempts := backoff.New(firstPause, lastPause)
	for began := time.Now(); ; {
		_, err := p.c.processes.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: p.selector(), Signal: pb.Signal_SIGNAL_SIGKILL}))
		// The guest may be about to start a process that it has not reported yet.
		if p.started || connect.CodeOf(err) != connect.CodeNotFound || time.Since(began) > startsWithin || attempts.Wait(ctx) != nil {
			return
		}
	}
}

// Close kills the process if it still runs, and releases its resources.
func (p *Process) Close() {
	if !p.ended {
		p.kill()
		p.ended = true
	}
	if p.exited {
		// A connection can be reused only if its response was read to the end.
		stop := time.AfterFunc(streamEndTimeout, p.cancel)
		defer stop.Stop()
		for p.stream.Receive() {
		}
		p.exited = false
	}
	p.cancel()
	if p.stream != nil {
		_ = p.stream.Close()
	}
}

// Launch starts a command and leaves it running.
func (c *Client) Launch(ctx context.Context, cmd Command) error {
	p, err := c.Start(ctx, cmd, nil, false)
	if err != nil {
		return err
	}
	p.ended = true // so that Close does not kill it
	p.Close()
	return nil
}

// Result is what a command printed and how it ended.
type Result struct {
	Exit
	Stdout, Stderr []byte
	Truncated      bool // a stream exceeded [MaxOutput]
}

// Exec runs a command and returns its result. If ctx ends first, Exec kills the command.
func (c *Client) Exec(ctx context.Context, cmd Command, stdin []byte) (Result, error) {
	var p *Process
	var err error
	if len(stdin) > 0 {
		p, err = c.Start(ctx, cmd, nil, true)
	} else {
		p, err = c.StartForOutcome(ctx, cmd)
	}
	if err != nil {
		return Result{}, err
	}
	defer p.Close()
	var feeding sync.WaitGroup
	var feedErr error
	if len(stdin) > 0 {
		feeding.Go(func() {
			if feedErr = p.Write(stdin); feedErr == nil {
				feedErr = p.CloseStdin()
			}
			if feedErr != nil {
				p.kill() // otherwise it waits for input that never comes
			}
		})
	}
	res, err := collect(p)
	// The command has ended, so the guest refuses more input. Cancel a request for which it
	// takes too long.
	stop := time.AfterFunc(time.Second, p.cancel)
	feeding.Wait()
	stop.Stop()
	if err == nil && feedErr != nil && !res.TimedOut && res.Exit.Error != "" && ctx.Err() == nil {
		err = fmt.Errorf("write standard input: %w", feedErr)
	}
	return res, err
}

func collect(p *Process) (Result, error) {
	var res Result
	keep := func(to *[]byte, data []byte) {
		if room := MaxOutput - len(*to); len(data) > room {
			data, res.Truncated = data[:room], true
		}
		*to = append(*to, data...)
	}
	for {
		out, err := p.Next()
		if err != nil {
			return Result{}, err
		}
		keep(&res.Stdout, out.Stdout)
		keep(&res.Stderr, out.Stderr)
		if out.Exit != nil {
			res.Exit = *out.Exit
			return res, nil
		}
	}
}
