package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/wrenn-dev/wrenn/internal/await"
	"github.com/wrenn-dev/wrenn/internal/linger/lingertest"
	"github.com/wrenn-dev/wrenn/internal/patience"
	"github.com/wrenn-dev/wrenn/internal/server"
)

// stalled is a request whose body does not end.
type stalled struct {
	operation
	net.Conn
	in *bufio.Reader
}

// stall sends a request without most of its body, and returns once the server waits for
// the rest.
func (w *world) stall(o operation, c caller, address net.Addr) *stalled {
	w.Helper()
	_, path, _, headers := w.compose(o, c, targets[0], 0)
	conn, err := net.Dial("tcp", address.String())
	if err != nil {
		w.Fatal(err)
	}
	s := &stalled{o, conn, bufio.NewReader(conn)}
	w.Cleanup(func() { conn.Close() })
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n", o.method, path)
	typed := false
	for i := 0; i < len(headers); i += 2 {
		fmt.Fprintf(&b, "%s: %s\r\n", headers[i], headers[i+1])
		typed = typed || headers[i] == "Content-Type"
	}
	if !typed {
		b.WriteString("Content-Type: application/json\r\n")
	}
	b.WriteString("\r\n")
	if _, err := conn.Write([]byte(b.String())); err != nil {
		w.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(await.Hang))
	// The server sends 100 when it first reads the body.
	line, err := s.in.ReadString('\n')
	if err != nil || !strings.Contains(line, " 100 ") {
		rest := make([]byte, 1<<10)
		n, _ := s.in.Read(rest)
		w.Fatalf("%s: %q, %v: the server did not wait for the body\n%s", o, line, err, rest[:n])
	}
	if _, err := s.in.ReadString('\n'); err != nil {
		w.Fatal(err)
	}
	if _, err := conn.Write([]byte("1\r\n{\r\n")); err != nil {
		w.Fatal(err)
	}
	return s
}

// withBodies calls f with every operation that takes a body, and a caller who may call
// it.
func (w *world) withBodies(f func(o operation, c caller)) {
	all := callers()
	for _, o := range operations(w.TB) {
		if o.RequestBody == nil {
			continue
		}
		for _, c := range all {
			if !c.dead && o.expected(c, targets[0]) == 0 {
				f(o, c)
				break
			}
		}
	}
}

// TestStalledBodies stalls several bodies of every operation at once. They must hold
// neither one of the two database connections nor anything that another team, the host or
// the server's heartbeat needs.
func TestStalledBodies(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	p.end()
	p.db() // The test's own connection is not from the pool.
	p.config.DatabaseURL += "&pool_max_conns=2"
	p.start()
	w := p.world()
	n := 0
	w.withBodies(func(o operation, c caller) {
		for range 4 {
			w.stall(o, c, p.http.Listener.Addr())
		}
		n++
	})
	if n < 40 {
		t.Errorf("only %d operations take a body", n)
	}
	p.eventually("no connection is in use", func() bool { return server.Acquired(p.server) == 0 })
	other := p.newTeam()
	for range 3 {
		p.call("GET", "/v1/sandboxes", nil, "X-API-Key", other).want(200)
		p.call("POST", "/v1/auth/login", map[string]any{"email": "admin@example.com", "password": "correct horse"}).want(200)
	}
	p.call("POST", "/v1/templates/import/archive?name=other", strings.NewReader("an archive"), "X-API-Key", other, "Content-Type", "application/x-tar").want(201)
	seen := func() (host, server time.Time) {
		if err := p.db().QueryRow(t.Context(), "SELECT (SELECT max(last_seen_at) FROM hosts), (SELECT max(seen_at) FROM servers)").Scan(&host, &server); err != nil {
			t.Fatal(err)
		}
		return host, server
	}
	host, alive := seen()
	p.eventually("the server still sends heartbeats", func() bool {
		h, s := seen()
		return h.After(host) && s.After(alive)
	})
	t.Logf("%d operations, %d stalled bodies", n, 4*n)
}

// TestSlowBodies stalls the body of every operation: the server soon refuses each request
// and closes its connection.
func TestSlowBodies(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	w := p.world()
	impatient := lingertest.NewServer(patience.Handler(p.server.Handler(), patience.Limits{Whole: 2 * time.Second, Grace: 2 * time.Second, Rate: 1 << 10, Longest: time.Hour, Idle: time.Hour}))
	t.Cleanup(impatient.Close)
	var all []*stalled
	w.withBodies(func(o operation, c caller) { all = append(all, w.stall(o, c, impatient.Listener.Addr())) })
	for _, s := range all {
		resp, err := http.ReadResponse(s.in, nil)
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusRequestTimeout || !strings.Contains(string(body), `"request_timeout"`) {
			t.Errorf("%s: %d %s, %v", s, resp.StatusCode, body, err)
		}
		if _, err := s.in.ReadByte(); err != io.EOF {
			t.Errorf("%s: the connection stays open: %v", s, err)
		}
	}
}

// TestUploadsEnd stalls the body of every operation that streams it, and logs everybody
// out: the server refuses the request at once, without waiting for the body.
func TestUploadsEnd(t *testing.T) {
	t.Parallel()
	p := newPlane(t)
	w := p.world()
	n := 0
	w.withBodies(func(o operation, c caller) {
		if o.RequestBody.Value.Content.Get("application/json") != nil {
			return
		}
		n++
		delete(w.shown, c.name) // makes the caller log in again
		s := w.stall(o, c, p.http.Listener.Addr())
		w.sql("DELETE FROM sessions")
		resp, err := http.ReadResponse(s.in, nil)
		if err != nil {
			t.Errorf("%s as %s: %v", o, c.name, err)
			return
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s as %s: %d %s, %v", o, c.name, resp.StatusCode, body, err)
		}
	})
	if n < 6 {
		t.Errorf("only %d operations stream their bodies", n)
	}
}
