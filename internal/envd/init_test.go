package envd

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
	pb "github.com/wrenn-dev/wrenn/internal/gen/process"
	"github.com/wrenn-dev/wrenn/internal/gen/process/processconnect"
	"github.com/wrenn-dev/wrenn/internal/hostwire"
	"github.com/wrenn-dev/wrenn/internal/netaddr"
)

// notes is a fake machine that records its calls.
type notes struct {
	mu   sync.Mutex
	told []string
	fail map[string]error
	look func() // called for each note
}

func (n *notes) note(what, detail string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.look != nil {
		n.look()
	}
	n.told = append(n.told, what+" "+detail)
	return n.fail[what]
}

func (n *notes) Reseed(b []byte) error      { return n.note("reseed", string(b[:1])) }
func (n *notes) Rename(s string) error      { return n.note("rename", s) }
func (n *notes) SetClock(t time.Time) error { return n.note("clock", t.Format(time.RFC3339)) }
func (n *notes) Export(envs map[string]string) error {
	return n.note("export", strconv.Itoa(len(envs)))
}

func (n *notes) Grow(context.Context, int64) (int64, error) {
	return 4096, n.note("grow", "")
}

// bare returns a daemon without users' processes.
func bare(t *testing.T, m Machine) *Server {
	t.Helper()
	s, err := New(Config{DefaultUser: "root", Machine: m})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(context.Background()) })
	return s
}

func post(s *Server, token, body string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodPost, "/init", strings.NewReader(body))
	if token != "" {
		r.Header.Set(hostwire.AccessToken, token)
	}
	s.Handler().ServeHTTP(w, r)
	return w
}

const whole = `{"accessToken":"new","timestamp":"2026-01-02T03:04:05Z","entropy":"QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=","hostname":"h","envVars":{"A":"b"},"growDisk":4096,"thaw":true}`

func TestInitOrder(t *testing.T) {
	n := &notes{fail: map[string]error{}}
	s := bare(t, n)
	w := post(s, "", whole)
	if w.Code != 200 || strings.TrimSpace(w.Body.String()) != `{"disk":4096}` {
		t.Errorf("answers %d %s", w.Code, w.Body)
	}
	if want := []string{"reseed A", "clock 2026-01-02T03:04:05Z", "rename h", "export 1", "grow "}; !slices.Equal(n.told, want) {
		t.Errorf("the machine was told %q", n.told)
	}
	// Without the token, nobody can tell the machine anything.
	n.told = nil
	for _, token := range []string{"", "old"} {
		if w := post(s, token, whole); w.Code != 401 || len(n.told) > 0 {
			t.Errorf("with token %q: %d, told %q", token, w.Code, n.told)
		}
	}
	// The response reports failures that do no harm.
	n.fail = map[string]error{"rename": errors.New("no room"), "grow": errors.New("no ext4"), "clock": errors.New("no clock")}
	w = post(s, "new", whole)
	var r initReply
	if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil || w.Code != 200 || !slices.Equal(r.Warnings, []string{"no clock", "no room", "no ext4"}) {
		t.Errorf("answers %d %s", w.Code, w.Body)
	}
	// Without new random numbers a guest must not continue: nothing changes.
	n.fail, n.told = map[string]error{"reseed": errors.New("no pool")}, nil
	if w := post(s, "new", strings.Replace(whole, `"new"`, `"newer"`, 1)); w.Code != 500 || len(n.told) != 1 || s.current().token != "new" {
		t.Errorf("answers %d, told %q, token %q", w.Code, n.told, s.current().token)
	}
	for _, bad := range []string{`{"entropy":"QUE="}`, `{"entropy":"?"}`, `{"hostname":"a b"}`, `{"growDisk":-1}`, `{"growDisk":1e30}`, `{"thaw":1}`} {
		if w := post(s, "new", bad); w.Code != 400 {
			t.Errorf("%s answers %d", bad, w.Code)
		}
	}
	// Another kind of client sends the time in another form, or not at all.
	n.told = nil
	for _, other := range []string{`{"timestamp":1}`, `{"timestamp":null}`, `{"timestamp":"noon"}`, `{}`} {
		if w := post(s, "new", other); w.Code != 204 || len(n.told) > 0 {
			t.Errorf("%s answers %d, told %q", other, w.Code, n.told)
		}
	}
}

