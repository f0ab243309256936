package up

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/agent/format"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/layout"
)

// newService returns a service in a folder that other users may traverse.
func newService(t *testing.T) *service {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to run programs as other users")
	}
	dir, err := os.MkdirTemp("", "wrenn-up-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	spawner, err := newSpawner(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := &service{dir: layout.Dir(dir), out: t.Output(), spawner: spawner, began: time.Now()}
	for _, d := range []string{s.dir.Run(), s.dir.Logs()} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(s.stopAll)
	return s
}

func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
}

func TestPostgresOutlivesItsDeath(t *testing.T) {
	s := newService(t)
	if bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres"); len(bins) == 0 {
		t.Skip("needs PostgreSQL")
	}
	pg, err := newPostgres(t.Context(), s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.launch(t.Context(), pg.program()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := pg.ensureDatabase(t.Context(), "wrenn"); err != nil {
			t.Fatal(err)
		}
	}
	exec1 := func(sql string) error {
		conn, err := pgx.Connect(t.Context(), pg.url("wrenn"))
		if err != nil {
			return err
		}
		defer conn.Close(context.Background())
		_, err = conn.Exec(t.Context(), sql)
		return err
	}
	if err := exec1("CREATE TABLE kept (n int)"); err != nil {
		t.Fatal(err)
	}
	var pid int
	b, err := os.ReadFile(filepath.Join(pg.data(), "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := poll(await.Context(t), func(context.Context) error { return exec1("INSERT INTO kept VALUES (1)") }); err != nil {
		t.Errorf("it did not come back with its data: %v", err)
	}
}

func TestRedis(t *testing.T) {
	s := newService(t)
	need(t, "redis-server")
	rd, err := newRedis(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.launch(t.Context(), rd.program()); err != nil {
		t.Fatal(err)
	}
	o, err := redis.ParseURL(rd.url())
	if err != nil {
		t.Fatal(err)
	}
	c := redis.NewClient(o)
	defer c.Close()
	if err := c.Set(t.Context(), "k", "v", 0).Err(); err != nil {
		t.Error(err)
	}
	// Redis takes a bounded part of the machine's memory, and never refuses new data.
	for name, want := range map[string]string{"maxmemory": strconv.Itoa(256 << 20), "maxmemory-policy": "allkeys-lru"} {
		if got, err := c.ConfigGet(t.Context(), name).Result(); err != nil || got[name] != want {
			t.Errorf("%s is %q, want %q, %v", name, got[name], want, err)
		}
	}
}

// TestDatabasesInheritNothing checks that programs that run as other users get neither
// the environment nor the descriptors of `wrenn up`.
func TestDatabasesInheritNothing(t *testing.T) {
	secret, err := os.Create(filepath.Join(t.TempDir(), "secret"))
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	if _, err := unix.FcntlInt(secret.Fd(), unix.F_SETFD, 0); err != nil { // like a file that a shell opens
		t.Fatal(err)
	}
	t.Setenv("WRENN_SMTP_URL", "smtp://user:secret@mail.example.com")
	s := newService(t)
	need(t, "redis-server")
	if bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres"); len(bins) == 0 {
		t.Skip("needs PostgreSQL")
	}
	pg, err := newPostgres(t.Context(), s.dir)
	if err != nil {
		t.Fatal(err)
	}
	rd, err := newRedis(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []program{pg.program(), rd.program()} {
		c, err := launch(t.Context(), s.spawner, p, filepath.Join(s.dir.Logs(), p.name), s.say)
		if err != nil {
			t.Fatal(err)
		}
		s.stack = append(s.stack, c.close)
		proc := fmt.Sprintf("/proc/%d/", c.cmd.Process.Pid)
		environ, err := os.ReadFile(proc + "environ")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(environ), "secret") {
			t.Errorf("%s has the environment %q", p.name, environ)
		}
		open, err := os.ReadDir(proc + "fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range open {
			if to, _ := os.Readlink(proc + "fd/" + fd.Name()); to == secret.Name() {
				t.Errorf("%s has descriptor %s: %s", p.name, fd.Name(), to)
			}
		}
	}
}

func TestProgramThatDoesNotStart(t *testing.T) {
	s := newService(t)
	err := s.launch(t.Context(), program{
		name: "broken", command: func() *exec.Cmd { return exec.Command("sh", "-c", "echo the reason; exit 3") },
		ready: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, quit: syscall.SIGTERM,
	})
	if err == nil || !strings.Contains(err.Error(), "the reason") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("got %v", err)
	}
}

