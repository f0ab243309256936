package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/linger/lingertest"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// TestShortCommands starts many commands that end at once, as streams over HTTP/1.1
// through the front door. 5,000 would take an emulated guest too long.
func TestShortCommands(t *testing.T) {
	i := up(t)
	s := i.sandbox(t, client.CreateOptions{})
	all, clients := 100, 4
	if os.Getenv("WRENN_SLOW") != "" {
		all = 5000
	}
	_, port, err := net.SplitHostPort(i.listen)
	if err != nil {
		t.Fatal(err)
	}
	transport := netaddr.Transport(i.listen, false)
	defer transport.CloseIdleConnections()
	guest := processconnect.NewProcessClient(&http.Client{Transport: transport}, fmt.Sprintf("http://49983-%s.localhost:%s", s.ID, port))
	run := func() error {
		req := connect.NewRequest(&process.StartRequest{Process: &process.ProcessConfig{Cmd: "true"}})
		req.Header().Set("X-Access-Token", s.AccessToken)
		stream, err := guest.Start(t.Context(), req)
		if err != nil {
			return err
		}
		defer stream.Close()
		var end *process.ProcessEvent_EndEvent
		for stream.Receive() {
			if e := stream.Msg().GetEvent().GetEnd(); e != nil {
				end = e
			}
		}
		if err := stream.Err(); err != nil || end == nil || end.ExitCode != 0 {
			return fmt.Errorf("ended with %v, %w", end, err)
		}
		return nil
	}
	var failed atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range all / clients {
				if err := run(); err != nil && failed.Add(1) < 5 {
					t.Log(err)
				}
			}
		})
	}
	wg.Wait()
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d commands failed", n, all)
	}
}

// broken is a server that sends a part of each response: with a length under /length, and
// otherwise in chunks.
const broken = `
import socket
s = socket.create_server(("", 8000))
while True:
    c, _ = s.accept()
    r = c.recv(65536)
    head = b"Content-Length: 1000\r\n\r\n" if b" /length " in r else b"Transfer-Encoding: chunked\r\n\r\n7\r\n"
    c.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"a part\n")
    c.close()
`

// TestBrokenResponse breaks off a guest's responses: the client notices, over HTTP/1.1
// and HTTP/2, through all hops.
func TestBrokenResponse(t *testing.T) {
	i := up(t)
	c := i.client(t)
	s := i.sandbox(t, client.CreateOptions{})
	if _, err := c.Exec(t.Context(), s.ID, client.Command{Cmd: "cat >b.py; nohup python3 b.py >/dev/null 2>&1 &", Shell: true}, []byte(broken)); err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(i.listen)
	if err != nil {
		t.Fatal(err)
	}
	host, token := fmt.Sprintf("8000-%s.localhost:%s", s.ID, port), http.Header{"X-Traffic-Token": {s.TrafficToken}}
	eventually(t, func() error { // The agent waits only a while for the server.
		if resp := i.request(t, http.MethodGet, host, "/", token, nil); resp.StatusCode != http.StatusOK {
			return fmt.Errorf("the server in the guest: %s", resp.Status)
		}
		return nil
	})
	for _, h2 := range []bool{false, true} {
		transport := netaddr.Transport(i.listen, h2)
		for _, path := range []string{"/length", "/chunks"} {
			req, err := http.NewRequestWithContext(await.Context(t), http.MethodGet, "http://"+host+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header = token.Clone()
			resp, err := transport.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK || string(b) != "a part\n" || err == nil || (resp.ProtoMajor == 2) != h2 {
				t.Errorf("%s over %s: %s %q, %v", path, resp.Proto, resp.Status, b, err)
			}
		}
		transport.CloseIdleConnections()
	}
}

// TestGRPC calls the guest daemon by gRPC, whose frames and trailers need HTTP/2 at both
// ends, through all hops: a call, a stream from the guest, and a stream to it.
func TestGRPC(t *testing.T) {
	i := up(t)
	s := i.sandbox(t, client.CreateOptions{})
	_, port, err := net.SplitHostPort(i.listen)
	if err != nil {
		t.Fatal(err)
	}
	transport := netaddr.Transport(i.listen, true)
	defer transport.CloseIdleConnections()
	guest := processconnect.NewProcessClient(&http.Client{Transport: transport}, fmt.Sprintf("http://49983-%s.localhost:%s", s.ID, port), connect.WithGRPC())
	ctx := await.Context(t)
	start := connect.NewRequest(&process.StartRequest{Process: &process.ProcessConfig{Cmd: "cat"}})
	start.Header().Set("X-Access-Token", s.AccessToken)
	out, err := guest.Start(ctx, start)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if !out.Receive() || out.Msg().GetEvent().GetStart() == nil {
		t.Fatalf("%v, %v", out.Msg(), out.Err())
	}
	cat := &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: out.Msg().GetEvent().GetStart().GetPid()}}
	in := guest.StreamInput(ctx)
	in.RequestHeader().Set("X-Access-Token", s.AccessToken)
	if err := in.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Start{Start: &process.StreamInputRequest_StartEvent{Process: cat}}}); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"one\n", "two\n"} { // Each line comes back while both streams are open.
		data := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte(line)}}
		if err := in.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Data{Data: &process.StreamInputRequest_DataEvent{Input: data}}}); err != nil {
			t.Fatal(err)
		}
		for out.Receive() && out.Msg().GetEvent().GetData() == nil {
		}
		if got := string(out.Msg().GetEvent().GetData().GetStdout()); got != line {
			t.Fatalf("got %q, %v", got, out.Err())
		}
	}
	if _, err := in.CloseAndReceive(); err != nil {
		t.Error(err)
	}
	// An error, which gRPC sends in trailers.
	none := connect.NewRequest(&process.SendSignalRequest{
		Process: &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: 1 << 30}}, Signal: process.Signal_SIGNAL_SIGTERM,
	})
	none.Header().Set("X-Access-Token", s.AccessToken)
	if _, err := guest.SendSignal(ctx, none); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("a signal to no process: %v", err)
	}
}

