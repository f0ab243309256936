package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/agent/agenttest"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

// role is a process of an installation that the test sets up itself.
type role struct {
	cmd   *exec.Cmd
	ended chan struct{}
	log   *os.File
}

// launch starts a program whose output goes to a file of the test.
func launch(t *testing.T, name string, env []string, program string, args ...string) *role {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), name+"-*.log")
	if err != nil {
		t.Fatal(err)
	}
	r := &role{cmd: exec.Command(program, args...), ended: make(chan struct{}), log: log}
	r.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=/root"}, env...)
	r.cmd.Stdout, r.cmd.Stderr = log, log
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { defer close(r.ended); _ = r.cmd.Wait() }()
	t.Cleanup(func() {
		r.signal(syscall.SIGTERM)
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			if len(text) > 6000 {
				text = text[len(text)-6000:]
			}
			t.Logf("%s said:\n%s", name, text)
		}
	})
	return r
}

// signal sends a signal and waits for the process to end.
func (r *role) signal(s syscall.Signal) {
	_ = r.cmd.Process.Signal(s)
	select {
	case <-r.ended:
	case <-time.After(2 * time.Minute):
		_ = r.cmd.Process.Kill()
		<-r.ended
	}
}

// within waits for a condition that the programs do not announce.
func within(t *testing.T, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	began := time.Now()
	if !await.Within(limit, ok) {
		t.Fatalf("not within %v: %s", limit, what)
	}
	return time.Since(began)
}

// control is the test's own control plane, for hosts that register.
type control struct {
	*testing.T
	wrenn    string // the program
	dir      string
	listen   string // the server's address
	spare    string // the address for a second server
	url      string // the URL of both
	key      string
	database string
	// dirs are the data directories of its hosts.
	dirs          map[string]string
	env           []string // more of the server's environment
	server, redis *role
	web           *http.Client // checks responses against the document
	*client.Client
}

const (
	fleetAdmin    = "admin@example.com"
	fleetPassword = "correct horse battery staple"
	fleetBeat     = 4 * time.Second
)

// call calls the API as the platform's admin.
func (c *control) call(method, path string, body any) (int, map[string]any) {
	c.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		c.Fatal(err)
	}
	var rd io.Reader
	if body != nil {
		rd = bytes.NewReader(raw)
	}
	req, err := http.NewRequest(method, c.url+path, rd)
	if err != nil {
		c.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-API-Key", c.key)
	resp, err := c.web.Do(req)
	if err != nil {
		return 0, nil
	}
	defer resp.Body.Close()
	var m map[string]any
	_ = json.NewDecoder(resp.Body).Decode(&m)
	return resp.StatusCode, m
}

// host adds a host, and returns the environment of its agent.
func (c *control) host(name, listen string) (id string, env []string) {
	c.Helper()
	status, m := c.call("POST", "/v1/admin/hosts", map[string]any{"name": name})
	if status != http.StatusCreated {
		c.Fatalf("add host: %d %v", status, m)
	}
	dir, err := newDir()
	if err != nil {
		c.Fatal(err)
	}
	c.Cleanup(func() { discard(c.T, dir) })
	bin, err := programs()
	if err != nil {
		c.Fatal(err)
	}
	id = m["host"].(map[string]any)["id"].(string)
	c.dirs[id] = dir
	return id, []string{
		"WRENN_DIR=" + dir, "WRENN_LISTEN=" + listen, "WRENN_SERVER_URL=" + c.url, "WRENN_HOST_TOKEN=" + m["token"].(string),
		"WRENN_MEMORY_MIB=6144", "WRENN_WARM=0", "WRENN_ENVD=" + filepath.Join(bin, "envd"),
	}
}

func (c *control) status(host string) string {
	_, m := c.call("GET", "/v1/admin/hosts/"+host, nil)
	s, _ := m["status"].(string)
	return s
}

func (c *control) state(sandbox string) string {
	s, err := c.Get(context.Background(), sandbox)
	if err != nil {
		return err.Error()
	}
	return s.State
}

// destroy destroys sandboxes. It kills what their hosts do not, because no test may leave
// a machine behind.
func (c *control) destroy(sandboxes []string) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	turn := make(chan struct{}, 4)
	for _, sandbox := range sandboxes {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			if err := c.Delete(ctx, sandbox); err != nil {
				c.Errorf("delete %s: %v", sandbox, err)
			}
			if pid := agenttest.QEMU(sandbox); pid != 0 {
				c.Errorf("the machine of the deleted %s still runs", sandbox)
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		})
	}
	wg.Wait()
}

// front is a load balancer before several servers: it passes each connection to the first
// server that accepts it, until the test ends.
func front(t *testing.T, servers ...string) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	carry := func(from net.Conn) {
		defer from.Close()
		for _, s := range servers {
			to, err := net.Dial("tcp", s)
			if err != nil {
				continue
			}
			defer to.Close()
			back := make(chan struct{})
			go func() {
				defer close(back)
				defer from.Close()
				_, _ = io.Copy(from, to)
			}()
			_, _ = io.Copy(to, from)
			to.Close()
			<-back
			return
		}
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go carry(conn)
		}
	}()
	return l.Addr().String()
}

