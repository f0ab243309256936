package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn-dev/wrenn/client"
	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1/hostagentv1connect"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

const (
	loadClients  = 200
	loadRounds   = 10
	loadPerRound = 2000 // requests of each kind
	loadBoxes    = 100
	loadKey      = "wrn_0123456789abcdefghijklmnopqrstuvwxyzABCD"
)

// TestServer measures the control plane alone: a real server with a real database and
// Redis, whose host is a fake that starts no machines.
func TestServer(t *testing.T) {
	asked(t)
	url, pid := newServer(t)
	api, err := client.New(url, loadKey)
	if err != nil {
		t.Fatal(err)
	}
	// When it starts, the server asks its host for templates; until then it cannot place
	// a sandbox.
	boxes := make([]string, loadBoxes)
	for i := range boxes {
		s, err := api.Create(t.Context(), client.CreateOptions{MemoryMiB: 128})
		if err != nil {
			t.Fatal(err)
		}
		boxes[i] = s.ID
	}
	web := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: loadClients}}
	ask := func(path, host string) error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+path, nil)
		if err != nil {
			return err
		}
		req.Host = host
		req.Header.Set("X-API-Key", loadKey)
		resp, err := web.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("GET %s of %q: %s", path, host, resp.Status)
		}
		return nil
	}
	kinds := []struct {
		name string
		ask  func(n int) error
		took sample
		all  time.Duration
	}{
		{name: "list, 20 of 100 sandboxes", ask: func(int) error { return ask("/v1/sandboxes?limit=20", "") }},
		{name: "get one sandbox", ask: func(n int) error { return ask("/v1/sandboxes/"+boxes[n%loadBoxes], "") }},
		{name: "a request to a sandbox's port", ask: func(n int) error { return ask("/", "80-"+boxes[n%loadBoxes]+".localhost") }},
	}
	resident := []int64{rss(t, pid)}
	for range loadRounds {
		for i := range kinds {
			k := &kinds[i]
			begin := time.Now()
			k.took = append(k.took, storm(t, loadPerRound, k.ask)...)
			k.all += time.Since(begin)
		}
		resident = append(resident, rss(t, pid))
	}
	var rows [][]string
	for _, k := range kinds {
		sorted := slices.Sorted(slices.Values(k.took))
		at := func(percent int) string { return ms(sorted[len(sorted)*percent/100]) }
		rows = append(rows, []string{k.name, strconv.Itoa(len(sorted)), fmt.Sprintf("%.0f", float64(len(sorted))/k.all.Seconds()), at(50), at(99), ms(sorted[len(sorted)-1])})
	}
	table(fmt.Sprintf("The control plane alone, %d clients at once", loadClients), []string{"what", "requests", "requests per second", "p50", "p99", "max"}, rows)
	line := make([][]string, len(resident))
	for i, r := range resident {
		line[i] = []string{strconv.Itoa(i * loadPerRound * len(kinds)), mib(r)}
	}
	table("The server's resident memory during these requests", []string{"after requests", "value"}, line)
	// The first third is for buffers and pools.
	if before, after := resident[loadRounds/3], resident[loadRounds]; after > before*5/4 {
		t.Errorf("the server's memory grew from %s to %s", mib(before), mib(after))
	}
}