// TestHangup checks that a SIGHUP reaches the programs that reload their settings and no
// others, and that everything stops if the terminal is gone.
func TestHangup(t *testing.T) {
	if signal.Ignored(syscall.SIGHUP) {
		t.Skip("SIGHUP is ignored, as under nohup")
	}
	s := newService(t)
	first, second := filepath.Join(t.TempDir(), "first"), filepath.Join(t.TempDir(), "second")
	for _, p := range []program{
		{name: "reloads", reloads: true, command: func() *exec.Cmd {
			return exec.Command("sh", "-c", `trap 'echo again >>'"$0" HUP; echo up >"$0"; while :; do sleep 0.01; done`, first)
		}},
		{name: "does not", command: func() *exec.Cmd {
			return exec.Command("sh", "-c", `echo up >>"$0"; while :; do sleep 0.01; done`, second)
		}},
	} {
		p.quit = syscall.SIGKILL
		p.ready = func(ctx context.Context) error {
			return poll(ctx, func(context.Context) error {
				_, err := os.Stat(map[bool]string{true: first, false: second}[p.reloads])
				return err
			})
		}
		if err := s.launch(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	s.followHangups(stop)
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "the program gets the signal", func() bool {
		text, err := os.ReadFile(first)
		return err == nil && string(text) == "up\nagain\n"
	})
	if text, err := os.ReadFile(second); err != nil || string(text) != "up\n" {
		t.Errorf("the other program wrote %q, %v", text, err)
	}
	if ctx.Err() != nil {
		t.Error("it stops although the terminal is there")
	}
	s.hangup(true, stop)
	if ctx.Err() == nil {
		t.Error("it does not stop although the terminal is gone")
	}
}

// TestProgramIsSlow checks that a program has its own limit for getting ready, and can be
// stopped before it is ready.
func TestProgramIsSlow(t *testing.T) {
	s := newService(t)
	slow := program{
		name: "slow", command: func() *exec.Cmd { return exec.Command("sleep", "1000") }, quit: syscall.SIGTERM,
		within: time.Millisecond,
		ready:  func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	}
	if err := s.launch(t.Context(), slow); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("it is not ready in time: %v", err)
	}
	// It ends, and is stopped while it gets ready again.
	first, second := true, make(chan struct{})
	slow.within = 24 * time.Hour
	slow.ready = func(ctx context.Context) error {
		if first {
			first = false
			return nil
		}
		close(second)
		<-ctx.Done()
		return ctx.Err()
	}
	c, err := launch(t.Context(), s.spawner, slow, filepath.Join(s.dir.Logs(), "slow"), s.say)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	await.Recv(t, "it gets ready again", second)
	stopped := make(chan struct{})
	go func() { defer close(stopped); c.close() }()
	await.Recv(t, "it is stopped", stopped)
}

func TestLogsAreBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "l")
	l, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	line := make([]byte, 1<<20)
	for range 40 {
		if _, err := l.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	var total int64
	for _, p := range []string{path, path + ".old"} {
		info, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		total += info.Size()
	}
	if total > 2*maxLog {
		t.Errorf("%d bytes", total)
	}
}

// TestNewerData checks that on data of a later release nothing is changed or started.
func TestNewerData(t *testing.T) {
	s := newService(t)
	record := s.dir.SandboxRecord(uuid.New())
	if err := errors.Join(os.MkdirAll(filepath.Dir(record), 0o700), os.WriteFile(record, []byte(`{"version": 1000}`), 0o600)); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadDir(string(s.dir))
	if err != nil {
		t.Fatal(err)
	}
	var newer *format.NewerError
	if err := s.start(t.Context(), options{listen: "127.0.0.1:0"}); !errors.As(err, &newer) || newer.Path != record {
		t.Errorf("the error is %v", err)
	}
	if after, err := os.ReadDir(string(s.dir)); err != nil || fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("before: %v, after: %v, %v", before, after, err)
	}
}

