package agent_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
)

func testExec(t *testing.T, h *host, sandbox string) {
	binary, _ := io.ReadAll(&pattern{n: 1 << 20})
	for name, test := range map[string]struct {
		cmd   *pb.Command
		stdin []byte
		want  *pb.ExecResponse
	}{
		"output":      {sh("echo out; echo err >&2; exit 7"), nil, &pb.ExecResponse{Stdout: []byte("out\n"), Stderr: []byte("err\n"), ExitCode: 7}},
		"binary":      {&pb.Command{Cmd: "cat"}, binary, &pb.ExecResponse{Stdout: binary}},
		"user":        {&pb.Command{Cmd: "id", Args: []string{"-un"}}, nil, &pb.ExecResponse{Stdout: []byte("user\n")}},
		"other user":  {&pb.Command{Cmd: "id", Args: []string{"-un"}, User: "root"}, nil, &pb.ExecResponse{Stdout: []byte("root\n")}},
		"folder":      {&pb.Command{Cmd: "pwd", Cwd: "/usr/share"}, nil, &pb.ExecResponse{Stdout: []byte("/usr/share\n")}},
		"home":        {&pb.Command{Cmd: "pwd"}, nil, &pb.ExecResponse{Stdout: []byte("/home/user\n")}},
		"environment": {&pb.Command{Cmd: "sh", Args: []string{"-c", "echo $FROM $OWN"}, Envs: map[string]string{"OWN": "it's mine"}}, nil, &pb.ExecResponse{Stdout: []byte("sandbox it's mine\n")}},
		"signal":      {sh("kill -9 $$"), nil, &pb.ExecResponse{ExitCode: 137, Error: "signal: killed"}},
		"python":      {&pb.Command{Cmd: "python3", Args: []string{"-"}}, []byte("print(6*7)"), &pb.ExecResponse{Stdout: []byte("42\n")}},
		"host name":   {&pb.Command{Cmd: "hostname"}, nil, &pb.ExecResponse{Stdout: []byte(sandbox + "\n")}},
	} {
		t.Run(name, func(t *testing.T) {
			got := h.exec(t, sandbox, test.cmd, test.stdin)
			if !bytes.Equal(got.GetStdout(), test.want.GetStdout()) || !bytes.Equal(got.GetStderr(), test.want.GetStderr()) ||
				got.GetExitCode() != test.want.GetExitCode() || got.GetError() != test.want.GetError() || got.GetTruncated() {
				t.Errorf("got %.300v", got)
			}
		})
	}
	kernel := h.exec(t, sandbox, &pb.Command{Cmd: "cat", Args: []string{"/proc/sys/kernel/random/boot_id"}}, nil)
	if string(kernel.GetStdout()) == read("/proc/sys/kernel/random/boot_id") {
		t.Error("the sandbox runs on the host's kernel")
	}

	t.Run("time-out", func(t *testing.T) {
		cmd := sh("setsid sleep 601 & sleep 601")
		cmd.TimeoutSeconds = 1
		if got := h.exec(t, sandbox, cmd, nil); !got.GetTimedOut() || got.GetError() == "" {
			t.Errorf("got %v", got)
		}
		if got := h.exec(t, sandbox, sh("pgrep -c -f 'sleep 60[1]' || ps ax | grep -c 'sleep 60[1]'"), nil); strings.TrimSpace(string(got.GetStdout())) != "0" && !strings.HasPrefix(string(got.GetStdout()), "0") {
			t.Errorf("a process that it started still runs: %q %q", got.GetStdout(), got.GetStderr())
		}
	})
	t.Run("too much output", func(t *testing.T) {
		got := h.exec(t, sandbox, sh("head -c 20000000 /dev/zero"), nil)
		if len(got.GetStdout()) != 16<<20 || !got.GetTruncated() {
			t.Errorf("%d bytes, truncated: %v", len(got.GetStdout()), got.GetTruncated())
		}
	})
	for name, test := range map[string]struct {
		cmd  *pb.Command
		want connect.Code
	}{
		"no such command": {&pb.Command{Cmd: "no-such-command"}, connect.CodeNotFound},
		"no such user":    {&pb.Command{Cmd: "true", User: "nobody-here"}, connect.CodeInvalidArgument},
		"no such folder":  {&pb.Command{Cmd: "true", Cwd: "/no/such"}, connect.CodeInvalidArgument},
	} {
		_, err := h.Exec(t.Context(), connect.NewRequest(&pb.ExecRequest{SandboxId: sandbox, Command: test.cmd}))
		if connect.CodeOf(err) != test.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// stream starts a command and streams its input and output.
func (h *host) stream(t *testing.T, start *pb.ExecStreamRequest_Start) (*connect.BidiStreamForClient[pb.ExecStreamRequest, pb.ExecStreamResponse], context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), await.Hang)
	s := h.ExecStream(ctx)
	if err := s.Send(&pb.ExecStreamRequest{Message: &pb.ExecStreamRequest_Start_{Start: start}}); err != nil {
		t.Fatal(err)
	}
	m, err := s.Receive()
	if err != nil || m.GetStarted().GetPid() == 0 {
		t.Fatalf("started as %v, %v", m, err)
	}
	return s, func() {
		cancel()
		// The transport notices the cancelled context only while it does not wait for
		// more of the request.
		_ = s.CloseRequest()
	}
}

