package server_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/coder/websocket"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// Exec answers servers of the previous release. This release calls streams, whose memory
// is bounded.
func (a *agent) Exec(context.Context, *connect.Request[hostagentv1.ExecRequest]) (*connect.Response[hostagentv1.ExecResponse], error) {
	return nil, connect.NewError(connect.CodeUnimplemented, errors.New("only servers of the previous release call this: the guest decides how long the response is"))
}

// exec runs a command to its end. It knows: cat, which prints its input; say, its
// arguments; bytes, every byte value; env, its environment; exit N; hang, which runs to
// its timeout; lost, a host failure; missing and unfit, a guest's errors for commands
// that it does not have or cannot execute.
func (a *agent) exec(c *hostagentv1.Command, stdin []byte) (*hostagentv1.ExecResponse, error) {
	var r hostagentv1.ExecResponse
	switch c.Cmd {
	case "cat":
		r.Stdout = stdin
	case "say", "sh":
		r.Stdout = []byte(strings.Join(c.Args, " "))
	case "bytes":
		for i := range 256 {
			r.Stdout = append(r.Stdout, byte(i))
		}
		r.Stderr = []byte("plain")
	case "flood": // prints a character N times on stdout and on stderr
		n, _ := strconv.Atoi(c.Args[1])
		r.Stdout = bytes.Repeat([]byte(c.Args[0]), n)
		r.Stderr = r.Stdout
	case "env":
		r.Stdout = []byte(c.Envs["A"] + " " + c.Cwd + " " + c.User + " " + strconv.Itoa(int(c.TimeoutSeconds)))
	case "exit":
		n, _ := strconv.Atoi(c.Args[0])
		r.ExitCode = int32(n)
	case "hang":
		r.TimedOut, r.Error, r.ExitCode = true, "timed out", 137
	case "lost":
		return nil, connect.NewError(connect.CodeInternal, errors.New("open /secret/path: broken"))
	case "missing", "unfit":
		code, reason := connect.CodeNotFound, hostwire.CommandNotFound
		if c.Cmd == "unfit" {
			code, reason = connect.CodePermissionDenied, hostwire.CommandNotExecutable
		}
		err := connect.NewError(code, errors.New(c.Cmd+": as a shell says"))
		err.Meta().Set(hostwire.ErrorReason, reason)
		return nil, err
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("no such command"))
	}
	return &r, nil
}

// ExecStream knows, without a timeout: cat, which prints its input on stdout and its
// length on stderr when it ends; tty, which prints on the terminal; hang, which waits.
// With a timeout it knows the commands of exec.
func (a *agent) ExecStream(ctx context.Context, s *connect.BidiStream[hostagentv1.ExecStreamRequest, hostagentv1.ExecStreamResponse]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return connect.NewError(connect.CodeInvalidArgument, errors.New("the first message is not a start"))
	}
	if err := a.usable(start.SandboxId); err != nil {
		return err
	}
	if start.Command.Cmd == "/bin/sh" {
		return a.shell(ctx, start, s)
	}
	if err := s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Started_{Started: &hostagentv1.ExecStreamResponse_Started{Pid: 42}}}); err != nil {
		return err
	}
	if start.Command.TimeoutSeconds > 0 && start.Terminal == nil {
		return a.toEnd(start, s)
	}
	exit := func(code int32) error {
		return s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Exited_{Exited: &hostagentv1.ExecStreamResponse_Exited{ExitCode: code}}})
	}
	n := 0
	for {
		m, err := s.Receive()
		if err != nil {
			a.mu.Lock()
			a.resized = append(a.resized, "gone")
			a.mu.Unlock()
			return err
		}
		switch m := m.Message.(type) {
		case *hostagentv1.ExecStreamRequest_Stdin:
			n += len(m.Stdin)
			out := &hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Stdout{Stdout: m.Stdin}}
			if start.Terminal != nil {
				out.Message = &hostagentv1.ExecStreamResponse_Terminal{Terminal: m.Stdin}
			}
			if err := s.Send(out); err != nil {
				return err
			}
		case *hostagentv1.ExecStreamRequest_CloseStdin_:
			if err := s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Stderr{Stderr: []byte(strconv.Itoa(n))}}); err != nil {
				return err
			}
			return exit(7)
		case *hostagentv1.ExecStreamRequest_Resize:
			a.mu.Lock()
			a.resized = append(a.resized, strconv.Itoa(int(m.Resize.Cols))+"x"+strconv.Itoa(int(m.Resize.Rows)))
			a.mu.Unlock()
		case *hostagentv1.ExecStreamRequest_Signal:
			return exit(128 + m.Signal)
		}
	}
}

