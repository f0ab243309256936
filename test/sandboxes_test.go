package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/await"
)

func TestRun(t *testing.T) {
	i := up(t)
	if out, errs, code := i.cli(t, "print(6*7)", "run", "--", "python3", "-"); out != "42\n" || code != 0 {
		t.Errorf("python: %q, %q, exit code %d", out, errs, code)
	}
	if out, errs, code := i.cli(t, "", "run", "--", "sh", "-c", "exit 7"); code != 7 {
		t.Errorf("exit 7: %q, %q, exit code %d", out, errs, code)
	}
	host, err := exec.Command("uname", "-r").Output()
	if err != nil {
		t.Fatal(err)
	}
	if out, errs, code := i.cli(t, "", "run", "--", "uname", "-r"); code != 0 || out == string(host) || out == "" {
		t.Errorf("the guest's kernel is %q, the host's %q; %q, exit code %d", out, host, errs, code)
	}
	if out, errs, code := i.cli(t, "", "run", "--", "no-such-program"); code != 127 || errs != "wrenn: no-such-program: command not found\n" {
		t.Errorf("no such program: %q, %q, exit code %d", out, errs, code)
	}
	if out, _, _ := i.cli(t, "", "ls", "-o", "json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("run left sandboxes: %s", out)
	}
}

func TestCommandLine(t *testing.T) {
	i := up(t)
	out, errs, code := i.cli(t, "", "create", "--metadata", "purpose=cli")
	if code != 0 {
		t.Fatalf("create: %s", errs)
	}
	id := strings.TrimSpace(out)
	defer i.cli(t, "", "rm", id)
	if out, _, _ := i.cli(t, "", "ls", "--metadata", "purpose=cli"); !strings.Contains(out, id) || !strings.Contains(out, "running") {
		t.Errorf("ls: %s", out)
	}
	if out, errs, code := i.cli(t, "in", "exec", "-i", "-u", "root", "-w", "/tmp", "-e", "A=b", id, "--", "sh", "-c", `cat; echo " $A $(id -un) $(pwd)"; echo err >&2; exit 3`); out != "in b root /tmp\n" || errs != "err\n" || code != 3 {
		t.Errorf("exec: %q, %q, exit code %d", out, errs, code)
	}
	// Copy files and folders there and back.
	src, dst := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(src, "d", "e"), 0o755); err != nil {
		t.Fatal(err)
	}
	binary := bytes.Repeat([]byte{0, 255, '\n', '\r'}, 100_000)
	if err := os.WriteFile(filepath.Join(src, "d", "e", "f"), binary, 0o750); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"cp", filepath.Join(src, "d"), id + ":/tmp/up"},
		{"cp", id + ":/tmp/up", filepath.Join(dst, "down")},
		{"cp", id + ":/tmp/up/e/f", filepath.Join(dst, "single")},
	} {
		if out, errs, code := i.cli(t, "", args...); code != 0 {
			t.Fatalf("%v: %q, %q", args, out, errs)
		}
	}
	for _, name := range []string{"down/e/f", "single"} {
		got, err := os.ReadFile(filepath.Join(dst, name))
		if err != nil || !bytes.Equal(got, binary) {
			t.Errorf("%s came back with %d bytes, %v", name, len(got), err)
		}
		if info, err := os.Stat(filepath.Join(dst, name)); err == nil && info.Mode().Perm() != 0o750 {
			t.Errorf("%s came back with mode %v", name, info.Mode())
		}
	}
	if out, _, code := i.cli(t, "", "logs", id); code != 0 {
		t.Errorf("logs: %q, exit code %d", out, code)
	}
	if out, errs, code := i.cli(t, "", "metrics", id); code != 0 || !strings.Contains(out, "MEMORY") {
		t.Errorf("metrics: %q, %q", out, errs)
	}
	if out, errs, code := i.cli(t, "", "template", "ls"); code != 0 || !strings.Contains(out, "minimal") {
		t.Errorf("template ls: %q, %q", out, errs)
	}
	if _, errs, code := i.cli(t, "", "exec", id, "/etc"); code != 126 || errs != "wrenn: /etc: Is a directory\n" {
		t.Errorf("a folder as a command: exit code %d, %q", code, errs)
	}
	if _, errs, code := i.cli(t, "", "exec", "cl-0000000000000000000000000", "true"); code != 125 || errs == "" {
		t.Errorf("unknown sandbox: %q, exit code %d", errs, code)
	}
	if _, errs, code := i.cli(t, "", "url", id, "0"); code != 2 || errs == "" {
		t.Errorf("port 0: %q, exit code %d", errs, code)
	}
}

