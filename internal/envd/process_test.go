package envd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/await"
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

// next reads one event, and returns false at the stream's end.
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

// wait reads the stream to its end.
func (p *running) wait() *running {
	p.t.Helper()
	for p.next() {
	}
	if p.end == nil {
		p.t.Fatalf("the stream ended without an end event: %v", p.stream.Err())
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
		t.Error("nobody can read root's file")
	}
	// It has its own session and group, default signals, and none of the daemon's
	// descriptors. Programs report these themselves, because a shell changes its own for
	// a moment.
	out := func(cmd string, args ...string) string {
		return g.start("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: cmd, Args: args}}).wait().stdout.String()
	}
	p = g.start("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat", Args: []string{"/proc/self/stat"}}}).wait()
	f := strings.Fields(p.stdout.String())
	if pid := fmt.Sprint(p.pid); f[0] != pid || f[4] != pid || f[5] != pid {
		t.Errorf("pid, group and session are %s, %s and %s, not all %s", f[0], f[4], f[5], pid)
	}
	// Signals 32 and 33 belong to the C library: if they are ignored, the test inherited
	// that (from make, for example), and no Go program can change it.
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
		t.Errorf("a request's environment does not take precedence: %v", m)
	}
	for _, k := range []string{"", "A=B", "A\x00"} {
		_, err := g.tryStart("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "true", Envs: map[string]string{k: "x"}}})
		wantCode(t, "variable "+strconv.Quote(k), err, connect.CodeInvalidArgument)
	}
	// The request's PATH decides which command runs.
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
	// Refused requests leave nothing behind.
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

// prepared is the highest number of cgroups prepared for processes.
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

// TestProcessProtocols checks that the service also works with Connect's JSON over
// HTTP/1.1 and with gRPC.
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

// TestProcessMany starts many processes at once, and checks that they leave nothing
// behind.
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
	await.Until(t, "descriptors and goroutines disappear", func() bool { return fds() <= before+2 && runtime.NumGoroutine() <= goroutines+4 })
	if g.cgroup != "" {
		// A group is removed after the end of its process has been reported.
		await.Until(t, "the cgroups are removed", func() bool { return children(t, g.cgroup) <= prepared })
	}
}

// TestProcessHeldStart checks that a caller that only wants the result gets the start
// event together with the next one.
func TestProcessHeldStart(t *testing.T) {
	g := boot(t)
	req := as("", &pb.StartRequest{Process: sh("echo first; cat"), Stdin: new(true), Tag: new("held")})
	req.Header().Set(hostwire.HoldStart, "1")
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
			// It arrives although the process continues.
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

// inheritedIgnores returns the signals that this test ignores, bit n-1 for signal n.
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