func FuzzInit(f *testing.F) {
	f.Add(whole)
	f.Add(`{"accessToken":"t","envVars":{"A":"b"},"defaultUser":"root","defaultWorkdir":"/"}`)
	f.Fuzz(func(t *testing.T, body string) {
		n := &notes{}
		s, err := New(Config{DefaultUser: "root", Machine: n})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close(context.Background())
		w := post(s, "", body)
		taken := w.Code == 200 || w.Code == 204
		if taken != (s.current().token != "") || !taken && (w.Code != 400 || len(n.told) > 0) {
			t.Errorf("%q answers %d, token %q, told %q", body, w.Code, s.current().token, n.told)
		}
		for k := range s.current().envs {
			if k == "" || strings.ContainsAny(k, "=\x00") {
				t.Errorf("environment has %q", k)
			}
		}
	})
}

// TestInitThawsLast initialises a guest that was frozen before its memory was captured.
func TestInitThawsLast(t *testing.T) {
	g := boot(t)
	if g.cgroup == "" {
		t.Skip("needs a cgroup2 mount")
	}
	n := &notes{}
	g.server.cfg.Machine = n
	users, clock, others := g.writes(), g.clockWrites(), g.othersWrite()
	await.Until(t, "output", func() bool { return users() > 0 && clock() > 0 })
	if a := g.do("POST", "/freeze", testToken, nil, nil); a.code != 204 {
		t.Fatalf("/freeze answers %d %s", a.code, a.body)
	}
	users0, clock0 := users(), clock()
	n.look = func() {
		others()
		if users() != users0 {
			t.Error("a process runs before the guest has its sandbox's identity")
		}
		if clock() != clock0 {
			t.Error("the clock's program runs before the clock is set")
		}
	}
	body := map[string]any{"entropy": make([]byte, 64), "timestamp": time.Now(), "hostname": "h"}
	// Without thaw, they stay frozen.
	g.init(body, testToken, 204)
	n.look()
	body["thaw"] = true
	g.init(body, testToken, 204)
	await.Until(t, "output after the thaw", func() bool { return users() > users0 && clock() > clock0 })
	g.init(map[string]any{"thaw": true}, testToken, 204) // again
}

// TestInitShedsConnections checks that connections of the captured memory end, while
// their processes continue.
func TestInitShedsConnections(t *testing.T) {
	s := bare(t, nil)
	addr := "unix:" + filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, addr) }()
	defer func() { cancel(); <-done }()
	opened := func() int {
		s.open.mu.Lock()
		defer s.open.mu.Unlock()
		return len(s.open.open)
	}
	h2, base := netaddr.HTTPClient(addr)
	h1 := &http.Client{Transport: netaddr.Transport(addr, false)}
	fresh := &http.Client{Transport: netaddr.Transport(addr, false)}
	defer func() { h2.CloseIdleConnections(); h1.CloseIdleConnections(); fresh.CloseIdleConnections() }()
	initWith := func(c *http.Client) {
		t.Helper()
		var res *http.Response
		await.Until(t, "/init", func() bool {
			req, _ := http.NewRequestWithContext(t.Context(), "POST", base+"/init", strings.NewReader(`{"accessToken":"`+testToken+`"}`))
			req.Header.Set(hostwire.AccessToken, testToken)
			var err error
			if res, err = c.Do(req); err != nil {
				return false
			}
			return true
		})
		res.Body.Close()
		if res.StatusCode != 204 {
			t.Fatalf("/init answers %d", res.StatusCode)
		}
	}
	initWith(fresh)
	for _, c := range []*http.Client{h1, h2} {
		client := processconnect.NewProcessClient(c, base)
		stream, err := client.Start(t.Context(), as("root", &pb.StartRequest{Process: sh("exec sleep 60")}))
		if err != nil || !stream.Receive() {
			t.Fatalf("start: %v, %v", err, stream.Err())
		}
		pid := stream.Msg().GetEvent().GetStart().GetPid()
		initWith(fresh)
		for stream.Receive() {
		}
		if stream.Err() == nil {
			t.Error("the stream ends without an error")
		}
		stream.Close()
		await.Until(t, "the connections end", func() bool { return opened() == 1 })
		again, err := client.Connect(t.Context(), as("root", &pb.ConnectRequest{Process: &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: pid}}}))
		if err != nil || !again.Receive() {
			t.Fatalf("connect again: %v, %v", err, again.Err())
		}
		again.Close()
	}
	// The connection that carries the request stays, over HTTP/2 too.
	initWith(h2)
	await.Until(t, "the connections end", func() bool { return opened() == 1 })
}