func TestExec(t *testing.T) {
	i := up(t)
	c, s := i.client(t), i.sandbox(t, client.CreateOptions{Envs: map[string]string{"FROM": "sandbox", "BOTH": "sandbox"}})
	binary := make([]byte, 256)
	for n := range binary {
		binary[n] = byte(n)
	}
	for name, want := range map[string]struct {
		cmd    client.Command
		stdin  []byte
		stdout string
		code   int
	}{
		"binary":  {client.Command{Cmd: "cat"}, binary, string(binary), 0},
		"envs":    {client.Command{Cmd: `echo $FROM $BOTH`, Shell: true, Envs: map[string]string{"BOTH": "call"}}, nil, "sandbox call\n", 0},
		"cwd":     {client.Command{Cmd: "pwd", Cwd: "/etc"}, nil, "/etc\n", 0},
		"user":    {client.Command{Cmd: "id", Args: []string{"-un"}, User: "root"}, nil, "root\n", 0},
		"default": {client.Command{Cmd: "id", Args: []string{"-un"}}, nil, "user\n", 0},
		"sudo":    {client.Command{Cmd: "sudo", Args: []string{"id", "-u"}}, nil, "0\n", 0},
		"signal":  {client.Command{Cmd: "kill -9 $$", Shell: true}, nil, "", 137},
	} {
		r, err := c.Exec(t.Context(), s.ID, want.cmd, want.stdin)
		if err != nil || string(r.Stdout) != want.stdout || r.ExitCode != want.code {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
	r, err := c.Exec(t.Context(), s.ID, client.Command{Cmd: "sleep 1000 & sleep 1000", Shell: true, TimeoutSeconds: 2}, nil)
	if err != nil || !r.TimedOut {
		t.Errorf("timeout: %+v, %v", r, err)
	}
	if r, err := c.Exec(t.Context(), s.ID, client.Command{Cmd: "pgrep", Args: []string{"sleep"}}, nil); err != nil || r.ExitCode != 1 {
		t.Errorf("a process that timed out still runs: %+v, %v", r, err)
	}
	if _, err := c.Exec(t.Context(), s.ID, client.Command{Cmd: "true", Cwd: "/no/such"}, nil); err == nil {
		t.Error("a missing working directory was accepted")
	}
}

func TestFilesOfAnySize(t *testing.T) {
	i := up(t)
	c, s := i.client(t), i.sandbox(t, client.CreateOptions{})
	const size = 64 << 20
	sum := sha256.New()
	pattern := bytes.Repeat([]byte("0123456789abcde\n"), 4096)
	r := io.TeeReader(io.LimitReader(&repeater{b: pattern}, size), sum)
	if info, err := c.WriteFile(t.Context(), s.ID, "/home/user/deep/er/file", "", r); err != nil || info.Size != size {
		t.Fatalf("wrote %+v, %v", info, err)
	}
	back, err := c.ReadFile(t.Context(), s.ID, "deep/er/file", "")
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	got := sha256.New()
	if n, err := io.Copy(got, back); err != nil || n != size || !bytes.Equal(got.Sum(nil), sum.Sum(nil)) {
		t.Errorf("read %d bytes, %v", n, err)
	}
	if _, err := c.ReadFile(t.Context(), s.ID, "/no/such", ""); !client.IsNotFound(err) {
		t.Errorf("a missing file: %v", err)
	}
}

// repeater reads the same bytes for ever.
type repeater struct {
	b   []byte
	off int
}

func (r *repeater) Read(p []byte) (int, error) {
	n := copy(p, r.b[r.off:])
	r.off = (r.off + n) % len(r.b)
	return n, nil
}

// serve starts a program in a sandbox that continues when the call ends.
func serve(t *testing.T, c *client.Client, id, line string) {
	t.Helper()
	r, err := c.Exec(t.Context(), id, client.Command{Cmd: "setsid nohup " + line + " >/tmp/serve.log 2>&1 &", Shell: true}, nil)
	if err != nil || r.ExitCode != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
}

// eventually calls f until it returns nil, for events in a guest that nothing announces.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	var err error
	t.Cleanup(func() {
		if err != nil {
			t.Log(err)
		}
	})
	await.Until(t, "the condition holds", func() bool { err = f(); return err == nil })
}

func TestPortsAreReached(t *testing.T) {
	i := up(t)
	c, s := i.client(t), i.sandbox(t, client.CreateOptions{})
	_, port, _ := strings.Cut(i.listen, ":")
	host := func(p int) string { return fmt.Sprintf("%d-%s.localhost:%s", p, s.ID, port) }
	key := http.Header{"X-Api-Key": {i.creds.APIKey}}

	if _, err := c.WriteFile(t.Context(), s.ID, "/home/user/www/hello", "", strings.NewReader("hello")); err != nil {
		t.Fatal(err)
	}
	serve(t, c, s.ID, "python3 -m http.server 8000 --bind 127.0.0.1 --directory www")
	eventually(t, func() error {
		resp := i.request(t, http.MethodGet, host(8000), "/hello", key, nil)
		b, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != 200 || string(b) != "hello" {
			return fmt.Errorf("a service on loopback: %d %q", resp.StatusCode, b)
		}
		return nil
	})
	for name, want := range map[string]struct {
		host   string
		header http.Header
		status int
	}{
		"traffic token":              {host(8000), http.Header{"X-Traffic-Token": {s.TrafficToken}}, 200},
		"no key":                     {host(8000), nil, 401},
		"wrong key":                  {host(8000), http.Header{"X-Api-Key": {"wrn_" + strings.Repeat("0", 40)}}, 401},
		"unknown sandbox":            {fmt.Sprintf("8000-cl-%s.localhost:%s", strings.Repeat("0", 25), port), key, 404},
		"malformed id":               {"8000-cl-x.localhost:" + port, key, 400},
		"nothing listens":            {host(81), key, 502},
		"envd without token":         {host(49983), nil, 401},
		"envd with a key":            {host(49983), key, 401},
		"envd with a wrong token":    {host(49983), http.Header{"X-Access-Token": {"x"}, "X-Api-Key": {i.creds.APIKey}}, 401},
		"envd with the token":        {host(49983), http.Header{"X-Access-Token": {s.AccessToken}}, 204},
		"envd by the traffic token":  {host(49983), http.Header{"X-Traffic-Token": {s.TrafficToken}}, 401},
		"envd through another's key": {host(49983), http.Header{"X-Access-Token": {s.TrafficToken}}, 401},
	} {
		path := "/hello"
		if strings.HasPrefix(name, "envd") {
			path = "/health"
		}
		if resp := i.request(t, http.MethodGet, want.host, path, want.header, nil); resp.StatusCode != want.status {
			b, _ := io.ReadAll(resp.Body)
			t.Errorf("%s: %d %s, want %d", name, resp.StatusCode, b, want.status)
		}
	}
	for _, p := range []int{0, 65536} {
		if resp := i.request(t, http.MethodGet, host(p), "/", key, nil); resp.StatusCode != 400 && resp.StatusCode != 404 {
			t.Errorf("port %d: %d", p, resp.StatusCode)
		}
	}

	// A WebSocket takes the same path.
	const echo = `import base64,hashlib,socket,struct
l=socket.create_server(("127.0.0.1",8001))
while True:
    s,_=l.accept(); f=s.makefile("rb"); key=b""
    while (line:=f.readline().strip()):
        if line.lower().startswith(b"sec-websocket-key:"): key=line.split(b":",1)[1].strip()
    a=base64.b64encode(hashlib.sha1(key+b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    s.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "+a+b"\r\n\r\n")
    while (h:=f.read(2)):
        n=h[1]&127; m=f.read(4); d=bytes(b^m[i%4] for i,b in enumerate(f.read(n)))
        s.sendall(bytes([h[0],n])+d)
        if h[0]&15==8: break
    s.close()
`
	if _, err := c.WriteFile(t.Context(), s.ID, "/home/user/echo.py", "", strings.NewReader(echo)); err != nil {
		t.Fatal(err)
	}
	serve(t, c, s.ID, "python3 echo.py")
	eventually(t, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		conn, _, err := websocket.Dial(ctx, c.URL(s, 8001), &websocket.DialOptions{HTTPClient: &http.Client{Transport: c.Transport()}})
		if err != nil {
			return err
		}
		defer conn.CloseNow()
		if err := conn.Write(ctx, websocket.MessageText, []byte("ping")); err != nil {
			return err
		}
		if _, b, err := conn.Read(ctx); err != nil || string(b) != "ping" {
			return fmt.Errorf("echo: %q, %v", b, err)
		}
		return nil
	})
}

