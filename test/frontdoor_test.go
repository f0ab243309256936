package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// TestShortCommands starts many commands that end at once, as streams over
// HTTP/1.1 through the front door; 5,000 take an emulated guest long.
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