// storm lets all clients make n requests in total, and returns how long each took.
func storm(t *testing.T, n int, ask func(int) error) sample {
	took := make(sample, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range loadClients {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				begin := time.Now()
				if err := ask(i); err != nil {
					t.Error(err)
					return
				}
				took[i] = time.Since(begin)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return took
}

// rss returns a process's resident memory, in bytes.
func rss(t *testing.T, pid int) int64 {
	t.Helper()
	return kib(t, fmt.Sprintf("/proc/%d/status", pid), "VmRSS")
}

// newServer starts `wrenn server` and returns its URL and process.
func newServer(t *testing.T) (url string, pid int) {
	t.Helper()
	url, pid, _ = startServer(t)
	return url, pid
}

// startServer is newServer for tests that also need the URL of the server's database.
func startServer(t *testing.T) (url string, pid int, database string) {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "wrenn")
	if out, err := exec.Command("go", "build", "-o", program, "github.com/wrenn-dev/wrenn/cmd/wrenn").CombinedOutput(); err != nil {
		t.Fatalf("build wrenn: %v: %s", err, out)
	}
	t.Cleanup(pgtest.End)
	database = pgtest.New(t)
	redis := filepath.Join(dir, "redis.sock")
	launch(t, nil, "redis-server", "--port", "0", "--unixsocket", redis, "--save", "", "--dir", dir)
	host := "unix:" + filepath.Join(dir, "host.sock")
	newStandIn(t, host)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listen := l.Addr().String()
	l.Close()
	pid = launch(t, []string{
		"DATABASE_URL=" + database, "REDIS_URL=unix://" + redis, "WRENN_LISTEN=" + listen, "WRENN_SECRET_KEY=" + strings.Repeat("ab", 32),
		// The benchmark is not about rate limits.
		"WRENN_RATE_READ=100000000", "WRENN_RATE_CHANGE=100000000", "WRENN_RATE_EXPENSIVE=100000000",
		"WRENN_AGENT_URL=" + host, "WRENN_AGENT_TOKEN=token",
		"WRENN_ADMIN_EMAIL=admin@example.com", "WRENN_ADMIN_PASSWORD=correct horse battery staple", "WRENN_ADMIN_API_KEY=" + loadKey,
	}, program, "server")
	url = "http://" + listen
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if resp, err := http.Get(url + "/health"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return url, pid, database
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("the server does not answer")
		}
	}
}

// launch starts a program that ends with the test.
func launch(t *testing.T, env []string, program string, args ...string) (pid int) {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s said:\n%s", program, said.String())
		}
	})
	return cmd.Process.Pid
}

// standIn is a fake host agent that lists the sandboxes it was asked for, and starts
// nothing.
type standIn struct {
	hostagentv1connect.UnimplementedHostAgentHandler
	mu  sync.Mutex
	has []*pb.Sandbox
}

func newStandIn(t *testing.T, address string) {
	t.Helper()
	l, err := netaddr.Listen(t.Context(), address, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hostagentv1connect.NewHostAgentHandler(&standIn{}))
	mux.HandleFunc("/proxy/", func(w http.ResponseWriter, r *http.Request) {
		if toPort(r, nulPort) {
			endless(w)
			return
		}
		_ = json.NewEncoder(w).Encode("ok")
	})
	web := netaddr.Server(mux)
	go func() { _ = web.Serve(l) }()
	t.Cleanup(func() { web.Close() })
}

func (s *standIn) Host(context.Context, *connect.Request[pb.HostRequest]) (*connect.Response[pb.HostResponse], error) {
	return connect.NewResponse(&pb.HostResponse{Version: "stand-in", Cpus: 64, MemoryLimitMib: 1 << 20}), nil
}

func (s *standIn) Templates(context.Context, *connect.Request[pb.TemplatesRequest]) (*connect.Response[pb.TemplatesResponse], error) {
	return connect.NewResponse(&pb.TemplatesResponse{Templates: []*pb.Template{{
		TemplateId: id.Format(id.Template, uuid.Nil), TeamId: id.Format(id.Team, uuid.Nil), Name: "minimal", CreatedAt: timestamppb.Now(),
	}}}), nil
}

func (s *standIn) Create(_ context.Context, req *connect.Request[pb.CreateRequest]) (*connect.Response[pb.CreateResponse], error) {
	m := req.Msg
	sandbox := &pb.Sandbox{
		SandboxId: m.SandboxId, TemplateId: m.TemplateId, TeamId: m.TeamId, State: pb.SandboxState_SANDBOX_STATE_RUNNING,
		Vcpus: m.Vcpus, MemoryMib: m.MemoryMib, DiskMib: 5120, CreatedAt: timestamppb.Now(), ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.has = append(s.has, sandbox)
	return connect.NewResponse(&pb.CreateResponse{Sandbox: sandbox}), nil
}

func (s *standIn) List(context.Context, *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return connect.NewResponse(&pb.ListResponse{Sandboxes: slices.Clone(s.has)}), nil
}

// Events sends none.
func (s *standIn) Events(ctx context.Context, _ *connect.Request[pb.EventsRequest], _ *connect.ServerStream[pb.EventsResponse]) error {
	<-ctx.Done()
	return nil
}