// piece is how much output the agent sends in a message, in bytes.
const piece = 32 << 10

// Run implements hostagentv1connect.HostAgentHandler. An agent of the previous release
// does not have the call.
func (a *agent) Run(ctx context.Context, req *connect.Request[hostagentv1.RunRequest], s *connect.ServerStream[hostagentv1.RunResponse]) error {
	if a.before.Load() {
		return connect.NewError(connect.CodeUnimplemented, errors.New("no such call"))
	}
	if !a.has(req.Msg.SandboxId) {
		return connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	if err := a.usable(req.Msg.SandboxId); err != nil {
		return err
	}
	if err := a.decide(ctx, "run"); err != nil {
		return err
	}
	r, err := a.exec(req.Msg.Command, nil)
	if err != nil {
		return err
	}
	for out := range slices.Chunk(r.Stdout, piece) {
		if err := s.Send(&hostagentv1.RunResponse{Message: &hostagentv1.RunResponse_Stdout{Stdout: out}}); err != nil {
			return err
		}
	}
	for out := range slices.Chunk(r.Stderr, piece) {
		if err := s.Send(&hostagentv1.RunResponse{Message: &hostagentv1.RunResponse_Stderr{Stderr: out}}); err != nil {
			return err
		}
	}
	return s.Send(&hostagentv1.RunResponse{Message: &hostagentv1.RunResponse_Exited{Exited: exitOf(r)}})
}

// toEnd reads a command's input, runs it, and sends its output.
func (a *agent) toEnd(start *hostagentv1.ExecStreamRequest_Start, s *connect.BidiStream[hostagentv1.ExecStreamRequest, hostagentv1.ExecStreamResponse]) error {
	var stdin []byte
	for open := start.Stdin; open; {
		m, err := s.Receive()
		if err != nil {
			return err
		}
		stdin = append(stdin, m.GetStdin()...)
		open = m.GetCloseStdin() == nil
	}
	r, err := a.exec(start.Command, stdin)
	if err != nil {
		return err
	}
	for out := range slices.Chunk(r.Stdout, piece) {
		if err := s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Stdout{Stdout: out}}); err != nil {
			return err
		}
	}
	for out := range slices.Chunk(r.Stderr, piece) {
		if err := s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Stderr{Stderr: out}}); err != nil {
			return err
		}
	}
	return s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Exited_{Exited: exitOf(r)}})
}

func exitOf(r *hostagentv1.ExecResponse) *hostagentv1.ExecStreamResponse_Exited {
	return &hostagentv1.ExecStreamResponse_Exited{ExitCode: r.ExitCode, Error: r.Error, TimedOut: r.TimedOut}
}

// shell runs a line: "exit N" ends with N; "hang" waits until it is cancelled or times
// out; any other line prints itself, and counts as the call "run" of agent.on.
func (a *agent) shell(ctx context.Context, start *hostagentv1.ExecStreamRequest_Start, s *connect.BidiStream[hostagentv1.ExecStreamRequest, hostagentv1.ExecStreamResponse]) error {
	line := start.Command.Args[1]
	exited := &hostagentv1.ExecStreamResponse_Exited{}
	if test := strings.HasPrefix(line, "test "); test || strings.HasPrefix(line, "command -v ") {
		if test {
			exited.ExitCode = 1 // there is apt-get, and no folder
		}
		return s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Exited_{Exited: exited}})
	}
	a.mu.Lock()
	a.ran = append(a.ran, line)
	a.mu.Unlock()
	if err := s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Stdout{Stdout: []byte(line + "\n")}}); err != nil {
		return err
	}
	switch code, exits := strings.CutPrefix(line, "exit "); {
	case exits:
		n, _ := strconv.Atoi(code)
		exited.ExitCode = int32(n)
	case line == "hang":
		var late <-chan time.Time
		if n := start.Command.TimeoutSeconds; n > 0 {
			late = time.After(time.Duration(n) * time.Second) // real time: the fake's time limit for a command
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-late:
			exited.TimedOut, exited.ExitCode = true, 137
		}
	default:
		if err := a.decide(ctx, "run"); err != nil {
			return err
		}
	}
	return s.Send(&hostagentv1.ExecStreamResponse{Message: &hostagentv1.ExecStreamResponse_Exited_{Exited: exited}})
}

