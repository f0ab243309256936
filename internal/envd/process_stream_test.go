package envd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
)

func TestProcessInput(t *testing.T) {
	g := boot(t)
	p := g.start("", &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "cat"}, Tag: new("cat")})
	ctx := t.Context()
	if _, err := g.process.SendInput(ctx, as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: stdin("a\x00\xff")})); err != nil {
		t.Fatal(err)
	}
	s := g.process.StreamInput(ctx)
	s.RequestHeader().Set(hostwire.AccessToken, testToken)
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
		t.Errorf("terminal input to a process without a terminal: %v", err)
	}
	if _, err := g.process.CloseStdin(ctx, as("", &pb.CloseStdinRequest{Process: byPID(p.pid)})); err != nil {
		t.Fatal(err)
	}
	if p.wait(); p.stdout.String() != want || p.end.GetExitCode() != 0 {
		t.Errorf("%d bytes came back of %d, end %v", p.stdout.Len(), len(want), p.end)
	}

	// Without standard input, reads end at once and writes are refused.
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
	s.RequestHeader().Set(hostwire.AccessToken, testToken)
	_ = s.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: stdin("x")}}})
	_, err = s.CloseAndReceive()
	wantCode(t, "data before start", err, connect.CodeInvalidArgument)
}

// TestProcessInputBlocked checks that a process that does not read its input blocks only
// the callers who write to it.
func TestProcessInputBlocked(t *testing.T) {
	g := boot(t)
	p := g.start("", &pb.StartRequest{Process: sh("exec sleep 60")})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	big := strings.Repeat("x", 1<<20)
	_, err := g.process.SendInput(ctx, as("", &pb.SendInputRequest{Process: byPID(p.pid), Input: stdin(big)}))
	wantCode(t, "input that nobody reads", err, connect.CodeDeadlineExceeded)
	// A caller that still waits when the process ends gets an error.
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
		t.Error("a process that has ended accepts input")
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
	// Ctrl-C reaches the foreground process, because this is its controlling terminal.
	p = g.start("", &pb.StartRequest{Process: sh("echo ready; exec sleep 60"), Pty: &pb.PTY{}})
	until("ready")
	send("\x03")
	if p.wait(); p.end.GetError() != "signal: interrupt" {
		t.Errorf("end is %v", p.end)
	}
	// Much output arrives complete and in order.
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

// TestProcessDisconnect checks that a process continues when its starter disconnects, and
// that another caller can take over its output.
func TestProcessDisconnect(t *testing.T) {
	g := boot(t)
	p := g.start("", &pb.StartRequest{Process: sh(`i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done`), Tag: new("t")})
	p.next()
	p.Close()
	g.handles(0, processconnect.ProcessStartProcedure) // Now the daemon knows that nobody listens.
	res, err := g.process.List(t.Context(), as("", &pb.ListRequest{}))
	if err != nil || len(res.Msg.GetProcesses()) != 1 {
		t.Fatalf("list: %v, %v", res, err)
	}
	if i := res.Msg.GetProcesses()[0]; i.GetPid() != p.pid || i.GetTag() != "t" || i.GetConfig().GetCmd() != "sh" {
		t.Errorf("the list has %v", i)
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

// TestProcessManySubscribers checks that every subscriber gets all output, including a
// slow one.
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
				if i == 0 && n%50 == 0 { // slower than the others
					_, _ = g.process.List(context.Background(), as("", &pb.ListRequest{}))
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

// TestProcessBackpressure checks that a client that stops reading blocks its process and
// loses nothing, while others can still kill it and the daemon's memory stays small.
func TestProcessBackpressure(t *testing.T) {
	g := boot(t)
	p := g.start("", &pb.StartRequest{Process: sh("exec head -c 67108864 /dev/zero")})
	if n := g.blocks(p.pid); n >= 67108864 {
		t.Errorf("the daemon accepted %d bytes that nobody read", n)
	}
	total := 0
	for p.stream.Receive() {
		total += len(p.stream.Msg().GetEvent().GetData().GetStdout())
		p.end = p.stream.Msg().GetEvent().GetEnd()
	}
	if total != 67108864 || p.end.GetExitCode() != 0 || p.end == nil {
		t.Errorf("%d bytes came, end %v", total, p.end)
	}

	// Over HTTP/1.1 the client's whole connection is blocked. Then the process or the
	// client ends.
	for _, ending := range []string{"signal", "disconnect"} {
		c, err := net.Dial("tcp", g.addr)
		if err != nil {
			t.Fatal(err)
		}
		body := `{"process":{"cmd":"yes"},"tag":"yes"}`
		frame := append([]byte{0, 0, 0, 0, byte(len(body))}, body...)
		fmt.Fprintf(c, "POST /process.Process/Start HTTP/1.1\r\nHost: x\r\nContent-Type: application/connect+json\r\nConnect-Protocol-Version: 1\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s", hostwire.AccessToken, testToken, len(frame), frame)
		if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		res, err := g.process.List(t.Context(), as("", &pb.ListRequest{}))
		if err != nil || len(res.Msg.GetProcesses()) != 1 {
			t.Fatalf("%v, %v", res, err)
		}
		g.blocks(res.Msg.GetProcesses()[0].GetPid())
		if ending == "signal" {
			_, err := g.process.SendSignal(t.Context(), as("", &pb.SendSignalRequest{Process: byTag("yes"), Signal: pb.Signal_SIGNAL_SIGKILL}))
			if err != nil {
				t.Error(err)
			}
			await.Until(t, "the process ends", func() bool {
				res, err := g.process.List(t.Context(), as("", &pb.ListRequest{}))
				return err == nil && len(res.Msg.GetProcesses()) == 0
			})
			c.Close()
			continue
		}
		c.Close()
		// Without its reader, the process continues, and its output is discarded.
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

// blocks waits until a process writes nothing while the daemon answers many requests, because
// nobody reads its output. It returns the number of bytes that the process has written.
func (g *guest) blocks(pid uint32) (written int64) {
	g.t.Helper()
	await.Until(g.t, "the process blocks", func() bool {
		before := written
		for range 30 {
			if _, err := g.process.List(g.t.Context(), as("", &pb.ListRequest{})); err != nil {
				g.t.Fatal(err)
			}
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
		if err != nil {
			g.t.Fatalf("the process does not block: %v", err)
		}
		if _, err := fmt.Sscanf(string(text), "rchar: %d\nwchar: %d", new(int64), &written); err != nil {
			g.t.Fatal(err)
		}
		return written > 0 && written == before
	})
	return written
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
