package bench

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	pb "github.com/wrenn-dev/wrenn/internal/gen/hostagent/v1"
	"github.com/wrenn-dev/wrenn/internal/id"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

const (
	hostileClients = 200
	hostileTeams   = 4 // of one owner
	hostileLasts   = 30 * time.Second
	quietLasts     = 5 * time.Second
	otherClients   = 4
	// hostileMost is how much memory the server may use, in bytes.
	hostileMost = 512 << 20
	// nulPort is a port at which the fake agent's guests send endlessly.
	nulPort = 9
)

// TestHostile measures how 200 clients of one owner, each of which does what costs most,
// affect the server's memory and the latency of other owners' requests.
func TestHostile(t *testing.T) {
	asked(t)
	url, pid, database := startServer(t)
	db := pgtest.Connect(t, database)
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := db.Exec(context.Background(), sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	// teamOf creates a team with a key and a sandbox.
	teamOf := func(owner uuid.UUID) (key, sandbox string) {
		t.Helper()
		team := uuid.New()
		key = "wrn_" + strings.ReplaceAll(team.String(), "-", "") + "00000000"
		hash := sha256.Sum256([]byte(key))
		exec("INSERT INTO teams (id, name) VALUES ($1, 'team')", team)
		exec("INSERT INTO team_members (team_id, user_id, role) VALUES ($1, $2, 'owner')", team, owner)
		exec("INSERT INTO team_quotas (team_id, max_running) VALUES ($1, 200)", team)
		exec("INSERT INTO api_keys (id, team_id, user_id, name, prefix, hash, scopes) VALUES ($1, $2, $3, 'key', 'wrn_', $4, '{}')", uuid.New(), team, owner, hash[:])
		var made struct {
			ID string `json:"id"`
		}
		if err := call(t.Context(), http.MethodPost, url+"/v1/sandboxes", "", key, strings.NewReader(`{"memory_mib":128}`), &made); err != nil {
			t.Fatal(err)
		}
		build := uuid.New()
		exec("INSERT INTO builds (id, team_id, name, tags, recipe, options, state, total_steps, created_at) VALUES ($1, $2, 'long', '{}', 'FROM minimal', '{}', 'failed', 12, now())", build, team)
		exec(`INSERT INTO build_steps SELECT $1, n, jsonb_build_object('number', n, 'phase', 'recipe', 'text', 'RUN', 'state', 'succeeded', 'output', repeat(E'\x01', 1000000)) FROM generate_series(1, 12) n`, build)
		return key, made.ID
	}
	person := func(email string) uuid.UUID {
		u := uuid.New()
		exec("INSERT INTO users (id, email, verified_at) VALUES ($1, $2, now())", u, email)
		return u
	}
	hostile, other := person("hostile@example.com"), person("other@example.com")
	var keys, boxes [hostileTeams]string
	for i := range keys {
		keys[i], boxes[i] = teamOf(hostile)
	}
	key, box := teamOf(other)

	ask := clients{URL: url, Keys: []string{key}, Boxes: []string{box}}
	ask.Lasts = quietLasts
	quiet := <-ask.start(t)
	before := rss(t, pid)
	used, begin := processTime(t, pid), time.Now()
	attack := clients{URL: url, Keys: keys[:], Boxes: boxes[:], Hostile: true, Lasts: hostileLasts}
	attacked := attack.start(t)
	ask.Lasts = hostileLasts
	loaded := <-ask.start(t)
	used, took := processTime(t, pid)-used, time.Since(begin)
	if t.Failed() {
		t.FailNow()
	}
	peak := kib(t, fmt.Sprintf("/proc/%d/status", pid), "VmHWM")
	deeds := (<-attacked).Deeds

	row := func(what string, did clientsDid) []string {
		return []string{what, strconv.Itoa(len(did.Took)), strconv.FormatInt(did.Failed, 10), ms(did.Took.mid()), ms(did.Took.percentile(99)), ms(slices.Max(did.Took))}
	}
	table(fmt.Sprintf("Another owner's requests, without and with %d hostile clients of one owner", hostileClients), []string{"when", "requests", "failed", "p50", "p99", "max"},
		[][]string{row("without hostile clients", quiet), row("with hostile clients", loaded)})
	var rows [][]string
	for i, did := range deeds {
		rows = append(rows, []string{hostileDeeds[i].name, strconv.FormatInt(did.OK, 10), strconv.FormatInt(did.Refused, 10), strconv.FormatInt(did.Open, 10)})
	}
	table("What the hostile clients did", []string{"what", "succeeded", "refused", "in flight at the end"}, rows)
	table("The server's processor time with hostile clients", []string{"of one processor", "of all"}, [][]string{{
		fmt.Sprintf("%.0f %%", 100*used.Seconds()/took.Seconds()), fmt.Sprintf("%.0f %%", 100*used.Seconds()/took.Seconds()/float64(runtime.NumCPU())),
	}})
	table("The server's resident memory with hostile clients", []string{"before", "peak", "limit"}, [][]string{{mib(before), mib(peak), mib(hostileMost)}})
	if peak > hostileMost {
		t.Errorf("the server took %s of memory", mib(peak))
	}
	if failed := loaded.Failed + quiet.Failed; failed > 0 {
		t.Errorf("%d of another owner's requests failed, as with: %s", failed, cmp.Or(quiet.Error, loaded.Error))
	}
}

// clientsEnv, if set, makes this test program run the [clients] that it describes in JSON.
const clientsEnv = "WRENN_BENCH_CLIENTS"

// clients describes a process that sends requests to the server for the time Lasts.
type clients struct {
	URL         string
	Keys, Boxes []string
	Hostile     bool
	Lasts       time.Duration
}

// clientsDid is what clients print when they end.
type clientsDid struct {
	// Results of clients that are not hostile.
	Took   sample
	Failed int64
	Error  string // of a failed request
	// Results of hostile clients, one for each of hostileDeeds.
	Deeds []clientsDeed
}

type clientsDeed struct{ OK, Refused, Open int64 }

// start starts the clients. Hostile ones have a low priority, because real ones would run
// on other machines and not use the server's processors directly.
func (c clients) start(t *testing.T) <-chan clientsDid {
	t.Helper()
	spec, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	niceness := "0"
	if c.Hostile {
		niceness = "10"
	}
	cmd := exec.CommandContext(t.Context(), "nice", "-n", niceness, program)
	cmd.Env = append(os.Environ(), clientsEnv+"="+string(spec))
	cmd.Stderr = os.Stderr
	did := make(chan clientsDid, 1)
	go func() {
		defer close(did)
		var d clientsDid
		out, err := cmd.Output()
		if err == nil {
			err = json.Unmarshal(out, &d)
		}
		if err != nil {
			t.Errorf("clients: %v", err)
			return
		}
		did <- d
	}()
	return did
}

// beClients runs clients in this process, and prints their results.
func beClients(spec string) error {
	var c clients
	if err := json.Unmarshal([]byte(spec), &c); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.Lasts)
	defer cancel()
	did := c.ask
	if c.Hostile {
		did = c.attack
	}
	return json.NewEncoder(os.Stdout).Encode(did(ctx))
}

