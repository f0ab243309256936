// Package pgtest runs a real PostgreSQL for tests: one private cluster per test binary,
// on a Unix socket in a temporary folder, with an empty database for each test that asks.
package pgtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/wrenn-dev/wrenn/internal/await"
)

// Cluster is a running PostgreSQL.
type Cluster struct {
	dir  string
	bin  string
	cred *syscall.SysProcAttr

	mu   sync.Mutex
	proc *os.Process
	done chan struct{}
	n    int
}

// shared is the cluster of this test binary. The first test that needs it starts it, and
// Main stops it.
var shared struct {
	sync.Mutex
	cluster *Cluster
	err     error
}

// errMissing reports that this machine cannot run a cluster.
var errMissing = errors.New("PostgreSQL is not installed, or this is not root")

// Main runs a package's tests and then stops the cluster. Call it from TestMain.
func Main(m *testing.M) {
	code := m.Run()
	End()
	os.Exit(code)
}

// End stops the cluster, for a TestMain that does more than [Main].
func End() {
	shared.Lock()
	defer shared.Unlock()
	if shared.cluster != nil {
		shared.cluster.Stop()
		os.RemoveAll(shared.cluster.dir)
	}
}

// New returns the URL of an empty database for t. It skips the test if PostgreSQL is not
// installed. The package's TestMain must call [Main].
func New(t testing.TB) string {
	t.Helper()
	return Shared(t).database(t, "template1")
}

// Template is a database that is filled once and copied for each test, which is faster
// than filling one per test.
type Template struct {
	// Fill fills the empty database at url. It must close every connection to it.
	Fill func(url string) error

	once sync.Once
	name string
	err  error
}

// New returns the URL of a copy of the template, like [New]. The first call fills the
// template.
func (m *Template) New(t testing.TB) string {
	t.Helper()
	c := Shared(t)
	m.once.Do(func() {
		if m.name, m.err = c.create("template1"); m.err == nil {
			m.err = m.Fill(c.URL(m.name))
		}
	})
	if m.err != nil {
		t.Fatalf("fill template of test databases: %v", m.err)
	}
	return c.database(t, m.name)
}

func (c *Cluster) database(t testing.TB, template string) string {
	t.Helper()
	name, err := c.create(template)
	if err != nil {
		t.Fatal(err)
	}
	return c.URL(name)
}

// create creates a database and returns its name.
func (c *Cluster) create(template string) (name string, err error) {
	c.mu.Lock()
	c.n++
	name = fmt.Sprintf("test%d", c.n)
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), await.Hang)
	defer cancel()
	conn, err := pgx.Connect(ctx, c.URL("postgres"))
	if err != nil {
		return "", fmt.Errorf("connect to test cluster: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+name+" TEMPLATE "+template); err != nil {
		return "", fmt.Errorf("create test database: %w", err)
	}
	return name, nil
}

// Connect returns a connection to a database, and closes it when t ends.
func Connect(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), url)
	if err != nil {
		t.Fatalf("connect to test database: %v", err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// Shared returns the cluster, for tests that stop and start it.
func Shared(t testing.TB) *Cluster {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.cluster == nil && shared.err == nil {
		shared.cluster, shared.err = newCluster()
	}
	if errors.Is(shared.err, errMissing) {
		t.Skip(shared.err)
	}
	if shared.err != nil {
		t.Fatalf("start test cluster: %v", shared.err)
	}
	return shared.cluster
}

// URL returns the URL of a database of the cluster. With standbys, clients use one of
// them if the cluster is unreachable or read-only.
func (c *Cluster) URL(database string, standbys ...*Cluster) string {
	hosts := []string{c.dir}
	for _, s := range standbys {
		hosts = append(hosts, s.dir)
	}
	return "postgres:///" + database + "?user=postgres&host=" + url.QueryEscape(strings.Join(hosts, ","))
}

// Standby starts a standby of the cluster, and stops it when the test ends.
func (c *Cluster) Standby(t testing.TB) *Cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "wrenn-pgtest-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &Cluster{dir: dir, bin: c.bin, cred: c.cred}
	if err := os.Chown(dir, int(c.cred.Credential.Uid), int(c.cred.Credential.Gid)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(c.bin, "pg_basebackup"), "-h", c.dir, "-U", "postgres", "-D", filepath.Join(dir, "data"), "-R", "-X", "stream", "-c", "fast", "--no-sync")
	cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Credential: c.cred.Credential}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	return s
}

// Do runs statements on the cluster.
func (c *Cluster) Do(t testing.TB, statements ...string) {
	t.Helper()
	conn := Connect(t, c.URL("postgres"))
	for _, s := range statements {
		if _, err := conn.Exec(context.Background(), s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

func newCluster() (*Cluster, error) {
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	account, err := user.Lookup("postgres")
	if len(bins) == 0 || err != nil || os.Getuid() != 0 {
		return nil, errMissing
	}
	slices.Sort(bins)
	uid, _ := strconv.Atoi(account.Uid)
	gid, _ := strconv.Atoi(account.Gid)
	dir, err := os.MkdirTemp("", "wrenn-pgtest-")
	if err != nil {
		return nil, err
	}
	c := &Cluster{
		dir: dir, bin: bins[len(bins)-1],
		cred: &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
			Setsid:     true,
			// The kernel stops the cluster if the test binary dies.
			Pdeathsig: syscall.SIGQUIT,
		},
	}
	if err := os.Chown(dir, uid, gid); err != nil {
		return nil, err
	}
	initdb := exec.Command(filepath.Join(c.bin, "initdb"), "-D", filepath.Join(dir, "data"), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync")
	initdb.Dir, initdb.SysProcAttr = dir, &syscall.SysProcAttr{Credential: c.cred.Credential}
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return c, c.Start()
}

// Start starts the cluster and returns when it accepts connections.
func (c *Cluster) Start() error {
	cmd := exec.Command(filepath.Join(c.bin, "postgres"), "-D", filepath.Join(c.dir, "data"), "-k", c.dir, "-h", "",
		"-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off", "-c", "shared_buffers=32MB",
		"-c", "max_connections=500", "-c", "lc_messages=C", "-c", "log_min_messages=warning")
	cmd.Dir, cmd.SysProcAttr = c.dir, c.cred
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	started, done := make(chan error, 1), make(chan struct{})
	go func() {
		// The death signal is tied to the thread that forked, so keep the thread.
		runtime.LockOSThread()
		defer close(done)
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		var said strings.Builder
		lines := bufio.NewScanner(stderr)
		ready := false
		for !ready && lines.Scan() {
			fmt.Fprintln(&said, lines.Text())
			ready = strings.Contains(lines.Text(), "ready to accept connections") || strings.Contains(lines.Text(), "ready to accept read-only connections")
		}
		if ready {
			started <- nil
		} else {
			started <- fmt.Errorf("postgres ended:\n%s", said.String())
		}
		io.Copy(io.Discard, stderr)
		cmd.Wait()
	}()
	if err := <-started; err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.proc, c.done = cmd.Process, done
	return nil
}

// Stop shuts the cluster down fast, which closes every connection.
func (c *Cluster) Stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.proc == nil {
		return
	}
	c.proc.Signal(syscall.SIGINT)
	<-c.done
	c.proc = nil
}
