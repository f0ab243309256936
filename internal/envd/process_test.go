package envd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/envd/process"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

// running is a process and its stream.
type running struct {
	t      *testing.T
	g      *guest
	stream *connect.ServerStreamForClient[pb.StartResponse]
	pid    uint32

	stdout, stderr, pty bytes.Buffer
	keepalives          int
	end                 *pb.ProcessEvent_EndEvent
}

func sh(script string) *pb.ProcessConfig {
	return &pb.ProcessConfig{Cmd: "sh", Args: []string{"-c", script}}
}

// start starts a process and waits for its start event.
func (g *guest) start(user string, req *pb.StartRequest, headers ...string) *running {
	g.t.Helper()
	p, err := g.tryStart(user, req, headers...)
	if err != nil {
		g.t.Fatal(err)
	}
	return p
}

func (g *guest) tryStart(user string, req *pb.StartRequest, headers ...string) (*running, error) {
	g.t.Helper()
	r := as(user, req)
	for i := 0; i < len(headers); i += 2 {
		r.Header().Set(headers[i], headers[i+1])
	}
	stream, err := g.process.Start(g.t.Context(), r)
	if err != nil {
		return nil, err
	}
	p := &running{t: g.t, g: g, stream: stream}
	if !stream.Receive() {
		stream.Close()
		return nil, stream.Err()
	}
	if p.pid = stream.Msg().GetEvent().GetStart().GetPid(); p.pid == 0 {
		g.t.Fatalf("the first event is %v", stream.Msg())
	}
	return p, nil
}

func (p *running) Close() { p.stream.Close() }

// next takes one event; false at the stream's end.
func (p *running) next() bool {
	if !p.stream.Receive() {
		return false
	}
	p.take(p.stream.Msg().GetEvent())
	return true
}

func (p *running) take(e *pb.ProcessEvent) {
	switch e := e.GetEvent().(type) {
	case *pb.ProcessEvent_Data:
		p.stdout.Write(e.Data.GetStdout())
		p.stderr.Write(e.Data.GetStderr())
		p.pty.Write(e.Data.GetPty())
	case *pb.ProcessEvent_End:
		p.end = e.End
	case *pb.ProcessEvent_Keepalive:
		p.keepalives++
	}
}

// wait follows the stream to its end.
func (p *running) wait() *running {
	p.t.Helper()
	for p.next() {
	}
	if p.end == nil {
		p.t.Fatalf("the stream ends without an end event: %v", p.stream.Err())
	}
	p.stream.Close()
	return p
}

func byPID(pid uint32) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: pid}}
}

func byTag(tag string) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}
}

func stdin(s string) *pb.ProcessInput {
	return &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(s)}}
}

func (p *running) signal(n int) error {
	_, err := p.g.process.SendSignal(p.t.Context(), as("", &pb.SendSignalRequest{Process: byPID(p.pid), Signal: pb.Signal(n)}))
	return err
}

func TestProcess(t *testing.T) {
	g := boot(t)
	p := g.start("", &pb.StartRequest{Process: sh(`printf out; printf err >&2; exit 7`)}).wait()
	if p.stdout.String() != "out" || p.stderr.String() != "err" || p.end.GetExitCode() != 7 || !p.end.GetExited() || p.end.GetStatus() != "exit status 7" || p.end.Error != nil {
		t.Errorf("stdout %q, stderr %q, end %v", &p.stdout, &p.stderr, p.end)
	}
	p = g.start("", &pb.StartRequest{Process: sh("kill -TERM $$")}).wait()
	if p.end.GetExited() || p.end.GetExitCode() != -1 || p.end.GetError() != "signal: terminated" {
		t.Errorf("end by a signal is %v", p.end)
	}
	res, err := g.process.List(t.Context(), as("", &pb.ListRequest{}))
	if err != nil || len(res.Msg.GetProcesses()) != 0 {
		t.Errorf("processes that have ended are listed: %v, %v", res, err)
	}
}

