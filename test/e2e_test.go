// Package e2e tests Wrenn the way users run it: the built programs, started by `wrenn up`
// on a fresh data directory, with real VMs, through the public API, the Go client and the
// command line.
package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/client"
	"github.com/wrenn-dev/wrenn/internal/apitest"
	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/server/store/pgtest"
)

// installation is one `wrenn up`.
type installation struct {
	dir    string
	listen string // host:port
	wrenn  string // the program
	cmd    *exec.Cmd
	out    *output
	ended  chan struct{}
	creds  credentials
}

type credentials struct {
	URL      string `json:"url"`
	APIKey   string `json:"api_key"`
	Email    string `json:"email"`
	Password string `json:"password"`
}

// output keeps a program's output, and signals when a line appears.
type output struct {
	mu    sync.Mutex
	text  strings.Builder
	lines chan string
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// programs builds wrenn and envd once per test run, and returns their folder.
var programs = sync.OnceValues(func() (string, error) {
	mod, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find the source tree: %w", err)
	}
	cmd := exec.Command("make", "-C", strings.TrimSpace(string(mod)), "build")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make build: %w: %s", err, out)
	}
	return filepath.Join(strings.TrimSpace(string(mod)), "bin"), nil
})

// unable returns why end-to-end tests cannot run here, or "".
func unable() string {
	if os.Geteuid() != 0 {
		return "needs root to make virtual machines and networks"
	}
	for _, tool := range []string{"qemu-system-x86_64", "redis-server", "mmdebstrap", "mke2fs", "depmod", "make"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "needs " + tool
		}
	}
	bin, err := programs()
	if err != nil {
		return err.Error()
	}
	if out, err := exec.Command(filepath.Join(bin, "wrenn"), "--help").Output(); err != nil || !strings.Contains(string(out), "agent") {
		return "the program has no host agent yet"
	}
	return ""
}

// cache returns the folder that keeps images from one test run to the next.
func cache() (string, error) {
	dir := os.Getenv("WRENN_TEST_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(user, "wrenn-test")
	}
	dir = filepath.Join(dir, "e2e")
	return dir, os.MkdirAll(dir, 0o755)
}

// newDir creates a data directory with images that an earlier test built, because they
// take long; other tests build them.
func newDir() (string, error) {
	dir, err := os.MkdirTemp("", "wrenn-e2e-")
	if err != nil {
		return "", err
	}
	from, err := cache()
	if err != nil {
		return "", err
	}
	for _, part := range []string{"kernels", "images"} {
		if err := linkTree(filepath.Join(from, part), filepath.Join(dir, part)); err != nil {
			return "", err
		}
	}
	return dir, os.Chmod(dir, 0o711)
}

// linkTree makes the folder to, with hard links to the files in from. Agents replace the
// files of images, and never write to them. On another file system, it copies.
func linkTree(from, to string) error {
	if _, err := os.Stat(from); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if exec.Command("cp", "-a", "--link", from, to).Run() == nil {
		return nil
	}
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copy images: %w: %s", err, out)
	}
	return nil
}

// keepImages stores an installation's images for the next one.
func keepImages(dir string) error {
	to, err := cache()
	if err != nil {
		return err
	}
	for _, part := range []string{"kernels", "images"} {
		if err := os.RemoveAll(filepath.Join(to, part)); err != nil {
			return err
		}
		if err := linkTree(filepath.Join(dir, part), filepath.Join(to, part)); err != nil {
			return err
		}
	}
	return nil
}

// end kills what is left of the installation in dir: wrenn up, its programs, agents, and
// machines, which survive both. A test that fails in the middle must leave none, because
// nobody finds them once their files are gone.
func end(dir string) (left map[int]string) {
	all := make(map[int]string)
	await.Within(await.Hang, func() bool {
		now := processes(dir)
		for pid, line := range now {
			all[pid] = line
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(now) == 0
	})
	return all
}

// discard ends what a test may have left of an installation, and removes it.
func discard(t testing.TB, dir string) {
	t.Helper()
	if left := end(dir); len(left) > 0 {
		t.Logf("ended what the test left: %v", left)
	}
	_ = os.RemoveAll(dir)
}

// freeAddress returns an address on which nothing listens.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// start runs `wrenn up`, and returns when that is ready.
func start(dir, listen string) (*installation, error) {
	bin, err := programs()
	if err != nil {
		return nil, err
	}
	i := &installation{dir: dir, listen: listen, wrenn: filepath.Join(bin, "wrenn"), out: &output{lines: make(chan string, 1000)}, ended: make(chan struct{})}
	i.cmd = exec.Command(i.wrenn, "up", "--dir", dir, "--listen", listen)
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	i.cmd.Stdout, i.cmd.Stderr = w, w
	i.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = i.cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		return nil, err
	}
	go func() {
		defer r.Close()
		defer close(i.out.lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			i.out.mu.Lock()
			i.out.text.WriteString(s.Text() + "\n")
			i.out.mu.Unlock()
			select {
			case i.out.lines <- s.Text():
			default:
			}
		}
	}()
	go func() { defer close(i.ended); _ = i.cmd.Wait() }()
	timeout := time.After(8 * time.Minute)
	for {
		select {
		case line, ok := <-i.out.lines:
			if !ok {
				<-i.ended
				return nil, fmt.Errorf("wrenn up ended (%v):\n%s", i.cmd.ProcessState, i.out)
			}
			if strings.HasSuffix(line, "] ready") {
				b, err := os.ReadFile(filepath.Join(dir, "credentials.json"))
				if err != nil {
					return nil, err
				}
				return i, json.Unmarshal(b, &i.creds)
			}
		case <-timeout:
			return nil, errors.Join(fmt.Errorf("wrenn up is not ready:\n%s", i.out), i.stop())
		}
	}
}

