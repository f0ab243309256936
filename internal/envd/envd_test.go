package envd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/envd/account"
	"github.com/wrenn-dev/wrenn/internal/filesign"
	"github.com/wrenn-dev/wrenn/internal/gen/filesystem/filesystemconnect"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

const testToken = "0123456789abcdef"

// guest is a daemon on loopback, with its clients.
type guest struct {
	t          *testing.T
	server     *Server
	addr       string
	client     *http.Client // HTTP/2 in clear text
	plain      *http.Client // HTTP/1.1
	url        string
	process    processconnect.ProcessClient
	filesystem filesystemconnect.FilesystemClient
	cgroup     string
	nobody     *account.Account
	flying     flights
	dir        string // owned by nobody, who can reach it
}

func TestMain(m *testing.M) {
	// Like the program: users' processes must not inherit descriptors that the test's
	// parent left open.
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	// Signals that the test's parent ignores (nohup does) would stay ignored in
	// processes; signals with a handler here have their default action there.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT)
	os.Exit(m.Run())
}

var groups atomic.Int32

// testCgroup returns the test's own cgroup, or "" without cgroup2.
func testCgroup() string {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err == nil {
			return filepath.Join(root, fmt.Sprintf("wrenn-test-envd-%d-%d", os.Getpid(), groups.Add(1)))
		}
	}
	return ""
}

// flights counts the requests that the daemon handles, by path.
type flights struct {
	mu sync.Mutex
	of map[string]int
}

func (f *flights) add(path string, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.of == nil {
		f.of = make(map[string]int)
	}
	f.of[path] += n
}

func (f *flights) count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.add(r.URL.Path, 1)
		defer f.add(r.URL.Path, -1)
		next.ServeHTTP(w, r)
	})
}

// handles waits until the daemon handles exactly n requests for a path.
func (g *guest) handles(n int, path string) {
	g.t.Helper()
	await.Until(g.t, fmt.Sprintf("the daemon handles %d requests of %s", n, path), func() bool {
		g.flying.mu.Lock()
		defer g.flying.mu.Unlock()
		return g.flying.of[path] == n
	})
}