func TestProcessUser(t *testing.T) {
	g := boot(t)
	for user, want := range map[string]string{"": "65534 65534 65534", "nobody": "65534 65534 65534", "root": "0 0 0"} {
		p := g.start(user, &pb.StartRequest{Process: sh("echo $(id -u) $(id -g) $(id -G)")}).wait()
		if got := strings.TrimSpace(p.stdout.String()); got != want {
			t.Errorf("user %q runs as %q, not %q", user, got, want)
		}
	}
	p := g.start("", &pb.StartRequest{Process: sh("cat /etc/shadow")}).wait()
	if p.end.GetExitCode() == 0 {
		t.Error("nobody reads root's file")
	}
	// Its own session and group, default signals, no descriptor of the daemon's.
	// (Each is asked of a program itself: a shell changes its own for a moment.)
	out := func(cmd string, args ...string) string {
		return g.start("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: cmd, Args: args}}).wait().stdout.String()
	}
	p = g.start("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat", Args: []string{"/proc/self/stat"}}}).wait()
	f := strings.Fields(p.stdout.String())
	if pid := fmt.Sprint(p.pid); f[0] != pid || f[4] != pid || f[5] != pid {
		t.Errorf("pid, group and session are %s, %s and %s, not all %s", f[0], f[4], f[5], pid)
	}
	// Signals 32 and 33 are the C library's: what is ignored of them comes with
	// the test's own parents (make does it) and no Go program can change it.
	ignored := fmt.Sprintf("%016x", inheritedIgnores(t)&(3<<31))
	if s := out("grep", "-E", "Sig(Blk|Ign)|Umask|CapEff", "/proc/self/status"); s != "Umask:\t0022\nSigBlk:\t0000000000000000\nSigIgn:\t"+ignored+"\nCapEff:\t0000000000000000\n" {
		t.Errorf("its status is %q", s)
	}
	if s := out("cat", "/proc/self/oom_score_adj"); s != "0\n" {
		t.Errorf("its oom_score_adj is %q", s)
	}
	if s := out("ls", "/proc/self/fd"); s != "0\n1\n2\n3\n" { // 3 is ls's own
		t.Errorf("its descriptors are %q", s)
	}
}

func TestProcessEnvironment(t *testing.T) {
	g := boot(t)
	run := func(user string, env map[string]string) map[string]string {
		p := g.start(user, &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "env", Args: []string{"-0"}, Envs: env}}).wait()
		m := map[string]string{}
		for kv := range strings.SplitSeq(strings.TrimSuffix(p.stdout.String(), "\x00"), "\x00") {
			k, v, _ := strings.Cut(kv, "=")
			m[k] = v
		}
		return m
	}
	m := run("root", map[string]string{"MINE": "a b\n'c'", "EMPTY": ""})
	for k, want := range map[string]string{
		"HOME": "/root", "USER": "root", "LOGNAME": "root", "FROM": "init", "INIT": "1", "MINE": "a b\n'c'", "EMPTY": "",
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games:/usr/local/games",
	} {
		if got, ok := m[k]; !ok || got != want {
			t.Errorf("%s is %q, not %q", k, got, want)
		}
	}
	for k := range m {
		if !slices.Contains([]string{"HOME", "USER", "LOGNAME", "FROM", "INIT", "MINE", "EMPTY", "LANG", "PATH", "SHELL"}, k) {
			t.Errorf("%s comes from the daemon's own environment", k)
		}
	}
	if m := run("", map[string]string{"FROM": "request", "HOME": "/x"}); m["FROM"] != "request" || m["HOME"] != "/x" {
		t.Errorf("a request's environment does not win: %v", m)
	}
	for _, k := range []string{"", "A=B", "A\x00"} {
		_, err := g.tryStart("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "true", Envs: map[string]string{k: "x"}}})
		wantCode(t, "variable "+strconv.Quote(k), err, connect.CodeInvalidArgument)
	}
	// The request's PATH finds the command.
	if err := os.WriteFile(filepath.Join(g.dir, "mine"), []byte("#!/bin/sh\necho found\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := g.start("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "mine", Envs: map[string]string{"PATH": "/nonexistent:" + g.dir}}}).wait()
	if p.stdout.String() != "found\n" {
		t.Errorf("stdout %q", &p.stdout)
	}
}

