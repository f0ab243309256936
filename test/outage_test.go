package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

// failures counts what a client has to hide: requests without a response, and responses
// that the service is unavailable.
type failures struct {
	next http.RoundTripper
	n    atomic.Int64
}

func (f *failures) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := f.next.RoundTrip(r)
	if err != nil || resp.StatusCode >= http.StatusInternalServerError {
		f.n.Add(1)
	}
	return resp, err
}

// TestOutage has clients create, use, fork and destroy sandboxes in a loop while the
// database, Redis and the server stop and return, and one of two servers stops for good.
// The client library hides that: no call fails, each sandbox exists until it is
// destroyed, and in the end database, host and machines agree.
func TestOutage(t *testing.T) {
	if why := unable(); why != "" {
		t.Skip(why)
	}
	c := newControl(t)
	wrenn := c.wrenn
	hidden := &failures{next: checked(t)}
	var err error
	if c.Client, err = client.New(c.url, c.key, client.WithHTTPClient(&http.Client{Transport: hidden})); err != nil {
		t.Fatal(err)
	}
	host, env := c.host("only", "127.0.0.4:7070")
	launch(t, "agent", env, wrenn, "agent")
	within(t, 5*time.Minute, "the host is online", func() bool { return c.status(host) == "online" })

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	var mu sync.Mutex
	var all []string // every acknowledged sandbox
	create := func() (*client.Sandbox, error) {
		s, err := c.Create(ctx, client.CreateOptions{MemoryMiB: 128})
		if err == nil {
			mu.Lock()
			all = append(all, s.ID)
			mu.Unlock()
		}
		return s, err
	}
	echo := func(id, word string) error {
		// It may run twice: if the connection breaks, the client does not learn of the
		// first run.
		r, err := c.Exec(ctx, id, client.Command{Cmd: "echo " + word + "; cat /proc/sys/kernel/random/boot_id", Shell: true, TimeoutSeconds: 120, Repeatable: true}, nil)
		if err == nil && !strings.HasPrefix(string(r.Stdout), word+"\n") {
			err = fmt.Errorf("it printed %q", r.Stdout)
		}
		return err
	}
	// copyOf forks a sandbox and uses the fork.
	copyOf := func(id, word string) (made []string) {
		copies, err := c.Fork(ctx, id, 1)
		if err != nil {
			t.Errorf("fork %s: %v", id, err)
			return nil
		}
		mu.Lock()
		all = append(all, copies[0].ID)
		mu.Unlock()
		if err := echo(copies[0].ID, word); err != nil {
			t.Errorf("run in a fork of %s: %v", id, err)
		}
		return []string{copies[0].ID}
	}
	// This sandbox lives through all outages.
	lasting, err := create()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { c.destroy([]string{lasting.ID}) }()
	rounds := make(chan struct{}, 100)
	stop := make(chan struct{})
	var workers sync.WaitGroup
	for n := range 2 {
		workers.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				s, err := create()
				if err != nil {
					t.Errorf("create: %v", err)
					return
				}
				if err := echo(s.ID, fmt.Sprint("round-", n, "-", i)); err != nil {
					t.Errorf("run in %s: %v", s.ID, err)
				}
				copies := copyOf(s.ID, fmt.Sprint("copy-", n, "-", i))
				for _, id := range append(copies, s.ID) {
					if err := c.Delete(ctx, id); err != nil {
						t.Errorf("destroy %s: %v", id, err)
						return
					}
				}
				rounds <- struct{}{}
			}
		})
	}
	ended := make(chan struct{})
	go func() { workers.Wait(); close(ended) }()
	// turns waits until n more rounds have started and ended.
	turns := func(n int) {
		for range n {
			select {
			case <-rounds:
			case <-ended:
				return
			case <-ctx.Done():
				t.Error("the clients make no progress")
				return
			}
		}
	}
	outages := []struct {
		what string
		do   func()
	}{
		{"PostgreSQL is restarted", func() {
			cluster := pgtest.Shared(t)
			before := hidden.n.Load()
			cluster.Stop()
			within(t, 2*time.Minute, "a request fails without PostgreSQL", func() bool { return hidden.n.Load() > before })
			if err := cluster.Start(); err != nil {
				t.Fatal(err)
			}
		}},
		{"Redis is restarted", func() {
			c.redis.signal(syscall.SIGKILL)
			turns(3) // everything works without it
			c.redis = c.startRedis()
		}},
		{"the server is killed and started again", func() {
			c.server.signal(syscall.SIGKILL)
			c.server = c.startServer(c.listen)
		}},
		{"one of two servers is killed, for good", func() {
			other := *c
			other.url = "http://" + c.spare
			c.startServer(c.spare)
			within(t, 2*time.Minute, "the other server answers", func() bool {
				status, _ := other.call("GET", "/health", nil)
				return status == http.StatusOK
			})
			c.server.signal(syscall.SIGKILL)
		}},
	}
	turns(2)
	for _, o := range outages {
		begin := time.Now()
		o.do()
		if t.Failed() {
			break
		}
		turns(3) // at least one of them started before
		t.Logf("%s: three more rounds after %v", o.what, time.Since(begin).Round(100*time.Millisecond))
	}
	close(stop)
	<-ended
	t.Logf("%d sandboxes were acknowledged; %d failures were hidden", len(all), hidden.n.Load())
	if hidden.n.Load() == 0 {
		t.Error("nothing failed: there was nothing to hide")
	}
	if err := echo(lasting.ID, "still-there"); err != nil {
		t.Errorf("the sandbox that lived through all outages: %v", err)
	}

	// Every row agrees with the host: nothing is in transit, and nothing is left over.
	conn, err := pgx.Connect(ctx, c.database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	live := func() []string {
		rows, err := conn.Query(ctx, "SELECT state FROM sandboxes WHERE state NOT IN ('stopped', 'error')")
		if err != nil {
			t.Fatal(err)
		}
		states, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		return states
	}
	has := func() int {
		entries, err := os.ReadDir(filepath.Join(c.dirs[host], "sandboxes"))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	// The host destroys strays after half a minute.
	took := within(t, 2*time.Minute, "database and host agree", func() bool { return slices.Equal(live(), []string{"running"}) && has() == 1 })
	t.Logf("database and host agree %v after the last call", took.Round(100*time.Millisecond))
	for _, id := range all {
		s, err := c.Get(ctx, id)
		if err != nil {
			t.Errorf("%s, which was acknowledged: %v", id, err)
			continue
		}
		if want := map[bool]string{true: "running", false: "stopped"}[id == lasting.ID]; s.State != want {
			t.Errorf("%s is %s, want %s", id, s.State, want)
		}
		if runs := agenttest.QEMU(id) != 0; runs != (id == lasting.ID) {
			t.Errorf("%s has a machine: %v", id, runs)
		}
	}
	var lost int
	if err := conn.QueryRow(ctx, "SELECT count(*) FROM sandboxes WHERE end_reason = 'lost'").Scan(&lost); err != nil || lost != 0 {
		t.Errorf("%d sandboxes were lost (%v)", lost, err)
	}
}