// ask lists sandboxes, runs commands and calls a port until ctx is done.
func (c clients) ask(ctx context.Context) (did clientsDid) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range otherClients {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				begin := time.Now()
				var err error
				switch background := context.Background(); n % 3 {
				case 0:
					err = call(background, http.MethodGet, c.URL+"/v1/sandboxes", "", c.Keys[0], nil, nil)
				case 1:
					err = call(background, http.MethodPost, c.URL+"/v1/sandboxes/"+c.Boxes[0]+"/exec", "", c.Keys[0], strings.NewReader(`{"cmd":"true"}`), nil)
				case 2:
					err = call(background, http.MethodGet, c.URL+"/", "80-"+c.Boxes[0]+".localhost", c.Keys[0], nil, nil)
				}
				mu.Lock()
				if did.Took = append(did.Took, time.Since(begin)); err != nil {
					did.Failed, did.Error = did.Failed+1, err.Error()
				}
				mu.Unlock()
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	return did
}

// attack does everything in hostileDeeds at once until ctx is done.
func (c clients) attack(ctx context.Context) (did clientsDid) {
	counts := make([]struct{ ok, refused, open atomic.Int64 }, len(hostileDeeds))
	var wg sync.WaitGroup
	for n := range hostileClients {
		deed, at := &hostileDeeds[n%len(hostileDeeds)], n/len(hostileDeeds)%len(c.Keys)
		count := &counts[n%len(hostileDeeds)]
		wg.Go(func() {
			for ctx.Err() == nil {
				err := deed.do(ctx, c.URL, c.Keys[at], c.Boxes[at])
				switch {
				case err == nil:
					count.ok.Add(1)
				case ctx.Err() != nil:
					count.open.Add(1)
				default:
					count.refused.Add(1)
				}
				select {
				case <-ctx.Done():
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
	wg.Wait()
	for i := range counts {
		did.Deeds = append(did.Deeds, clientsDeed{counts[i].ok.Load(), counts[i].refused.Load(), counts[i].open.Load()})
	}
	return did
}

var hostileWeb = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: hostileClients}}

// ask makes a request to a sandbox's host name, or to the service if host is empty.
func ask(ctx context.Context, method, url, host, key string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	req.Host = host
	req.Header.Set("X-API-Key", key)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if strings.Contains(url, "/archive") {
		req.Header.Set("Content-Type", "application/x-tar")
	}
	return hostileWeb.Do(req)
}

// call makes a request that must succeed, and reads the response.
func call(ctx context.Context, method, url, host, key string, body io.Reader, into any) error {
	resp, err := ask(ctx, method, url, host, key, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %.200s", method, url, resp.Status, b)
	}
	if err == nil && into != nil {
		err = json.Unmarshal(b, into)
	}
	return err
}

// slowly reads a response a little at a time, for ten seconds.
func slowly(ctx context.Context, resp *http.Response, err error) error {
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s", resp.Status)
	}
	for range 100 {
		if _, err := io.CopyN(io.Discard, resp.Body, 1<<10); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// trickle is a body that sends one byte every 100 ms, for ten seconds.
type trickle struct {
	ctx  context.Context
	left int
}

func (s *trickle) Read(p []byte) (int, error) {
	if s.left--; s.left < 0 {
		return 0, io.EOF
	}
	select {
	case <-s.ctx.Done():
		return 0, s.ctx.Err()
	case <-time.After(100 * time.Millisecond):
	}
	p[0] = ' '
	return 1, nil
}

var (
	longBody = []byte(`{"cmd":"true","stdin":"` + strings.Repeat("x", 15<<20) + `"}`)
	manyBody = []byte(`{"cmd":"true","args":["a"` + strings.Repeat(`,"a"`, 65_000) + `]}`) // the limit is 4096
	archive  = make([]byte, 16<<20)
)

// hostileDeeds are the requests that cost the server most, one per client.
var hostileDeeds = []struct {
	name string
	do   func(ctx context.Context, url, key, box string) error
}{
	{"a command that prints 32 MiB of NULs", func(ctx context.Context, url, key, box string) error {
		return call(ctx, http.MethodPost, url+"/v1/sandboxes/"+box+"/exec", "", key, strings.NewReader(`{"cmd":"nul"}`), nil)
	}},
	{"the same, read slowly", func(ctx context.Context, url, key, box string) error {
		resp, err := ask(ctx, http.MethodPost, url+"/v1/sandboxes/"+box+"/exec", "", key, strings.NewReader(`{"cmd":"nul"}`))
		return slowly(ctx, resp, err)
	}},
	{"a JSON body of 15 MiB", func(ctx context.Context, url, key, box string) error {
		return call(ctx, http.MethodPost, url+"/v1/sandboxes/"+box+"/exec", "", key, bytes.NewReader(longBody), nil)
	}},
	{"a JSON body of 65,000 values", func(ctx context.Context, url, key, box string) error {
		return call(ctx, http.MethodPost, url+"/v1/sandboxes/"+box+"/exec", "", key, bytes.NewReader(manyBody), nil)
	}},
	{"an endless response of a port, read slowly", func(ctx context.Context, url, key, box string) error {
		resp, err := ask(ctx, http.MethodGet, url+"/", fmt.Sprintf("%d-%s.localhost", nulPort, box), key, nil)
		return slowly(ctx, resp, err)
	}},
	{"an upload of 16 MiB", func(ctx context.Context, url, key, _ string) error {
		return call(ctx, http.MethodPost, url+"/v1/templates/import/archive?name=n"+strings.ReplaceAll(uuid.NewString(), "-", ""), "", key, bytes.NewReader(archive), nil)
	}},
	{"a body of one byte every 100 ms", func(ctx context.Context, url, key, box string) error {
		return call(ctx, http.MethodPost, url+"/v1/sandboxes/"+box+"/exec", "", key, io.MultiReader(&trickle{ctx, 100}, strings.NewReader(`{"cmd":"true"}`)), nil)
	}},
	{"a build with a log of 12 MiB, read slowly", func(ctx context.Context, url, key, _ string) error {
		var list struct {
			Builds []struct {
				ID string `json:"id"`
			} `json:"builds"`
		}
		if err := call(ctx, http.MethodGet, url+"/v1/builds?limit=1", "", key, nil, &list); err != nil {
			return err
		}
		if len(list.Builds) == 0 {
			return errors.New("no build")
		}
		resp, err := ask(ctx, http.MethodGet, url+"/v1/builds/"+list.Builds[0].ID, "", key, nil)
		return slowly(ctx, resp, err)
	}},
	{"a fork into 4", func(ctx context.Context, url, key, box string) error {
		return call(ctx, http.MethodPost, url+"/v1/sandboxes/"+box+"/fork", "", key, strings.NewReader(`{"count":4}`), nil)
	}},
}

// ExecStream prints 16 MiB of NULs to each stream for "nul", and nothing for others.
func (s *standIn) ExecStream(_ context.Context, stream *connect.BidiStream[pb.ExecStreamRequest, pb.ExecStreamResponse]) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	for open := first.GetStart().GetStdin(); open; {
		m, err := stream.Receive()
		if err != nil {
			return err
		}
		open = m.GetCloseStdin() == nil
	}
	if first.GetStart().GetCommand().GetCmd() == "nul" {
		piece := make([]byte, 64<<10)
		for range 16 << 20 / len(piece) {
			if err := stream.Send(&pb.ExecStreamResponse{Message: &pb.ExecStreamResponse_Stdout{Stdout: piece}}); err != nil {
				return err
			}
			if err := stream.Send(&pb.ExecStreamResponse{Message: &pb.ExecStreamResponse_Stderr{Stderr: piece}}); err != nil {
				return err
			}
		}
	}
	return stream.Send(&pb.ExecStreamResponse{Message: &pb.ExecStreamResponse_Exited_{Exited: &pb.ExecStreamResponse_Exited{}}})
}

// ImportTemplate receives an archive and refuses it.
func (s *standIn) ImportTemplate(_ context.Context, stream *connect.ClientStream[pb.ImportTemplateRequest]) (*connect.Response[pb.ImportTemplateResponse], error) {
	for stream.Receive() {
	}
	return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("every archive is refused"))
}

// Ping reports that a sandbox was used.
func (s *standIn) Ping(_ context.Context, req *connect.Request[pb.PingRequest]) (*connect.Response[pb.PingResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return connect.NewResponse(&pb.PingResponse{Sandbox: s.find(req.Msg.GetSandboxId())}), nil
}

// find returns a sandbox, or nil. The caller holds s.mu.
func (s *standIn) find(sandbox string) *pb.Sandbox {
	for _, has := range s.has {
		if has.GetSandboxId() == sandbox {
			return has
		}
	}
	return nil
}

// Destroy does nothing.
func (s *standIn) Destroy(context.Context, *connect.Request[pb.DestroyRequest]) (*connect.Response[pb.DestroyResponse], error) {
	return connect.NewResponse(&pb.DestroyResponse{}), nil
}

// Fork creates forks with the sandbox's properties.
func (s *standIn) Fork(_ context.Context, req *connect.Request[pb.ForkRequest]) (*connect.Response[pb.ForkResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var r pb.ForkResponse
	for _, c := range req.Msg.GetCopies() {
		made := proto.CloneOf(s.find(req.Msg.GetSandboxId()))
		made.SandboxId = c.GetSandboxId()
		s.has, r.Sandboxes = append(s.has, made), append(r.Sandboxes, made)
	}
	return connect.NewResponse(&r), nil
}

// endless sends an endless response.
func endless(w http.ResponseWriter) {
	for piece := make([]byte, 64<<10); ; {
		if _, err := w.Write(piece); err != nil {
			return
		}
	}
}

// toPort reports whether a request to an agent's proxy is for a port of a sandbox.
func toPort(r *http.Request, port int) bool {
	parts := strings.Split(r.URL.Path, "/")
	return len(parts) > 3 && strings.HasPrefix(parts[2], string(id.Sandbox)) && parts[3] == strconv.Itoa(port)
}