func TestProcessRefused(t *testing.T) {
	g := boot(t)
	if err := os.WriteFile(filepath.Join(g.dir, "text"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(g.dir, "garbage"), []byte("\x00\x01garbage"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(g.dir, "roots"), 0o700); err != nil {
		t.Fatal(err)
	}
	cwd := func(s string) *pb.ProcessConfig { return &pb.ProcessConfig{Cmd: "pwd", Cwd: &s} }
	for _, c := range []struct {
		what string
		p    *pb.ProcessConfig
		want connect.Code
	}{
		{"no process", nil, connect.CodeInvalidArgument},
		{"no command", &pb.ProcessConfig{}, connect.CodeInvalidArgument},
		{"unknown command", &pb.ProcessConfig{Cmd: "nosuchcommand"}, connect.CodeNotFound},
		{"unknown file", &pb.ProcessConfig{Cmd: "/nonexistent/x"}, connect.CodeNotFound},
		{"a folder", &pb.ProcessConfig{Cmd: g.dir}, connect.CodePermissionDenied},
		{"not executable", &pb.ProcessConfig{Cmd: g.dir + "/text"}, connect.CodePermissionDenied},
		{"no program", &pb.ProcessConfig{Cmd: g.dir + "/garbage"}, connect.CodeInvalidArgument},
		{"NUL", &pb.ProcessConfig{Cmd: "echo", Args: []string{"a\x00b"}}, connect.CodeInvalidArgument},
		{"too long", &pb.ProcessConfig{Cmd: "echo", Args: []string{strings.Repeat("x", 4<<20)}}, connect.CodeInvalidArgument},
		{"cwd missing", cwd("/nonexistent"), connect.CodeInvalidArgument},
		{"cwd a file", cwd("/etc/passwd"), connect.CodeInvalidArgument},
		{"cwd NUL", cwd("/\x00"), connect.CodeInvalidArgument},
		{"cwd root's", cwd(g.dir + "/roots"), connect.CodePermissionDenied},
	} {
		_, err := g.tryStart("", &pb.StartRequest{Process: c.p})
		wantCode(t, c.what, err, c.want)
	}
	if err := os.WriteFile(filepath.Join(g.dir, "orphan"), []byte("#!/nonexistent/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ cmd, why, reason string }{
		{"nosuchcommand", "command not found", hostwire.CommandNotFound},
		{"/nonexistent/x", "No such file or directory", hostwire.CommandNotFound},
		{"./x", "No such file or directory", hostwire.CommandNotFound},
		{g.dir + "/orphan", "cannot execute: required file not found", hostwire.CommandNotFound},
		{g.dir, "Is a directory", hostwire.CommandNotExecutable},
		{"/etc/passwd/x", "Not a directory", hostwire.CommandNotExecutable},
		{g.dir + "/text", "Permission denied", hostwire.CommandNotExecutable},
		{g.dir + "/roots/x", "Permission denied", hostwire.CommandNotExecutable},
		{"/dev/null", "Permission denied", hostwire.CommandNotExecutable},
		{g.dir + "/garbage", "cannot execute binary file: Exec format error", hostwire.CommandNotExecutable},
	} {
		_, err := g.tryStart("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: c.cmd}})
		var ce *connect.Error
		if !errors.As(err, &ce) || ce.Message() != c.cmd+": "+c.why || ce.Meta().Get(hostwire.ErrorReason) != c.reason {
			t.Errorf("%s: %v, want %s for %s", c.cmd, err, c.why, c.reason)
		}
	}
	_, err := g.tryStart("", &pb.StartRequest{Process: sh("true")}, "Process-Timeout", "soon")
	wantCode(t, "timeout", err, connect.CodeInvalidArgument)
	_, err = g.tryStart("", &pb.StartRequest{Process: sh("true"), Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 1 << 20}}})
	wantCode(t, "terminal", err, connect.CodeInvalidArgument)
	// What was refused leaves nothing.
	if g.cgroup != "" {
		if n := children(t, g.cgroup); n > prepared {
			t.Errorf("%d cgroups are left", n)
		}
	}
	for in, want := range map[string]string{"": "/", "/tmp": "/tmp", "/usr/../etc": "/etc"} {
		p := g.start("", &pb.StartRequest{Process: cwd(in)}).wait()
		if got := strings.TrimSpace(p.stdout.String()); got != want {
			t.Errorf("cwd %q is %q", in, got)
		}
	}
	if got := g.start("root", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "pwd"}}).wait().stdout.String(); got != "/root\n" {
		t.Errorf("root starts in %q", got)
	}
}

// prepared is how many control groups wait for a process, at most.
const prepared = 1

func children(t *testing.T, dir string) (n int) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			n++
		}
	}
	return n
}