// peak returns the highest memory use so far of a process in a role, in KiB.
func peak(t *testing.T, i *installation, role string) (kib int64) {
	t.Helper()
	pids := i.roles(t)[role]
	if len(pids) == 0 {
		t.Fatalf("no %s runs", role)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pids[0]))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatal(err)
	}
	return kib
}

func TestLargeDownloadTakesNoMemory(t *testing.T) {
	i := up(t)
	c, s := i.client(t), i.sandbox(t, client.CreateOptions{})
	const size = 1 << 30
	const program = `from http.server import *
class H(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", str(1<<30)); self.end_headers()
        block = bytes(1<<20)
        for _ in range(1024): self.wfile.write(block)
HTTPServer(("0.0.0.0", 8002), H).serve_forever()
`
	if _, err := c.WriteFile(t.Context(), s.ID, "/home/user/big.py", "", strings.NewReader(program)); err != nil {
		t.Fatal(err)
	}
	serve(t, c, s.ID, "python3 big.py")
	h := &http.Client{Transport: c.Transport()}
	var resp *http.Response
	eventually(t, func() (err error) {
		if resp, err = h.Get(c.URL(s, 8002)); err != nil {
			return err
		}
		if resp.StatusCode != 200 {
			resp.Body.Close()
			return errors.New(resp.Status)
		}
		return nil
	})
	defer resp.Body.Close()
	server, agent := peak(t, i, "server"), peak(t, i, "agent")
	began := time.Now()
	n, err := io.Copy(io.Discard, resp.Body)
	if err != nil || n != size {
		t.Fatalf("%d bytes, %v", n, err)
	}
	t.Logf("1 GiB in %v", time.Since(began).Round(time.Second))
	for role, before := range map[string]int64{"server": server, "agent": agent} {
		if grown := peak(t, i, role) - before; grown > 32<<10 {
			t.Errorf("the %s grew by %d MiB", role, grown>>10)
		}
	}
}

