package rest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"
	"github.com/google/uuid"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/rest"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/patience"
	"github.com/wrenn-dev/wrenn/internal/server/auth"
	"github.com/wrenn-dev/wrenn/internal/server/fault"
	"github.com/wrenn-dev/wrenn/internal/server/hosts"
	"github.com/wrenn-dev/wrenn/internal/server/sandboxes"
)

const (
	defaultExecTimeout = 60
	// answerGrace is how much longer than the command the call to the host may take.
	answerGrace = 30 * time.Second
	// maxMessage bounds a WebSocket message of the client, in bytes.
	maxMessage = 1 << 20
	// maxFrame bounds the output in one message to the client, in bytes. Each stream's
	// buffer grows up to it.
	maxFrame = 64 << 10
	// startWithin bounds the wait for the client's first message.
	startWithin = 30 * time.Second
)

// Channels of the exec WebSocket: a binary message's first byte.
const (
	channelStdin  = 0
	channelStdout = 1
	channelStderr = 2
)

// command converts a request to the host's command.
func command(cmd string, args []string, shell bool, envs map[string]string, cwd, user string, timeout int32) (*hostagentv1.Command, error) {
	if err := sandboxes.CheckEnvs(envs); err != nil {
		return nil, err
	}
	if shell {
		if len(args) > 0 {
			return nil, fault.New(fault.InvalidArgument, "args: not allowed with shell")
		}
		cmd, args = "sh", []string{"-c", cmd}
	}
	return &hostagentv1.Command{Cmd: cmd, Args: args, Envs: envs, Cwd: cwd, User: user, TimeoutSeconds: timeout}, nil
}

// Exec answers POST /v1/sandboxes/{sandbox_id}/exec.
func (a *API) Exec(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID) {
	begun := time.Now()
	out, err := a.exec(r, sandbox)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	// The only possible error is that the client has disconnected.
	_ = writeResult(w, out, time.Since(begun))
}