func TestProcessInput(t *testing.T) {
	g := boot(t)
	p := g.start("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat"}, Tag: new("cat")})
	ctx := t.Context()
	if _, err := g.process.SendInput(ctx, as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: stdin("a\x00\xff")})); err != nil {
		t.Fatal(err)
	}
	s := g.process.StreamInput(ctx)
	s.RequestHeader().Set(TokenHeader, testToken)
	_ = s.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Start{Start: &pb.StreamInputRequest_StartEvent{Process: byTag("cat")}}})
	want := "a\x00\xff"
	for i := range 100 {
		chunk := strings.Repeat(strconv.Itoa(i%10), 10_000)
		want += chunk
		if err := s.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: stdin(chunk)}}}); err != nil {
			t.Fatal(err)
		}
		if i%10 == 0 {
			_ = s.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Keepalive{}})
		}
		for p.stdout.Len() < len(want)-200_000 {
			if !p.next() {
				t.Fatal(p.stream.Err())
			}
		}
	}
	if _, err := s.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	if _, err := g.process.SendInput(ctx, as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("x")}}})); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("terminal input to a process without: %v", err)
	}
	if _, err := g.process.CloseStdin(ctx, as("", &pb.CloseStdinRequest{Process: byPID(p.pid)})); err != nil {
		t.Fatal(err)
	}
	if p.wait(); p.stdout.String() != want || p.end.GetExitCode() != 0 {
		t.Errorf("%d bytes came back of %d, end %v", p.stdout.Len(), len(want), p.end)
	}

	// Without standard input there is none to wait for, nor to write to.
	p = g.start("", &pb.StartRequest{Process: sh("cat; read x; sleep 60"), Stdin: new(false)})
	_, err := g.process.SendInput(ctx, as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: stdin("x")}))
	wantCode(t, "input to a closed stdin", err, connect.CodeFailedPrecondition)
	_, err = g.process.CloseStdin(ctx, as("", &pb.CloseStdinRequest{Process: byPID(p.pid)}))
	wantCode(t, "close of a closed stdin", err, connect.CodeFailedPrecondition)
	if err := p.signal(9); err != nil {
		t.Fatal(err)
	}
	p.wait()
	_, err = g.process.SendInput(ctx, as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: stdin("x")}))
	wantCode(t, "input to a process that has ended", err, connect.CodeNotFound)
	for _, sel := range []*pb.ProcessSelector{nil, {}, byTag("cat"), byPID(1)} {
		_, err = g.process.SendInput(ctx, as("", &pb.SendInputRequest{Process: sel, Input: stdin("x")}))
		want := connect.CodeNotFound
		if sel.GetSelector() == nil {
			want = connect.CodeInvalidArgument
		}
		wantCode(t, fmt.Sprint("selector ", sel), err, want)
	}
	s = g.process.StreamInput(ctx)
	s.RequestHeader().Set(TokenHeader, testToken)
	_ = s.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: stdin("x")}}})
	_, err = s.CloseAndReceive()
	wantCode(t, "data before start", err, connect.CodeInvalidArgument)
}

// A process that does not read its input holds up only who waits for it.
func TestProcessInputBlocked(t *testing.T) {
	g := boot(t)
	p := g.start("", &pb.StartRequest{Process: sh("exec sleep 60")})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	big := strings.Repeat("x", 1<<20)
	_, err := g.process.SendInput(ctx, as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: stdin(big)}))
	wantCode(t, "input that nobody reads", err, connect.CodeDeadlineExceeded)
	// Another that is waiting when the process ends learns of that.
	g.handles(0, processconnect.ProcessSendInputProcedure)
	done := make(chan error, 1)
	go func() {
		_, err := g.process.SendInput(context.Background(), as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: stdin(big)}))
		done <- err
	}()
	g.handles(1, processconnect.ProcessSendInputProcedure)
	if err := p.signal(15); err != nil {
		t.Fatal(err)
	}
	p.wait()
	if err := await.Recv(t, "the end of input to a process that has ended", done); err == nil {
		t.Error("input to a process that has ended is accepted")
	}
}