func TestTwentyAtOnce(t *testing.T) {
	i := up(t)
	c := i.client(t)
	before := i.leftovers(t)
	var wg sync.WaitGroup
	for n := range 20 {
		wg.Go(func() {
			s, err := c.Create(t.Context(), client.CreateOptions{MemoryMiB: 256})
			if err != nil {
				t.Error(err)
				return
			}
			r, err := c.Exec(t.Context(), s.ID, client.Command{Cmd: "echo", Args: []string{fmt.Sprint(n)}}, nil)
			if err != nil || string(r.Stdout) != fmt.Sprintf("%d\n", n) {
				t.Errorf("%+v, %v", r, err)
			}
			if err := c.Delete(t.Context(), s.ID); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	i.same(t, before)
}

// TestIdempotencyAndFilters checks that several requests with one idempotency key create one
// sandbox, and that the filters of lists find it.
func TestIdempotencyAndFilters(t *testing.T) {
	i := up(t)
	c := i.client(t)
	o := client.CreateOptions{Metadata: map[string]string{"n": "1", "k": "v"}, IdempotencyKey: fmt.Sprintf("once-%d", time.Now().UnixNano())}
	var ids sync.Map
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			s, err := c.Create(t.Context(), o)
			if err != nil {
				t.Error(err)
				return
			}
			ids.Store(s.ID, true)
		})
	}
	wg.Wait()
	var id string
	count := 0
	ids.Range(func(k, _ any) bool { id = k.(string); count++; return true })
	if count != 1 {
		t.Fatalf("one key made %d sandboxes", count)
	}
	other := o
	other.MemoryMiB = 1024
	var e *client.Error
	if _, err := c.Create(t.Context(), other); !errors.As(err, &e) || e.Status != 422 {
		t.Errorf("one key with another body: %v", err)
	}
	found := func(o client.ListOptions) bool {
		o.PageSize = 1
		for s, err := range c.List(t.Context(), o) {
			if err != nil {
				t.Error(err)
				return false
			}
			if s.ID == id {
				return true
			}
		}
		return false
	}
	for name, want := range map[string]struct {
		o  client.ListOptions
		in bool
	}{
		"metadata":          {client.ListOptions{Metadata: map[string]string{"n": "1", "k": "v"}}, true},
		"other metadata":    {client.ListOptions{Metadata: map[string]string{"n": "2"}}, false},
		"metadata not all":  {client.ListOptions{Metadata: map[string]string{"n": "1", "k": "w"}}, false},
		"state":             {client.ListOptions{States: []string{"running"}}, true},
		"state not its own": {client.ListOptions{States: []string{"stopped"}}, false},
	} {
		if got := found(want.o); got != want.in {
			t.Errorf("%s: found is %v", name, got)
		}
	}
	if err := c.Delete(t.Context(), id); err != nil {
		t.Error(err)
	}
}