// raw starts a daemon that is not initialised.
func raw(t *testing.T) *guest {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: acts as other users")
	}
	nobody, err := account.Lookup("nobody")
	if err != nil {
		t.Skip("needs the user nobody: ", err)
	}
	g := &guest{t: t, cgroup: testCgroup(), nobody: nobody}
	clock := g.cgroup
	if clock != "" {
		clock += "-clock"
	}
	g.server, err = New(Config{DefaultUser: "nobody", Cgroup: g.cgroup, Clock: clock, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(g.server.Handler())
	srv.Listener.Close()
	srv.Listener = l
	srv.Config = netaddr.Server(g.flying.count(g.server.Handler()))
	srv.Start()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), await.Hang)
		defer cancel()
		g.server.Close(ctx)
		if ctx.Err() != nil {
			t.Error("the daemon was not closed")
		}
		srv.CloseClientConnections()
		srv.Close()
		if _, err := os.Stat(g.cgroup); g.cgroup != "" && err == nil {
			t.Error("the daemon left its cgroup")
		}
		if g.server.clock != nil {
			if err := g.server.clock.Close(ctx); err != nil { // The clock's group belongs to the machine.
				t.Error(err)
			}
		}
	})
	g.addr = l.Addr().String()
	g.client, g.url = netaddr.HTTPClient(g.addr)
	g.plain = &http.Client{Transport: netaddr.Transport(g.addr, false)}
	g.plain.Transport.(*http.Transport).DisableCompression = true
	t.Cleanup(func() { g.client.CloseIdleConnections(); g.plain.CloseIdleConnections() })
	g.process = processconnect.NewProcessClient(g.client, g.url)
	g.filesystem = filesystemconnect.NewFilesystemClient(g.client, g.url)

	if g.dir, err = os.MkdirTemp("", "wrenn-envd-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(g.dir) })
	if err := os.Chown(g.dir, int(nobody.UID), int(nobody.GID)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(g.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return g
}

// boot starts a daemon and initialises it.
func boot(t *testing.T) *guest {
	t.Helper()
	g := raw(t)
	g.init(map[string]any{"accessToken": testToken, "envVars": map[string]string{"FROM": "init", "INIT": "1"}}, "", http.StatusNoContent)
	return g
}

func (g *guest) init(body any, token string, want int) {
	g.t.Helper()
	b, _ := json.Marshal(body)
	res := g.do("POST", "/init", token, bytes.NewReader(b), nil)
	if res.code != want {
		g.t.Errorf("/init %s answers %d, not %d: %s", b, res.code, want, res.body)
	}
}

type answer struct {
	code   int
	body   string
	header http.Header
}

// do makes a plain request over HTTP/1.1.
func (g *guest) do(method, path, token string, body io.Reader, header map[string]string) answer {
	g.t.Helper()
	req, err := http.NewRequestWithContext(g.t.Context(), method, g.url+path, body)
	if err != nil {
		g.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set(hostwire.AccessToken, token)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	res, err := g.plain.Do(req)
	if err != nil {
		g.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	return answer{res.StatusCode, string(b), res.Header}
}

// as returns a Connect request with the token, for a user ("" means the default).
func as[T any](user string, msg *T) *connect.Request[T] {
	req := connect.NewRequest(msg)
	req.Header().Set(hostwire.AccessToken, testToken)
	if user != "" {
		h := http.Request{Header: http.Header{}}
		h.SetBasicAuth(user, "")
		req.Header().Set("Authorization", h.Header.Get("Authorization"))
	}
	return req
}

func wantCode(t *testing.T, what string, err error, want connect.Code) {
	t.Helper()
	if err == nil || connect.CodeOf(err) != want {
		t.Errorf("%s: %v, not %v", what, err, want)
	}
}

func TestInit(t *testing.T) {
	g := raw(t)
	if a := g.do("GET", "/health", "", nil, nil); a.code != 204 {
		t.Errorf("/health answers %d", a.code)
	}
	// Before the sandbox has its token, nothing else is served.
	for _, p := range []string{"/metrics", "/envs", "/files?path=/etc/passwd", "/archive?path=/etc", "/nothing"} {
		if a := g.do("GET", p, testToken, nil, nil); a.code != 503 {
			t.Errorf("%s answers %d: %s", p, a.code, a.body)
		}
	}
	_, err := g.process.List(t.Context(), as("", &pb.ListRequest{}))
	wantCode(t, "list before init", err, connect.CodeUnavailable)

	g.init("x", "", 400)
	g.init(map[string]any{}, "", 400)
	g.init(map[string]any{"accessToken": "t", "envVars": map[string]string{"A=B": ""}}, "", 400)
	g.init(map[string]any{"accessToken": "t", "defaultUser": "nosuchuser"}, "", 400)
	g.init(map[string]any{"accessToken": testToken, "envVars": map[string]string{"A": "1"}, "timestamp": "2030-01-01T00:00:00Z", "more": 1}, "", 204)
	// From now on the token is required.
	g.init(map[string]any{"accessToken": "mine"}, "", 401)
	g.init(map[string]any{"accessToken": "mine"}, "mine", 401)
	if a := g.do("GET", "/envs", testToken, nil, nil); a.code != 200 || strings.TrimSpace(a.body) != `{"A":"1"}` {
		t.Errorf("/envs answers %d %s", a.code, a.body)
	}
	g.init(map[string]any{"accessToken": "next", "envVars": map[string]string{}}, testToken, 204)
	if a := g.do("GET", "/envs", testToken, nil, nil); a.code != 401 {
		t.Errorf("the old token still opens /envs: %d", a.code)
	}
	if a := g.do("GET", "/envs", "next", nil, nil); strings.TrimSpace(a.body) != `{}` {
		t.Errorf("/envs answers %s", a.body)
	}
}

func TestToken(t *testing.T) {
	g := boot(t)
	for _, token := range []string{"", "x", testToken + "0", testToken[:len(testToken)-1], strings.ToUpper(testToken)} {
		for _, r := range []struct{ method, path string }{
			{"GET", "/metrics"},
			{"GET", "/envs"},
			{"POST", "/freeze"},
			{"POST", "/thaw"},
			{"GET", "/files?path=/etc/passwd"},
			{"HEAD", "/files?path=/etc/passwd"},
			{"POST", "/files?path=/tmp/x"},
			{"GET", "/archive?path=/etc"},
			{"GET", "/archive?path=/etc&signature=v1_x"},
			{"POST", "/archive?path=/tmp"},
			{"GET", "/"},
			{"POST", "/process.Process/Start"},
			{"POST", "//process.Process/List"},
			{"POST", "/filesystem.Filesystem/Stat"},
		} {
			if a := g.do(r.method, r.path, token, nil, nil); a.code != 401 && a.code != 301 && a.code != 307 {
				t.Errorf("%s %s with token %q answers %d", r.method, r.path, token, a.code)
			}
		}
	}
	req := connect.NewRequest(&pb.ListRequest{})
	_, err := g.process.List(t.Context(), req)
	wantCode(t, "list without a token", err, connect.CodeUnauthenticated)
	_, err = g.process.List(t.Context(), as("nosuchuser", &pb.ListRequest{}))
	wantCode(t, "list as an unknown user", err, connect.CodeInvalidArgument)
	_, err = g.tryStart("nosuchuser", &pb.StartRequest{Process: sh("true")})
	wantCode(t, "a process of an unknown user", err, connect.CodeInvalidArgument)
	if a := g.do("GET", "/metrics", testToken, nil, nil); a.code != 200 || !strings.Contains(a.body, `"cpu_used_pct"`) {
		t.Errorf("/metrics answers %d %s", a.code, a.body)
	}
	if a := g.do("GET", "/nothing", testToken, nil, nil); a.code != 404 {
		t.Errorf("/nothing answers %d", a.code)
	}
	if a := g.do("DELETE", "/files", testToken, nil, nil); a.code != 405 {
		t.Errorf("DELETE /files answers %d", a.code)
	}
}

func TestSignature(t *testing.T) {
	g := boot(t)
	file := filepath.Join(g.dir, "f")
	if err := os.WriteFile(file, []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	later := strconv.FormatInt(time.Now().Unix()+60, 10)
	earlier := strconv.FormatInt(time.Now().Unix()-60, 10)
	get := func(q url.Values) int { return g.do("GET", "/files?"+q.Encode(), "", nil, nil).code }
	query := func(sig, exp, user string) url.Values {
		q := url.Values{"path": {file}, "signature": {sig}}
		if exp != "" {
			q.Set("signature_expiration", exp)
		}
		if user != "" {
			q.Set("username", user)
		}
		return q
	}
	// The protocol's own example, not computed by this program.
	if got := filesign.Of("/a", "read", "user", "tok", ""); got != "v1_5/qV17q4iOP0/yqALMZMgfTwEO48DLxgPQc2c1vTYWE" {
		t.Logf("signature of the example is %s", got)
	}
	for _, c := range []struct {
		what string
		q    url.Values
		want int
	}{
		{"good", query(filesign.Of(file, "read", "", testToken, ""), "", ""), 200},
		{"with expiration", query(filesign.Of(file, "read", "", testToken, later), later, ""), 200},
		{"with user", query(filesign.Of(file, "read", "root", testToken, later), later, "root"), 200},
		{"expired", query(filesign.Of(file, "read", "", testToken, earlier), earlier, ""), 401},
		{"other operation", query(filesign.Of(file, "write", "", testToken, ""), "", ""), 401},
		{"other user", query(filesign.Of(file, "read", "", testToken, ""), "", "root"), 401},
		{"other path", query(filesign.Of("/etc/passwd", "read", "", testToken, ""), "", ""), 401},
		{"other token", query(filesign.Of(file, "read", "", "x", ""), "", ""), 401},
		{"expiration not signed", query(filesign.Of(file, "read", "", testToken, ""), later, ""), 401},
		{"expiration taken away", query(filesign.Of(file, "read", "", testToken, later), "", ""), 401},
		{"expiration no number", query(filesign.Of(file, "read", "", testToken, "x"), "x", ""), 401},
		{"empty", query("", "", ""), 401},
		{"path twice", url.Values{"path": {file, "/etc/passwd"}, "signature": {filesign.Of(file, "read", "", testToken, "")}}, 401},
	} {
		if got := get(c.q); got != c.want {
			t.Errorf("%s: %d, not %d", c.what, got, c.want)
		}
	}
	// The signature does not cover basic authentication, so the header has no effect.
	q := query(filesign.Of(file, "read", "", testToken, ""), "", "")
	q.Set("path", "/etc/shadow")
	q.Set("signature", filesign.Of("/etc/shadow", "read", "", testToken, ""))
	if a := g.do("GET", "/files?"+q.Encode(), "", nil, map[string]string{"Authorization": "Basic cm9vdDo="}); a.code != 403 {
		t.Errorf("a signature for the default user serves root: %d", a.code)
	}
	// A signature does not make a wrong token valid.
	q = query(filesign.Of(file, "read", "", testToken, ""), "", "")
	if a := g.do("GET", "/files?"+q.Encode(), "wrong", nil, nil); a.code != 401 {
		t.Errorf("a wrong token with a signature answers %d", a.code)
	}
}

func TestFreeze(t *testing.T) {
	g := boot(t)
	if g.cgroup == "" {
		t.Skip("needs a cgroup2 mount")
	}
	users, clock, others := g.writes(), g.clockWrites(), g.othersWrite()
	await.Until(t, "output", func() bool { return users() > 0 && clock() > 0 })
	if a := g.do("POST", "/freeze", testToken, nil, nil); a.code != 204 {
		t.Fatalf("/freeze answers %d %s", a.code, a.body)
	}
	users0, clock0 := users(), clock()
	others()
	if users() != users0 || clock() != clock0 {
		t.Error("a frozen process runs")
	}
	if a := g.do("POST", "/thaw", testToken, nil, nil); a.code != 204 {
		t.Fatalf("/thaw answers %d %s", a.code, a.body)
	}
	await.Until(t, "output after the thaw", func() bool { return users() > users0 && clock() > clock0 })
}

const writeAlways = "while :; do echo x; sleep 0.02; done >> "

// writes starts a user's process that writes all the time, and returns a function that
// returns the number of bytes written so far.
func (g *guest) writes() func() int64 {
	g.t.Helper()
	file := filepath.Join(g.dir, "written")
	p := g.start("", &pb.StartRequest{Process: sh(writeAlways + file)})
	g.t.Cleanup(p.Close)
	return func() int64 { return sizeOf(file) }
}

// clockWrites is like [guest.writes], for a process in the group of the clock daemon.
func (g *guest) clockWrites() func() int64 {
	g.t.Helper()
	group, err := g.server.clock.New()
	if err != nil {
		g.t.Fatal(err)
	}
	defer group.Close()
	file := filepath.Join(g.dir, "clock")
	cmd := exec.Command("sh", "-c", writeAlways+file)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: group.FD()}
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		_ = g.server.clock.Kill()
		_ = cmd.Wait()
	})
	return func() int64 { return sizeOf(file) }
}

// othersWrite starts a process that writes like that of [guest.writes], but that the daemon
// cannot freeze. It returns a function that waits until the process has written some more.
func (g *guest) othersWrite() (some func()) {
	g.t.Helper()
	file := filepath.Join(g.t.TempDir(), "others")
	cmd := exec.Command("sh", "-c", writeAlways+file)
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return func() {
		from := sizeOf(file)
		if !await.Within(await.Hang, func() bool { return sizeOf(file) >= from+8 }) {
			g.t.Error("the process that is not frozen does not write")
		}
	}
}

// sizeOf returns the size of a file, or 0 if it does not exist.
func sizeOf(file string) int64 {
	info, err := os.Stat(file)
	if err != nil {
		return 0
	}
	return info.Size()
}

func TestRun(t *testing.T) {
	s, err := New(Config{DefaultUser: "root", Cgroup: testCgroup()})
	if err != nil {
		t.Fatal(err)
	}
	addr := "unix:" + filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, addr) }()
	client, base := netaddr.HTTPClient(addr)
	await.Until(t, "/health", func() bool {
		res, err := client.Get(base + "/health")
		if err == nil {
			res.Body.Close()
		}
		return err == nil && res.StatusCode == 204
	})
	res, err := client.Post(base+"/init", "application/json", strings.NewReader(`{"accessToken":"`+testToken+`"}`))
	if err != nil || res.StatusCode != 204 {
		t.Fatalf("/init: %v, %v", res, err)
	}
	stream, err := processconnect.NewProcessClient(client, base).Start(t.Context(), as("root", &pb.StartRequest{Process: sh("(setsid sleep 60 &); exec sleep 60")}))
	if err != nil || !stream.Receive() {
		t.Fatalf("start: %v, %v", err, stream.Err())
	}
	cancel()
	if err := await.Recv(t, "the daemon stops", done); err != nil {
		t.Errorf("run: %v", err)
	}
	var end *pb.ProcessEvent_EndEvent
	for stream.Receive() {
		end = stream.Msg().GetEvent().GetEnd()
	}
	if end == nil || end.GetExited() {
		t.Errorf("a process that ended with the daemon has the end event %v, %v", end, stream.Err())
	}
}