func TestProcessTerminal(t *testing.T) {
	g := boot(t)
	ctx := t.Context()
	p := g.start("", &pb.StartRequest{Process: sh("stty size; echo $TERM; tty; while read l; do echo got:$l; stty size; done; echo bye"), Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 101, Rows: 31}}})
	until := func(s string) {
		t.Helper()
		for !strings.Contains(p.pty.String(), s) {
			if !p.next() {
				t.Fatalf("no %q in %q: %v", s, &p.pty, p.stream.Err())
			}
		}
	}
	until("/dev/pts/")
	if !strings.Contains(p.pty.String(), "31 101\r\nxterm-256color\r\n") {
		t.Errorf("the terminal says %q", &p.pty)
	}
	if _, err := g.process.Update(ctx, as("", &pb.UpdateRequest{Process: byPID(p.pid), Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 77, Rows: 22}}})); err != nil {
		t.Fatal(err)
	}
	send := func(s string) {
		t.Helper()
		in := &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte(s)}}
		if _, err := g.process.SendInput(ctx, as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: in})); err != nil {
			t.Fatal(err)
		}
	}
	send("hällo\n")
	until("got:hällo")
	until("22 77")
	_, err := g.process.CloseStdin(ctx, as("", &pb.CloseStdinRequest{Process: byPID(p.pid)}))
	wantCode(t, "close of a terminal", err, connect.CodeFailedPrecondition)
	send("\x04")
	if p.wait(); !strings.HasSuffix(p.pty.String(), "bye\r\n") || p.end.GetExitCode() != 0 || p.stdout.Len() != 0 {
		t.Errorf("the terminal says %q, end %v", &p.pty, p.end)
	}
	// Ctrl-C reaches the foreground process; the terminal is the controlling one.
	p = g.start("", &pb.StartRequest{Process: sh("echo ready; exec sleep 60"), Pty: &pb.PTY{}})
	until("ready")
	send("\x03")
	if p.wait(); p.end.GetError() != "signal: interrupt" {
		t.Errorf("end is %v", p.end)
	}
	// A lot of output comes whole and in order.
	p = g.start("", &pb.StartRequest{Process: sh("seq 100000"), Pty: &pb.PTY{}}).wait()
	if lines := strings.Split(p.pty.String(), "\r\n"); len(lines) != 100001 || lines[99999] != "100000" {
		t.Errorf("%d lines, the last %q", len(lines)-1, lines[max(0, len(lines)-2)])
	}
	q := g.start("", &pb.StartRequest{Process: sh("exec sleep 60")})
	_, err = g.process.Update(ctx, as("", &pb.UpdateRequest{Process: byPID(q.pid), Pty: &pb.PTY{}}))
	wantCode(t, "resize without a terminal", err, connect.CodeFailedPrecondition)
	_ = q.signal(9)
	q.wait()
}

func TestProcessSignals(t *testing.T) {
	g := boot(t)
	for _, n := range []int{0, -1, 65, 1 << 20} {
		_, err := g.process.SendSignal(t.Context(), as("", &pb.SendSignalRequest{Process: byPID(1), Signal: pb.Signal(n)}))
		wantCode(t, fmt.Sprint("signal ", n), err, connect.CodeNotFound)
	}
	for _, n := range []int{1, 2, 10, 34, 64} {
		p := g.start("", &pb.StartRequest{Process: sh(fmt.Sprintf("trap 'echo caught; exit 3' %d; echo ready; while :; do sleep 0.02; done", n))})
		for !strings.Contains(p.stdout.String(), "ready") && p.next() {
		}
		for _, bad := range []int{0, -1, 65} {
			wantCode(t, fmt.Sprint("signal ", bad), p.signal(bad), connect.CodeInvalidArgument)
		}
		if err := p.signal(n); err != nil {
			t.Errorf("signal %d: %v", n, err)
		}
		if p.wait(); n != 34 && n != 64 && (p.end.GetExitCode() != 3 || !strings.Contains(p.stdout.String(), "caught")) {
			t.Errorf("signal %d: end %v, %q", n, p.end, &p.stdout)
		}
	}
	// The group gets it too.
	p := g.start("", &pb.StartRequest{Process: sh("sleep 60 & echo ready; wait; echo over")})
	for !strings.Contains(p.stdout.String(), "ready") && p.next() {
	}
	if err := p.signal(15); err != nil {
		t.Fatal(err)
	}
	p.wait()
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil && !zombie(pid) }

// zombie: in a container without an init, orphans are never reaped.
func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(rest, "Z")
}

// A kill reaches what has left the process's group and session.
func TestProcessKillDescendants(t *testing.T) {
	g := boot(t)
	if g.cgroup == "" {
		t.Skip("needs a cgroup2 mount")
	}
	script := `setsid sh -c 'echo $$ > ` + g.dir + `/pid; exec sleep 60' </dev/null >/dev/null 2>&1 & exec sleep 60`
	pid := func() int {
		b, _ := os.ReadFile(g.dir + "/pid")
		n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
		return n
	}
	for _, kill := range []func() *running{
		func() *running {
			p := g.start("", &pb.StartRequest{Process: sh(script)})
			await.Until(t, "descendant", func() bool { return pid() > 0 })
			if err := p.signal(9); err != nil {
				t.Fatal(err)
			}
			return p.wait()
		},
		func() *running {
			for timeout := 0.5; ; timeout *= 2 { // until it is long enough to begin
				p := g.start("", &pb.StartRequest{Process: sh(script)}, "Process-Timeout", fmt.Sprint(timeout)).wait()
				if p.end.GetError() != "timed out" || p.end.GetExited() {
					t.Errorf("end by timeout is %v", p.end)
				}
				if pid() > 0 {
					return p
				}
			}
		},
	} {
		_ = os.Remove(g.dir + "/pid")
		kill()
		await.Until(t, "death of the descendant", func() bool { return pid() > 0 && !alive(pid()) })
	}
	await.Until(t, "removal of cgroups", func() bool {
		g.start("", &pb.StartRequest{Process: sh("true")}).wait()
		return children(t, g.cgroup) <= 1+prepared
	})
}