// TestExpiry checks that a ping postpones a sandbox's end, and that one that nobody uses
// ends.
func TestExpiry(t *testing.T) {
	i := up(t)
	c := i.client(t)
	before := i.sandbox(t, client.CreateOptions{})
	pinged, err := c.Ping(t.Context(), before.ID)
	if err != nil {
		t.Fatal(err)
	}
	if before.ExpiresAt == nil || pinged.ExpiresAt == nil || !pinged.ExpiresAt.After(*before.ExpiresAt) {
		t.Fatalf("it expires at %v, and after a ping at %v", before.ExpiresAt, pinged.ExpiresAt)
	}
	seconds := 1
	unused := i.sandbox(t, client.CreateOptions{TimeoutSeconds: &seconds})
	eventually(t, func() error {
		s, err := c.Get(t.Context(), unused.ID)
		if err != nil {
			return err
		}
		if s.State != "stopped" || s.EndReason != "expired" {
			return fmt.Errorf("it is %s (%s)", s.State, s.EndReason)
		}
		return nil
	})
}

func TestBadInput(t *testing.T) {
	i := up(t)
	s := i.sandbox(t, client.CreateOptions{})
	key := http.Header{"X-Api-Key": {i.creds.APIKey}, "Content-Type": {"application/json"}}
	for name, want := range map[string]struct {
		method, path, body string
		header             http.Header
		status             int
	}{
		"unknown template":   {"POST", "/v1/sandboxes", `{"template":"nope"}`, key, 404},
		"memory 0":           {"POST", "/v1/sandboxes", `{"memory_mib":0}`, key, 400},
		"memory too large":   {"POST", "/v1/sandboxes", `{"memory_mib":99999999}`, key, 400},
		"no JSON":            {"POST", "/v1/sandboxes", `{`, key, 400},
		"unknown field":      {"POST", "/v1/sandboxes", `{"memori":1}`, key, 400},
		"oversized body":     {"POST", "/v1/sandboxes", `{"metadata":{"a":"` + strings.Repeat("x", 2<<20) + `"}}`, key, 413},
		"malformed id":       {"GET", "/v1/sandboxes/cl-x", "", key, 400},
		"another kind of id": {"GET", "/v1/sandboxes/tm-" + strings.Repeat("0", 25), "", key, 400},
		"unknown id":         {"GET", "/v1/sandboxes/cl-" + strings.Repeat("0", 25), "", key, 404},
		"no key":             {"GET", "/v1/sandboxes", "", nil, 401},
		"wrong key":          {"GET", "/v1/sandboxes", "", http.Header{"X-Api-Key": {"wrn_x"}}, 401},
		"path with ..":       {"GET", "/v1/sandboxes/" + s.ID + "/files?path=/home/../etc/passwd", "", key, 400},
		"path with NUL":      {"GET", "/v1/sandboxes/" + s.ID + "/files?path=/a%00b", "", key, 400},
		"no path":            {"GET", "/v1/sandboxes/" + s.ID + "/files", "", key, 400},
		"unknown route":      {"GET", "/v1/nope", "", key, 404},
		"wrong method":       {"PATCH", "/v1/sandboxes", "", key, 405},
	} {
		resp := i.request(t, want.method, "localhost", want.path, want.header, strings.NewReader(want.body))
		b, _ := io.ReadAll(resp.Body)
		var e struct {
			Error struct{ Code, Message string }
		}
		if err := json.Unmarshal(b, &e); err != nil || resp.StatusCode != want.status || e.Error.Code == "" || e.Error.Message == "" {
			t.Errorf("%s: %d %s, want %d", name, resp.StatusCode, b, want.status)
		}
	}
	for _, path := range []string{"/health", "/docs", "/openapi.yaml"} {
		if resp := i.request(t, http.MethodGet, "localhost", path, nil, nil); resp.StatusCode != 200 {
			t.Errorf("%s: %d", path, resp.StatusCode)
		}
	}
}