// stop interrupts `wrenn up` like a user.
func (i *installation) stop() error {
	if err := i.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-i.ended:
	case <-time.After(2 * time.Minute):
		_ = i.cmd.Process.Kill()
		<-i.ended
		return fmt.Errorf("wrenn up did not stop:\n%s", i.out)
	}
	if !i.cmd.ProcessState.Success() {
		return fmt.Errorf("wrenn up ended with %v:\n%s", i.cmd.ProcessState, i.out)
	}
	return nil
}

// client returns a client with the first admin's key.
func (i *installation) client(t testing.TB) *client.Client {
	t.Helper()
	c, err := client.New("http://"+i.listen, i.creds.APIKey, client.WithHTTPClient(&http.Client{Transport: checked(t)}))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// checked is a transport that fails the test for every response that does not conform to
// the OpenAPI document.
func checked(t testing.TB) http.RoundTripper {
	t.Helper()
	d, err := apitest.Load()
	if err != nil {
		t.Fatal(err)
	}
	next := http.DefaultTransport.(*http.Transport).Clone()
	next.DisableCompression = true
	t.Cleanup(next.CloseIdleConnections)
	return d.Transport(next, func(err error) { t.Error(err) })
}

// front is a proxy to the installation's front door that fails the test for every
// response that does not conform to the OpenAPI document.
func (i *installation) front(t testing.TB) *httptest.Server {
	t.Helper()
	return httptest.NewServer(&httputil.ReverseProxy{
		Transport: checked(t), FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0),
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: i.listen})
			r.Out.Host = i.listen
		},
	})
}

// cli runs a client command.
func (i *installation) cli(t testing.TB, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	front := i.front(t)
	defer front.Close()
	cmd := exec.CommandContext(t.Context(), i.wrenn, args...)
	cmd.Env = append(os.Environ(), "WRENN_URL="+front.URL, "WRENN_API_KEY="+i.creds.APIKey)
	var out, errb bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errb
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errb.String(), cmd.ProcessState.ExitCode()
}

// request sends a request with the Host that a sandbox's URL has.
func (i *installation) request(t testing.TB, method, host, path string, header http.Header, body io.Reader) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+i.listen+path, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = host
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := (&http.Client{Transport: checked(t)}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// sandbox creates a sandbox that ends with the test.
func (i *installation) sandbox(t testing.TB, o client.CreateOptions) *client.Sandbox {
	t.Helper()
	c := i.client(t)
	s, err := c.Create(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := c.Delete(ctx, s.ID); err != nil {
			t.Error(err)
		}
	})
	return s
}

// shared is the installation of most tests, started by the first of them.
var shared = sync.OnceValues(func() (*installation, error) {
	dir, err := newDir()
	if err != nil {
		return nil, err
	}
	sharedDir = dir
	listen, err := freeAddress()
	if err != nil {
		return nil, err
	}
	i, err := start(dir, listen)
	if err != nil {
		return nil, err
	}
	return i, keepImages(dir)
})

var (
	sharedUsed bool
	sharedDir  string // empty: not yet created
)

func up(t testing.TB) *installation {
	t.Helper()
	if why := unable(); why != "" {
		t.Skip(why)
	}
	sharedUsed = true
	i, err := shared()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestMain(m *testing.M) {
	// Tests count machines, so no warm ones may start.
	os.Setenv("WRENN_WARM", "0")
	os.Setenv("WRENN_LOCAL_REGISTRIES", "true")
	code := m.Run()
	pgtest.End()
	if sharedUsed {
		if i, err := shared(); err == nil {
			if err := i.stop(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				code = 1
			}
			if left := end(i.dir); len(left) > 0 {
				fmt.Fprintln(os.Stderr, "wrenn up left processes:", left)
				code = 1
			}
			if code == 0 {
				os.RemoveAll(i.dir)
			} else {
				fmt.Fprintf(os.Stderr, "wrenn up printed:\n%s\nits logs are in %s\n", i.out, i.dir)
			}
		}
	}
	if sharedDir != "" {
		end(sharedDir) // It may not have become ready.
	}
	os.Exit(code)
}