// closesEarly is a server that responds before it has read the body, and closes the
// connection, which resets it.
const closesEarly = `
import socket
s = socket.create_server(("", 8000))
while True:
    c, _ = s.accept()
    c.recv(1000)
    c.sendall(b"HTTP/1.1 409 Conflict\r\nConnection: close\r\nContent-Length: 8\r\n\r\nnot now\n")
    c.close()
`

// TestRefusalsArrive lets each hop respond while a client sends a large body: the client
// gets the whole response, from the front door and from the server alone.
func TestRefusalsArrive(t *testing.T) {
	i := up(t)
	c, s := i.client(t), i.sandbox(t, client.CreateOptions{})
	if _, err := c.Exec(t.Context(), s.ID, client.Command{Cmd: "cat >c.py; nohup python3 c.py >/dev/null 2>&1 &", Shell: true}, []byte(closesEarly)); err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(i.listen)
	if err != nil {
		t.Fatal(err)
	}
	host := func(p int) string { return fmt.Sprintf("%d-%s.localhost:%s", p, s.ID, port) }
	key := http.Header{"X-Api-Key": {i.creds.APIKey}, "Content-Type": {"application/json"}}
	traffic := http.Header{"X-Traffic-Token": {s.TrafficToken}}
	eventually(t, func() error {
		if resp := i.request(t, http.MethodPost, host(8000), "/", traffic, nil); resp.StatusCode != http.StatusConflict {
			return fmt.Errorf("the server in the guest: %s", resp.Status)
		}
		return nil
	})
	for name, dial := range map[string]func() (net.Conn, error){
		"front door": func() (net.Conn, error) { return net.Dial("tcp", i.listen) },
		"server":     func() (net.Conn, error) { return net.Dial("unix", layout.Dir(i.dir).ServerSocket()) },
	} {
		for what, want := range map[string]struct {
			lingertest.Refusal
			tries int
		}{
			"body too large":      {lingertest.Refusal{Path: "/v1/sandboxes", Header: key, Status: 413, Contains: "payload_too_large"}, 100},
			"no key":              {lingertest.Refusal{Path: "/v1/sandboxes", Status: 401, Contains: "unauthenticated"}, 100},
			"no such route":       {lingertest.Refusal{Path: "/v1/nope", Header: key, Status: 404, Contains: "not_found"}, 30},
			"no such method":      {lingertest.Refusal{Method: "PATCH", Path: "/v1/sandboxes", Header: key, Status: 405}, 30},
			"no such sandbox":     {lingertest.Refusal{Method: "PUT", Path: "/v1/sandboxes/cl-" + strings.Repeat("0", 25) + "/files?path=/x", Header: http.Header{"X-Api-Key": key["X-Api-Key"]}, Status: 404, Contains: "not_found"}, 30},
			"port without token":  {lingertest.Refusal{Host: host(8000), Status: 401}, 30},
			"nothing listens":     {lingertest.Refusal{Host: host(81), Header: traffic, Status: 502}, 3},
			"the guest's program": {lingertest.Refusal{Host: host(8000), Header: traffic, Status: 409, Contains: "not now"}, 30},
			"the guest's daemon":  {lingertest.Refusal{Host: host(49983), Path: "/files?path=/x", Status: 401}, 30},
		} {
			t.Run(name+"/"+what, func(t *testing.T) { lingertest.Refused(t, dial, want.Refusal, want.tries) })
		}
	}
	// A connection whose first request is plain is passed to the server.
	passed := func() (net.Conn, error) {
		conn, err := net.Dial("tcp", i.listen)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nX-Traffic-Token: %s\r\n\r\n", host(8000), s.TrafficToken)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
		}
		if err == nil && resp.Close {
			err = errors.New("the connection was closed")
		}
		if err != nil {
			conn.Close()
		}
		return conn, err
	}
	for what, want := range map[string]lingertest.Refusal{
		"port without token":  {Host: host(8000), Status: 401},
		"the guest's program": {Host: host(8000), Header: traffic, Status: 409, Contains: "not now"},
	} {
		t.Run("passed/"+what, func(t *testing.T) { lingertest.Refused(t, passed, want, 30) })
	}
}
