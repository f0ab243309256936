package sandboxes

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"connectrpc.com/connect"

	hostagentv1 "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/linear"
	"github.com/wrenn-dev/wrenn/internal/server/budget"
	"github.com/wrenn-dev/wrenn/internal/upstream"
)

// TestKept checks that output is kept in full up to its bounds, and never without memory
// for it.
func TestKept(t *testing.T) {
	memory := budget.New(budget.Share * 2 * outputCost * maxOutput)
	for name, piece := range map[string][]byte{"byte by byte": []byte("x"), "in pieces": bytes.Repeat([]byte("0123456789"), 5000)} {
		k := kept{held: memory.Reserve("a team")}
		var all []byte
		for len(all) < 300<<10 {
			k.add(piece)
			all = append(all, piece...)
			if int64(k.bytes) > memory.Used()+budget.Free {
				t.Fatalf("%s: %d bytes are kept, %d reserved", name, k.bytes, memory.Used())
			}
		}
		if !bytes.Equal(k.joined(), all) || k.dropped {
			t.Errorf("%s: %d of %d bytes are kept, dropped %v", name, len(k.joined()), len(all), k.dropped)
		}
		k.held.Release()
	}
	k := kept{held: memory.Reserve("a team")}
	k.add(make([]byte, maxOutput-1))
	k.add([]byte("ab"))
	k.add([]byte("c"))
	if got := k.joined(); len(got) != maxOutput || got[maxOutput-1] != 'a' || !k.dropped {
		t.Errorf("%d bytes are kept, dropped %v", len(got), k.dropped)
	}
	// Memory that other requests use is not available to this one, except for short
	// output.
	for range 2 {
		late := kept{held: memory.Reserve("a team")}
		late.add(make([]byte, maxOutput))
		k = late
	}
	if !k.dropped || k.bytes >= maxOutput {
		t.Errorf("%d bytes are kept without memory for them", k.bytes)
	}
	short := kept{held: memory.Reserve("a team")}
	if short.add(make([]byte, budget.Free)); short.dropped || short.bytes != budget.Free {
		t.Errorf("%d bytes of a short output are kept", short.bytes)
	}
}

func TestKeptIsLinear(t *testing.T) {
	memory := budget.New(1 << 40)
	linear.Check(t, "kept", 100_000, func(n int) {
		k := kept{held: memory.Reserve("a team")}
		for range n {
			k.add([]byte("x"))
		}
		k.joined()
	})
}

// runner runs commands like an agent: "part" breaks off before its end, and "no" cannot
// be run.
type runner struct {
	hostagentv1connect.UnimplementedHostAgentHandler
}

func (runner) Run(_ context.Context, req *connect.Request[hostagentv1.RunRequest], s *connect.ServerStream[hostagentv1.RunResponse]) error {
	if req.Msg.Command.Cmd == "no" {
		return connect.NewError(connect.CodeNotFound, errors.New("no: command not found"))
	}
	for _, out := range []string{"a", "b"} {
		if err := s.Send(&hostagentv1.RunResponse{Message: &hostagentv1.RunResponse_Stdout{Stdout: []byte(out)}}); err != nil {
			return err
		}
	}
	if req.Msg.Command.Cmd == "part" {
		return nil
	}
	return s.Send(&hostagentv1.RunResponse{Message: &hostagentv1.RunResponse_Exited{Exited: &hostagentv1.ExecStreamResponse_Exited{ExitCode: 3}}})
}

func TestRun(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentHandler(runner{}))
	connections := 0
	srv := httptest.NewUnstartedServer(mux)
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			connections++ // only the accepting goroutine writes this
		}
	}
	srv.Start()
	transport := &upstream.Transport{
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
		IdleTimeout: time.Hour, MaxIdle: 1, MaxIdlePerHost: 1, MaxHeaderBytes: 64 << 10,
	}
	agent := hostagentv1connect.NewHostAgentClient(&http.Client{Transport: transport}, srv.URL)
	for range 10 {
		var printed string
		var exited *hostagentv1.ExecStreamResponse_Exited
		err := run(t.Context(), agent, &hostagentv1.RunRequest{Command: &hostagentv1.Command{Cmd: "true"}}, func(m output) bool {
			printed += string(m.GetStdout())
			exited = m.GetExited()
			return exited == nil
		})
		if err != nil || printed != "ab" || exited.GetExitCode() != 3 {
			t.Fatalf("%v, printed %q, ended with %v", err, printed, exited)
		}
	}
	for cmd, code := range map[string]connect.Code{"part": connect.CodeUnknown, "no": connect.CodeNotFound} {
		err := run(t.Context(), agent, &hostagentv1.RunRequest{Command: &hostagentv1.Command{Cmd: cmd}}, func(m output) bool { return m.GetExited() == nil })
		if err == nil || connect.CodeOf(err) != code {
			t.Errorf("%s: %v", cmd, err)
		}
	}
	transport.Close()
	srv.Close() // This waits for the accepting goroutine.
	if connections != 1 {
		t.Errorf("12 commands took %d connections", connections)
	}
}