// A descendant that keeps the output open does not keep the end from being
// told, and may go on writing.
func TestProcessBackground(t *testing.T) {
	g := boot(t)
	file, gate := g.dir+"/after", g.dir+"/gate"
	script := `(sleep 0.03; echo late; while [ ! -e ` + gate + ` ]; do sleep 0.05; done; echo more; echo more >&2; echo x > ` + file + `; exec sleep 60) & echo early`
	// What comes soon after the end is still told, unless the machine is too busy
	// for it to come soon.
	await.Until(t, "output that comes after the end", func() bool {
		p := g.start("", &pb.StartRequest{Process: sh(script)}).wait()
		out := p.stdout.String()
		if out != "early\n" && out != "early\nlate\n" {
			t.Fatalf("stdout %q", out)
		}
		return out == "early\nlate\n"
	})
	_ = os.WriteFile(gate, nil, 0o644)
	await.Until(t, "the descendant to outlive its output", func() bool { _, err := os.Stat(file); return err == nil })
	// One that never stops writing does not either.
	p := g.start("", &pb.StartRequest{Process: sh(`yes & echo early`)}).wait()
	if !strings.Contains(p.stdout.String(), "early\n") {
		t.Error("the process's own output is missing")
	}
}

// The process goes on when its starter goes away; another can take its output up.
func TestProcessDisconnect(t *testing.T) {
	g := boot(t)
	p := g.start("", &pb.StartRequest{Process: sh(`i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done`), Tag: new("t")})
	p.next()
	p.Close()
	g.handles(0, processconnect.ProcessStartProcedure) // It knows that nobody listens.
	res, err := g.process.List(t.Context(), as("", &pb.ListRequest{}))
	if err != nil || len(res.Msg.GetProcesses()) != 1 {
		t.Fatalf("list: %v, %v", res, err)
	}
	if i := res.Msg.GetProcesses()[0]; i.GetPid() != p.pid || i.GetTag() != "t" || i.GetConfig().GetCmd() != "sh" {
		t.Errorf("listed is %v", i)
	}
	s, err := g.process.Connect(t.Context(), as("", &pb.ConnectRequest{Process: byTag("t")}))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for n := 0; n < 3; {
		if !s.Receive() {
			t.Fatal(s.Err())
		}
		n += bytes.Count(s.Msg().GetEvent().GetData().GetStdout(), []byte("\n"))
	}
	if err := p.signal(9); err != nil {
		t.Fatal(err)
	}
	var end *pb.ProcessEvent_EndEvent
	for s.Receive() {
		end = s.Msg().GetEvent().GetEnd()
	}
	if end.GetStatus() != "signal: killed" {
		t.Errorf("end is %v, %v", end, s.Err())
	}
	s, err = g.process.Connect(t.Context(), as("", &pb.ConnectRequest{Process: byTag("t")}))
	if err == nil {
		s.Receive()
		err = s.Err()
	}
	wantCode(t, "connect to a process that has ended", err, connect.CodeNotFound)
}

// Every subscriber gets all the output, a slow one too.
func TestProcessManySubscribers(t *testing.T) {
	g := boot(t)
	const size = 24 << 20
	p := g.start("root", &pb.StartRequest{Process: sh(fmt.Sprintf("read x; head -c %d /dev/urandom | tee %s/data", size, g.dir))})
	sums := make(chan string, 3)
	var ready, all sync.WaitGroup
	for i := range 3 {
		ready.Add(1)
		all.Go(func() {
			s, err := g.process.Connect(context.Background(), as("", &pb.ConnectRequest{Process: byPID(p.pid)}))
			if err != nil || !s.Receive() {
				t.Error(err)
				ready.Done()
				return
			}
			ready.Done()
			h := sha256.New()
			var end *pb.ProcessEvent_EndEvent
			for n := 0; s.Receive(); n++ {
				end = s.Msg().GetEvent().GetEnd()
				h.Write(s.Msg().GetEvent().GetData().GetStdout())
				if i == 0 && n%50 == 0 {
					time.Sleep(5 * time.Millisecond)
				}
			}
			if s.Err() != nil || end == nil {
				t.Errorf("stream %d ends with %v, %v", i, end, s.Err())
			}
			sums <- fmt.Sprintf("%x", h.Sum(nil))
		})
	}
	ready.Wait()
	if _, err := g.process.SendInput(t.Context(), as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: stdin("\n")})); err != nil {
		t.Fatal(err)
	}
	p.wait()
	all.Wait()
	close(sums)
	data, err := os.ReadFile(g.dir + "/data")
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%x", sha256.Sum256(data))
	if fmt.Sprintf("%x", sha256.Sum256(p.stdout.Bytes())) != want || len(data) != size {
		t.Errorf("the starter got %d bytes of %d", p.stdout.Len(), len(data))
	}
	for s := range sums {
		if s != want {
			t.Error("a subscriber's output differs")
		}
	}
}