func stdin(data string) *pb.ExecStreamRequest {
	return &pb.ExecStreamRequest{Message: &pb.ExecStreamRequest_Stdin{Stdin: []byte(data)}}
}

func testStream(t *testing.T, h *host, sandbox string) {
	t.Run("input", func(t *testing.T) {
		s, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: sh("while read x; do echo got $x; done; echo end >&2; exit 3"), Stdin: true})
		defer cancel()
		for _, line := range []string{"one", "two"} {
			if err := s.Send(stdin(line + "\n")); err != nil {
				t.Fatal(err)
			}
			if m, err := s.Receive(); err != nil || string(m.GetStdout()) != "got "+line+"\n" {
				t.Fatalf("%v %v", m, err)
			}
		}
		if err := s.Send(&pb.ExecStreamRequest{Message: &pb.ExecStreamRequest_CloseStdin_{CloseStdin: &pb.ExecStreamRequest_CloseStdin{}}}); err != nil {
			t.Fatal(err)
		}
		if m, err := s.Receive(); err != nil || string(m.GetStderr()) != "end\n" {
			t.Fatalf("%v %v", m, err)
		}
		if m, err := s.Receive(); err != nil || m.GetExited().GetExitCode() != 3 {
			t.Fatalf("%v %v", m, err)
		}
		// The client's side of the stream is still open.
		if _, err := s.Receive(); !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %v", err)
		}
	})
	t.Run("one connection", func(t *testing.T) {
		// The guest lists the connections of its daemon; this command has one of them.
		peers := map[string]bool{}
		const runs = 8
		for range runs {
			ctx, cancel := context.WithTimeout(t.Context(), await.Hang)
			s, err := h.Run(ctx, connect.NewRequest(&pb.RunRequest{SandboxId: sandbox, Command: sh("ss -Htn state established '( sport = :49983 )'")}))
			if err != nil {
				t.Fatal(err)
			}
			var listed strings.Builder
			ended := false
			for !ended && s.Receive() {
				listed.Write(s.Msg().GetStdout())
				ended = s.Msg().GetExited() != nil
			}
			if !ended {
				t.Fatalf("the stream has no exit: %v", s.Err())
			}
			cancel() // Cancel at once, before the end of the stream.
			_ = s.Close()
			n := len(peers)
			for line := range strings.Lines(listed.String()) {
				peers[strings.Fields(line)[3]] = true
			}
			if n == 0 && len(peers) == 0 {
				t.Fatalf("the guest lists %q", listed.String())
			}
		}
		if len(peers) >= runs/2 { // This test is not the guest's only client.
			t.Errorf("%d commands came over %d connections", runs, len(peers))
		}
	})
	t.Run("terminal", func(t *testing.T) {
		s, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: sh("stty size; read x; stty size; sleep 600"), Terminal: &pb.TerminalSize{Cols: 90, Rows: 30}})
		defer cancel()
		var seen strings.Builder
		await := func(text string) *pb.ExecStreamResponse {
			t.Helper()
			for {
				m, err := s.Receive()
				if err != nil {
					t.Fatalf("%v after %q, waiting for %q", err, seen.String(), text)
				}
				seen.Write(m.GetTerminal())
				if m.GetExited() != nil || text != "" && strings.Contains(seen.String(), text) {
					return m
				}
			}
		}
		await("30 90")
		for _, m := range []*pb.ExecStreamRequest{
			{Message: &pb.ExecStreamRequest_Resize{Resize: &pb.TerminalSize{Cols: 100, Rows: 40}}}, stdin("go\n"),
		} {
			if err := s.Send(m); err != nil {
				t.Fatal(err)
			}
		}
		await("40 100")
		if err := s.Send(&pb.ExecStreamRequest{Message: &pb.ExecStreamRequest_Signal{Signal: int32(syscall.SIGTERM)}}); err != nil {
			t.Fatal(err)
		}
		if m := await(""); !strings.Contains(m.GetExited().GetError(), "terminated") {
			t.Errorf("ended as %v", m)
		}
	})
	t.Run("client goes", func(t *testing.T) {
		_, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: sh("echo $$ > /tmp/left; exec sleep 602")})
		alive := func() bool {
			return h.exec(t, sandbox, sh("kill -0 $(cat /tmp/left)"), nil).GetExitCode() == 0
		}
		await.Until(t, "the command starts", alive)
		cancel()
		await.Until(t, "the command ends with its client", func() bool { return !alive() })
	})
	t.Run("much output to a slow client", func(t *testing.T) {
		s, cancel := h.stream(t, &pb.ExecStreamRequest_Start{SandboxId: sandbox, Command: sh("head -c 8000000 /dev/zero")})
		defer cancel()
		n := 0
		for {
			m, err := s.Receive()
			if err != nil {
				t.Fatal(err)
			}
			if n += len(m.GetStdout()); n < 1<<18 {
				h.exec(t, sandbox, sh("true"), nil) // while the output waits for its client
			}
			if m.GetExited() != nil {
				break
			}
		}
		if n != 8000000 {
			t.Errorf("%d bytes came", n)
		}
	})
}