// newControl starts a server with a certificate authority on real databases, with
// additional environment variables.
func newControl(t *testing.T, env ...string) *control {
	t.Helper()
	up(t) // It builds the images, which each host would otherwise build.
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := &control{T: t, wrenn: filepath.Join(bin, "wrenn"), dir: dir, key: "wrn_" + strings.Repeat("k", 40), database: pgtest.New(t), dirs: make(map[string]string), env: env, web: &http.Client{Transport: checked(t)}}
	if out, err := exec.Command(c.wrenn, "ca", "init", "--dir", dir).CombinedOutput(); err != nil {
		t.Fatalf("wrenn ca init: %v\n%s", err, out)
	}
	for _, address := range []*string{&c.listen, &c.spare} {
		if *address, err = freeAddress(); err != nil {
			t.Fatal(err)
		}
	}
	c.url = "http://" + front(t, c.listen, c.spare)
	c.redis = c.startRedis()
	c.server = c.startServer(c.listen)
	within(t, 2*time.Minute, "the server answers", func() bool {
		status, _ := c.call("GET", "/health", nil)
		return status == http.StatusOK
	})
	if c.Client, err = client.New(c.url, c.key, client.WithHTTPClient(c.web)); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *control) redisSocket() string { return filepath.Join(c.dir, "redis.sock") }

func (c *control) startRedis() *role {
	c.Helper()
	return launch(c.T, "redis", nil, "redis-server", "--port", "0", "--unixsocket", c.redisSocket(), "--save", "", "--dir", c.dir)
}

func (c *control) startServer(listen string) *role {
	c.Helper()
	return launch(c.T, "server", append([]string{
		"DATABASE_URL=" + c.database, "REDIS_URL=unix://" + c.redisSocket(), "WRENN_LISTEN=" + listen, "WRENN_SECRET_KEY=" + strings.Repeat("ab", 32),
		"WRENN_CA_CERT=" + filepath.Join(c.dir, "ca.crt"), "WRENN_CA_KEY=" + filepath.Join(c.dir, "ca.key"), "WRENN_HEARTBEAT=" + fleetBeat.String(),
		"WRENN_ADMIN_EMAIL=" + fleetAdmin, "WRENN_ADMIN_PASSWORD=" + fleetPassword, "WRENN_ADMIN_API_KEY=" + c.key,
	}, c.env...), c.wrenn, "server")
}

// refusesOthers checks that an agent accepts calls from its control plane only. other is
// the data directory of another host.
func refusesOthers(t *testing.T, agent, other string) {
	if resp, err := http.Get("http://" + agent + "/health"); err == nil {
		resp.Body.Close()
		if resp.StatusCode < 400 {
			t.Error("an agent responds to plain HTTP")
		}
	}
	var stolen struct{ Certificate, Key string }
	text, err := os.ReadFile(layout.Dir(other).Enrollment())
	if err == nil {
		err = json.Unmarshal(text, &stolen)
	}
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := tls.X509KeyPair([]byte(stolen.Certificate), []byte(stolen.Key))
	if err != nil {
		t.Fatal(err)
	}
	for who, certificates := range map[string][]tls.Certificate{"nobody": nil, "another host": {leaf}} {
		web := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: certificates}}}
		resp, err := web.Get("https://" + agent + "/health")
		if err == nil {
			resp.Body.Close()
			t.Errorf("an agent responds to %s: %s", who, resp.Status)
		} else if !strings.Contains(err.Error(), "tls: ") {
			t.Errorf("an agent that is called by %s: %v", who, err)
		}
	}
}