// A client that stops to read holds up its process, loses nothing, and
// neither keeps others from killing it nor the daemon's memory from staying small.
func TestProcessBackpressure(t *testing.T) {
	g := boot(t)
	p := g.start("", &pb.StartRequest{Process: sh("head -c 67108864 /dev/zero; echo done > " + g.dir + "/done")})
	time.Sleep(500 * time.Millisecond)
	if _, err := os.Stat(g.dir + "/done"); err == nil {
		t.Error("64 MiB were taken that nobody read")
	}
	total := 0
	for p.stream.Receive() {
		total += len(p.stream.Msg().GetEvent().GetData().GetStdout())
		p.end = p.stream.Msg().GetEvent().GetEnd()
	}
	if total != 67108864 || p.end.GetExitCode() != 0 || p.end == nil {
		t.Errorf("%d bytes came, end %v", total, p.end)
	}

	// Over HTTP/1.1 the client's whole connection stands still. Then it dies.
	for _, ending := range []string{"signal", "disconnect"} {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		body := `{"process":{"cmd":"yes"},"tag":"yes"}`
		frame := append([]byte{0, 0, 0, 0, byte(len(body))}, body...)
		fmt.Fprintf(c, "POST /process.Process/Start HTTP/1.1\r\nHost: x\r\nContent-Type: application/connect+json\r\nConnect-Protocol-Version: 1\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s", TokenHeader, testToken, len(frame), frame)
		if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
		if ending == "signal" {
			_, err := g.process.SendSignal(t.Context(), as("", &pb.SendSignalRequest{Process: byTag("yes"), Signal: pb.Signal_SIGNAL_SIGKILL}))
			if err != nil {
				t.Error(err)
			}
			await.Until(t, "the process to go", func() bool {
				res, err := g.process.List(t.Context(), as("", &pb.ListRequest{}))
				return err == nil && len(res.Msg.GetProcesses()) == 0
			})
			c.Close()
			continue
		}
		c.Close()
		// It goes on without its reader: what it writes is swallowed.
		s, err := g.process.Connect(t.Context(), as("", &pb.ConnectRequest{Process: byTag("yes")}))
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			if !s.Receive() {
				t.Fatal(s.Err())
			}
		}
		s.Close()
		_, err = g.process.SendSignal(t.Context(), as("", &pb.SendSignalRequest{Process: byTag("yes"), Signal: pb.Signal_SIGNAL_SIGKILL}))
		if err != nil {
			t.Error(err)
		}
	}
}

func TestProcessKeepalive(t *testing.T) {
	g := boot(t)
	begin := time.Now()
	p := g.start("", &pb.StartRequest{Process: sh("exec sleep 600")}, "Keepalive-Ping-Interval", "0.2")
	for p.keepalives < 3 && p.next() {
	}
	if d := time.Since(begin); d < 400*time.Millisecond {
		t.Errorf("3 keepalives in %v", d)
	}
	if err := p.signal(9); err != nil {
		t.Error(err)
	}
	p.wait()
	_, err := g.tryStart("", &pb.StartRequest{Process: sh("true")}, "Keepalive-Ping-Interval", "-1")
	wantCode(t, "keepalive", err, connect.CodeInvalidArgument)
}

// The deadline of the request is the process's where none is given.
func TestProcessDeadline(t *testing.T) {
	g := boot(t)
	for limit, started := 500*time.Millisecond, false; !started; limit *= 2 { // until it is long enough to begin
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		s, err := g.process.Start(ctx, as("", &pb.StartRequest{Process: sh("exec sleep 600")}))
		if err == nil {
			for s.Receive() {
				started = true
			}
		}
		cancel()
	}
	await.Until(t, "the process to go", func() bool {
		res, err := g.process.List(t.Context(), as("", &pb.ListRequest{}))
		return err == nil && len(res.Msg.GetProcesses()) == 0
	})
}