func TestGuestIsAlone(t *testing.T) {
	i := up(t)
	c, a, b := i.client(t), i.sandbox(t, client.CreateOptions{}), i.sandbox(t, client.CreateOptions{})
	script := `import socket,sys
for host,port in [x.split(":") for x in sys.argv[1:]]:
    s=socket.socket(); s.settimeout(3)
    try:
        s.connect((host,int(port))); print("reached",host,port)
    except OSError: pass
`
	_, port, _ := strings.Cut(i.listen, ":")
	args := []string{"-c", script, "10.11.0.0:" + port, "10.11.0.2:49983", "10.11.0.3:49983", "10.11.0.1:22", "192.168.0.1:80", "169.254.0.22:22"}
	for _, s := range []*client.Sandbox{a, b} {
		r, err := c.Exec(t.Context(), s.ID, client.Command{Cmd: "python3", Args: args}, nil)
		if err != nil || r.ExitCode != 0 || len(r.Stdout) != 0 {
			t.Errorf("%+v, %v: %s", r, err, r.Stdout)
		}
	}
	// Each has its own name and clock.
	for _, s := range []*client.Sandbox{a, b} {
		r, err := c.Exec(t.Context(), s.ID, client.Command{Cmd: "hostname; date +%s", Shell: true}, nil)
		if err != nil {
			t.Fatal(err)
		}
		var name string
		var now int64
		if _, err := fmt.Sscan(string(r.Stdout), &name, &now); err != nil || name != s.ID {
			t.Errorf("host name and time are %q, %v", r.Stdout, err)
		}
		if d := time.Now().Unix() - now; d < -5 || d > 5 {
			t.Errorf("the clock is off by %d s", d)
		}
	}
}
