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
	"github.com/wrenn-dev/wrenn/internal/text"
)

// MaxOutput is how many bytes of each output stream [Client.Exec] keeps.
const MaxOutput = 16 << 20

const (
	inputChunk = 256 << 10 // bytes of input in one request
	// patience is how much later than the guest's own timer the agent gives a
	// command up: the guest kills what it started, and tells, before that.
	patience = 15 * time.Second
	// lastRites bounds the kill of a command that nobody waits for any more.
	lastRites = 10 * time.Second
	// startsWithin is how long a guest may take to start a process that it does not know yet.
	startsWithin = 2 * time.Second
	// lastWords bounds the wait for the end of a stream whose command has ended.
	lastWords = time.Second
)

// Command is what to run.
type Command struct {
	Cmd     string
	Args    []string
	Envs    map[string]string
	Dir     string        // empty: the user's home
	User    string        // empty: the guest's default
	Timeout time.Duration // after which it is killed with all its descendants; 0: none
}

// Exit is how a command ended.
type Exit struct {
	Code     int32
	Error    string // why it ended, where it did not exit by itself
	TimedOut bool
}

// timedOut is what the guest says of a command that its timer has killed.
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
	// PID is the command's process id in the guest; 0 if only the outcome was asked for.
	PID uint32

	c        *Client
	tag      string
	terminal bool
	stream   *connect.ServerStreamForClient[pb.StartResponse]
	ctx      context.Context
	cancel   context.CancelFunc
	started  bool // the guest said so
	ended    bool
	exited   bool // the guest said so: only the end of its answer is missing
	deadline bool // the guest was given a time limit
}

// Output is one piece of what a process prints. Exactly one of the streams,
// or Exit, is set.
type Output struct {
	Stdout, Stderr, Terminal []byte
	Exit                     *Exit
}

// Start starts a command; with a terminal, or with its standard input open or
// empty. The caller calls [Process.Close] in the end.
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
			return nil, unreadable(ctx, errors.New("a process had no start"))
		}
	}
	err = p.broken()
	p.Close()
	return nil, err
}

// StartForOutcome starts a command without input for a caller that wants only its
// output and exit: the guest need not report first that it runs. If the command
// cannot run, [Process.Next] returns the reason.
func (c *Client) StartForOutcome(ctx context.Context, cmd Command) (*Process, error) {
	return c.request(ctx, cmd, nil, false, true)
}

// request asks the guest to start a command.
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
	// Always there: without it the guest takes the request's own deadline.
	req.Header().Set(timeoutHeader, strconv.FormatFloat(cmd.Timeout.Seconds(), 'f', 3, 64))
	if hold {
		req.Header().Set(holdHeader, "1")
	}
	if cmd.User != "" {
		req.Header().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(cmd.User+":")))
	}
	// The Connect client makes a header of a context's deadline, and the guest
	// would take that for the command's; so the context has none.
	sctx := withoutDeadline{p.ctx}
	stream, err := c.processes.Start(sctx, req)
	if err != nil {
		defer p.cancel()
		// It may have been started all the same.
		if !connect.IsWireError(err) {
			p.kill()
		}
		return nil, fromConnect(p.ctx, err)
	}
	p.stream = stream
	return p, nil
}

// broken returns why the stream ended without an exit.
func (p *Process) broken() error {
	err := p.stream.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	err = fromConnect(p.ctx, err)
	if !p.started && Said(err) {
		p.ended = true // the guest itself refused: nothing runs
	}
	return err
}

// withoutDeadline is a context that ends with its parent but does not tell when.
type withoutDeadline struct{ context.Context }

func (withoutDeadline) Deadline() (time.Time, bool) { return time.Time{}, false }

// Next returns the next piece of output; the last one is the exit, after
// which the error is io.EOF.
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
		// The guest did not manage to kill the command and to say so.
		p.kill()
		p.ended = true
		return Output{Exit: &Exit{Code: 128 + int32(unix.SIGKILL), Error: timedOut, TimedOut: true}}, nil
	}
	return Output{}, p.broken()
}

// exitCode is the code that a shell would report: the guest daemon's own for a
// process that exited, 128 and the signal's number for one that a signal ended,
// which the daemon only names.
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
	// By tag: unlike the pid it never means another process.
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: p.tag}}
}

// Write feeds the process's standard input or terminal and returns when the
// guest has passed all of it on. One goroutine writes at a time. That the
// process takes no more input is not an error: it may have seen enough.
func (p *Process) Write(data []byte) error {
	// A request a piece, not one stream: over HTTP/1.1 a server that refuses the
	// rest of a stream may not get to say so.
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

// inputEnd sorts out the reasons why no more input is taken.
func (p *Process) inputEnd(err error) error {
	switch connect.CodeOf(err) {
	case connect.CodeFailedPrecondition, connect.CodeNotFound: // closed, or ended
		return nil
	}
	return fromConnect(p.ctx, err)
}

// CloseStdin says that there is no more input, once what was written is
// taken. A terminal gets an end-of-file character.
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

// Signal sends a signal, by its number, to the process and its group; SIGKILL
// to all that came of it.
func (p *Process) Signal(number int32) error {
	_, err := p.c.processes.SendSignal(p.ctx, connect.NewRequest(&pb.SendSignalRequest{Process: p.selector(), Signal: pb.Signal(number)}))
	return p.inputEnd(err)
}

// kill kills the process and all that came of it, even where the request that
// started it has ended.
func (p *Process) kill() {
	ctx, cancel := context.WithTimeout(p.c.life, lastRites)
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

// Close lets go of the process: one that still runs is killed.
func (p *Process) Close() {
	if !p.ended {
		p.kill()
		p.ended = true
	}
	if p.exited {
		// A connection whose answer was read whole serves the next request too.
		stop := time.AfterFunc(lastWords, p.cancel)
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

// Launch starts a command that nobody waits for: it goes on.
func (c *Client) Launch(ctx context.Context, cmd Command) error {
	p, err := c.Start(ctx, cmd, nil, false)
	if err != nil {
		return err
	}
	p.ended = true // for whoever follows it
	p.Close()
	return nil
}

// Result is what a command printed and how it ended.
type Result struct {
	Exit
	Stdout, Stderr []byte
	Truncated      bool // there was more than [MaxOutput] on a stream
}

// Exec runs a command to its end. When ctx ends before, the command is killed.
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
				p.kill() // it would wait for input that does not come
			}
		})
	}
	res, err := collect(p)
	// The command has ended: the guest takes no more input, and says so. A
	// request that does not notice is ended.
	stop := time.AfterFunc(time.Second, p.cancel)
	feeding.Wait()
	stop.Stop()
	if err == nil && feedErr != nil && !res.TimedOut && res.Exit.Error != "" && ctx.Err() == nil {
		err = fmt.Errorf("feed standard input: %w", feedErr)
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