// The Connect protocol as JSON over HTTP/1.1, and gRPC, are the same service.
func TestProcessProtocols(t *testing.T) {
	g := boot(t)
	for name, client := range map[string]processconnect.ProcessClient{
		"json, HTTP/1.1": processconnect.NewProcessClient(g.plain, g.url, connect.WithProtoJSON()),
		"gRPC":           processconnect.NewProcessClient(g.client, g.url, connect.WithGRPC()),
		"gRPC-Web":       processconnect.NewProcessClient(g.plain, g.url, connect.WithGRPCWeb()),
	} {
		s, err := client.Start(t.Context(), as("", &pb.StartRequest{Process: sh("echo hi")}))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var out string
		for s.Receive() {
			out += string(s.Msg().GetEvent().GetData().GetStdout())
		}
		if out != "hi\n" || s.Err() != nil {
			t.Errorf("%s: %q, %v", name, out, s.Err())
		}
	}
}

// Many at once leave nothing behind.
func TestProcessMany(t *testing.T) {
	g := boot(t)
	fds := func() int {
		e, _ := os.ReadDir("/proc/self/fd")
		return len(e)
	}
	g.start("", &pb.StartRequest{Process: sh("true")}).wait()
	before, goroutines := fds(), runtime.NumGoroutine()
	var all sync.WaitGroup
	for i := range 40 {
		all.Go(func() {
			req := &pb.StartRequest{Process: sh(fmt.Sprintf("echo %d; echo %d >&2; exit %d", i, i, i))}
			if i%4 == 0 {
				req.Pty = &pb.PTY{}
			}
			p, err := g.tryStart("", req)
			if err != nil {
				t.Error(err)
				return
			}
			p.wait()
			if want := fmt.Sprintf("%d\n", i); p.end.GetExitCode() != int32(i) || (i%4 != 0 && (p.stdout.String() != want || p.stderr.String() != want)) {
				t.Errorf("%d: %q, %q, %v", i, &p.stdout, &p.stderr, p.end)
			}
		})
	}
	all.Wait()
	await.Until(t, "descriptors and goroutines to go", func() bool { return fds() <= before+2 && runtime.NumGoroutine() <= goroutines+4 })
	if g.cgroup != "" {
		// A group is removed after the end of its process has been reported.
		await.Until(t, "control groups to go", func() bool { return children(t, g.cgroup) <= prepared })
	}
}

// Root in the guest may remove any empty group, the prepared one too.
func TestProcessGroupRemoved(t *testing.T) {
	g := boot(t)
	if g.cgroup == "" {
		t.Skip("needs a cgroup2 mount")
	}
	for range 3 {
		await.Until(t, "a prepared control group", func() bool { return children(t, g.cgroup) == prepared })
		entries, err := os.ReadDir(g.cgroup)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.IsDir() {
				if err := os.Remove(filepath.Join(g.cgroup, e.Name())); err != nil {
					t.Fatal(err)
				}
			}
		}
		if p := g.start("", &pb.StartRequest{Process: sh("echo $(($$ > 0))")}).wait(); p.stdout.String() != "1\n" || p.end.GetExitCode() != 0 {
			t.Errorf("%q, %v", &p.stdout, p.end)
		}
	}
}

// A caller who wants the outcome alone gets the start event with the next one.
func TestProcessHeldStart(t *testing.T) {
	g := boot(t)
	req := as("", &pb.StartRequest{Process: sh("echo first; cat"), Stdin: new(true), Tag: new("held")})
	req.Header().Set(process.HoldStartHeader, "1")
	stream, err := g.process.Start(await.Context(t), req)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var got []string
	for stream.Receive() {
		switch e := stream.Msg().GetEvent().GetEvent().(type) {
		case *pb.ProcessEvent_Start:
			got = append(got, "start")
		case *pb.ProcessEvent_Data:
			got = append(got, string(e.Data.GetStdout()))
			// It reaches a caller although the process goes on.
			in := &pb.CloseStdinRequest{Process: &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: "held"}}}
			if _, err := g.process.CloseStdin(t.Context(), as("", in)); err != nil {
				t.Fatal(err)
			}
		case *pb.ProcessEvent_End:
			got = append(got, e.End.GetStatus())
		}
	}
	if want := []string{"start", "first\n", "exit status 0"}; stream.Err() != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v", got, stream.Err())
	}
}

// inheritedIgnores is the set of signals that this test itself ignores, bit
// n-1 for signal n.
func inheritedIgnores(t *testing.T) uint64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "SigIgn:\t")
	var set uint64
	if _, err := fmt.Sscanf(rest, "%x", &set); err != nil {
		t.Fatalf("read SigIgn: %v", err)
	}
	return set
}