// lines returns the lines run since its last call.
func (a *agent) lines() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	ran := a.ran
	a.ran = nil
	return ran
}

// breakAfter is a path whose download breaks off after some bytes.
const breakAfter = "/break"

func (a *agent) ReadFileStream(ctx context.Context, req *connect.Request[hostagentv1.ReadFileStreamRequest], s *connect.ServerStream[hostagentv1.ReadFileStreamResponse]) error {
	m := req.Msg
	if err := a.usable(m.File.SandboxId); err != nil {
		return err
	}
	a.mu.Lock()
	content, ok := a.files[m.File.Path]
	a.mu.Unlock()
	if !ok {
		return connect.NewError(connect.CodeNotFound, errors.New("no such file: "+m.File.Path))
	}
	size := int64(len(content))
	if m.Archive || m.File.Path == "/proc/kallsyms" || m.File.Path == "/tmp/large" && m.Offset == 0 && m.Length == 0 {
		size = -1
	}
	if m.File.Path == "/proc/status" {
		size = 0
	}
	if err := s.Send(&hostagentv1.ReadFileStreamResponse{Message: &hostagentv1.ReadFileStreamResponse_Start_{Start: &hostagentv1.ReadFileStreamResponse_Start{Size: size}}}); err != nil {
		return err
	}
	content = content[min(m.Offset, int64(len(content))):]
	if m.Length > 0 {
		content = content[:min(m.Length, int64(len(content)))]
	}
	for part := range bytes.Lines(content) {
		if err := s.Send(&hostagentv1.ReadFileStreamResponse{Message: &hostagentv1.ReadFileStreamResponse_Chunk{Chunk: part}}); err != nil {
			return err
		}
		if m.File.Path == breakAfter {
			return connect.NewError(connect.CodeUnavailable, errors.New("the guest went away"))
		}
	}
	return nil
}

func (a *agent) WriteFileStream(ctx context.Context, s *connect.ClientStream[hostagentv1.WriteFileStreamRequest]) (*connect.Response[hostagentv1.WriteFileStreamResponse], error) {
	var ref *hostagentv1.FileRef
	var content bytes.Buffer
	var n int64
	for s.Receive() {
		if start := s.Msg().GetStart(); start != nil {
			if err := a.usable(start.File.SandboxId); err != nil {
				return nil, err
			}
			if ref = start.File; ref.Path == "/full" {
				return nil, connect.NewError(connect.CodeResourceExhausted, errors.New("no space left on the disk"))
			}
			continue
		}
		n += int64(len(s.Msg().GetChunk()))
		if ref.Path != "/dev/null" {
			content.Write(s.Msg().GetChunk())
		}
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.files[ref.Path] = content.Bytes()
	return connect.NewResponse(&hostagentv1.WriteFileStreamResponse{File: &hostagentv1.FileInfo{Path: ref.Path, Name: filepath.Base(ref.Path), Size: n}}), nil
}

// guestHandler serves the sandboxes' ports in the proxy's tests. Paths have the form
// /proxy/{sandbox}/{port}/…
func guestHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		parts := strings.SplitN(r.URL.EscapedPath(), "/", 5)
		switch "/" + parts[4] {
		case "/ws":
			ws, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
			if err != nil {
				return
			}
			defer ws.CloseNow()
			for {
				kind, b, err := ws.Read(r.Context())
				if err != nil {
					return
				}
				if err := ws.Write(r.Context(), kind, b); err != nil {
					return
				}
			}
		case "/zeros":
			n, _ := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
			w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
			io.CopyN(w, zeros{}, n)
		case "/count":
			n, _ := io.Copy(io.Discard, r.Body)
			io.WriteString(w, strconv.FormatInt(n, 10))
		case "/tick":
			io.WriteString(w, "first")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case "/own-id":
			w.Header().Set("X-Request-Id", "the program's")
		case "/hijack":
			c, _, _ := w.(http.Hijacker).Hijack()
			c.(interface{ CloseWrite() error }).CloseWrite()
			c.Close()
		default:
			w.Header().Set("X-Path", r.RequestURI)
			w.Header().Set("X-Host", r.Host)
			w.Header()["X-Saw"] = nil
			for name, v := range r.Header {
				w.Header().Add("X-Saw", name+"="+strings.Join(v, ","))
			}
			w.WriteHeader(http.StatusTeapot)
		}
	})
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}