func (a *API) exec(r *http.Request, sandbox string) (*hostagentv1.ExecResponse, error) {
	u, err := sandboxID(sandbox)
	if err != nil {
		return nil, err
	}
	var req rest.ExecRequest
	if err := decode(r, &req); err != nil {
		return nil, err
	}
	timeout := or(req.TimeoutSeconds, defaultExecTimeout)
	c, err := command(req.Cmd, or(req.Args, nil), or(req.Shell, false), or(req.Envs, nil), or(req.Cwd, ""), or(req.User, ""), timeout)
	if err != nil {
		return nil, err
	}
	stdin := []byte(or(req.Stdin, ""))
	if or(req.StdinEncoding, rest.UTF8) == rest.Base64 {
		if stdin, err = base64.StdEncoding.DecodeString(string(stdin)); err != nil {
			return nil, fault.New(fault.InvalidArgument, "stdin: not standard base64")
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Duration(timeout)*time.Second+answerGrace)
	defer cancel()
	out, err := a.Sandboxes.Exec(ctx, caller(r).Team, u, c, stdin, observed(r).held, func() { recordEarly(r) })
	if r.Context().Err() != nil {
		return nil, r.Context().Err()
	}
	return out, err
}

// ExecStream answers GET /v1/sandboxes/{sandbox_id}/exec/stream.
func (a *API) ExecStream(w http.ResponseWriter, r *http.Request, sandbox rest.SandboxID, params rest.ExecStreamParams) {
	u, err := sandboxID(sandbox)
	if err != nil {
		a.Fail(w, r, err)
		return
	}
	if !strings.EqualFold(params.Upgrade, "websocket") {
		a.Fail(w, r, fault.New(fault.InvalidArgument, "Upgrade: must be websocket"))
		return
	}
	if !a.originAllowed(r) {
		a.Fail(w, r, fault.New(fault.PermissionDenied, "origin not allowed"))
		return
	}
	if _, _, err := a.Sandboxes.Wake(r.Context(), caller(r).Team, u); err != nil {
		a.Fail(w, r, err)
		return
	}
	// The origin was checked above, with the API's own error format.
	ws, err := websocket.Accept(&handshake{ResponseWriter: w}, r, &websocket.AcceptOptions{InsecureSkipVerify: true, CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		a.Fail(w, r, fault.Because(err, fault.InvalidArgument, "not a WebSocket handshake of version 13"))
		return
	}
	defer ws.CloseNow()
	ws.SetReadLimit(maxMessage)
	err = a.execStream(r.Context(), ws, caller(r), u)
	if errors.Is(err, errGone) {
		a.log(r).Debug("client disconnected")
		return
	}
	if err != nil {
		f := classify(err)
		a.log(r).Debug("execute command", "code", f.Code, "error", err)
		_ = say(r.Context(), ws, rest.ExecStreamEvent{Type: rest.ExecStreamEventTypeError, Code: some(string(f.Code)), Message: some(f.Message)})
	}
	_ = ws.Close(websocket.StatusNormalClosure, "")
}

// handshake discards the WebSocket library's own response to a failed handshake.
type handshake struct {
	http.ResponseWriter
	refused bool
}

func (h *handshake) WriteHeader(status int) {
	if h.refused = status >= 400; !h.refused {
		h.ResponseWriter.WriteHeader(status)
	}
}

func (h *handshake) Write(b []byte) (int, error) {
	if h.refused {
		return len(b), nil
	}
	return h.ResponseWriter.Write(b)
}

// Unwrap lets the library reach the connection.
func (h *handshake) Unwrap() http.ResponseWriter { return h.ResponseWriter }

// say sends an event to the client.
func say(ctx context.Context, ws *websocket.Conn, e rest.ExecStreamEvent) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if err := ws.Write(ctx, websocket.MessageText, b); err != nil {
		return errGone
	}
	return nil
}

// errGone reports that the client has disconnected.
var errGone = errors.New("client disconnected")

// execStream runs one command for a client. It returns nil after it has told the client
// how the command ended. The goroutine that it leaves behind ends with the WebSocket.
func (a *API) execStream(ctx context.Context, ws *websocket.Conn, who auth.Principal, sandbox uuid.UUID) error {
	start, err := a.readStart(ctx, ws, who)
	if err != nil {
		return err
	}
	start.SandboxId = id.Format(id.Sandbox, sandbox)
	// Wake the sandbox again, because the client may have taken a while and its input
	// cannot be repeated.
	host, err := a.Sandboxes.Use(ctx, who.Team, sandbox)
	if err != nil {
		return err
	}
	// The call has its own context, because it can end before the client has been told
	// why.
	call, cancel := context.WithCancel(ctx)
	stream := host.Agent.ExecStream(call)
	if err := stream.Send(&hostagentv1.ExecStreamRequest{Message: &hostagentv1.ExecStreamRequest_Start_{Start: start}}); err != nil && !errors.Is(err, io.EOF) {
		cancel()
		return hosts.Fault(err)
	}
	// From here on, the new goroutine sends and this one receives.
	input := make(chan error, 1)
	go func() {
		input <- a.pumpInput(ctx, ws, who, stream, cancel, patience.Default.Idle)
		cancel()
		// Over HTTP/2, the host notices a cancelled call only when its request body ends.
		_ = stream.CloseRequest()
	}()
	err = pumpOutput(ctx, ws, stream)
	cancel()
	if err != nil {
		select {
		case why := <-input:
			// The input ended the call, so its error is the cause.
			return why
		default:
		}
	}
	return err
}

// readStart reads a client's first message.
func (a *API) readStart(ctx context.Context, ws *websocket.Conn, who auth.Principal) (*hostagentv1.ExecStreamRequest_Start, error) {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	kind, b, err := ws.Read(ctx)
	if err != nil {
		return nil, errGone
	}
	if kind != websocket.MessageText {
		return nil, fault.New(fault.InvalidArgument, "the first message must be text and name the command")
	}
	var m rest.ExecStreamStart
	if err := a.parse(who, "ExecStreamStart", b, &m); err != nil {
		return nil, err
	}
	c, err := command(m.Cmd, or(m.Args, nil), or(m.Shell, false), or(m.Envs, nil), or(m.Cwd, ""), or(m.User, ""), or(m.TimeoutSeconds, 0))
	if err != nil {
		return nil, err
	}
	start := &hostagentv1.ExecStreamRequest_Start{Command: c, Stdin: or(m.Stdin, false)}
	if m.Terminal != nil {
		start.Terminal = &hostagentv1.TerminalSize{Cols: uint32(m.Terminal.Cols), Rows: uint32(m.Terminal.Rows)}
	}
	return start, nil
}

// parse decodes a message that must match a schema of the document. It holds the memory
// of that during the call.
func (a *API) parse(who auth.Principal, schema string, b []byte, v any) error {
	held := a.Memory.Reserve(who.Payer.String())
	defer held.Release()
	if err := held.GrowFor(len(b), bodyCost); err != nil {
		return err
	}
	b, err := conform(a.spec.Components.Schemas[schema].Value, b, held)
	if err != nil {
		return err
	}
	return unmarshal(b, v)
}

type execStream = connect.BidiStreamForClient[hostagentv1.ExecStreamRequest, hostagentv1.ExecStreamResponse]

// errUnread ends a call whose guest does not read its input.
var errUnread = fault.New(fault.Timeout, "the sandbox did not read its input in time")

// sendWithin calls send. If send takes longer than within, sendWithin calls end, which
// must make send return, and returns errUnread.
func sendWithin(within time.Duration, end func(), send func() error) error {
	timer := time.AfterFunc(within, end)
	err := send()
	if !timer.Stop() {
		return errUnread
	}
	return err
}

// pumpInput forwards the client's messages to the command until the client disconnects
// (errGone) or sends a wrong message. It calls end if the command does not read its input
// within the time limit, because during a send it does not notice that the client
// disconnects.
func (a *API) pumpInput(ctx context.Context, ws *websocket.Conn, who auth.Principal, stream *execStream, end func(), within time.Duration) error {
	for {
		kind, b, err := ws.Read(ctx)
		if err != nil {
			return errGone
		}
		var req hostagentv1.ExecStreamRequest
		if kind == websocket.MessageBinary {
			if len(b) == 0 || b[0] != channelStdin {
				return fault.New(fault.InvalidArgument, "a binary message must begin with byte 0, standard input")
			}
			req.Message = &hostagentv1.ExecStreamRequest_Stdin{Stdin: b[1:]}
		} else {
			var m rest.ExecStreamControl
			if err := a.parse(who, "ExecStreamControl", b, &m); err != nil {
				return err
			}
			switch m.Type {
			case rest.Resize:
				if m.Cols == nil || m.Rows == nil {
					return fault.New(fault.InvalidArgument, "resize: needs cols and rows")
				}
				req.Message = &hostagentv1.ExecStreamRequest_Resize{Resize: &hostagentv1.TerminalSize{Cols: uint32(*m.Cols), Rows: uint32(*m.Rows)}}
			case rest.Signal:
				if m.Signal == nil {
					return fault.New(fault.InvalidArgument, "signal: needs a number")
				}
				req.Message = &hostagentv1.ExecStreamRequest_Signal{Signal: *m.Signal}
			case rest.CloseStdin:
				req.Message = &hostagentv1.ExecStreamRequest_CloseStdin_{CloseStdin: &hostagentv1.ExecStreamRequest_CloseStdin{}}
			}
		}
		err = sendWithin(within, end, func() error { return stream.Send(&req) })
		if errors.Is(err, errUnread) {
			return err
		}
		if err != nil {
			// The command has ended. Keep reading, to notice when the client disconnects.
			if !errors.Is(err, io.EOF) {
				return hosts.Fault(err)
			}
		}
	}
}

// pumpOutput forwards the command's output to the client until the command ends.
func pumpOutput(ctx context.Context, ws *websocket.Conn, stream *execStream) error {
	frame := make([]byte, 0, 32<<10)
	send := func(channel byte, data []byte) error {
		for len(data) > 0 {
			n := min(len(data), maxFrame)
			frame = append(append(frame[:0], channel), data[:n]...)
			if err := ws.Write(ctx, websocket.MessageBinary, frame); err != nil {
				return errGone
			}
			data = data[n:]
		}
		return nil
	}
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return fault.New(fault.Unavailable, "the host closed the connection before the command ended")
		}
		if err != nil {
			return hosts.Fault(err)
		}
		switch m := msg.Message.(type) {
		case *hostagentv1.ExecStreamResponse_Started_:
			pid := int64(m.Started.GetPid())
			err = say(ctx, ws, rest.ExecStreamEvent{Type: rest.ExecStreamEventTypeStarted, Pid: &pid})
		case *hostagentv1.ExecStreamResponse_Stdout:
			err = send(channelStdout, m.Stdout)
		case *hostagentv1.ExecStreamResponse_Stderr:
			err = send(channelStderr, m.Stderr)
		case *hostagentv1.ExecStreamResponse_Terminal:
			err = send(channelStdout, m.Terminal)
		case *hostagentv1.ExecStreamResponse_Exited_:
			e := m.Exited
			return say(ctx, ws, rest.ExecStreamEvent{Type: rest.ExecStreamEventTypeExited, ExitCode: &e.ExitCode, Error: some(e.Error), TimedOut: &e.TimedOut})
		}
		if err != nil {
			return err
		}
	}
}