// TestHosts has two hosts on this machine, called over mutual TLS. Their agents refuse
// everybody but the control plane. Sandboxes spread over both; those of a host whose agent
// is killed are missing, and return with their memory when it is back.
func TestHosts(t *testing.T) {
	if why := unable(); why != "" {
		t.Skip(why)
	}
	const boxes, atOnce = 30, 4
	c := newControl(t)
	bin, _ := programs()
	wrenn := filepath.Join(bin, "wrenn")
	ctx, cancel := context.WithTimeout(context.Background(), 25*time.Minute)
	defer cancel()
	a, envA := c.host("a", "127.0.0.2:7070")
	b, envB := c.host("b", "127.0.0.3:7070")
	agentA := launch(t, "a", envA, wrenn, "agent")
	launch(t, "b", envB, wrenn, "agent")
	// The control plane's calls succeed: a host is online once it has responded.
	for _, h := range []string{a, b} {
		within(t, 5*time.Minute, "the host is online", func() bool { return c.status(h) == "online" })
	}
	t.Run("agents refuse others", func(t *testing.T) { refusesOthers(t, "127.0.0.2:7070", c.dirs[b]) })
	_, isA := c.call("GET", "/v1/admin/hosts/"+a, nil)
	_, isB := c.call("GET", "/v1/admin/hosts/"+b, nil)
	if isA["network_block"] == isB["network_block"] || isA["url"] != "https://127.0.0.2:7070" || isB["url"] != "https://127.0.0.3:7070" {
		t.Errorf("the hosts are %v and %v", isA, isB)
	}
	on := map[string][]string{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	turn := make(chan struct{}, atOnce)
	never := 0
	began := time.Now()
	create := func() (*client.Sandbox, error) {
		return c.Create(ctx, client.CreateOptions{MemoryMiB: 128, TimeoutSeconds: &never})
	}
	// Run it before t.Cleanup ends the programs.
	defer func() { c.destroy(slices.Concat(on[a], on[b])) }()
	for range boxes {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			s, err := create()
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			on[s.HostID] = append(on[s.HostID], s.ID)
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	t.Logf("%d sandboxes in %v: %d on one host, %d on the other", boxes, time.Since(began).Round(time.Second), len(on[a]), len(on[b]))
	if len(on[a]) < boxes/3 || len(on[b]) < boxes/3 {
		t.Errorf("%d and %d of %d sandboxes are not spread", len(on[a]), len(on[b]), boxes)
	}

	// This state is in memory alone. The commands may run twice.
	run := func(id, cmd string) (string, error) {
		r, err := c.Exec(ctx, id, client.Command{Cmd: cmd, Shell: true, TimeoutSeconds: 120, Repeatable: true}, nil)
		if err != nil {
			return "", err
		}
		return strings.TrimSpace(string(r.Stdout)), nil
	}
	shell := func(id, cmd string) string {
		t.Helper()
		out, err := run(id, cmd)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	// each runs a command in every sandbox of the host whose agent will be killed.
	each := func(cmd string, got func(id, out string)) {
		t.Helper()
		var wg sync.WaitGroup
		for _, id := range on[a] {
			wg.Go(func() {
				turn <- struct{}{}
				defer func() { <-turn }()
				out, err := run(id, cmd)
				if err != nil {
					t.Errorf("%s: %v", id, err)
					return
				}
				got(id, out)
			})
		}
		wg.Wait()
	}
	// A file in a tmpfs is in the guest's memory.
	each(`echo "memory of $(hostname)" > /dev/shm/mine; cat /dev/shm/mine`, func(id, out string) {
		if out != "memory of "+id {
			t.Errorf("%s says %q", id, out)
		}
	})
	kept := on[a][0]
	// Of two concurrent runs, only the one that creates the folder starts the process.
	shell(kept, `mkdir /tmp/once 2>/dev/null || { until [ -s /tmp/pid ]; do sleep 0.1; done; exit; }
nohup python3 -c 'import os, time
n, secret = 0, os.urandom(16).hex()
while True:
    n += 1
    open("/tmp/n.new", "w").write("%d %s" % (n, secret)); os.rename("/tmp/n.new", "/tmp/n")
    time.sleep(0.1)' >/dev/null 2>&1 & echo $! > /tmp/pid.new; mv /tmp/pid.new /tmp/pid`)
	pid := shell(kept, "cat /tmp/pid")
	// count returns the process's count and the random secret from its start. Its files
	// are gone, so both come from its memory.
	count := func() (n int, secret string) {
		fmt.Sscan(shell(kept, "rm -f /tmp/n; while [ ! -s /tmp/n ]; do sleep 0.1; done; cat /tmp/n"), &n, &secret)
		return n, secret
	}
	before, secret := count()

	agentA.signal(syscall.SIGKILL)
	took := within(t, 2*time.Minute, "the sandboxes are missing", func() bool { return c.state(kept) == "missing" })
	t.Logf("missing %v after the agent was killed; heartbeats are %v apart", took.Round(time.Millisecond), fleetBeat)
	for _, id := range on[a] {
		if s := c.state(id); s != "missing" {
			t.Errorf("%s is %s, want missing", id, s)
		}
	}
	if s := c.state(on[b][0]); s != "running" {
		t.Errorf("the other host's sandbox is %s", s)
	}
	for range 2 {
		s, err := create()
		if err != nil {
			t.Fatal(err)
		}
		if on[s.HostID] = append(on[s.HostID], s.ID); s.HostID != b {
			t.Error("a new sandbox is on the missing host")
		}
	}

	launch(t, "a-again", envA, wrenn, "agent")
	took = within(t, 3*time.Minute, "the sandboxes run again", func() bool {
		for _, id := range on[a] {
			if c.state(id) != "running" {
				return false
			}
		}
		return true
	})
	t.Logf("all %d run again %v after the agent was started again", len(on[a]), took.Round(time.Millisecond))
	if now := shell(kept, "cat /tmp/pid; ps -o pid= -p $(cat /tmp/pid) | tr -d ' '"); now != pid+"\n"+pid {
		t.Errorf("the process: %q, want %s twice", now, pid)
	}
	after, is := count()
	if after <= before || is != secret || len(secret) != 32 {
		t.Errorf("it counted to %d and remembers %q, before that %d and %q", after, is, before, secret)
	}
	t.Logf("a process kept counting, from %d to %d", before, after)
	each("cat /dev/shm/mine", func(id, out string) {
		if out != "memory of "+id {
			t.Errorf("%s, which is back, has %q in its memory", id, out)
		}
	})
	if s := c.status(a); s != "online" {
		t.Errorf("the host is %s", s)
	}
}