// TestDamagedSecrets checks that damaged or missing secrets are not replaced if there is
// a database, which depends on them.
func TestDamagedSecrets(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	for _, text := range []string{"", "{", "{}", `{"secret_key": "a", "agent_token": "b", "admin_password": "c"}`} {
		if err := os.WriteFile(dir.Secrets(), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadSecrets(dir); err == nil || !strings.Contains(err.Error(), "restore it") {
			t.Errorf("%q: %v", text, err)
		}
	}
	if err := errors.Join(os.Remove(dir.Secrets()), os.MkdirAll(filepath.Join(dir.Postgres(), postgresData), 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := loadSecrets(dir); err == nil || !strings.Contains(err.Error(), "restore it") {
		t.Errorf("without them: %v", err)
	}
	if _, err := os.Stat(dir.Secrets()); err == nil {
		t.Error("new secrets were created")
	}
}

func TestSecretsAreMadeOnce(t *testing.T) {
	dir := layout.Dir(t.TempDir())
	a, err := loadSecrets(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := loadSecrets(dir)
	if err != nil || a != b {
		t.Errorf("created twice: %v", err)
	}
	if len(a.AdminAPIKey) != len("wrn_")+40 {
		t.Errorf("API key of %d characters", len(a.AdminAPIKey))
	}
	if info, err := os.Stat(dir.Secrets()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestPublicURL(t *testing.T) {
	for in, want := range map[string]string{
		":8000": "http://localhost:8000", "127.0.0.1:9": "http://localhost:9", ":80": "http://localhost", "10.1.2.3:8000": "http://10.1.2.3:8000", "[::]:8000": "http://localhost:8000",
	} {
		if got := publicURL(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestOneUpPerDirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run")
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	unlock, err := lock(filepath.Join(path, "up.lock"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(filepath.Join(path, "up.lock")); err == nil || !strings.Contains(err.Error(), "--dir") {
		t.Errorf("got %v", err)
	}
	unlock()
	again, err := lock(filepath.Join(path, "up.lock"))
	if err != nil {
		t.Fatal(err)
	}
	again()
}

// TestListen checks that plain HTTP listens on loopback only, unless the user asks for
// more.
func TestListen(t *testing.T) {
	var said strings.Builder
	cmd := Command(&said)
	if got := cmd.Flags().Lookup("listen").DefValue; checkListen(t.Context(), options{listen: got}) != nil {
		t.Errorf("%s, the default, is refused", got)
	}
	for listen, ok := range map[string]bool{
		"localhost:8000": true, "127.0.0.1:1": true, "[::1]:1": true, "127.0.0.2:1": true,
		":8000": false, "0.0.0.0:1": false, "[::]:1": false, "192.0.2.1:1": false, "[2001:db8::1]:80": false,
	} {
		if err := checkListen(t.Context(), options{listen: listen}); (err == nil) != ok || !ok && !strings.Contains(err.Error(), "--insecure") {
			t.Errorf("%s: %v", listen, err)
		}
		if err := checkListen(t.Context(), options{listen: listen, insecure: true}); err != nil {
			t.Errorf("%s with --insecure: %v", listen, err)
		}
	}
}

// TestAnnounce checks that the output says where the secrets are, and contains none of
// them.
func TestAnnounce(t *testing.T) {
	var said strings.Builder
	s := &service{dir: "/data", out: &said, secrets: secrets{SecretKey: "key-1", AgentToken: "token-2", AdminPassword: "password-3", AdminAPIKey: "wrn_4"}}
	s.announce(options{listen: "localhost:8000"})
	for _, want := range []string{"http://localhost:8000/v1", adminEmail, s.dir.Credentials()} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("the output lacks %s:\n%s", want, said.String())
		}
	}
	for _, secret := range []string{"key-1", "token-2", "password-3", "wrn_4"} {
		if strings.Contains(said.String(), secret) {
			t.Errorf("the output has %s", secret)
		}
	}
}

// TestUnfinishedSpare kills wrenn up while it writes the spare file: the next one
// completes the file.
func TestUnfinishedSpare(t *testing.T) {
	pg := &postgres{dir: t.TempDir()}
	if free, err := freeMiB(pg.dir); err != nil || free < plentyMiB+spareMiB {
		t.Skipf("%d MiB of disk are free, %v", free, err)
	}
	if err := os.WriteFile(pg.spare(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := pg.makeRoom(fullMiB); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(pg.spare()); err != nil || st.Size() != spareMiB<<20 {
		t.Errorf("the spare file is %v, %v", st, err)
	}
}

// TestFullDisk checks that PostgreSQL keeps writing when guests fill the disk, and starts
// again after a kill.
func TestFullDisk(t *testing.T) {
	t.Run("ext4", func(t *testing.T) {
		// More than the log's files hold, several times over.
		testFullDisk(t, 2*logMiB/segmentMiB, "mkfs.ext4", "-q", "-m", "0")
	})
	// btrfs overwrites in place here, but slowly on a full disk.
	t.Run("btrfs", func(t *testing.T) { testFullDisk(t, 1, "mkfs.btrfs", "-q") })
}

// testFullDisk fills a disk, which mkfs formats, under PostgreSQL, and then writes
// messages, each nearly as large as a file of its log.
func testFullDisk(t *testing.T, messages int, mkfs ...string) {
	s := newService(t)
	need(t, mkfs[0], "mount", "dd")
	if bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres"); len(bins) == 0 {
		t.Skip("needs PostgreSQL")
	}
	// The test's own disk, small enough to fill.
	image, disk := filepath.Join(t.TempDir(), "disk"), string(s.dir)+"/disk"
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 2<<30), os.Mkdir(disk, 0o711)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs[0], append(mkfs[1:], image)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", image, disk).CombinedOutput(); err != nil {
		t.Skipf("needs loop devices and the file system: %v: %s", err, out)
	}
	t.Cleanup(func() {
		s.stopAll() // the programs that use the disk
		if out, err := exec.Command("umount", disk).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	if err := os.Chmod(disk, 0o711); err != nil {
		t.Fatal(err)
	}
	pg, err := newPostgres(t.Context(), layout.Dir(disk))
	if err != nil {
		t.Fatal(err)
	}
	// The programs' logs are elsewhere, because whoever fills a disk fills those too.
	if err := s.launch(t.Context(), pg.program()); err != nil {
		t.Fatal(err)
	}
	if err := pg.reserveLog(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := pg.inPlace(); err != nil {
		t.Fatal(err)
	}
	if n, err := pg.segments(); err != nil || n < logMiB/segmentMiB {
		t.Fatalf("%d files of the log, %v", n, err)
	}
	connect := func() *pgx.Conn {
		t.Helper()
		var conn *pgx.Conn
		await.Until(t, "PostgreSQL answers", func() (ok bool) {
			conn, err = pgx.Connect(t.Context(), pg.url("postgres"))
			return err == nil
		})
		t.Cleanup(func() { conn.Close(context.Background()) })
		return conn
	}
	conn := connect()
	begun := func() (at time.Time) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), "SELECT pg_postmaster_start_time()").Scan(&at); err != nil {
			t.Fatal(err)
		}
		return at
	}
	exec1 := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	exec1("CREATE TABLE rows AS SELECT n AS id, 0 AS counted, repeat('x', 500) AS filler FROM generate_series(1, 2000) n")
	if err := pg.makeRoom(spareMiB); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(pg.spare()); err != nil || st.Size() != spareMiB<<20 {
		t.Fatalf("no spare file: %v", err)
	}
	fill := func(name string) {
		t.Helper()
		out, _ := exec.Command("dd", "if=/dev/zero", "of="+filepath.Join(disk, name), "bs=64k").CombinedOutput()
		if free, err := freeMiB(disk); err != nil || free > 0 || !strings.Contains(string(out), "No space left") {
			t.Fatalf("%d MiB are free, %v: %s", free, err, out)
		}
	}
	fill("guest")
	started := begun()
	for range messages {
		// On a busy disk, PostgreSQL's own checkpoints may not keep up with this.
		var used int64
		if err := conn.QueryRow(t.Context(), "SELECT (pg_current_wal_insert_lsn() - redo_lsn)::bigint >> 20 FROM pg_control_checkpoint()").Scan(&used); err != nil {
			t.Fatal(err)
		}
		if used > logMiB*3/4 {
			exec1("CHECKPOINT")
		}
		exec1("SELECT pg_logical_emit_message(true, 'test', repeat('x', 15 << 20))")
	}
	exec1("UPDATE rows SET counted = counted + 1 WHERE id = 1")
	if at := begun(); at != started {
		t.Errorf("PostgreSQL restarted at %v", at)
	}
	// Kill it like the kernel would, on a disk without free space.
	pid, err := os.ReadFile(filepath.Join(pg.data(), "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.SplitN(string(pid), "\n", 2)[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await.Until(t, "the killed PostgreSQL has ended", func() bool { return conn.Ping(t.Context()) != nil })
	conn = connect()
	exec1("UPDATE rows SET counted = counted + 1 WHERE id = 2")
	if _, err := os.Stat(pg.spare()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the spare file exists: %v", err)
	}
}

// TestImportance checks that the service's programs have priority over guests when
// processors are short, and that the caller keeps its own.
func TestImportance(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	runtime.LockOSThread() // A priority is a thread's.
	defer runtime.UnlockOSThread()
	own, err := unix.Getpriority(unix.PRIO_PROCESS, 0) // 20 less the nice value
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSpawner(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := s.start(cmd); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	for pid, want := range map[int]int{cmd.Process.Pid: 20 - importance, 0: own} {
		if got, err := unix.Getpriority(unix.PRIO_PROCESS, pid); err != nil || got != want {
			t.Errorf("process %d has the nice value %d, want %d, %v", pid, 20-got, 20-want, err)
		}
	}
}
